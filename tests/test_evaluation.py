"""Evaluation: mteb's figures for rows from a folder, equal to figures computed by hand; results kept; bad input."""

from __future__ import annotations

import gzip
import json
import math
import re
import shutil
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.metrics import average_precision_score
from transformers import AutoModel, AutoTokenizer

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


def test_scores_of_orders_and_summaries_equal_those_computed_by_hand(data, tmp_path, encoder):
    scores = evaluation.evaluate(encoder, evaluation.local_tasks(data, ["Order", "Short"]), tmp_path / "results").scores
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


def test_a_task_without_a_result_is_said(data, tmp_path, encoder, monkeypatch):
    """mteb raises nothing where rows are open to others only."""
    closed = SimpleNamespace(exceptions=[SimpleNamespace(task_name="Similar")], task_results=[])
    monkeypatch.setattr("mteb.evaluate", lambda *a, **k: closed)
    with pytest.raises(PromptEmbedderError, match="Similar: mteb has no result"):
        evaluation.evaluate(encoder, evaluation.local_tasks(data, ["Similar"]), tmp_path / "results")


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


def test_results_made_otherwise_are_neither_taken_nor_removed(data, tmp_path, encoder, monkeypatch):
    tasks = partial(evaluation.local_tasks, data, ["Similar"])
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
    write(data / "sts" / "Similar.jsonl.gz", rows)
    refused(tasks(), "on other rows or another sample")


def test_an_interrupted_evaluation_is_held_to_its_instructions_too(data, tmp_path, encoder, monkeypatch):
    run = sys.modules["promptembedder.evaluation.run"]
    evaluated = run.mteb.evaluate

    def stopped(*args, **kwargs):
        evaluated(*args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(run.mteb, "evaluate", stopped)
    with pytest.raises(KeyboardInterrupt):
        evaluation.evaluate(encoder, evaluation.local_tasks(data, ["Similar"]), tmp_path / "results")
    monkeypatch.undo()
    told = evaluation.local_tasks(data, ["Similar"], instructions={"Similar": INSTRUCTION})
    with pytest.raises(PromptEmbedderError, match="with instruction"):
        evaluation.evaluate(encoder, told, tmp_path / "results")
    result = evaluation.evaluate(encoder, evaluation.local_tasks(data, ["Similar", "Same"]), tmp_path / "results")
    assert set(result.scores) == {"Similar", "Same"}
    assert not list(result.folder.glob(".*"))


def test_a_baseline_is_known_by_its_weights(tiny_lm, tmp_path):
    revisions = {
        evaluation.open_model(str(lm), baseline="mean", device="cpu").mteb_model_meta.revision
        for lm in (
            tiny_lm("llama"),
            tiny_lm("llama", 48),
            shutil.copytree(tiny_lm("llama"), tmp_path / "same" / "llama"),
        )
    }
    assert len(revisions) == 2


def test_empty_texts_are_read_as_a_full_stop(data, tmp_path, encoder, caplog):
    corpus = [{"_id": str(n), "title": "", "text": "" if n == 3 else text} for n, text in enumerate(MANY)]
    write(data / "retrieval" / "Find" / "corpus.jsonl.gz", corpus)
    evaluation.evaluate(encoder, evaluation.local_tasks(data, ["Find"]), tmp_path / "results")
    assert "Find: 1 of 30 texts are empty and read as '.'" in caplog.text


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
        ("classification/Class.test", {"text": "a", "label": "x"}, "'label' is 'x', of another kind than in the first"),
        ("clustering/Groups", {"text": "a", "label": [1]}, "expected a text or a whole number"),
        ("reranking/Order", {"query": "a", "positive": [], "negative": []}, "'positive' is '[]', expected a list"),
        (
            "summarization/Short",
            {"human_summaries": [], "machine_summaries": ["a"], "relevance": [1]},
            "'human_summaries' is '[]', expected a list of texts",
        ),
    ],
)
def test_a_bad_row_is_named_before_the_model_opens(data, tmp_path, monkeypatch, command, file, row, message):
    path = data / f"{file}.jsonl.gz"
    rows = [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().splitlines()]
    write(path, [*rows, row])
    task = path.name.split(".")[0]
    done = command("evaluate", "nowhere", "--data", data, "--suite", "full", "--task", task)
    assert done.code == 2
    assert f"{path.name}:{len(rows) + 1}: " in done.err or f"{path.name}, line {len(rows) + 1}: " in done.err
    assert message in done.err


def test_two_labels_may_be_words(data, tmp_path, encoder):
    scores = []
    for labels in (0, 1), ("money", "sport"):
        rows = [{"text": text, "label": labels[n % 2]} for n, text in enumerate(MANY)]
        for split in ("train", "test"):
            write(data / "classification" / f"Two.{split}.jsonl.gz", rows)
        result = evaluation.evaluate(encoder, evaluation.local_tasks(data, ["Two"]), tmp_path / labels.__repr__())
        scores.append(json.loads((result.folder / "Two.json").read_text())["scores"]["test"][0])
    assert scores[0]["accuracy"] == pytest.approx(scores[1]["accuracy"])
    assert scores[0]["ap"] == pytest.approx(scores[1]["ap"])


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
def test_rows_that_cannot_be_scored_are_refused_before_the_model_opens(data, command, file, rows, message):
    write(data / f"{file}.jsonl.gz", rows)
    write(data / "classification" / "One.test.jsonl.gz", [{"text": "a", "label": "x"}])
    task = "Find" if file.startswith("retrieval") else "One"
    if file.startswith("sts"):
        (data / "classification" / "One.test.jsonl.gz").unlink()
    done = command("evaluate", "nowhere", "--data", data, "--suite", "full", "--task", task)
    assert (done.code, len(done.err.strip().splitlines())) == (2, 1)
    assert message in done.err


