"""Soft prompts as leaves: the same gradients, one pass of the prompter for each instruction and step."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset, DatasetDict

from conftest import INSTRUCTION, SECOND, TEXTS
from promptembedder import PromptEmbedderError, build
from promptembedder.data.rows import TrainingData
from promptembedder.model.leaves import SoftPromptLeaves, TrainingState
from promptembedder.model.module import SoftPromptTransformer
from promptembedder.training.callbacks import SoftPromptLeafCallback
from promptembedder.training.fit import fit
from promptembedder.training.losses import make_loss
from promptembedder.training.rates import learning_rates
from promptembedder.training.settings import TrainingConfig
from promptembedder.training.train import train


@pytest.mark.slow
@pytest.mark.parametrize("option", [{"deep_rank": 3}, {"linear_head": True}, {"layout": "prefix"}])
def test_training_equals_plain_steps_of_the_optimizer(tiny_settings, tmp_path, option):
    """Written out without leaves: backward, clip all trained weights together, those after pooling too, AdamW."""
    columns = {
        "anchor": [f"{text} one" for text in TEXTS[:4]],
        "positive": [f"{text} two" for text in TEXTS[:4]],
        "negative_1": [f"{text} three" for text in TEXTS[1:]],
    }
    prompts = {"task": dict.fromkeys(columns, INSTRUCTION)}
    data = TrainingData(DatasetDict({"task": Dataset.from_dict(columns)}), prompts)
    arguments = {"max_grad_norm": 0.05, "lr_scheduler_type": "constant"}
    settings = TrainingConfig(max_steps=3, batch_size=4, warmup=0, prompter_learning_rate=1e-3, arguments=arguments)
    fitted, plain = (build(tiny_settings(**option), device="cpu") for _ in range(2))
    fit(fitted, data, settings, output=tmp_path / "run")
    of_alignment, *of_head = learning_rates(plain[0], settings).values()
    head = [parameter for part in list(plain)[1:] for parameter in part.parameters()]
    groups = [
        {"params": [p for p in plain[0].prompter.parameters() if p.requires_grad], "lr": 1e-3},
        {"params": list(plain[0].alignment.parameters()), "lr": of_alignment},
        *({"params": head, "lr": rate} for rate in of_head),
    ]
    optimizer, loss = torch.optim.AdamW(groups, weight_decay=0.0), make_loss(plain, settings)
    for _ in range(3):
        optimizer.zero_grad()
        loss([plain.preprocess(texts, prompt=INSTRUCTION) for texts in columns.values()], None).backward()
        torch.nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], 0.05)
        optimizer.step()
    start = dict(build(tiny_settings(**option), device="cpu").named_parameters())
    other = dict(plain.named_parameters())
    for name, parameter in fitted.named_parameters():
        assert torch.allclose(parameter, other[name], atol=2e-5), name
    assert any((p - start[name]).abs().max() > 1e-3 for name, p in fitted.named_parameters())


@pytest.mark.slow
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
        module.training_state = TrainingState(leaves)
        for texts, instruction in batches:
            columns = [model.preprocess(t, prompt=instruction) for t in (texts, texts[::-1], texts[1:] + texts[:1])]
            loss(columns, None).backward()
        if leaves is not None:
            assert all(p.grad is None for p in module.prompter.parameters())
            leaves.backward()
        found.append({n: p.grad.clone() for n, p in module.named_parameters() if p.requires_grad})
    module.training_state = TrainingState()
    for name, gradient in found[0].items():
        assert torch.allclose(gradient, found[1][name], atol=1e-5, rtol=1e-4), name
    assert max(float(g.abs().max()) for g in found[0].values()) > 1e-3


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"loss": "cached_infonce", "mini_batch_size": 2}])
def test_the_cache_changes_nothing_but_the_cost(run_config, tmp_path, changes):
    """The same weights with it on as off; later epochs read no text again."""
    found = []
    for on in (False, True):
        more = {"text_state_cache": "1MiB", "text_state_folder": str(tmp_path / "states")} if on else {}
        config = run_config(f"run-{on}", max_steps=24, arguments={"save_steps": 24}, **changes, **more)
        result = train(config)
        found.append({n: p for n, p in result.model.named_parameters() if p.requires_grad})
        assert result.model[0].training_state == TrainingState()
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
