"""Files in, vectors out; bridges between two models' vectors."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from promptembedder.bulk.encode_file import encode_file

if TYPE_CHECKING:
    from promptembedder.bulk.actor import encoder
    from promptembedder.bulk.corpus import encode_corpus
    from promptembedder.bulk.job import Job

__all__ = ["Job", "encode_corpus", "encode_file", "encoder"]

# Opened on first use: they need pyarrow, or Ray, and files of one kind need neither.
_PLACES = {"Job": "job", "encode_corpus": "corpus", "encoder": "actor"}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
