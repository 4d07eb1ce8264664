"""The folder of a training run: its checkpoints, and what must not be in the way."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

from transformers.trainer_utils import get_last_checkpoint

from promptembedder import workers
from promptembedder.config import ModelConfig
from promptembedder.errors import PromptEmbedderError
from promptembedder.saved import read_settings
from promptembedder.saved_names import CONFIG_FILE


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
    made_with, wanted = read_settings(Path(found))["model"], json.loads(json.dumps(asdict(structure)))
    if differing := sorted(name for name in wanted if made_with.get(name, wanted[name]) != wanted[name]):
        raise PromptEmbedderError(f"{found} was made with another {', '.join(differing)}; give the settings it had")
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
