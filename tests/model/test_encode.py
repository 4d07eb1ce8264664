"""Embedding texts: plain sentence-transformers, several instructions at once, limits and bad texts."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

import promptembedder
from conftest import INSTRUCTION, TEXTS
from promptembedder import PromptEmbedderError


def test_encode_is_plain_sentence_transformers(tiny_model):
    model = tiny_model()
    by_prompt = model.encode(TEXTS, prompt=INSTRUCTION)
    assert by_prompt.shape == (len(TEXTS), 32)
    assert np.allclose(np.linalg.norm(by_prompt, axis=1), 1, atol=1e-5)
    model.prompts["same"] = INSTRUCTION
    assert np.array_equal(by_prompt, model.encode(TEXTS, prompt_name="same"))
    assert not np.allclose(by_prompt, model.encode(TEXTS, prompt="Find the topic."), atol=1e-3)
    # Order is kept although batches are sorted by length, and batch size does not matter.
    assert np.allclose(by_prompt, model.encode(TEXTS, prompt=INSTRUCTION, batch_size=2), atol=1e-5)
    assert np.allclose(by_prompt[::-1], model.encode(TEXTS[::-1], prompt=INSTRUCTION), atol=1e-5)


def test_encode_truncated_and_quantised(tiny_model):
    model = tiny_model()
    whole = model.encode(TEXTS, prompt=INSTRUCTION)
    assert np.array_equal(model.encode(TEXTS, prompt=INSTRUCTION, truncate_dim=8), whole[:, :8])
    small = model.encode(TEXTS, prompt=INSTRUCTION, precision="int8")
    assert small.dtype == np.int8
    assert small.shape == whole.shape


def test_defaults_for_queries_and_documents(tiny_model):
    model = tiny_model(default_instruction="Find answers.", document_instruction="Be found.")
    assert np.array_equal(model.encode(TEXTS), model.encode(TEXTS, prompt="Find answers."))
    assert np.array_equal(model.encode_query(TEXTS), model.encode(TEXTS, prompt="Find answers."))
    assert np.array_equal(model.encode_document(TEXTS), model.encode(TEXTS, prompt="Be found."))
    # Programs that wrap the library know prompts by these two names.
    assert np.array_equal(model.encode(TEXTS, prompt_name="document"), model.encode(TEXTS, prompt="Be found."))
    assert np.array_equal(model.encode(TEXTS, prompt_name="query"), model.encode(TEXTS, prompt="Find answers."))
    # So they do in a plain SentenceTransformer of the saved modules, even where no prompts were saved.
    plain = SentenceTransformer(modules=list(model), prompts={"query": "", "document": ""}, device="cpu")
    assert np.array_equal(plain.encode(TEXTS, prompt_name="document"), model.encode_document(TEXTS))
    given = model.encode_document(TEXTS, prompt=INSTRUCTION)
    assert np.array_equal(given, model.encode(TEXTS, prompt=INSTRUCTION))


@pytest.mark.parametrize("layout", ["prefix", "suffix"])
def test_several_instructions_at_once(tiny_model, layout):
    model = tiny_model(layout=layout)
    instructions = [INSTRUCTION, "Find the topic."]
    several = promptembedder.encode(model, TEXTS, instructions, batch_size=2)
    assert several.shape == (2, len(TEXTS), 32)
    for n, instruction in enumerate(instructions):
        assert np.allclose(several[n], model.encode(TEXTS, prompt=instruction), atol=1e-5)
    assert np.allclose(promptembedder.encode(model, TEXTS, INSTRUCTION), several[0], atol=1e-5)


def test_empty_list_keeps_the_width(tiny_model):
    model = tiny_model()
    assert promptembedder.encode(model, []).shape == (0, 32)
    assert promptembedder.encode(model, [], [INSTRUCTION, "x"]).shape == (2, 0, 32)


def test_without_an_instruction_the_models_default_prompt_counts(tiny_model):
    model = tiny_model(default_instruction="Find answers.")
    assert np.allclose(promptembedder.encode(model, TEXTS), model.encode(TEXTS, prompt="Find answers."), atol=1e-5)
    model.prompts["mine"], model.default_prompt_name = INSTRUCTION, "mine"
    assert np.allclose(promptembedder.encode(model, TEXTS), model.encode(TEXTS), atol=1e-5)
    assert np.allclose(promptembedder.encode(model, TEXTS), model.encode(TEXTS, prompt=INSTRUCTION), atol=1e-5)


@pytest.mark.parametrize(
    ("texts", "message"),
    [([""], "text 0 is empty"), ([" \n"], "text 0 is empty"), ([3], "text 0 is int, expected a string")],
)
def test_bad_texts(tiny_model, texts, message):
    with pytest.raises(PromptEmbedderError, match=message):
        promptembedder.encode(tiny_model(), texts)


def test_a_bad_text_is_told_by_its_place_before_any_is_read(tiny_model, monkeypatch):
    model = tiny_model()
    monkeypatch.setattr(type(model[0].backbone), "read_text", lambda *a: pytest.fail("read"))
    with pytest.raises(PromptEmbedderError, match="text 7 is empty"):
        promptembedder.encode(model, [*TEXTS[:1] * 7, "", *TEXTS], batch_size=2)
    with pytest.raises(PromptEmbedderError, match="takes a list of texts"):
        promptembedder.encode(model, "a text")
    with pytest.raises(PromptEmbedderError, match="batches of at least one"):
        promptembedder.encode(model, TEXTS, batch_size=0)


def test_unknown_argument_is_refused(tiny_model):
    with pytest.raises(ValueError, match="instructon"):
        tiny_model().encode(TEXTS, instructon="misspelt")
    with pytest.raises(PromptEmbedderError, match=r"processing_kwargs are not taken; model.max_seq_length"):
        tiny_model().encode(TEXTS, processing_kwargs={"text": {"max_length": 3}})


def test_long_text_is_cut_and_said_once(tiny_model, caplog):
    model = tiny_model(max_text_tokens=6, text_template="{text}")
    long = "one two three four five six seven eight nine ten eleven twelve"
    first = model.encode([long])
    again = model.encode([long + " thirteen"])
    assert np.allclose(first, again, atol=1e-6)
    assert len([r for r in caplog.records if "is truncated to max_text_tokens = 6" in r.message]) == 1


@pytest.mark.parametrize("cast", ["half", "bfloat16"])
def test_a_model_may_be_cast_as_a_whole(tiny_model, cast):
    model = tiny_model(linear_head=True, deep_rank=3)
    expected = promptembedder.encode(model, TEXTS, INSTRUCTION)
    getattr(model, cast)()
    for found in (promptembedder.encode(model, TEXTS, INSTRUCTION), model.encode(TEXTS, prompt=INSTRUCTION)):
        assert ((found.astype(np.float32) * expected).sum(-1) > 0.99).all()


def test_threads_do_not_hear_each_other(tiny_model):
    """A deep soft prompt hangs on layers that all threads share."""
    model = tiny_model(deep_rank=3)
    asked = ["One thing.", "Quite another thing, in more words."]
    expected = [promptembedder.encode(model, TEXTS, instruction) for instruction in asked]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda n: promptembedder.encode(model, TEXTS, asked[n % 2]), range(40)))
    finally:
        sys.setswitchinterval(before)
    for n, embeddings in enumerate(found):
        assert np.allclose(embeddings, expected[n % 2], atol=1e-6)


@pytest.mark.slow
def test_multi_process_encoding(tiny_model):
    model = tiny_model()
    pool = model.start_multi_process_pool(["cpu", "cpu"])
    try:
        spread = model.encode(TEXTS * 4, prompt=INSTRUCTION, pool=pool, chunk_size=5)
    finally:
        model.stop_multi_process_pool(pool)
    assert np.allclose(spread, model.encode(TEXTS * 4, prompt=INSTRUCTION), atol=1e-5)
