"""Exceptions that mean "the caller gave us something we cannot use"."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class PromptEmbedderError(ValueError):
    """Bad input: a setting, a file, a text, a model. The message is one line: what, where, what is valid.

    The command line prints the message alone and exits with code 2. It is a `ValueError` so that library
    users need not know it.
    """


class MissingExtraError(PromptEmbedderError, ImportError):
    """A package of an extra is not installed; the message names the command that installs the extra."""


# Characters of a value in a message.
_MOST = 500
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 100


def shown(value: Any) -> str:
    """A value for an error message: on one line, and short whatever its size."""
    try:
        short = " ".join(_SHORT.repr(value).split())
    except ValueError:  # an integer of more digits than Python prints
        return f"a value of type {type(value).__name__}"
    return short if len(short) <= _MOST else f"{short[:_MOST]}..."


@contextmanager
def needs_extra(extra: str, what: str) -> Iterator[None]:
    """Name the extra to install where an import in the block fails.

    Args:
        extra: name of the extra in `pyproject.toml`.
        what: what needs the extra, the first words of the message.

    Raises:
        MissingExtraError: a third-party package is not installed.

    Example:
        >>> with needs_extra("train", "training"):
        ...     import no_such_package
        Traceback (most recent call last):
        ...
        promptembedder.errors.MissingExtraError: training needs no_such_package, which is not installed: \
pip install 'promptembedder[train]'
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "a package").partition(".")[0]
        if package == __name__.partition(".")[0]:
            raise  # a mistake of ours
        raise MissingExtraError(
            f"{what} needs {package}, which is not installed: pip install 'promptembedder[{extra}]'"
        ) from error
