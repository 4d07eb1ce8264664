"""Tiny random LLMs and tokenizers made in code: llama, qwen2 and gemma3 shapes, no network."""

from __future__ import annotations

import atexit
import errno
import fnmatch
import gc
import gzip
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from promptembedder import ModelConfig, RunConfig, build
from promptembedder.cli import app as cli
from promptembedder.data.settings import DataConfig, DataFile
from promptembedder.training.settings import EvaluationConfig, TrainingConfig, WarmStartConfig
from promptembedder.transfer.settings import TransferConfig

# As the command line does: libraries make a million objects that live to the end.
gc.set_threshold(200_000, 20, 20)
atexit.register(gc.freeze)

# Run by `make test-engines`, in environments of their own.
collect_ignore_glob = [] if os.environ.get("PROMPTEMBEDDER_ENGINES") else ["engines/*"]


def pytest_addoption(parser: pytest.Parser) -> None:
    """How many examples each fuzz test tries."""
    parser.addoption("--fuzz-examples", type=int, default=300, help="examples that each fuzz test tries")


TEXTS = [
    "A man is playing a guitar.",
    "Rain.",
    "Two children in blue coats walk slowly across the old bridge while it rains on the river and the town.",
    "The bank raised its rates again",
    "a guitar is played by a man",
]
INSTRUCTION = "Retrieve sentences that mean the same."
# Byte-level and without aspects, which the tiny vocabularies split.
CUE = 'said in a few short words, and as clearly as one can, which means in one word:"'
SECOND = "Given a question, retrieve questions that ask the same thing."
MANY = [f"{text} {n}" for n in range(6) for text in TEXTS]
ARCHITECTURES = ("llama", "qwen2", "gemma3")
# For tests that take about a second each: `make check` takes the first shape alone.
FIRST_QUICK = ("llama", *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen2", "gemma3")))

_CORPUS = [
    *TEXTS,
    INSTRUCTION,
    "Represent the meaning of the text.",
    "Given a question, retrieve questions that ask the same thing.",
    "said in a few short words, and as clearly as one can, which means in one word",
]
_CHAT = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def byte_level_tokenizer(vocab: int = 320) -> PreTrainedTokenizerFast:
    """Byte-level BPE as GPT-2, Llama 3 and Qwen have it; a chat template; nothing added around a text."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    specials = ["<|end|>", "<|start|>", "<|unk|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        _CORPUS, trainers.BpeTrainer(vocab_size=vocab, special_tokens=specials, initial_alphabet=sorted(alphabet))
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|end|>", bos_token="<|start|>", pad_token="<|end|>", unk_token="<|unk|>"
    )
    tokenizer.chat_template = _CHAT
    return tokenizer


def sentencepiece_tokenizer(vocab: int = 400) -> PreTrainedTokenizerFast:
    """BPE with `▁` for blanks, byte fallback and a leading bos, as Gemma has it; no chat template."""
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.normalizer = normalizers.Replace(" ", "▁")
    specials = ["<pad>", "<eos>", "<bos>", "<unk>"]
    fallbacks = [f"<0x{b:02X}>" for b in range(256)]
    trained.train_from_iterator(_CORPUS, trainers.BpeTrainer(vocab_size=vocab, special_tokens=specials + fallbacks))
    learnt = json.loads(trained.to_str())["model"]
    # Built again from the learnt merges, because the trainer marks the byte fallbacks as special tokens.
    core = Tokenizer(
        models.BPE(learnt["vocab"], [tuple(m) for m in learnt["merges"]], byte_fallback=True, unk_token="<unk>")
    )
    core.add_special_tokens(specials)
    core.normalizer = normalizers.Replace(" ", "▁")
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    bos = core.token_to_id("<bos>")
    core.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", bos)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<eos>", bos_token="<bos>", pad_token="<pad>", unk_token="<unk>"
    )


def tiny_config(architecture: str, vocab: int, width: int = 32) -> PreTrainedConfig:
    """Two layers, grouped heads; gemma3 with a sliding window of 12, shorter than the longest test text."""
    shape = {
        "vocab_size": vocab,
        "hidden_size": width,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": width // 4,
        "max_position_embeddings": 1024,
        "initializer_range": 0.12,
        "bos_token_id": 1,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "tie_word_embeddings": True,
    }
    if architecture == "gemma3":
        layers = ["sliding_attention", "full_attention"]
        return Gemma3TextConfig(**shape, sliding_window=12, layer_types=layers, query_pre_attn_scalar=8)
    kinds = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config, "mistral": MistralConfig}
    return kinds[architecture](**shape)


def write_tiny_lm(folder: Path, architecture: str, width: int = 32, seed: int = 0) -> Path:
    """Save a tiny random LLM with its tokenizer, as a user would have one on disk."""
    tokenizer = sentencepiece_tokenizer() if architecture == "gemma3" else byte_level_tokenizer()
    torch.manual_seed(seed)
    lm = AutoModelForCausalLM.from_config(tiny_config(architecture, len(tokenizer), width))
    lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_lm(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny_lm(architecture, width, seed)`: the folder of a tiny random LLM, made once a session."""
    made: dict[tuple[str, int, int], Path] = {}

    def make(architecture: str = "llama", width: int = 32, seed: int = 0) -> Path:
        key = (architecture, width, seed)
        if key not in made:
            made[key] = write_tiny_lm(tmp_path_factory.mktemp("lm") / architecture, architecture, width, seed)
        return made[key]

    return make


@pytest.fixture(scope="session")
def tiny_settings(tiny_lm: Callable[..., Path]) -> Callable[..., ModelConfig]:
    """`tiny_settings("llama", layout="prefix", ...)`: settings of a model on tiny LLMs, float32."""

    def make(architecture: str = "llama", **changes: object) -> ModelConfig:
        folder = str(tiny_lm(architecture))
        defaults: dict[str, object] = {"prompter": folder, "backbone": folder, "dtype": "float32", "lora_rank": 4}
        return ModelConfig(**{**defaults, **changes})

    return make


@pytest.fixture
def tiny_model(tiny_settings: Callable[..., ModelConfig]) -> Callable[..., SentenceTransformer]:
    """`tiny_model("llama", layout="prefix", ...)`: an untrained model on tiny LLMs, LoRA off its zero start."""

    def make(architecture: str = "llama", **changes: object) -> SentenceTransformer:
        model = build(tiny_settings(architecture, **changes), device="cpu")
        torch.manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1)
        return model

    return make


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """`closed(path)`: the file may not be read, also where the tests run as root."""
    shut: set[Path] = set()
    before = Path.open

    def opening(path: Path, *arguments: Any, **named: Any) -> Any:
        if path in shut:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return before(path, *arguments, **named)

    monkeypatch.setattr(Path, "open", opening)
    return shut.add


