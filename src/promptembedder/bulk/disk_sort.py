"""Pairs of a key and a place, sorted on disk, so that memory does not grow with their number.

Pairs go into buckets by the first bits of their key. A bucket is sorted by itself; all of them in a row are sorted.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

_BUCKETS = 256
_PAIR = np.dtype([("key", "<u8"), ("place", "<u8")])
_SCANNED = 1 << 16


class DiskSort:
    """Takes pairs in any order; a context manager that removes its files at the end."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._waiting: list[NDArray[np.void]] = []
        self._count = 0

    def __enter__(self) -> DiskSort:
        self.folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="promptembedder-")))
        self._buckets = [
            self._stack.enter_context((self.folder / f"bucket-{n:03d}").open("wb")) for n in range(_BUCKETS)
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def add(self, keys_N: NDArray[np.uint64], places_N: NDArray[np.uint64]) -> None:
        """Add pairs."""
        pairs_N = np.empty(len(keys_N), _PAIR)
        pairs_N["key"], pairs_N["place"] = keys_N, places_N
        self._waiting.append(pairs_N)
        self._count += len(pairs_N)
        if self._count >= _SCANNED:
            self._spill()

    def _spill(self) -> None:
        pairs_N = np.concatenate([*self._waiting, np.empty(0, _PAIR)])
        self._waiting, self._count = [], 0
        bucket_N = (pairs_N["key"] >> np.uint64(56)).astype(np.int64)
        order_N = np.argsort(bucket_N, kind="stable")
        starts = np.searchsorted(bucket_N[order_N], np.arange(_BUCKETS + 1))
        for n in range(_BUCKETS):
            if starts[n] < starts[n + 1]:
                self._buckets[n].write(pairs_N[order_N[starts[n] : starts[n + 1]]].tobytes())

    def finish(self) -> tuple[Path, Path]:
        """Files of the sorted keys and of their places, in the order of keys, and of places where keys are equal."""
        self._spill()
        files = self.folder / "keys", self.folder / "places"
        with files[0].open("wb") as keys, files[1].open("wb") as places:
            for bucket in self._buckets:
                bucket.close()
                pairs_N = np.fromfile(bucket.name, _PAIR)
                pairs_N.sort(order=["key", "place"])
                keys.write(np.ascontiguousarray(pairs_N["key"]).tobytes())
                places.write(np.ascontiguousarray(pairs_N["place"]).tobytes())
                Path(bucket.name).unlink()
        return files


def mapped(file: Path) -> NDArray[np.uint64]:
    """Numbers of a file, read where they are used."""
    if file.stat().st_size == 0:
        return np.empty(0, np.uint64)
    return np.memmap(file, np.uint64, "r")


def repeats(keys_N: NDArray[np.uint64]) -> Iterator[tuple[int, int]]:
    """Starts and ends of runs of equal keys, of two and more."""
    start = 0
    for first in range(0, len(keys_N), _SCANNED):
        some = np.asarray(keys_N[first : first + _SCANNED + 1])
        for n in np.flatnonzero(some[1:] == some[:-1]) + first:
            if n < start:
                continue
            start = int(n) + 2
            while start < len(keys_N) and keys_N[start] == keys_N[n]:
                start += 1
            yield int(n), start
