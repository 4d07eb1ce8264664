"""Evaluation: mteb's figures for rows from a folder, equal to figures computed by hand; results kept; bad input."""

from __future__ import annotations

import gzip
import json
import re

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.metrics import average_precision_score

from conftest import INSTRUCTION, TEXTS
from promptembedder import PromptEmbedderError, save

pytest.importorskip("mteb", reason="mteb is not installed: pip install 'promptembedder[evaluate]'")

from promptembedder import evaluation
from promptembedder.evaluation.tasks import InstructionTriplets

MANY = [f"{text} {n}" for n in range(6) for text in TEXTS]


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def data(tmp_path):
    """A folder with one small task of every kind."""
    folder = tmp_path / "data"
    pairs = [
        {"sentence1": MANY[n], "sentence2": MANY[(3 * n + 1) % 30], "score": (n * 7) % 5, "label": n % 2}
        for n in range(20)
    ]
    write(folder / "sts" / "Similar.jsonl.gz", pairs)
    write(folder / "sts" / "Similar.dev.jsonl.gz", pairs)
    write(folder / "pair_classification" / "Same.jsonl.gz", pairs)
    labelled = [{"text": text, "label": n % 3} for n, text in enumerate(MANY)]
    for split in ("train", "test"):
        write(folder / "classification" / f"Class.{split}.jsonl.gz", labelled)
    write(folder / "clustering" / "Groups.jsonl.gz", [{"text": r["text"], "label": str(r["label"])} for r in labelled])
    write(
        folder / "reranking" / "Order.jsonl.gz",
        [{"query": MANY[n], "positive": [MANY[n + 1]], "negative": MANY[n + 2 : n + 5]} for n in range(6)],
    )
    corpus = [{"_id": str(n), "title": "", "text": text} for n, text in enumerate(MANY)]
    write(folder / "retrieval" / "Find" / "corpus.jsonl.gz", corpus)
    write(folder / "retrieval" / "Find" / "queries.jsonl.gz", [{"_id": f"q{n}", "text": MANY[n]} for n in range(5)])
    write(
        folder / "retrieval" / "Find" / "qrels.jsonl.gz",
        [{"query-id": f"q{n}", "corpus-id": str((n * 3 + 5) % 30), "score": 1} for n in range(5)],
    )
    write(
        folder / "summarization" / "Short.jsonl.gz",
        [
            {"human_summaries": MANY[n : n + 2], "machine_summaries": MANY[n + 2 : n + 6], "relevance": [1, 3, 2, 5]}
            for n in range(5)
        ],
    )
    triplets = []
    for n in range(10):
        first = {"instruction": "by topic", "anchor": MANY[n], "positive": MANY[n + 1], "negative": MANY[n + 2]}
        swapped = {"positive": first["negative"], "negative": first["positive"], "instruction": "by tone"}
        triplets += [first, {**first, **swapped}]
    write(folder / "instruction_triplets" / "Swapped.jsonl.gz", triplets)
    return folder


@pytest.fixture
def encoder(tiny_model):
    return evaluation.InstructedEncoder(tiny_model(), "tiny/model", "one")


def test_every_kind_is_scored_and_results_are_kept(data, tmp_path, encoder, monkeypatch):
    tasks = evaluation.local_tasks(data)
    names = {"Similar", "Same", "Class", "Groups", "Order", "Find", "Short", "Swapped"}
    assert {task.metadata.name for task in tasks} == names
    result = evaluation.evaluate(encoder, tasks, tmp_path / "results")
    assert set(result.scores) == names
    assert all(-100 <= score <= 100 for score in result.scores.values())
    assert {path.stem for path in result.folder.glob("*.json")} >= names
    # A second run finds them and embeds nothing.
    monkeypatch.setattr(encoder, "_embed", lambda *a, **k: pytest.fail("evaluated again"))
    again = evaluation.evaluate(encoder, evaluation.local_tasks(data), tmp_path / "results")
    assert again.scores == pytest.approx(result.scores, abs=1e-3)
    assert again.mean == pytest.approx(np.mean(list(result.scores.values())), abs=1e-3)


