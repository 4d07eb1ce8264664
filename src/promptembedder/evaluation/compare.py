"""Several models' results on one page: a row per task, a column per model, means, differences, pictures."""

from __future__ import annotations

import difflib
import json
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import mteb
import numpy as np
from mteb.results import TaskResult

from promptembedder import atomic
from promptembedder.errors import PromptEmbedderError
from promptembedder.evaluation.run import FACTS, read_facts_file
from promptembedder.paths import expanded

# Of the bootstrap.
_RESAMPLES, _SEED = 10_000, 13
_META = "model_meta.json"
_FIGURES = "comparison.json"
_WRITTEN = ("report.md", "report.html", "by-kind.png", "training.png")


@dataclass(frozen=True)
class Column:
    """Results of one model.

    Attributes:
        name: of the model.
        scores: main scores x 100 by task.
        more: further scores x 100 that get a row, by the row's title.
        kinds: kind of each task.
        rows: revision of each task's rows; scores of different rows are not comparable.
        training: `trained_parameters`, `seconds`, `examples`, `steps` if promptembedder trained the model.
    """

    name: str
    scores: dict[str, float]
    more: dict[str, float]
    kinds: dict[str, str]
    rows: dict[str, str]
    training: dict[str, Any] | None


@dataclass(frozen=True)
class Comparison:
    """Columns side by side; means are over the tasks that all columns have.

    Attributes:
        columns: one per model, by name.
        shared: tasks that all columns have, sorted by kind.
        to: name of the column that ratios and differences are relative to; unset: there are none.
        kinds: kind of each task.
    """

    columns: dict[str, Column]
    shared: list[str]
    to: str | None = None
    kinds: dict[str, str] = field(default_factory=dict)

    def mean(self, name: str, kind: str | None = None) -> float:
        """Mean score of a column, over all shared tasks or those of one kind."""
        tasks = [task for task in self.shared if kind in (None, self.kinds[task])]
        return statistics.mean(self.columns[name].scores[task] for task in tasks)

    def ratio(self, name: str) -> float:
        """Mean of a column divided by the mean of column `to`."""
        assert self.to is not None
        return self.mean(name) / self.mean(self.to)

    def interval(self, name: str) -> tuple[float, float] | None:
        """The 95 % interval of the difference of means to column `to`, by a paired bootstrap over the shared tasks.

        None for that column itself, and where fewer than two tasks are shared.
        """
        assert self.to is not None
        if name == self.to or len(self.shared) < 2:
            return None
        scores, to = self.columns[name].scores, self.columns[self.to].scores
        differences = np.array([scores[task] - to[task] for task in self.shared])
        drawn = np.random.default_rng(_SEED).choice(differences, (_RESAMPLES, len(differences)))
        low, high = np.percentile(drawn.mean(axis=1), [2.5, 97.5])
        return float(low), float(high)


def read_columns(places: Sequence[Path]) -> list[Column]:
    """The results of each model found in folders that `promptembedder evaluate` or mteb wrote.

    Args:
        places: folders of one model and revision, or any folder above them.

    Raises:
        PromptEmbedderError: a folder without results, or a result that cannot be read.
    """
    folders: dict[Path, None] = {}
    for place in map(expanded, places):
        found = sorted(meta.parent for meta in place.rglob(_META)) if place.is_dir() else []
        found = [folder for folder in found if _results(folder) and not atomic.is_unfinished(folder)]
        if not found:
            raise PromptEmbedderError(f"no results in {place}: expected a folder that `promptembedder evaluate` wrote")
        folders.update(dict.fromkeys(found))
    names = _names(list(folders))
    return [_column(folder, names[folder]) for folder in folders]


def compare(columns: Sequence[Column], to: str | None = None) -> Comparison:
    """Put columns side by side.

    Raises:
        PromptEmbedderError: `to` names no column, no task in common, or a task whose rows differ between columns.
    """
    by_name = {column.name: column for column in columns}
    if to is not None and to not in by_name:
        near = difflib.get_close_matches(to, by_name, n=1, cutoff=0.0)
        raise PromptEmbedderError(f"no column {to!r}; nearest: {near[0]}; all: {', '.join(by_name)}")
    kinds = {task: kind for column in columns for task, kind in column.kinds.items()}
    shared = [task for task in kinds if all(task in column.scores for column in columns)]
    if not shared:
        raise PromptEmbedderError(f"no task in common among {', '.join(by_name)}")
    for task in shared:
        seen: dict[str, str] = {}
        for column in columns:
            seen.setdefault(column.rows[task], column.name)
        if len(seen) > 1:
            one, other = list(seen.values())[:2]
            raise PromptEmbedderError(
                f"{task} of {one} and {other} was scored on different rows; evaluate both with the same data and suite"
            )
    return Comparison(by_name, sorted(shared, key=lambda task: (kinds[task], task)), to, kinds)


