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


def read_texts(
    source: str, kind: TextFormat | None, text_field: str = "text", id_field: str = "id", *, ids: bool = True
) -> Iterator[tuple[str, str]]:
    """Yield (id, text) from text lines, JSONL or Parquet, one at a time.

    Args:
        source: path, or `-` for standard input (lines or JSONL).
        kind: format; unset: by the file's ending, lines otherwise.
        text_field: field of the text in JSONL and Parquet.
        id_field: field of the id; rows without it get their number, from 0.
        ids: whether ids are of use, and have to differ.

    Raises:
        PromptEmbedderError: file missing or damaged, a text empty or no string, an id used twice.
    """
    seen: set[str] = set()
    kind = kind or _kind_of(source)
    for n, (where, identity, text) in enumerate(_rows(source, kind, text_field, id_field)):
        if not isinstance(text, str) or not text.strip():
            found = "empty" if isinstance(text, str) else f"{type(text).__name__}, expected a string"
            raise PromptEmbedderError(f"{where}: text is {found}")
        if not is_unicode(text):
            raise PromptEmbedderError(f"{where}: text is not valid UTF-8")
        name = str(n if identity is None else identity)
        if ids and kind != "lines":  # whose numbers differ
            if name in seen:
                raise PromptEmbedderError(f"{where}: id {name!r} is used twice")
            seen.add(name)
        yield name, text


def _kind_of(source: str) -> TextFormat:
    name = source.lower().removesuffix(".gz")
    if name.endswith(".parquet"):
        return "parquet"
    if name.endswith((".csv", ".tsv", ".json")):
        raise PromptEmbedderError(
            f"input {source}: its ending says neither text lines nor JSONL nor Parquet; convert it, or name its format"
        )
    return "jsonl" if name.endswith((".jsonl", ".ndjson")) else "lines"


def _rows(source: str, kind: TextFormat, text_field: str, id_field: str) -> Iterator[tuple[str, Any, Any]]:
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
        yield where, record.get(id_field), record[text_field]


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


def _parquet_rows(source: str, text_field: str, id_field: str) -> Iterator[tuple[str, Any, Any]]:
    import pyarrow.parquet

    with reading_parquet(f"input {source}"), pyarrow.parquet.ParquetFile(source) as file:
        names = file.schema_arrow.names
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
