"""Made-up instructions and the aspects that they name."""

from __future__ import annotations

import itertools

from promptembedder.data.aspects import ASPECTS, MEANING, VALUES, made_up_instructions


def test_made_up_instructions_name_their_aspect():
    drawn = list(itertools.islice(made_up_instructions(ASPECTS, seed=1), 400))
    about = [(text, aspect) for text, aspect in drawn if aspect != MEANING]
    assert 250 < len(about) < 350
    by_values = [(text, aspect) for text, aspect in about if aspect not in text]
    assert 20 < len(by_values) < 60
    for text, aspect in by_values:
        assert VALUES[text.split(" is ", 1)[1].removesuffix(".")] == aspect
    assert set(VALUES.values()) <= set(ASPECTS)
    assert len({text for text, _ in drawn}) > 300
    assert not any("{" in text for text, _ in drawn)


def test_made_up_instructions_keep_to_the_aspects_given():
    some = ["topic", "tone"]  # a vocabulary may split the others
    drawn = list(itertools.islice(made_up_instructions(some, seed=1), 300))
    assert {aspect for _, aspect in drawn} == {*some, MEANING}
    assert any(" is insulting" in text for text, _ in drawn)
    assert {aspect for _, aspect in itertools.islice(made_up_instructions(["topic", "task"], seed=1), 300)} == {
        *("topic", "task"),
        MEANING,
    }
