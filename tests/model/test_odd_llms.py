"""LLMs whose tokenizer or chat template is not made for them: they work, or one line says what is wrong."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from transformers import AutoTokenizer

import promptembedder
from conftest import INSTRUCTION, TEXTS
from promptembedder import ModelConfig, PromptEmbedderError
from promptembedder.llms.tokens import check_ids, without_embedding
from promptembedder.model.baselines import mean_pooling
from promptembedder.model.vocabulary import shared_vocabulary
from promptembedder.transfer.closed_forms import closed_forms

NO_ROW = "<|image|>"


@pytest.fixture
def odd(tiny_lm, tmp_path):
    """Build a model on a copy of a tiny LLM whose tokenizer is changed first."""

    def build(change, **options):
        folder = shutil.copytree(tiny_lm(), tmp_path / "lm", dirs_exist_ok=True)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        change(tokenizer)
        tokenizer.save_pretrained(folder)
        places = {"prompter": str(folder), "backbone": str(folder), "dtype": "float32", "lora_rank": 4}
        return promptembedder.build(ModelConfig(**{**places, **options}), device="cpu")

    return build


def test_a_pad_token_without_an_embedding_is_never_read(odd, tiny_model):
    model = odd(lambda tokenizer: tokenizer.add_special_tokens({"pad_token": "[PAD]"}))
    assert model.tokenizer.pad_token_id == 320
    expected = odd(lambda tokenizer: None)
    np.testing.assert_allclose(model.encode(TEXTS), expected.encode(TEXTS), atol=1e-6)
    assert np.isfinite(mean_pooling(model[0], TEXTS)).all()
    # Instructions of different lengths are padded, too.
    both = ["Short.", INSTRUCTION]
    ids, _ = model[0].prompter.tokenize(both)
    assert int(ids.max()) < 320


@pytest.mark.parametrize("layout", ["suffix", "prefix"])
def test_a_token_without_an_embedding_is_refused_before_any_text_is_read(odd, layout, monkeypatch):
    model = odd(lambda tokenizer: tokenizer.add_tokens([NO_ROW]), layout=layout)
    assert np.isfinite(model.encode(TEXTS)).all()
    with pytest.raises(PromptEmbedderError, match=r"a text holds the token '<\|image\|>', which the LLM"):
        model.encode([*TEXTS, f"See {NO_ROW}."])
    with pytest.raises(PromptEmbedderError, match="an instruction for the prompter holds the token"):
        model.encode(TEXTS, prompt=f"Find {NO_ROW}")
    monkeypatch.setattr(type(model[0]), "embed", lambda *a: pytest.fail("read"))
    with pytest.raises(PromptEmbedderError, match="text 5 holds the token"):
        promptembedder.encode(model, [*TEXTS, f"See {NO_ROW}."])
    with pytest.raises(PromptEmbedderError, match="an instruction for the prompter holds the token"):
        promptembedder.encode(model, TEXTS, [INSTRUCTION, NO_ROW])


def test_so_it_is_in_the_template(odd):
    with pytest.raises(PromptEmbedderError, match="text_template holds the token"):
        odd(lambda tokenizer: tokenizer.add_tokens([NO_ROW]), text_template=NO_ROW + "{text}")


def test_words_without_an_embedding_do_not_start_an_alignment(odd, tiny_lm, tmp_path):
    """Two tokenizers may share an added word, for which one of the LLMs has no embedding."""
    folder = shutil.copytree(tiny_lm("llama", 48), tmp_path / "other")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["zzzz"])
    tokenizer.save_pretrained(folder)
    model = odd(lambda tokenizer: tokenizer.add_tokens(["zzzz"]), backbone=str(folder))
    assert np.isfinite(model.encode(TEXTS)).all()
    prompter, backbone = model[0].prompter.tokenizer, model.tokenizer
    everything, embedded = (shared_vocabulary(prompter, backbone, rows) for rows in (None, (320, 320)))
    assert len(everything[0]) == len(embedded[0]) + 1
    moved = odd(lambda tokenizer: tokenizer.add_tokens(["zzzz"]))
    assert closed_forms(moved[0], model[0], [INSTRUCTION])


def test_check_ids(tiny_model):
    tokenizer = tiny_model().tokenizer
    assert without_embedding(tokenizer, 320) == []
    assert set(without_embedding(tokenizer, 1)) == {"<|start|>", "<|unk|>"}
    check_ids(tokenizer, [], 0, "nothing")
    with pytest.raises(PromptEmbedderError, match=r"a word holds the token '<\|start\|>'"):
        check_ids(tokenizer, [0, 1], 1, "a word")


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('a system message is needed') }}", "TemplateError: a system message is needed"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{% for %}", "TemplateSyntaxError"),
    ],
)
def test_a_chat_template_that_fails(odd, template, reason):
    model = odd(lambda tokenizer: setattr(tokenizer, "chat_template", template))
    message = f"the chat template of the prompter takes no instruction: {reason}"
    for call in (
        lambda: model.encode(TEXTS),
        lambda: promptembedder.encode(model, TEXTS),
        lambda: promptembedder.explain(model, INSTRUCTION),
    ):
        with pytest.raises(PromptEmbedderError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
