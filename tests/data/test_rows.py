"""Training rows and scored pairs: every file kind, how rows are sorted into datasets, and what bad rows are told."""

from __future__ import annotations

import gzip
import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from promptembedder import PromptEmbedderError
from promptembedder.data.readers import DATA_ENV
from promptembedder.data.rows import Row, TrainingData, load_training_data, read_rows
from promptembedder.data.scored_pairs import read_scored_pairs
from promptembedder.data.settings import DataConfig, DataFile

ENDINGS = ["jsonl", "jsonl.gz", "parquet"]
GOOD: dict[str, Any] = {"query": "q", "pos": ["p"], "neg": ["n"], "instruction": "Find."}
PAIR: dict[str, Any] = {"sentence1": "one", "sentence2": "two", "score": 2.5}
DOCUMENT = "Represent the document."


@pytest.fixture(autouse=True)
def _no_data_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(DATA_ENV, raising=False)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows as the file's ending says."""
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return path
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def load(*sources: Path | DataFile, seed: int = 1, **settings: Any) -> TrainingData:
    files = tuple(s if isinstance(s, DataFile) else DataFile(path=str(s)) for s in sources)
    return load_training_data(DataConfig(files=files, **settings), DOCUMENT, seed)


def queries(data: TrainingData) -> list[str]:
    return [query for dataset in data.datasets.values() for query in dataset["anchor"]]


def without(row: dict[str, Any], field: str) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != field}


def refusal(function: Callable[..., Any], *arguments: Any, **named: Any) -> str:
    with pytest.raises(PromptEmbedderError) as caught:
        function(*arguments, **named)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- good files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ENDINGS)
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, ending: str) -> None:
    written = [
        {"query": "größe", "pos": ["p1", "p2"], "neg": ["n1"], "instruction": "Find."},
        {"query": "two\nlines", "pos": ["p"], "neg": None, "instruction": "Sort."},
        {"query": "last", "pos": ["p"], "neg": [], "instruction": "Find."},
    ]
    source = DataFile(path=str(write(tmp_path / f"rows.{ending}", written)))
    assert list(read_rows(source, None)) == [
        Row("größe", ("p1", "p2"), ("n1",), "Find."),
        Row("two\nlines", ("p",), (), "Sort."),
        Row("last", ("p",), (), "Find."),
    ]


@pytest.mark.parametrize("ending", ENDINGS)
def test_scored_pairs(tmp_path: Path, ending: str) -> None:
    path = write(tmp_path / f"pairs.{ending}", [PAIR, {**PAIR, "sentence2": "three", "score": 0.0}])
    assert read_scored_pairs(str(path), None) == (["one", "one"], ["two", "three"], [2.5, 0.0])


def test_blank_lines_and_unknown_fields_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f"\n{json.dumps({**GOOD, 'source': 7})}\n  \n{json.dumps(GOOD)}")
    assert list(read_rows(DataFile(path=str(path)), None)) == [Row("q", ("p",), ("n",), "Find.")] * 2


def test_paths_start_from_root_else_environment_else_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in ("here", "environment", "root"):
        (tmp_path / place).mkdir()
        write(tmp_path / place / "rows.jsonl", [{**GOOD, "query": place}])
    monkeypatch.chdir(tmp_path / "here")
    relative = DataFile(path="rows.jsonl")
    assert queries(load(relative)) == ["here"]
    monkeypatch.setenv(DATA_ENV, str(tmp_path / "environment"))
    assert queries(load(relative)) == ["environment"]
    assert queries(load(relative, root=str(tmp_path / "root"))) == ["root"]
    assert queries(load(tmp_path / "here" / "rows.jsonl", root=str(tmp_path / "root"))) == ["here"]
    write(tmp_path / "root" / "pairs.jsonl", [PAIR, {**PAIR, "score": 1}])
    assert read_scored_pairs("pairs.jsonl", str(tmp_path / "root")) == (["one"] * 2, ["two"] * 2, [2.5, 1.0])


@pytest.mark.parametrize("count", [1, 3])
def test_pairs_of_one_score_have_no_rank_correlation(tmp_path: Path, count: int) -> None:
    path = write(tmp_path / "pairs.jsonl", [PAIR] * count)
    with pytest.raises(PromptEmbedderError, match=r"holds one score only \(2\.5\)"):
        read_scored_pairs(str(path), None)


# -- rows to datasets -------------------------------------------------------------------------------------------


