"""What the prompter writes, read as words."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch

import promptembedder
from conftest import INSTRUCTION
from promptembedder import PromptEmbedderError
from promptembedder.model.explain import explain, readings_of
from promptembedder.model.folder import read_saved
from promptembedder.model.reopen import reopen_prompter


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


@pytest.mark.slow
def test_the_command_needs_no_sentence_transformers():
    """Whose import takes longer than all that the command does."""
    code = "import sys, promptembedder.cli.explain, promptembedder.model.explain, promptembedder.model.reopen; "
    code += "sys.exit('sentence_transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("how", ["lora", "full"])
def test_a_prompter_reopened_alone_writes_the_same(tiny_model, tmp_path, how):
    model = tiny_model(prompter_training=how)
    promptembedder.save(model, tmp_path / "model")
    prompter = reopen_prompter(read_saved(tmp_path / "model"))
    with torch.no_grad():
        written = prompter(*prompter.tokenize([INSTRUCTION]))
    assert readings_of(prompter, written) == explain(model, INSTRUCTION)
    config = tmp_path / "model" / "promptembedder.json"
    config.write_text(config.read_text().replace(model[0].base_models.prompter_fingerprint, "f" * 64))
    with pytest.raises(PromptEmbedderError, match=r"prompter .* has other weights"):
        reopen_prompter(read_saved(tmp_path / "model"))
