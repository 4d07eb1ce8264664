"""Embed texts under several instructions at once."""

from __future__ import annotations

import numbers
from collections.abc import Iterable
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import batch_to_device
from torch import Tensor

from promptembedder import progress
from promptembedder.errors import PromptEmbedderError
from promptembedder.model.instructions import instruction_for
from promptembedder.model.module import SoftPromptTransformer, soft_prompt_module
from promptembedder.text import checked_texts, fill_blanks, listed


def encode(
    model: SentenceTransformer,
    texts: Iterable[str],
    instructions: Iterable[str] | str | None = None,
    *,
    batch_size: int = 32,
    show_progress_bar: bool = False,
) -> NDArray[np.float32]:
    """Embed texts under one or several instructions; in layout `suffix` every text is read only once.

    Args:
        model: made by `build` or `load`.
        texts: N texts, any iterable of them, by position. Blank ones are read as a full stop, with one warning.
        instructions: one instruction, several (I of them), or unset for the model's default. Blank ones mean that, too.
        batch_size: texts per forward.
        show_progress_bar: print one.

    Returns:
        (N, E), or (I, N, E) for several instructions, float32; N may be 0. On the unit sphere, but for a model with a
        `truncate_dim`: the first numbers of such vectors.

    Raises:
        PromptEmbedderError: a text or an instruction is no string, one string in place of several texts. All arguments
            are checked before any text is read, and a text is named by its place, from 0.
    """
    module = soft_prompt_module(model)
    if not isinstance(batch_size, numbers.Integral) or batch_size < 1:
        raise PromptEmbedderError(f"batch_size is {batch_size!r}, expected a number of texts, 1 or more")
    texts = checked_texts(texts)
    for n, text in enumerate(texts):
        module.reader.check_readable(text, f"text {n}")
    one = instructions is None or isinstance(instructions, str)
    given: list[Any] = [instructions] if one else listed(cast(Iterable[str], instructions), "instructions")
    several = [instruction_for(model, instruction) for instruction in given]
    for instruction in several:
        module.check_instruction(instruction)
    texts = fill_blanks(texts)
    width = model.get_embedding_dimension() or module.get_embedding_dimension()
    result = np.zeros((len(several), len(texts), width), dtype=np.float32)
    by_length = sorted(range(len(texts)), key=lambda n: -len(texts[n]))
    starts = range(0, len(texts), batch_size)
    model.eval()
    for start in progress.bar(starts, "Batches", show=show_progress_bar):
        picked = by_length[start : start + batch_size]
        batch = [texts[n] for n in picked]
        for i, embedding_BE in enumerate(_encode_batch(model, module, batch, several)):
            result[i, picked] = embedding_BE[:, :width].float().cpu().numpy()
    return result[0] if one else result


@torch.inference_mode()
def _encode_batch(
    model: SentenceTransformer, module: SoftPromptTransformer, texts: list[str], instructions: list[str]
) -> list[Tensor]:
    tokens = batch_to_device(module.preprocess(texts), model.device)
    embeddings = []
    for embedding_BE in module.embed(tokens["input_ids"], tokens["attention_mask"], instructions):
        features = {"sentence_embedding": embedding_BE}
        for later in list(model)[1:]:
            features = later(features)
        embeddings.append(features["sentence_embedding"])
    return embeddings
