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
from promptembedder.model.baselines import hard_cue, mean_pooling


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


class Column:
    """Rows with labels, as a shuffled pandas Series: `[]` looks up a label, `iter` goes by position."""

    def __init__(self, rows):
        self.rows = dict(enumerate(rows))
        self.order = list(reversed(self.rows))

    def __getitem__(self, label):
        return self.rows[label]

    def __len__(self):
        return len(self.rows)

    def __iter__(self):
        return (self.rows[label] for label in self.order)


ITERABLES = {
    "column": lambda texts: Column(texts[::-1]),
    "gaps": lambda texts: (lambda column: (column.rows.pop(2) and column.order.remove(2)) or column)(
        Column([*texts[:2:-1], "left out", *texts[2::-1]])
    ),
    "generator": lambda texts: (text for text in texts),
    "set": lambda texts: dict.fromkeys(texts).keys(),
    "array": np.array,
}


@pytest.mark.parametrize("kind", ITERABLES)
def test_any_iterable_is_read_by_position(tiny_model, kind):
    model = tiny_model()
    expected = promptembedder.encode(model, TEXTS, [INSTRUCTION, "Find the topic."])
    made = ITERABLES[kind]
    found = promptembedder.encode(model, made(TEXTS), made([INSTRUCTION, "Find the topic.", "x", "y", "z"]))
    np.testing.assert_allclose(found[:2], expected, atol=1e-6)
    np.testing.assert_array_equal(mean_pooling(model[0], made(TEXTS)), mean_pooling(model[0], TEXTS))
    np.testing.assert_array_equal(hard_cue(model[0], made(TEXTS)), hard_cue(model[0], TEXTS))


def test_the_library_takes_lists_and_others_are_refused(tiny_model):
    """`SentenceTransformer.encode` takes an iterable that it does not know for one text."""
    model = tiny_model()
    for texts in (Column(TEXTS), (text for text in TEXTS), set(TEXTS)):
        with pytest.raises(PromptEmbedderError, match=r"a string; encode takes a list of texts: list\(texts\)"):
            model.encode(texts)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([3], "text 0 is int 3, expected a string"),
        (["a", None], "text 1 is None, expected a string"),
        (["a", float("nan")], "text 1 is float nan, expected a string"),
        (["a", "b\ud800"], "text 1 holds lone surrogates"),
        ("a text", "texts: found str, expected a list or another iterable of strings"),
        (None, "texts: found None, expected a list"),
        ({"id": "a"}, "texts: found dict, expected a list"),
        (np.array([["a", "b"]]), "texts: found ndarray, expected a list"),
    ],
)
def test_bad_texts(tiny_model, texts, message):
    with pytest.raises(PromptEmbedderError, match=message):
        promptembedder.encode(tiny_model(), texts)


def test_bad_arguments_are_named_before_any_text_is_read(tiny_model, monkeypatch):
    model = tiny_model()
    module = type(model[0])
    monkeypatch.setattr(type(model[0].backbone), "read_text", lambda *a: pytest.fail("read"))
    monkeypatch.setattr(module, "soft_tokens", lambda *a: pytest.fail("read"))
    with pytest.raises(PromptEmbedderError, match="text 7 is int"):
        promptembedder.encode(model, [*TEXTS[:1] * 7, 7, *TEXTS], batch_size=2)
    for instructions, message in (
        ([INSTRUCTION, 3], "an instruction is int 3, expected a string"),
        (3, "instructions: found int 3, expected a list"),
        ("a\udcff", "an instruction holds lone surrogates"),
    ):
        with pytest.raises(PromptEmbedderError, match=message):
            promptembedder.encode(model, TEXTS, instructions)
    for size in (0, 2.5, "2", None):
        with pytest.raises(PromptEmbedderError, match="expected a number of texts, 1 or more"):
            promptembedder.encode(model, TEXTS, batch_size=size)
    model.prompts["query"] = 3
    with pytest.raises(PromptEmbedderError, match="an instruction is int 3"):
        promptembedder.encode(model, TEXTS)


@pytest.mark.parametrize("instruction", [3, 0, [], ["a"], b"a", "a\udcff"])
def test_a_prompt_that_is_no_instruction(tiny_model, instruction):
    model = tiny_model()
    for encode in (model.encode, model.encode_query, model.encode_document):
        with pytest.raises(PromptEmbedderError, match=r"an instruction (is|holds)"):
            encode(TEXTS, prompt=instruction)


@pytest.mark.parametrize("options", [{}, {"layout": "prefix", "text_template": "{text}"}])
def test_blank_texts_are_read_as_a_full_stop(tiny_model, options, caplog):
    """Topic models pad with empty strings; a page may be blank."""
    model = tiny_model(**options)
    texts = [TEXTS[0], "", *TEXTS[1:], " \n"]
    expected = model.encode([text.strip() or "." for text in texts], prompt=INSTRUCTION)
    for way in (model.encode, model.encode_query, model.encode_document):
        np.testing.assert_array_equal(way(texts, prompt=INSTRUCTION, batch_size=32), expected)
    assert [r.message for r in caplog.records if "empty" in r.message] == ["an empty text is read as '.' (warned once)"]
    caplog.clear()
    np.testing.assert_allclose(promptembedder.encode(model, texts, INSTRUCTION, batch_size=2), expected, atol=1e-5)
    told = [r.message for r in caplog.records if "empty" in r.message]
    assert told == ["2 of 7 texts are empty and read as '.', the first is text 1"]
    assert np.isfinite(mean_pooling(model[0], texts)).all()
    assert np.isfinite(hard_cue(model[0], texts)).all()


def test_unknown_argument_is_refused(tiny_model):
    with pytest.raises(ValueError, match="instructon"):
        tiny_model().encode(TEXTS, instructon="misspelt")
    with pytest.raises(PromptEmbedderError, match=r"processing_kwargs are not taken; model.max_seq_length"):
        tiny_model().encode(TEXTS, processing_kwargs={"text": {"max_length": 3}})
    with pytest.raises(PromptEmbedderError, match="task 'documents' is unknown, expected 'query' or 'document'"):
        tiny_model().encode(TEXTS, task="documents")


@pytest.mark.parametrize("wanted", ["token_embeddings", "pooled"])
def test_an_output_that_a_model_does_not_have(tiny_model, wanted):
    model = tiny_model(linear_head=True)
    with pytest.raises(PromptEmbedderError, match=f"a model gives no '{wanted}', only .*sentence_embedding"):
        model.encode(TEXTS, output_value=wanted)
    (first, *_) = model.encode(TEXTS, output_value=None)
    assert {"sentence_embedding", "instruction", "input_ids", "attention_mask"} == set(first)


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
