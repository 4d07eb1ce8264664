"""The command line on tiny models: what every verb prints and writes, and one line for every bad input."""

from __future__ import annotations

import importlib
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
import yaml
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer

from conftest import CUE, INSTRUCTION, TEXTS, Outcome
from promptembedder import ModelConfig, PromptEmbedderError, build, load, save
from promptembedder.model.folder import PLACE, describe
from promptembedder.model.module import soft_prompt_module
from promptembedder.training.settings import load_run

WIDTH = 32


@pytest.fixture(scope="module")
def model(tiny_settings: Callable[..., ModelConfig]) -> SentenceTransformer:
    return build(tiny_settings("llama", document_instruction="A document.", linear_head=True), device="cpu")


@pytest.fixture(scope="module")
def saved(model: SentenceTransformer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    save(model, folder)
    return folder


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    """The saved model, free to be damaged."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.txt"
    path.write_text("".join(f"{text}\n" for text in TEXTS))
    return path


@pytest.fixture
def run_file(tiny_lm: Callable[..., Path], tmp_path: Path) -> Path:
    """A training run of seconds: tiny LLM, eight rows under two instructions, three scored pairs."""
    folder = tmp_path / "data"
    folder.mkdir()
    rows = [
        {"query": f"{n} {TEXTS[n % 5]}", "pos": [f"p {n}"], "neg": [f"n {n}"], "instruction": f"Find {n % 2}."}
        for n in range(8)
    ]
    pairs = [{"sentence1": a, "sentence2": b, "score": len(b)} for a, b in pairwise(TEXTS)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    llm = {"prompter": str(tiny_lm()), "backbone": str(tiny_lm())}
    settings = {
        "model": {**llm, "dtype": "float32", "num_soft_tokens": 2, "lora_rank": 2},
        "data": {"files": [{"path": "rows.jsonl"}], "root": str(folder)},
        "training": {
            "output": str(tmp_path / "run"),
            "max_steps": 9,
            "batch_size": 4,
            "warm_start": {"steps": 1, "cue": CUE},
        },
        "evaluation": {"test": "pairs.jsonl"},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def assert_refused(outcome: Outcome, *parts: str) -> None:
    """Exit code 2 and one line that holds the parts; progress bars may stand before it."""
    assert outcome.code == 2
    assert outcome.out == ""
    assert "Traceback" not in outcome.err
    bars = ("Encoding", "Warm start")
    lines = [line for line in outcome.err.splitlines() if line.strip() and not line.startswith(bars)]
    assert len(lines) == 1, outcome.err
    assert lines[0].startswith("promptembedder: ")
    for part in parts:
        assert part in lines[0]


# -- in a process of its own ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_encode_reads_standard_input(
    run_cli: Callable[..., Any], saved: Path, model: SentenceTransformer, tmp_path: Path
) -> None:
    output = tmp_path / "vectors.npy"
    done = run_cli("encode", saved, "-o", output, stdin="".join(f"{t}\n" for t in TEXTS), OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1] == f"wrote {output}: 5 embeddings of 32 dimensions, float32"
    np.testing.assert_allclose(np.load(output), model.encode(TEXTS), atol=1e-5)


@pytest.mark.slow
def test_train_prints_scores_last_and_keeps_its_settings(
    run_cli: Callable[..., Any], run_file: Path, tmp_path: Path
) -> None:
    overrides = ["training.max_steps=2", "training.temperature=0.1", "data.root=/nowhere"]
    data = tmp_path / "data"
    done = run_cli("train", run_file, *overrides, "--data", data, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    line = json.loads(done.stdout.splitlines()[-1])
    folder = tmp_path / "run" / "model"
    assert set(line) == {"test_spearman", "steps", "seconds", "model"}
    assert -100 <= line["test_spearman"] <= 100
    assert (line["steps"], line["model"]) == (2, str(folder))
    assert load_run(folder / "config.yaml") == load_run(run_file, [*overrides, f"data.root={data}"])
    assert load(folder, device="cpu").encode(TEXTS).shape == (5, WIDTH)


@pytest.mark.slow
def test_train_starts_from_a_saved_model(
    command: Callable[..., Outcome], run_file: Path, copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hardly a step is taken, so the result is the model it started from, settings and all."""
    start = load(copied, device="cpu")
    with torch.no_grad():
        for parameter in start[0].parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    save(start, copied)
    rates = ["training.prompter_learning_rate=1e-9", "training.alignment_learning_rate=1e-9"]
    output = tmp_path / "further"
    done = command("train", run_file, f"training.output={output}", "training.max_steps=1", *rates, "--from", copied)
    assert done.code == 0, done.err
    folder = output / "model"
    np.testing.assert_allclose(load(folder, device="cpu").encode(TEXTS), start.encode(TEXTS), atol=1e-4)
    assert load_run(folder / "config.yaml").model == soft_prompt_module(start).settings != load_run(run_file).model
    assert json.loads((folder / "training.json").read_text())["start"] == str(copied)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ("model.num_soft_tokens=3", ["--from keeps the structure", "'model.num_soft_tokens=3'"]),
        ("training.warm_start.steps=3", ["--from keeps the structure", "'training.warm_start.steps=3'"]),
        ("training.output={copied.parent}", ["lies in training.output"]),
    ],
)
def test_bad_start(
    command: Callable[..., Outcome], run_file: Path, copied: Path, change: str, parts: list[str]
) -> None:
    before = {file: file.read_bytes() for file in copied.rglob("*.*")}
    assert_refused(command("train", run_file, change.format(copied=copied), "--from", copied), *parts)
    assert before == {file: file.read_bytes() for file in copied.rglob("*.*")}


