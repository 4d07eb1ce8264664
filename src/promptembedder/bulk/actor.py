"""The actor class for Ray pipelines of a user's own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from promptembedder.bulk.job import Job, chosen_instructions
from promptembedder.errors import PromptEmbedderError


def encoder(
    model: str | Path,
    instructions: Mapping[str, str] | str | None = None,
    *,
    text_field: str = "text",
    batch_tokens: int | None = None,
    device: str | None = None,
) -> type:
    """A class whose instances embed batches; Ray Data makes actors of it.

    Args:
        model: folder, name or hub id of a saved model.
        instructions: by name, each for a column; one alone is named `query`; unset: the model's default.
        text_field: column of the text.
        batch_tokens: of one forward; unset: 2,048 on a CPU, 16,384 on an accelerator.
        device: where the model runs; unset: the accelerator, if there is one.

    Returns:
        A class without constructor arguments. Called with a batch, a dict of arrays, it gives the batch with a column
        (N, E) float32 for each instruction.

    Raises:
        PromptEmbedderError: no such model, or names that columns cannot have. A call raises it for a batch without the
            text's column, or with anything but strings there.

    Example:
        >>> from promptembedder.bulk import encoder
        >>> dataset.map_batches(  # doctest: +SKIP
        ...     encoder("smollm2-135m", {"topic": "Find the topic."}),
        ...     batch_size=1024,
        ...     compute=ray.data.ActorPoolStrategy(size=2),
        ... )
    """
    one = instructions if isinstance(instructions, str) else None
    named = {} if instructions is None or isinstance(instructions, str) else dict(instructions)
    job = Job(str(model), chosen_instructions(str(model), one, False, named), batch_tokens=batch_tokens, device=device)

    class Encoder:
        """Holds the model."""

        def __init__(self) -> None:
            from promptembedder.bulk.text_embedder import TextEmbedder

            self._embedder = TextEmbedder(job)

        def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
            """The batch with embeddings."""
            if text_field not in batch:
                raise PromptEmbedderError(f"the batch has no column {text_field!r}, only {', '.join(batch)}")
            texts = [str(text) if isinstance(text, np.str_) else text for text in batch[text_field]]
            return {**batch, **self._embedder.embed(texts)}

    return Encoder
