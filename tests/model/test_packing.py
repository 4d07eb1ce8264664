"""Texts in one row without padding: equal to one forward per text, whatever is shared, several or missing."""

from __future__ import annotations

import pytest
import torch
from test_backbone import naive_embedding

import promptembedder
from conftest import ARCHITECTURES, INSTRUCTION, TEXTS
from promptembedder.llms.packing import Packed, attend_apart

INSTRUCTIONS = [INSTRUCTION, "Find the topic.", "Find the feeling."]


def wide(module):
    """The module, with windows that hold every text: gemma3's of 12 would forbid packing."""
    if hasattr(module.backbone.lm.config, "sliding_window"):
        module.backbone.lm.config.sliding_window = 64
    return module


def embeddings(module, texts, instructions=(INSTRUCTION,)):
    features = module.preprocess(texts)
    with torch.no_grad():
        return torch.stack(module.embed(features["input_ids"], features["attention_mask"], instructions))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "qwen3", "mistral"])
@pytest.mark.parametrize("layout", ["prefix", "suffix"])
@pytest.mark.parametrize("readout", ["last", "mean"])
@pytest.mark.parametrize("texts", [TEXTS, TEXTS[:1], [TEXTS[1]] * 3])
def test_equals_one_forward_per_text(tiny_model, architecture, layout, readout, texts):
    """Of several lengths, alone, all of one length; several soft prompts behind every text."""
    module = wide(tiny_model(architecture, layout=layout, readout=readout)[0])
    assert module.backbone._can_pack(64)
    found_IBE = embeddings(module, texts, INSTRUCTIONS)
    with torch.no_grad():
        for i, instruction in enumerate(INSTRUCTIONS):
            for n, text in enumerate(texts):
                assert torch.allclose(found_IBE[i, n], naive_embedding(module, text, instruction), atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    "changes", [{"deep_rank": 2}, {"text_template": "Of one text:\n{text}\nThe"}, {"num_soft_tokens": 1}]
)
def test_equals_two_segments(tiny_model, monkeypatch, architecture, changes):
    """Deep soft prompts, texts that begin alike and many instructions, beside text states and one prompt at a time."""
    module = wide(tiny_model(architecture, **changes)[0])
    with torch.no_grad():
        for parameter in module.alignment.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4)) * 0.1)
    monkeypatch.setattr("promptembedder.model.backbone._PROMPTS", 2)
    monkeypatch.setattr("promptembedder.model.backbone._CHUNK_TOKENS_CPU", 60)
    found_IBE = embeddings(module, TEXTS, INSTRUCTIONS)
    for packs in (True, False):
        module.backbone._packs = packs
        features = module.preprocess(TEXTS)
        states = module.backbone.read_text(features["input_ids"], features["attention_mask"])
        for instruction, found_BE in zip(INSTRUCTIONS, found_IBE, strict=True):
            expected_BE = module.backbone.read_soft_prompt(states, module.soft_prompt(instruction))
            assert torch.allclose(found_BE, expected_BE, atol=5e-5, rtol=1e-4)


def test_what_texts_begin_with_is_read_once(tiny_model):
    module = tiny_model(text_template="Of one text:\n{text}\nThe")[0]
    rows = []
    module.backbone.lm.layers[0].register_forward_pre_hook(lambda layer, inputs: rows.append(inputs[0].shape[1]))
    embeddings(module, TEXTS)
    assert len(module.backbone.head_ids) == rows[0] > 3
    embeddings(module, TEXTS)
    alike = sum(
        int(module.preprocess([text])["attention_mask"].sum()) - rows[0] + module.backbone.num_soft_tokens
        for text in TEXTS
    )
    assert rows[1:] == [alike, alike]
    features = module.preprocess(TEXTS)
    features["input_ids"][:, 0] = 9  # other texts than the module's own
    with torch.no_grad():
        module(features)
    assert rows[3:] == [alike + len(TEXTS) * rows[0]]


def test_soft_tokens_alone_leave_the_last_layer(tiny_model):
    """The last layer's feed-forward part runs at soft tokens alone, that of others at every token."""
    module = tiny_model()[0]
    seen = {}
    embeddings(module, TEXTS)
    for n, layer in enumerate(module.backbone._view("soft_tokens", None).layers):
        mlp = layer.mlp if n == 0 else layer.layer.mlp
        mlp.register_forward_pre_hook(lambda part, inputs, n=n: seen.update({n: inputs[0].shape[1]}))
    embeddings(module, TEXTS)
    assert seen[1] == len(TEXTS) * module.backbone.num_soft_tokens < seen[0]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_of_a_shared_soft_prompt(tiny_model, architecture):
    """Layout `prefix`, where gradients pass through packed texts."""
    module = wide(tiny_model(architecture, layout="prefix")[0])
    features = module.preprocess(TEXTS, prompt=INSTRUCTION)
    found = []
    for packs in (True, False):
        module.backbone._packs = packs
        module.zero_grad()
        embeddings_BE = module(features)["sentence_embedding"]
        (embeddings_BE * torch.linspace(-1, 1, embeddings_BE.shape[1])).sum().backward()
        found.append(module.alignment.weight.grad.clone())
    assert torch.allclose(*found, atol=1e-4, rtol=1e-4)
    assert found[0].abs().max() > 1e-2


def test_in_windows_shorter_than_a_text_nothing_is_packed(tiny_model):
    module = tiny_model("gemma3")[0]
    assert module.backbone._can_pack(12)
    assert not module.backbone._can_pack(13)


def test_several_instructions_are_one_pass(tiny_model):
    model = tiny_model()
    passes = []
    promptembedder.encode(model, TEXTS, INSTRUCTIONS)
    model[0].backbone._view("soft_tokens", None).layers[0].register_forward_pre_hook(
        lambda layer, inputs: passes.append(inputs[0].shape[1])
    )
    promptembedder.encode(model, TEXTS, INSTRUCTIONS)
    own = sum(
        int(model[0].preprocess([text])["attention_mask"].sum()) - len(model[0].backbone.head_ids) for text in TEXTS
    )
    assert passes == [own + len(TEXTS) * len(INSTRUCTIONS) * model[0].backbone.num_soft_tokens]


def test_attention_apart_equals_attention_over_both():
    """Against scaled dot-product attention over joined tensors, with heads repeated."""
    torch.manual_seed(0)
    query, earlier, new = torch.randn(2, 6, 4, 8), torch.randn(2, 2, 2, 5, 8), torch.randn(2, 2, 2, 4, 8)
    sees_earlier = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()[:, None, None].expand(-1, 1, 4, -1)
    sees_new = torch.ones(4, 4).tril().bool()[None, None]
    keys, values = (torch.cat(both, dim=2).repeat_interleave(3, dim=1) for both in zip(earlier, new, strict=True))
    mask = torch.cat([sees_earlier, sees_new.expand(2, -1, -1, -1)], dim=-1)
    expected = torch.nn.functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
    found = attend_apart(query, (*earlier, sees_earlier), (*new, sees_new), None)
    assert torch.allclose(found, expected, atol=1e-6)


def test_row_and_back():
    packed = Packed([2, 3], None, device=torch.device("cpu"))
    padded = torch.arange(8).view(2, 4, 1)
    row = packed.row(padded)
    assert row[0, :, 0].tolist() == [0, 1, 4, 5, 6]
    assert packed.padded(row)[packed.real_BT].tolist() == row[0].tolist()
    assert packed.positions_1L.tolist() == [[0, 1, 0, 1, 2]]
