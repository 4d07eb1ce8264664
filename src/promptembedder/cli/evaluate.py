"""`promptembedder evaluate`."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from promptembedder.cli.arguments import BatchSize, Device, expanded_text
from promptembedder.errors import PromptEmbedderError, needs_extra
from promptembedder.progress import say

if TYPE_CHECKING:
    from mteb.abstasks.abstask import AbsTask


def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            help="Saved model (as for encode), one of sentence-transformers, LLM with --baseline.",
            callback=expanded_text,
        ),
    ],
    data: Annotated[Path | None, typer.Option(help="Folder of tasks; unset: mteb's own, from the hub.")] = None,
    task: Annotated[list[str] | None, typer.Option(help="Name of a task or mteb benchmark; may be repeated.")] = None,
    suite: Annotated[
        Literal["quick", "full"] | None,
        typer.Option(help="Which tasks of --data. quick (the default): eleven known ones, sampled; full: all of them."),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Results, in mteb's layout.")] = Path("results"),
    baseline: Annotated[
        str | None, typer.Option(help="Take MODEL as an untrained LLM: mean, last, prompt_eol, hard_instruction.")
    ] = None,
    instructions: Annotated[
        Path | None,
        typer.Option(
            help="JSON of task name to instruction; unset: instructions.json in the data folder, or mteb's own."
        ),
    ] = None,
    batch_size: BatchSize = 32,
    device: Device = None,
) -> None:
    """Score a model with mteb's tasks and metrics; prints the main scores x 100, as one JSON line at the end."""
    if data is None and not task:
        raise PromptEmbedderError("give --data FOLDER, or --task NAME for tasks from the hub")
    if data is None and suite is not None:
        raise PromptEmbedderError("--suite is for tasks of a folder: give --data FOLDER, or leave it out")
    with needs_extra("evaluate", "evaluation"):
        from promptembedder import evaluation

    if data is None:
        tasks = _hub_tasks(task or [], instructions)
    else:
        suite = suite or "quick"
        tasks = _local_tasks(data, task, instructions, quick=suite == "quick")
        output = output / suite  # the same task has other rows in each
    encoder = evaluation.open_model(model, baseline=baseline, device=device)
    if instructions is not None and not encoder.reads_instructions:
        raise PromptEmbedderError(
            f"{model} reads no instructions; leave --instructions out, or give an LLM with --baseline hard_instruction"
        )
    result = evaluation.evaluate(encoder, tasks, output, batch_size=batch_size)
    for name, score in result.scores.items():
        say(f"{name:24} {result.kinds[name]:20} {score:6.2f}")
    scores = {name: round(score, 2) for name, score in result.scores.items()}
    print(json.dumps({"mean": round(result.mean, 2), "scores": scores, "results": str(result.folder)}))


def _hub_tasks(names: list[str], instructions: Path | None) -> list[AbsTask]:
    from promptembedder.evaluation import hub_tasks, read_instructions

    if instructions is None:
        return hub_tasks(names, {})
    given = read_instructions(instructions)
    tasks = hub_tasks(names, given)
    _warn_of_unknown(instructions, set(given) - {found.metadata.name for found in tasks})
    return tasks


def _local_tasks(data: Path, names: list[str] | None, instructions: Path | None, *, quick: bool) -> list[AbsTask]:
    """Tasks of a folder, all rows read, so that a bad row is reported before the model opens."""
    from promptembedder.evaluation import local_tasks, read_instructions

    own = data / "instructions.json"
    given = read_instructions(instructions or own) if instructions or own.is_file() else {}
    if instructions is not None:
        _warn_of_unknown(instructions, set(given) - {found.metadata.name for found in local_tasks(data)})
    tasks = local_tasks(data, names, instructions=given, quick=quick)
    for found in tasks:
        found.load_data()
    return tasks


def _warn_of_unknown(path: Path, names: set[str]) -> None:
    # No error: one file may serve several folders.
    if names:
        logging.getLogger(__name__).warning("%s names tasks that are not there: %s", path, ", ".join(sorted(names)))