def test_scores_equal_those_computed_by_hand(data, tmp_path, encoder):
    tasks = evaluation.local_tasks(data, ["Similar", "Same", "Find"], instructions={"Similar": INSTRUCTION})
    scores = evaluation.evaluate(encoder, tasks, tmp_path / "results").scores
    lines = gzip.decompress((data / "sts" / "Similar.jsonl.gz").read_bytes()).decode().splitlines()
    rows = [json.loads(line) for line in lines]
    model = encoder.model
    one, other = (model.encode([row[name] for row in rows], prompt=INSTRUCTION) for name in ("sentence1", "sentence2"))
    expected = 100 * spearmanr((one * other).sum(-1), [row["score"] for row in rows])[0]
    assert scores["Similar"] == pytest.approx(expected, abs=1e-3)
    one, other = (model.encode([row[name] for row in rows]) for name in ("sentence1", "sentence2"))
    labels = [row["label"] for row in rows]
    closeness = ((one * other).sum(-1), -np.abs(one - other).sum(-1))  # mteb takes the better of the distances
    expected = 100 * max(average_precision_score(labels, close) for close in closeness)
    assert scores["Same"] == pytest.approx(expected, abs=1e-3)
    # Retrieval: queries under the default instruction, documents under the document instruction.
    similarity = model.encode(MANY[:5]) @ model.encode_document(MANY).T
    order = (-similarity).argsort(-1)
    ranks = [int(np.flatnonzero(order[n] == (n * 3 + 5) % 30)[0]) for n in range(5)]
    gains = [1 / np.log2(rank + 2) if rank < 10 else 0.0 for rank in ranks]
    assert scores["Find"] == pytest.approx(100 * np.mean(gains), abs=0.1)


def test_triplets_need_the_instruction(data, tmp_path):
    """Blind to the instruction: exactly half, and no pair right in both orders."""

    class Oracle:
        def __init__(self, reads):
            self.reads = reads

        def encode_under(self, texts, instruction, **kwargs):
            angle = [MANY.index(text) * (1 if instruction == "by topic" or not self.reads else -1) for text in texts]
            # By tone the farther text is the positive one.
            step = 0.1 if instruction == "by topic" or not self.reads else 2.2
            return np.array([[np.cos(a * step), np.sin(a * step)] for a in angle])

    (task,) = evaluation.local_tasks(data, ["Swapped"])
    task.load_data()
    rows = task.dataset["test"]
    blind = InstructionTriplets._evaluate_subset(task, Oracle(reads=False), rows, encode_kwargs={})
    assert blind == {"accuracy": 0.5, "both_orders": 0.0}
    reads = InstructionTriplets._evaluate_subset(task, Oracle(reads=True), rows, encode_kwargs={})
    assert reads == {"accuracy": 1.0, "both_orders": 1.0}
    assert task._calculate_descriptive_statistics_from_split("test") == {"num_samples": len(rows)}


def test_sampling_is_fixed_and_part_of_the_revision(data, monkeypatch):
    monkeypatch.setattr(evaluation.tasks, "QUICK", {"Similar": 7, "Swapped": 6, "Find": 16})
    tasks = {task.metadata.name: task for task in evaluation.local_tasks(data, quick=True)}
    full = {task.metadata.name: task for task in evaluation.local_tasks(data, list(tasks))}
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


def test_changed_rows_are_another_revision(data):
    (before,) = evaluation.local_tasks(data, ["Similar"])
    write(data / "sts" / "Similar.jsonl.gz", [{"sentence1": "a", "sentence2": "b", "score": 1}])
    (after,) = evaluation.local_tasks(data, ["Similar"])
    assert before.metadata.dataset["revision"] != after.metadata.dataset["revision"]


def test_results_of_other_rows_are_made_again(data, tmp_path, encoder):
    before = evaluation.evaluate(encoder, evaluation.local_tasks(data, ["Similar"]), tmp_path / "results")
    rows = [{"sentence1": MANY[n], "sentence2": MANY[n + 3], "score": -n % 4} for n in range(12)]
    write(data / "sts" / "Similar.jsonl.gz", rows)
    after = evaluation.evaluate(encoder, evaluation.local_tasks(data, ["Similar"]), tmp_path / "results")
    fresh = evaluation.evaluate(encoder, evaluation.local_tasks(data, ["Similar"]), tmp_path / "elsewhere")
    assert after.scores == pytest.approx(fresh.scores, abs=1e-3)
    assert after.scores["Similar"] != pytest.approx(before.scores["Similar"], abs=1e-2)


def test_quick_classes_are_thinned_per_label(data, monkeypatch):
    monkeypatch.setattr(evaluation.tasks, "QUICK", {"Class": 7})
    monkeypatch.setattr(evaluation.tasks, "_QUICK_TRAIN_PER_LABEL", 4)
    (task,) = evaluation.local_tasks(data, quick=True)
    task.load_data()
    assert len(task.dataset["test"]) == 7
    assert sorted(task.dataset["train"]["label"]) == [0] * 4 + [1] * 4 + [2] * 4


