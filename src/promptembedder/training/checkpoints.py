"""Checkpoints that are known to be complete: marked when they are, and told from those that are not.

The library writes a checkpoint file by file into its final folder. A run that is killed meanwhile leaves a folder that
the library would resume from: it fails there, or goes on with an empty optimizer where that file is missing.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import zipfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from transformers import TrainerCallback
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME

from promptembedder import atomic
from promptembedder.digest import sha256_of
from promptembedder.errors import PromptEmbedderError
from promptembedder.model.folder import ALIGNMENT_FILE, CONFIG_FILE, PROMPTER_FOLDER, PROMPTER_WEIGHTS, read_saved
from promptembedder.model.settings import ModelConfig
from promptembedder.training import workers

logger = logging.getLogger(__name__)

# Written last: size and sha256 of all other files.
COMPLETE_FILE = "complete.json"
# The library goes on without the first two, and says nothing.
_NEEDED = (
    *(OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME, "modules.json", CONFIG_FILE, ALIGNMENT_FILE),
    f"{PROMPTER_FOLDER}/{PROMPTER_WEIGHTS}",
)
# As the library names them; what a user calls `checkpoint-best` is the user's.
_NAME = re.compile(r"checkpoint-(\d+)")
# A folder on its way out, which is no checkpoint any more.
_REMOVED = ".removed-"


class CheckpointKeeper(TrainerCallback):  # type: ignore[misc]
    """Marks each checkpoint as complete, and only then removes older ones.

    The library would remove them before, and other folders whose names begin with `checkpoint-`, too.

    Args:
        at_most: checkpoints kept, the best one and the newest in any case; None or 0: all.
    """

    def __init__(self, at_most: int | None) -> None:
        self._at_most = at_most or 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remove what a resumed run skipped, and what a killed one was removing."""
        output = Path(args.output_dir)
        if state.is_world_process_zero:
            for left in output.glob(f"{_REMOVED}checkpoint-*"):
                shutil.rmtree(left, ignore_errors=True)
            for checkpoint in checkpoints(output) if state.global_step else ():
                if _step(checkpoint) > state.global_step:
                    remove(checkpoint)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Mark the checkpoint that has just been written."""
        if workers.count() > 1:
            dist.barrier()  # each worker writes its own random state
        if state.is_world_process_zero:
            newest = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            mark_complete(newest)
            self._remove_older(newest, Path(state.best_model_checkpoint or newest).name)

    def _remove_older(self, newest: Path, best: str) -> None:
        """Remove all but the newest, the best and as many others as may stay; those of an earlier run go first."""
        others = [c for c in checkpoints(newest.parent) if c.name not in (newest.name, best)]
        others.sort(key=lambda checkpoint: (_step(checkpoint) < _step(newest), _step(checkpoint)))
        more = max(0, self._at_most - len({newest.name, best}))
        for checkpoint in others[: len(others) - more] if self._at_most else ():
            remove(checkpoint)


def checkpoints(output: Path) -> list[Path]:
    """The checkpoints of a run by their step, complete or not."""
    found = [path for path in output.glob("checkpoint-*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=_step)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint at once, as far as anyone can see: half of one might look complete."""
    going = checkpoint.with_name(f"{_REMOVED}{checkpoint.name}")
    shutil.rmtree(going, ignore_errors=True)
    checkpoint.rename(going)
    shutil.rmtree(going, ignore_errors=True)


def mark_complete(checkpoint: Path) -> None:
    """Write down size and digest of every file of a checkpoint."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != COMPLETE_FILE)
    listed = {
        path.relative_to(checkpoint).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_of([path])}
        for path in files
    }
    atomic.write_text(checkpoint / COMPLETE_FILE, json.dumps({"files": listed}, indent=1) + "\n")


def newest_complete(output: Path, structure: ModelConfig) -> Path | None:
    """The newest checkpoint that a run can go on from; newer ones that are skipped are named in a warning each.

    Raises:
        PromptEmbedderError: its model has other settings than `structure`.
    """
    for checkpoint in reversed(checkpoints(output)):
        why = trouble(checkpoint) or _trouble_of_best(checkpoint)
        if why is None:
            made_with, wanted = asdict(read_saved(checkpoint).config), asdict(structure)
            if differing := sorted(name for name in wanted if made_with.get(name, wanted[name]) != wanted[name]):
                raise PromptEmbedderError(
                    f"{checkpoint} was made with another {', '.join(differing)}; give the settings it had"
                )
            return checkpoint
        if workers.number() == 0:
            logger.warning("%s is skipped: %s", checkpoint, why)
    return None


def trouble(checkpoint: Path, *, contents: bool = True) -> str | None:
    """Why a run cannot go on from a checkpoint, in a few words; None if it can.

    Args:
        checkpoint: its folder. One without a mark, as earlier versions wrote them, is complete if all files open.
        contents: also read every file; else names and sizes only.
    """
    for name in _NEEDED:
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
    try:
        marked = (checkpoint / COMPLETE_FILE).is_file()
        return next(_unlike_listed(checkpoint, contents) if marked else _unreadable(checkpoint), None)
    except FileNotFoundError as error:  # another worker is removing it
        return f"{Path(error.filename).name} is missing"


def _unlike_listed(checkpoint: Path, contents: bool) -> Iterator[str]:
    """What differs from the list of files that was written last."""
    try:
        listed = json.loads((checkpoint / COMPLETE_FILE).read_text(encoding="utf-8"))["files"]
        facts = [(name, int(fact["bytes"]), str(fact["sha256"])) for name, fact in listed.items()]
    except (ValueError, KeyError, TypeError, AttributeError):
        yield f"{COMPLETE_FILE} is damaged"
        return
    for name, size, _ in facts:
        if not (checkpoint / name).is_file():
            yield f"{name} is missing"
        elif (found := (checkpoint / name).stat().st_size) != size:
            yield f"{name} has {found} of {size} bytes"
    for name, _, digest in facts if contents else ():
        if sha256_of([checkpoint / name]) != digest:
            yield f"{name} is damaged"


def _unreadable(checkpoint: Path) -> Iterator[str]:
    """Files that do not open; torch's are zip archives, with a checksum of each part."""
    for path in sorted(checkpoint.rglob("*")):
        try:
            if path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
            elif path.suffix == ".safetensors":
                with safe_open(path, framework="pt"):
                    pass
            elif path.suffix in (".pt", ".pth"):
                with zipfile.ZipFile(path) as archive:
                    if archive.testzip() is not None:
                        yield f"{path.name} is damaged"
        except (ValueError, SafetensorError, zipfile.BadZipFile):
            yield f"{path.name} is damaged"


def _trouble_of_best(checkpoint: Path) -> str | None:
    """Why the best weights so far, which a run ends with, cannot be had."""
    state = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    best = checkpoint.with_name(Path(state.get("best_model_checkpoint") or checkpoint).name)
    why = None if best == checkpoint else trouble(best)
    return None if why is None else f"the best one before it, {best.name}, is not complete: {why}"