def test_instructions_for_tasks_that_are_not_there_are_said(data, tmp_path, tiny_model, command, caplog):
    save(tiny_model(), tmp_path / "model")
    (data / "other.json").write_text('{"Simila": "Find.", "Similar": "Find."}')
    asked = ("evaluate", tmp_path / "model", "--data", data, "--task", "Similar", "--instructions", data / "other.json")
    assert command(*asked, "--output", tmp_path / "out").code == 0
    assert f"{data / 'other.json'} names tasks that are not there: Simila" in caplog.messages


def test_files_that_are_no_tasks(data):
    (data / "sts" / "README.md").write_text("words")
    assert "README.md" not in [task.metadata.name for task in evaluation.local_tasks(data)]
    write(data / "sts" / "Empty.jsonl.gz", [])
    with pytest.raises(PromptEmbedderError, match=r"Empty\.jsonl\.gz holds no rows"):
        evaluation.local_tasks(data, ["Empty"])[0].load_data()
    write(data / "clustering" / "Similar.jsonl.gz", [{"text": "a", "label": 1}])
    with pytest.raises(PromptEmbedderError, match="two tasks are named Similar"):
        evaluation.local_tasks(data)


def test_tasks_of_the_hub_have_instructions(encoder):
    (given, bare) = evaluation.hub_tasks(["ArguAna", "STS15"])
    assert encoder.made_with(given.metadata)["instruction"] == given.metadata.prompt["query"]
    assert encoder.made_with(bare.metadata)["instruction"] == type(bare).abstask_prompt
    (ours, other) = evaluation.hub_tasks(["ArguAna", "STS15"], {"ArguAna": "Find the other side."})
    assert encoder.made_with(ours.metadata)["instruction"] == "Find the other side."
    assert encoder.made_with(other.metadata) == encoder.made_with(bare.metadata)
    assert type(ours).metadata.prompt == given.metadata.prompt  # others of the class are as they were
    assert len(evaluation.hub_tasks(["BEIR"])) > 10


@pytest.mark.parametrize("content", ["{", "kinds: [1]", "- 1", "training: 5"])
def test_damaged_facts(data, tmp_path, encoder, content):
    tasks = evaluation.local_tasks(data, ["Similar"])
    folder = evaluation.evaluate(encoder, tasks, tmp_path / "results").folder
    (folder / "promptembedder.yaml").write_text(content)
    for read in (
        lambda: evaluation.evaluate(encoder, tasks, tmp_path / "results"),
        lambda: evaluation.read_columns([folder]),
    ):
        with pytest.raises(PromptEmbedderError, match=r"promptembedder\.yaml is damaged; remove it"):
            read()


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


def test_a_model_of_ours_from_the_hub_keeps_its_id(tiny_model, hub):
    place, _ = hub
    save(tiny_model(), place / "me" / "mine")
    encoder = evaluation.open_model("me/mine", device="cpu")
    assert encoder.mteb_model_meta.name == "me/mine"
    assert (
        encoder.mteb_model_meta.revision == evaluation.open_model(str(place / "me" / "mine")).mteb_model_meta.revision
    )


@pytest.mark.parametrize(("baseline", "place"), [("mean", None), ("last", -1), ("prompt_eol", -1)])
def test_baselines_read_texts_as_they_are(tiny_lm, baseline, place):
    """The library would put texts into the chat template, after which the last token is not the cue's."""
    folder = tiny_lm()
    model = evaluation.open_model(str(folder), baseline=baseline, device="cpu").model
    assert model.tokenizer.chat_template
    texts = [evaluation.BASELINES[baseline][1].format(text=text) for text in TEXTS]
    lm, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    for text, found in zip(texts, model.encode(texts), strict=True):
        with torch.no_grad():
            hidden_TD = lm(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        pooled = hidden_TD.mean(0) if place is None else hidden_TD[place]
        assert torch.allclose(torch.from_numpy(found), torch.nn.functional.normalize(pooled, dim=0), atol=1e-5)


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
        (["{model}", "--task", "STS12", "--suite", "full"], "--suite is for tasks of a folder"),
        (["{model}", "--task", "STS12", "--instructions", "{empty}/none.json"], "no instructions at "),
        (["{model}", "--data", "{data}", "--instructions", "{data}/latin.json"], "latin.json is not UTF-8 text"),
        (["{empty}/nothing", "--data", "{data}", "--suite", "full"], "no model at "),
        (
            ["{model}", "--data", "{data}", "--task", "Similar", "--baseline", "guess"],
            "unknown baseline 'guess'; valid: mean, last",
        ),
        (["{model}", "--data", "{data}", "--instructions", "{empty}/none.json"], "no instructions at "),
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
def test_bad_input_is_one_line(data, tmp_path, tiny_model, tiny_lm, command, arguments, message):
    save(tiny_model(), tmp_path / "model")
    (tmp_path / "empty").mkdir()
    (data / "i.json").write_text("{}")
    (data / "blank.json").write_text('{"Similar": " "}')
    (data / "latin.json").write_bytes(b'{"Similar": "caf\xe9"}')
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
