"""A source file as blocks of rows, streamed: the unit of work, of a part of the output, and of going on after a stop.

Block `n` holds rows `n R` to `(n + 1) R` of its file, so that a later run cuts the same blocks.
"""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import sys
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from hashlib import blake2b
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import types

from promptembedder.bulk.columns import Columns, of_records, of_schema
from promptembedder.bulk.sources import SourceFile, open_file, opening
from promptembedder.data.readers import parse_json_line
from promptembedder.errors import PromptEmbedderError, shown
from promptembedder.text import is_blank, is_unicode

_INT64 = range(-(1 << 63), 1 << 63)
_PEEKED = 1000
_BOM = b"\xef\xbb\xbf"


class BadFileError(PromptEmbedderError):
    """A source file that cannot be read to its end; the other files can."""


@dataclass(frozen=True)
class Reject:
    """A row that is left out.

    Attributes:
        line: its line, or in Parquet its row, from 1.
        reason: why.
    """

    line: int
    reason: str


@dataclass(frozen=True)
class Block:
    """Some rows of a file, one after the other.

    Attributes:
        file: where they are from.
        number: of the block in its file, from 0.
        table: id, text and what is kept, of the rows that can be used.
        lines: line of each of these.
        rejects: the other rows.
        end: no block comes after it.
        share: of the file that has been read by its end.
    """

    file: SourceFile
    number: int
    table: pa.Table
    lines: list[int]
    rejects: list[Reject] = field(default_factory=list)
    end: bool = False
    share: float = 1.0

    def digest(self) -> str:
        """16 hex digits of all that the block's part depends on, beside the job's settings."""
        found = blake2b(digest_size=8)
        found.update(repr((self.number, self.end, self.rejects)).encode())
        found.update(self._table_bytes())
        return found.hexdigest()

    def _table_bytes(self) -> Any:
        sink = pa.BufferOutputStream()
        table = self.table.combine_chunks()
        with pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table)
        return sink.getvalue()

    def packed(self) -> tuple[str, bytes]:
        """The block as it travels to another process; `unpacked` is the reverse."""
        facts = {
            **{name: getattr(self, name) for name in ("number", "lines", "end", "share")},
            "file": asdict(self.file),
            "rejects": [asdict(one) for one in self.rejects],
        }
        return json.dumps(facts), self._table_bytes().to_pybytes()

    @classmethod
    def unpacked(cls, facts: str, table: bytes) -> Block:
        """A block that has travelled."""
        found = json.loads(facts)
        return cls(
            **{
                **found,
                "file": SourceFile(**found["file"]),
                "rejects": [Reject(**one) for one in found["rejects"]],
                "table": pa.ipc.open_stream(table).read_all(),
            }
        )


def read_blocks(file: SourceFile, columns: Columns, rows: int, limit: int | None = None) -> Iterator[Block]:
    """Blocks of a file; an empty file has one, which is empty.

    Args:
        file: to read.
        columns: of all files.
        rows: R, of a block.
        limit: stop after this number of rows of the file.

    Raises:
        BadFileError: it cannot be read, or lacks a column.
    """
    read = _parquet_blocks if file.kind == "parquet" else _record_blocks
    number, left = 0, sys.maxsize if limit is None else limit
    with _reading(file):
        for block, count in read(file, columns, rows, left):
            yield replace(block, number=number)
            number, left = number + 1, left - count
            if left <= 0:
                return


def peek_columns(file: SourceFile, text: str, identity: str | None, keep: tuple[str, ...]) -> Columns | None:
    """Columns by the beginning of a file; None where it has no rows.

    Raises:
        PromptEmbedderError: it cannot be read, or a column is missing or of a type that is not taken.
    """
    if file.kind == "lines":
        if keep or identity:
            raise PromptEmbedderError("text lines have no columns: leave --keep and --id-field out")
        return Columns("text", None, pa.string())
    with _reading(file):
        if file.kind == "parquet":
            with open_file(file) as raw:
                return of_schema(pq.read_schema(raw), file.name, text, identity, keep)
        records = [found for _, found, _ in itertools.islice(_records(file), _PEEKED) if isinstance(found, dict)]
    return of_records(records, file.name, text, identity, keep) if records else None


@contextmanager
def _reading(file: SourceFile) -> Iterator[None]:
    """Errors of a file that is damaged or out of reach, as one line."""
    try:
        yield
    except BadFileError:
        raise
    except PromptEmbedderError as error:
        raise BadFileError(str(error) if file.url in str(error) else f"{file.url} {error}") from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise BadFileError(f"{file.url} is a damaged gzip file: {error}") from error
    except (pa.ArrowException, csv.Error) as error:
        kind = "CSV" if isinstance(error, csv.Error) else "Parquet"
        raise BadFileError(f"{file.url} cannot be read as {kind}: {' '.join(str(error).split())[:300]}") from error
    except Exception as error:
        try:
            with opening(file.url):
                raise
        except PromptEmbedderError as named:
            raise BadFileError(str(named)) from error


# -- Parquet ----------------------------------------------------------------------------------------------------


