"""Comparison pages: means over what all columns have, ratios, refusal of different rows, and the files written."""

from __future__ import annotations

import itertools
import json
import shutil

import numpy as np
import pytest

from promptembedder import PromptEmbedderError

pytest.importorskip("mteb", reason="mteb is not installed: pip install 'promptembedder[evaluate]'")

import yaml

from promptembedder import evaluation

KINDS = {"A": "STS", "B": "STS", "C": "Clustering", "D": "STS", "E": "STS"}


@pytest.fixture
def results(tmp_path):
    """`results(name, {"A": 0.5, ...})`: a folder of one model as mteb writes it, with what `evaluate` notes beside."""

    def make(name, scores, rows="r1", revision="one", training=None, more=None):
        folder = tmp_path / "out" / "results" / name.replace("/", "__") / revision
        folder.mkdir(parents=True)
        (folder / "model_meta.json").write_text(json.dumps({"name": name, "revision": revision}))
        for task, score in scores.items():
            part = {"main_score": score, "hf_subset": "default", "languages": ["eng-Latn"], **(more or {})}
            record = {
                "dataset_revision": rows,
                "task_name": task,
                "mteb_version": "2.26.24",
                "scores": {"test": [part]},
            }
            (folder / f"{task}.json").write_text(
                json.dumps({**record, "evaluation_time": 1.0, "kg_co2_emissions": None})
            )
        facts = {"kinds": {task: KINDS[task] for task in scores}, "training": training}
        (folder / "promptembedder.yaml").write_text(yaml.safe_dump(facts))
        return folder

    return make


def test_means_and_ratios_are_over_shared_tasks(results, tmp_path):
    results("x/first", {"A": 0.5, "B": 0.7, "C": 0.3})
    results("x/second", {"A": 0.4, "C": 0.2})
    comparison = evaluation.compare(evaluation.read_columns([tmp_path / "out"]), to="first")
    assert comparison.shared == ["C", "A"]  # kind by kind
    assert comparison.mean("first") == pytest.approx(40)
    assert comparison.mean("second") == pytest.approx(30)
    assert comparison.mean("first", "STS") == pytest.approx(50)
    assert comparison.ratio("second") == pytest.approx(0.75)
    table = evaluation.markdown(comparison)
    assert "| B | 70.00 | - |" in table
    assert "| **mean of 2 tasks** | 40.00 | 30.00 |" in table
    assert "| to first | 1.000 | 0.750 |" in table
    assert "because a column lacks them: B." in table


def test_the_interval_of_a_difference_is_that_of_all_draws_of_tasks(results, tmp_path):
    differences = dict(zip("ABCDE", (0.02, 0.01, 0.10, -0.03, 0.05), strict=True))
    results("x/first", dict.fromkeys(differences, 0.5))
    results("x/second", {task: 0.5 + difference for task, difference in differences.items()})
    results("x/third", dict.fromkeys(differences, 0.6))
    comparison = evaluation.compare(evaluation.read_columns([tmp_path / "out"]), to="first")
    # The naive way: all 3,125 ways to draw five of five tasks, equally likely.
    means = [100 * np.mean(drawn) for drawn in itertools.product(differences.values(), repeat=5)]
    assert comparison.interval("second") == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=0.21)
    assert min(means) < comparison.interval("second")[0] - 1
    assert max(means) > comparison.interval("second")[1] + 1
    assert comparison.interval("first") is None
    assert comparison.interval("third") == pytest.approx((10, 10))  # ten points on every task
    table = evaluation.markdown(comparison)
    assert "| difference to first | +0.00 | +3.00 | +10.00 |" in table
    assert "paired bootstrap over tasks | - | -" in table
    evaluation.write_report(comparison, tmp_path / "page")
    figures = json.loads((tmp_path / "page" / "comparison.json").read_text())
    assert figures["second"]["difference"] == 3
    assert figures["third"]["difference_interval"] == [10, 10]


def test_a_report_replaces_reports_only(results, tmp_path):
    folder = results("x/first", {"A": 0.5})
    killed = tmp_path / "out" / ".promptembedder-0123456789ab" / "new"
    shutil.copytree(tmp_path / "out" / "results", killed)
    comparison = evaluation.compare(evaluation.read_columns([tmp_path / "out"]))
    assert list(comparison.columns) == ["first"]
    with pytest.raises(PromptEmbedderError, match="holds results of an evaluation; choose another"):
        evaluation.write_report(comparison, folder)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "report.md").write_text("mine")
    with pytest.raises(PromptEmbedderError, match=r"holds report\.md, which no comparison wrote"):
        evaluation.write_report(comparison, tmp_path / "mine")
    assert [path.read_text() for path in (tmp_path / "mine").iterdir()] == ["mine"]


