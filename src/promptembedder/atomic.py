"""Files and folders that appear whole or not at all.

What is being written lies in a scratch folder in the same place, under a lock that its process holds. A process that is
killed leaves the folder and no lock. The next one that writes there removes it.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import shutil
import stat
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from promptembedder.errors import PromptEmbedderError

_SCRATCH = re.compile(r"\.promptembedder-[0-9a-f]{12}")
# What a scratch folder may hold; one with anything else is not touched.
_LOCK, _NEW, _FORMER = "lock", "new", "former"
_ATTEMPTS = 20
_EXCHANGE, _CURRENT_FOLDER = 2, -100  # RENAME_EXCHANGE and AT_FDCWD of Linux


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A scratch file, which takes the place of `path` when the block ends without an error.

    A former file's mode is kept; a new file's follows the umask. Through a symbolic link its target is written.

    Raises:
        OSError: the folder cannot be written; what is there is write-protected, or no regular file.
    """
    target = Path(os.path.realpath(path))
    if target.exists():
        if not target.is_file():
            kind = errno.EISDIR if target.is_dir() else errno.EINVAL
            raise OSError(kind, os.strerror(kind) if target.is_dir() else "not a regular file", str(path))
        if not os.access(target, os.W_OK, effective_ids=os.access in os.supports_effective_ids):
            raise PermissionError(errno.EACCES, "it is write-protected", str(path))
    with scratch(target.parent) as place:
        new = place / target.name
        new.touch()
        usual = stat.S_IMODE(new.stat().st_mode)
        yield new
        new.chmod(usual)  # some writers put a file of their own there
        _take_after(new, target)
        new.replace(target)


@contextmanager
def filling(folder: Path) -> Iterator[Path]:
    """A scratch folder, whose files move into `folder` when the block ends without an error.

    Each file appears whole; a folder that was not there appears with all of them.

    Raises:
        OSError: the folder cannot be written.
    """
    target = Path(os.path.realpath(folder))
    with scratch(target if target.exists() else target.parent) as place:
        new = place / target.name
        new.mkdir()
        yield new
        _settle_modes(new, target)
        if target.exists():
            for file in sorted(new.iterdir()):
                file.replace((target / file.name).resolve())
        else:
            new.rename(target)


