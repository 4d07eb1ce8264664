"""What happens to a request, in order: tokenise, wait for soft prompts, compute, answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from promptembedder.errors import PromptEmbedderError
from promptembedder.model.explain import explain
from promptembedder.serving.answers import answer
from promptembedder.serving.batcher import Batcher, Job
from promptembedder.serving.compute import SoftPrompt
from promptembedder.serving.errors import RequestError
from promptembedder.serving.metrics import Metrics
from promptembedder.serving.models import Catalogue, Served
from promptembedder.serving.schema import EmbeddingsRequest, ExplainRequest
from promptembedder.serving.settings import ServeSettings
from promptembedder.serving.soft_prompts import SoftPrompts
from promptembedder.serving.texts import Tokenised, check_instructions, tokenise

T = TypeVar("T")


class Service:
    """Models, queue and threads of a server; knows nothing of HTTP.

    Args:
        models: at least one.
        settings: limits.
        warm: instructions whose soft prompts are written at once, for all models.
    """

    def __init__(self, models: Sequence[Served], settings: ServeSettings, warm: Sequence[str] = ()) -> None:
        self.catalogue, self.settings, self.metrics = Catalogue(models), settings, Metrics()
        device = models[0].model.device.type
        self.batcher = Batcher(settings.batch_tokens_on(device), settings.queue_tokens, ran=self.metrics.ran)
        self.soft_prompts = SoftPrompts(settings.new_instructions, settings.new_per_client)
        # One thread each: tokenising must not wait for the answers of others, and neither holds up the event loop.
        self._tokeniser = ThreadPoolExecutor(1, "promptembedder-tokenise")
        self._finisher = ThreadPoolExecutor(1, "promptembedder-finish")
        self.stopping = False
        # The models' own are written before the server listens: they are known from the first request on.
        for own in [self.soft_prompts.keep(one, text) for one in models for text in dict.fromkeys(one.own.values())]:
            own.result()
        self._warming = [self.soft_prompts.keep(one, text) for one in models for text in dict.fromkeys(warm)]
        self.metrics.watch("queue_tokens", "Tokens that wait or are computed.", lambda: self.batcher.tokens)
        self.metrics.watch("soft_prompts", "Soft prompts remembered.", lambda: len(self.soft_prompts))
        self.metrics.watch("waiting_instructions", "That wait for the prompter.", lambda: self.soft_prompts.waiting)

    @property
    def status(self) -> str:
        """`ready`, `warming` or `stopping`."""
        if self.stopping:
            return "stopping"
        return "ready" if all(one.done() for one in self._warming) else "warming"

    async def embed(self, request: EmbeddingsRequest, client: str) -> bytes:
        """The body of an answer; when cancelled, the work that is left is dropped.

        Raises:
            RequestError: the request cannot be answered.
        """
        started = time.monotonic()
        model, instructions = self.catalogue.resolve(request.model, request.instruction, request.input_type)
        if request.dimensions is not None and request.dimensions > model.width:
            raise RequestError(
                400,
                f"dimensions is {request.dimensions}, more than the {model.width} of {model.name}",
                "too_many_dimensions",
                "dimensions",
            )
        texts = await self._in(self._tokeniser, lambda: self._tokenised(model, request, instructions))
        job = Job(model, texts.rows, len(instructions))
        self.batcher.admit(job)
        try:
            prompts = await self._prompts(model, instructions, client)
            found = await asyncio.wrap_future(self.batcher.put(job, prompts))
        finally:
            self.batcher.drop(job)  # what is answered is left alone
        body = await self._in(
            self._finisher,
            lambda: answer(
                request.model,
                found,
                texts,
                instructions=None if request.instruction is None else instructions,
                width=request.dimensions,
                as_base64=request.encoding_format == "base64",
            ),
        )
        self.metrics.seconds.observe(time.monotonic() - started)
        return body

    def _tokenised(self, model: Served, request: EmbeddingsRequest, instructions: list[str]) -> Tokenised:
        check_instructions(model, [one for one in instructions if self.soft_prompts.find(model, one) is None])
        truncate = request.truncate is not False
        return tokenise(model, request.input, truncate=truncate, most=self.settings.request_tokens)

    async def _prompts(self, model: Served, instructions: list[str], client: str) -> list[SoftPrompt]:
        found = {one: self.soft_prompts.find(model, one) for one in instructions}
        asked: list[str] = []
        futures: list[Future[SoftPrompt]] = []
        try:
            for one in [one for one, prompt in found.items() if prompt is None]:
                futures.append(self.soft_prompts.ask(model, one, client))
                asked.append(one)
            self.metrics.new_instructions.inc(len(asked))
            for one, future in zip(asked, futures, strict=True):
                # Shielded, because other requests may wait for the same.
                written: SoftPrompt = await asyncio.shield(asyncio.wrap_future(future))
                found[one] = written
        finally:
            for one in asked:
                self.soft_prompts.leave(model, one)
        return [prompt for one in instructions if (prompt := found[one]) is not None]

    async def explain(self, request: ExplainRequest) -> dict[str, Any]:
        """The soft tokens of an instruction in words.

        Raises:
            RequestError: the request cannot be answered.
        """
        model, (instruction,) = self.catalogue.resolve(request.model, request.instruction, None)
        try:
            readings = await asyncio.wrap_future(
                self.soft_prompts.run(lambda: explain(model.model, instruction, request.top))
            )
        except PromptEmbedderError as error:
            raise RequestError(400, str(error), "not_explained", "instruction") from error
        soft_tokens = [
            {"words": [{"text": text, "weight": weight} for text, weight in one.words], "entropy": one.entropy}
            for one in readings
        ]
        return {"model": request.model, "instruction": instruction, "soft_tokens": soft_tokens}

    async def _in(self, threads: ThreadPoolExecutor, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(threads, work)

    def close(self) -> None:
        """Stop all threads, when the queue is empty."""
        self.soft_prompts.close()
        self.batcher.close()
        self._tokeniser.shutdown()
        self._finisher.shutdown()
