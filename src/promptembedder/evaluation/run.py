"""Run mteb and keep its results."""

from __future__ import annotations

import json
import math
import statistics
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mteb
import yaml
from mteb.abstasks.abstask import AbsTask
from mteb.cache import ResultCache

from promptembedder import atomic
from promptembedder.errors import PromptEmbedderError
from promptembedder.evaluation.encoder import InstructedEncoder

# Beside mteb's files: what they do not say of tasks of a folder and of the model's training. No JSON file, because
# mteb takes every one in the folder for a result.
FACTS = "promptembedder.yaml"


@dataclass(frozen=True)
class EvaluationResult:
    """Main scores x 100 by task, their kinds, and where mteb wrote everything else."""

    scores: dict[str, float]
    kinds: dict[str, str]
    folder: Path

    @property
    def mean(self) -> float:
        """Mean over tasks."""
        return statistics.mean(self.scores.values())

    @property
    def mean_by_kind(self) -> dict[str, float]:
        """Mean over the tasks of each kind."""
        kinds = sorted(set(self.kinds.values()))
        return {kind: statistics.mean(s for n, s in self.scores.items() if self.kinds[n] == kind) for kind in kinds}


def evaluate(
    encoder: InstructedEncoder, tasks: Sequence[AbsTask], output: Path, *, batch_size: int = 32
) -> EvaluationResult:
    """Evaluate a model; tasks whose results are there already are not run again.

    Args:
        encoder: see `open_model`.
        tasks: see `local_tasks`; mteb's own work too. Results made on other rows of the same task are replaced.
        output: results go to `output/results/<model>/<revision>/<task>.json`, in mteb's format.
        batch_size: texts per forward.

    Raises:
        PromptEmbedderError: the folder cannot be written; a score is not a number.
    """
    meta = encoder.mteb_model_meta
    cache = ResultCache(output)
    folder = output / "results" / meta.model_name_as_path() / str(meta.revision)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PromptEmbedderError(f"results folder {output} cannot be written: {error.strerror or error}") from error
    _forget_other_rows(folder, tasks)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        done = mteb.evaluate(
            encoder, list(tasks), cache=cache, encode_kwargs={"batch_size": batch_size}, co2_tracker=False
        )
    kinds = {task.metadata.name: task.metadata.type for task in tasks}
    _note(folder / FACTS, kinds, encoder.training)
    scores = {result.task_name: 100 * result.get_score() for result in done.task_results}
    for name, score in scores.items():
        if not math.isfinite(score):
            raise PromptEmbedderError(f"the score of {name} is not a number; results are in {folder}")
    return EvaluationResult(scores, kinds, folder)


def _forget_other_rows(folder: Path, tasks: Sequence[AbsTask]) -> None:
    """Remove results of these tasks that were made on other rows; mteb takes them whatever their revision."""
    for task in tasks:
        path = folder / f"{task.metadata.name}.json"
        if not path.is_file():
            continue
        try:
            revision = json.loads(path.read_text(encoding="utf-8")).get("dataset_revision")
        except (ValueError, AttributeError):
            revision = None
        if revision != task.metadata.dataset["revision"]:
            path.unlink()


def _note(path: Path, kinds: dict[str, str], training: dict[str, Any] | None) -> None:
    known = (yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None) or {}
    facts = {"kinds": {**known.get("kinds", {}), **kinds}, "training": training}
    atomic.write_text(path, yaml.safe_dump(facts, sort_keys=True))
