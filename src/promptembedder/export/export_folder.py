"""The folder of an export: what it says of itself, whose files are in it, and what may be written there."""

from __future__ import annotations

import errno
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from promptembedder import atomic
from promptembedder.errors import PromptEmbedderError
from promptembedder.model.folder import read_json
from promptembedder.text import is_unicode

FACTS_FILE = "promptembedder_export.json"
# What instructions that join a fold are fitted to.
_FOLD_FILE = "fold.safetensors"
_FOLD_TITLE = "\n\n## This export is a fold\n"


def read_facts(folder: str | Path) -> dict[str, Any]:
    """What an export says of itself.

    Raises:
        PromptEmbedderError: there is no export, or its file is damaged.
    """
    path = Path(folder) / FACTS_FILE
    if not path.is_file():
        raise PromptEmbedderError(f"no export at {folder}: it has no {FACTS_FILE}")
    facts = read_json(path)
    needed = {"format", "model", "instructions", "source", "backbone", "precision", "fold", "files"}
    if not isinstance(facts, dict) or not needed <= facts.keys() or not _readable(facts):
        raise PromptEmbedderError(f"{path} is not what an export writes: expected {', '.join(sorted(needed))}")
    return facts


def refuse_foreign(target: Path) -> None:
    """Refuse a place where no export can be, before anything is done.

    Raises:
        PromptEmbedderError: it holds something else, is the current folder, or cannot be written.
    """
    if not is_unicode(str(target)) or "\0" in str(target):
        raise PromptEmbedderError(f"output {str(target)!r} is not valid UTF-8 text; choose another folder")
    above = next((place for place in target.absolute().parents if place.exists()), None)
    if above is not None and not above.is_dir():
        raise PromptEmbedderError(f"output {target} lies below {above}, which is a file; choose another folder")
    with errors_as_one_line(target):  # now: a fold takes minutes
        if target.is_symlink() and os.path.realpath(target) == str(target.absolute()):
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(target))
        if target.exists() and target.samefile(os.curdir):
            raise OSError(errno.EBUSY, "it is the current folder; call this from another one", str(target))
        with tempfile.TemporaryFile(dir=above):
            pass
    if (target / FACTS_FILE).is_file():
        read_facts(target)
    elif target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise PromptEmbedderError(f"{target} exists and is no export; choose another folder")


def facts_on_disk(target: Path) -> bytes | None:
    """What an export there says of itself, as it is on the disk; None where there is none."""
    with suppress(OSError):
        return (target / FACTS_FILE).read_bytes()
    return None


def refuse_changed(target: Path, before: bytes | None) -> None:
    """Refuse to replace what another process has written there since this one began."""
    if facts_on_disk(target) != before:
        raise PromptEmbedderError(f"{target} has changed meanwhile; run the command again")


def refuse_overwriting(scratch: Path, target: Path) -> None:
    """Refuse to replace files that no export has written."""
    ours = of_an_export(target)
    for new in sorted(scratch.rglob("*")):
        path = new.relative_to(scratch)
        there = target / path
        if os.path.lexists(there) and not ours(path) and not (new.is_dir() and there.is_dir()):
            raise PromptEmbedderError(
                f"{there} is no file of an export and would be replaced; move it, or choose another folder"
            )


@contextmanager
def damaged_is_one_line(target: Path) -> Iterator[None]:
    """What files of an export that are not as it wrote them lead to, as one line."""
    try:
        yield
    except (PromptEmbedderError, OSError):
        raise
    except Exception as error:  # each format's library has its own
        reason = (str(error).splitlines() or [""])[0][:200]
        raise PromptEmbedderError(
            f"the export at {target} is damaged ({type(error).__name__}: {reason}); export all instructions again"
        ) from error


@contextmanager
def errors_as_one_line(target: Path) -> Iterator[None]:
    """What a full disk or a closed folder says, as one line that names the folder."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # the second where weights do not fit on the disk
        reason = getattr(error, "strerror", None) or error
        raise PromptEmbedderError(f"cannot write an export to {target}: {reason}") from error


def of_an_export(target: Path) -> Callable[[Path], bool]:
    """What an earlier export wrote there, and may be replaced: whatever else is in the folder stays."""
    if not (target / FACTS_FILE).is_file():
        return lambda path: False
    written = {Path(file) for file in [*read_facts(target)["files"], FACTS_FILE]}
    folders = {above for file in written for above in file.parents}
    return lambda path: path in written or path in folders


def files_of(folder: Path) -> list[str]:
    """All files of a folder, as paths relative to it."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def write_head(folder: Path, head_ED: Tensor | None) -> None:
    """Keep the head of a fold in an export, for instructions that join it."""
    if head_ED is not None:
        save_file({"head": head_ED.contiguous()}, folder / _FOLD_FILE)


def held_head(folder: Path) -> Tensor | None:
    """The head (E, D) that `write_head` kept; None where a fold has none, or was made before heads were fitted."""
    path = folder / _FOLD_FILE
    return load_file(path)["head"] if path.is_file() else None


def _readable(facts: dict[str, Any]) -> bool:
    """Whether facts have the types that are read here."""
    entries, backbone = facts["instructions"], facts["backbone"]
    return (
        all(isinstance(facts[name], str) for name in ("format", "model", "source", "precision"))
        and isinstance(backbone, dict)
        and isinstance(backbone.get("name"), str)
        and isinstance(facts["files"], list)
        and all(isinstance(file, str) and _is_inside(file) for file in facts["files"])
        and isinstance(entries, list)
        and all(isinstance(e, dict) for e in entries)
        and all(isinstance(e.get(key), str) for e in entries for key in ("name", "instruction", "digest"))
    )


def _is_inside(file: str) -> bool:
    """Whether a path leads nowhere but into the folder that it is relative to."""
    return not Path(file).is_absolute() and ".." not in Path(file).parts


def link_files(source: Path, scratch: Path, files: Sequence[str]) -> None:
    """Files of a folder in another one, by links where the disk has them: weights are not written again."""
    for file in files:
        if not (source / file).is_file():
            raise PromptEmbedderError(f"{source} lacks its file {file}; export all instructions again")
        (scratch / file).parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source / file, scratch / file)
        except OSError:
            shutil.copyfile(source / file, scratch / file)


def note_fold(folder: Path, fold: Mapping[str, Any]) -> None:
    """Let an export's README end with what its fold keeps of the model."""
    file = folder / "README.md"
    text = file.read_text(encoding="utf-8").split(_FOLD_TITLE)[0].rstrip("\n")
    shares = [kept.get("cosine", kept.get("similarity")) for kept in fold["kept"].values()]
    what = "correlation of similarities" if fold["headless"] else "cosine of embeddings"
    atomic.write_text(
        file,
        f"{text}{_FOLD_TITLE}\n"
        f"Its {fold['rows']} soft tokens an instruction were fitted to give nearly the model's embeddings.\n"
        f"They were fitted on {fold['texts']} texts.\n"
        f"On texts held back, the mean {what} to the model is at least {math.floor(1000 * min(shares)) / 1000:.3f}.\n"
        "Do not search an index of the model with these embeddings: make the index again.\n",
    )
