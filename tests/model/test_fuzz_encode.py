"""Any text, any iterable, any instruction: embeddings as promised, or one line that says what is wrong.

`pytest tests/model/test_fuzz_encode.py --fuzz-examples 100000` tries more.
"""

from __future__ import annotations

import collections
import itertools

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

import promptembedder
from conftest import write_tiny_lm
from promptembedder import ModelConfig, PromptEmbedderError

WIDTH = 16
# Added to the tokenizers, not to the LLMs.
NO_ROW = "<|image|>"


class Labelled:
    """A column whose rows have labels, as pandas has them: `[]` looks up a label, `iter` goes by position."""

    def __init__(self, items):
        self.items = items

    def __getitem__(self, label):
        return self.items[(label + 1) % len(self.items)]

    def __len__(self):
        return len(self.items)

    def __iter__(self):
        return iter(self.items)


def as_array(items):
    array = np.empty(len(items), dtype=object)
    array[:] = items
    return array


BATCHES = {"list": list, "tuple": tuple, "array": as_array}
OTHERS = {
    "generator": lambda items: (item for item in items),
    "chain": lambda items: itertools.chain(items),
    "deque": collections.deque,
    "labelled": Labelled,
    "values": lambda items: dict(enumerate(items)).values(),
}
REFUSED = {
    "mapping": lambda items: dict(enumerate(items)),
    "table": lambda items: as_array(items)[None],
    "number": len,
    "nothing": lambda items: None,
}
WORDS = st.one_of(
    st.text(max_size=12),
    st.text(st.characters(exclude_categories=()), max_size=12),
    st.sampled_from(["", " ", "\n\t", "a b c", "\x00", "\u200b", "\ufeff", "e\u0301", "\U0001f600" * 30, "word " * 80]),
    st.sampled_from(
        ["<|end|>", "<|start|>assistant", "<bos>", "<0x0A>", "▁", NO_ROW, f"x{NO_ROW}y", "\ud800", "a\udcff"]
    ),
    st.sampled_from(["http://[", "https://youtube.com", "data:image/png;base64,", "{{ x }}", "{% raise %}", "{text}"]),
    st.text(max_size=8).map(np.str_),
)
NO_STRINGS = st.one_of(st.none(), st.integers(), st.floats(), st.booleans(), st.binary(max_size=3))
NO_STRINGS |= st.sampled_from([("a", "b"), ["a"], np.float32(1), ()])
ITEMS = st.lists(WORDS, max_size=4) | st.lists(WORDS | NO_STRINGS, max_size=3)
KINDS = st.sampled_from([*BATCHES, *BATCHES, *OTHERS, *REFUSED, "one"])
WAYS = st.sampled_from(["encode", "encode_query", "encode_document", "package", "package, several", "explain"])


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Both layouts, with a tokenizer of either kind; as small as they get."""
    made = []
    for architecture, layout in (("llama", "suffix"), ("gemma3", "prefix")):
        folder = write_tiny_lm(tmp_path_factory.mktemp("fuzz") / architecture, architecture, WIDTH)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.add_tokens([NO_ROW])
        tokenizer.save_pretrained(folder)
        places = {"prompter": str(folder), "backbone": str(folder), "dtype": "float32", "lora_rank": 1}
        limits = {"num_soft_tokens": 1, "max_text_tokens": 24, "max_instruction_tokens": 24}
        template = "{text}" if layout == "prefix" else "{text}\nThe"
        config = ModelConfig(layout=layout, text_template=template, **places, **limits)
        made.append(promptembedder.build(config, device="cpu"))
    return made


def is_text(value):
    return isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value) and NO_ROW not in value


def is_instruction(value):
    return value is None or is_text(value)


def check(embeddings, texts, alone):
    """Finite vectors of length 1, one a text, in the order of the texts."""
    assert embeddings.shape == (len(texts), WIDTH)
    assert np.isfinite(embeddings).all()
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=-1), 1, atol=1e-4)
    if len(texts) > 1:
        np.testing.assert_allclose(embeddings[-1], alone(texts[-1]), atol=1e-3)


def is_refused(call, valid):
    """Whether a call refuses its arguments, which must be wrong; nothing else may be raised."""
    if valid:
        call()
        return False
    with pytest.raises(PromptEmbedderError) as caught:
        call()
    assert str(caught.value)
    assert "\n" not in str(caught.value)
    return True


def test_any_texts_any_iterable_any_instruction(models, request):
    @settings(
        max_examples=request.config.getoption("--fuzz-examples"),
        deadline=None,
        database=None,
        derandomize=request.config.getoption("--fuzz-examples") <= 300,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.booleans(), WAYS, KINDS, ITEMS, st.none() | WORDS | NO_STRINGS, st.lists(WORDS | NO_STRINGS, max_size=2))
    def run(prefix, way, kind, items, instruction, several):
        one_call(models[prefix], way, kind, items, instruction, several)

    run()


def one_call(model, way, kind, items, instruction, several):
    """Make one call and compare what comes of it with what its arguments allow."""
    if way == "explain":
        is_refused(lambda: promptembedder.explain(model, instruction, top=1), is_instruction(instruction))
        return
    passed = {**BATCHES, **OTHERS, **REFUSED}.get(kind, lambda items: items[0] if items else "")(items)
    one = kind == "one" and not isinstance(passed, list | tuple)
    items = list(passed) if kind == "one" and not one else [passed] if one else items
    wanted = several if way == "package, several" else instruction
    valid = all(map(is_text, items)) and kind not in REFUSED
    (by_package if way.startswith("package") else by_library)(model, way, kind, one, passed, items, wanted, valid)


def by_package(model, way, kind, one, passed, items, wanted, valid):
    many = isinstance(wanted, list | tuple)
    named = list(wanted) if many else [wanted]
    valid = valid and not one and all(map(is_instruction, named))
    found = []
    if is_refused(lambda: found.append(promptembedder.encode(model, passed, wanted)), valid):
        return
    rows = found[0] if many else found
    assert len(rows) == len(named)
    for row, name in zip(rows, named, strict=True):
        check(row, items, lambda text, name=name: promptembedder.encode(model, [text], name)[0])


def by_library(model, way, kind, one, passed, items, wanted, valid):
    encode, found = getattr(model, way), []
    if not one and not items and kind not in REFUSED and kind not in OTHERS:
        encode(passed, prompt=wanted)  # nothing is read, so nothing is checked
        return
    # The library takes an iterable that it does not know for one text.
    valid = valid and is_instruction(wanted) and kind not in OTHERS
    if is_refused(lambda: found.append(encode(passed, prompt=wanted)), valid):
        return
    check(found[0][None] if one else found[0], items, lambda text: encode([text], prompt=wanted)[0])
