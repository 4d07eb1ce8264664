"""What counts as a text and as an instruction."""

from __future__ import annotations

import numpy as np
import pytest

from promptembedder import PromptEmbedderError
from promptembedder.text import check_text, checked_texts, fill_blanks, instruction_or, listed


@pytest.mark.parametrize(
    "items", [["a", "b"], ("a", "b"), iter("ab"), {"a": 1, "b": 2}.keys(), np.array(["a", "b"]), map(str, ["a", "b"])]
)
def test_listed_takes_any_iterable(items):
    assert listed(items) == ["a", "b"]


@pytest.mark.parametrize("items", ["ab", b"ab", {"a": "b"}, 3, None, np.array("a"), np.array([["a"]])])
def test_listed_refuses_what_is_no_list_of_texts(items):
    with pytest.raises(PromptEmbedderError, match=r"^words: found .*, expected a list or another iterable of strings$"):
        listed(items, "words")


def test_errors_of_an_iterable_are_its_own():
    with pytest.raises(ZeroDivisionError):
        listed(1 / n for n in (1, 0))


def test_checked_texts_names_the_place():
    assert checked_texts(["a", " ", ""]) == ["a", " ", ""]
    with pytest.raises(PromptEmbedderError, match="text 2 is int 3, expected a string"):
        checked_texts(["a", "", 3])
    with pytest.raises(PromptEmbedderError, match="a text holds lone surrogates"):
        check_text("\ud800")


def test_fill_blanks_warns_once(caplog):
    assert fill_blanks(["a", "", "\n\t"], "Task") == ["a", ".", "."]
    assert fill_blanks(["a"]) == ["a"]
    assert [r.message for r in caplog.records] == ["Task: 2 of 3 texts are empty and read as '.', the first is text 1"]


@pytest.mark.parametrize("given", [None, "", " \n"])
def test_no_instruction_is_the_default(given):
    assert instruction_or(given, "default") == "default"
    assert instruction_or("mine", "default") == "mine"


@pytest.mark.parametrize("given", [0, [], "\udcff", b""])
def test_what_is_no_instruction(given):
    with pytest.raises(PromptEmbedderError, match=r"an instruction (is|holds)"):
        instruction_or(given, "default")
