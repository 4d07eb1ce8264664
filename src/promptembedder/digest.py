"""Digests of files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path


def sha256_of(paths: Iterable[Path]) -> str:
    """The sha256, in hex, of the contents of files joined in order.

    Raises:
        OSError: a file cannot be read.
    """
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as source:
            while block := source.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()
