"""Files of a folder's tasks: which are read, and what is said of rows that mteb could not take."""

from __future__ import annotations

import gzip
import json

import pytest

from conftest import write_gzipped
from promptembedder import PromptEmbedderError

pytest.importorskip("mteb", reason="mteb is not installed: pip install 'promptembedder[evaluate]'")

from promptembedder import evaluation


def refusal(use, *arguments):
    with pytest.raises(PromptEmbedderError) as caught:
        use(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def unpack(path):
    path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
    path.unlink()


def datasets(folder):
    tasks = {task.metadata.name: task for task in evaluation.local_tasks(folder)}
    for task in tasks.values():
        task.load_data()
    return {name: repr(_rows_of(task.dataset)) for name, task in tasks.items()}


def _rows_of(dataset):
    if isinstance(dataset, dict):
        return {name: _rows_of(part) for name, part in sorted(dataset.items())}
    return dataset.to_dict() if hasattr(dataset, "to_dict") else dataset


def test_plain_files_are_read_as_packed_ones(task_folder):
    packed = datasets(task_folder)
    revisions = {task.metadata.name: task.metadata.dataset["revision"] for task in evaluation.local_tasks(task_folder)}
    for path in sorted(task_folder.rglob("*.gz")):
        unpack(path)
    assert not list(task_folder.rglob("*.gz"))
    assert datasets(task_folder) == packed
    before = {task.metadata.name: task.metadata.dataset["revision"] for task in evaluation.local_tasks(task_folder)}
    assert before.keys() == revisions.keys()
    for name in ("sts/Similar.jsonl", "classification/Class.train.jsonl", "retrieval/Find/qrels.jsonl"):
        path = task_folder / name
        path.write_text("\n" + path.read_text())
    after = {task.metadata.name: task.metadata.dataset["revision"] for task in evaluation.local_tasks(task_folder)}
    assert {name for name in after if after[name] != before[name]} == {"Similar", "Class", "Find"}


def test_a_file_that_is_there_twice_or_not_at_all(task_folder):
    same = task_folder / "sts" / "Similar.JSONL"
    same.write_text("{}\n")
    (task,) = evaluation.local_tasks(task_folder, ["Similar"])
    told = refusal(task.load_data)
    assert told == f"{task_folder}/sts/Similar.jsonl.gz is there twice (Similar.JSONL and Similar.jsonl.gz); keep one"
    (task_folder / "classification" / "Class.train.jsonl.gz").unlink()
    (task,) = evaluation.local_tasks(task_folder, ["Class"])
    assert refusal(task.load_data) == f"{task_folder}/classification/Class.train.jsonl.gz is missing"


def test_folders_without_tasks(task_folder, tmp_path):
    for folder, why in (
        (tmp_path / "none", "no such folder"),
        (task_folder / "sts", f"it is a folder of one kind of task; give its parent, {task_folder}"),
        (task_folder / "sts" / "..", None),
        (
            tmp_path / "out",
            "expected folders such as sts, classification, clustering, with NAME.jsonl or",
        ),
    ):
        (tmp_path / "out").mkdir(exist_ok=True)
        if why is None:
            assert evaluation.local_tasks(folder)
        else:
            assert refusal(evaluation.local_tasks, folder).startswith(f"no tasks in {folder}: {why}")


def test_the_home_folder(task_folder, monkeypatch):
    monkeypatch.setenv("HOME", str(task_folder.parent))
    (task_folder / "instructions.json").write_text("{}")
    assert len(evaluation.local_tasks("~/data")) == len(evaluation.local_tasks(task_folder))
    assert evaluation.read_instructions("~/data/instructions.json") == {}


def test_labels_of_two_types_in_two_files(task_folder, tmp_path, command):
    place = task_folder / "classification"
    write_gzipped(place / "Class.test.jsonl.gz", [{"text": "a", "label": "0"}])
    done = command("evaluate", "nowhere", "--data", task_folder, "--suite", "full", "--task", "Class")
    assert done.code == 2
    there = f"{place}/Class.train.jsonl.gz, line 1"
    assert done.err.strip() == (
        f"promptembedder: {place}/Class.test.jsonl.gz, line 1: 'label' is '0', of another kind than 0 ({there})"
    )


@pytest.mark.parametrize(
    ("file", "row", "message"),
    [
        ("sts/Similar", {"sentence1": "\ud800", "sentence2": "b", "score": 1}, "'sentence1' is '\\ud800', expected a"),
        ("sts/Similar", {"sentence1": "a", "sentence2": "b", "score": 10**400}, "'score' is '1000"),
        ("clustering/Groups", {"text": "a", "label": 2**70}, "'label' is '1180591620717411303424', expected a text or"),
        ("classification/Class.train", {"text": "a", "label": True}, "'label' is True, of another kind than 0"),
        ("summarization/Short", {"human_summaries": ["a"], "machine_summaries": ["b"], "relevance": [True]}, "'rele"),
        ("retrieval/Find/corpus", {"_id": "x", "text": "a", "title": 7}, "'title' is '7', expected a text"),
        ("sts/Similar", ["a"], "found a JSON array, expected one JSON object per line"),
        ("sts/Similar", "a", "found str, expected one JSON object per line"),
    ],
)
def test_a_row_that_tables_cannot_hold_is_named(task_folder, file, row, message):
    path = task_folder / f"{file}.jsonl.gz"
    rows = [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().splitlines()]
    write_gzipped(path, [*rows, row])
    task = file.split("/")[1].split(".")[0]
    (task,) = evaluation.local_tasks(task_folder, [task])
    told = refusal(task.load_data)
    assert told.startswith(f"{path}, line {len(rows) + 1}: ")
    assert message in told


def test_grades_that_do_not_fit_the_summaries(task_folder):
    path = task_folder / "summarization" / "Short.jsonl.gz"
    write_gzipped(path, [{"human_summaries": ["a"], "machine_summaries": ["b", "c"], "relevance": [1]}])
    (task,) = evaluation.local_tasks(task_folder, ["Short"])
    assert refusal(task.load_data) == (f"{path}: the row of 'b' has 1 grades in 'relevance' for 2 machine summaries")


def test_whole_and_broken_numbers_in_one_column(task_folder):
    path = task_folder / "sts" / "Similar.jsonl.gz"
    scores = [1, 2.5, 2**60]
    write_gzipped(path, [{"sentence1": "a", "sentence2": "b", "score": score} for score in scores])
    (task,) = evaluation.local_tasks(task_folder, ["Similar"])
    task.load_data()
    assert task.dataset["test"]["score"][:] == [float(score) for score in scores]
