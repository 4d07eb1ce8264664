"""The end of a job: no id twice, parts of older versions of files removed, rejected rows in one file.

One pass over the ids of all parts, in memory that does not grow with their number.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
import pyarrow as pa

from promptembedder.bulk.disk_sort import DiskSort, mapped, repeats
from promptembedder.bulk.output import PARTS, REJECTS, Output, facts_of
from promptembedder.errors import PromptEmbedderError

_ROWS = np.uint64(32)
_LOW = (1 << 32) - 1
# Of a part that lacks rows with repeated ids; a later run makes it again.
LESS = "-less.parquet"


@dataclass(frozen=True)
class Totals:
    """Counts over all parts of an output."""

    rows: int
    written: int
    rejected: int


def drop_repeats(output: Output, parts: Sequence[str], strict: bool) -> dict[str, tuple[str, int]]:
    """Leave out all rows but the first of an id, in the order of parts.

    Args:
        output: that holds the parts.
        parts: names of parts in the order of the corpus.
        strict: raise instead.

    Returns:
        By name of the parts that have changed: the new name, and how many rows were left out.

    Raises:
        PromptEmbedderError: with `strict`, an id is used twice.
    """
    with DiskSort() as sort:
        for number, name in enumerate(parts):
            ids = _ids(output, name)
            keys = np.fromiter((_key(one) for one, _ in ids), np.uint64, len(ids))
            sort.add(keys, (np.uint64(number) << _ROWS) + np.arange(len(ids), dtype=np.uint64))
        keys_file, places_file = sort.finish()
        places_N = mapped(places_file)
        losers: dict[int, dict[int, tuple[int, int]]] = {}
        for start, stop in repeats(mapped(keys_file)):
            first, *later = [(int(p) >> 32, int(p) & _LOW) for p in places_N[start:stop]]
            for part, row in later:
                losers.setdefault(part, {})[row] = first
        del places_N
    # All reasons first: a part that loses a row may hold the first use of an id that a later part repeats.
    reasons = {part: _repeated(output, parts, part, rows) for part, rows in sorted(losers.items())}
    return {
        parts[part]: (_without(output, parts[part], found, strict), len(found))
        for part, found in reasons.items()
        if found
    }


def _key(identity: Any) -> int:
    data = identity if isinstance(identity, bytes) else str(identity).encode()
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little")


def _ids(output: Output, name: str) -> list[tuple[Any, int]]:
    """Ids of the rows of a part, each with its first row there; a text in chunks has one."""
    with output.part(name) as parquet:
        chunked = "chunk" in parquet.schema_arrow.names
        table = parquet.read(columns=["id", *(["chunk"] if chunked else [])])
    ids = table["id"].to_pylist()
    chunks = table["chunk"].to_pylist() if chunked else [0] * len(ids)
    return [(one, row) for row, (one, chunk) in enumerate(zip(ids, chunks, strict=True)) if chunk == 0]


def _repeated(output: Output, parts: Sequence[str], part: int, rows: Mapping[int, tuple[int, int]]) -> dict[int, str]:
    """Rows of a part whose id an earlier row has, each with the reason to leave it out."""
    own = _ids(output, parts[part])
    others = {part: own}
    found: dict[int, str] = {}
    for row, (other, other_row) in sorted(rows.items()):
        if other not in others:
            others = {part: own, other: _ids(output, parts[other])}
        if others[other][other_row][0] == own[row][0]:  # else only their digests are alike
            found[row] = f"id {own[row][0]!r} is used twice, also in {_place(output, parts[other], other_row)}"
    return found


def _without(output: Output, part: str, reasons: Mapping[int, str], strict: bool) -> str:
    """Write a part again without some rows; the new name."""
    own = _ids(output, part)
    with output.part(part) as parquet:
        facts, table = facts_of(parquet), parquet.read()
    lines = expanded_runs(facts["lines"])
    if strict:
        row, reason = next(iter(reasons.items()))
        raise PromptEmbedderError(f"{facts['source']}, line {lines[row]}: {reason}")
    starts = [start for _, start in own] + [len(table)]
    gone = {n for row in reasons for n in range(starts[row], starts[row + 1])}
    table = table.take(pa.array([n for n in range(len(table)) if n not in gone], pa.int64()))
    facts["rejects"] += [{"line": lines[row], "reason": reason} for row, reason in reasons.items()]
    facts["rows"] -= len(reasons)
    facts["lines"] = [[line, 1] for row, line in enumerate(lines) if row not in reasons]
    new = part.removesuffix(".parquet") + LESS
    output.write_part(new, table, facts)
    output.remove(f"{PARTS}/{part}")
    return new


def _place(output: Output, part: str, row: int) -> str:
    with output.part(part) as parquet:
        facts = facts_of(parquet)
    return f"{facts['source']}, line {expanded_runs(facts['lines'])[row]}"


def expanded_runs(runs: Sequence[Sequence[int]]) -> list[int]:
    """Numbers of runs given as (first, how many)."""
    return [first + n for first, count in runs for n in range(count)]


def write_rejects(output: Output, parts: Sequence[str]) -> Totals:
    """Write all rejected rows to one file, and count over all parts."""
    rows = written = rejected = 0
    found: list[str] = []
    for facts, count in _facts(output, parts):
        rows, written, rejected = rows + facts["rows"], written + count, rejected + len(facts["rejects"])
        found += [json.dumps({"source": facts["source"], **one}, ensure_ascii=False) for one in facts["rejects"]]
    output.write(REJECTS, "".join(f"{line}\n" for line in found).encode())
    return Totals(rows, written, rejected)


def _facts(output: Output, parts: Sequence[str]) -> Iterator[tuple[dict[str, Any], int]]:
    for name in parts:
        with output.part(name) as parquet:
            yield facts_of(parquet), parquet.metadata.num_rows