def markdown(comparison: Comparison) -> str:
    """The comparison as a Markdown table: tasks, means per kind and over all tasks, ratios, differences."""
    names = list(comparison.columns)
    columns = comparison.columns.values()
    lines = [f"| | {' | '.join(map(_cell, names))} |", "| --- |" + " ---: |" * len(names)]

    def row(title: str, values: Sequence[float | None], form: str = ".2f") -> None:
        lines.append(f"| {_cell(title)} | " + " | ".join("-" if v is None else format(v, form) for v in values) + " |")

    every = sorted(comparison.kinds, key=lambda task: (comparison.kinds[task], task))
    for task in every:
        row(task, [column.scores.get(task) for column in columns])
    for title in dict.fromkeys(title for column in columns for title in column.more):
        row(f"*{title}*", [column.more.get(title) for column in columns])
    for kind in sorted({comparison.kinds[task] for task in comparison.shared}):
        row(f"mean {kind}", [comparison.mean(name, kind) for name in names])
    row(f"**mean of {len(comparison.shared)} tasks**", [comparison.mean(name) for name in names])
    if comparison.to is not None:
        row(f"to {comparison.to}", [comparison.ratio(name) for name in names], ".3f")
        means = [comparison.mean(name) - comparison.mean(comparison.to) for name in names]
        row(f"difference to {comparison.to}", means, "+.2f")
        intervals = [comparison.interval(name) for name in names]
        shown = " | ".join("-" if found is None else f"{found[0]:+.2f} to {found[1]:+.2f}" for found in intervals)
        lines.append(f"| its 95 % interval, paired bootstrap over tasks | {shown} |")
    if any(column.training for column in columns):
        facts = [column.training or {} for column in columns]
        row("trained parameters", [fact.get("trained_parameters") for fact in facts], ",")
        row("seconds of training", [fact.get("seconds") for fact in facts], ",.0f")
    missing = [task for task in every if task not in comparison.shared]
    if missing:
        lines += ["", f"Not in the means, because a column lacks them: {', '.join(missing)}."]
    return "\n".join(lines)


def write_report(comparison: Comparison, folder: Path, title: str = "Comparison") -> None:
    """Write `report.md`, `report.html`, `comparison.json` and the pictures, atomically.

    Raises:
        PromptEmbedderError: the folder cannot be written, or holds results or somebody else's report.
    """
    _refuse_others(folder)
    import markdown as converter

    pictures = {"by-kind.png": "Mean score by kind of task"}
    if len([c for c in comparison.columns.values() if c.training]) > 1:
        pictures["training.png"] = "Mean score against trained parameters and against training time"
    page = f"# {title}\n\n{markdown(comparison)}\n\n" + "\n\n".join(f"![{t}]({p})" for p, t in pictures.items()) + "\n"
    body = converter.markdown(page, extensions=["tables"])
    figures = {
        name: {
            "mean": round(comparison.mean(name), 2),
            "ratio": None if comparison.to is None else round(comparison.ratio(name), 4),
            **_difference(comparison, name),
            "scores": {task: round(score, 2) for task, score in column.scores.items()},
            "more": {row: round(score, 2) for row, score in column.more.items()},
            "training": column.training,
        }
        for name, column in comparison.columns.items()
    }
    try:
        with atomic.filling(expanded(folder)) as scratch:
            _draw_kinds(comparison, scratch / "by-kind.png")
            if "training.png" in pictures:
                _draw_training(comparison, scratch / "training.png")
            (scratch / "report.md").write_text(page, encoding="utf-8")
            (scratch / "report.html").write_text(_HTML.format(title=escape(title), body=body), encoding="utf-8")
            (scratch / _FIGURES).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise PromptEmbedderError(f"cannot write the comparison to {folder}: {error.strerror or error}") from error


def _difference(comparison: Comparison, name: str) -> dict[str, Any]:
    if comparison.to is None:
        return {"difference": None, "difference_interval": None}
    interval = comparison.interval(name)
    return {
        "difference": round(comparison.mean(name) - comparison.mean(comparison.to), 2),
        "difference_interval": interval and [round(bound, 2) for bound in interval],
    }


