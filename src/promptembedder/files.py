"""Texts in, embeddings out: streaming readers and atomic writers for the `encode` command.

Shapes: B texts of a batch, N texts in all, E embedding width.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import IO, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from promptembedder import atomic
from promptembedder.data import parse_json, read_jsonl, read_lines
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


class EmbeddingWriter(Protocol):
    """Takes embeddings batch by batch."""

    def write(self, ids: list[str], embeddings_BE: NDArray[Any]) -> None:
        """Append a batch."""


@contextmanager
def embedding_writer(path: Path, width: int, dtype: np.dtype[Any]) -> Iterator[EmbeddingWriter]:
    """Open a `.npy` (N, E) or `.parquet` (columns id, embedding) file for writing, atomically.

    The file appears under its name when the block ends without an error, and not at all otherwise.

    Args:
        path: where to write; the ending picks the format.
        width: E, as stored.
        dtype: of the stored values.

    Raises:
        PromptEmbedderError: unknown ending, or the path cannot be written.
    """
    makers: dict[str, type[_NpyWriter] | type[_ParquetWriter]] = {".npy": _NpyWriter, ".parquet": _ParquetWriter}
    if path.is_dir():
        raise PromptEmbedderError(f"output {path} is a folder, expected a file name ending in .npy or .parquet")
    if path.suffix not in makers:
        raise PromptEmbedderError(f"output {path}: unknown ending {path.suffix!r}, expected .npy or .parquet")
    with ExitStack() as stack:
        with _told(path):
            scratch = stack.enter_context(atomic.replacing(path))
            writer = makers[path.suffix](scratch, width, dtype)
        # Errors of the block are the caller's: only what the writer does is told as a failure of the output.
        yield _Checked(writer, path, width)
        with _told(path):
            writer.close()
            stack.close()


@contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise PromptEmbedderError(f"output {path} cannot be written: {error.strerror or error}") from error


class _Checked:
    """A writer whose errors name the output, and which refuses embeddings of another width."""

    def __init__(self, writer: EmbeddingWriter, path: Path, width: int) -> None:
        self._writer, self._path, self._width = writer, path, width

    def write(self, ids: list[str], embeddings_BE: NDArray[Any]) -> None:
        """Append a batch."""
        if embeddings_BE.shape != (len(ids), self._width):
            raise ValueError(f"embeddings are {embeddings_BE.shape}, expected {(len(ids), self._width)}")
        with _told(self._path):
            self._writer.write(ids, embeddings_BE)


class _NpyWriter:
    """Rows first, header last: the number of rows is known only at the end."""

    def __init__(self, path: Path, width: int, dtype: np.dtype[Any]) -> None:
        self._path, self._width, self._dtype = path, width, dtype
        self._rows: IO[bytes] = tempfile.TemporaryFile(dir=path.parent)  # noqa: SIM115
        self._count = 0

    def write(self, ids: list[str], embeddings_BE: NDArray[Any]) -> None:
        """Append a batch."""
        self._rows.write(np.ascontiguousarray(embeddings_BE, dtype=self._dtype).tobytes())
        self._count += len(ids)

    def close(self) -> None:
        header = {
            "descr": np.lib.format.dtype_to_descr(self._dtype),
            "fortran_order": False,
            "shape": (self._count, self._width),
        }
        self._rows.seek(0)
        with self._path.open("wb") as sink:
            np.lib.format.write_array_header_1_0(sink, header)
            shutil.copyfileobj(self._rows, sink)
        self._rows.close()


class _ParquetWriter:
    def __init__(self, path: Path, width: int, dtype: np.dtype[Any]) -> None:
        import pyarrow
        import pyarrow.parquet

        self._arrow = pyarrow
        self._dtype = dtype
        self._type = pyarrow.list_(pyarrow.from_numpy_dtype(dtype), width)
        self._schema = pyarrow.schema([("id", pyarrow.string()), ("embedding", self._type)])
        self._file = pyarrow.parquet.ParquetWriter(path, self._schema)

    def write(self, ids: list[str], embeddings_BE: NDArray[Any]) -> None:
        """Append a batch."""
        flat = self._arrow.array(np.ascontiguousarray(embeddings_BE, dtype=self._dtype).reshape(-1))
        column = self._arrow.FixedSizeListArray.from_arrays(flat, type=self._type)
        self._file.write_table(self._arrow.table([self._arrow.array(ids), column], schema=self._schema))

    def close(self) -> None:
        self._file.close()


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
            yield where, parse_json(line, where)


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
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(source) as file:
            names = file.schema_arrow.names
            if text_field not in names:
                raise PromptEmbedderError(f"{source} has no column {text_field!r}, only {', '.join(names)}")
            columns = [text_field, *([id_field] if id_field in names else [])]
            n = 0
            for batch in file.iter_batches(columns=columns, batch_size=1024):
                for row in batch.to_pylist():
                    n += 1
                    yield f"{source}, row {n}", row.get(id_field), row[text_field]
    except (OSError, pyarrow.ArrowException) as error:
        raise PromptEmbedderError(
            f"input {source} cannot be read as Parquet: {getattr(error, 'strerror', None) or error}"
        ) from None


def _name(source: str) -> str:
    return "standard input" if source == "-" else source
