"""Tasks from folders: sampled, numbered by their rows, refused where rows cannot be scored."""

from __future__ import annotations

import gzip
import json
import math

import numpy as np
import pytest

from conftest import MANY, write_gzipped
from promptembedder import PromptEmbedderError, evaluation
from promptembedder.evaluation import task_rows
from promptembedder.evaluation.tasks import InstructionTriplets

pytest.importorskip("mteb", reason="mteb is not installed: pip install 'promptembedder[evaluate]'")


def test_triplets_need_the_instruction(task_folder, tmp_path):
    """Blind to the instruction: exactly half, and no pair right in both orders."""

    class Oracle:
        def __init__(self, reads):
            self.reads = reads

        def encode_under(self, texts, instruction, **kwargs):
            angle = [MANY.index(text) * (1 if instruction == "by topic" or not self.reads else -1) for text in texts]
            # By tone the farther text is the positive one.
            step = 0.1 if instruction == "by topic" or not self.reads else 2.2
            return np.array([[np.cos(a * step), np.sin(a * step)] for a in angle])

    (task,) = evaluation.local_tasks(task_folder, ["Swapped"])
    task.load_data()
    rows = task.dataset["test"]
    blind = InstructionTriplets._evaluate_subset(task, Oracle(reads=False), rows, encode_kwargs={})
    assert blind == {"accuracy": 0.5, "both_orders": 0.0}
    reads = InstructionTriplets._evaluate_subset(task, Oracle(reads=True), rows, encode_kwargs={})
    assert reads == {"accuracy": 1.0, "both_orders": 1.0}
    assert task._calculate_descriptive_statistics_from_split("test") == {"num_samples": len(rows)}


def test_sampling_is_fixed_and_part_of_the_revision(task_folder, monkeypatch):
    monkeypatch.setattr(evaluation.tasks, "QUICK", {"Similar": 7, "Swapped": 6, "Find": 16})
    tasks = {task.metadata.name: task for task in evaluation.local_tasks(task_folder, quick=True)}
    full = {task.metadata.name: task for task in evaluation.local_tasks(task_folder, list(tasks))}
    for name, task in tasks.items():
        task.load_data()
        assert task.metadata.dataset["revision"] != full[name].metadata.dataset["revision"]
        assert "sampled with seed" in task.metadata.description
    assert len(tasks["Similar"].dataset["test"]) == 7
    triplets = tasks["Swapped"].dataset["test"]
    assert len(triplets) == 6
    assert [row["anchor"] for row in triplets][::2] == [row["anchor"] for row in triplets][1::2]  # whole pairs
    found = tasks["Find"].dataset["default"]["test"]
    assert len(found["queries"]) == 2
    assert len(found["corpus"]) == 16
    held = set(found["corpus"]["id"])
    assert all(name in held for names in found["relevant_docs"].values() for name in names)


def test_changed_rows_are_another_revision(task_folder):
    (before,) = evaluation.local_tasks(task_folder, ["Similar"])
    write_gzipped(task_folder / "sts" / "Similar.jsonl.gz", [{"sentence1": "a", "sentence2": "b", "score": 1}])
    (after,) = evaluation.local_tasks(task_folder, ["Similar"])
    assert before.metadata.dataset["revision"] != after.metadata.dataset["revision"]


@pytest.mark.parametrize(
    ("file", "row", "message"),
    [
        ("sts/Similar", {"sentence1": "a", "sentence2": "b", "score": "1"}, "'score' is '1', expected a number"),
        ("sts/Similar", {"sentence1": "a", "sentence2": "b", "score": math.nan}, "'score' is 'nan', expected a number"),
        (
            "pair_classification/Same",
            {"sentence1": "a", "sentence2": "b", "label": 0.7},
            "'label' is '0.7', expected 0 or 1",
        ),
        ("sts/Similar", {"sentence1": 7, "sentence2": "b", "score": 1}, "'sentence1' is '7', expected a text"),
        ("classification/Class.test", {"text": "a", "label": "x"}, "'label' is 'x', of another kind than 0 ("),
        ("clustering/Groups", {"text": "a", "label": [1]}, "expected a text or a whole number"),
        ("reranking/Order", {"query": "a", "positive": [], "negative": []}, "'positive' is '[]', expected a list"),
        (
            "summarization/Short",
            {"human_summaries": [], "machine_summaries": ["a"], "relevance": [1]},
            "'human_summaries' is '[]', expected a list of texts",
        ),
    ],
)
def test_a_bad_row_is_named_before_the_model_opens(task_folder, tmp_path, monkeypatch, command, file, row, message):
    path = task_folder / f"{file}.jsonl.gz"
    rows = [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().splitlines()]
    write_gzipped(path, [*rows, row])
    task = path.name.split(".")[0]
    done = command("evaluate", "nowhere", "--data", task_folder, "--suite", "full", "--task", task)
    assert done.code == 2
    assert f"{path.name}:{len(rows) + 1}: " in done.err or f"{path.name}, line {len(rows) + 1}: " in done.err
    assert message in done.err


