"""Lines, JSON, Parquet and hub datasets, read row by row, with the place of each for errors."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from promptembedder.errors import PromptEmbedderError, needs_extra, shown
from promptembedder.paths import ending, expanded, unreadable
from promptembedder.text import is_unicode

DATA_ENV = "PROMPTEMBEDDER_DATA"
_HUB_MARK = "hub:"


def data_path(path: str, root: str | None) -> Path:
    """A data file's place: absolute, or below `root`, `$PROMPTEMBEDDER_DATA` or the current folder."""
    base = root or os.environ.get(DATA_ENV) or "."
    return expanded(base) / expanded(path)


def read_lines(path: Path) -> Iterator[str]:
    """Yield the lines of a text file, plain or gzip, with their ends; a byte order mark is none of the text.

    Raises:
        PromptEmbedderError: file missing, gzip damaged, not UTF-8.
    """
    opened = gzip.open if ending(path).endswith(".gz") else open
    read = 0
    try:
        # Lines end where they end on standard input: a lone carriage return is part of a text.
        with opened(path, "rt", encoding="utf-8-sig", newline="\n") as lines:
            for line in lines:
                read += 1
                yield line
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise PromptEmbedderError(f"{path} is a damaged gzip file: {error}") from None
    except UnicodeDecodeError as error:
        # Read ahead in blocks, so which line it is in is not known.
        raise PromptEmbedderError(f"{path} is not UTF-8 text: {error.reason} after line {read}") from None
    except OSError as error:
        raise PromptEmbedderError(f"{path} cannot be read: {error.strerror or error}") from None


def read_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (place, value) for every line of a JSONL file, plain or gzip; blank lines are skipped.

    Raises:
        PromptEmbedderError: as `read_lines`, or a line is not JSON.
    """
    for number, line in enumerate(read_lines(path), 1):
        if line.strip():
            where = f"{path}, line {number}"
            yield where, parse_json_line(line, where)


def parse_json_line(line: str, where: str) -> Any:
    """Read the JSON value of a line of JSONL, which is no array.

    Raises:
        PromptEmbedderError: as `parse_json`, or the file holds one JSON array in place of an object per line.
    """
    if line.lstrip().startswith("["):
        raise PromptEmbedderError(f"{where}: found a JSON array, expected one JSON object per line")
    if line.strip() == "{":
        raise PromptEmbedderError(f"{where}: found an object over several lines, expected one JSON object per line")
    return parse_json(line, where)


def parse_json(line: str, where: str) -> Any:
    """Read one JSON value.

    Raises:
        PromptEmbedderError: not JSON, or nested or numbered beyond what Python reads.
    """
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise PromptEmbedderError(f"{where}: not JSON ({error.msg} at column {error.colno})") from None
    except (ValueError, RecursionError) as error:
        raise PromptEmbedderError(f"{where}: JSON that cannot be read ({error})") from None


def records(path: str, root: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (place, row) of a file or hub dataset; errors as in `load_training_data`."""
    for where, record in _raw_records(path, root):
        if not isinstance(record, dict):
            raise PromptEmbedderError(f"{where}: found {type(record).__name__}, expected one JSON object per line")
        yield where, record


def _raw_records(path: str, root: str | None) -> Iterator[tuple[str, Any]]:
    if path.startswith(_HUB_MARK):
        name = path.removeprefix(_HUB_MARK)
        if not name:
            raise PromptEmbedderError(f"data file {path!r} names no dataset, expected hub:owner/name")
        with needs_extra("train", "a dataset from the hub"):
            from datasets import load_dataset
        try:
            table = load_dataset(name, split="train")
        except Exception as error:  # of the library, of its HTTP client, of whatever reads the files
            reason = " ".join(str(error).split())[:300]
            raise PromptEmbedderError(f"dataset {name!r} could not be fetched from the hub: {reason}") from error
        yield from ((f"{path}, row {n + 1}", row) for n, row in enumerate(table))
        return
    file = data_path(path, root)
    if (closed := unreadable(file)) is not None:
        anywhere = not (os.path.exists(file) or root or os.environ.get(DATA_ENV) or file.is_absolute())
        hint = f"; set data.root or {DATA_ENV}" if anywhere else ""
        raise PromptEmbedderError(f"data file {file} cannot be read: {closed}{hint}")
    if ending(file) == ".parquet":
        yield from _parquet(file)
    elif ending(file) in (".jsonl", ".jsonl.gz"):
        yield from read_jsonl(file)
    else:
        raise PromptEmbedderError(f"data file {file}: unknown kind, expected .jsonl, .jsonl.gz, .parquet or hub:NAME")


def _parquet(file: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow.parquet

    with reading_parquet(f"data file {file}"):
        rows = pyarrow.parquet.read_table(file).to_pylist()
    yield from ((f"{file}, row {n + 1}", row) for n, row in enumerate(rows))


@contextmanager
def reading_parquet(what: str) -> Iterator[None]:
    """What pyarrow says of a damaged file, and of values that Python has none for, as one line.

    Raises:
        PromptEmbedderError: the file cannot be read.
    """
    import pyarrow

    try:
        yield
    except PromptEmbedderError:
        raise
    except (OSError, pyarrow.ArrowException, ValueError, OverflowError, TypeError, KeyError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:300]
        raise PromptEmbedderError(f"{what} cannot be read as Parquet: {reason}") from error


def text_field(record: dict[str, Any], field: str, where: str) -> str:
    """A field of a row that must be a non-empty string.

    Raises:
        PromptEmbedderError: it is missing or something else.
    """
    if field not in record or record[field] is None:
        raise PromptEmbedderError(f"{where}: field {field!r} is missing")
    value = record[field]
    if not isinstance(value, str) or not value.strip() or not is_unicode(value):
        raise PromptEmbedderError(f"{where}: field {field!r} is {shown(value)}, expected a non-empty string")
    return value


def texts_field(record: dict[str, Any], field: str, where: str, at_least: int) -> tuple[str, ...]:
    """A field of a row that must be a list of non-empty strings, missing or null being an empty one.

    Raises:
        PromptEmbedderError: it is something else, or holds fewer than `at_least`.
    """
    values = record.get(field)
    if values is None:
        values = []
    if not isinstance(values, list) or not all(isinstance(v, str) and v.strip() and is_unicode(v) for v in values):
        raise PromptEmbedderError(f"{where}: field {field!r} must be a list of non-empty strings")
    if len(values) < at_least:
        raise PromptEmbedderError(f"{where}: field {field!r} is empty, expected at least {at_least} text")
    return tuple(values)
