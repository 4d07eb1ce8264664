"""Layouts and read-outs: independent of batch, padding and its side; equal to one naive full forward."""

from __future__ import annotations

import itertools

import pytest
import torch

from conftest import ARCHITECTURES, INSTRUCTION, TEXTS
from promptembedder.llms.states import merged
from promptembedder.model import baselines
from promptembedder.model.backbone import pad_side

CASES = list(itertools.product(ARCHITECTURES, ["prefix", "suffix"], ["last", "mean"]))
CASES += list(itertools.product(["qwen3", "mistral"], ["prefix", "suffix"], ["last"]))


def naive_embedding(module, text, instruction):
    """One unpadded row, no cache: embeddings of all parts in a row, one forward, pooled by hand."""
    lm = module.backbone.lm
    embed = lm.get_input_embeddings()
    text_TD = embed(module.preprocess([text])["input_ids"][0])
    soft_KD = module.soft_prompt(instruction)[0]
    head_ID = embed(module.instruction_ids(instruction))
    suffix = module.settings.layout == "suffix"
    parts = [text_TD, soft_KD] if suffix else [head_ID, soft_KD, text_TD]
    hidden = lm(inputs_embeds=torch.cat(parts)[None], use_cache=False).last_hidden_state[0]
    read = hidden[-len(parts[-1]) :]
    return read[-1] if module.settings.readout == "last" else read.mean(0)


@pytest.mark.parametrize(("architecture", "layout", "readout"), CASES)
def test_equals_one_full_forward(tiny_model, architecture, layout, readout):
    module = tiny_model(architecture, layout=layout, readout=readout)[0]
    with torch.no_grad():
        ours = module(module.preprocess(TEXTS, prompt=INSTRUCTION))["sentence_embedding"]
        for n, text in enumerate(TEXTS):
            assert torch.allclose(ours[n], naive_embedding(module, text, INSTRUCTION), atol=1e-5), text


@pytest.mark.parametrize("layout", ["prefix", "suffix"])
@pytest.mark.parametrize("words", [3, 300])
def test_what_opens_a_sequence_opens_it_once(tiny_model, layout, words):
    """Of the instruction's end, too, where it is cut; gemma3's tokenizer opens with bos."""
    model = tiny_model("gemma3", layout=layout, max_instruction_tokens=20)
    module, bos = model[0], model.tokenizer.bos_token_id
    assert model.tokenizer("word")["input_ids"][0] == bos
    instruction = module.instruction_ids("word " * words).tolist()
    text = module.preprocess(["A text."])["input_ids"][0].tolist()
    read = [*instruction, *text] if layout == "prefix" else [*text, *instruction]
    assert [n for n, token in enumerate(read) if token == bos] == [0]
    assert len(instruction) <= 21


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("layout", ["prefix", "suffix"])
def test_a_hard_cue_is_what_the_llm_says_of_the_words(tiny_model, architecture, layout):
    """Whatever layout the model has that the LLM is taken from."""
    module = tiny_model(architecture, layout=layout)[0]
    found = baselines.hard_cue(module, TEXTS, "{text} means:")
    for n, text in enumerate(TEXTS):
        ids = module.tokenizer(f"{text} means:", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            expected = module.backbone.lm(input_ids=ids).last_hidden_state[0, -1]
        assert torch.allclose(torch.from_numpy(found[n]), expected / expected.norm(), atol=1e-5), text


@pytest.mark.parametrize(("architecture", "layout", "readout"), CASES)
def test_alone_in_a_batch_and_with_padding_on_either_side(tiny_model, architecture, layout, readout):
    module = tiny_model(architecture, layout=layout, readout=readout)[0]

    def embed(features):
        with torch.no_grad():
            return module(features)["sentence_embedding"]

    together = module.preprocess(TEXTS, prompt=INSTRUCTION)
    expected = embed(together)
    for n, text in enumerate(TEXTS):
        alone = embed(module.preprocess([text], prompt=INSTRUCTION))[0]
        assert torch.allclose(expected[n], alone, atol=1e-5)
    for side in ("left", "right"):
        padding = (9, 0) if side == "left" else (0, 9)
        ids = torch.nn.functional.pad(together["input_ids"], padding, value=3)
        mask = torch.nn.functional.pad(together["attention_mask"], padding)
        ids, mask = pad_side(ids, mask, side)
        padded = embed({**together, "input_ids": ids, "attention_mask": mask})
        assert torch.allclose(expected, padded, atol=1e-5), side


@pytest.mark.parametrize(("architecture", "layout"), itertools.product(ARCHITECTURES, ["prefix", "suffix"]))
def test_chunks_equal_whole_gradients_too(tiny_model, monkeypatch, architecture, layout):
    module = tiny_model(architecture, layout=layout)[0]
    features = module.preprocess(TEXTS, prompt=INSTRUCTION)
    target = torch.randn(len(TEXTS), module.get_embedding_dimension(), generator=torch.Generator().manual_seed(5))
    found = []
    for limit in (10_000, 20):
        monkeypatch.setattr("promptembedder.model.backbone._CHUNK_TOKENS_CPU", limit)
        assert (len(module.backbone._chunks(features["attention_mask"])) > 1) == (limit == 20)
        module.zero_grad()
        embeddings = module(features)["sentence_embedding"]
        (embeddings * target).sum().backward()
        found.append((embeddings.detach(), module.alignment.weight.grad.clone()))
    assert torch.allclose(found[0][0], found[1][0], atol=1e-5)
    assert torch.allclose(found[0][1], found[1][1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_states_of_a_batch_are_held_once(tiny_model, monkeypatch, architecture):
    module = tiny_model(architecture)[0]
    features = module.preprocess(TEXTS)
    monkeypatch.setattr("promptembedder.model.backbone._CHUNK_TOKENS_CPU", 20)
    ids, mask = pad_side(features["input_ids"], features["attention_mask"], "left")
    with torch.no_grad():
        parts = list(module.backbone._read_chunks(ids, mask))
        whole = merged(parts)
    assert len(parts) > 1
    assert all(len(layer.keys) == len(layer.values) == len(TEXTS) for layer in whole.cache.layers)
    assert all(layer.keys.numel() == layer.values.numel() == 0 for _, part in parts for layer in part.cache.layers)


def test_suffix_states_serve_several_soft_prompts(tiny_model):
    module = tiny_model("gemma3")[0]
    features = module.preprocess(TEXTS)
    with torch.no_grad():
        states = module.backbone.read_text(features["input_ids"], features["attention_mask"])
        for instruction in (INSTRUCTION, "Find the topic.", INSTRUCTION):
            read = module.backbone.read_soft_prompt(states, module.soft_prompt(instruction))
            direct = module(module.preprocess(TEXTS, prompt=instruction))["sentence_embedding"]
            assert torch.equal(read, direct)


def test_suffix_text_needs_no_gradient(tiny_model):
    """Nothing of the text's pass is kept for backward: states are constants."""
    module = tiny_model()[0]
    features = module.preprocess(TEXTS)
    states = module.backbone.read_text(features["input_ids"], features["attention_mask"])
    assert not any(layer.keys.requires_grad or layer.values.requires_grad for layer in states.cache.layers)


def test_pad_side_keeps_order():
    ids = torch.tensor([[5, 0, 7, 8, 0]])
    mask = torch.tensor([[1, 0, 1, 1, 0]])
    assert pad_side(ids, mask, "left")[0].tolist() == [[0, 0, 5, 7, 8]]
    assert pad_side(ids, mask, "right")[0].tolist() == [[5, 7, 8, 0, 0]]
