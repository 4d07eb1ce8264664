"""A model under the instructions of a job: texts in, stored values out.

Shapes: N texts, E embedding width, S values of an embedding as stored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sentence_transformers.util import quantize_embeddings

from promptembedder.bulk.job import Job
from promptembedder.errors import PromptEmbedderError
from promptembedder.export.compiled import compile_model
from promptembedder.model.module import soft_prompt_module
from promptembedder.model.store import load
from promptembedder.model.token_batches import embed_ids

Ranges = Mapping[str, NDArray[np.float32]]
_BATCH_TOKENS = {"cpu": 2048}
_BATCH_TOKENS_OF_ACCELERATORS = 16_384


@dataclass(frozen=True)
class Chunk:
    """A part of a text.

    Attributes:
        number: from 0.
        start: its first character in the text.
        end: the character after its last.
    """

    number: int
    start: int
    end: int


class TextEmbedder:
    """A model that is open.

    Args:
        job: its settings.
        ranges: of values under each instruction, (2, E) of least and greatest; needed for int8.

    Raises:
        PromptEmbedderError: the model cannot be opened, or cannot read an instruction.
    """

    def __init__(self, job: Job, ranges: Ranges | None = None) -> None:
        self.job, self.ranges = job, ranges or {}
        self.model = load(job.model, device=job.device)
        self.model.eval()
        if job.max_text_tokens is not None:
            self.model.max_seq_length = job.max_text_tokens
        self._module = soft_prompt_module(self.model)
        for instruction in job.instructions.values():
            self._module.check_instruction(instruction)
        self._batch_tokens = job.batch_tokens or _BATCH_TOKENS.get(
            self.model.device.type, _BATCH_TOKENS_OF_ACCELERATORS
        )

    def digests(self) -> dict[str, str | None]:
        """Identity of the embeddings under each instruction, as exports have it; None where there is none."""
        try:
            compiled = compile_model(self.model, self.job.instructions, with_document=False)
        except PromptEmbedderError:  # such as a module that no export can hold
            return dict.fromkeys(self.job.instructions)
        return {name: compiled.digest(name) for name in self.job.instructions}

    def readable(self, text: str) -> str | None:
        """Why the model cannot read a text; None where it can."""
        try:
            self._module.reader.check_readable(text, "text")
        except PromptEmbedderError as error:
            return str(error)
        return None

    def embed(self, texts: Sequence[str]) -> dict[str, NDArray[np.float32]]:
        """Embeddings (N, E) of length 1 under each instruction."""
        limit, reader = self._module.settings.max_text_tokens, self._module.reader
        ids = [reader.framed(reader.text_ids(text), limit) for text in texts]
        found_INE = embed_ids(self.model, ids, list(self.job.instructions.values()), self._batch_tokens)
        width = self.job.truncate_dim
        if width is not None or self.model.truncate_dim is not None:
            found_INE = found_INE[..., :width]
            found_INE = found_INE / np.maximum(np.linalg.norm(found_INE, axis=-1, keepdims=True), 1e-12)
        return dict(zip(self.job.instructions, found_INE, strict=True))

    def stored(self, embeddings: Mapping[str, NDArray[np.float32]]) -> dict[str, NDArray[Any]]:
        """Values (N, S) in the job's precision."""
        precision = self.job.precision
        if precision in ("float32", "float16"):
            return {name: values.astype(precision) for name, values in embeddings.items()}
        return {
            name: np.asarray(quantize_embeddings(values, precision, ranges=self.ranges.get(name)))
            for name, values in embeddings.items()
        }

    def chunks(self, text: str) -> list[Chunk]:
        """Parts of a text of at most `chunk_tokens` tokens; a text that is no longer than that is one."""
        size, overlap = self.job.chunk_tokens, self.job.overlap
        assert size is not None
        spans = self._module.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        offsets = [(start, end) for start, end in spans["offset_mapping"] if end > start]
        if len(offsets) <= size:
            return [Chunk(0, 0, len(text))]
        starts = range(0, max(1, len(offsets) - overlap), size - overlap)
        found = []
        for number, first in enumerate(starts):
            last = min(first + size, len(offsets)) - 1
            found.append(Chunk(number, offsets[first][0], offsets[last][1]))
        return found


def ranges_of(embeddings: Mapping[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
    """Least and greatest value (2, E) of each dimension, by instruction."""
    return {name: np.stack([values.min(0), values.max(0)]) for name, values in embeddings.items()}
