"""Texts and instructions are read in Unicode's composed form, however an accented letter was typed."""

from __future__ import annotations

import unicodedata

import numpy as np
import pytest
import torch

import promptembedder
from promptembedder.text import composed

TEXT = "Caf\u00e9 cr\u00e8me in Z\u00fcrich, \u00c5lesund"
APART = unicodedata.normalize("NFD", TEXT)


def test_the_composed_form():
    assert APART != TEXT
    assert composed(APART) == composed(TEXT) == TEXT
    assert composed("\u212b") == "\u00c5"
    assert composed("plain \u4e2d\u6587 \ufb01") == "plain \u4e2d\u6587 \ufb01"  # compatibility forms stay


@pytest.mark.parametrize(("architecture", "layout"), [("llama", "suffix"), ("qwen2", "prefix"), ("gemma3", "suffix")])
def test_both_forms_give_one_embedding(tiny_model, architecture, layout):
    model = tiny_model(architecture, layout=layout)
    if architecture == "gemma3":
        model[0].prompter.tokenizer.chat_template = None
    one, other = (model[0].preprocess([text], prompt="Find.") for text in (TEXT, APART))
    assert torch.equal(one["input_ids"], other["input_ids"])
    assert torch.equal(*(model[0].prompter.tokenize([text])[0] for text in (TEXT, APART)))
    assert torch.equal(*(model[0].instruction_ids(text) for text in (TEXT, APART)))
    np.testing.assert_array_equal(*(model.encode([text], prompt=text) for text in (TEXT, APART)))
    np.testing.assert_array_equal(*(promptembedder.encode(model, [text], [text]) for text in (TEXT, APART)))
