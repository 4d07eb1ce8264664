"""The export that `load` opens over the backbone alone."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer

import promptembedder
from conftest import FIRST_QUICK, INSTRUCTION, SECOND, TEXTS, assert_same_embeddings, assert_same_model
from promptembedder import PromptEmbedderError
from promptembedder.export.compiled import compile_model
from promptembedder.export.export import export
from promptembedder.llms import open as opening
from promptembedder.model.folder import describe
from promptembedder.training.fit import open_to_training
from promptembedder.training.settings import TrainingConfig


def trained(model):
    """The model with nothing left at a start that makes no difference."""
    torch.manual_seed(2)
    with torch.no_grad():
        if model[0].alignment.deep_out is not None:
            model[0].alignment.deep_out.normal_(std=0.1)
        if model[0].settings.linear_head:
            model[1].linear.weight.normal_(std=0.2)
    model[0].subtract(torch.linspace(-1, 1, model[0].get_embedding_dimension()))
    return model


@pytest.fixture
def exported(tiny_model, tmp_path):
    """`exported("llama", ...)`: a model and the folder of its export."""

    def make(architecture="llama", **changes):
        model = trained(tiny_model(architecture, **changes))
        done = export(model, {"query": INSTRUCTION, "topic": SECOND}, tmp_path / "out", to="soft-prompt")
        return model, done.folder

    return make


@pytest.mark.parametrize("architecture", FIRST_QUICK)
@pytest.mark.parametrize(
    "changes", [{"deep_rank": 2, "linear_head": True}, {"layout": "prefix", "readout": "mean"}, {"readout": "mean"}]
)
def test_embeds_as_the_model(exported, architecture, changes):
    model, folder = exported(architecture, **changes)
    loaded = promptembedder.load(folder, device="cpu")
    for words, asked in [(INSTRUCTION, INSTRUCTION), (INSTRUCTION, "query"), (SECOND, "topic")]:
        expected = model.encode(TEXTS, prompt=words)
        np.testing.assert_allclose(loaded.encode(TEXTS, prompt=asked), expected, rtol=0, atol=1e-6)
        np.testing.assert_allclose(
            promptembedder.encode(loaded, TEXTS, asked), promptembedder.encode(model, TEXTS, words), rtol=0, atol=1e-6
        )
    assert_same_embeddings(loaded.encode(TEXTS, prompt_name="document"), model.encode_document(TEXTS))
    assert_same_embeddings(loaded.encode_document(TEXTS), model.encode_document(TEXTS))
    assert_same_embeddings(loaded.encode_query(TEXTS), model.encode(TEXTS, prompt=INSTRUCTION))
    assert_same_embeddings(
        SentenceTransformer(str(folder), device="cpu", trust_remote_code=True).encode(TEXTS), loaded.encode(TEXTS)
    )


def test_the_prompting_llm_is_not_opened(tiny_model, tiny_lm, tmp_path, monkeypatch):
    model = tiny_model(prompter=str(tiny_lm("qwen2", 48)))
    folder = export(model, {"query": INSTRUCTION}, tmp_path / "out", to="soft-prompt").folder
    opened = []
    plain = opening.load_config
    monkeypatch.setattr(opening, "load_config", lambda located: (opened.append(located.name), plain(located))[1])
    promptembedder.load(folder, device="cpu")
    assert opened == [str(tiny_lm())]
    assert sum(file.stat().st_size for file in folder.rglob("*")) < 50_000


def test_another_instruction_is_refused(exported):
    loaded = promptembedder.load(exported()[1], device="cpu")
    for call in (
        lambda: loaded.encode(TEXTS, prompt="Other."),
        lambda: promptembedder.encode(loaded, TEXTS, "Other."),
        lambda: loaded[0].check_instruction("Other."),
    ):
        with pytest.raises(PromptEmbedderError, match=r"'Other\.' is not held .*held: query \('Retr.*topic.*document"):
            call()


def test_what_needs_an_llm_is_refused(exported):
    loaded = promptembedder.load(exported()[1], device="cpu")
    for call in (
        lambda: promptembedder.explain(loaded, "query"),
        lambda: open_to_training(loaded[0], TrainingConfig()),
        lambda: loaded[0].prompter.embeddings_dtype,
    ):
        with pytest.raises(PromptEmbedderError, match="holds soft prompts and no Prompting LLM"):
            call()


def test_saved_again_it_is_the_same(exported, tmp_path):
    loaded = promptembedder.load(exported(deep_rank=2)[1], device="cpu")
    promptembedder.save(loaded, tmp_path / "again")
    again = promptembedder.load(tmp_path / "again", device="cpu")
    assert_same_model(loaded, again)
    np.testing.assert_array_equal(again.encode(TEXTS, prompt="topic"), loaded.encode(TEXTS, prompt="topic"))
    assert again.prompts == loaded.prompts
    assert describe(tmp_path / "again")["instructions"] == loaded[0].prompter.named


def test_it_is_exported_again(exported, tmp_path):
    model, folder = exported(deep_rank=2)
    loaded = promptembedder.load(folder, device="cpu")
    compiled = compile_model(loaded, {"topic": SECOND})
    assert compiled.digest("topic") == compile_model(model, {"topic": SECOND}).digest("topic")
    with pytest.raises(PromptEmbedderError, match="not held"):
        compile_model(loaded, {"new": "Something else."})


@pytest.mark.slow
def test_workers_of_a_pool_embed_the_same(exported):
    loaded = promptembedder.load(exported(deep_rank=2)[1], device="cpu")
    pool = loaded.start_multi_process_pool(["cpu", "cpu"])
    try:
        found = loaded.encode(TEXTS * 4, pool=pool, prompt="topic", chunk_size=5)
    finally:
        loaded.stop_multi_process_pool(pool)
    assert_same_embeddings(found, loaded.encode(TEXTS * 4, prompt="topic"))


def test_damaged_folders_are_one_line(exported):
    folder = exported()[1]
    weights, settings = folder / "soft_prompts.safetensors", folder / "promptembedder.json"
    held, saved = load_file(weights), json.loads(settings.read_text())
    save_file({**held, "weight": held["weight"][:2].contiguous()}, weights)
    with pytest.raises(PromptEmbedderError, match=r"holds soft prompts of shape \(2, 5, 32\), expected \(3, 5, 32\)"):
        promptembedder.load(folder, device="cpu")
    for table in (held["weight"].repeat(1, 3, 1), held["weight"][:, :3].contiguous()):
        save_file({**held, "weight": table}, weights)
        with pytest.raises(PromptEmbedderError, match=r"expected \(3, 5, 32\)"):
            promptembedder.load(folder, device="cpu")
    for table in (held["weight"] * float("nan"), held["weight"].long()):
        save_file({**held, "weight": table}, weights)
        with pytest.raises(PromptEmbedderError, match="no finite floating-point numbers"):
            promptembedder.load(folder, device="cpu")
    weights.unlink()
    with pytest.raises(PromptEmbedderError, match=r"has no soft_prompts\.safetensors"):
        promptembedder.load(folder, device="cpu")
    settings.write_text(json.dumps({**saved, "instructions": []}))
    with pytest.raises(PromptEmbedderError, match="'instructions' is missing"):
        promptembedder.load(folder, device="cpu")
    settings.write_text(json.dumps(saved))
    with pytest.raises(PromptEmbedderError, match="opens no Prompting LLM"):
        promptembedder.load(folder, device="cpu", prompter="smollm2-135m-instruct")
