"""Files that are there or not, and files that this user may not read: which of the two."""

from __future__ import annotations

from pathlib import Path

from promptembedder.errors import PromptEmbedderError


def is_there(path: Path) -> bool:
    """Whether a file or folder exists.

    Raises:
        PromptEmbedderError: the user may not look.
    """
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError, ValueError):  # the last: no name of a file
        return False
    except OSError as error:
        raise _cannot_be_read(path, error) from error
    return True


def check_readable(path: Path) -> None:
    """Open a file and close it again; safetensors calls every file that it may not read one that is not there.

    Raises:
        PromptEmbedderError: it cannot be read; the message says why.
    """
    try:
        path.open("rb").close()
    except OSError as error:
        raise _cannot_be_read(path, error) from error


def _cannot_be_read(path: Path, error: OSError) -> PromptEmbedderError:
    return PromptEmbedderError(f"{path} cannot be read: {error.strerror or error}")
