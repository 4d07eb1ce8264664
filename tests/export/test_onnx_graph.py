"""ONNX graphs: ONNX Runtime embeds with them what the model does, deep soft prompts too."""

from __future__ import annotations

import importlib
import json
import re
import sys

import numpy as np
import pytest
import torch

from conftest import INSTRUCTION, SECOND, TEXTS
from promptembedder import PromptEmbedderError
from promptembedder.errors import MissingExtraError
from promptembedder.export.compiled import compile_model, embed_compiled
from promptembedder.export.export import add, export
from promptembedder.export.onnx_graph import GRAPHS, reader, refuse, write

pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
tokenizers = pytest.importorskip("tokenizers")

HARD = [
    *TEXTS,
    "  blanks around  ",
    "line\nbreak\n",
    'emoji 😀 "quoted"',
    "שלום עולם",
    "Cafe\u0301 nai\u0308ve \ufb01",
    "a b " * 40,
    "<|end|> <|start|>",
    "",
]


def made(tiny_model, architecture, **changes):
    """A model with a centre, and a head that is not the identity where it has one."""
    model = tiny_model(architecture, **changes)
    model[0].subtract(torch.linspace(-1, 1, 32))
    torch.manual_seed(2)
    if changes.get("linear_head"):
        torch.nn.init.normal_(model[1].linear.weight, std=0.2)
    if changes.get("deep_rank"):
        with torch.no_grad():
            for parameter in model[0].alignment.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("llama", {"deep_rank": 2, "linear_head": True}),
        ("qwen2", {"layout": "prefix", "readout": "mean", "max_text_tokens": 7}),
        ("gemma3", {"readout": "mean", "deep_rank": 2}),
        ("gemma3", {"layout": "prefix", "text_template": "{text}"}),
    ],
)
def test_embeds_as_the_model(tiny_model, tmp_path, architecture, changes):
    model = made(tiny_model, architecture, **changes)
    compiled = compile_model(model, {"topic": "Find the topic.", "same": INSTRUCTION})
    write(compiled, model, tmp_path)
    expected = {name: embed_compiled(model, compiled, name, HARD).numpy() for name in compiled.prompts}
    for name, expected_NE in expected.items():
        np.testing.assert_allclose(reader(tmp_path, name)(HARD), expected_NE, atol=1e-5)
    _check_inputs(tmp_path, expected)


def _check_inputs(folder, expected):
    """Padding on either side, a number for each text, and the graphs of one instruction."""
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    texts = [text or "." for text in HARD]
    right, left = {}, {}
    for side, inputs in (("right", right), ("left", left)):
        tokenizer.enable_padding(direction=side, pad_id=10**6)
        read = tokenizer.encode_batch(texts)
        inputs["input_ids"] = np.array([one.ids for one in read])
        inputs["attention_mask"] = np.array([one.attention_mask for one in read])
    session = onnxruntime.InferenceSession(folder / GRAPHS / "model.onnx")
    numbers = {name: one["number"] for name, one in json.loads((folder / "instructions.json").read_text()).items()}
    assert list(numbers) == list(expected)
    each = np.array([numbers[name] for name, _ in zip(list(numbers) * len(texts), texts, strict=False)])
    (found,) = session.run(["sentence_embedding"], {**left, "instruction": each})
    stacked = np.stack(list(expected.values()))
    np.testing.assert_allclose(found, stacked[each, np.arange(len(texts))], atol=1e-5)
    for name, inputs in (("topic", left), ("document", right)):
        alone = onnxruntime.InferenceSession(folder / GRAPHS / f"{name}.onnx")
        assert [given.name for given in alone.get_inputs()] == ["input_ids", "attention_mask"]
        np.testing.assert_allclose(alone.run(None, inputs)[0], expected[name], atol=1e-5)


@pytest.mark.slow
def test_further_instructions_join_an_export(tiny_model, tmp_path, monkeypatch):
    """A longer instruction than those held, and the weights are not written again."""
    model, folder = tiny_model(layout="prefix"), tmp_path / "out"
    export(model, {"query": "Topic."}, folder, to="onnx")
    before = {file.name: (file.stat().st_ino, file.read_bytes()) for file in (folder / GRAPHS).iterdir()}
    query = reader(folder, "query")(HARD)
    done = add(model, {"longer": INSTRUCTION + " " + SECOND}, folder)
    assert list(done.digests) == ["query", "document", "longer"]
    assert done.parity.smallest_cosine > 0.99999
    np.testing.assert_allclose(reader(folder, "query")(HARD), query, atol=1e-6)
    after = {file.name: (file.stat().st_ino, file.read_bytes()) for file in (folder / GRAPHS).iterdir()}
    assert set(after) - set(before) == {"longer.onnx"}
    assert {name for name in before if before[name] != after[name]} == {"model.onnx"}
    assert "`longer`" in (folder / "README.md").read_text()
    _check_readme(folder)
    monkeypatch.setattr(importlib.import_module("promptembedder.export.export"), "_compared", differs)
    with pytest.raises(PromptEmbedderError, match="differs"):
        add(model, {"topic": SECOND}, folder)
    assert after == {file.name: (file.stat().st_ino, file.read_bytes()) for file in (folder / GRAPHS).iterdir()}


def differs(*arguments):
    raise PromptEmbedderError("differs")


def _check_readme(folder):
    text = (folder / "README.md").read_text()
    assert not re.search(r"{\w*}|{{|}}", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, object] = {}
    exec(
        code.replace('"tokenizer.json"', repr(str(folder / "tokenizer.json"))).replace(
            '"onnx/model.onnx"', repr(str(folder / "onnx" / "model.onnx"))
        ),
        names,
    )
    np.testing.assert_allclose(names["queries"], reader(folder, "query")(["a guitar is played"]), atol=1e-6)
    documents = ["A man is playing a guitar.", "Rain."]
    np.testing.assert_allclose(names["documents"], reader(folder, "document")(documents), atol=1e-6)


def test_the_extra_is_named(tiny_model, tmp_path, monkeypatch):
    model = tiny_model()
    for package in ("onnx", "onnxruntime"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=r"export to onnx needs onnx, .* pip install 'promptembedder\[onnx\]'"):
        export(model, {"query": INSTRUCTION}, tmp_path / "out", to="onnx")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(MissingExtraError, match="onnxruntime"):
        reader(tmp_path, "query")


def test_the_name_of_the_graph_of_all_is_refused(tiny_model):
    with pytest.raises(PromptEmbedderError, match=r"onnx/model.onnx holds all instructions"):
        refuse(compile_model(tiny_model(), {"model": INSTRUCTION}))


def test_an_attention_without_a_graph_is_refused(tiny_model, tmp_path):
    model = tiny_model()
    compiled = compile_model(model, {"topic": INSTRUCTION})
    model[0].backbone.lm.set_attn_implementation("eager")
    with pytest.raises(PromptEmbedderError, match="attention, 'eager', cannot be written as a graph"):
        write(compiled, model, tmp_path)