class Outcome(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Run the `promptembedder` command in this process: an import saved, and a traceback is a test failure."""

    def run(*arguments: object, stdin: str = "") -> Outcome:
        monkeypatch.setattr(sys, "argv", ["promptembedder", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        return Outcome(code, *capsys.readouterr())

    return run


@pytest.fixture
def run_cli() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the `promptembedder` command as a user does: a process of its own, seconds of imports; see `command`."""

    def run(*arguments: object, stdin: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "promptembedder", *map(str, arguments)],
            input=stdin,
            capture_output=True,
            text=True,
            env={**os.environ, **environment},
            check=False,
        )

    return run


@pytest.fixture
def run_config(tiny_settings: Callable[..., ModelConfig], tmp_path: Path) -> Callable[..., RunConfig]:
    """`run_config(max_steps=..., model={...}, warm_start=...)`: a whole run on tiny LLMs and 40 rows."""
    rows = [
        {
            "query": f"{TEXTS[n % 5]} {n}",
            "pos": [f"{n} {TEXTS[n % 5]}"],
            "neg": [f"{TEXTS[(n + 1) % 5]} {n}"] if n % 2 else [],
            "instruction": INSTRUCTION if n % 4 < 2 else SECOND,
        }
        for n in range(40)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    pairs = [{"sentence1": a, "sentence2": b, "score": i * j} for i, a in enumerate(TEXTS) for j, b in enumerate(TEXTS)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in pairs))

    def make(
        name: str = "run",
        *,
        model: dict[str, object] | None = None,
        evaluation: dict[str, object] | None = None,
        warm_steps: int = 0,
        arguments: dict[str, object] | None = None,
        **training: object,
    ) -> RunConfig:
        defaults = {"output": str(tmp_path / name), "max_steps": 4, "batch_size": 4}
        training["arguments"] = {"logging_steps": 1, **(arguments or {})}
        return RunConfig(
            model=tiny_settings(**(model or {})),
            data=DataConfig(root=str(tmp_path), files=(DataFile(path="rows.jsonl"),)),
            training=TrainingConfig(**{**defaults, **training}, warm_start=WarmStartConfig(steps=warm_steps, cue=CUE)),
            evaluation=EvaluationConfig(**{"test": "pairs.jsonl", "every_steps": 2, **(evaluation or {})}),
        )

    return make


