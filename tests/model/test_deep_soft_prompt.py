"""Deep soft prompts: zero at first, equal to one full forward, in bfloat16, refused where they cannot be."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import ARCHITECTURES, INSTRUCTION, TEXTS
from promptembedder import PromptEmbedderError, load, save


def naive(module, text, instruction):
    """One full forward of one row without a cache; a deep soft prompt is added by hand in every layer."""
    lm = module.backbone.lm
    K = module.settings.num_soft_tokens
    soft = module.soft_prompt(instruction)[0]
    text_TD = lm.get_input_embeddings()(module.preprocess([text])["input_ids"][0])
    hooks = []
    for n, layer in enumerate(lm.layers if len(soft) > K else []):

        def add(_, inputs, rows=soft[K * (n + 1) : K * (n + 2)]):
            changed = inputs[0].clone()
            changed[0, -K:] += rows
            return (changed, *inputs[1:])

        hooks.append(layer.register_forward_pre_hook(add))
    out = lm(inputs_embeds=torch.cat([text_TD, soft[:K]])[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return out.last_hidden_state[0, -1]


def deepened(tiny_model, architecture="llama", **changes):
    model = tiny_model(architecture, deep_rank=3, **changes)
    torch.manual_seed(2)
    with torch.no_grad():
        model[0].alignment.deep_out.normal_(std=0.1)
    return model


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_deep_soft_prompt_starts_as_a_plain_one_and_equals_one_full_forward(tiny_model, architecture):
    plain, deep = tiny_model(architecture), tiny_model(architecture, deep_rank=3)
    assert np.array_equal(plain.encode(TEXTS), deep.encode(TEXTS))
    module = deepened(tiny_model, architecture)[0]
    with torch.no_grad():
        found = module(module.preprocess(TEXTS, prompt=INSTRUCTION))["sentence_embedding"]
        for n, text in enumerate(TEXTS):
            expected = naive(module, text, INSTRUCTION)
            assert torch.allclose(found[n], expected, atol=1e-5)
        plain_too = naive(plain[0], TEXTS[0], INSTRUCTION)
        assert not torch.allclose(found[0], plain_too, atol=1e-2)


def test_a_deep_soft_prompt_in_bfloat16(tiny_model, monkeypatch):
    monkeypatch.setattr("promptembedder.llms.widened.cpu_has_bfloat16", lambda: False)
    exact, narrow = (deepened(tiny_model, dtype=dtype) for dtype in ("float32", "bfloat16"))
    expected, found = (model.encode(TEXTS, prompt=INSTRUCTION) for model in (exact, narrow))
    assert (expected * found).sum(-1).min() > 0.999
    with torch.no_grad():
        narrow[0].alignment.deep_out.zero_()
    assert (expected * narrow.encode(TEXTS, prompt=INSTRUCTION)).sum(-1).max() < 0.99


def test_the_rank_is_that_of_each_layers_map(tiny_model):
    """Written out: soft tokens times both factors, layer by layer."""
    module = deepened(tiny_model)[0]
    alignment = module.alignment
    assert (alignment.deep_in.shape, alignment.deep_out.shape) == ((2, 32, 3), (2, 3, 32))
    with torch.no_grad():
        tokens_KP = module.soft_tokens(INSTRUCTION).tokens_NKP[0]
        soft_RD = module.soft_prompt(INSTRUCTION)[0]
        maps = [
            alignment.weight,
            *(first @ second for first, second in zip(alignment.deep_in, alignment.deep_out, strict=True)),
        ]
        assert torch.allclose(soft_RD, torch.cat([tokens_KP @ matrix for matrix in maps]), atol=1e-5)


def test_bad_input(tiny_model, tiny_settings, tmp_path):
    with pytest.raises(ValueError, match="deep_rank needs layout 'suffix', found 'prefix'"):
        tiny_settings(deep_rank=3, layout="prefix")
    save(deepened(tiny_model), tmp_path / "model")
    file = tmp_path / "model" / "alignment.safetensors"
    stored = load_file(file)
    save_file({"weight": stored["weight"]}, file)
    with pytest.raises(PromptEmbedderError, match=r"holds \{'weight': \(32, 32\)\}, expected \{.*'deep_in'"):
        load(tmp_path / "model")
    save_file({**stored, "deep_out": stored["deep_out"][:1].clone()}, file)
    with pytest.raises(PromptEmbedderError, match=r"'deep_out': \(1, 3, 32\).*, expected .*'deep_out': \(2, 3, 32\)"):
        load(tmp_path / "model")
