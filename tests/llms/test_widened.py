"""bfloat16 weights multiplied in float32: the numbers of a float32 copy, the memory and gradients of the narrow one."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from conftest import ARCHITECTURES, INSTRUCTION, TEXTS
from promptembedder.llms import widened
from promptembedder.llms.widened import WidenedLinear


@pytest.fixture
def emulated(monkeypatch):
    """A CPU without bfloat16 instructions."""
    monkeypatch.setattr(widened, "cpu_has_bfloat16", lambda: False)


def test_product_and_gradient_are_those_of_the_widened_weights():
    linear = nn.Linear(6, 4).to(torch.bfloat16).requires_grad_(False)
    exact = copy.deepcopy(linear).float()
    inputs = torch.randn(3, 2, 6, requires_grad=True)
    twin = inputs.detach().clone().requires_grad_()
    ours, theirs = WidenedLinear(linear)(inputs), exact(twin)
    assert ours.dtype == torch.float32
    assert torch.equal(ours, theirs)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    assert torch.allclose(inputs.grad, twin.grad, rtol=1e-6)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("layout", ["prefix", "suffix"])
def test_a_bfloat16_model_gives_what_its_float32_copy_gives(tiny_model, emulated, architecture, layout):
    module = tiny_model(architecture, dtype="bfloat16", layout=layout)[0]
    narrow, wide = module.backbone, copy.deepcopy(module.backbone)
    wide.lm.float()
    tokens = module.preprocess(TEXTS)
    found, gradients = [], []
    for backbone in (narrow, wide):
        soft = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
        embedding = backbone(tokens["input_ids"], tokens["attention_mask"], soft, module.instruction_ids(INSTRUCTION))
        embedding[:, :7].sum().backward()
        found.append(embedding.detach())
        gradients.append(soft.grad)
    # Rounded are the states kept between text and soft prompt, and gemma's scaled token embeddings; nothing else.
    tolerance = 1e-5 if layout == "prefix" and architecture != "gemma3" else 3e-2
    assert torch.allclose(found[0], found[1], atol=tolerance * float(found[1].abs().max()))
    assert torch.nn.functional.cosine_similarity(gradients[0].flatten(), gradients[1].flatten(), dim=0) > 0.999
    assert {p.dtype for p in narrow.lm.parameters()} == {torch.bfloat16}


def test_no_copy_of_the_weights_and_no_part_of_the_model(tiny_model, emulated):
    module = tiny_model(dtype="bfloat16")[0]
    names = set(module.state_dict())
    module(module.preprocess(TEXTS))
    view = module.backbone._copies[("widened", "cpu", "torch.bfloat16")]
    assert {p.data_ptr() for p in view.parameters()} == {p.data_ptr() for p in module.backbone.lm.parameters()}
    assert set(module.state_dict()) == names
    assert module.backbone.__getstate__()["_copies"] == {}


def test_left_alone_are_llms_with_layers_it_does_not_know(emulated):
    known = nn.Sequential(nn.Embedding(3, 4), nn.Linear(4, 4)).to(torch.bfloat16)
    assert widened.helps(known)
    known.append(nn.LayerNorm(4).to(torch.bfloat16))
    assert not widened.helps(known)


def test_left_alone_where_bfloat16_is_native_or_weights_are_float32(tiny_model, monkeypatch):
    monkeypatch.setattr(widened, "cpu_has_bfloat16", lambda: True)
    assert not widened.helps(tiny_model(dtype="bfloat16")[0].backbone.lm)
    monkeypatch.setattr(widened, "cpu_has_bfloat16", lambda: False)
    assert widened.helps(tiny_model(dtype="bfloat16")[0].backbone.lm)
    assert not widened.helps(tiny_model(dtype="float32")[0].backbone.lm)
