"""What the prompter writes, read as words."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch

import promptembedder
from conftest import FIRST_QUICK, INSTRUCTION
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


@pytest.mark.parametrize("architecture", FIRST_QUICK)
@pytest.mark.parametrize(
    ("how", "dtype", "merged"), [("lora", "float32", True), ("lora", "bfloat16", False), ("full", "float32", False)]
)
def test_a_prompter_reopened_alone_writes_the_same(tiny_model, tmp_path, architecture, how, dtype, merged):
    """LoRA is merged into the weights where that loses no digits."""
    model = tiny_model(architecture, prompter_training=how, dtype=dtype)
    with torch.no_grad():
        for name, weight in model[0].prompter.lm.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.3)
    promptembedder.save(model, tmp_path / "model")
    prompter = reopen_prompter(read_saved(tmp_path / "model"))
    assert hasattr(prompter.lm, "peft_config") == (how == "lora" and not merged)
    with torch.no_grad():
        written = prompter(*prompter.tokenize([INSTRUCTION]))
        expected = model[0].soft_tokens(INSTRUCTION)
    torch.testing.assert_close(written.tokens_NKP, expected.tokens_NKP, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(written.weights_NKV, expected.weights_NKV, atol=1e-5, rtol=1e-5)
    found, wanted = readings_of(prompter, written), explain(model, INSTRUCTION)
    assert [[word for word, _ in one.words] for one in found] == [[word for word, _ in one.words] for one in wanted]
    config = tmp_path / "model" / "promptembedder.json"
    config.write_text(config.read_text().replace(model[0].base_models.prompter_fingerprint, "f" * 64))
    with pytest.raises(PromptEmbedderError, match=r"prompter .* has other weights"):
        reopen_prompter(read_saved(tmp_path / "model"))