def test_facts_of_the_training_are_kept_beside_the_results(data, tmp_path, tiny_model):
    save(tiny_model(), tmp_path / "model")
    facts = {"trained_parameters": 5, "seconds": 1.5}
    (tmp_path / "model" / "training.json").write_text(json.dumps(facts))
    encoder = evaluation.open_model(str(tmp_path / "model"), device="cpu")
    for names in (["Similar"], ["Groups"]):
        evaluation.evaluate(encoder, evaluation.local_tasks(data, names), tmp_path / "results")
    (column,) = evaluation.read_columns([tmp_path / "results"])
    assert column.training == facts
    assert column.kinds == {"Similar": "STS", "Groups": "Clustering"}


@pytest.mark.parametrize("baseline", list(evaluation.BASELINES))
def test_baselines(data, tmp_path, tiny_lm, baseline):
    encoder = evaluation.open_model(str(tiny_lm()), baseline=baseline, device="cpu")
    embeddings = {i: encoder.encode_under(TEXTS, i) for i in ("one thing", "another")}
    assert np.allclose(np.linalg.norm(embeddings["one thing"], axis=-1), 1, atol=1e-5)
    same = np.allclose(embeddings["one thing"], embeddings["another"])
    assert same != (baseline == "hard_instruction")
    alone = np.concatenate([encoder.encode_under([text], "one thing") for text in TEXTS])
    assert np.allclose(embeddings["one thing"], alone, atol=1e-4)


def test_command(data, tmp_path, tiny_model, command):
    save(tiny_model(), tmp_path / "model")
    options = ("--data", data, "--suite", "full", "--task", "Similar", "--output", tmp_path / "out")
    done = command("evaluate", tmp_path / "model", *options)
    assert done.code == 0, done.err
    line = json.loads(done.out.splitlines()[-1])
    assert set(line["scores"]) == {"Similar"}
    assert line["mean"] == line["scores"]["Similar"]
    assert list((tmp_path / "out").rglob("Similar.json"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{model}", "--data", "{data}", "--task", "Similer"], "unknown task 'Similer' in .*nearest: Similar"),
        (["{model}", "--data", "{empty}"], "no tasks in .*expected folders such as sts, classification"),
        (["{model}", "--data", "{data}"], "holds none of the quick suite's tasks; take the full suite, or name tasks"),
        (["{model}"], "give --data FOLDER, or --task NAME"),
        (["{empty}/nothing", "--data", "{data}", "--suite", "full"], "no model at "),
        (
            ["{model}", "--data", "{data}", "--task", "Similar", "--baseline", "guess"],
            "unknown baseline 'guess'; valid: mean, last",
        ),
        (["{model}", "--data", "{data}", "--instructions", "{empty}/none.json"], "no instructions at "),
        (
            ["{lm}", "--baseline", "mean", "--data", "{data}", "--task", "Similar", "--instructions", "{data}/i.json"],
            "reads no instructions; leave --instructions out",
        ),
    ],
)
def test_bad_input_is_one_line(data, tmp_path, tiny_model, tiny_lm, command, arguments, message):
    save(tiny_model(), tmp_path / "model")
    (tmp_path / "empty").mkdir()
    (data / "i.json").write_text("{}")
    places = {"model": tmp_path / "model", "data": data, "empty": tmp_path / "empty", "lm": tiny_lm()}
    done = command("evaluate", *(a.format(**places) for a in arguments), "--output", tmp_path / "out")
    assert done.code == 2
    assert re.search(message, done.err)
    assert len(done.err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_missing_label_is_named(data, tmp_path, encoder):
    write(data / "clustering" / "Groups.jsonl.gz", [{"text": "a", "label": "x"}, {"text": "b"}])
    with pytest.raises(PromptEmbedderError, match=r"Groups.jsonl.gz.*2.*'label' is missing; a row of this task has"):
        evaluation.evaluate(encoder, evaluation.local_tasks(data, ["Groups"]), tmp_path / "results")


def test_weights_that_are_not_numbers(data, tmp_path, encoder):
    with torch.no_grad():
        encoder.model[0].alignment.weight[0, 0] = float("nan")
    with pytest.raises(PromptEmbedderError, match="tiny/model gives embeddings that are not finite numbers"):
        evaluation.evaluate(encoder, evaluation.local_tasks(data, ["Similar"]), tmp_path / "results")
