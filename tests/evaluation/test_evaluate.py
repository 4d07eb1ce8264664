"""Evaluation: mteb's figures for rows from a folder, equal to figures computed by hand; results kept; bad input."""

from __future__ import annotations

import gzip
import json
import re
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.stats import spearmanr
from sklearn.metrics import average_precision_score

from conftest import INSTRUCTION, MANY, write_gzipped
from promptembedder import PromptEmbedderError, lock, save

pytest.importorskip("mteb", reason="mteb is not installed: pip install 'promptembedder[evaluate]'")

from promptembedder import evaluation


def test_every_kind_is_scored_and_results_are_kept(task_folder, tmp_path, encoder, monkeypatch):
    tasks = evaluation.local_tasks(task_folder)
    names = {"Similar", "Same", "Class", "Groups", "Order", "Find", "Short", "Swapped"}
    assert {task.metadata.name for task in tasks} == names
    result = evaluation.evaluate(encoder, tasks, tmp_path / "results")
    assert set(result.scores) == names
    assert all(-100 <= score <= 100 for score in result.scores.values())
    assert {path.stem for path in result.folder.glob("*.json")} >= names
    # A second run finds them and embeds nothing.
    monkeypatch.setattr(encoder, "_embed", lambda *a, **k: pytest.fail("evaluated again"))
    again = evaluation.evaluate(encoder, evaluation.local_tasks(task_folder), tmp_path / "results")
    assert again.scores == pytest.approx(result.scores, abs=1e-3)
    assert again.mean == pytest.approx(np.mean(list(result.scores.values())), abs=1e-3)


def test_scores_equal_those_computed_by_hand(task_folder, tmp_path, encoder):
    tasks = evaluation.local_tasks(task_folder, ["Similar", "Same", "Find"], instructions={"Similar": INSTRUCTION})
    scores = evaluation.evaluate(encoder, tasks, tmp_path / "results").scores
    lines = gzip.decompress((task_folder / "sts" / "Similar.jsonl.gz").read_bytes()).decode().splitlines()
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


def test_scores_of_orders_and_summaries_equal_those_computed_by_hand(task_folder, tmp_path, encoder):
    scores = evaluation.evaluate(
        encoder, evaluation.local_tasks(task_folder, ["Order", "Short"]), tmp_path / "results"
    ).scores
    model = encoder.model
    # Each query's one right document among four: average precision is one over its rank.
    ranks = []
    for n in range(6):
        (close,) = model.encode([MANY[n]]) @ model.encode_document(MANY[n + 1 : n + 5]).T
        ranks.append(1 + int((close > close[0]).sum()))
    assert scores["Order"] == pytest.approx(100 * np.mean([1 / rank for rank in ranks]), abs=0.1)
    assert len(set(ranks)) > 1
    # A summary is as good as it is close to the nearest human one.
    found = []
    for n in range(5):
        close = model.encode(MANY[n + 2 : n + 6]) @ model.encode(MANY[n : n + 2]).T
        found.append(spearmanr(close.max(-1), [1, 3, 2, 5])[0])
    assert scores["Short"] == pytest.approx(100 * np.mean(found), abs=0.1)


def test_a_task_without_a_result_is_said(task_folder, tmp_path, encoder, monkeypatch):
    """mteb raises nothing where rows are open to others only."""
    closed = SimpleNamespace(exceptions=[SimpleNamespace(task_name="Similar")], task_results=[])
    monkeypatch.setattr("mteb.evaluate", lambda *a, **k: closed)
    with pytest.raises(PromptEmbedderError, match="Similar: mteb has no result"):
        evaluation.evaluate(encoder, evaluation.local_tasks(task_folder, ["Similar"]), tmp_path / "results")


