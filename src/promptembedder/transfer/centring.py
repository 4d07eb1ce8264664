"""The mean embedding of some texts, subtracted from every embedding.

Hidden states of an LLM share one large direction, which makes any two texts look alike and counts for most of what
differs between kinds of texts; taking it away is the first step of All-but-the-Top (Mu and Viswanath, arXiv
1702.01417). A contrastive training learns as much, but has to spend its first examples on it.

Shapes: E embedding width.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import cycle

import torch
from sentence_transformers import SentenceTransformer

from promptembedder.data.rows import TrainingData
from promptembedder.model.module import SoftPromptTransformer

_TEXTS = 256  # from 128 to 1,000 dev changed by half a point (docs/research-log.md)
# With one text every embedding of the sample is zero, with two they are opposed: a mean of few is these texts.
FEWEST = 16
Sample = Sequence[tuple[str, str]]


def centre(module: SoftPromptTransformer, sample: Sample, max_text_tokens: int | None = None) -> None:
    """From now on subtract from the embeddings of `module` their mean over a sample.

    Args:
        module: as it reads now; what it subtracted before is forgotten.
        sample: texts, each with its instruction; not empty.
        max_text_tokens: cut texts here, as the training does that they are from.
    """
    texts_of: dict[str, list[str]] = {}
    for text, instruction in sample:
        texts_of.setdefault(instruction, []).append(text)
    module.subtract(None)
    # Without what follows the module, which would make every embedding one long.
    reader = SentenceTransformer(modules=[module], device=str(module.alignment.weight.device))
    with module.truncating(max_text_tokens):
        parts = [
            reader.encode(texts, prompt=instruction, convert_to_tensor=True, show_progress_bar=False).cpu()
            for instruction, texts in texts_of.items()
        ]
    module.subtract(torch.cat(parts).double().mean(0).float())


def sample_of_rows(data: TrainingData, seed: int) -> list[tuple[str, str]]:
    """Anchors and positives of training rows under their instructions, made-up rows only where there are no others."""
    real = {name: rows for name, rows in data.datasets.items() if name not in data.opposed} or data.datasets
    ends = [(name, n, end) for name, rows in real.items() for n in range(len(rows)) for end in ("anchor", "positive")]
    drawn = random.Random(seed).sample(ends, min(_TEXTS, len(ends)))
    return [(real[name][n][end], data.prompts[name][end]) for name, n, end in drawn]


def sample_of_texts(texts: Sequence[str], instructions: Sequence[str], seed: int) -> list[tuple[str, str]]:
    """Some of the texts, under one instruction after the other."""
    drawn = random.Random(seed).sample(texts, min(_TEXTS, len(texts)))
    return list(zip(drawn, cycle(instructions), strict=False))
