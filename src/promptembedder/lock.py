"""One run at a time in an output folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from promptembedder.errors import PromptEmbedderError

# Hidden, empty, and left where it is: to remove it would let two processes hold two files of one name.
LOCK_FILE = ".run.lock"


@contextmanager
def held(folder: Path, what: str = "output folder") -> Iterator[None]:
    """Hold an output folder while the block runs; a process that ends in whatever way lets go.

    Args:
        folder: made if it is not there.
        what: the folder is, for errors.

    Raises:
        PromptEmbedderError: another run holds it, or it cannot be written.
    """
    lock = FileLock(folder / LOCK_FILE, timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise PromptEmbedderError(
            f"another run is writing to {what} {folder}; wait until it ends, or choose another output"
        ) from None
    except OSError as error:
        raise PromptEmbedderError(f"{what} {folder} cannot be written: {error.strerror or error}") from error
    try:
        yield
    finally:
        lock.release()
