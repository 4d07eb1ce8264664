"""Files that appear whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A scratch file beside `path`, which takes its place when the block ends without an error.

    Raises:
        OSError: the folder cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    os.close(handle)
    scratch = Path(name)
    try:
        yield scratch
        scratch.chmod(0o644)
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


@contextmanager
def filling(folder: Path) -> Iterator[Path]:
    """A scratch folder inside `folder`; its files move out when the block ends without an error.

    Raises:
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".scratch-", dir=folder) as place:
        yield Path(place)
        for file in Path(place).iterdir():
            file.replace(folder / file.name)


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """A scratch folder beside `folder`, which takes its place, whole, when the block ends without an error.

    Raises:
        OSError: the folder cannot be written.
    """
    target = folder.resolve() if folder.is_symlink() else folder
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    former = None
    try:
        yield scratch
        _open_to_readers(scratch)
        if target.exists():
            former = scratch.with_name(f"{scratch.name}-former")
            target.rename(former)
        scratch.rename(target)
    finally:
        if former is not None and former.exists():
            if target.exists():
                shutil.rmtree(former, ignore_errors=True)
            else:
                former.rename(target)
        shutil.rmtree(scratch, ignore_errors=True)


def _open_to_readers(folder: Path) -> None:
    """Give a folder made by `mkdtemp`, and weights in it, which safetensors keeps to their owner, the usual modes."""
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file whole."""
    with replacing(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole, as a person reads it."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