def test_start_that_is_not_there(command: Callable[..., Outcome], run_file: Path) -> None:
    assert_refused(command("train", run_file, "--from", "nowhere"), "no model at nowhere")


@pytest.mark.slow
def test_bad_input_of_a_real_process(run_cli: Callable[..., Any], saved: Path, tmp_path: Path) -> None:
    output = tmp_path / "vectors.npy"
    done = run_cli("encode", saved, "-o", output, stdin="a text\n \nmore\n", OMP_NUM_THREADS="1")
    assert_refused(Outcome(done.returncode, done.stdout, done.stderr), "standard input, line 2: text is empty")
    assert list(tmp_path.iterdir()) == []


# -- encode -----------------------------------------------------------------------------------------------------


def test_encode_keeps_the_order_over_several_chunks(
    command: Callable[..., Outcome], saved: Path, model: SentenceTransformer, tmp_path: Path
) -> None:
    many = [f"{'word ' * (n * 7 % 11)}{n}" for n in range(70)]
    path, output = tmp_path / "texts.txt", tmp_path / "vectors.npy"
    path.write_text("\n".join(many))
    assert command("encode", saved, path, "-o", output, "--batch-size", 1).code == 0  # a chunk is 32 batches
    np.testing.assert_allclose(np.load(output), model.encode(many), atol=1e-5)


@pytest.mark.parametrize(
    ("options", "same"),
    [
        ([], {}),
        (["--instruction", INSTRUCTION], {"prompt": INSTRUCTION}),
        (["--document"], {"prompt": "A document."}),
        (["--truncate-dim", "5"], {"truncate_dim": 5, "normalize_embeddings": True}),
        (["--truncate-dim", "999"], {}),
        (["--precision", "ubinary"], {"precision": "ubinary"}),
        (["--precision", "ubinary", "--truncate-dim", "12"], {"precision": "ubinary", "truncate_dim": 12}),
    ],
    ids=" ".join,
)
def test_encode_is_the_models_encode(
    command: Callable[..., Outcome],
    saved: Path,
    model: SentenceTransformer,
    texts: Path,
    options: list[str],
    same: dict[str, Any],
) -> None:
    output = texts.with_name("vectors.npy")
    assert command("encode", saved, texts, "-o", output, *options).code == 0
    expected, found = model.encode(TEXTS, **same), np.load(output)
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_instruction_and_document_change_the_embedding(
    command: Callable[..., Outcome], saved: Path, texts: Path
) -> None:
    found = []
    for options in ([], ["-i", INSTRUCTION], ["--document"]):
        assert command("encode", saved, texts, "-o", texts.with_name("v.npy"), *options).code == 0
        found.append(np.load(texts.with_name("v.npy")))
    assert min(np.abs(found[a] - found[b]).max() for a, b in [(0, 1), (0, 2), (1, 2)]) > 1e-3


