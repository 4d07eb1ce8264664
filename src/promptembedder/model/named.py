"""Instructions by name, as exports, servers and corpora have them."""

from __future__ import annotations

import re
from collections.abc import Mapping

from promptembedder.errors import PromptEmbedderError
from promptembedder.text import is_blank, is_unicode

# Rows of a vocabulary can be called by their name, so it is usable as a token.
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")
_LONGEST_NAME = 64


def check_named(instructions: Mapping[str, str]) -> None:
    """Refuse names that are no tokens, and instructions that are no sentences or given twice.

    Raises:
        PromptEmbedderError: one is.
    """
    if not isinstance(instructions, Mapping):
        raise PromptEmbedderError(f"instructions must be a mapping of names to sentences, found {instructions!r:.40}")
    seen: dict[str, str] = {}
    for name, text in instructions.items():
        if not isinstance(name, str) or not _NAME.fullmatch(name) or len(name) > _LONGEST_NAME:
            raise PromptEmbedderError(
                f"name {name!r} of an instruction: use lower-case letters, digits, - and _, such as 'query', "
                f"at most {_LONGEST_NAME}"
            )
        if not isinstance(text, str) or is_blank(text) or not is_unicode(text):
            raise PromptEmbedderError(f"instruction {name!r} must be a sentence of valid Unicode, found {text!r:.40}")
        if text in seen:
            raise PromptEmbedderError(f"instructions {seen[text]!r} and {name!r} are the same")
        seen[text] = name
    check_words(instructions)


def check_words(instructions: Mapping[str, str]) -> None:
    """Refuse words of an instruction that are another's name: either may be asked for.

    Raises:
        PromptEmbedderError: there are some.
    """
    for name, text in instructions.items():
        if text in instructions:
            raise PromptEmbedderError(f"{text!r} is the name of an instruction and the words of instruction {name!r}")