def _refuse_others(folder: Path) -> None:
    """Refuse a folder whose files would be replaced though no comparison wrote them, or that would seem to hold one."""
    if (folder / _META).exists():
        raise PromptEmbedderError(f"{folder} holds results of an evaluation; choose another --output")
    if (folder / _FIGURES).is_file():
        return
    for name in _WRITTEN:
        if (folder / name).exists():
            raise PromptEmbedderError(f"{folder} holds {name}, which no comparison wrote; choose another --output")


_HTML = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }}
table {{ border-collapse: collapse; }} img {{ max-width: 100%; }}
td, th {{ padding: .2rem .6rem; border-bottom: 1px solid #ccc; text-align: right; font-variant-numeric: tabular-nums; }}
td:first-child, th:first-child {{ text-align: left; }}
</style>
{body}
</html>
"""


def _names(folders: Sequence[Path]) -> dict[Path, str]:
    """Names of columns: model names without owner; with owner, and revision if needed, where two are equal."""
    full: dict[Path, str] = {}
    revisions: dict[Path, str] = {}
    for folder in folders:
        try:
            meta = json.loads((folder / _META).read_text(encoding="utf-8"))
            full[folder], revisions[folder] = str(meta["name"] or folder.parent.name), str(meta["revision"])
        except (ValueError, KeyError, TypeError) as error:
            raise PromptEmbedderError(f"{folder / _META} does not describe a model: {error}") from error
    names = {folder: name.split("/")[-1] for folder, name in full.items()}
    for length in (0, 7, 40):
        counts = Counter(names.values())
        twice = [folder for folder, name in names.items() if counts[name] > 1]
        for folder in twice:
            names[folder] = full[folder] + (f"@{revisions[folder][:length]}" if length else "")
    if len(set(names.values())) < len(names):
        name = Counter(names.values()).most_common(1)[0][0]
        raise PromptEmbedderError(f"two folders hold results of {name}; give one of them")
    return names


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def _results(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.json") if path.name != _META)


def _column(folder: Path, name: str) -> Column:
    facts = read_facts_file(folder / FACTS)
    scores, more, kinds, rows = {}, {}, {}, {}
    for path in _results(folder):
        try:
            result = TaskResult.from_disk(path)
            score = 100 * float(result.get_score())
            if not math.isfinite(score):
                raise ValueError("its main score is not a number")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
            raise PromptEmbedderError(f"{path} is no result of mteb: {' '.join(str(error).split())[:200]}") from error
        task = result.task_name
        scores[task] = score
        rows[task] = str(result.dataset_revision)
        kinds[task] = facts["kinds"].get(task) or _kind(task)
        both = [part["both_orders"] for parts in result.scores.values() for part in parts if "both_orders" in part]
        if both:
            more[f"{task}, both orders"] = 100 * statistics.mean(both)
    return Column(name, scores, more, kinds, rows, facts["training"])


def _kind(task: str) -> str:
    try:
        return str(mteb.get_task(task).metadata.type)
    except (KeyError, ValueError):
        return "Other"


def _draw_kinds(comparison: Comparison, path: Path) -> None:
    from matplotlib.figure import Figure

    kinds = sorted({comparison.kinds[task] for task in comparison.shared})
    names = list(comparison.columns)
    figure = Figure(figsize=(max(7.0, 1.6 * len(kinds)), 4), layout="constrained")
    axes = figure.subplots()
    for n, name in enumerate(names):
        places = [i + (n - (len(names) - 1) / 2) * 0.8 / len(names) for i in range(len(kinds))]
        axes.bar(places, [comparison.mean(name, kind) for kind in kinds], 0.8 / len(names), label=name)
    axes.set_xticks(range(len(kinds)), kinds)
    axes.set_ylabel("main score x 100")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def _draw_training(comparison: Comparison, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, key, title in zip(
        figure.subplots(1, 2), ("trained_parameters", "seconds"), ("trained parameters", "seconds of training"),
        strict=True,
    ):  # fmt: skip
        for name, column in comparison.columns.items():
            at = (column.training or {}).get(key)
            if at is None:  # unknown, such as of a model trained elsewhere
                continue
            axes.scatter([at], [comparison.mean(name)])
            axes.annotate(
                name, (at, comparison.mean(name)), fontsize="small", xytext=(4, 4), textcoords="offset points"
            )
        axes.set_xscale("symlog")
        axes.set(xlabel=title, ylabel="mean score x 100")
    figure.savefig(path, dpi=120)