def _parquet_blocks(file: SourceFile, columns: Columns, rows: int, limit: int) -> Iterator[tuple[Block, int]]:
    with open_file(file) as raw, pq.ParquetFile(raw) as parquet:
        names = [*([columns.id] if columns.id else []), columns.text, *(name for name, _ in columns.kept)]
        found = of_schema(parquet.schema_arrow, file.url, columns.text, columns.id, [name for name, _ in columns.kept])
        _check_alike(file, found, columns)
        total, first = min(parquet.metadata.num_rows, limit), 0
        whole = total == parquet.metadata.num_rows
        batches = parquet.iter_batches(batch_size=rows, columns=list(dict.fromkeys(names)))
        waiting: list[pa.Table] = []
        while first < total or first == 0:
            count = min(rows, total - first)
            while sum(map(len, waiting)) < count:
                waiting.append(pa.Table.from_batches([next(batches)]))
            if waiting:
                joined = pa.concat_tables(waiting)
                taken, waiting = joined.slice(0, count), [joined.slice(count)]
            else:
                taken = parquet.schema_arrow.empty_table()
            first += count
            end = whole and first >= total
            share = first / max(1, parquet.metadata.num_rows)
            yield _parquet_block(file, columns, taken, first - count, end, share), max(1, count)
            if not count:
                return


def _check_alike(file: SourceFile, found: Columns, columns: Columns) -> None:
    pairs = [("id", found.id_type, columns.id_type)] if columns.id else []
    pairs += [(name, kind, dict(columns.kept)[name]) for name, kind in found.kept]
    for name, one, other in pairs:
        alike = one == other or any(
            check(one) and check(other) for check in (types.is_integer, types.is_floating, _is_words, types.is_null)
        )
        if not alike:
            raise BadFileError(
                f"{file.url}: column {columns.id if name == 'id' else name!r} is {one}, expected {other}"
            )


def _is_words(kind: pa.DataType) -> bool:
    return bool(types.is_string(kind) or types.is_large_string(kind))