@pytest.mark.parametrize(
    ("file", "rows", "message"),
    [
        ("sts/One", [{"sentence1": "a", "sentence2": "b", "score": 1}], "holds one row; a rank correlation needs two"),
        ("classification/One.train", [{"text": "a", "label": "x"}] * 9, "holds one label only, 'x'; expected at least"),
        (
            "retrieval/Find/qrels",
            [{"query-id": "q1", "corpus-id": "1", "score": 0.5}],
            "'0.5', expected a whole number",
        ),
        (
            "retrieval/Find/qrels",
            [{"query-id": "q1", "corpus-id": "1", "score": n} for n in (1, 2)],
            "judges '1' for 'q1' in two ways",
        ),
        ("retrieval/Find/corpus", [{"_id": "1", "text": "a"}, {"_id": 1, "text": "b"}], "id 1 is used twice"),
        ("retrieval/Find/qrels", [{"query-id": "q9", "corpus-id": "1", "score": 1}], "judges 'q9', which is nowhere"),
        ("retrieval/Find/qrels", [{"query-id": "q1", "corpus-id": "99", "score": 1}], "judges '99', which is nowhere"),
    ],
)
def test_rows_that_cannot_be_scored_are_refused_before_the_model_opens(task_folder, command, file, rows, message):
    write_gzipped(task_folder / f"{file}.jsonl.gz", rows)
    write_gzipped(task_folder / "classification" / "One.test.jsonl.gz", [{"text": "a", "label": "x"}])
    task = "Find" if file.startswith("retrieval") else "One"
    if file.startswith("sts"):
        (task_folder / "classification" / "One.test.jsonl.gz").unlink()
    done = command("evaluate", "nowhere", "--data", task_folder, "--suite", "full", "--task", task)
    assert (done.code, len(done.err.strip().splitlines())) == (2, 1)
    assert message in done.err


def test_files_that_are_no_tasks(task_folder):
    (task_folder / "sts" / "README.md").write_text("words")
    assert "README.md" not in [task.metadata.name for task in evaluation.local_tasks(task_folder)]
    write_gzipped(task_folder / "sts" / "Empty.jsonl.gz", [])
    with pytest.raises(PromptEmbedderError, match=r"Empty\.jsonl\.gz holds no rows"):
        evaluation.local_tasks(task_folder, ["Empty"])[0].load_data()
    write_gzipped(task_folder / "clustering" / "Similar.jsonl.gz", [{"text": "a", "label": 1}])
    with pytest.raises(PromptEmbedderError, match="two tasks are named Similar"):
        evaluation.local_tasks(task_folder)


@pytest.mark.slow
def test_tasks_of_the_hub_have_instructions(encoder):
    (given, bare) = evaluation.hub_tasks(["ArguAna", "STS15"])
    assert encoder.made_with(given.metadata)["instruction"] == given.metadata.prompt["query"]
    assert encoder.made_with(bare.metadata)["instruction"] == type(bare).abstask_prompt
    (ours, other) = evaluation.hub_tasks(["ArguAna", "STS15"], {"ArguAna": "Find the other side."})
    assert encoder.made_with(ours.metadata)["instruction"] == "Find the other side."
    assert encoder.made_with(other.metadata) == encoder.made_with(bare.metadata)
    assert type(ours).metadata.prompt == given.metadata.prompt  # others of the class are as they were
    assert len(evaluation.hub_tasks(["BEIR"])) > 10


def test_quick_classes_are_thinned_per_label(task_folder, monkeypatch):
    monkeypatch.setattr(evaluation.tasks, "QUICK", {"Class": 7})
    monkeypatch.setattr(task_rows, "QUICK_TRAIN_PER_LABEL", 4)
    (task,) = evaluation.local_tasks(task_folder, quick=True)
    task.load_data()
    assert len(task.dataset["test"]) == 7
    assert sorted(task.dataset["train"]["label"]) == [0] * 4 + [1] * 4 + [2] * 4


def test_a_missing_label_is_named(task_folder, tmp_path, encoder):
    write_gzipped(task_folder / "clustering" / "Groups.jsonl.gz", [{"text": "a", "label": "x"}, {"text": "b"}])
    with pytest.raises(PromptEmbedderError, match=r"Groups.jsonl.gz.*2.*'label' is missing; a row of this task has"):
        evaluation.evaluate(encoder, evaluation.local_tasks(task_folder, ["Groups"]), tmp_path / "results")
