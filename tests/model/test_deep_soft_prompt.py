"""Options that give the soft prompt more to work with: fewer layers, deep soft prompts, a linear head."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import ARCHITECTURES, INSTRUCTION, TEXTS
from promptembedder import PromptEmbedderError, build, load, save
from promptembedder.llms import widened


def naive(module, text, instruction, layers=None):
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
    out = lm(
        inputs_embeds=torch.cat([text_TD, soft[:K]])[None], use_cache=False, output_hidden_states=layers is not None
    )
    for hook in hooks:
        hook.remove()
    return out.last_hidden_state[0, -1] if layers is None else lm.norm(out.hidden_states[layers])[0, -1]


def deepened(tiny_model, architecture="llama", **changes):
    model = tiny_model(architecture, deep_rank=3, **changes)
    torch.manual_seed(2)
    with torch.no_grad():
        model[0].alignment.deep_out.normal_(std=0.3)
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
    monkeypatch.setattr(widened, "cpu_has_bfloat16", lambda: False)
    exact, narrow = (deepened(tiny_model, dtype=dtype) for dtype in ("float32", "bfloat16"))
    expected, found = (model.encode(TEXTS, prompt=INSTRUCTION) for model in (exact, narrow))
    assert (expected * found).sum(-1).min() > 0.999
    with torch.no_grad():
        narrow[0].alignment.deep_out.zero_()
    assert (expected * narrow.encode(TEXTS, prompt=INSTRUCTION)).sum(-1).max() < 0.99


def test_bad_input(tiny_model, tiny_settings, tmp_path):
    with pytest.raises(PromptEmbedderError, match=r"backbone_layers = 3, but .* has 2"):
        build(tiny_settings(backbone_layers=3), device="cpu")
    for number, read in (2, None), (1, 1):
        with pytest.raises(PromptEmbedderError, match=r"readout_layers = .* the last of which counts anyway"):
            build(tiny_settings(readout_layers=(number,), backbone_layers=read), device="cpu")
    with pytest.raises(ValueError, match=r"instruction_template must hold \{instruction\} exactly once"):
        tiny_settings(instruction_template="no place")
    with pytest.raises(ValueError, match="instruction_template needs layout 'suffix', found 'prefix'"):
        tiny_settings(instruction_template=WORDS, layout="prefix")
    with pytest.raises(ValueError, match="text_pass 'int8' needs layout 'suffix', found 'prefix'"):
        tiny_settings(text_pass="int8", layout="prefix")
    with pytest.raises(ValueError, match="deep_soft_prompt needs layout 'suffix', found 'prefix'"):
        tiny_settings(deep_rank=3, layout="prefix")
    with pytest.raises(ValueError, match="deep_soft_prompt_rank needs deep_soft_prompt"):
        tiny_settings(deep_soft_prompt_rank=4)
    with pytest.raises(ValueError, match="instruction_guidance needs condition_on 'instruction', found"):
        tiny_settings(instruction_guidance=1.5, condition_on="instruction_and_text")
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        tiny_settings(instruction_guidance=0.5)
    with pytest.raises(PromptEmbedderError, match=r"model: instruction_guidance = 0.5: .* greater than or equal to 1"):
        tiny_model()[0].instruction_guidance = 0.5
    save(deepened(tiny_model), tmp_path / "model")
    file = tmp_path / "model" / "alignment.safetensors"
    stored = load_file(file)
    save_file({"weight": stored["weight"]}, file)
    with pytest.raises(PromptEmbedderError, match=r"holds \{'weight': \(32, 32\)\}, expected \{.*'deep'"):
        load(tmp_path / "model")
    save_file({"weight": stored["weight"], "deep": stored["deep"][:1].clone()}, file)
    with pytest.raises(PromptEmbedderError, match=r"'deep': \(1, 32, 32\).*, expected .*'deep': \(2, 32, 32\)"):
        load(tmp_path / "model")
