"""Run mteb and keep its results."""

from __future__ import annotations

import errno
import json
import math
import shutil
import statistics
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mteb
import yaml
from mteb.abstasks.abstask import AbsTask
from mteb.cache import ResultCache

from promptembedder import atomic, lock, progress
from promptembedder.errors import PromptEmbedderError
from promptembedder.evaluation.encoder import InstructedEncoder
from promptembedder.paths import expanded

# Beside mteb's files: what they do not say of tasks of a folder and of the model's training. No JSON file, because
# mteb takes every one in the folder for a result.
FACTS = "promptembedder.yaml"
# The same while the tasks run.
STARTED = ".promptembedder.started.yaml"
# What mteb writes beside a task's result.
_FILES_OF_MTEB = ("model_meta.json", "run_settings.jsonl")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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


def evaluate(
    encoder: InstructedEncoder, tasks: Sequence[AbsTask], output: Path, *, batch_size: int = 32
) -> EvaluationResult:
    """Evaluate a model; tasks whose results are there already are not run again.

    Args:
        encoder: see `open_model`.
        tasks: see `local_tasks`; mteb's own work too.
        output: results go to `output/results/<model>/<revision>/<task>.json`, in mteb's format.
        batch_size: texts per forward.

    Raises:
        PromptEmbedderError: the folder cannot be written, another run writes to it, or it holds results of these tasks
            made on other rows or under other instructions; rows cannot be had from the hub; a score is not a number.
    """
    meta, output = encoder.mteb_model_meta, expanded(output)
    folder = output / "results" / meta.model_name_as_path() / str(meta.revision)
    with lock.held(folder, "results folder"):
        return _evaluated(encoder, tasks, output, folder, batch_size)


def _evaluated(
    encoder: InstructedEncoder, tasks: Sequence[AbsTask], output: Path, folder: Path, batch_size: int
) -> EvaluationResult:
    """As `evaluate`, in a folder of results that no other run writes to."""
    kinds = {task.metadata.name: task.metadata.type for task in tasks}
    made_with = {task.metadata.name: encoder.made_with(task.metadata) for task in tasks}
    known = read_facts_file(folder / FACTS)
    _refuse_others(folder, tasks, made_with, known["made_with"])
    facts = {
        "kinds": {**known["kinds"], **kinds},
        "made_with": {**known["made_with"], **made_with},
        "training": encoder.training,
    }
    with _naming(output):
        folder.mkdir(parents=True, exist_ok=True)
        atomic.write_text(folder / STARTED, yaml.safe_dump(facts, sort_keys=True))
    done = [_evaluate_one(encoder, task, folder, output, batch_size) for task in progress.bar(tasks, "Evaluating")]
    if failed := [error.task_name for result in done for error in result.exceptions or []]:
        # Such as rows that only who is logged in may read; of these mteb raises nothing.
        raise PromptEmbedderError(f"{', '.join(failed)}: mteb has no result; are its rows open to you (HF_TOKEN)?")
    with _naming(output):
        (folder / STARTED).replace(folder / FACTS)
    scores = {found.task_name: 100 * found.get_score() for result in done for found in result.task_results}
    for name, score in scores.items():
        if not math.isfinite(score):
            (folder / f"{name}.json").unlink(missing_ok=True)
            raise PromptEmbedderError(f"the score of {name} is not a number")
    return EvaluationResult(scores, kinds, folder)


def _evaluate_one(encoder: InstructedEncoder, task: AbsTask, folder: Path, output: Path, batch_size: int) -> Any:
    """What mteb says of one task; its files appear whole in `folder`, the result last."""
    result = f"{task.metadata.name}.json"
    with _naming(output), atomic.scratch(folder) as scratch:
        # mteb writes files in place, and takes what it finds there for results.
        place = scratch / folder.relative_to(output)
        place.mkdir(parents=True)
        known = [file for file in folder.iterdir() if file.name in (result, *_FILES_OF_MTEB)]
        for file in known:
            shutil.copyfile(file, place / file.name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                done = mteb.evaluate(
                    encoder,
                    task,
                    cache=ResultCache(scratch),
                    encode_kwargs={"batch_size": batch_size},
                    co2_tracker=False,
                    show_progress_bar=False,
                )
            except OSError as error:
                if error.errno in _FULL:
                    raise
                raise PromptEmbedderError(
                    f"rows of {task.metadata.name} cannot be read: {' '.join(str(error).split())[:200]}"
                ) from error
        for name in (*_FILES_OF_MTEB, result):
            if (place / name).is_file():
                with atomic.replacing(folder / name) as file:
                    (place / name).replace(file)
    return done


@contextmanager
def _naming(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise PromptEmbedderError(f"results folder {output} cannot be written: {error.strerror or error}") from error


def read_facts_file(path: Path) -> dict[str, Any]:
    """What `evaluate` noted beside mteb's results: `kinds`, `made_with` and `training`; empty where nothing is.

    Raises:
        PromptEmbedderError: the file is damaged.
    """
    facts: dict[str, Any] = {"kinds": {}, "made_with": {}, "training": None}
    for file in (path, path.with_name(STARTED)):
        if not file.is_file():
            continue
        try:
            found = dict(yaml.safe_load(file.read_text(encoding="utf-8")) or {})
            facts |= {name: found[name] for name in facts if name in found}
        except (yaml.YAMLError, TypeError, ValueError) as error:
            raise PromptEmbedderError(f"{file} is damaged; remove it: {' '.join(str(error).split())[:200]}") from error
        for name, value in facts.items():
            if not isinstance(value, dict) and not (name == "training" and value is None):
                raise PromptEmbedderError(f"{file} is damaged; remove it: {name} is {value!r}")
    return facts


def _refuse_others(
    folder: Path, tasks: Sequence[AbsTask], made_with: Mapping[str, Any], known: Mapping[str, Any]
) -> None:
    """Refuse results of these tasks that were made otherwise; mteb takes them for ours whatever they are."""
    for task in tasks:
        name = task.metadata.name
        path = folder / f"{name}.json"
        if not path.is_file():
            continue
        try:
            revision = json.loads(path.read_text(encoding="utf-8")).get("dataset_revision")
        except (ValueError, AttributeError):
            path.unlink()  # cut short: no result
            continue
        advice = "give another --output, or remove it"
        if revision != task.metadata.dataset["revision"]:
            raise PromptEmbedderError(f"{path} was made on other rows or another sample of {name}; {advice}")
        for what, value in known.get(name, {}).items():
            if made_with[name].get(what) != value:
                raise PromptEmbedderError(
                    f"{path} was made with {what} {value!r}, now it is {made_with[name].get(what)!r}; {advice}"
                )
