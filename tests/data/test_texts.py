"""Reading texts and writing embeddings: every format, bad input, and files that appear whole or not at all."""

from __future__ import annotations

import gzip
import io
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from promptembedder import PromptEmbedderError
from promptembedder.data.texts import parquet_id_type, read_texts

FLOAT32 = np.dtype(np.float32)


def read(source: object, kind: Any = None, **fields: str) -> list[tuple[Any, str]]:
    return list(read_texts(str(source), kind, **fields))


def refusal(source: object, kind: Any = None, **fields: str) -> str:
    with pytest.raises(PromptEmbedderError) as caught:
        read(source, kind, **fields)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def jsonl(*records: Any) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def write_records(path: Path, records: list[dict[str, Any]]) -> None:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    else:
        path.write_text(jsonl(*records))


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`stdin(data)`: what standard input will hold, decoded as Python does where the locale is C."""

    def put(data: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), "utf-8", errors="surrogateescape"))

    return put


# -- reading ----------------------------------------------------------------------------------------------------


def test_lines(tmp_path: Path) -> None:
    path = tmp_path / "texts.txt"
    path.write_bytes("größe\r\n  two words \nlast".encode())
    assert read(path) == [(0, "größe"), (1, "  two words "), (2, "last")]


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "parquet"])
def test_records_with_ids(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"texts.{ending}"
    records = [{"id": "a", "text": "größe"}, {"id": "b", "text": "two\nlines"}]
    if ending == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    else:
        data = jsonl(*records).encode()
        path.write_bytes(gzip.compress(data) if ending.endswith("gz") else data)
    assert read(path) == [("a", "größe"), ("b", "two\nlines")]


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_named_fields_and_numbers_where_no_row_has_an_id(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"texts.{ending}"
    records = [{"key": 7, "body": "x", "text": "no", "id": None}, {"key": 0, "body": "y", "text": "no", "id": None}]
    write_records(path, records)
    assert read(path, text_field="body", id_field="key") == [(7, "x"), (0, "y")]
    assert read(path, text_field="body") == [(0, "x"), (1, "y")]
    told = " 1: field 'kay' is missing; --id-field names another"
    assert refusal(path, text_field="body", id_field="kay").endswith(told)


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_ids_keep_their_type_and_none_is_made_up_among_them(tmp_path: Path, ending: str) -> None:
    path, place = tmp_path / f"texts.{ending}", "line" if ending == "jsonl" else "row"
    for ids in ([2, 1], ["2", "1"], [2.5, 1.0], *([[b"\x01", b"\x00"]] if ending == "parquet" else [])):
        write_records(path, [{"id": identity, "text": "x"} for identity in ids])
        found = [identity for identity, _ in read(path)]
        assert (found, [type(identity) for identity in found]) == (ids, [type(identity) for identity in ids])
    write_records(path, [{"id": 1, "text": "x"}, {"id": 2, "text": "y"}, {"id": None, "text": "z"}])
    assert refusal(path) == f"{path}, {place} 3: id is missing, and other rows have one; give all one, or none"
    assert [text for _, text in read_texts(str(path), None, ids=False)] == ["x", "y", "z"]
    write_records(path, [{"id": None, "text": "x"}, {"id": 0, "text": "y"}])
    assert refusal(path) == f"{path}, {place} 2: has an id, and rows before have none; give all one, or none"


@pytest.mark.parametrize("stored", ["int8", "uint64", "large_string", "binary", "float64", "date32"])
def test_the_type_of_a_parquet_files_ids(tmp_path: Path, stored: str) -> None:
    arrow = getattr(pyarrow, stored)()
    path = tmp_path / "texts.parquet"
    ids = pyarrow.array([1, 2]).cast(pyarrow.int32() if stored == "date32" else pyarrow.int64())
    ids = ids.cast(pyarrow.string()).cast(arrow) if stored == "binary" else ids.cast(arrow)
    pyarrow.parquet.write_table(pyarrow.table({"id": ids, "text": ["x", "y"]}), path)
    assert parquet_id_type(str(path), None) == arrow
    assert [identity for identity, _ in read(path)] == ids.to_pylist()
    assert parquet_id_type("-", "jsonl") is parquet_id_type("texts.txt", None) is None
    pyarrow.parquet.write_table(pyarrow.table({"id": [[1]], "text": ["x"]}), path)
    with pytest.raises(PromptEmbedderError, match=r"column 'id' is list<.*; ids must be integers, strings or bytes"):
        parquet_id_type(str(path), None)


def test_format_given_beats_the_ending(tmp_path: Path) -> None:
    path = tmp_path / "texts.txt"
    path.write_text(jsonl({"text": "x"}))
    assert read(path, "jsonl") == [(0, "x")]
    assert read(path) == [(0, '{"text": "x"}')]


def test_parquet_of_more_rows_than_one_read(tmp_path: Path) -> None:
    path = tmp_path / "texts.parquet"
    rows = [(n, f"text {n}") for n in range(2500)]
    pyarrow.parquet.write_table(pyarrow.table({"text": [text for _, text in rows]}), path)
    assert read(path) == rows


def test_standard_input(stdin: Any) -> None:
    stdin("größe\nlast".encode())
    assert read("-") == [(0, "größe"), (1, "last")]
    stdin(jsonl({"id": "a", "text": "x"}).encode())
    assert read("-", "jsonl") == [("a", "x")]
    stdin(b"")
    assert read("-") == []


def test_blank_lines_of_jsonl_are_skipped_in_files_and_on_standard_input(tmp_path: Path, stdin: Any) -> None:
    data = b'{"text": "x"}\n\n{"text": "y"}\n'
    (tmp_path / "texts.jsonl").write_bytes(data)
    stdin(data)
    assert read(tmp_path / "texts.jsonl") == [(0, "x"), (1, "y")]
    assert read("-", "jsonl") == [(0, "x"), (1, "y")]


def test_texts_are_read_one_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "texts.txt"
    path.write_text("good\n\n")
    texts = read_texts(str(path), None)
    assert next(texts) == (0, "good")
    with pytest.raises(PromptEmbedderError):
        next(texts)


BAD_RECORDS = {
    "empty": ([{"text": "x"}, {"text": " \n"}], "line 2: text is empty"),
    "number": ([{"text": 5}], "line 1: text is int, expected a string"),
    "null": ([{"text": None}], "line 1: text is NoneType, expected a string"),
    "missing": ([{"txt": "x"}], "line 1: field 'text' is missing; --text-field names another"),
    "no object": (["x"], "line 1: field 'text' is missing"),
    "same id": ([{"id": "a", "text": "x"}, {"id": "a", "text": "y"}], "line 2: id 'a' is used twice"),
    "same number": ([{"id": 1, "text": "x"}, {"id": 1, "text": "y"}], "line 2: id 1 is used twice"),
    "other type": ([{"id": 1, "text": "x"}, {"id": "1", "text": "y"}], "line 2: id '1' is str, expected int as in"),
    "id a list": ([{"id": [1], "text": "x"}], "line 1: id [1] is list, expected a string or an integer"),
    "id true": ([{"id": True, "text": "x"}], "line 1: id True is bool, expected a string or an integer"),
    "id not a number": ([{"id": 1.0, "text": "x"}, {"id": math.nan, "text": "y"}], "line 2: id is missing, and other"),
    "long id": ([{"id": 1 << 64, "text": "x"}], "line 1: id 18446744073709551616 does not fit into 64 bits"),
    "half a character in an id": ([{"id": "\ud800", "text": "x"}], "line 1: id is not valid UTF-8"),
    "half a character": ([{"text": "\ud800"}], "line 1: text "),
}


@pytest.mark.parametrize(("records", "told"), BAD_RECORDS.values(), ids=BAD_RECORDS.keys())
def test_bad_record_is_told_by_file_and_line(tmp_path: Path, stdin: Any, records: list[Any], told: str) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text(jsonl(*records))
    assert refusal(path).startswith(f"{path}, {told}")
    stdin(path.read_bytes())
    assert refusal("-", "jsonl").startswith(f"standard input, {told}")


def test_ids_that_are_of_no_use_may_repeat(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text(jsonl({"id": "a", "text": "x"}, {"id": "a", "text": "y"}))
    assert [text for _, text in read_texts(str(path), None, ids=False)] == ["x", "y"]


def test_empty_line(tmp_path: Path, stdin: Any) -> None:
    path = tmp_path / "texts.txt"
    path.write_text("x\n\ny\n")
    assert refusal(path) == f"{path}, line 2: text is empty"
    stdin(path.read_bytes())
    assert refusal("-") == "standard input, line 2: text is empty"


def test_lines_of_a_gzip_file(tmp_path: Path) -> None:
    path = tmp_path / "texts.txt.gz"
    path.write_bytes(gzip.compress("one\nzw\u00f6lf\r\n".encode()))
    assert read(path) == [(0, "one"), (1, "zw\u00f6lf")]


def test_what_is_none_of_a_text(tmp_path: Path, stdin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files and standard input give the same rows: no byte order mark, a lone carriage return within a text."""
    data = "\ufeffone\rtwo\r\ncaf\u00e9\n".encode()
    expected = [(0, "one\rtwo"), (1, "caf\u00e9")]
    path = tmp_path / "texts.txt"
    path.write_bytes(data)
    (tmp_path / "texts.txt.gz").write_bytes(gzip.compress(data))
    stdin(data)
    assert read(path) == read(tmp_path / "texts.txt.gz") == read("-") == expected
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), "latin-1"))  # as the locale says
    assert read("-") == expected
    path.write_bytes(b"\xef\xbb\xbf\n")
    assert refusal(path) == f"{path}, line 1: text is empty"


