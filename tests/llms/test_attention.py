"""Attention with earlier states apart: equal to attention over joined states, gradients too."""

from __future__ import annotations

import pytest
import torch

from conftest import ARCHITECTURES, INSTRUCTION, TEXTS
from promptembedder.llms.locate import locate
from promptembedder.llms.open import load_causal_lm
from promptembedder.model.backbone import Backbone


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("num_soft_tokens", [1, 5])
@pytest.mark.parametrize("texts", [TEXTS, TEXTS[:1]])
def test_equals_joined_states(tiny_model, architecture, num_soft_tokens, texts):
    """With padding and without, in windows shorter than the texts, for one soft token and several."""
    module = tiny_model(architecture, num_soft_tokens=num_soft_tokens)[0]
    backbone = module.backbone
    assert backbone._can_stay_apart
    features = module.preprocess(texts, prompt=INSTRUCTION)
    found = []
    for apart in (True, False):
        backbone._can_stay_apart = apart
        states = backbone.read_text(features["input_ids"], features["attention_mask"])
        soft = module.soft_prompt(INSTRUCTION).detach().requires_grad_()
        embedding = backbone.read_soft_prompt(states, soft)
        (embedding * torch.linspace(-1, 1, 32)).sum().backward()
        found.append((embedding.detach(), soft.grad))
    assert torch.allclose(found[0][0], found[1][0], atol=1e-5)
    assert torch.allclose(found[0][1], found[1][1], atol=1e-4)
    assert found[0][1].abs().max() > 1e-2


def test_states_are_not_touched(tiny_model):
    module = tiny_model()[0]
    features = module.preprocess(TEXTS)
    states = module.backbone.read_text(features["input_ids"], features["attention_mask"])
    before = [(layer.keys, layer.keys.clone()) for layer in states.cache.layers]
    with torch.no_grad():
        soft = module.soft_prompt(INSTRUCTION)
        first, second = (module.backbone.read_soft_prompt(states, soft) for _ in range(2))
    assert torch.equal(first, second)
    for layer, (tensor, copy) in zip(states.cache.layers, before, strict=True):
        assert layer.keys is tensor
        assert torch.equal(tensor, copy)


def test_other_attention_falls_back(tiny_settings):
    """An LLM that runs eager attention keeps it, and its states are joined."""
    lm = load_causal_lm(locate(tiny_settings().backbone), torch.float32).model
    lm.set_attn_implementation("eager")
    backbone = Backbone(lm, layout="suffix", readout="last", num_soft_tokens=2)
    assert lm.config._attn_implementation == "eager"
    ids = torch.tensor([[5, 6, 7]])
    states = backbone.read_text(ids, torch.ones_like(ids))
    soft_1KD = torch.randn(1, 2, 32, generator=torch.Generator().manual_seed(3))
    found = backbone.read_soft_prompt(states, soft_1KD)
    lm.set_attn_implementation("sdpa")
    read = torch.cat([lm.get_input_embeddings()(ids), soft_1KD], dim=1)
    assert torch.allclose(found, lm(inputs_embeds=read, use_cache=False).last_hidden_state[:, -1], atol=1e-5)
