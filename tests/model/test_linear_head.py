"""Options that are trained with the alignment: trained, saved and opened."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from conftest import INSTRUCTION, TEXTS
from promptembedder import build, load
from promptembedder.training.train import train


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "bfloat16 without instructions for it"])
@pytest.mark.parametrize(
    "option",
    [
        {"deep_rank": 3},
        {"linear_head": True},
    ],
)
def test_trained_saved_and_opened(run_config, tmp_path, monkeypatch, option, dtype):
    dtype, _, without = dtype.partition(" ")
    monkeypatch.setattr("promptembedder.llms.widened.cpu_has_bfloat16", lambda: not without)
    option = option | {"dtype": dtype}
    config = run_config(model=option, prompter_learning_rate=1e-2, alignment_learning_rate=1e-2)
    before = build(config.model, seed=config.training.seed)
    result = train(config)
    if "deep_rank" in option:
        assert (result.model[0].alignment.deep_out != 0).any(-1).any(-1).all()  # every layer's
    if "linear_head" in option:
        head = result.model[1].linear.weight
        assert not torch.equal(head, before[1].linear.weight)
        assert torch.equal(load(result.folder)[1].linear.weight, head)  # to the last digit, whatever the LLMs run in
    assert not torch.equal(result.model[0].alignment.weight, before[0].alignment.weight)
    expected = result.model.encode(TEXTS, prompt=INSTRUCTION)
    assert np.allclose(np.linalg.norm(expected, axis=-1), 1, atol=1e-5)
    assert np.allclose(load(result.folder).encode(TEXTS, prompt=INSTRUCTION), expected, atol=1e-5)