def test_encode_float16(command: Callable[..., Outcome], saved: Path, model: SentenceTransformer, texts: Path) -> None:
    output = texts.with_name("vectors.npy")
    assert command("encode", saved, texts, "-o", output, "--precision", "float16").code == 0
    assert np.load(output).dtype == np.float16
    np.testing.assert_allclose(np.load(output), model.encode(TEXTS), atol=1e-3)


def test_encode_jsonl_to_parquet_keeps_ids(
    command: Callable[..., Outcome], saved: Path, model: SentenceTransformer, tmp_path: Path
) -> None:
    source, output = tmp_path / "texts.jsonl", tmp_path / "vectors.parquet"
    source.write_text("".join(json.dumps({"key": f"k{n}", "body": text}) + "\n" for n, text in enumerate(TEXTS)))
    done = command("encode", saved, source, "-o", output, "--text-field", "body", "--id-field", "key")
    assert done.code == 0
    table = pyarrow.parquet.read_table(output)
    assert table["id"].to_pylist() == ["k0", "k1", "k2", "k3", "k4"]
    np.testing.assert_allclose(np.array(table["embedding"].to_pylist()), model.encode(TEXTS), atol=1e-5)


@pytest.mark.parametrize(("options", "shape"), [([], (0, WIDTH)), (["--precision", "ubinary"], (0, WIDTH // 8))])
def test_encode_nothing(
    command: Callable[..., Outcome], saved: Path, tmp_path: Path, options: list[str], shape: tuple[int, int]
) -> None:
    output = tmp_path / "vectors.npy"
    assert command("encode", saved, "-o", output, *options).code == 0
    assert np.load(output).shape == shape


def test_encode_reads_texts_up_to_a_limit(
    command: Callable[..., Outcome], saved: Path, model: SentenceTransformer, tmp_path: Path
) -> None:
    path, output = tmp_path / "texts.txt", tmp_path / "vectors.npy"
    path.write_text("one two three four five six seven\n")
    assert command("encode", saved, path, "-o", output, "--max-text-tokens", 2).code == 0
    assert not np.allclose(np.load(output), model.encode(["one two three four five six seven"]), atol=1e-3)
    limited = load(saved)
    limited.max_seq_length = 2
    np.testing.assert_allclose(np.load(output), limited.encode(["one two three four five six seven"]), atol=1e-5)
    assert command("encode", saved, path, "-o", output, "--max-text-tokens", 0).code == 2


def test_encode_with_a_model_saved_truncated(
    command: Callable[..., Outcome], saved: Path, texts: Path, tmp_path: Path
) -> None:
    shorter = load(saved, device="cpu")
    shorter.truncate_dim = 16
    save(shorter, tmp_path / "shorter")
    output = tmp_path / "vectors.npy"
    assert command("encode", tmp_path / "shorter", texts, "-o", output).code == 0
    np.testing.assert_allclose(np.linalg.norm(np.load(output), axis=1), 1, atol=1e-5)
    expected = shorter.encode(TEXTS, normalize_embeddings=True)
    np.testing.assert_allclose(np.load(output), expected, atol=1e-5)
    for wider in (20, 999):  # as many as the model was saved with
        assert command("encode", tmp_path / "shorter", texts, "-o", output, "--truncate-dim", wider).code == 0
        np.testing.assert_allclose(np.load(output), expected, atol=1e-5)


# -- explain and info -------------------------------------------------------------------------------------------


def test_explain_lists_words_by_weight(command: Callable[..., Outcome], saved: Path) -> None:
    done = command("explain", saved, INSTRUCTION, "--top", 3, "--json")
    assert done.code == 0
    found = json.loads(done.out)
    assert found["instruction"] == INSTRUCTION
    assert len(found["soft_tokens"]) == ModelConfig().num_soft_tokens
    for token in found["soft_tokens"]:
        weights = [weight for _, weight in token["words"]]
        assert len(weights) == 3
        assert weights == sorted(weights, reverse=True)
        assert 0 < sum(weights) <= 1
        assert 0 <= token["entropy"] <= math.log(320)


def test_explain_as_text(command: Callable[..., Outcome], saved: Path) -> None:
    done = command("explain", saved)
    first, *tokens = done.out.splitlines()
    assert (done.code, done.err) == (0, "")
    assert first == f"instruction: {ModelConfig().default_instruction}"
    assert [line.split("  ")[0] for line in tokens] == [f"soft token {n}" for n in range(1, 6)]


def test_info_opens_no_llm(command: Callable[..., Outcome], copied: Path) -> None:
    _edit(copied / "promptembedder.json", "base_models", "prompter", "/gone")
    facts = json.loads(command("info", copied, "--json").out)
    assert facts == describe(copied)
    assert (facts["dimensions"], facts["soft_tokens"], facts["layout"]) == (WIDTH, 5, "suffix")
    assert facts["prompter"].startswith("/gone (fingerprint ")
    lines = command("info", copied).out.splitlines()
    assert [line.split()[0] for line in lines] == list(facts)
    assert f"{'dimensions':24} 32" in lines


# -- path -------------------------------------------------------------------------------------------------------


def test_path_names_a_folder_that_other_programs_open(
    command: Callable[..., Outcome], saved: Path, model: SentenceTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(saved.parent)
    done = command("path", saved.name)
    assert (done.code, done.out) == (0, f"{saved}\n")
    opened = SentenceTransformer(done.out.strip(), device="cpu", trust_remote_code=True)
    np.testing.assert_allclose(opened.encode_document(TEXTS), model.encode_document(TEXTS), atol=1e-5)


def test_path_of_a_shipped_model(command: Callable[..., Outcome]) -> None:
    done = command("path", "smollm2-135m")
    assert (done.code, done.out) == (0, f"{PLACE / 'smollm2-135m'}\n")
    assert (PLACE / "smollm2-135m" / "modules.json").is_file()


def test_path_of_a_hub_id(
    command: Callable[..., Outcome], saved: Path, hub: tuple[Path, list[Any]], tmp_path: Path
) -> None:
    shutil.copytree(saved, hub[0] / "owner" / "name")
    assert command("path", "owner/name") == Outcome(0, f"{tmp_path / 'fetched' / 'owner' / 'name'}\n", "")
    assert_refused(command("path", "owner/unknown"), "no model at owner/unknown", "models by name: smollm2-135m")


def test_path_of_no_model(command: Callable[..., Outcome], tmp_path: Path) -> None:
    assert_refused(command("path", "nonsense"), "no model at nonsense", "models by name: smollm2-135m")
    assert_refused(command("path", tmp_path), f"{tmp_path} is not a saved model: it has no promptembedder.json")


# -- bad input --------------------------------------------------------------------------------------------------


def _edit(path: Path, *keys_and_value: Any) -> None:
    """Set `path[key][key]... = value` in a JSON file."""
    *keys, last, value = keys_and_value
    content = json.loads(path.read_text())
    place = content
    for key in keys:
        place = place[key]
    place[last] = value
    path.write_text(json.dumps(content))


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


DAMAGES: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "no folder": (shutil.rmtree, ["no model at"]),
    "no alignment": (lambda m: (m / "alignment.safetensors").unlink(), ["has no alignment.safetensors"]),
    "no adapter": (lambda m: shutil.rmtree(m / "prompter"), ["has no prompter/adapter_model.safetensors"]),
    "no modules.json": (lambda m: (m / "modules.json").unlink(), ["has no modules.json"]),
    "no settings": (lambda m: (m / "promptembedder.json").unlink(), ["has no promptembedder.json"]),
    "settings not JSON": (lambda m: _cut(m / "promptembedder.json"), ["promptembedder.json is not JSON"]),
    "settings a list": (lambda m: (m / "promptembedder.json").write_text("[]"), ["promptembedder.json"]),
    "newer": (lambda m: _edit(m / "promptembedder.json", "format_version", 9), ["version 9"]),
    "bad setting": (
        lambda m: _edit(m / "promptembedder.json", "model", "layout", "infix"),
        ["promptembedder.json: model: layout = 'infix'", "'prefix' or 'suffix'"],
    ),
    "unknown module": (lambda m: _edit(m / "modules.json", 1, "type", "os.system"), ["os.system", "known library"]),
    "no modules": (
        lambda m: (m / "modules.json").write_text("[]"),
        ["modules.json must begin with a module of promptembedder"],
    ),
    "no module's class": (lambda m: _edit(m / "modules.json", 0, {"path": ""}), ["must list modules with 'type' and"]),
    "no head": (lambda m: shutil.rmtree(m / "1_Dense"), ["is damaged"]),
    "no head's weights": (
        lambda m: (m / "1_Dense" / "model.safetensors").unlink(),
        ["is damaged", "model.safetensors"],
    ),
    "damaged head": (lambda m: _cut(m / "1_Dense" / "model.safetensors"), ["is damaged: SafetensorError"]),
    "narrow head": (
        lambda m: save_file({"linear.weight": torch.eye(16)}, m / "1_Dense" / "model.safetensors"),
        ["is damaged: RuntimeError"],
    ),
    "no such class": (
        lambda m: _edit(m / "modules.json", 1, "type", "sentence_transformers.models.Nope"),
        ["is damaged: ImportError", "Nope"],
    ),
    "library's settings a list": (
        lambda m: (m / "config_sentence_transformers.json").write_text("[]"),
        ["config_sentence_transformers.json must hold an object"],
    ),
    "unknown prompt name": (
        lambda m: _edit(m / "config_sentence_transformers.json", "default_prompt_name", "nobody"),
        ["is damaged: ValueError", "nobody"],
    ),
    "narrow alignment": (
        lambda m: save_file({"weight": torch.eye(16)}, m / "alignment.safetensors"),
        ["alignment is (16, 16)", "(32, 32)"],
    ),
    "alignment without W": (
        lambda m: save_file({"W": torch.eye(32)}, m / "alignment.safetensors"),
        ["alignment.safetensors"],
    ),
    "damaged alignment": (lambda m: _cut(m / "alignment.safetensors"), ["damaged safetensors"]),
    "damaged adapter": (lambda m: _cut(m / "prompter" / "adapter_model.safetensors"), ["damaged safetensors"]),
    "other adapter": (
        lambda m: save_file({"a": torch.eye(2)}, m / "prompter" / "adapter_model.safetensors"),
        ["weights do not fit the prompter"],
    ),
    "base model gone": (
        lambda m: _edit(m / "promptembedder.json", "base_models", "backbone", "gone"),
        ["'gone' not found", "smollm2-135m-instruct"],
    ),
    "other base model": (
        lambda m: _edit(m / "promptembedder.json", "base_models", "backbone_fingerprint", "0" * 64),
        ["backbone", "has other weights", "000000000000"],
    ),
}


@pytest.mark.parametrize(("damage", "told"), DAMAGES.values(), ids=DAMAGES.keys())
def test_damaged_model(
    command: Callable[..., Outcome],
    copied: Path,
    texts: Path,
    damage: Callable[[Path], Any],
    told: list[str],
) -> None:
    damage(copied)
    output = texts.with_name("vectors.npy")
    assert_refused(command("encode", copied, texts, "-o", output), *told)
    assert not [p for p in texts.parent.iterdir() if "vectors" in p.name]


def test_base_model_without_weights_is_not_called_a_bad_output(
    command: Callable[..., Outcome], copied: Path, texts: Path, tiny_lm: Callable[..., Path], tmp_path: Path
) -> None:
    base = Path(shutil.copytree(tiny_lm(), tmp_path / "base"))
    (base / "model.safetensors").unlink()
    for role in ("prompter", "backbone"):
        _edit(copied / "promptembedder.json", "base_models", role, str(base))
    outcome = command("encode", copied, texts, "-o", tmp_path / "vectors.npy")
    assert_refused(outcome, str(base), "model.safetensors")
    assert "vectors.npy" not in outcome.err


BAD_TEXTS = {
    "empty line": ("texts.txt", "a\n\nb\n", ["texts.txt, line 2: text is empty"]),
    "same id": (
        "texts.jsonl",
        '{"id": "a", "text": "x"}\n{"id": "a", "text": "y"}\n',
        ["texts.jsonl, line 2: id 'a' is used twice"],
    ),
    "not JSON": ("texts.jsonl", "x\n", ["texts.jsonl, line 1: not JSON"]),
    "no field": ("texts.jsonl", '{"body": "x"}\n', ["line 1: field 'text' is missing", "--text-field"]),
    "no such file": ("texts.txt", None, ["texts.txt cannot be read: No such file"]),
}


@pytest.mark.parametrize(("name", "content", "told"), BAD_TEXTS.values(), ids=BAD_TEXTS.keys())
def test_bad_texts_leave_the_old_output(
    command: Callable[..., Outcome], saved: Path, tmp_path: Path, name: str, content: str | None, told: list[str]
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    output = tmp_path / "out" / "vectors.parquet"
    assert_refused(command("encode", saved, tmp_path / name, "-o", output), *told)
    assert not output.parent.exists()
    output.parent.mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"id": ["a"], "embedding": [[1.0]]}), output)
    old = output.read_bytes()
    assert_refused(command("encode", saved, tmp_path / name, "-o", output), *told)
    assert [p.read_bytes() for p in output.parent.iterdir()] == [old]


@pytest.mark.parametrize("link", [None, "symlink_to", "hardlink_to"])
def test_an_output_that_is_an_input_is_refused(
    command: Callable[..., Outcome], saved: Path, tmp_path: Path, link: str | None
) -> None:
    corpus, output = tmp_path / "corpus.parquet", tmp_path / "vectors.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"id": [1, 2], "text": TEXTS[:2]}), corpus)
    before = corpus.read_bytes()
    if link is None:
        output = corpus
    else:
        getattr(output, link)(corpus)
    told = f"output {output} is the input {corpus}; choose another file"
    assert_refused(command("encode", saved, corpus, "-o", output), told)
    assert_refused(command("bridge", saved, saved, corpus, "-o", output), told)
    assert corpus.read_bytes() == before


def test_ids_of_parquet_go_through_unchanged(command: Callable[..., Outcome], saved: Path, tmp_path: Path) -> None:
    corpus, output = tmp_path / "corpus.parquet", tmp_path / "vectors.parquet"
    for ids in (pyarrow.array([3, 1], pyarrow.uint16()), pyarrow.array([b"\x01", b"\x00"])):
        pyarrow.parquet.write_table(pyarrow.table({"id": ids, "text": TEXTS[:2]}), corpus)
        assert command("encode", saved, corpus, "-o", output).code == 0
        assert pyarrow.parquet.read_table(output)["id"].combine_chunks() == ids
    pyarrow.parquet.write_table(pyarrow.table({"id": [1, 2, None], "text": TEXTS[:3]}), corpus)
    assert_refused(command("encode", saved, corpus, "-o", output), f"{corpus}, row 3: id is missing")
    assert command("encode", saved, corpus, "-o", tmp_path / "vectors.npy").code == 0  # ids are of no use there


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["-o", "vectors.csv"], ["vectors.csv: unknown ending '.csv', expected .npy or .parquet"]),
        (["-o", "texts.txt/vectors.npy"], ["texts.txt/vectors.npy cannot be written: "]),
        (["-i", " "], ["--instruction must be a sentence"]),
        (["-i", "Find.", "--document"], ["--instruction", "cannot go with --document"]),
        (["--device", "toaster"], ["toaster"]),
    ],
)
def test_bad_options_of_encode(
    command: Callable[..., Outcome],
    saved: Path,
    texts: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    told: list[str],
) -> None:
    monkeypatch.chdir(texts.parent)
    assert_refused(command("encode", saved, "texts.txt", *options), *told)
    assert [p.name for p in texts.parent.iterdir()] == ["texts.txt"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [([""], ["INSTRUCTION must be a sentence"]), (["Find.", "--top", "9999"], ["9999"])],
)
def test_bad_options_of_explain(
    command: Callable[..., Outcome], saved: Path, arguments: list[str], told: list[str]
) -> None:
    assert_refused(command("explain", saved, *arguments), *told)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["training.max_step=3"], ["unknown setting 'training.max_step'", "max_steps"]),
        (["training.max_steps"], ["section.name=value"]),
        (["training.batch_size=1"], ["training.batch_size = 1", "greater than or equal to 2"]),
        (["model.prompter=nope"], ["base model 'nope' not found", "smollm2-135m-instruct"]),
        (["data.files=[]"], ["data.files is empty"]),
        (["data.files=[{path: none.jsonl}]"], ["none.jsonl cannot be read: No such file"]),
        (["evaluation.test=none.jsonl"], ["none.jsonl cannot be read: No such file"]),
        (["training.output=run.yaml/run"], ["run.yaml/run cannot be written"]),
        (["training.matryoshka_dims=[64]"], ["training.matryoshka_dims", "64", "32"]),
        (["training.early_stop_patience=1"], ["training.early_stop_patience needs evaluation.dev"]),
        (["--resume"], ["nothing to resume", "run holds no checkpoint"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_bad_training_run(
    command: Callable[..., Outcome],
    run_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    told: list[str],
) -> None:
    monkeypatch.chdir(run_file.parent)
    assert_refused(command("train", run_file, *arguments), *told)
    assert not (run_file.parent / "run" / "model").exists()


@pytest.mark.parametrize(
    "arguments",
    [["encode"], ["no-such-command"], ["train", "--no-such-option"], ["encode", "m", "--batch-size", "x"]],
)
def test_wrong_usage_is_one_line_too(command: Callable[..., Outcome], arguments: list[str]) -> None:
    assert_refused(command(*arguments), "promptembedder", " --help)")


def test_reading_a_folder_opens_no_library() -> None:
    code = "import sys, promptembedder.model.folder; print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_missing_run_file(command: Callable[..., Outcome], tmp_path: Path) -> None:
    assert_refused(command("train", tmp_path / "none.yaml"), f"config {tmp_path / 'none.yaml'} cannot be read")


@pytest.mark.parametrize("name", ["2024", "a #b", "~", "key: value"])
def test_data_folder_is_taken_as_written(
    command: Callable[..., Outcome], run_file: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def stop(settings: Any, **others: Any) -> None:
        raise PromptEmbedderError(f"root {settings.data.root!r}")

    # The room hands on a function of the module's name.
    monkeypatch.setattr(importlib.import_module("promptembedder.training.train"), "train", stop)
    taken = str(Path.home()) if name == "~" else name  # no null
    assert_refused(command("train", run_file, "--data", name), f"root {taken!r}")


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (OSError(28, "No space left on device"), 2, "promptembedder: No space left on device\n"),
        (torch.OutOfMemoryError("CUDA out of memory"), 2, "promptembedder: out of memory on the device; use smaller"),
        (BrokenPipeError(32, "Broken pipe"), 1, ""),
    ],
)
def test_what_the_machine_refuses_is_one_line(command, monkeypatch, error, code, told):
    def fails(path):
        raise error

    monkeypatch.setattr("promptembedder.model.folder.describe", fails)
    monkeypatch.setattr(os, "dup2", lambda *a: None)
    done = command("info", "model")
    assert (done.code, done.err[: len(told)]) == (code, told)
    assert done.err.count("\n") <= 1


def test_a_bad_last_line_is_told_before_the_model_opens(command, saved, tmp_path, monkeypatch):
    monkeypatch.setattr("promptembedder.model.store.load", lambda *a, **k: pytest.fail("opened"))
    (tmp_path / "texts.txt").write_text("a text\n" * 2000 + "\n")
    done = command("encode", saved, tmp_path / "texts.txt", "--batch-size", 2, "-o", tmp_path / "vectors.npy")
    assert_refused(done, "texts.txt, line 2001: text is empty")


def test_a_folder_that_may_not_be_looked_into_is_one_line(command, monkeypatch):
    def closed(path):
        raise PermissionError(13, "Permission denied", "/closed")

    monkeypatch.setattr("promptembedder.model.folder.folder_of", closed)
    done = command("info", "/closed/model")
    assert (done.code, done.err) == (2, "promptembedder: /closed: Permission denied\n")


def test_version(command):
    done = command("--version")
    assert (done.code, done.out) == (0, f"promptembedder {version('promptembedder')}\n")


def test_no_command_shows_help(command):
    done = command()
    assert (done.code, done.err) == (0, "")
    assert "Commands:" in done.out


@pytest.mark.slow
def test_quiet_and_output_to_a_file_show_no_bars(run_cli, saved, tmp_path):
    options = ("encode", saved, "-o", tmp_path / "vectors.npy")
    loud, quiet = run_cli(*options, stdin="a text\n"), run_cli("--quiet", *options, stdin="a text\n")
    assert loud.stderr == f"wrote {tmp_path}/vectors.npy: 1 embeddings of 32 dimensions, float32\n"
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, "", "")


