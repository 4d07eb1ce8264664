"""Facts of a training run, kept as JSON beside the model it made, and curves out of a trainer's log."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from promptembedder import atomic
from promptembedder.data.readers import parse_json, read_lines
from promptembedder.errors import PromptEmbedderError

logger = logging.getLogger(__name__)


TRAINING_FACTS = "training.json"
# Examples seen, seconds of training, dev score x 100.
Curve = list[tuple[int, float, float]]


def write_facts(
    folder: Path, *, trained_parameters: int, steps: int, examples: int, seconds: float, **more: Any
) -> None:
    """Write down what a training run was; `seconds` are those of warm start and optimizer steps, None is left out."""
    facts = {
        "trained_parameters": trained_parameters,
        "steps": steps,
        "examples": examples,
        "seconds": round(seconds, 1),
    }
    known = {name: value for name, value in more.items() if value is not None}
    atomic.write_text(folder / TRAINING_FACTS, json.dumps(facts | known, indent=1) + "\n")


def read_facts(folder: Path) -> dict[str, Any] | None:
    """What `write_facts` wrote into a folder, if it did.

    Raises:
        PromptEmbedderError: the file is damaged.
    """
    path = folder / TRAINING_FACTS
    if not path.is_file():
        return None
    facts = parse_json("".join(read_lines(path)), str(path))
    if not isinstance(facts, dict):
        raise PromptEmbedderError(f"{path} must hold an object")
    return facts


def dev_curve(history: Sequence[dict[str, Any]], examples_per_step: int, metric: str, before: float = 0.0) -> Curve:
    """The dev scores in a trainer's log; `before`: seconds that passed before training."""
    return [
        (line["step"] * examples_per_step, round(before + line["step_seconds"], 2), 100 * line[metric])
        for line in history
        if metric in line
    ]


def seconds_of(history: Sequence[dict[str, Any]]) -> float:
    """Seconds of the optimizer steps, as `callbacks.TrainingClock` notes them."""
    return max((line["step_seconds"] for line in history if "step_seconds" in line), default=0.0)


def draw_curves(curves: Mapping[str, Curve], path: Path, title: str = "") -> None:
    """Draw dev scores against examples and against time; without matplotlib there is a warning and no picture."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning("no picture: it needs matplotlib (pip install matplotlib)")
        return
    figure = Figure(figsize=(11, 4), layout="constrained")
    for axes, at, label in zip(figure.subplots(1, 2), (0, 1), ("examples", "seconds of training"), strict=True):
        for name, curve in curves.items():
            axes.plot([p[at] for p in curve], [p[2] for p in curve], marker="o", markersize=3, label=name)
        axes.set(xlabel=label, ylabel="dev, Spearman x 100", title=title)
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=120, format="png")
