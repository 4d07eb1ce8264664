"""Text-state cache: states of texts kept in memory or on disk, so that later epochs skip the frozen pass.

Layout `suffix` only: there the states of a text do not depend on the soft prompt, nor on anything that is trained.

Shapes: L tokens of a text, G keys and values of the layers of one kind, H key/value heads, d head width.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import uuid
import weakref
import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from stat import S_ISREG
from typing import Literal

import safetensors.torch
import torch
from cachetools import LRUCache
from filelock import FileLock, Timeout
from torch import Tensor

from promptembedder import atomic
from promptembedder.errors import PromptEmbedderError

logger = logging.getLogger(__name__)


StatePrecision = Literal["same", "bfloat16", "int8"]
_FORMAT = 1
_INDEX = "text-states.json"
_ENDING = ".states"
_IS_STATES = re.compile(rf"[0-9a-f]{{40}}{re.escape(_ENDING)}")
_CHECKSUM_BYTES = 4
# One file per process that uses the folder, named by backbone and precision.
_IN_USE = ".in_use-"


class TextStateCache(ABC):
    """Text states by token ids; the least recently used are dropped first. `open_text_cache` opens one.

    `put` returns what a later `get` returns, so a text reads the same whether its states were computed or found.

    Args:
        precision: `same` keeps states as they are; `bfloat16` and `int8` (one scale per head and token) are smaller.

    Attributes:
        hits: texts found.
        misses: texts not found.
    """

    def __init__(self, precision: StatePrecision) -> None:
        self._precision = precision
        self.hits = self.misses = 0

    @staticmethod
    def key(ids_L: Tensor) -> str:
        """The key of a text: a hash of its token ids."""
        return hashlib.sha256(ids_L.to("cpu", torch.int64).numpy().tobytes()).hexdigest()[:40]

    def get(self, key: str, device: torch.device) -> list[Tensor] | None:
        """The states of a text on a device, as `states.packed` made them; None if not held."""
        found = self._read(key)
        if found is None:
            self.misses += 1
            return None
        self.hits += 1
        # Tensors are moved before they are decoded: int8 is a quarter of the bytes.
        # Only CUDA waits for a copy before it uses the memory again.
        apart = device.type == "cuda"
        return _decoded({name: tensor.to(device, non_blocking=apart) for name, tensor in found.items()})

    def put(self, key: str, row: Sequence[Tensor]) -> list[Tensor]:
        """Keep the states of a text and return them as `get` will, in the cache's precision."""
        encoded = _encoded(row, self._precision)
        self._write(key, encoded)
        return _decoded(encoded)

    @property
    def hit_rate(self) -> float:
        """Share of the texts that were found."""
        return self.hits / max(1, self.hits + self.misses)

    def close(self) -> None:  # noqa: B027
        """Let a run with another backbone or precision have the folder; done with what is in memory."""

    @property
    @abstractmethod
    def used_bytes(self) -> int:
        """Size of what is held."""

    @abstractmethod
    def _read(self, key: str) -> dict[str, Tensor] | None: ...

    @abstractmethod
    def _write(self, key: str, tensors: dict[str, Tensor]) -> None: ...


class _InMemory(TextStateCache):
    def __init__(self, budget: int, precision: StatePrecision) -> None:
        super().__init__(precision)
        self._held: LRUCache[str, dict[str, Tensor]] = LRUCache(budget, getsizeof=_resident)

    @property
    def used_bytes(self) -> int:
        return int(self._held.currsize)

    def _read(self, key: str) -> dict[str, Tensor] | None:
        return self._held.get(key)

    def _write(self, key: str, tensors: dict[str, Tensor]) -> None:
        kept = {
            # Pinned memory lets the copy back to CUDA overlap with computing; other devices do not support it.
            name: tensor.cpu().pin_memory() if tensor.device.type == "cuda" else tensor.cpu()
            for name, tensor in tensors.items()
        }
        if _resident(kept) <= self._held.maxsize:
            self._held[key] = kept


class _Files(LRUCache[str, tuple[Path, int]]):
    """Paths and sizes of files; files beyond the budget are deleted."""

    def popitem(self) -> tuple[str, tuple[Path, int]]:
        key, (path, size) = super().popitem()
        path.unlink(missing_ok=True)
        return key, (path, size)