def test_encode_describes_the_model_once(command, saved, texts, monkeypatch):
    asked = []
    module = importlib.import_module("promptembedder.bulk.encode_file")
    monkeypatch.setattr(module, "describe", lambda place: asked.append(place) or describe(place))
    assert command("encode", saved, texts, "-o", texts.with_name("vectors.npy")).code == 0
    assert asked == [saved]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("absent", "arguments", "told"),
    [
        ("datasets", ("train", "run.yaml"), "training needs datasets, which is not installed: pip install 'promptem"),
        ("mteb", ("evaluate", "model", "--task", "T"), "pip install 'promptembedder[evaluate]'"),
        ("matplotlib", ("demo",), "the demo needs matplotlib, which is not installed"),
    ],
)
def test_a_missing_extra_is_one_line(absent, arguments, told):
    code = f"import sys; sys.modules[{absent!r}] = None; sys.argv[1:] = {arguments!r}; "
    code += "from promptembedder.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert_refused(Outcome(done.returncode, done.stdout, done.stderr), told)


# -- paths ------------------------------------------------------------------------------------------------------


@pytest.fixture
def home(copied: Path, texts: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The home folder: a saved model and texts in it."""
    monkeypatch.setenv("HOME", str(copied.parent))
    return copied.parent


@pytest.mark.slow
def test_the_home_folder_in_arguments(home: Path, command: Callable[..., Outcome]) -> None:
    """Shells replace `~` in an argument of its own, not within one."""
    assert command("info", "~/model", "--json").out == command("info", home / "model", "--json").out
    done = command("encode", "~/model", "~/texts.txt", "--output=~/vectors.npy")
    assert (done.code, (home / "vectors.npy").is_file()) == (0, True), done.err
    assert_refused(command("encode", "~/model", "~/none.txt"), f"{home}/none.txt cannot be read")
    assert_refused(command("encode", "~/model", "~/texts.txt", "--bridge=~/none"), f"no bridge at {home}/none")
    assert_refused(command("bridge", "~/model", "~/model", "~/texts.txt"), f"{home}/texts.txt has 5")
    assert_refused(command("evaluate", "~/none", "--data=~/none"), f"no tasks in {home}/none: no such folder")
    assert_refused(command("evaluate", "~/texts.txt", "--task=STS12"), f"{home}/texts.txt is a file")
    assert_refused(command("compare", "~/none", "~/other"), f"no results in {home}/none")
    assert_refused(command("train", "~/none.yaml"), f"config {home}/none.yaml cannot be read")
    assert_refused(command("info", "~nobody-of-that-name/model"), "~nobody-of-that-name/model")


def test_the_home_folder_in_settings(home: Path) -> None:
    (home / "run.yaml").write_text("training: {output: ~/run}\n")
    settings = load_run(Path("~/run.yaml"), ["training.text_state_folder=~/states"])
    assert settings.training.output == str(home / "run")
    assert settings.training.text_state_folder == str(home / "states")
    assert load_run(home / "run.yaml", ["training.output=~/other"]).training.output == str(home / "other")
    assert load_run(home / "run.yaml", ["training.output=a~"]).training.output == "a~"


@pytest.mark.parametrize(
    ("name", "by_nohup", "code", "told"),
    [
        ("SIGTERM", False, 143, "promptembedder: stopped by SIGTERM\n"),
        ("SIGHUP", False, 129, "promptembedder: stopped by SIGHUP\n"),
        ("SIGHUP", True, 0, ""),
    ],
)
def test_a_signal_ends_a_command_cleanly(tmp_path, name, by_nohup, code, told):
    """Two signals at once, which is how a session ends."""
    script = f"""
import os, signal, sys
from pathlib import Path
from promptembedder import atomic
from promptembedder.cli import app
from promptembedder.model import folder
if {by_nohup}: signal.signal(signal.SIGHUP, signal.SIG_IGN)
def writes(path):
    with atomic.replacing(Path({str(tmp_path / "new" / "file")!r})):
        os.kill(os.getpid(), signal.{name})
        os.kill(os.getpid(), signal.{name})
    return {{}}
folder.describe = writes
sys.argv = ["promptembedder", "info", "model"]
app.main()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", told)
    assert list(tmp_path.iterdir()) == ([tmp_path / "new"] if by_nohup else [])
