"""Learning rates: a step of W is as long in the words of every backbone."""

from __future__ import annotations

import math

import pytest
import torch

from promptembedder import build
from promptembedder.training import rates
from promptembedder.training.train import train


@pytest.mark.parametrize(("prompter", "backbone"), [(1.0, 8.0), (4.0, 1.0), (1.0, 1.0)])
def test_rate_factor_makes_a_step_as_long_in_the_backbones_words(prompter, backbone):
    """Adam's first step moves every number of W by the rate; what that does to a soft prompt is measured here."""
    words_SP, words_SD = prompter * torch.randn(300, 576), backbone * torch.randn(300, 64)

    def reach(first_SP, second_SD):
        step_PD = rates.rate_factor(first_SP, second_SD) * torch.sign(first_SP[:1].T) * torch.ones(1, 64)
        return float((first_SP[:1] @ step_PD).abs().mean() / second_SD.square().mean().sqrt())

    # SmolLM2-135M's words: 576 numbers with an absolute mean of 0.089 and an rms of 0.126, heavier tails than these.
    like_smollm2 = 429.0
    assert 2**-0.6 < reach(words_SP, words_SD) / like_smollm2 < 2**0.6
    assert math.log2(rates.rate_factor(words_SP, words_SD)).is_integer()


@pytest.mark.slow
def test_all_but_the_prompter_learn_at_the_alignments_rate(run_config):
    option = {"deep_rank": 3, "linear_head": True}
    config = run_config(model=option, prompter_learning_rate=1e-5, alignment_learning_rate=1e-2, max_steps=1, warmup=0)
    before = dict(build(config.model, seed=config.training.seed).named_parameters())
    after = dict(train(config).model.named_parameters())
    # The first step of Adam moves every weight by its rate, however large the gradient.
    moved = {name: float((after[name] - before[name]).detach().abs().max()) for name in after}
    rates = {name: rate for name, rate in moved.items() if rate}
    fast = {"0.alignment.weight", "0.alignment.deep_out", "1.linear.weight"}  # `deep_in` has no gradient yet
    assert {name for name, rate in rates.items() if rate > 5e-3} == fast
    slow = [rate for name, rate in rates.items() if name not in fast]
    assert slow
    assert max(slow) < 2e-5


@pytest.mark.slow
def test_only_the_alignments_rate_is_scaled_by_the_words(run_config, monkeypatch, caplog):
    monkeypatch.setattr(rates, "rate_factor", lambda *_: 4.0)
    option = {"deep_rank": 3, "linear_head": True}
    config = run_config(model=option, alignment_learning_rate=1e-3, max_steps=1, warmup=0)
    before = dict(build(config.model, seed=config.training.seed).named_parameters())
    with caplog.at_level("INFO"):
        after = dict(train(config).model.named_parameters())
    moved = {name: float((after[name] - before[name]).detach().abs().max()) for name in after}
    assert moved["0.alignment.weight"] == pytest.approx(4e-3, rel=0.05)
    assert moved["0.alignment.deep_out"] == pytest.approx(4e-3, rel=0.05)
    assert moved["1.linear.weight"] == pytest.approx(1e-3, rel=0.05)
    assert "learning rate of W: 0.001 x 4" in caplog.text