@contextmanager
def replacing_folder(folder: Path, ours: Callable[[Path], bool] = lambda path: True) -> Iterator[Path]:
    """A scratch folder, which takes the place of `folder` when the block ends without an error.

    The change is one step: whenever the process is killed, `folder` is the former one or the new one.

    Args:
        folder: where; through a symbolic link its target is replaced.
        ours: whether a file or folder in the former one, given relative to it, may be removed. What else the former
            one holds is in the new one too. A folder of ours is looked into, any other stays whole.

    Raises:
        OSError: the folder cannot be written.
    """
    target = Path(os.path.realpath(folder))
    if target == Path(os.path.realpath(os.curdir)):
        raise OSError(errno.EBUSY, "it is the current folder; call this from another one", str(folder))
    with scratch(target.parent) as place:
        new = place / target.name
        new.mkdir()
        yield new
        _settle_modes(new, target)
        if not os.path.lexists(target):
            new.rename(target)
            return
        clear_abandoned(target)
        _carry_over(target, new, Path(), ours)
        if not _exchange(new, target):
            former = place.parent / _FORMER
            former.mkdir()
            target.rename(former / target.name)
            new.rename(target)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file whole."""
    with replacing(path) as file:
        file.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole, as a person reads it."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """An empty folder on the same disk as `folder`, made where it is missing; removed at the end with all it holds.

    Raises:
        OSError: `folder` cannot be written.
    """
    owner, missing = os.getpid(), [place for place in (folder, *folder.parents) if not place.exists()]
    clear_abandoned(folder)
    done = False
    lock: FileLock | None = None
    place = folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for _ in range(_ATTEMPTS):  # another process may take a folder without a lock for an abandoned one
            place = folder / f".promptembedder-{uuid.uuid4().hex[:12]}"
            place.mkdir()
            with suppress(Timeout, FileNotFoundError):
                lock = FileLock(str(place / _LOCK))
                lock.acquire(blocking=False)
                (place / _NEW).mkdir()
                break
        else:
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN), str(folder))
        yield place / _NEW
        done = True
    finally:
        if os.getpid() == owner:  # no fork's business
            try:
                _remove(place, folder)
            finally:  # a signal may have ended that
                _remove(place, folder)
                if lock is not None:
                    lock.release()
                for empty in [] if done else missing:
                    with suppress(OSError):
                        empty.rmdir()


def is_unfinished(path: Path) -> bool:
    """Whether a path lies in a scratch folder: half-written, perhaps by a process that was killed."""
    return any(_SCRATCH.fullmatch(part) for part in path.parts)


def clear_abandoned(folder: Path) -> None:
    """Remove what killed processes were writing in a folder; nothing of a process that lives, nothing else."""
    with suppress(OSError):
        for entry in list(os.scandir(folder)):
            if _SCRATCH.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
                with suppress(OSError, Timeout):
                    _clear(Path(entry.path), folder)


def _clear(place: Path, folder: Path) -> None:
    if {path.name for path in place.iterdir()} <= {_LOCK, _NEW, _FORMER}:
        with FileLock(str(place / _LOCK), blocking=False):
            _remove(place, folder)


def _remove(place: Path, folder: Path) -> None:
    """Remove a scratch folder; a folder whose successor did not arrive goes back to its place."""
    if place == folder:
        return
    with suppress(OSError):
        for former in list((place / _FORMER).iterdir()):
            if not os.path.lexists(folder / former.name):
                former.rename(folder / former.name)
    shutil.rmtree(place, ignore_errors=True)


def refuse_input(output: Path, *inputs: str | Path) -> None:
    """Refuse an output that is one of the inputs, under whatever name.

    Raises:
        PromptEmbedderError: it is.
    """
    for given in inputs:
        with suppress(OSError):  # one of them is not there, so they differ
            if os.path.samefile(output, given):
                raise PromptEmbedderError(f"output {output} is the input {given}; choose another file")


def _take_after(new: Path, former: Path) -> None:
    """Give a file or folder the mode and owner of what it replaces."""
    with suppress(FileNotFoundError):
        found, own = former.lstat(), new.lstat()
        if stat.S_IFMT(found.st_mode) != stat.S_IFMT(own.st_mode):
            return
        if (found.st_uid, found.st_gid) != (own.st_uid, own.st_gid) and hasattr(os, "chown"):
            with suppress(OSError):  # only root gives files away
                os.chown(new, found.st_uid, found.st_gid)
        new.chmod(stat.S_IMODE(found.st_mode))


def _settle_modes(new: Path, former: Path) -> None:
    """Give what a scratch folder holds the modes of the files it replaces, or those that the umask leaves.

    Some writers make files that are open to their owner only.
    """
    usual = stat.S_IMODE(new.stat().st_mode)  # made by `mkdir`, which goes by the umask
    for path in new.rglob("*"):
        if not path.is_symlink():
            path.chmod(usual if path.is_dir() else usual & 0o666)
            _take_after(path, former / path.relative_to(new))
    _take_after(new, former)


def _carry_over(former: Path, new: Path, inner: Path, ours: Callable[[Path], bool]) -> None:
    """Put what is not ours into the new folder, too, by a second name where the disk knows that."""
    for entry in os.scandir(former / inner):
        path = inner / entry.name
        folder = entry.is_dir(follow_symlinks=False)
        if folder and (ours(path) or (new / path).is_dir()):
            _carry_over(former, new, path, ours)
        elif not ours(path) and not os.path.lexists(new / path):
            (new / inner).mkdir(parents=True, exist_ok=True)
            if folder:
                shutil.copytree(entry.path, new / path, symlinks=True, copy_function=_link)
            else:
                _link(entry.path, str(new / path))


def _link(source: str, target: str, *, follow_symlinks: bool = False) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except (OSError, NotImplementedError):
        shutil.copy2(source, target, follow_symlinks=False)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two folders in one step; False where the system cannot."""
    if sys.platform != "linux":
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_CURRENT_FOLDER, os.fsencode(one), _CURRENT_FOLDER, os.fsencode(other), _EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(other))
