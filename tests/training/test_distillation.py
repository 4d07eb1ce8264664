"""Distillation: the loss beside a naive sum, the teacher truncated as the student."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from conftest import INSTRUCTION, TEXTS
from promptembedder.training.distillation import SimilarityDistillation
from promptembedder.training.teacher import distillation_rows


def test_the_old_model_reads_as_much_of_a_text_as_the_new_one(tiny_model):
    model = tiny_model("llama", text_template="{text}")
    longest = max(TEXTS, key=len)
    first = model.tokenizer.decode(model.tokenizer(longest, add_special_tokens=False)["input_ids"][:1])
    (rows,) = distillation_rows(model, [longest], [INSTRUCTION], 1).datasets.values()
    (expected,) = model.encode([first], prompt=INSTRUCTION)
    assert np.allclose(rows["label"][0], expected, atol=1e-5)
    assert not np.allclose(rows["label"][0], model.encode([longest], prompt=INSTRUCTION)[0], atol=1e-3)


def test_distillation_loss_equals_a_naive_sum():
    student, teacher = torch.randn(4, 6, requires_grad=True), torch.randn(4, 3)
    unit = torch.nn.functional.normalize
    loss = SimilarityDistillation(lambda features: {"sentence_embedding": unit(features["x"], dim=-1)}, 0.1)
    found = loss([{"x": student}], teacher)
    S, T = unit(student, dim=-1).detach().double().numpy(), unit(teacher, dim=-1).double().numpy()
    naive = 0.0
    for i in range(4):
        others = [j for j in range(4) if j != i]
        p, q = (np.exp(np.array([X[i] @ X[j] / 0.1 for j in others])) for X in (T, S))
        p, q = p / p.sum(), q / q.sum()
        naive += float((p * np.log(p / q)).sum()) / 4
    assert found.item() == pytest.approx(naive, rel=1e-4)
    found.backward()
    assert torch.isfinite(student.grad).all()