def _parquet_block(file: SourceFile, columns: Columns, taken: pa.Table, first: int, end: bool, share: float) -> Block:
    text = _cast(taken[columns.text], pa.large_string())
    reasons: dict[int, str] = dict.fromkeys(_true(pc.is_null(text)), "text is missing")
    try:
        text.validate(full=True)
    except pa.ArrowInvalid:
        values = text.cast(pa.large_binary()).to_pylist()
        broken = [n for n, value in enumerate(values) if value is not None and not _is_utf8(value)]
        reasons |= dict.fromkeys(broken, "text is not valid UTF-8")
        readable = [None if n in reasons else value.decode() for n, value in enumerate(values)]
        text = pa.chunked_array([pa.array(readable, pa.large_string())])
    blank = pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(text)), 0)
    reasons |= dict.fromkeys(_true(blank), "text is empty")
    if columns.id is None:
        ids = pa.chunked_array([_made_up(file, range(first, first + len(taken)))], pa.string())
    else:
        ids = _cast(taken[columns.id], columns.id_type)
        reasons |= dict.fromkeys(_true(pc.is_null(ids)), "id is missing")
    kept = [_cast(taken[name], kind) for name, kind in columns.kept]
    for name, column in ((columns.id, ids), *((name, one) for (name, _), one in zip(columns.kept, kept, strict=True))):
        try:
            column.validate(full=True)
        except pa.ArrowInvalid as error:
            raise BadFileError(f"{file.url}: column {name!r} holds values that are not valid: {error}") from error
    table = pa.table([ids, text, *kept], schema=columns.schema)
    good = [n for n in range(len(taken)) if n not in reasons]
    rejects = [Reject(first + n + 1, reason) for n, reason in sorted(reasons.items())]
    table = table if not rejects else table.take(good)
    return Block(file, 0, table, [first + n + 1 for n in good], rejects, end, share)


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _cast(column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    return column if column.type == kind else column.cast(kind)


def _true(mask: pa.ChunkedArray) -> list[int]:
    return pc.indices_nonzero(pc.fill_null(mask, False)).to_pylist()  # type: ignore[no-any-return]


def _made_up(file: SourceFile, numbers: Any) -> list[str]:
    return [f"{file.name}#{number}" for number in numbers]


# -- lines, JSONL and CSV ---------------------------------------------------------------------------------------


def _record_blocks(file: SourceFile, columns: Columns, rows: int, limit: int) -> Iterator[tuple[Block, int]]:
    needed = (columns.text, *([columns.id] if columns.id else []), *(name for name, _ in columns.kept))
    records, first, none = _records(file, needed), 0, None
    following = next(records, none)
    while following is not none or first == 0:
        some = [] if following is None else [following, *itertools.islice(records, rows - 1)]
        following = next(records, none)
        end = following is none and len(some) <= limit
        some = some[:limit]
        share = some[-1][2] if some else 1.0
        yield _record_block(file, columns, some, first, end, share), len(some)
        first, limit = first + len(some), limit - len(some)
        if not some:
            return


def _record_block(
    file: SourceFile, columns: Columns, some: list[tuple[int, Any, float]], first: int, end: bool, share: float
) -> Block:
    names = [name for name, _ in columns.kept]
    rejects: list[Reject] = []
    lines: list[int] = []
    values: list[list[Any]] = [[] for _ in columns.schema]
    for number, (line, record, _) in enumerate(some, first):
        reason = record if isinstance(record, str) else _fault(record, columns)
        if reason is not None:
            rejects.append(Reject(line, reason))
            continue
        identity = f"{file.name}#{number}" if columns.id is None else record[columns.id]
        for column, value in zip(
            values, (identity, record[columns.text], *(record.get(name) for name in names)), strict=True
        ):
            column.append(value)
        lines.append(line)
    arrays = []
    good = list(range(len(lines)))
    for column, entry in zip(values, columns.schema, strict=True):
        array, wrong = _array(column, entry.type)
        arrays.append(array)
        for n, reason in wrong:
            rejects.append(Reject(lines[n], f"column {entry.name!r} {reason}"))
        good = [n for n in good if n not in {one for one, _ in wrong}]
    table = pa.table(arrays, schema=columns.schema)
    if len(good) < len(lines):
        table, lines = table.take(good), [lines[n] for n in good]
    return Block(file, 0, table, lines, sorted(rejects, key=lambda one: one.line), end, share)


def _array(values: list[Any], kind: pa.DataType) -> tuple[pa.Array, list[tuple[int, str]]]:
    """Values as Arrow has them, and which of them it cannot have."""
    try:
        return pa.array(values, kind), []
    except (pa.ArrowException, OverflowError, TypeError, UnicodeEncodeError):
        kept, wrong = [], []
        for n, value in enumerate(values):
            try:
                kept.append(pa.scalar(value, kind))
            except UnicodeEncodeError:
                kept.append(pa.scalar(None, kind))
                wrong.append((n, "is not valid UTF-8"))
            except (pa.ArrowException, OverflowError, TypeError):
                kept.append(pa.scalar(None, kind))
                wrong.append((n, f"is {shown(value)}, expected {kind}"))
        return pa.array([one.as_py() for one in kept], kind), wrong


def _fault(record: dict[str, Any], columns: Columns) -> str | None:
    """Why a row cannot be used; None where it can."""
    text = record.get(columns.text)
    if text is None:
        return "text is missing"
    if not isinstance(text, str):
        return f"text is {type(text).__name__}, expected a string"
    if is_blank(text):
        return "text is empty"
    if not is_unicode(text):
        return "text is not valid UTF-8"
    if columns.id is None:
        return "has an id, and the first row has none" if record.get("id") is not None else None
    identity, words = record.get(columns.id), types.is_string(columns.id_type)
    if identity is None or identity == "":
        return "id is missing"
    if type(identity) is not (str if words else int):
        return f"id is {type(identity).__name__}, expected {'a string' if words else 'an integer'}"
    if isinstance(identity, str) and not is_unicode(identity):
        return "id is not valid UTF-8"
    if not words and identity not in _INT64:
        return "id does not fit into 64 bits"
    return None


def _records(file: SourceFile, needed: Sequence[str] = ()) -> Iterator[tuple[int, dict[str, Any] | str, float]]:
    """Line from 1, row or why it is none, and the share of the file read by then."""
    with open_file(file) as raw:
        stream = gzip.GzipFile(fileobj=raw) if file.packed else raw
        size = max(1, file.size)
        for line, found in _csv_rows(stream, needed) if file.kind == "csv" else _line_rows(stream, file):
            yield line, found, min(1.0, raw.tell() / size)


def _line_rows(stream: Any, file: SourceFile) -> Iterator[tuple[int, dict[str, Any] | str]]:
    for line, data in enumerate(stream, 1):
        try:
            words = data.removeprefix(_BOM if line == 1 else b"").decode()
        except UnicodeDecodeError as error:
            yield line, f"not UTF-8 text: {error.reason}"
            continue
        if file.kind == "lines":
            yield line, {"text": words.rstrip("\r\n")}
        elif not is_blank(words):
            yield line, _json_row(words)


def _json_row(words: str) -> dict[str, Any] | str:
    try:
        record = parse_json_line(words, "")
    except PromptEmbedderError as error:
        return str(error).removeprefix(": ")
    return record if isinstance(record, dict) else f"found {type(record).__name__}, expected one JSON object per line"


def _csv_rows(stream: Any, needed: Sequence[str]) -> Iterator[tuple[int, dict[str, Any] | str]]:
    csv.field_size_limit(1 << 30)
    lines = (data.removeprefix(_BOM) if n == 0 else data for n, data in enumerate(stream))
    decoded = (data.decode("utf-8", errors="surrogateescape") for data in lines)
    rows = csv.reader(decoded, strict=True)
    header = next(rows, None)
    if header is None:
        return
    for name in needed:
        if name not in header:
            raise PromptEmbedderError(f"has no column {name!r}, only {', '.join(header)}")
    for values in rows:
        if not values:
            continue
        if len(values) != len(header):
            yield rows.line_num, f"has {len(values)} fields, and the header {len(header)}"
        else:
            yield rows.line_num, dict(zip(header, values, strict=True))