def test_report_is_written_whole(results, tmp_path):
    training = {"trained_parameters": 5_000_000, "seconds": 600.0}
    results("x/<b>", {"A": 0.5, "C": 0.3}, training=training, more={"both_orders": 0.25})
    results("x/second", {"A": 0.4, "C": 0.2}, training={"trained_parameters": 100, "seconds": 60})
    evaluation.write_report(evaluation.compare(evaluation.read_columns([tmp_path / "out"])), tmp_path / "page")
    names = {path.name for path in (tmp_path / "page").iterdir()}
    assert names == {"report.md", "report.html", "comparison.json", "by-kind.png", "training.png"}
    html = (tmp_path / "page" / "report.html").read_text()
    assert "<table>" in html
    assert "5,000,000" in html
    figures = json.loads((tmp_path / "page" / "comparison.json").read_text())
    assert figures["second"]["mean"] == 30
    assert figures["<b>"]["more"] == {"A, both orders": 25.0, "C, both orders": 25.0}
    assert (tmp_path / "page" / "by-kind.png").read_bytes()[:4] == b"\x89PNG"


def test_two_revisions_of_a_model_are_two_columns(results, tmp_path):
    for revision, score in (("aaaaaaaaa", 0.5), ("bbbbbbbbb", 0.6)):
        results("x/model", {"A": score}, revision=revision)
    comparison = evaluation.compare(evaluation.read_columns([tmp_path / "out"]))
    assert set(comparison.columns) == {"x/model@aaaaaaa", "x/model@bbbbbbb"}


def test_names_stay_short_where_they_can(results, tmp_path):
    for name in ("x/model", "y/model", "y/other"):
        results(name, {"A": 0.5})
    names = {column.name for column in evaluation.read_columns([tmp_path / "out"])}
    assert names == {"x/model", "y/model", "other"}


@pytest.mark.parametrize("content", ["{", "[]", '{"name": "x/first"}'])
def test_a_damaged_description(results, tmp_path, content):
    (results("x/first", {"A": 0.5}) / "model_meta.json").write_text(content)
    with pytest.raises(PromptEmbedderError, match=r"model_meta.json does not describe a model"):
        evaluation.read_columns([tmp_path / "out"])


def test_a_score_that_is_not_a_number(results, tmp_path):
    results("x/first", {"A": float("nan")})
    with pytest.raises(PromptEmbedderError, match=r"A.json is no result of mteb: its main score is not a number"):
        evaluation.read_columns([tmp_path / "out"])


@pytest.mark.parametrize(
    ("other", "to", "message"),
    [
        ({"scores": {"A": 0.4}, "rows": "r2"}, None, "A of first and second was scored on different rows"),
        ({"scores": {"C": 0.4}}, None, "no task in common among first, second"),
        ({"scores": {"A": 0.4}}, "frist", "no column 'frist'; nearest: first; all: first, second"),
    ],
)
def test_bad_comparisons(results, tmp_path, other, to, message):
    results("x/first", {"A": 0.5})
    results("x/second", **other)
    with pytest.raises(PromptEmbedderError, match=message):
        evaluation.compare(evaluation.read_columns([tmp_path / "out"]), to)


def test_command(results, tmp_path, command):
    folder = results("x/first", {"A": 0.5, "C": 0.3})
    done = command("compare", folder, "--to", "first", "-o", tmp_path / "page")
    assert done.code == 0, done.err
    assert "| **mean of 2 tasks** | 40.00 |" in done.out
    assert (tmp_path / "page" / "report.html").is_file()
    (tmp_path / "empty").mkdir()
    wrong = command("compare", tmp_path / "empty", "-o", tmp_path / "page2")
    assert wrong.code == 2
    assert "no results in" in wrong.err
    (folder / "A.json").write_text("{}")
    broken = command("compare", folder, "-o", tmp_path / "page2")
    assert broken.code == 2
    assert "A.json is no result of mteb" in broken.err
    assert len(broken.err.strip().splitlines()) == 1
    assert not (tmp_path / "page2").exists()