def test_results_made_otherwise_are_neither_taken_nor_removed(task_folder, tmp_path, encoder, monkeypatch):
    tasks = partial(evaluation.local_tasks, task_folder, ["Similar"])
    kept = evaluation.evaluate(encoder, tasks(), tmp_path / "results").folder / "Similar.json"
    before = kept.read_bytes()

    def refused(made, message):
        with pytest.raises(PromptEmbedderError, match=rf"Similar\.json was made {message}.*; give another --output"):
            evaluation.evaluate(encoder, made, tmp_path / "results")
        assert kept.read_bytes() == before

    refused(tasks(instructions={"Similar": INSTRUCTION}), "with instruction '.*', now it is '.*'")
    refused(tasks(quick=True), "on other rows or another sample")
    encoder.model.max_seq_length = 5
    refused(tasks(), "with max_tokens .*, now it is 5")
    rows = [{"sentence1": MANY[n], "sentence2": MANY[n + 3], "score": -n % 4} for n in range(12)]
    write_gzipped(task_folder / "sts" / "Similar.jsonl.gz", rows)
    refused(tasks(), "on other rows or another sample")


def test_an_interrupted_evaluation_is_held_to_its_instructions_too(task_folder, tmp_path, encoder, monkeypatch):
    run = sys.modules["promptembedder.evaluation.run"]
    evaluated = run.mteb.evaluate

    def stopped(encoder, task, **kwargs):
        if task.metadata.name == "Similar":
            return evaluated(encoder, task, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(run.mteb, "evaluate", stopped)
    with pytest.raises(KeyboardInterrupt):
        evaluation.evaluate(encoder, evaluation.local_tasks(task_folder, ["Similar", "Same"]), tmp_path / "results")
    monkeypatch.undo()
    told = evaluation.local_tasks(task_folder, ["Similar"], instructions={"Similar": INSTRUCTION})
    with pytest.raises(PromptEmbedderError, match="with instruction"):
        evaluation.evaluate(encoder, told, tmp_path / "results")
    result = evaluation.evaluate(
        encoder, evaluation.local_tasks(task_folder, ["Similar", "Same"]), tmp_path / "results"
    )
    assert set(result.scores) == {"Similar", "Same"}
    assert [path.name for path in result.folder.glob(".*")] == [lock.LOCK_FILE]


@pytest.mark.slow
def test_two_labels_may_be_words(task_folder, tmp_path, encoder):
    scores = []
    for labels in (0, 1), ("money", "sport"):
        rows = [{"text": text, "label": labels[n % 2]} for n, text in enumerate(MANY)]
        for split in ("train", "test"):
            write_gzipped(task_folder / "classification" / f"Two.{split}.jsonl.gz", rows)
        result = evaluation.evaluate(
            encoder, evaluation.local_tasks(task_folder, ["Two"]), tmp_path / labels.__repr__()
        )
        scores.append(json.loads((result.folder / "Two.json").read_text())["scores"]["test"][0])
    assert scores[0]["accuracy"] == pytest.approx(scores[1]["accuracy"])
    assert scores[0]["ap"] == pytest.approx(scores[1]["ap"])


@pytest.mark.slow
def test_instructions_for_tasks_that_are_not_there_are_said(task_folder, tmp_path, tiny_model, command, caplog):
    save(tiny_model(), tmp_path / "model")
    (task_folder / "other.json").write_text('{"Simila": "Find.", "Similar": "Find."}')
    asked = (
        "evaluate",
        tmp_path / "model",
        "--data",
        task_folder,
        "--task",
        "Similar",
        "--instructions",
        task_folder / "other.json",
    )
    assert command(*asked, "--output", tmp_path / "out").code == 0
    assert f"{task_folder / 'other.json'} names tasks that are not there: Simila" in caplog.messages


@pytest.mark.parametrize("content", ["{", "kinds: [1]", "- 1", "training: 5"])
def test_damaged_facts(task_folder, tmp_path, encoder, content):
    tasks = evaluation.local_tasks(task_folder, ["Similar"])
    folder = evaluation.evaluate(encoder, tasks, tmp_path / "results").folder
    (folder / "promptembedder.yaml").write_text(content)
    for read in (
        lambda: evaluation.evaluate(encoder, tasks, tmp_path / "results"),
        lambda: evaluation.read_columns([folder]),
    ):
        with pytest.raises(PromptEmbedderError, match=r"promptembedder\.yaml is damaged; remove it"):
            read()


def test_facts_of_the_training_are_kept_beside_the_results(task_folder, tmp_path, tiny_model):
    save(tiny_model(), tmp_path / "model")
    facts = {"trained_parameters": 5, "seconds": 1.5}
    (tmp_path / "model" / "training.json").write_text(json.dumps(facts))
    encoder = evaluation.open_model(str(tmp_path / "model"), device="cpu")
    for names in (["Similar"], ["Groups"]):
        evaluation.evaluate(encoder, evaluation.local_tasks(task_folder, names), tmp_path / "results")
    (column,) = evaluation.read_columns([tmp_path / "results"])
    assert column.training == facts
    assert column.kinds == {"Similar": "STS", "Groups": "Clustering"}


def test_command(task_folder, tmp_path, tiny_model, command):
    save(tiny_model(), tmp_path / "model")
    options = ("--data", task_folder, "--suite", "full", "--task", "Similar", "--output", tmp_path / "out")
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
        (["{model}", "--task", "STS12", "--suite", "full"], "--suite is for tasks of a folder"),
        (
            ["{model}", "--task", "STS12", "--instructions", "{empty}/none.json"],
            r"instructions .* cannot be read: No such file",
        ),
        (["{model}", "--data", "{data}", "--instructions", "{data}/latin.json"], "latin.json is not UTF-8 text"),
        (["{empty}/nothing", "--data", "{data}", "--suite", "full"], "no model at "),
        (
            ["{model}", "--data", "{data}", "--task", "Similar", "--baseline", "guess"],
            "unknown baseline 'guess'; valid: mean, last",
        ),
        (
            ["{model}", "--data", "{data}", "--instructions", "{empty}/none.json"],
            r"instructions .* cannot be read: No such file",
        ),
        (
            ["{model}", "--data", "{data}", "--instructions", "{data}/blank.json", "--task", "Similar"],
            "must map task names to instructions",
        ),
        (
            ["smollm2-135m-instruct", "--data", "{data}", "--task", "Similar"],
            "is an untrained LLM; add --baseline, one of mean, last",
        ),
        (
            ["{lm}", "--baseline", "mean", "--data", "{data}", "--task", "Similar", "--device", "gpu"],
            "device 'gpu' cannot be used here",
        ),
        (
            ["{lm}", "--baseline", "mean", "--data", "{data}", "--task", "Similar", "--instructions", "{data}/i.json"],
            "reads no instructions; leave --instructions out",
        ),
    ],
)
def test_bad_input_is_one_line(task_folder, tmp_path, tiny_model, tiny_lm, command, arguments, message):
    save(tiny_model(), tmp_path / "model")
    (tmp_path / "empty").mkdir()
    (task_folder / "i.json").write_text("{}")
    (task_folder / "blank.json").write_text('{"Similar": " "}')
    (task_folder / "latin.json").write_bytes(b'{"Similar": "caf\xe9"}')
    places = {"model": tmp_path / "model", "data": task_folder, "empty": tmp_path / "empty", "lm": tiny_lm()}
    done = command("evaluate", *(a.format(**places) for a in arguments), "--output", tmp_path / "out")
    assert done.code == 2
    assert re.search(message, done.err)
    assert len(done.err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_two_runs_do_not_write_to_one_folder_of_results(task_folder, tmp_path, encoder):
    tasks = evaluation.local_tasks(task_folder, ["Similar"])
    result = evaluation.evaluate(encoder, tasks, tmp_path / "results")
    with lock.held(result.folder), pytest.raises(PromptEmbedderError, match="another run is writing to results folder"):
        evaluation.evaluate(encoder, tasks, tmp_path / "results")
    assert evaluation.evaluate(encoder, tasks, tmp_path / "results").scores == pytest.approx(result.scores, abs=1e-3)
