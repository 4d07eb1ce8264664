"""Embeddings to a file, batch by batch; the file appears when all are written.

Shapes: B texts of a batch, N texts in all, E embedding width.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from promptembedder import atomic
from promptembedder.errors import PromptEmbedderError, needs_extra
from promptembedder.paths import ending


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
    if ending(path) not in makers:
        raise PromptEmbedderError(f"output {path}: unknown ending {path.suffix!r}, expected .npy or .parquet")
    with ExitStack() as stack:
        with _naming(path):
            scratch = stack.enter_context(atomic.replacing(path))
            writer = makers[ending(path)](scratch, width, dtype)
        # Errors of the block are the caller's: only the writer's own are reported as a failure of the output.
        yield _Checked(writer, path, width)
        with _naming(path):
            writer.close()
            stack.close()


@contextmanager
def _naming(path: Path) -> Iterator[None]:
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
        with _naming(self._path):
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
        with needs_extra("parquet", "writing Parquet"):
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