class _OnDisk(TextStateCache):
    """One file per text: a checksum, then safetensors.

    Workers of a machine share the folder, and so may runs with one backbone. Each deletes its own files and its part of
    the files of earlier runs.
    """

    def __init__(
        self, folder: Path, budget: int, precision: StatePrecision, identity: str, worker: int, workers: int
    ) -> None:
        super().__init__(precision)
        self._folder = folder
        self._identity = identity.encode()
        self._stopped = False
        self._said_damaged = False
        self._files = _Files(budget // workers, getsizeof=lambda entry: entry[1])
        with FileLock(str(folder / ".lock")):
            self._open(identity)
        # Open as long as this cache: what is half-written when the process is killed is found again and removed.
        opened = ExitStack()
        self._scratch = opened.enter_context(atomic.scratch(folder))
        self._leave_scratch = weakref.finalize(self, opened.close)
        held = self._held_before()
        there = shutil.disk_usage(folder).free + sum(size for _, _, size in held)
        try:
            _check_budget(budget, there, f"the room on the disk of {folder}")
        except PromptEmbedderError:
            self.close()
            raise
        for _, path, size in sorted(held):
            if int(path.stem[:8], 16) % workers == worker:
                self._own(path.stem, path, size)

    @property
    def used_bytes(self) -> int:
        return int(self._files.currsize)

    def close(self) -> None:
        self._stopped = True
        self._leave_scratch()
        self._used.release()
        Path(self._used.lock_file).unlink(missing_ok=True)

    def _join(self, identity: str) -> None:
        """Hold a file that says whose states are in use; who is dead holds none.

        Raises:
            PromptEmbedderError: a run with another backbone or precision uses the folder.
        """
        for path in self._folder.glob(f"{_IN_USE}*"):
            try:
                with FileLock(str(path), timeout=0):
                    path.unlink(missing_ok=True)
            except Timeout:
                if path.name.split("-")[1] != identity:
                    raise PromptEmbedderError(
                        f"another run keeps states of another backbone or precision in {self._folder}; wait until it "
                        "ends, or choose another text_state_folder"
                    ) from None
        self._used = FileLock(str(self._folder / f"{_IN_USE}{identity}-{uuid.uuid4().hex[:8]}"), timeout=0)
        self._used.acquire()

    def _open(self, identity: str) -> None:
        index = self._folder / _INDEX
        expected = {"format": _FORMAT, "identity": identity}
        others = [p for p in self._folder.iterdir() if p != index and not p.name.startswith(".")]
        try:
            found = json.loads(index.read_text(encoding="utf-8")) if index.is_file() else None
        except ValueError:
            found = "damaged"
        if found is None and others:
            raise PromptEmbedderError(
                f"text-state folder {self._folder} holds other files; choose an empty or a new folder"
            )
        self._join(hashlib.sha256(self._identity).hexdigest()[:16])
        if found == expected:
            return
        if found is not None:
            logger.warning("text states in %s belong to another backbone or precision: rebuilt", self._folder)
            for path in self._folder.glob(f"??/*{_ENDING}"):
                path.unlink(missing_ok=True)
        atomic.write_text(index, json.dumps(expected))

    def _held_before(self) -> list[tuple[float, Path, int]]:
        held = []
        for path in self._folder.glob("??/*"):
            try:
                stat = path.stat()
            except FileNotFoundError:  # another worker deleted it
                continue
            if _IS_STATES.fullmatch(path.name) and S_ISREG(stat.st_mode):
                held.append((stat.st_mtime, path, stat.st_size))
        return held

    def _own(self, key: str, path: Path, size: int) -> None:
        if size > self._files.maxsize:
            path.unlink(missing_ok=True)
        else:
            self._files[key] = (path, size)

    def _path(self, key: str) -> Path:
        return self._folder / key[:2] / f"{key}{_ENDING}"

    def _checksum(self, body: bytes) -> bytes:
        # The identity is included, because another run may change the folder's identity meanwhile.
        return zlib.crc32(body, zlib.crc32(self._identity)).to_bytes(_CHECKSUM_BYTES, "big")

    def _read(self, key: str) -> dict[str, Tensor] | None:
        path = self._path(key)
        try:
            content = path.read_bytes()
        except OSError:
            self._files.pop(key, None)
            return None
        checksum, body = content[:_CHECKSUM_BYTES], content[_CHECKSUM_BYTES:]
        if self._checksum(body) != checksum:
            if not self._said_damaged:
                self._said_damaged = True
                logger.warning("damaged text states in %s: computed again (warned once)", path)
            self._files.pop(key, None)
            return None
        with suppress(OSError):
            os.utime(path)  # the next run sorts by it
        self._files.get(key)  # counts as use
        return safetensors.torch.load(body)

    def _write(self, key: str, tensors: dict[str, Tensor]) -> None:
        if self._stopped:
            return
        body = safetensors.torch.save({name: tensor.cpu() for name, tensor in tensors.items()})
        size = len(body) + _CHECKSUM_BYTES
        if size > self._files.maxsize:
            return
        path = self._path(key)
        scratch = self._scratch / key
        try:
            path.parent.mkdir(exist_ok=True)
            scratch.write_bytes(self._checksum(body) + body)
            scratch.replace(path)
        except OSError as error:
            self._stopped = True
            with suppress(OSError):
                scratch.unlink(missing_ok=True)
            logger.warning("text states are no longer written to %s: %s", self._folder, error.strerror or error)
            return
        self._own(key, path, size)


def open_text_cache(
    budget: int,
    *,
    identity: str,
    precision: StatePrecision = "same",
    folder: str | Path | None = None,
    worker: int = 0,
    workers: int = 1,
) -> TextStateCache:
    """Open a cache.

    Args:
        budget: bytes that all workers of this machine together may hold.
        identity: of the backbone and of the precision it reads texts in.
        precision: of the states held.
        folder: where to keep them; unset: in memory. A folder of another identity is emptied first.
        worker: number of this worker on its machine.
        workers: number of workers on the machine.

    Raises:
        PromptEmbedderError: budget above the memory or the disk; a folder that cannot be written, holds other files,
            or is in use for another backbone or precision.
    """
    if folder is None:
        import psutil

        _check_budget(budget, psutil.virtual_memory().total, "the memory")
        return _InMemory(budget // workers, precision)
    place = Path(folder)
    try:
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=place):
            pass
        return _OnDisk(place, budget, precision, f"{identity} {precision}", worker, workers)
    except OSError as error:
        raise PromptEmbedderError(f"text-state folder {place} cannot be written: {error.strerror or error}") from error


def _check_budget(budget: int, there: int, what: str) -> None:
    if budget > there:
        raise PromptEmbedderError(
            f"text_state_cache of {budget / 2**30:.1f} GiB is larger than {what}, {there / 2**30:.1f} GiB"
        )


def _encoded(row: Sequence[Tensor], precision: StatePrecision) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for n, part_GHLd in enumerate(row):
        if precision == "same":
            tensors[str(n)] = part_GHLd
        elif precision == "bfloat16":
            tensors[str(n)] = part_GHLd.to(torch.bfloat16)
        else:
            # Scales are rounded before they are used, so that decoding is exact to the last bit.
            scale_GHL = (part_GHLd.abs().amax(-1, keepdim=True).float() / 127).to(torch.bfloat16)
            divided_GHLd = part_GHLd.float() / scale_GHL.float().clamp(min=1e-30)
            tensors[str(n)] = divided_GHLd.round().clamp(-127, 127).to(torch.int8)
            tensors[f"{n}.scale"] = scale_GHL
    return tensors


def _decoded(tensors: dict[str, Tensor]) -> list[Tensor]:
    row = []
    for n in range(sum(name.isdigit() for name in tensors)):
        scale = tensors.get(f"{n}.scale")
        row.append(tensors[str(n)] if scale is None else tensors[str(n)].float() * scale.float())
    return row


def _resident(tensors: dict[str, Tensor]) -> int:
    """Bytes of memory; torch rounds pinned blocks up to powers of two."""
    return sum(1 << (t.nbytes - 1).bit_length() if t.is_pinned() else t.nbytes for t in tensors.values())
