"""Soft prompts as leaves: the same gradients, one pass of the prompter for each instruction and step."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from conftest import INSTRUCTION, SECOND, TEXTS
from promptembedder import PromptEmbedderError
from promptembedder.model.leaves import SoftPromptLeaves
from promptembedder.model.module import SoftPromptTransformer
from promptembedder.training.callbacks import SoftPromptLeafCallback
from promptembedder.training.losses import make_loss
from promptembedder.training.settings import TrainingConfig
from promptembedder.training.train import train


@pytest.mark.parametrize(
    "option",
    [
        {"deep_rank": 3},
        {"linear_head": True, "centred": True},
        {"instruction_guidance": 1.5},
        {"instruction_guidance": 1.5, "layout": "prefix"},
    ],
)
def test_leaf_and_plain_training_are_the_same(run_config, option):
    """The callback clips all trained weights, those after pooling too."""
    trained = [
        train(run_config(str(leaf), model=option, soft_prompt_leaf=leaf, max_grad_norm=0.05)).model
        for leaf in (True, False)
    ]
    one, other = (dict(model.named_parameters()) for model in trained)
    for name, parameter in one.items():
        assert torch.allclose(parameter, other[name], atol=1e-5), name


@pytest.mark.parametrize("kind", ["plain", "cached", "accumulated"])
@pytest.mark.parametrize("layout", ["prefix", "suffix"])
def test_leaf_gives_the_same_gradients(tiny_model, kind, layout):
    """One backward through the prompter per step equals one per forward."""
    model = tiny_model(layout=layout)
    module = model[0]
    loss = make_loss(model, TrainingConfig(loss="cached_infonce" if kind == "cached" else "infonce", mini_batch_size=2))
    batches = [(TEXTS[:4], INSTRUCTION), (TEXTS[1:], SECOND if kind == "accumulated" else INSTRUCTION)]
    found = []
    for leaves in (None, SoftPromptLeaves()):
        model.zero_grad()
        module.leaves = leaves
        for texts, instruction in batches:
            columns = [model.preprocess(t, prompt=instruction) for t in (texts, texts[::-1], texts[1:] + texts[:1])]
            loss(columns, None).backward()
        if leaves is not None:
            assert all(p.grad is None for p in module.prompter.parameters())
            leaves.backward()
        found.append({n: p.grad.clone() for n, p in module.named_parameters() if p.requires_grad})
    module.leaves = None
    for name, gradient in found[0].items():
        assert torch.allclose(gradient, found[1][name], atol=1e-5, rtol=1e-4), name
    assert max(float(g.abs().max()) for g in found[0].values()) > 1e-3


def test_prompter_runs_once_per_instruction_and_step(run_config, monkeypatch):

    calls, original = [], SoftPromptTransformer.soft_tokens

    def counted(self, instruction):
        if torch.is_grad_enabled():
            calls.append(instruction)
        return original(self, instruction)

    monkeypatch.setattr(SoftPromptTransformer, "soft_tokens", counted)
    train(run_config(max_steps=4))
    assert len(calls) == 4  # one instruction per batch, whatever the number of columns


def test_fp16_is_refused(tiny_model):
    """The trainer scales the gradients that it has; those of soft prompts come later."""
    callback = SoftPromptLeafCallback(tiny_model()[0], max_grad_norm=1.0)
    with pytest.raises(PromptEmbedderError, match="train in bf16"):
        callback.on_train_begin(SimpleNamespace(fp16=True), None, None)
    callback.on_train_begin(SimpleNamespace(fp16=False), None, None)


@pytest.mark.parametrize("changes", [{}, {"loss": "cached_infonce", "mini_batch_size": 2}])
def test_leaf_and_cache_change_nothing_but_the_cost(run_config, tmp_path, changes):
    """The same weights with both on as with both off; later epochs read no text again."""
    found = []
    for on in (False, True):
        more = {"text_state_cache": "1MiB", "text_state_folder": str(tmp_path / "states")} if on else {}
        config = run_config(
            f"run-{on}", max_steps=24, soft_prompt_leaf=on, arguments={"save_steps": 24}, **changes, **more
        )
        result = train(config)
        found.append({n: p for n, p in result.model.named_parameters() if p.requires_grad})
        assert result.model[0].backbone.text_cache is None
    for name, weight in found[0].items():
        assert torch.allclose(weight, found[1][name], atol=1e-5), name
    cached_loss = "loss" in changes  # it reads every text twice, the second time from the cache
    rates = [line["text_state_hit_rate"] for line in result.history if "text_state_hit_rate" in line]
    assert rates[0] == (0.5 if cached_loss else 0)
    assert result.text_state_hit_rate == rates[-1] == (0.75 if cached_loss else 0.5)  # two epochs
    again = train(run_config("again", text_state_cache=2**20, text_state_folder=str(tmp_path / "states")))
    assert again.text_state_hit_rate == 1.0


@pytest.mark.parametrize(
    ("model", "training", "message"),
    [
        ({"layout": "prefix"}, {"text_state_cache": "1MiB"}, "text_state_cache needs model.layout 'suffix'"),
        ({}, {"text_state_folder": "here"}, "text_state_folder needs training.text_state_cache"),
        ({}, {"text_state_cache": 2**60, "text_state_folder": "here"}, "larger than the room on the disk"),
        ({}, {"text_state_cache": 2**60}, "larger than the memory"),
    ],
)
def test_text_state_cache_that_cannot_be(run_config, tmp_path, monkeypatch, model, training, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PromptEmbedderError, match=message):
        train(run_config(model=model, **training))
