"""What counts as a text or an instruction, and what is read in place of a blank one."""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from promptembedder.errors import PromptEmbedderError

logger = logging.getLogger(__name__)

# Read in place of a blank text, such as an empty page or a document without title and body.
BLANK_READ_AS = "."


def is_unicode(text: str) -> bool:
    """Whether a string can be written as UTF-8; undecodable bytes of standard input and lone surrogates cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def composed(text: str) -> str:
    """The text in Unicode's composed form, NFC: an accented letter is one character, however it was typed.

    Tokenizers of most LLMs read the two forms of a letter as different tokens, and so as different texts.
    """
    return unicodedata.normalize("NFC", text)


def is_blank(text: str) -> bool:
    """Whether a string holds nothing but white space."""
    return not text.strip()


def listed(items: Iterable[Any], what: str = "texts") -> list[Any]:
    """Items in the order in which they come out of any iterable: a list, a column of a table, a generator, a set.

    A column is read by position, whatever labels its rows have.

    Args:
        items: the iterable.
        what: name of the items, for an error.

    Raises:
        PromptEmbedderError: one string, a mapping, a table of several columns, or nothing that can be iterated over.

    Example:
        >>> listed(word for word in ("one", "two"))
        ['one', 'two']
    """
    refused = isinstance(items, str | bytes | bytearray | Mapping) or getattr(items, "ndim", 1) != 1
    try:
        found = None if refused else iter(items)
    except TypeError:
        found = None
    if found is None:
        raise PromptEmbedderError(f"{what}: found {_shown(items)}, expected a list or another iterable of strings")
    return list(found)


def check_text(text: Any, name: str = "a text") -> None:
    """Refuse what is no text to embed; a blank one is.

    Args:
        text: anything.
        name: what to call it in the message.

    Raises:
        PromptEmbedderError: it is no string, or no valid Unicode.
    """
    if not isinstance(text, str):
        advice = "; encode takes a list of texts: list(texts)" if hasattr(text, "__iter__") else ""
        raise PromptEmbedderError(f"{name} is {_shown(text)}, expected a string{advice}")
    if not is_unicode(text):
        raise PromptEmbedderError(f"{name} holds lone surrogates, expected valid Unicode")


def checked_texts(texts: Iterable[Any]) -> list[str]:
    """Texts to embed, in their order, all of them checked.

    Raises:
        PromptEmbedderError: as in `listed` and `check_text`; the text is named by its place, from 0.
    """
    found = listed(texts)
    for n, text in enumerate(found):
        check_text(text, f"text {n}")
    return found


def fill_blanks(texts: Sequence[str], where: str = "") -> list[str]:
    """Put a full stop in place of blank texts, and warn of them once.

    Args:
        texts: strings.
        where: what the warning begins with, such as the name of a task.

    Example:
        >>> fill_blanks(["one", " "])
        ['one', '.']
    """
    blank = [n for n, text in enumerate(texts) if is_blank(text)]
    if blank:
        logger.warning(
            "%s%d of %d texts are empty and read as %r, the first is text %d",
            f"{where}: " if where else "",
            len(blank),
            len(texts),
            BLANK_READ_AS,
            blank[0],
        )
    return [BLANK_READ_AS if is_blank(text) else text for text in texts]


def instruction_or(given: Any, default: str) -> str:
    """An instruction, or the default where it is unset or blank.

    Raises:
        PromptEmbedderError: it is no string, or no valid Unicode.
    """
    if given is None:
        return default
    check_text(given, "an instruction")
    return default if is_blank(given) else given  # type: ignore[no-any-return]


def _shown(value: Any) -> str:
    """Type and, where that is short, value."""
    if isinstance(value, int | float | bytes):
        return f"{type(value).__name__} {value!r:.40}"
    return "None" if value is None else type(value).__name__
