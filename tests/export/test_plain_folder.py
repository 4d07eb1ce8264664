"""Plain folders: sentence-transformers embeds with them what the model does, without this package."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from tokenizers import normalizers
from transformers import AutoModelForCausalLM, AutoTokenizer

import promptembedder
from conftest import ARCHITECTURES, FIRST_QUICK, INSTRUCTION, TEXTS
from promptembedder import ModelConfig, PromptEmbedderError
from promptembedder.export.compiled import compile_model, embed_compiled
from promptembedder.export.plain_folder import reader, refuse, write
from promptembedder.llms.tokens import plain_ids

HARD = [
    *TEXTS,
    "  blanks around  ",
    "line\nbreak\n",
    'emoji 😀 "quoted"',
    "שלום עולם",
    "Cafe\u0301 nai\u0308ve \ufb01",
    "a b " * 300,
    "<|end|> <|start|>",
    '"',
]


@pytest.fixture
def exported(tmp_path):
    """`exported(model, **options)`: what was compiled, and the folder written."""

    def export(model, **options):
        compiled = compile_model(model, {"topic": "Find the topic.", "same": INSTRUCTION})
        folder = tmp_path / "export"
        folder.mkdir()
        write(compiled, model, folder, **options)
        return compiled, folder

    return export


def stripped(folder: Path) -> np.ndarray:
    """Embeddings of HARD by a process that cannot import this package, under `topic`."""
    code = """
import json, sys
sys.modules["promptembedder"] = None
from sentence_transformers import SentenceTransformer
texts, folder = json.load(sys.stdin), sys.argv[1]
print("found", json.dumps(SentenceTransformer(folder, device="cpu").encode(texts).tolist()))
"""
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-c", code, str(folder / "topic")]
    ran = subprocess.run(
        command, input=json.dumps(HARD), capture_output=True, text=True, env=clean, cwd="/", check=False
    )
    assert ran.returncode == 0, ran.stderr
    return np.array(json.loads(ran.stdout.split("found ")[1]))


@pytest.mark.parametrize("architecture", FIRST_QUICK)
@pytest.mark.parametrize(("layout", "head"), [("suffix", True), ("prefix", False)])
def test_embeds_as_the_model(tiny_model, exported, architecture, layout, head):
    model = tiny_model(architecture, layout=layout, linear_head=head)
    model[0].subtract(torch.linspace(-1, 1, 32))
    if head:
        torch.nn.init.normal_(model[1].linear.weight, std=0.2)
    compiled, folder = exported(model)
    for name in compiled.prompts:
        np.testing.assert_allclose(reader(folder, name)(HARD), embed_compiled(model, compiled, name, HARD), atol=5e-6)


@pytest.mark.slow
def test_opens_where_the_package_is_not_installed(tiny_model, exported):
    model = tiny_model("qwen2")
    compiled, folder = exported(model)
    np.testing.assert_allclose(stripped(folder), embed_compiled(model, compiled, "topic", HARD), atol=5e-6)
    listed = json.loads((folder / "topic" / "modules.json").read_text())
    assert [one["type"].rpartition(".")[2] for one in listed] == ["Transformer", "Pooling", "Normalize"]
    assert not (folder / "topic" / "chat_template.jinja").exists()


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_halves(tiny_model, exported, precision):
    model = tiny_model()
    compiled, folder = exported(model, precision=precision)
    cosines = (reader(folder, "topic")(HARD) * embed_compiled(model, compiled, "topic", HARD).numpy()).sum(1)
    assert 0.98 < cosines.min() < 0.9999999
    with safe_open(folder / "topic" / "model.safetensors", "pt") as weights:
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {  # noqa: SIM118
            {"float16": "F16", "bfloat16": "BF16"}[precision]
        }


def test_a_weight_beyond_float16_is_refused(tiny_model, exported):
    model = tiny_model()
    with torch.no_grad():
        model[0].backbone.lm.layers[0].mlp.up_proj.weight[0, 0] = 1e6
    with pytest.raises(PromptEmbedderError, match=r"up_proj.weight is not finite in float16"):
        exported(model, precision="float16")


@pytest.mark.parametrize("layout", ["suffix", "prefix"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_truncation_cuts_the_text_where_the_model_does(tiny_model, exported, architecture, layout):
    """And keeps the template's words and the soft tokens after it."""
    model = tiny_model(architecture, layout=layout, max_text_tokens=7)
    compiled, folder = exported(model)
    tokenizer = AutoTokenizer.from_pretrained(folder / "topic")
    K = model[0].settings.num_soft_tokens
    for text in HARD:
        whole = plain_ids(model.tokenizer, text)
        soft = tokenizer.convert_tokens_to_ids([f"<|pe:topic:{k}|>" for k in range(K)])
        expected = compiled.sequence("topic", whole[:7], soft)
        assert tokenizer(text, truncation=True)["input_ids"] == expected
    np.testing.assert_allclose(reader(folder, "topic")(HARD), embed_compiled(model, compiled, "topic", HARD), atol=5e-6)