def assert_same_model(one: SentenceTransformer, other: SentenceTransformer) -> None:
    """Every weight of two models is bitwise equal."""
    weights, others = one.state_dict(), other.state_dict()
    assert weights.keys() == others.keys()
    different = [name for name, weight in weights.items() if not torch.equal(weight, others[name])]
    assert not different


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with one model of ours and one of somebody else's; what is fetched is noted."""
    place, asked = tmp_path / "hub", []

    def one_file(hub_id, name, revision=None):
        hub_id = hub_id if revision is None else f"{hub_id}@{revision}"
        if not (place / hub_id / name).is_file():
            raise LocalEntryNotFoundError(f"{hub_id} has no {name}")

    def snapshot(hub_id, revision=None, allow_patterns=None, ignore_patterns=()):
        hub_id = hub_id if revision is None else f"{hub_id}@{revision}"
        asked.append((hub_id, allow_patterns))
        fetched = tmp_path / "fetched" / hub_id
        shutil.rmtree(fetched, ignore_errors=True)
        for file in (place / hub_id).rglob("*"):
            name = str(file.relative_to(place / hub_id))
            if file.is_file() and any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                (fetched / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, fetched / name)
        return str(fetched)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", one_file)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    (place / "else" / "theirs").mkdir(parents=True)
    return place, asked


def assert_same_embeddings(one: np.ndarray, other: np.ndarray) -> None:
    """Embeddings of two models with the same weights: only the order of additions may differ.

    Weights that were read from a file lie at other addresses than those made in memory, and some processors'
    matrix products add up in an order that depends on that.
    """
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)


@pytest.fixture
def transfer_config(tiny_lm, tmp_path, run_config):
    """`transfer_config(architecture, ...)`: a transfer to another tiny LLM, with the rows and pairs of `run_config`."""
    run_config()  # writes rows.jsonl and pairs.jsonl

    def make(backbone=("qwen2", 48, 5), **changes):
        training = {
            "output": str(tmp_path / "moved"),
            "max_steps": 4,
            "batch_size": 4,
            "arguments": {"logging_steps": 1},
        }
        training |= changes.pop("training", {})
        evaluation = {"dev": "pairs.jsonl", "every_steps": 2, "instruction": INSTRUCTION} | changes.pop(
            "evaluation", {}
        )
        rows = DataConfig(
            root=str(tmp_path), files=(DataFile(path="rows.jsonl"),) if changes.pop("rows", False) else ()
        )
        return TransferConfig(
            backbone=str(tiny_lm(*backbone)) if isinstance(backbone, tuple) else backbone,
            data=rows,
            training=TrainingConfig(**training),
            evaluation=EvaluationConfig(**evaluation),
            **changes,
        )

    return make