@pytest.mark.parametrize("name", ["texts.csv", "texts.tsv.gz", "texts.JSON"])
def test_endings_that_would_be_read_as_lines_by_mistake(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(b"id,text\n") if name.endswith("gz") else b"id,text\n")
    assert refusal(path).endswith("convert it, or name its format")
    assert read(path, "lines") == [(0, "id,text")]


@pytest.mark.parametrize("name", ["texts.ndjson", "texts.JSONL"])
def test_other_endings_of_jsonl(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(jsonl({"text": "x"}))
    assert read(tmp_path / name) == [(0, "x")]


def test_bad_parquet_is_told_by_column_or_row(tmp_path: Path) -> None:
    path = tmp_path / "texts.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"], "text": [1]}), path)
    assert refusal(path, text_field="txt") == f"{path} has no column 'txt', only body, text"
    assert refusal(path) == f"{path}, row 1: text is int, expected a string"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x", " "]}), path)
    assert refusal(path) == f"{path}, row 2: text is empty"


def test_not_json(tmp_path: Path, stdin: Any) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "x"}\n{"text": \n')
    assert refusal(path).startswith(f"{path}, line 2: not JSON (")
    stdin(path.read_bytes())
    assert refusal("-", "jsonl").startswith("standard input, line 2: not JSON (")


def test_not_utf8(tmp_path: Path, stdin: Any) -> None:
    for name in ("texts.txt", "texts.jsonl"):
        path = tmp_path / name
        path.write_bytes(b'{"text": "caf\xe9"}\n')
        assert refusal(path) == f"{path} is not UTF-8 text: invalid continuation byte after line 0"
    stdin(b"caf\xe9\n")
    assert "standard input" in refusal("-")


def test_damaged_files(tmp_path: Path) -> None:
    table = tmp_path / "texts.parquet"
    table.write_bytes(b"PAR1")
    for packed in (tmp_path / "texts.jsonl.gz", tmp_path / "texts.txt.gz"):
        packed.write_bytes(gzip.compress(jsonl({"text": "x"}).encode())[:-5])
        assert refusal(packed).startswith(f"{packed} is a damaged gzip file: ")
    assert refusal(table).startswith(f"input {table} cannot be read as Parquet: ")


@pytest.mark.parametrize("name", ["none.txt", "none.jsonl", "none.jsonl.gz", "none.parquet"])
def test_missing_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    for path in (name, str(tmp_path / name)):
        message = refusal(path)
        assert path in message
        assert "cannot be read" in message
        assert "No such file" in message
        assert "data.root" not in message  # a setting of training, no help here


# -- writing ----------------------------------------------------------------------------------------------------