@pytest.mark.parametrize("copy", [False, True])
def test_folders_share_their_weights(tiny_model, exported, copy):
    _, folder = exported(tiny_model(), copy=copy)
    files = [folder / name / "model.safetensors" for name in ("topic", "same", "document", "any-instruction")]
    assert len({file.stat().st_ino for file in files}) == (4 if copy else 1)
    assert len({file.read_bytes() for file in files}) == 1
    assert all(file.stat().st_mode & 0o777 == 0o644 for file in folder.rglob("*.safetensors"))


def test_weights_are_copied_where_there_are_no_hard_links(tiny_model, exported, monkeypatch):
    def refused(*places):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", refused)
    _, folder = exported(tiny_model())
    assert {(folder / name / "model.safetensors").stat().st_nlink for name in ("topic", "same")} == {1}


def test_the_spelling_of_a_soft_token_is_text_in_the_model(tiny_model, exported):
    model = tiny_model()
    text = "one <|pe:topic:0|> two"
    before = promptembedder.encode(model, [text], INSTRUCTION)
    compiled, folder = exported(model)
    np.testing.assert_array_equal(promptembedder.encode(model, [text], INSTRUCTION), before)
    assert "<|pe:topic:0|>" not in model.tokenizer.get_vocab()
    # The exported tokenizer knows it as a word: the README says so.
    difference = reader(folder, "same")([text]) - embed_compiled(model, compiled, "same", [text]).numpy()
    assert abs(difference).max() > 1e-3
    assert "<|pe:topic:0|>" in (folder / "README.md").read_text()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_clients_can_name_the_instruction_with_each_text(tiny_model, exported, architecture):
    model = tiny_model(architecture)
    compiled, folder = exported(model)
    endings = json.loads((folder / "any-instruction" / "instructions.json").read_text())
    texts = [text for text in HARD if len(text) < 500]
    embed = reader(folder, "any-instruction")
    for name in compiled.prompts:
        found = embed([text + endings[name] for text in texts])
        np.testing.assert_allclose(found, embed_compiled(model, compiled, name, texts), atol=5e-6)


def odd(folder: Path, lm: Path, *, rows: int = 0, untied: bool = False, change=None) -> ModelConfig:
    """Settings of a model on a copy of a tiny LLM with another number of rows, an own head or a changed tokenizer."""
    plain = AutoModelForCausalLM.from_pretrained(lm)
    tokenizer = AutoTokenizer.from_pretrained(lm)
    if change is not None:
        change(tokenizer)
    if rows:
        plain.resize_token_embeddings(plain.config.vocab_size + rows)
        plain.config.pad_token_id = plain.config.vocab_size - 1
    if untied:
        plain.config.tie_word_embeddings = False
        plain.lm_head.weight = torch.nn.Parameter(plain.lm_head.weight * 2)
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return ModelConfig(prompter=str(folder), backbone=str(folder), dtype="float32", lora_rank=4)


