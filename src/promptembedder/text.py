"""What counts as text."""

from __future__ import annotations


def is_unicode(text: str) -> bool:
    """Whether a string can be written as UTF-8; undecodable bytes of standard input and lone surrogates cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
