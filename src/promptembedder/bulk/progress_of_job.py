"""How far a job is, and how long it will take."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType

from promptembedder.bulk.encode_block import Done
from promptembedder.bulk.sources import SourceFile
from promptembedder.progress import bar, say

# An estimate is worth saying when so much time has been measured, and so much is left.
_MEASURED_SECONDS, _LONG_SECONDS = 10.0, 60.0


class JobProgress:
    """A bar with rate and remaining time, and one line with an estimate where a job will take long.

    How many texts a corpus holds is estimated by the share of its bytes that has been read.

    Args:
        files: to read.
        limit: rows that are read at most.
    """

    def __init__(self, files: Sequence[SourceFile], limit: int | None) -> None:
        self._sizes = {file.url: file.size for file in files}
        self._shares: dict[str, float] = {}
        self._limit = limit
        self._rows = self._first = self._embedded = 0
        self._said = False

    def __enter__(self) -> JobProgress:
        self._bar = bar(unit=" texts", desc="Encoding", total=None)
        self._bar.__enter__()
        self._entered = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.__exit__(kind, error, trace)
        if kind is None and self._limit is not None and self._rows >= self._limit:
            self._say("the whole corpus", 1.0)

    def done(self, one: Done) -> None:
        """Count a block."""
        self._shares[one.url] = max(one.share, self._shares.get(one.url, 0.0))
        rows = one.rows + one.rejected
        if not self._rows:  # measured from here on: before, workers have started
            self._first, self._started = rows, time.monotonic()
        self._rows, self._embedded = self._rows + rows, self._embedded + one.embedded
        total = self._total()
        self._bar.total = min(total, self._limit or total)
        self._bar.update(rows)
        measured = time.monotonic() - self._started > _MEASURED_SECONDS
        if not self._said and self._limit is None and measured and self._embedded:
            self._said = True
            if (total - self._rows) / self._rate() > _LONG_SECONDS:
                self._say("what is left", 1 - self._rows / total)

    def _total(self) -> int:
        """Rows of all files, estimated."""
        read = sum(self._sizes[url] * share for url, share in self._shares.items())
        whole = sum(self._sizes.values())
        return max(self._rows, round(self._rows * whole / read)) if read else self._rows

    def _rate(self) -> float:
        """Rows a second after the first block, or with it where it is the only one."""
        if self._rows == self._first:
            return self._rows / (time.monotonic() - self._entered)
        return (self._rows - self._first) / (time.monotonic() - self._started)

    def _say(self, what: str, share: float) -> None:
        total, rate = self._total(), self._rate()
        say(f"about {total:,} texts, {rate:,.0f} texts a second: {what} takes about {duration(share * total / rate)}")


def duration(seconds: float) -> str:
    """A time as people say it.

    Example:
        >>> duration(40), duration(4000), duration(400000)
        ('40 s', '1 h 7 min', '4 days 15 h')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 60 * 48:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes // 1440} days {minutes % 1440 // 60} h"
