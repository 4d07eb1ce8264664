"""Where data files are looked for, what their endings mean, and what is said of those that cannot be read."""

from __future__ import annotations

import gzip
import io
import json
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from promptembedder import PromptEmbedderError
from promptembedder.data.readers import DATA_ENV, data_path
from promptembedder.data.rows import read_rows
from promptembedder.data.scored_pairs import read_scored_pairs
from promptembedder.data.settings import DataFile
from promptembedder.data.texts import read_texts

ROW = {"query": "q", "pos": ["p"], "instruction": "Find.", "text": "x"}


def rows(path: Path) -> list[Any]:
    return list(read_rows(DataFile(path=str(path)), None))


def pairs(path: Path) -> Any:
    return read_scored_pairs(str(path), None)


def texts(path: object, kind: Any = None) -> list[str]:
    return [text for _, text in read_texts(str(path), kind)]


def refusal(read: Any, *arguments: Any) -> str:
    with pytest.raises(PromptEmbedderError) as caught:
        read(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_endings_in_capitals(tmp_path: Path) -> None:
    (tmp_path / "X.TXT.GZ").write_bytes(gzip.compress(b"one\ntwo\n"))
    assert texts(tmp_path / "X.TXT.GZ") == ["one", "two"]
    line = json.dumps(ROW).encode()
    for name, content in (("A.JSONL", line), ("B.Jsonl.GZ", gzip.compress(line))):
        (tmp_path / name).write_bytes(content)
        assert [row.query for row in rows(tmp_path / name)] == ["q"]
        assert texts(tmp_path / name) == ["x"]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([ROW]), tmp_path / "C.PARQUET")
    assert [row.query for row in rows(tmp_path / "C.PARQUET")] == ["q"]


def test_the_home_folder_in_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv(DATA_ENV, raising=False)
    assert data_path("~/rows.jsonl", None) == tmp_path / "rows.jsonl"
    assert data_path("rows.jsonl", "~/data") == tmp_path / "data" / "rows.jsonl"
    monkeypatch.setenv(DATA_ENV, "~/there")
    assert data_path("rows.jsonl", None) == tmp_path / "there" / "rows.jsonl"
    assert "~nobody-of-that-name/rows.jsonl cannot be read" in refusal(rows, Path("~nobody-of-that-name/rows.jsonl"))


@pytest.mark.parametrize("read", [rows, pairs])
@pytest.mark.parametrize("name", ["data.jsonl", "data.parquet"])
def test_files_that_are_there_and_cannot_be_read_are_not_called_missing(
    tmp_path: Path, closed: Any, read: Any, name: str
) -> None:
    path = tmp_path / name
    path.mkdir()
    assert refusal(read, path) == f"data file {path} cannot be read: Is a directory"
    path.rmdir()
    path.write_bytes(b"")
    closed(path)
    assert refusal(read, path) == f"data file {path} cannot be read: Permission denied"


@pytest.mark.parametrize("read", [rows, pairs, texts])
@pytest.mark.parametrize(
    ("indent", "found"), [(None, "a JSON array"), (2, "a JSON array")], ids=["on one line", "indented"]
)
def test_an_array_in_place_of_lines(tmp_path: Path, read: Any, indent: int | None, found: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps([ROW, ROW], indent=indent))
    assert refusal(read, path) == f"{path}, line 1: found {found}, expected one JSON object per line"


def test_one_indented_object(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(ROW, indent=2))
    told = f"{path}, line 1: found an object over several lines, expected one JSON object per line"
    assert refusal(rows, path) == refusal(texts, path) == told


def test_an_array_on_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(json.dumps([ROW]).encode())))
    told = "standard input, line 1: found a JSON array, expected one JSON object per line"
    assert refusal(texts, "-", "jsonl") == told
