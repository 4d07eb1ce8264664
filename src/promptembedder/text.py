"""What counts as text, and what tokenizers make of it by themselves."""

from __future__ import annotations

import unicodedata
from typing import Any

from promptembedder.errors import PromptEmbedderError


def is_unicode(text: str) -> bool:
    """Whether a string can be written as UTF-8; undecodable bytes of standard input and lone surrogates cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def composed(text: str) -> str:
    """The text in Unicode's composed form, NFC: an accented letter is one character, however it was typed.

    Tokenizers of most LLMs read the two forms of a letter as other tokens, and so as another text.
    """
    return unicodedata.normalize("NFC", text)


def check_text(text: Any, n: int) -> None:
    """Refuse what is no text to embed; `n`: its place, to be said.

    Raises:
        PromptEmbedderError: it is empty or no string.
    """
    if not isinstance(text, str):
        raise PromptEmbedderError(f"text {n} is {type(text).__name__}, expected a string")
    if not text.strip():
        raise PromptEmbedderError(f"text {n} is empty, expected at least one word")
    if not is_unicode(text):
        raise PromptEmbedderError(f"text {n} holds lone surrogates, expected valid Unicode")