def write_gzipped(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def task_folder(tmp_path):
    """A folder with one small task of every kind."""
    folder = tmp_path / "data"
    pairs = [
        {"sentence1": MANY[n], "sentence2": MANY[(3 * n + 1) % 30], "score": (n * 7) % 5, "label": n % 2}
        for n in range(20)
    ]
    write_gzipped(folder / "sts" / "Similar.jsonl.gz", pairs)
    write_gzipped(folder / "sts" / "Similar.dev.jsonl.gz", pairs)
    write_gzipped(folder / "pair_classification" / "Same.jsonl.gz", pairs)
    labelled = [{"text": text, "label": n % 3} for n, text in enumerate(MANY)]
    for split in ("train", "test"):
        write_gzipped(folder / "classification" / f"Class.{split}.jsonl.gz", labelled)
    write_gzipped(
        folder / "clustering" / "Groups.jsonl.gz", [{"text": r["text"], "label": str(r["label"])} for r in labelled]
    )
    write_gzipped(
        folder / "reranking" / "Order.jsonl.gz",
        [{"query": MANY[n], "positive": [MANY[n + 1]], "negative": MANY[n + 2 : n + 5]} for n in range(6)],
    )
    corpus = [{"_id": str(n), "title": "", "text": text} for n, text in enumerate(MANY)]
    write_gzipped(folder / "retrieval" / "Find" / "corpus.jsonl.gz", corpus)
    write_gzipped(
        folder / "retrieval" / "Find" / "queries.jsonl.gz", [{"_id": f"q{n}", "text": MANY[n]} for n in range(5)]
    )
    write_gzipped(
        folder / "retrieval" / "Find" / "qrels.jsonl.gz",
        [{"query-id": f"q{n}", "corpus-id": str((n * 3 + 5) % 30), "score": 1} for n in range(5)],
    )
    write_gzipped(
        folder / "summarization" / "Short.jsonl.gz",
        [
            {"human_summaries": MANY[n : n + 2], "machine_summaries": MANY[n + 2 : n + 6], "relevance": [1, 3, 2, 5]}
            for n in range(5)
        ],
    )
    triplets = []
    for n in range(10):
        first = {"instruction": "by topic", "anchor": MANY[n], "positive": MANY[n + 1], "negative": MANY[n + 2]}
        swapped = {"positive": first["negative"], "negative": first["positive"], "instruction": "by tone"}
        triplets += [first, {**first, **swapped}]
    write_gzipped(folder / "instruction_triplets" / "Swapped.jsonl.gz", triplets)
    return folder


@pytest.fixture
def encoder(tiny_model):
    """An untrained model as mteb sees it."""
    from promptembedder import evaluation  # needs mteb

    return evaluation.InstructedEncoder(tiny_model(), "tiny/model", "one")


@pytest.fixture(scope="session")
def served_models(tiny_settings):
    """What a server serves: one model of each layout, one of deep soft prompts, one with windows; all parts noisy."""
    from promptembedder.serving.models import served  # needs fastapi

    kinds = {
        "plain": ("llama", {}),
        "prefix": ("qwen2", {"layout": "prefix"}),
        "deep": ("llama", {"deep_rank": 2, "linear_head": True}),
        "windows": ("gemma3", {"readout": "mean"}),
    }
    found = {}
    for name, (architecture, changes) in kinds.items():
        model = build(tiny_settings(architecture, max_text_tokens=64, **changes), device="cpu")
        noise = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in (*model[0].alignment.parameters(), *model[0].prompter.trained_parameters()):
                parameter.add_(torch.randn(parameter.shape, generator=noise) * 0.1)
        found[name] = served(name, model, {"topics": "Identify the topic of the text."})
    return found


@pytest.fixture
def client(served_models):
    """`client("plain", "deep", queue_tokens=...)`: a client of a server in this process; unset: all models."""
    from fastapi.testclient import TestClient

    from promptembedder.serving.app import create_app, gated
    from promptembedder.serving.service import Service
    from promptembedder.serving.settings import ServeSettings

    with ExitStack() as stack:

        def start(*names, warm=(), body_seconds=30.0, **settings):
            service = Service([served_models[name] for name in names or served_models], ServeSettings(**settings), warm)
            app = create_app(service)
            made = TestClient(gated(app, service, body_seconds=body_seconds), raise_server_exceptions=False)
            made.service = service
            return stack.enter_context(made)

        yield start