def test_one_dataset_per_instruction_across_files(tmp_path: Path) -> None:
    first = write(tmp_path / "1.jsonl", [{**GOOD, "query": f"{n} {i}", "instruction": i} for n in "ab" for i in "FS"])
    second = write(tmp_path / "2.jsonl", [{**GOOD, "query": "c F", "instruction": "F"}])
    data = load(first, second)
    assert data.instructions == ["F", "S"]
    assert set(data.prompts) == set(data.datasets)
    by_instruction = {data.prompts[name]["anchor"]: dataset["anchor"][:] for name, dataset in data.datasets.items()}
    assert by_instruction == {"F": ["a F", "b F", "c F"], "S": ["a S", "b S"]}
    for name, dataset in data.datasets.items():
        assert set(data.prompts[name]) == set(dataset.column_names)
        assert len(set(data.prompts[name].values())) == 1


def test_documents_of_an_asymmetric_source_get_the_document_instruction(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{**GOOD, "neg": ["n", "m"]}])
    data = load(DataFile(path=str(path), asymmetric=True), DataFile(path=str(path)), max_negatives=2)
    columns = ["anchor", "positive", "negative_1", "negative_2"]
    assert [dataset.column_names for dataset in data.datasets.values()] == [columns, columns]
    asymmetric, symmetric = data.prompts.values()
    assert asymmetric == {"anchor": "Find.", "positive": DOCUMENT, "negative_1": DOCUMENT, "negative_2": DOCUMENT}
    assert symmetric == dict.fromkeys(columns, "Find.")
    assert data.instructions == ["Find.", DOCUMENT]


def test_instructions_are_kept_apart_whatever_characters_they_hold(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{**GOOD, "instruction": "a"}])
    other = write(tmp_path / "other.jsonl", [{**GOOD, "instruction": "a|b"}])
    files = (DataFile(path=str(path), asymmetric=True), DataFile(path=str(other)))
    data = load_training_data(DataConfig(files=files), "b|a|b", seed=1)
    assert sorted(columns["anchor"] for columns in data.prompts.values()) == ["a", "a|b"]


def test_rows_with_and_without_negatives_do_not_mix(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [GOOD, without({**GOOD, "query": "bare"}, "neg")])
    with_negative, bare = load(path).datasets.values()
    assert with_negative.to_dict() == {"anchor": ["q"], "positive": ["p"], "negative_1": ["n"]}
    assert bare.to_dict() == {"anchor": ["bare"], "positive": ["p"]}


def test_max_negatives_cuts_long_lists_and_repeats_short_ones(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{**GOOD, "neg": ["a", "b"]}, {**GOOD, "neg": ["a", "b", "c", "d"]}])
    (dataset,) = load(path, max_negatives=3).datasets.values()
    assert [dataset[f"negative_{n}"][:] for n in (1, 2, 3)] == [["a", "a"], ["b", "b"], ["a", "c"]]
    (none,) = load(path, max_negatives=0).datasets.values()
    assert none.column_names == ["anchor", "positive"]


def test_every_positive_makes_a_pair(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{**GOOD, "pos": ["p1", "p2", "p3"]}])
    (dataset,) = load(path).datasets.values()
    assert dataset.to_dict() == {"anchor": ["q"] * 3, "positive": ["p1", "p2", "p3"], "negative_1": ["n"] * 3}


@pytest.mark.parametrize(("weight", "times"), [(2.0, {2}), (0.5, {0, 1}), (2.5, {2, 3}), (1.0, {1})])
def test_weight(tmp_path: Path, weight: float, times: set[int]) -> None:
    names = [f"q{n}" for n in range(40)]
    path = write(tmp_path / "rows.jsonl", [{**GOOD, "query": name} for name in names])
    source = DataFile(path=str(path), weight=weight)
    drawn = queries(load(source))
    assert len(drawn) == weight * 40
    assert {Counter(drawn)[name] for name in names} == times
    assert queries(load(source)) == drawn
    if weight % 1:
        assert queries(load(source, seed=2)) != drawn


def test_max_rows_takes_the_first_ones(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{**GOOD, "query": str(n)} for n in range(5)])
    assert queries(load(DataFile(path=str(path), max_rows=2))) == ["0", "1"]
    assert queries(load(DataFile(path=str(path), max_rows=9))) == list("01234")


def test_aspects_of_instructions(tmp_path: Path) -> None:
    one, other = write(tmp_path / "a.jsonl", [GOOD]), write(tmp_path / "b.jsonl", [{**GOOD, "instruction": "Other."}])
    data = load(DataFile(path=str(one), aspect="topic"), DataFile(path=str(other)))
    assert data.aspects == {"Find.": "topic"}
    twice = [DataFile(path=str(one), aspect=aspect) for aspect in ("topic", "intent")]
    told = refusal(load, *twice)
    assert "two aspects, 'topic' and 'intent', for the instruction 'Find.'" in told


