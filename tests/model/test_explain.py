"""What the prompter writes, read as words."""

from __future__ import annotations

import math

import pytest

from conftest import INSTRUCTION
from promptembedder import PromptEmbedderError
from promptembedder.model.explain import explain


def test_explain_reads_the_mixture(tiny_model):
    model = tiny_model(num_soft_tokens=3)
    readings = explain(model, INSTRUCTION, top=4)
    weights = model[0].soft_tokens(INSTRUCTION).weights_NKV[0]
    assert len(readings) == 3
    for reading, row in zip(readings, weights.tolist(), strict=True):
        assert [w for _, w in reading.words] == pytest.approx(sorted(row, reverse=True)[:4])
        assert reading.entropy == pytest.approx(-sum(p * math.log(p) for p in row if p > 0), rel=1e-4)
    # Without an instruction, the model's own.
    model.prompts["query"] = INSTRUCTION
    assert explain(model, top=4) == explain(model, " ", top=4) == readings


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3,), "an instruction is int 3, expected a string"),
        ((["a"],), "an instruction is list, expected a string"),
        (("a\udc80",), "an instruction holds lone surrogates"),
        ((INSTRUCTION, 0), "top = 0, expected 1 to 320"),
        ((INSTRUCTION, "5"), "top = '5', expected 1 to 320"),
    ],
)
def test_bad_arguments(tiny_model, arguments, message):
    with pytest.raises(PromptEmbedderError, match=message):
        explain(tiny_model(), *arguments)
