"""Paths as users write them: a leading `~`, endings in any case; and why a file cannot be read."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from promptembedder.errors import PromptEmbedderError


def expanded(path: str | Path) -> Path:
    """The path, a leading `~` replaced by the home folder."""
    return Path(os.path.expanduser(path))  # `Path.expanduser` raises where `~name` is no user


def ending(path: str | Path) -> str:
    """What a file's name says of its content, in lower case: `.jsonl`, `.jsonl.gz`; empty where it says nothing."""
    name = Path(path).name.lower()
    packed = ".gz" if name.endswith(".gz") else ""
    return Path(name.removesuffix(packed)).suffix + packed


def unreadable(path: Path) -> str | None:
    """Why a file cannot be read, such as `Permission denied`; None where it can."""
    try:
        mode = path.stat().st_mode
        if stat.S_ISREG(mode):
            path.open("rb").close()
    except (OSError, ValueError) as error:  # the second: a null byte in the name
        return getattr(error, "strerror", None) or str(error)
    return None if stat.S_ISREG(mode) else "Is a directory" if stat.S_ISDIR(mode) else "Not a regular file"


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
        raise PromptEmbedderError(f"{path} cannot be read: {error.strerror or error}") from error
    return True


def check_readable(path: Path) -> None:
    """Refuse a file that cannot be read; safetensors calls every such file one that is not there.

    Raises:
        PromptEmbedderError: it cannot be read; the message says why.
    """
    if (reason := unreadable(path)) is not None:
        raise PromptEmbedderError(f"{path} cannot be read: {reason}")


def closed_file(folder: Path) -> str | None:
    """The first file of a folder that is there and cannot be read, and why; None where there is none.

    Libraries call such a file missing.
    """
    for path in sorted(folder.rglob("*")):
        if not path.is_dir() and (reason := unreadable(path)) is not None:
            return f"{path} cannot be read: {reason}"
    return None