def test_sources_without_in_batch_negatives_are_datasets_of_their_own(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [GOOD])
    own = DataFile(path=str(path), in_batch_negatives=False)
    for negatives in (0, 1):
        data = load(path, own, max_negatives=negatives)
        (name,) = data.own_negatives
        assert data.datasets[name].to_dict() == {"anchor": ["q"], "positive": ["p"], "negative_1": ["n"]}
        assert len(data.datasets) == 2
    bare = DataFile(path=str(write(tmp_path / "bare.jsonl", [without(GOOD, "neg")])), in_batch_negatives=False)
    assert "bare.jsonl, line 1: field 'neg' is empty; with in_batch_negatives off every row needs one" in refusal(
        load, bare
    )


def test_own_negatives_are_never_repeated(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{**GOOD, "neg": ["a"]}, {**GOOD, "neg": ["a", "b", "c"]}])
    data = load(DataFile(path=str(path), in_batch_negatives=False), max_negatives=2)
    columns = [[name for name in table.column_names if name.startswith("neg")] for table in data.datasets.values()]
    assert columns == [["negative_1"], ["negative_1", "negative_2"]]
    assert data.own_negatives == set(data.datasets)


def test_a_source_gives_its_instruction_to_rows_without_one(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [without(GOOD, "instruction"), {**GOOD, "instruction": None}, GOOD])
    rows = read_rows(DataFile(path=str(path), instruction="Given."), None)
    assert [row.instruction for row in rows] == ["Given.", "Given.", "Find."]


# -- bad files --------------------------------------------------------------------------------------------------

BAD_ROWS = {
    "no query": (without(GOOD, "query"), "query", "missing"),
    "empty query": ({**GOOD, "query": " \n"}, "query", "non-empty string"),
    "number query": ({**GOOD, "query": 5}, "query", "5, expected a non-empty string"),
    "no pos": (without(GOOD, "pos"), "pos", "at least 1"),
    "empty pos": ({**GOOD, "pos": []}, "pos", "at least 1"),
    "pos not list": ({**GOOD, "pos": "p"}, "pos", "list of non-empty strings"),
    "number in pos": ({**GOOD, "pos": ["p", 1]}, "pos", "list of non-empty strings"),
    "empty text in pos": ({**GOOD, "pos": ["p", " "]}, "pos", "list of non-empty strings"),
    "neg not list": ({**GOOD, "neg": "n"}, "neg", "list of non-empty strings"),
    "null in neg": ({**GOOD, "neg": [None]}, "neg", "list of non-empty strings"),
    "no instruction": (without(GOOD, "instruction"), "instruction", "missing"),
    "empty instruction": ({**GOOD, "instruction": ""}, "instruction", "non-empty string"),
}


@pytest.mark.parametrize(("row", "field", "valid"), BAD_ROWS.values(), ids=BAD_ROWS.keys())
def test_bad_row_is_told_by_file_line_and_field(tmp_path: Path, row: dict[str, Any], field: str, valid: str) -> None:
    path = write(tmp_path / "rows.jsonl", [GOOD, row, GOOD])
    message = refusal(load, path)
    assert message.startswith(f"{path}, line 2: field '{field}' ")
    assert valid in message


