"""Any bytes in a data file give rows or one line that names the file: valid files damaged by hypothesis, and noise."""

from __future__ import annotations

import datetime
import decimal
import gzip
import io
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from promptembedder import PromptEmbedderError
from promptembedder.config import dump_yaml
from promptembedder.data.rows import read_rows
from promptembedder.data.scored_pairs import read_scored_pairs
from promptembedder.data.settings import DataConfig, DataFile
from promptembedder.data.texts import parquet_id_type, read_texts
from promptembedder.training.settings import RunConfig, load_run

ROWS = [
    {"query": "größe", "pos": ["p1", "p2"], "neg": ["n1"], "instruction": "Find."},
    {"query": "two\nlines", "pos": ["p"], "neg": None, "instruction": "Sort."},
    {"query": "last", "pos": ["p"], "neg": [], "instruction": "Find."},
]
PAIRS = [{"sentence1": "one", "sentence2": f"zw\u00f6lf {n}", "score": n / 2} for n in range(4)]
TEXTS = [{"id": "a", "text": "gr\u00f6\u00dfe"}, {"id": "b", "text": "two\nlines"}, {"id": None, "text": "last"}]
FIELDS = sorted({field for rows in (ROWS, PAIRS, TEXTS) for row in rows for field in row})
# Said of a whole file; everything else names a line or row of it.
OF_FILES = re.compile(
    "damaged gzip file|not UTF-8 text: .* after line|cannot be read as Parquet|holds no pairs|holds one score only"
    "|has no column|convert it, or name its format|ids must be integers"
)

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
)
records = st.dictionaries(st.sampled_from(FIELDS), values, max_size=6) | values
edits = st.lists(
    st.tuples(
        st.sampled_from(["replace", "insert", "delete", "cut", "repeat"]), st.integers(0, 10**6), st.binary(max_size=5)
    ),
    min_size=1,
    max_size=6,
)


def damaged(data: bytes, changes: Iterable[tuple[str, int, bytes]]) -> bytes:
    for kind, at, new in changes:
        at %= len(data) + 1
        data = {
            "replace": data[:at] + new + data[at + len(new) :],
            "insert": data[:at] + new + data[at:],
            "delete": data[:at] + data[at + max(1, len(new)) :],
            "cut": data[:at],
            "repeat": data[:at] + data[max(0, at - 40) :],
        }[kind]
    return data


def jsonl(rows: Iterable[Any]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8", "surrogatepass")


def parquet(rows: list[Any]) -> bytes:
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue()


def odd_parquet() -> list[bytes]:
    """Parquet files of values that JSON does not know."""
    odd: list[Any] = [
        datetime.datetime(2024, 1, 1),
        decimal.Decimal("1.5"),
        b"\xff",
        datetime.timedelta(days=1),
        {"a": 1},
    ]
    columns = [pyarrow.array([value]) for value in odd]
    columns += [pyarrow.array([2**62], pyarrow.timestamp("us")), pyarrow.array(["x"]).dictionary_encode()]
    files = []
    for column in columns:
        sink = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.table(dict.fromkeys(FIELDS, column)), sink)
        files.append(sink.getvalue())
    return files


def contents(ending: str, rows: list[Any]) -> st.SearchStrategy[bytes]:
    """What a file of an ending may hold: damaged rows, rows of other values, noise; the same packed."""
    if ending == "parquet":
        whole = st.sampled_from([parquet(rows), *odd_parquet()])
        return whole | st.builds(damaged, st.just(parquet(rows)), edits) | st.binary(max_size=100)
    valid = "\n".join(str(row.get("text", row)) for row in rows).encode() if "txt" in ending else jsonl(rows)
    plain = st.builds(damaged, st.just(valid), edits) | st.builds(jsonl, st.lists(records, max_size=4))
    plain = plain | st.binary(max_size=100)
    if not ending.endswith("gz"):
        return plain
    packed = st.builds(lambda data: gzip.compress(data, mtime=0), plain)
    return packed | st.builds(damaged, st.just(gzip.compress(valid, mtime=0)), edits) | plain


def files(endings: Iterable[str], rows: list[Any]) -> st.SearchStrategy[tuple[str, bytes]]:
    """Ending and content of a file."""
    return st.one_of(*(st.tuples(st.just(ending), contents(ending, rows)) for ending in endings))


def try_all(
    request: pytest.FixtureRequest,
    folder: Path,
    content: st.SearchStrategy[tuple[str, bytes]],
    read: Callable[[str], Any],
) -> None:
    """Read a file of any such content: a result or one line that names file and line, and nothing else in the folder.

    Args:
        request: knows how many examples are wanted.
        folder: where to write; empty.
        content: ending and content of the file.
        read: the reader under test.
    """

    def once(made: tuple[str, bytes]) -> None:
        file = folder / f"data.{made[0]}"
        file.write_bytes(made[1])
        try:
            read(str(file))
        except PromptEmbedderError as error:
            message = str(error)
            assert len(message.splitlines()) == 1
            assert str(file) in message
            assert re.search(r"(line|row) \d", message) or OF_FILES.search(message) or file.suffix == ".yaml", message
        finally:
            left = list(folder.iterdir())
            file.unlink()
        assert left == [file]

    settings(
        max_examples=request.config.getoption("--fuzz-examples"),
        deadline=datetime.timedelta(seconds=20),
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )(given(content)(once))()


@pytest.mark.slow
def test_training_rows(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    def read(path: str) -> None:
        for row in read_rows(DataFile(path=path), None):
            assert all(text.encode().strip() for text in (row.query, row.instruction, *row.pos, *row.neg))
            assert row.pos

    try_all(request, tmp_path, files(["jsonl", "jsonl.gz", "parquet"], ROWS), read)


@pytest.mark.slow
def test_scored_pairs(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    def read(path: str) -> None:
        first, second, scores = read_scored_pairs(path, None)
        assert len(first) == len(second) == len(scores)

    try_all(request, tmp_path, files(["jsonl", "jsonl.gz", "parquet"], PAIRS), read)


@pytest.mark.slow
def test_texts(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    def read(path: str) -> None:
        parquet_id_type(path, None)
        for _, text in read_texts(path, None):
            assert text.encode().strip()

    try_all(request, tmp_path, files(["txt", "txt.gz", "jsonl", "ndjson.gz", "parquet", "csv"], TEXTS), read)


@pytest.mark.slow
def test_settings(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    valid = dump_yaml(RunConfig(data=DataConfig(files=(DataFile(path="rows.jsonl"),)))).encode()
    short = (
        b"model: {layout: suffix}\ndata:\n  files:\n  - {path: rows.jsonl, weight: 2.5}\ntraining:\n  max_steps: 9\n"
    )
    words = st.lists(
        st.sampled_from(
            [
                *":-[]{}&*!|>'\"%@,#? \n\t",
                "model",
                "data",
                "a",
                "1",
                "~",
                "<<",
                "2001-1-1",
                "!!timestamp",
                "!!int",
                "!!bool",
            ]
        )
    )
    noise = words.map(lambda parts: "".join(parts).encode()) | st.binary(max_size=60)
    content = st.builds(damaged, st.sampled_from([short, short, short, valid]), edits) | noise
    try_all(request, tmp_path, st.tuples(st.just("yaml"), content), lambda path: load_run(Path(path)))
