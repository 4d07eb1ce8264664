"""Writing embeddings: every format, whole or not at all."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from promptembedder import PromptEmbedderError
from promptembedder.bulk.writers import embedding_writer

FLOAT32 = np.dtype(np.float32)


@pytest.mark.parametrize("dtype", ["float32", "float16", "uint8"])
@pytest.mark.parametrize("sizes", [[3, 1, 4], [0, 2], [5000, 5000, 1], []], ids=str)
def test_npy_is_what_numpy_saves(tmp_path: Path, dtype: str, sizes: list[int]) -> None:
    batches = _batches(sizes, dtype)
    path = tmp_path / "new folder" / "vectors.npy"
    with embedding_writer(path, 16, np.dtype(dtype)) as writer:
        for batch in batches:
            writer.write([f"id {n}" for n in range(len(batch))], batch)
    expected = io.BytesIO()
    np.save(expected, np.concatenate([np.empty((0, 16), dtype), *batches]))
    assert path.read_bytes() == expected.getvalue()
    assert [p.name for p in path.parent.iterdir()] == ["vectors.npy"]


@pytest.mark.parametrize("dtype", ["float32", "float16", "uint8"])
@pytest.mark.parametrize("sizes", [[3, 1, 4], [5000, 5000, 1], []], ids=str)
def test_parquet_keeps_ids_and_values(tmp_path: Path, dtype: str, sizes: list[int]) -> None:
    batches = _batches(sizes, dtype)
    path = tmp_path / "vectors.parquet"
    with embedding_writer(path, 16, np.dtype(dtype)) as writer:
        for number, batch in enumerate(batches):
            writer.write([f"{number}-{n}" for n in range(len(batch))], batch)
    table = pyarrow.parquet.read_table(path)
    assert table.schema.names == ["id", "embedding"]
    assert table.schema.field("embedding").type == pyarrow.list_(pyarrow.from_numpy_dtype(dtype), 16)
    assert table["id"].to_pylist() == [f"{number}-{n}" for number, size in enumerate(sizes) for n in range(size)]
    values = np.array(table["embedding"].combine_chunks().flatten()).reshape(-1, 16)
    np.testing.assert_array_equal(values, np.concatenate([np.empty((0, 16), dtype), *batches]))
    assert [p.name for p in tmp_path.iterdir()] == ["vectors.parquet"]


def test_values_are_stored_in_the_dtype_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "vectors.npy"
    with embedding_writer(path, 2, np.dtype(np.float16)) as writer:
        writer.write(["a"], np.array([[0.1, 0.2]], dtype=np.float64))
    stored = np.load(path)
    assert stored.dtype == np.float16
    np.testing.assert_array_equal(stored, np.array([[0.1, 0.2]], dtype=np.float16))


@pytest.mark.parametrize("ending", ["npy", "parquet"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, PromptEmbedderError])
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path, ending: str, error: type[BaseException]) -> None:
    path = tmp_path / f"vectors.{ending}"
    for old in (None, b"", _embeddings(tmp_path, ending)):
        if old is not None:
            path.write_bytes(old)
        with pytest.raises(error):
            _write_and_stop(path, error)
        assert [p.read_bytes() for p in tmp_path.iterdir()] == ([] if old is None else [old])


@pytest.mark.parametrize("ending", ["npy", "parquet"])
def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"vectors.{ending}"
    old = _embeddings(tmp_path, ending)
    path.write_bytes(old)
    with embedding_writer(path, 4, FLOAT32) as writer:
        writer.write(["a"], np.ones((1, 4), np.float32))
        assert path.read_bytes() == old
    assert path.read_bytes() != old


@pytest.mark.parametrize("name", ["labels.npy", "words.npy", "rows.parquet", "bytes.npy", "bytes.parquet"])
def test_only_embeddings_are_replaced(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name.startswith("bytes"):
        path.write_bytes(b"no array, no table")
    elif path.suffix == ".npy":
        np.save(path, np.zeros((3, 4), np.int64) if name == "labels.npy" else np.zeros(3, np.float32))
    else:
        pyarrow.parquet.write_table(pyarrow.table({"id": [1], "text": ["x"]}), path)
    before = path.read_bytes()
    with pytest.raises(PromptEmbedderError, match="exists and holds no embeddings; choose another file") as caught:
        _write_and_stop(path, RuntimeError)
    assert str(path) in str(caught.value)
    assert path.read_bytes() == before


@pytest.mark.parametrize("ids", [[3, 1], ["b", "a"], [b"\x01", b"\x00"], [1.0, 0.5]], ids=str)
def test_parquet_keeps_the_type_of_ids(tmp_path: Path, ids: list[Any]) -> None:
    more = {3: [pyarrow.int8()], "b": [pyarrow.dictionary(pyarrow.int32(), pyarrow.string())]}
    for id_type in (None, *more.get(ids[0], [])):
        with embedding_writer(tmp_path / "v.parquet", 2, FLOAT32, id_type) as writer:
            for identity in ids:
                writer.write([identity], np.ones((1, 2), np.float32))
        found = pyarrow.parquet.read_table(tmp_path / "v.parquet")["id"]
        assert (found.to_pylist(), found.type) == (ids, id_type or pyarrow.array(ids).type)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("vectors.csv", "unknown ending '.csv', expected .npy or .parquet"),
        ("vectors", "unknown ending '', expected .npy or .parquet"),
        ("folder.npy", "is a folder"),
        ("file/vectors.npy", "cannot be written: "),
        ("file/deeper/vectors.parquet", "cannot be written: "),
    ],
)
def test_output_that_cannot_be(tmp_path: Path, name: str, told: str) -> None:
    (tmp_path / "folder.npy").mkdir()
    (tmp_path / "file").write_text("regular")
    with pytest.raises(PromptEmbedderError) as caught, embedding_writer(tmp_path / name, 4, FLOAT32):
        pytest.fail("opened")
    assert str(tmp_path / name) in str(caught.value)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "folder.npy"]


def _batches(sizes: list[int], dtype: str) -> list[np.ndarray]:
    drawn = np.random.default_rng(0)
    return [(100 * drawn.random((size, 16))).astype(dtype) for size in sizes]


def _embeddings(folder: Path, ending: str) -> bytes:
    path = folder / f"made.{ending}"
    with embedding_writer(path, 2, FLOAT32) as writer:
        writer.write(["old"], np.ones((1, 2), np.float32))
    content = path.read_bytes()
    path.unlink()
    return content


def _write_and_stop(path: Path, error: type[BaseException]) -> None:
    with embedding_writer(path, 4, FLOAT32) as writer:
        writer.write(["a"], np.ones((1, 4), np.float32))
        raise error("stop")


@pytest.mark.parametrize("name", ["VECTORS.NPY", "Vectors.Parquet"])
def test_endings_in_capitals(tmp_path, name):
    with embedding_writer(tmp_path / name, 2, np.dtype(np.float32)) as writer:
        writer.write(["a"], np.ones((1, 2), np.float32))
    assert (tmp_path / name).stat().st_size > 0