@pytest.mark.parametrize(
    ("architecture", "changes", "words"),
    [
        ("llama", {"rows": 3}, 320),
        ("qwen2", {"rows": 64}, 320),
        ("gemma3", {"rows": 7, "untied": True}, 400),
        ("llama", {"untied": True}, 320),
        ("llama", {"change": lambda tokenizer: tokenizer.add_tokens(["<|image|>"])}, 321),
    ],
)
def test_rows_are_as_many_as_words(tiny_lm, tmp_path, exported, architecture, changes, words):
    """Spare rows of the backbone are used, missing ones are added; the head is the matrix of word embeddings."""
    model = promptembedder.build(odd(tmp_path / "lm", tiny_lm(architecture), **changes), device="cpu")
    compiled, folder = exported(model)
    np.testing.assert_allclose(reader(folder, "topic")(HARD), embed_compiled(model, compiled, "topic", HARD), atol=5e-6)
    tokenizer, K = AutoTokenizer.from_pretrained(folder / "topic"), model[0].settings.num_soft_tokens
    plain, report = AutoModelForCausalLM.from_pretrained(folder / "topic", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert len(tokenizer) == len(plain.get_input_embeddings().weight) == plain.config.vocab_size
    assert len(tokenizer) == words + 3 * K + len(compiled.tail_ids)
    assert tokenizer.convert_tokens_to_ids("<|pe:topic:0|>") == words
    assert plain.get_output_embeddings().weight is plain.get_input_embeddings().weight


def test_a_tokenizers_own_normaliser_is_kept(tiny_lm, tmp_path, exported):
    """Composed and decomposed letters give the ids that the model reads."""

    def composing(tokenizer):
        tokenizer.backend_tokenizer.normalizer = normalizers.NFC()

    model = promptembedder.build(odd(tmp_path / "lm", tiny_lm(), change=composing), device="cpu")
    compiled, folder = exported(model)
    forms = ["caf\u00e9 na\u00efve", "cafe\u0301 nai\u0308ve", "\u1112\u1161\u11ab", "\ud55c"]
    found = reader(folder, "topic")(forms)
    np.testing.assert_allclose(found, embed_compiled(model, compiled, "topic", forms), atol=5e-6)
    np.testing.assert_allclose(found[0], found[1], atol=1e-6)


def test_files_name_what_older_engines_read(tiny_model, exported):
    _, folder = exported(tiny_model("gemma3"))
    config = json.loads((folder / "topic" / "config.json").read_text())
    assert config["architectures"] == ["Gemma3ForCausalLM"]
    assert config["torch_dtype"] == config["dtype"] == "float32"
    assert {"rope_theta", "rope_local_base_freq"} <= config.keys()
    assert "auto_map" not in config
    pooling = json.loads((folder / "topic" / "1_Pooling" / "config.json").read_text())
    assert [mode for mode, chosen in pooling.items() if mode.startswith("pooling_mode_") and chosen] == [
        "pooling_mode_lasttoken"
    ]
    tokenizer = json.loads((folder / "topic" / "tokenizer.json").read_text())
    parts = tokenizer["post_processor"]["special_tokens"].values()
    assert parts
    assert all(len(part["ids"]) == 1 for part in parts)
    settings = json.loads((folder / "topic" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert settings["padding_side"] == "left"


def test_the_readme_runs(tiny_model, exported, monkeypatch):
    compiled, folder = exported(tiny_model())
    monkeypatch.chdir(folder)
    text = (folder / "README.md").read_text()
    assert not re.search(r"\{\w*\}", text)
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        names: dict[str, object] = {}
        exec(code, names)
        if "embeddings" in names:
            assert np.shape(names["embeddings"]) == (2, 32)
        else:
            last = names["token_ids"][0][-1]  # type: ignore[index]
            assert names["tokenizer"].id_to_token(last) == "<|pe:topic:4|>"  # type: ignore[attr-defined]
    assert all(prompt.instruction in text for prompt in compiled.prompts.values())


@pytest.mark.parametrize(
    ("changes", "message"), [({"deep_rank": 2}, "fold it .*--texts FILE"), ({"readout": "mean"}, "read-out 'mean'")]
)
def test_models_that_plain_folders_cannot_hold(tiny_model, exported, changes, message):
    with pytest.raises(PromptEmbedderError, match=message):
        exported(tiny_model(**changes))


@pytest.mark.parametrize("name", ["../up", "a b", "any-instruction", ".hidden", "a/b"])
def test_names_that_are_no_folders(tiny_model, name):
    with pytest.raises(PromptEmbedderError, match="becomes a folder"):
        refuse(compile_model(tiny_model(), {name: INSTRUCTION}))


def test_an_unknown_precision_is_refused(tiny_model, exported):
    with pytest.raises(PromptEmbedderError, match="precision 'int8' is unknown, expected one of float32, float16"):
        exported(tiny_model(), precision="int8")
