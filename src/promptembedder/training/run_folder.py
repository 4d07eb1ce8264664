"""The folder of a training run: its checkpoints, and what must not be in the way."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from transformers.trainer import TRAINER_STATE_NAME

from promptembedder import atomic, lock
from promptembedder.config import read_yaml
from promptembedder.errors import PromptEmbedderError
from promptembedder.model.folder import BEGUN_FILE, CONFIG_FILE
from promptembedder.model.settings import ModelConfig
from promptembedder.training import workers
from promptembedder.training.checkpoints import checkpoints, newest_complete, remove

logger = logging.getLogger(__name__)

# What an interrupted run may go on with.
_MAY_CHANGE = {
    *("data.root", "data.strict", "evaluation.test", "evaluation.every_steps", "evaluation.batch_size"),
    *(f"training.{name}" for name in ("output", "max_steps", "early_stop_patience", "mini_batch_size")),
    *(f"training.arguments.{name}" for name in ("save_steps", "save_total_limit", "logging_steps")),
    *(f"training.text_state_{name}" for name in ("cache", "folder", "precision")),
}


@contextmanager
def run_folder(output: Path) -> Iterator[None]:
    """Make a run's folder and hold it, so that no other run writes there.

    Raises:
        PromptEmbedderError: it cannot be written, or another run holds it.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        probe = output / ".writable"
        probe.touch()
        probe.unlink(missing_ok=True)  # another worker may have been faster
    except OSError as error:
        raise PromptEmbedderError(f"output folder {output} cannot be written: {error.strerror or error}") from error
    with lock.held(output) if workers.number() == 0 else nullcontext():
        yield


def remove_checkpoints(output: Path) -> None:
    """Remove the checkpoints of an earlier run: of two runs' checkpoints, the highest step is not the newest one.

    Raises:
        PromptEmbedderError: they cannot be removed.
    """
    try:
        for checkpoint in checkpoints(output) if workers.number() == 0 else ():
            remove(checkpoint)
    except OSError as error:
        raise PromptEmbedderError(f"output folder {output} cannot be written: {error.strerror or error}") from error


def check_folder(output: Path, resume: bool) -> None:
    """Refuse to resume where no run was interrupted, and to begin where one was.

    Raises:
        PromptEmbedderError: either.
    """
    if not resume:
        refuse_interrupted(output)
    elif not checkpoints(output) and not _unfinished(output / "model", output / BEGUN_FILE):
        raise PromptEmbedderError(f"nothing to resume: {output} holds no checkpoint")


def checkpoint_of(output: Path, resume: bool, structure: ModelConfig) -> Path | None:
    """The newest complete checkpoint to go on from; None: the run starts from the beginning.

    Raises:
        PromptEmbedderError: as `check_folder`; a checkpoint of another model; a finished model without a complete
            checkpoint, which starting from the beginning would replace.
    """
    check_folder(output, resume)
    found = newest_complete(output, structure) if resume else None
    if resume and found is None:
        if not interrupted(output):
            raise PromptEmbedderError(f"nothing to resume: {output} holds a finished model and no complete checkpoint")
        if workers.number() == 0:
            logger.warning("%s holds no complete checkpoint: the run starts from the beginning", output)
    return found


def note_settings(output: Path, config: Any, *, resumed: bool, **more: str) -> None:
    """Write down what a run begins with, or refuse to go on with other rows or other steps.

    The library would skip as many batches of another order, on another schedule, and say nothing.

    Args:
        output: its folder.
        config: its settings, a dataclass. `checkpoint_of` compares those of the model.
        resumed: compare; else write.
        **more: what else must be the same, by name.

    Raises:
        PromptEmbedderError: a resumed run began with other settings; the file cannot be read.
    """
    file = output / BEGUN_FILE
    now: dict[str, Any] = {**json.loads(json.dumps(asdict(config))), **more}
    if not resumed:
        if workers.number() == 0:
            atomic.write_text(file, yaml.safe_dump(now, sort_keys=False, allow_unicode=True))
    elif file.is_file():
        began, wanted = _that_matter(read_yaml(file)), _that_matter(now)
        if differing := sorted(name for name in wanted if began.get(name, wanted[name]) != wanted[name]):
            raise PromptEmbedderError(
                f"{output} began with another {', '.join(differing)} (see {file.name}); give the settings it had"
            )


def refuse_other(output: Path, facts: Mapping[str, str]) -> None:
    """Refuse to go on with another teacher or with other texts, before these are embedded.

    Raises:
        PromptEmbedderError: the run began with another one.
    """
    began = read_yaml(output / BEGUN_FILE) if (output / BEGUN_FILE).is_file() else {}
    for name, what in (("teacher", "another training.teacher"), ("texts", "other data.texts")):
        if began.get(name, facts[name]) != facts[name]:
            raise PromptEmbedderError(f"{output} began with {what}; --resume needs what it had")


def _that_matter(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings on which an interrupted run's steps depend, by name."""
    flat = _flattened({name: value for name, value in settings.items() if name != "model"})
    return {name: value for name, value in flat.items() if name not in _MAY_CHANGE}


def _flattened(settings: dict[str, Any], before: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            found |= _flattened(value, f"{before}{name}.")
        else:
            found[before + name] = value
    return found


def refuse_interrupted(output: Path) -> None:
    """Refuse a folder with checkpoints newer than its model.

    Raises:
        PromptEmbedderError: an interrupted run is in the way.
    """
    if any(_unfinished(output / "model", path) for path in _newest_of(output)):
        raise PromptEmbedderError(f"{output} holds an interrupted run: --resume it or remove it")


def interrupted(output: Path) -> bool:
    """Whether a run began or wrote a checkpoint here, and saved no model since."""
    return any(_unfinished(output / "model", path) for path in (output / BEGUN_FILE, *_newest_of(output)))


def _newest_of(output: Path) -> list[Path]:
    """What says when the last checkpoint was written, if there is one: a folder is also dated by what is removed."""
    states = [checkpoint / TRAINER_STATE_NAME for checkpoint in checkpoints(output)[-1:]]
    return [state if state.is_file() else state.parent for state in states]


def _unfinished(model: Path, begun: Path) -> bool:
    """Whether no model was saved since a file or folder was written; False where that is not there."""
    saved = model / CONFIG_FILE
    try:
        since = begun.stat().st_mtime
        return not saved.is_file() or saved.stat().st_mtime < since
    except FileNotFoundError:  # or another worker is removing it
        return False
