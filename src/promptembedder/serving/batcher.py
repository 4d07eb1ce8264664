"""A bounded queue of texts, and the one thread that owns the device.

Batches are put together across requests: every request gives a text in turn until a batch holds enough tokens. So a
request of one text does not wait for all texts of a large one.

Shapes: I instructions, E embedding width.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer

from promptembedder.serving.compute import Row, SoftPrompt, embed_rows
from promptembedder.serving.errors import RequestError
from promptembedder.serving.models import Served
from promptembedder.serving.settings import LEAST_TEXT_TOKENS

logger = logging.getLogger(__name__)

Embed = Callable[[SentenceTransformer, Sequence[Row]], list[NDArray[np.float32]]]

# Clients that have just been answered send their next texts at about the same time. The next batch waits for as many,
# but no longer than this share of what the last one took, within bounds, and ends when none comes for a third of that.
_SETTLE_SHARE = 0.05
_SETTLE_SECONDS = (0.006, 0.15)
_MOST_RETRY_SECONDS = 60


class Job:
    """The texts of one request.

    Args:
        model: that embeds them.
        ids: tokens of each text, as the backbone reads them.
        instructions: how many each is embedded under.
    """

    def __init__(self, model: Served, ids: Sequence[list[int]], instructions: int) -> None:
        self.model, self.ids, self.instructions = model, ids, instructions
        beside = instructions * model.module.settings.num_soft_tokens
        self.costs = [max(len(one) + beside, LEAST_TEXT_TOKENS) for one in ids]
        self.tokens = sum(self.costs)
        self.prompts: tuple[SoftPrompt, ...] = ()
        self.answer: Future[list[NDArray[np.float32]]] = Future()
        self.found: list[Any] = [None] * len(ids)
        self.next = self.done = 0
        self.dropped = False


class Batcher:
    """Queue and worker.

    Args:
        batch_tokens: of one forward; a single text may have more.
        queue_tokens: of all requests that are not answered yet.
        embed: computes; as `embed_rows`.
        ran: called with texts, tokens and seconds of each forward.
    """

    def __init__(
        self,
        batch_tokens: int,
        queue_tokens: int,
        embed: Embed = embed_rows,
        ran: Callable[[int, int, float], None] = lambda texts, tokens, seconds: None,
    ) -> None:
        self._batch_tokens, self._queue_tokens = batch_tokens, queue_tokens
        self._embed, self._ran = embed, ran
        self._changed = threading.Condition()
        self._line: deque[Job] = deque()
        self._in_line = 0  # texts
        self._expected = 0  # texts in line when the clients of the last batch have asked again
        self._ended = self._last_seconds = 0.0
        self._closed = False
        self._tokens_per_second = 0.0
        self.tokens = 0
        self._thread = threading.Thread(target=self._work, name="promptembedder-device", daemon=True)
        self._thread.start()

    def admit(self, job: Job) -> None:
        """Take room for a request; `put` or `drop` follows.

        Raises:
            RequestError: there is none now, or never will be.
        """
        if job.tokens > self._queue_tokens:
            raise RequestError(
                413,
                f"the request takes {job.tokens} tokens with template and those of {job.instructions} instructions, "
                f"and the queue holds {self._queue_tokens}; send fewer texts or instructions",
                "too_many_tokens",
                "input",
            )
        with self._changed:
            beyond = self.tokens + job.tokens - self._queue_tokens
            if beyond > 0:
                raise RequestError(
                    429,
                    f"{self.tokens} of {self._queue_tokens} tokens of the queue are in use; try again later",
                    "queue_full",
                    retry_after=self._seconds_for(beyond),
                )
            self.tokens += job.tokens

    def _seconds_for(self, tokens: int) -> int:
        if not self._tokens_per_second:
            return 1
        return max(1, min(_MOST_RETRY_SECONDS, math.ceil(tokens / self._tokens_per_second)))

    def put(self, job: Job, prompts: Sequence[SoftPrompt]) -> Future[list[NDArray[np.float32]]]:
        """Queue a request that has room; gives the embeddings (I, E) of each text."""
        with self._changed:
            job.prompts = tuple(prompts)
            job.answer.set_running_or_notify_cancel()  # so that nobody can cancel it
            self._line.append(job)
            self._in_line += len(job.ids)
            self._changed.notify_all()
        return job.answer

    def drop(self, job: Job) -> None:
        """Forget a request; its texts are not embedded, but for those that are on the device. Not harmful later."""
        with self._changed:
            if job.dropped or job.done == len(job.ids):
                return
            job.dropped = True
            self.tokens -= sum(job.costs[job.next :])
            if job in self._line:
                self._line.remove(job)
                self._in_line -= len(job.ids) - job.next
            self._changed.notify_all()

    def close(self) -> None:
        """Stop the thread when all that is queued is done."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    # -- the worker ---------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while batch := self._next():
            model, rows = batch[0][0].model.model, [Row(job.ids[n], job.prompts) for job, n in batch]
            tokens = sum(job.costs[n] for job, n in batch)
            started = time.monotonic()
            try:
                found: Sequence[Any] = self._embed_bounded(model, rows)
            except Exception as error:
                logger.exception("a batch of %d texts failed", len(rows))
                found = [error] * len(rows)
            self._last_seconds = seconds = time.monotonic() - started
            self._finish(batch, found, tokens, seconds)
            self._ran(len(rows), tokens, seconds)

    def _embed_bounded(self, model: SentenceTransformer, rows: Sequence[Row]) -> list[NDArray[np.float32]]:
        """In halves where the device has too little memory for the whole."""
        try:
            return self._embed(model, rows)
        except Exception as error:
            if type(error).__name__ != "OutOfMemoryError" or len(rows) == 1:
                raise
        half = len(rows) // 2
        return [*self._embed_bounded(model, rows[:half]), *self._embed_bounded(model, rows[half:])]

    def _next(self) -> list[tuple[Job, int]]:
        """Texts of the next batch, all of one model; empty where there will be no more."""
        with self._changed:
            while not self._line:
                if self._closed:
                    return []
                self._changed.wait()
            self._settle()
            if not self._line:  # dropped meanwhile
                return self._next()
            model, left = self._line[0].model, self._batch_tokens
            batch: list[tuple[Job, int]] = []
            others: list[Job] = []
            while self._line:
                job = self._line.popleft()
                if job.model is not model:
                    others.append(job)
                    continue
                cost = job.costs[job.next]
                if batch and cost > left:
                    self._line.appendleft(job)
                    break
                batch.append((job, job.next))
                left -= cost
                job.next += 1
                if job.next < len(job.ids):
                    self._line.append(job)
            self._line.extendleft(reversed(others))  # their turn is next
            self._in_line -= len(batch)
            return batch

    def _settle(self) -> None:
        least, most = _SETTLE_SECONDS
        settle = min(max(least, _SETTLE_SHARE * self._last_seconds), most)
        until = self._ended + settle  # where the last batch is long ago, nobody is waited for
        while not self._closed and 0 < self._in_line < self._expected and self.tokens < self._batch_tokens:
            before, left = self._in_line, until - time.monotonic()
            if left <= 0 or not self._changed.wait(min(left, settle / 3)) or self._in_line <= before:
                return

    def _finish(self, batch: list[tuple[Job, int]], found: Sequence[Any], tokens: int, seconds: float) -> None:
        answered = []
        with self._changed:
            self.tokens -= tokens
            rate = tokens / max(seconds, 1e-6)
            self._tokens_per_second = (
                rate if not self._tokens_per_second else 0.8 * self._tokens_per_second + 0.2 * rate
            )
            for (job, n), one in zip(batch, found, strict=True):
                job.done += 1
                job.found[n] = one
                if job.done == len(job.ids) and not job.dropped:
                    answered.append(job)
            self._ended, self._expected = time.monotonic(), self._in_line + sum(len(job.ids) for job in answered)
        for job in answered:
            failed = next((one for one in job.found if isinstance(one, Exception)), None)
            if failed is not None:
                job.answer.set_exception(failed)
            else:
                job.answer.set_result(job.found)
