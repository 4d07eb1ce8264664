"""Soft prompts of a server: remembered, and written by a thread of its own.

The thread that owns the device never waits for the prompter: it gets soft prompts that are there.
"""

from __future__ import annotations

import os
import sys
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

from promptembedder.serving.compute import SoftPrompt, write
from promptembedder.serving.errors import RequestError
from promptembedder.serving.models import Served

# Thousands of soft prompts, or, at 31 x 5 x 576 floats of a deep one, some 750.
_REMEMBERED_BYTES = 256 * 2**20
# Of them, those that one client was the first to send.
_CLIENT_BYTES = _REMEMBERED_BYTES // 4
_RETRY_SECONDS = 2
# Lower than that of the thread that embeds texts, where threads have priorities of their own.
_NICE = 10

T = TypeVar("T")
Key = tuple[int, str]


@dataclass(eq=False)
class _Waiting:
    """An instruction that waits for the prompter.

    Attributes:
        future: its soft prompt.
        client: that sent it first.
        requests: that wait for it.
    """

    future: Future[SoftPrompt]
    client: str
    requests: int = 0


class SoftPrompts:
    """Soft prompts by model and instruction.

    Args:
        most_waiting: instructions that wait for the prompter at once.
        most_of_client: of them, one client's.
    """

    def __init__(self, most_waiting: int, most_of_client: int) -> None:
        self._most_waiting, self._most_of_client = most_waiting, most_of_client
        self._lock = threading.RLock()
        self._kept: dict[Key, SoftPrompt] = {}
        self._held: OrderedDict[Key, tuple[SoftPrompt, str]] = OrderedDict()
        self._bytes: Counter[str] = Counter()
        self._waiting: dict[Key, _Waiting] = {}
        self._writer = ThreadPoolExecutor(1, "promptembedder-prompter", _be_nice)

    def keep(self, model: Served, instruction: str) -> Future[SoftPrompt]:
        """Write the soft prompt of an instruction and never forget it; for what a server is started with."""
        future = self._writer.submit(write, model.module, instruction)
        future.add_done_callback(lambda done: self._keep((id(model), instruction), done))
        return future

    def _keep(self, key: Key, done: Future[SoftPrompt]) -> None:
        if not done.cancelled() and done.exception() is None:
            self._kept[key] = done.result()

    def find(self, model: Served, instruction: str) -> SoftPrompt | None:
        """A soft prompt that is there."""
        key = (id(model), instruction)
        if key in self._kept:
            return self._kept[key]
        with self._lock:
            if key not in self._held:
                return None
            self._held.move_to_end(key)
            return self._held[key][0]

    def ask(self, model: Served, instruction: str, client: str) -> Future[SoftPrompt]:
        """A soft prompt that will be written; `leave` must follow, when it is there or no longer wanted.

        Raises:
            RequestError: too many wait, of this client or of all.
        """
        key = (id(model), instruction)
        with self._lock:
            waiting = self._waiting.get(key)
            if waiting is None:
                own = sum(1 for other in self._waiting.values() if other.client == client)
                for count, most, whose in (
                    (own, self._most_of_client, "of this client"),
                    (len(self._waiting), self._most_waiting, "of all clients"),
                ):
                    if count >= most:
                        raise RequestError(
                            429,
                            f"{count} new instructions {whose} wait for the prompter already; try again later",
                            "too_many_new_instructions",
                            "instruction",
                            _RETRY_SECONDS,
                        )
                future = self._writer.submit(write, model.module, instruction)
                waiting = self._waiting[key] = _Waiting(future, client)
                future.add_done_callback(lambda done: self._written(key, done))
            waiting.requests += 1
            return waiting.future

    def leave(self, model: Served, instruction: str) -> None:
        """A request no longer waits; an instruction that none waits for is not written."""
        with self._lock:
            waiting = self._waiting.get((id(model), instruction))
            if waiting is None:
                return
            waiting.requests -= 1
            if waiting.requests == 0:
                waiting.future.cancel()

    def _written(self, key: Key, done: Future[SoftPrompt]) -> None:
        with self._lock:
            waiting = self._waiting.get(key)
            if waiting is None or waiting.future is not done:
                return
            del self._waiting[key]
            if done.cancelled() or done.exception() is not None:
                return
            prompt, client = done.result(), waiting.client
            self._held[key] = prompt, client
            self._bytes[client] += prompt.soft_1RD.nbytes
            while self._bytes[client] > _CLIENT_BYTES:
                self._forget(next(key for key, (_, other) in self._held.items() if other == client))
            while self._bytes.total() > _REMEMBERED_BYTES:
                self._forget(next(iter(self._held)))

    def _forget(self, key: Key) -> None:
        prompt, client = self._held.pop(key)
        self._bytes[client] -= prompt.soft_1RD.nbytes
        if not self._bytes[client]:
            del self._bytes[client]

    def run(self, work: Callable[[], T]) -> Future[T]:
        """Something else for the prompter's thread."""
        return self._writer.submit(work)

    def __len__(self) -> int:
        """Soft prompts remembered."""
        return len(self._kept) + len(self._held)

    @property
    def waiting(self) -> int:
        """Instructions that wait for the prompter."""
        return len(self._waiting)

    def close(self) -> None:
        """Stop the thread; what it has not begun is not written."""
        self._writer.shutdown(cancel_futures=True)


def _be_nice() -> None:
    # On Linux a thread has a priority of its own, and hands it on to the threads that torch makes for it.
    if sys.platform == "linux":
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
