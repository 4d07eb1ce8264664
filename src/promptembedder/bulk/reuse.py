"""Embeddings that an output holds already, found by the digests of their texts.

A corpus that has grown is read again, and only new texts are embedded, wherever in the corpus the old ones now stand.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray

from promptembedder.bulk.disk_sort import DiskSort, mapped
from promptembedder.bulk.output import Output

# A block's texts are looked for in this number of parts, those with the most of them first: each is read from the disk.
_MOST_PARTS = 64
_HELD_PARTS = 4
_ROWS = np.uint64(32)


def digest_of(text: str) -> bytes:
    """16 bytes that stand for a text."""
    return blake2b(text.encode(), digest_size=16).digest()


@dataclass(frozen=True, eq=False)
class Known:
    """Where embeddings of texts are.

    Attributes:
        output: that holds them.
        names: of its parts.
        keys_N: the first halves of digests, sorted.
        places_N: where each is: number of the part, and row.
    """

    output: Output
    names: tuple[str, ...]
    keys_N: NDArray[np.uint64]
    places_N: NDArray[np.uint64]


def index_parts(output: Output, names: Sequence[str], sort: DiskSort) -> Known:
    """Find out which texts an output holds embeddings of, in memory that does not grow with their number."""
    for number, name in enumerate(names):
        with output.part(name) as parquet:
            digests = parquet.read(columns=["digest"])["digest"].combine_chunks()
        keys_N = _halves(digests)
        sort.add(keys_N, (np.uint64(number) << _ROWS) + np.arange(len(keys_N), dtype=np.uint64))
    keys, places = sort.finish()
    return Known(output, tuple(names), mapped(keys), mapped(places))


def _halves(digests: Any) -> NDArray[np.uint64]:
    """The first 8 bytes of each 16."""
    start = digests.offset * 16
    data = np.frombuffer(digests.buffers()[1] or b"", np.uint8)[start : start + 16 * len(digests)]
    return np.ascontiguousarray(data).view("<u8")[::2]


class Reuse:
    """Looks up embeddings.

    Args:
        known: where they are; unset: nowhere.
        columns: names of the columns that hold them.
    """

    def __init__(self, known: Known | None, columns: Sequence[str]) -> None:
        self._known, self._columns = known, list(columns)
        self._read = lru_cache(_HELD_PARTS)(self._read_part)

    def find(self, digests: Sequence[bytes]) -> dict[int, dict[str, NDArray[Any]]]:
        """Stored values under each instruction, by the place of their text among those that are looked up."""
        if self._known is None or not len(self._known.keys_N) or not digests:
            return {}
        keys_N, places_N = self._known.keys_N, self._known.places_N
        asked_N = np.frombuffer(b"".join(digests), "<u8")[::2]
        at_N = np.searchsorted(keys_N, asked_N)
        at_N[at_N == len(keys_N)] = 0
        hits = np.flatnonzero(keys_N[at_N] == asked_N)
        places = places_N[at_N[hits]]
        parts = (places >> _ROWS).astype(np.int64)
        rows = (places & np.uint64(0xFFFFFFFF)).astype(np.int64)
        found: dict[int, dict[str, NDArray[Any]]] = {}
        for part, _ in Counter(parts.tolist()).most_common(_MOST_PARTS):
            stored, values = self._read(self._known.names[part])
            for n, row in zip(hits[parts == part].tolist(), rows[parts == part].tolist(), strict=True):
                if stored[row] == digests[n]:
                    found[n] = {name: column[row] for name, column in values.items()}
        return found

    def _read_part(self, name: str) -> tuple[list[bytes], dict[str, NDArray[Any]]]:
        assert self._known is not None
        with self._known.output.part(name) as parquet:
            table = parquet.read(columns=["digest", *self._columns])
        return table["digest"].to_pylist(), {
            column: _matrix(table[column].combine_chunks()) for column in self._columns
        }


def _matrix(column: Any) -> NDArray[Any]:
    width = column.type.list_size
    return column.flatten().to_numpy(zero_copy_only=False).reshape(-1, width)  # type: ignore[no-any-return]
