"""Embeddings to a file, batch by batch; the file appears when all are written.

Shapes: B texts of a batch, N texts in all, E embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from promptembedder import atomic
from promptembedder.errors import PromptEmbedderError, needs_extra
from promptembedder.paths import ending


class EmbeddingWriter(Protocol):
    """Takes embeddings batch by batch."""

    def write(self, ids: list[Any], embeddings_BE: NDArray[Any]) -> None:
        """Append a batch."""


@contextmanager
def embedding_writer(
    path: Path, width: int, dtype: np.dtype[Any], id_type: Any | None = None
) -> Iterator[EmbeddingWriter]:
    """Open a `.npy` (N, E) or `.parquet` (columns id, embedding) file for writing, atomically.

    The file appears under its name when the block ends without an error, and not at all otherwise.

    Args:
        path: where to write; the ending picks the format.
        width: E, as stored.
        dtype: of the stored values.
        id_type: Arrow type of the ids; unset: by the first of them.

    Raises:
        PromptEmbedderError: unknown ending; the path cannot be written, or holds something else than embeddings.
    """
    makers: dict[str, Callable[[Path], _NpyWriter | _ParquetWriter]] = {
        ".npy": lambda file: _NpyWriter(file, width, dtype),
        ".parquet": lambda file: _ParquetWriter(file, width, dtype, id_type),
    }
    if path.is_dir():
        raise PromptEmbedderError(f"output {path} is a folder, expected a file name ending in .npy or .parquet")
    if ending(path) not in makers:
        raise PromptEmbedderError(f"output {path}: unknown ending {path.suffix!r}, expected .npy or .parquet")
    with ExitStack() as stack:
        with _naming(path):
            _refuse_others(path)
            scratch = stack.enter_context(atomic.replacing(path))
            writer = stack.enter_context(closing(makers[ending(path)](scratch)))
        # Errors of the block are the caller's: only the writer's own are reported as a failure of the output.
        yield _Checked(writer, path, width)
        with _naming(path):
            writer.finish()
            stack.close()


def _refuse_others(path: Path) -> None:
    """Refuse to replace a file that holds anything but embeddings; an empty one is as good as none."""
    if not path.is_file() or path.stat().st_size == 0:
        return
    if not (_holds_array(path) if ending(path) == ".npy" else _holds_table(path)):
        raise PromptEmbedderError(f"output {path} exists and holds no embeddings; choose another file, or remove it")


def _holds_array(path: Path) -> bool:
    with path.open("rb") as file:
        try:
            if np.lib.format.read_magic(file) != (1, 0):
                return False
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        except ValueError:
            return False
    return len(shape) == 2 and str(dtype) in ("float32", "float16", "uint8")


def _holds_table(path: Path) -> bool:
    with needs_extra("parquet", "writing Parquet"):
        import pyarrow
        import pyarrow.parquet

    try:
        return list(pyarrow.parquet.read_schema(path).names) == ["id", "embedding"]
    except pyarrow.ArrowException:
        return False


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

    def write(self, ids: list[Any], embeddings_BE: NDArray[Any]) -> None:
        """Append a batch."""
        if embeddings_BE.shape != (len(ids), self._width):
            raise ValueError(f"embeddings are {embeddings_BE.shape}, expected {(len(ids), self._width)}")
        with _naming(self._path):
            self._writer.write(ids, embeddings_BE)


class _NpyWriter:
    """Header first, with no rows, and again at the end: numpy leaves room in it for their number."""

    def __init__(self, path: Path, width: int, dtype: np.dtype[Any]) -> None:
        self._width, self._dtype = width, dtype
        self._file = path.open("wb")
        self._count = 0
        self._write_header()

    def write(self, ids: list[Any], embeddings_BE: NDArray[Any]) -> None:
        """Append a batch."""
        self._file.write(np.ascontiguousarray(embeddings_BE, dtype=self._dtype).tobytes())
        self._count += len(ids)

    def finish(self) -> None:
        self._file.seek(0)
        self._write_header()
        self._file.close()

    def close(self) -> None:
        with suppress(OSError):  # after `finish`, or of no use
            self._file.close()

    def _write_header(self) -> None:
        shape = (self._count, self._width)
        descr = np.lib.format.dtype_to_descr(self._dtype)
        np.lib.format.write_array_header_1_0(self._file, {"descr": descr, "fortran_order": False, "shape": shape})


class _ParquetWriter:
    """The file is begun with the first batch, whose ids say what type they are."""

    def __init__(self, path: Path, width: int, dtype: np.dtype[Any], id_type: Any | None) -> None:
        with needs_extra("parquet", "writing Parquet"):
            import pyarrow
            import pyarrow.parquet

        self._arrow = pyarrow
        self._path, self._dtype, self._id_type = path, dtype, id_type
        self._type = pyarrow.list_(pyarrow.from_numpy_dtype(dtype), width)
        self._file: Any = None

    def write(self, ids: list[Any], embeddings_BE: NDArray[Any]) -> None:
        """Append a batch."""
        names = self._arrow.array(ids, type=self._id_type)
        self._begin(names.type)
        flat = self._arrow.array(np.ascontiguousarray(embeddings_BE, dtype=self._dtype).reshape(-1))
        column = self._arrow.FixedSizeListArray.from_arrays(flat, type=self._type)
        self._file.write_table(self._arrow.table([names, column], schema=self._file.schema))

    def finish(self) -> None:
        self._begin(self._arrow.int64())
        self._file.close()

    def close(self) -> None:
        with suppress(OSError):  # after `finish`, or of no use
            if self._file is not None:
                self._file.close()

    def _begin(self, id_type: Any) -> None:
        if self._file is None:
            self._id_type = self._id_type or id_type
            schema = self._arrow.schema([("id", self._id_type), ("embedding", self._type)])
            self._file = self._arrow.parquet.ParquetWriter(self._path, schema)
