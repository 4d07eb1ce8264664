"""The one exception type that means "the caller gave us something we cannot use"."""

from __future__ import annotations


class PromptEmbedderError(ValueError):
    """Bad input: a setting, a file, a text, a model. The message is one line: what, where, what is valid.

    The command line prints the message alone and exits with code 2. It is a `ValueError` so that library
    users need not know it.
    """
