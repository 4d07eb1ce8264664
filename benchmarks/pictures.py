"""One picture a benchmark: bars of figures, or scores on the way through a training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from promptembedder import atomic
from promptembedder.training.curves import Curve


def bars(path: Path, groups: Sequence[str], series: Mapping[str, Sequence[float | None]], label: str) -> None:
    """Draw a group of bars for each of `groups`, with one bar of every series; None leaves a gap."""
    figure = Figure(figsize=(max(6, 1.5 + 0.35 * len(groups) * len(series)), 4), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(series)
    for n, (name, values) in enumerate(series.items()):
        at = [group + (n - (len(series) - 1) / 2) * width for group in range(len(groups))]
        axes.bar(at, [0.0 if value is None else value for value in values], width, label=name)
    axes.set_xticks(range(len(groups)), list(groups))
    axes.set(ylabel=label)
    axes.legend(fontsize="small")
    _save(figure, path)


def changes(path: Path, rows: Mapping[str, Mapping[str, float]], label: str) -> None:
    """Draw one line of points for each row: the change of every figure against the base, which is zero."""
    figure = Figure(figsize=(9, 1.5 + 0.22 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for name in next(iter(rows.values())):
        axes.plot([row[name] for row in rows.values()], range(len(rows)), "o", markersize=5, label=name)
    axes.axvline(0, color="grey", linewidth=1)
    axes.set_yticks(range(len(rows)), list(rows), fontsize="small")
    axes.set(xlabel=label)
    axes.invert_yaxis()
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize="small")
    _save(figure, path)


def curves(path: Path, of: Mapping[str, Mapping[str, Curve]]) -> None:
    """Draw, for each title, dev scores of its parts against examples and against seconds of training."""
    figure = Figure(figsize=(11, 4 * len(of)), layout="constrained")
    for pair, (title, parts) in zip(figure.subplots(len(of), 2, squeeze=False), of.items(), strict=True):
        for axes, at, label in zip(pair, (0, 1), ("examples", "seconds of training"), strict=True):
            for name, curve in parts.items():
                scored = [point for point in curve if point[2] is not None]
                axes.plot([p[at] for p in scored], [p[2] for p in scored], marker="o", markersize=3, label=name)
            axes.set(xlabel=label, ylabel="dev, Spearman x 100", title=title)
            axes.legend(fontsize="small")
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic.replacing(path) as scratch:
        figure.savefig(scratch, dpi=100, format="png")
