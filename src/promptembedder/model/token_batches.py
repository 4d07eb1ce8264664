"""Embed tokenised texts in batches of a number of tokens, the longest texts first.

Shapes: N texts, B texts of a batch, T text tokens, I instructions, E embedding width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer

from promptembedder.model.module import soft_prompt_module
from promptembedder.model.reader import padded

# A text counts as this many tokens at least, so that one batch does not hold thousands of short ones.
LEAST_TEXT_TOKENS = 8


@torch.inference_mode()
def embed_ids(
    model: SentenceTransformer, ids: Sequence[list[int]], instructions: Sequence[str], batch_tokens: int
) -> NDArray[np.float32]:
    """Embeddings (I, N, E) float32 of texts under instructions; in layout `suffix` every text is read once.

    Args:
        model: made by `build` or `load`.
        ids: tokens of each text as `TextReader.framed` gives them.
        instructions: what to embed the texts under.
        batch_tokens: of one forward, padding counted; a longer text has a forward of its own.
    """
    module = soft_prompt_module(model)
    # Once for all batches: to look whether the model has changed takes as long as a small batch.
    soft_prompts = module.soft_prompts(instructions)
    instruction_ids = [module.instruction_ids(instruction) for instruction in instructions]
    width = model.get_embedding_dimension() or module.get_embedding_dimension()
    result = np.zeros((len(instructions), len(ids), width), np.float32)
    for picked in batches_by_tokens([len(one) for one in ids], batch_tokens):
        features = padded([ids[n] for n in picked])
        ids_BT, mask_BT = (features[name].to(model.device) for name in ("input_ids", "attention_mask"))
        for i, embedding_BE in enumerate(module.embed_under(ids_BT, mask_BT, soft_prompts, instruction_ids)):
            features = {"sentence_embedding": embedding_BE}
            for later in list(model)[1:]:
                features = later(features)
            result[i, picked] = features["sentence_embedding"][:, :width].float().cpu().numpy()
    return result


def batches_by_tokens(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Places of texts of similar length, whose number times the longest of them is at most `batch_tokens`.

    Example:
        >>> list(batches_by_tokens([10, 30, 20, 40], 50))
        [[3], [1], [2, 0]]
    """
    order = sorted(range(len(lengths)), key=lambda n: -lengths[n])
    start = 0
    while start < len(order):
        longest = max(lengths[order[start]], LEAST_TEXT_TOKENS)
        stop = start + max(1, batch_tokens // longest)
        yield order[start:stop]
        start = stop
