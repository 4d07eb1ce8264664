"""Soft prompts remembered by instruction, as long as no weight changes.

Shapes: R rows of a soft prompt, D backbone width.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import torch
from cachetools import LRUCache
from torch import Tensor

from promptembedder.model.prompter import Opening

# Thousands of soft prompts, or, at 31 x 5 x 576 floats of a deep one, some 180.
_REMEMBERED_BYTES = 64 * 2**20
# Instructions that the prompter reads at once.
_TOGETHER = 16


class SoftPromptMemory:
    """Keeps what the prompter wrote. Threads take turns."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._held: LRUCache[str, Tensor] = LRUCache(_REMEMBERED_BYTES, getsizeof=lambda soft_1RD: soft_1RD.nbytes)
        self._version: Tensor | None = None
        self._opening: Opening | None = None
        self._read = False

    def recall(
        self,
        instructions: Sequence[str],
        version: Tensor,
        read_opening: Callable[[], Opening | None],
        write: Callable[[Sequence[str], Opening | None], Tensor],
    ) -> list[Tensor]:
        """Soft prompts (1, R, D) of instructions; the prompter writes those that are not held, several at once.

        Args:
            instructions: any number.
            version: of the weights; another one than before empties the memory.
            read_opening: what all requests begin with.
            write: soft prompts (N, R, D) of N instructions.
        """
        with self._lock:
            known = self._version
            # The library moves models between devices, and these tensors do not go along.
            if known is None or known.device != version.device or not torch.equal(known, version):
                self._held.clear()
                self._version, self._read = version, False
            held = {instruction: self._held.get(instruction) for instruction in instructions}
            found = {instruction: soft_1RD for instruction, soft_1RD in held.items() if soft_1RD is not None}
            missing = [instruction for instruction in held if instruction not in found]
            # Not inference tensors: training code may meet them again outside inference mode.
            with torch.inference_mode(False), torch.no_grad():
                for start in range(0, len(missing), _TOGETHER):
                    found |= self._written(missing[start : start + _TOGETHER], read_opening, write)
            return [found[instruction] for instruction in instructions]

    def __len__(self) -> int:
        """Soft prompts held."""
        return len(self._held)

    def _written(
        self,
        instructions: Sequence[str],
        read_opening: Callable[[], Opening | None],
        write: Callable[[Sequence[str], Opening | None], Tensor],
    ) -> dict[str, Tensor]:
        if not self._read:  # also for a first request: in bfloat16 it would differ a little if it were read whole
            self._opening, self._read = read_opening(), True
        soft_NRD = write(instructions, self._opening)
        written = {instruction: soft_NRD[n : n + 1].clone() for n, instruction in enumerate(instructions)}
        for instruction, soft_1RD in written.items():
            if soft_1RD.nbytes <= self._held.maxsize:
                self._held[instruction] = soft_1RD
        return written

    def __reduce__(self) -> tuple[type[SoftPromptMemory], tuple[()]]:
        """A copy begins empty: what is remembered may lie on an accelerator, which a process of a pool does not see."""
        return SoftPromptMemory, ()
