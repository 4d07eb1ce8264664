"""Last stage of a request: embeddings to the body of an answer.

Shapes: N texts, I instructions, E embedding width.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence

import numpy as np
import orjson
from numpy.typing import NDArray

from promptembedder.serving.texts import Tokenised


def answer(
    model: str,
    embeddings: Sequence[NDArray[np.float32]],
    texts: Tokenised,
    *,
    instructions: Sequence[str] | None,
    width: int | None,
    as_base64: bool,
) -> bytes:
    """The body of an answer, as JSON.

    Args:
        model: name that the client has used.
        embeddings: (I, E) of each text.
        texts: that they belong to.
        instructions: that the client has sent; unset: none.
        width: dimensions to keep; unset: all.
        as_base64: bytes of little-endian float32 in place of numbers.
    """
    embedding_INE = shortened(np.stack(embeddings, axis=1), width)
    data = []
    for i, embedding_NE in enumerate(embedding_INE):
        named = {} if instructions is None else {"instruction": instructions[i]}
        for n, embedding_E in enumerate(embedding_NE):
            value = base64.b64encode(embedding_E.tobytes()).decode() if as_base64 else embedding_E
            data.append({"object": "embedding", "index": n, "embedding": value, **named})
    usage = {"prompt_tokens": texts.tokens, "total_tokens": texts.tokens, "truncated": texts.truncated}
    body = {"object": "list", "model": model, "data": data, "usage": usage}
    return orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)


def shortened(embedding_INE: NDArray[np.float32], width: int | None) -> NDArray[np.float32]:
    """The first dimensions, at length 1 again; little-endian float32, contiguous."""
    if width is not None and width < embedding_INE.shape[-1]:
        embedding_INE = embedding_INE[..., :width]
        lengths_IN1 = np.linalg.norm(embedding_INE, axis=-1, keepdims=True)
        embedding_INE = embedding_INE / np.maximum(lengths_IN1, np.finfo(np.float32).tiny)
    return np.ascontiguousarray(embedding_INE, dtype="<f4")
