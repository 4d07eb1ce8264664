"""Plain texts of a file or of standard input, streamed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from io import TextIOWrapper
from pathlib import Path
from typing import Any, Literal

from promptembedder.data.readers import parse_json_line, read_jsonl, read_lines, reading_parquet
from promptembedder.errors import PromptEmbedderError
from promptembedder.text import is_unicode

TextFormat = Literal["lines", "jsonl", "parquet"]
# Of one kind throughout a file.
Id = Any
_ID_FIELD = "id"
_INT64 = range(-(1 << 63), 1 << 63)


def read_texts(
    source: str, kind: TextFormat | None, text_field: str = "text", id_field: str | None = None, *, ids: bool = True
) -> Iterator[tuple[Id, str]]:
    """Yield (id, text) from text lines, JSONL or Parquet, one at a time.

    Args:
        source: path, or `-` for standard input (lines or JSONL).
        kind: format; unset: by the file's ending, lines otherwise.
        text_field: field of the text in JSONL and Parquet.
        id_field: field of the id; unset: `id`, or the row's number, from 0, where no row has one.
        ids: whether ids are of use, and have to differ; if not, every id is the row's number.

    Raises:
        PromptEmbedderError: file missing or damaged, a text empty or no string; an id missing, of another type than the
            first, or used twice.
    """
    kind = kind or _kind_of(source)
    checked = _Ids(id_field) if ids and kind != "lines" else None  # numbers of lines differ
    for n, (where, identity, text) in enumerate(_rows(source, kind, text_field, id_field if ids else None)):
        if not isinstance(text, str) or not text.strip():
            found = "empty" if isinstance(text, str) else f"{type(text).__name__}, expected a string"
            raise PromptEmbedderError(f"{where}: text is {found}")
        if not is_unicode(text):
            raise PromptEmbedderError(f"{where}: text is not valid UTF-8")
        yield n if checked is None else checked.of_row(n, where, identity), text


def parquet_id_type(source: str, kind: TextFormat | None, id_field: str | None = None) -> Any | None:
    """The Arrow type of a Parquet file's ids, so that an output can keep it; None where there are none.

    Args:
        source: as in `read_texts`.
        kind: as in `read_texts`.
        id_field: as in `read_texts`.

    Raises:
        PromptEmbedderError: the file cannot be read, or the column cannot hold ids.
    """
    if source == "-" or (kind or _kind_of(source)) != "parquet":
        return None
    import pyarrow.parquet
    from pyarrow import types

    with reading_parquet(f"input {source}"):
        schema = pyarrow.parquet.read_schema(source)
    name = id_field or _ID_FIELD
    if name not in schema.names or types.is_null(schema.field(name).type):
        return None
    found = schema.field(name).type
    plain = found.value_type if types.is_dictionary(found) else found
    kinds = ("integer", "string", "large_string", "binary", "large_binary", "fixed_size_binary", "decimal", "date")
    if not any(getattr(types, f"is_{kind}")(plain) for kind in kinds) and str(plain) not in ("float", "double"):
        raise PromptEmbedderError(f"{source}: column {name!r} is {found}; ids must be integers, strings or bytes")
    return found


class _Ids:
    """Ids of rows, checked: all rows have one or none has, all of one type, none used twice."""

    def __init__(self, field: str | None) -> None:
        self._field, self._named = field or _ID_FIELD, field is not None
        self._first: Id = None
        self._seen: set[Id] = set()

    def of_row(self, n: int, where: str, identity: Id) -> Id:
        """The id of row `n`, its number if no row has one."""
        if identity is None or identity != identity:  # null, and what pandas makes of it
            if n == 0 and self._named:
                raise PromptEmbedderError(f"{where}: field {self._field!r} is missing; --id-field names another")
            if self._first is not None:
                raise PromptEmbedderError(f"{where}: id is missing, and other rows have one; give all one, or none")
            return n
        if n == 0:
            self._first = identity
        elif self._first is None:
            raise PromptEmbedderError(f"{where}: has an id, and rows before have none; give all one, or none")
        if type(identity) is not type(self._first) or isinstance(identity, (bool, list, dict)):
            raise PromptEmbedderError(
                f"{where}: id {identity!r} is {type(identity).__name__}, expected "
                + ("a string or an integer" if n == 0 else f"{type(self._first).__name__} as in the first row")
            )
        if isinstance(identity, str) and not is_unicode(identity):
            raise PromptEmbedderError(f"{where}: id is not valid UTF-8")
        if identity in self._seen:
            raise PromptEmbedderError(f"{where}: id {identity!r} is used twice")
        self._seen.add(identity)
        return identity


def _kind_of(source: str) -> TextFormat:
    name = source.lower().removesuffix(".gz")
    if name.endswith(".parquet"):
        return "parquet"
    if name.endswith((".csv", ".tsv", ".json")):
        raise PromptEmbedderError(
            f"input {source}: its ending says neither text lines nor JSONL nor Parquet; convert it, or name its format"
        )
    return "jsonl" if name.endswith((".jsonl", ".ndjson")) else "lines"


def _rows(source: str, kind: TextFormat, text_field: str, id_field: str | None) -> Iterator[tuple[str, Any, Any]]:
    if kind == "parquet":
        if source == "-":
            raise PromptEmbedderError("Parquet cannot be read from standard input; give a file")
        yield from _parquet_rows(source, text_field, id_field)
        return
    if kind == "lines":
        for number, line in enumerate(_lines(source), 1):
            yield f"{_name(source)}, line {number}", None, line.rstrip("\r\n")
        return
    for where, record in _jsonl_rows(source):
        if not isinstance(record, dict) or text_field not in record:
            raise PromptEmbedderError(f"{where}: field {text_field!r} is missing; --text-field names another")
        identity = record.get(id_field or _ID_FIELD)
        if isinstance(identity, int) and identity not in _INT64:
            raise PromptEmbedderError(f"{where}: id {identity} does not fit into 64 bits; make it a string")
        yield where, identity, record[text_field]


def _jsonl_rows(source: str) -> Iterator[tuple[str, Any]]:
    if source != "-":
        yield from read_jsonl(Path(source))
        return
    for number, line in enumerate(_lines(source), 1):
        if line.strip():
            where = f"standard input, line {number}"
            yield where, parse_json_line(line, where)


def _lines(source: str) -> Iterator[str]:
    if source != "-":
        yield from read_lines(Path(source))
        return
    read = 0
    try:
        if isinstance(sys.stdin, TextIOWrapper):  # whatever the locale says
            sys.stdin.reconfigure(encoding="utf-8-sig", errors="strict", newline="\n")
        for line in sys.stdin:
            read += 1
            yield line
    except UnicodeDecodeError as error:
        raise PromptEmbedderError(f"standard input is not UTF-8 text: {error.reason} after line {read}") from None


def _parquet_rows(source: str, text_field: str, id_field: str | None) -> Iterator[tuple[str, Any, Any]]:
    import pyarrow.parquet

    with reading_parquet(f"input {source}"), pyarrow.parquet.ParquetFile(source) as file:
        names, id_field = file.schema_arrow.names, id_field or _ID_FIELD
        if text_field not in names:
            others = ", ".join(" ".join(name.split()) for name in names)
            raise PromptEmbedderError(f"{source} has no column {text_field!r}, only {others}")
        columns = [text_field, *([id_field] if id_field in names else [])]
        n = 0
        for batch in file.iter_batches(columns=columns, batch_size=1024):
            for row in batch.to_pylist():
                n += 1
                yield f"{source}, row {n}", row.get(id_field), row[text_field]


def _name(source: str) -> str:
    return "standard input" if source == "-" else source