def test_bad_row_of_a_parquet_file_is_told_by_row(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.parquet", [GOOD, {**GOOD, "query": None}])
    assert refusal(load, path) == f"{path}, row 2: field 'query' is missing"


BAD_PAIRS = {
    "no score": (without(PAIR, "score"), "score", "expected a number"),
    "string score": ({**PAIR, "score": "2.5"}, "score", "'2.5', expected a number"),
    "NaN score": ({**PAIR, "score": math.nan}, "score", "nan"),
    "infinite score": ({**PAIR, "score": math.inf}, "score", "inf"),
    "true score": ({**PAIR, "score": True}, "score", "True, expected a number"),
    "no sentence": (without(PAIR, "sentence2"), "sentence2", "missing"),
    "empty sentence": ({**PAIR, "sentence1": ""}, "sentence1", "non-empty string"),
}


@pytest.mark.parametrize(("pair", "field", "valid"), BAD_PAIRS.values(), ids=BAD_PAIRS.keys())
def test_bad_pair_is_told_by_file_line_and_field(tmp_path: Path, pair: dict[str, Any], field: str, valid: str) -> None:
    path = write(tmp_path / "pairs.jsonl", [PAIR, pair])
    message = refusal(read_scored_pairs, str(path), None)
    assert message.startswith(f"{path}, line 2: field '{field}' ")
    assert valid in message


@pytest.mark.parametrize("line", ["{'query': 'q'}", '{"query": ', "not json"])
def test_line_that_is_not_json(tmp_path: Path, line: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n\n{line}\n")
    assert refusal(load, path).startswith(f"{path}, line 3: not JSON (")


@pytest.mark.parametrize(("line", "found"), [("[1]", "a JSON array"), ("null", "NoneType"), ('"text"', "str")])
def test_line_that_is_no_object(tmp_path: Path, line: str, found: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(line)
    assert refusal(load, path) == f"{path}, line 1: found {found}, expected one JSON object per line"


def test_damaged_gzip(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl.gz", [{**GOOD, "query": str(n)} for n in range(2000)])
    path.write_bytes(path.read_bytes()[:-200])
    assert refusal(load, path).startswith(f"{path} is a damaged gzip file: ")
    path.write_bytes(b"plain text")
    assert refusal(load, path).startswith(f"{path} is a damaged gzip file: ")


def test_damaged_parquet(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"PAR1")
    assert refusal(load, path).startswith(f"data file {path} cannot be read as Parquet: ")


def test_file_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b'\n{"query": "caf\xe9"}\n')
    assert refusal(load, path).startswith(f"{path} is not UTF-8 text: ")


@pytest.mark.parametrize("read", [load, lambda path: read_scored_pairs(str(path), None)], ids=["rows", "pairs"])
def test_missing_file(tmp_path: Path, read: Callable[[Path], Any]) -> None:
    for name in ("none.jsonl", "none.jsonl.gz", "none.parquet"):
        message = refusal(read, tmp_path / name)
        assert str(tmp_path / name) in message
        assert "cannot be read" in message
        assert "No such file" in message


def test_missing_relative_file_says_how_to_set_the_folder() -> None:
    assert f"set data.root or {DATA_ENV}" in refusal(load, DataFile(path="none.jsonl"))


@pytest.mark.parametrize("name", ["rows.csv", "rows.json", "rows", "rows.txt.gz"])
def test_unknown_ending(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(json.dumps(GOOD))
    message = refusal(load, tmp_path / name)
    assert str(tmp_path / name) in message
    assert "expected .jsonl, .jsonl.gz, .parquet or hub:NAME" in message


@pytest.mark.parametrize("error", [RuntimeError("Dataset scripts are no longer supported"), ConnectionError("gone")])
def test_a_dataset_that_the_hub_does_not_give(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def failing(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr("datasets.load_dataset", failing)
    message = refusal(load, DataFile(path="hub:owner/name"))
    assert message == f"dataset 'owner/name' could not be fetched from the hub: {error}"


def test_rows_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    given = [{**GOOD, "query": "one"}, {**GOOD, "query": "two"}]
    monkeypatch.setattr("datasets.load_dataset", lambda name, split: given if split == "train" else [])
    rows = list(read_rows(DataFile(path="hub:owner/name"), None))
    assert [row.query for row in rows] == ["one", "two"]
    given[1] = {**GOOD, "query": ""}
    assert refusal(load, DataFile(path="hub:owner/name")).startswith("hub:owner/name, row 2: field 'query'")


def test_nothing_to_train_on(tmp_path: Path) -> None:
    assert "data.files is empty" in refusal(load)
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    assert str(empty) in refusal(load, empty)


def test_no_pairs(tmp_path: Path) -> None:
    empty = tmp_path / "pairs.jsonl"
    empty.write_text("")
    assert refusal(read_scored_pairs, str(empty), None) == f"{empty} holds no pairs"


def test_rows_that_contradict_themselves_are_counted_or_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    composed, apart = "gr\u00f6\u00dfe", "gro\u0308\u00dfe "
    rows = [
        GOOD,
        {**GOOD, "neg": ["other", "p"]},
        {**GOOD, "query": composed, "pos": ["p", apart]},
        {**GOOD, "neg": [" q"]},
        {**GOOD, "query": "p", "neg": ["\tp"]},  # of all three kinds
    ]
    path = write(tmp_path / "rows.jsonl", rows)
    data = load(DataFile(path=str(path), weight=2))
    assert len(queries(data)) == 12
    assert caplog.messages == [
        "rows that teach nothing or the wrong thing: 2 with `neg` equal to `pos`, 2 with `pos` equal to `query`, "
        f"2 with `neg` equal to `query` (first: {path}, line 2)"
    ]
    assert refusal(load, path, strict=True) == (
        f"{path}, line 2: `neg` equal to `pos`; mend the row, or set data.strict=false"
    )
    caplog.clear()
    load(DataFile(path=str(path), max_rows=1), strict=True)
    # Under two instructions a question may be the wrong answer to itself.
    write(path, [rows[3]])
    load(DataFile(path=str(path), asymmetric=True), strict=True)
    assert caplog.messages == []
    assert "line 1: `neg` equal to `query`" in refusal(load, path, strict=True)
