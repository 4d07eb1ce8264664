"""The model's own instructions have one source, and every way of encoding reads it."""

from __future__ import annotations

import copy
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

import promptembedder
from conftest import INSTRUCTION, SECOND, TEXTS
from promptembedder import PromptEmbedderError
from promptembedder.model.folder import describe
from promptembedder.model.instructions import instruction_for

GUIDE = Path(__file__).parents[2] / "docs" / "guide.md"
CALLS = re.findall(r'^\| `(.+?)` \| `model\.prompts\["(\w+)"\]` \|$', GUIDE.read_text(encoding="utf-8"), re.M)


def test_the_guide_has_the_table():
    assert len(CALLS) >= 10
    assert {name for _, name in CALLS} == {"query", "document"}


@pytest.fixture
def expected(tiny_model):
    """What a model gives under the two instructions that the tests set."""
    model = tiny_model()
    return {name: model.encode(TEXTS, prompt=text) for name, text in (("query", INSTRUCTION), ("document", SECOND))}


def assert_ways_agree(model, expected):
    for call, name in CALLS:
        names = {"model": model, "promptembedder": promptembedder, "texts": TEXTS}
        found = eval(call, names)
        np.testing.assert_allclose(found, expected[name], atol=1e-5, err_msg=call)


def changed(model):
    model.prompts["query"], model.prompts["document"] = INSTRUCTION, SECOND
    return model


def replaced(model):
    model.prompts = {"query": INSTRUCTION, "document": SECOND}
    return model


@pytest.mark.parametrize("change", [changed, replaced])
def test_the_ways_of_the_guide_agree(tiny_model, expected, change):
    assert_ways_agree(change(tiny_model()), expected)
    settings = {"default_instruction": INSTRUCTION, "document_instruction": SECOND}
    assert_ways_agree(tiny_model(**settings), expected)


def pickled(model):
    """As a pool of processes gets it."""
    return pickle.loads(pickle.dumps(model))  # noqa: S301 - our own


def test_they_agree_in_copies(tiny_model, expected):
    model = tiny_model()
    for made in (copy.deepcopy(model), copy.deepcopy(changed(model)), pickled(model)):
        assert_ways_agree(changed(made), expected)


@pytest.mark.slow
def test_they_agree_in_a_saved_model(tiny_model, expected, tmp_path, command):
    model = changed(tiny_model())
    promptembedder.save(model, tmp_path / "model")
    assert INSTRUCTION in (tmp_path / "model" / "README.md").read_text()
    assert_ways_agree(promptembedder.load(tmp_path / "model", device="cpu"), expected)
    assert_ways_agree(SentenceTransformer(str(tmp_path / "model"), trust_remote_code=True, device="cpu"), expected)
    told = describe(tmp_path / "model")
    assert (told["default_instruction"], told["document_instruction"]) == (INSTRUCTION, SECOND)
    assert command("explain", tmp_path / "model").out.startswith(f"instruction: {INSTRUCTION}\n")
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    for options, name in (([], "query"), (["--document"], "document")):
        made = command("encode", tmp_path / "model", tmp_path / "texts.txt", "-o", tmp_path / "v.npy", *options)
        assert made.code == 0, made.err
        np.testing.assert_allclose(np.load(tmp_path / "v.npy"), expected[name], atol=1e-5)


def test_models_that_share_a_module_keep_their_own(tiny_model, expected):
    first = changed(tiny_model())
    second = SentenceTransformer(modules=list(first), prompts={"query": SECOND, "document": INSTRUCTION}, device="cpu")
    np.testing.assert_allclose(first.encode(TEXTS), expected["query"], atol=1e-5)
    np.testing.assert_allclose(second.encode(TEXTS), expected["document"], atol=1e-5)
    np.testing.assert_allclose(promptembedder.encode(second, TEXTS), expected["document"], atol=1e-5)


def test_a_default_prompt_name_counts(tiny_model, expected):
    model = tiny_model()
    model.prompts["mine"], model.default_prompt_name = INSTRUCTION, "mine"
    for found in (model.encode(TEXTS), model.encode(TEXTS, prompt=" "), promptembedder.encode(model, TEXTS, " ")):
        np.testing.assert_allclose(found, expected["query"], atol=1e-5)


def test_instruction_for(tiny_model):
    model = changed(tiny_model())
    assert instruction_for(model) == instruction_for(model, " \n") == INSTRUCTION
    assert instruction_for(model, document=True) == SECOND
    assert instruction_for(model, "Mine.", document=True) == "Mine."
    model.prompts["query"] = ""
    assert instruction_for(model) == model[0].settings.default_instruction
    with pytest.raises(PromptEmbedderError, match="an instruction is int 3"):
        instruction_for(model, 3)
