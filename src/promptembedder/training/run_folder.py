"""The folder of a training run: its checkpoints, and what must not be in the way."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from transformers.trainer_utils import get_last_checkpoint

from promptembedder import atomic
from promptembedder.config import read_yaml
from promptembedder.errors import PromptEmbedderError
from promptembedder.model.folder import BEGUN_FILE, CONFIG_FILE, read_saved
from promptembedder.model.settings import ModelConfig
from promptembedder.training import workers

# What an interrupted run may go on with.
_MAY_CHANGE = {
    *("data.root", "evaluation.test", "evaluation.every_steps", "evaluation.batch_size"),
    *(f"training.{name}" for name in ("output", "max_steps", "early_stop_patience", "mini_batch_size")),
    *(f"training.arguments.{name}" for name in ("save_steps", "save_total_limit", "logging_steps")),
    *(f"training.text_state_{name}" for name in ("cache", "folder", "precision")),
}


# As the library names them; what a user calls `checkpoint-best` is the user's.
_CHECKPOINT = re.compile(r"checkpoint-\d+")


def make_folder(output: Path, *, fresh: bool) -> None:
    """Make a run's folder, without the checkpoints of a finished run if this is a fresh one.

    The library deletes checkpoints by their step, and would take the new ones for the oldest.

    Raises:
        PromptEmbedderError: it cannot be written.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        probe = output / ".writable"
        probe.touch()
        probe.unlink(missing_ok=True)  # another worker may have been faster
        if fresh and workers.number() == 0:
            for checkpoint in output.glob("checkpoint-*"):
                if _CHECKPOINT.fullmatch(checkpoint.name) and checkpoint.is_dir():
                    shutil.rmtree(checkpoint)
    except OSError as error:
        raise PromptEmbedderError(f"output folder {output} cannot be written: {error.strerror or error}") from error


def checkpoint_of(output: Path, resume: bool, structure: ModelConfig) -> str | None:
    """The checkpoint to go on from; without `resume` there must be no interrupted run in the way.

    Raises:
        PromptEmbedderError: nothing to resume, or a checkpoint of another model; an interrupted run in the way.
    """
    found = last_checkpoint(output)
    if not resume:
        refuse_interrupted(output)
        return None
    if found is None:
        raise PromptEmbedderError(f"nothing to resume: {output} holds no checkpoint")
    made_with, wanted = asdict(read_saved(Path(found)).config), asdict(structure)
    if differing := sorted(name for name in wanted if made_with.get(name, wanted[name]) != wanted[name]):
        raise PromptEmbedderError(f"{found} was made with another {', '.join(differing)}; give the settings it had")
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


def last_checkpoint(output: Path) -> str | None:
    """The newest checkpoint of a run, if there is one."""
    found: str | None = get_last_checkpoint(str(output)) if output.is_dir() else None
    return found


def refuse_interrupted(output: Path) -> None:
    """Refuse a folder with checkpoints newer than its model.

    Raises:
        PromptEmbedderError: an interrupted run is in the way.
    """
    found = last_checkpoint(output)
    if found is not None and _unfinished(output / "model", Path(found)):
        raise PromptEmbedderError(f"{output} holds an interrupted run: --resume it or remove it")


def _unfinished(model: Path, checkpoint: Path) -> bool:
    """Whether no model was saved since the checkpoint."""
    saved = model / CONFIG_FILE
    try:
        return not saved.is_file() or saved.stat().st_mtime < checkpoint.stat().st_mtime
    except FileNotFoundError:  # another worker is removing it
        return False
