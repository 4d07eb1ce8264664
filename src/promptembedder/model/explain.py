"""What the prompter wrote, in words: the tokens every soft token mixes, with their weights and its entropy."""

from __future__ import annotations

import numbers
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from promptembedder.errors import PromptEmbedderError
from promptembedder.model.generation import SoftTokens
from promptembedder.model.prompter import Prompter

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


@dataclass(frozen=True)
class SoftTokenReading:
    """One soft token, read.

    Attributes:
        words: (token as text, its weight in the mixture), heaviest first.
        entropy: of the whole mixture, in nats; 0 is a single word, log V an even mixture of all.
    """

    words: tuple[tuple[str, float], ...]
    entropy: float


def explain(model: SentenceTransformer, instruction: str | None = None, top: int = 5) -> list[SoftTokenReading]:
    """Read the K soft tokens that a model's prompter writes for an instruction.

    Args:
        model: made by `build` or `load`.
        instruction: as in `encode(prompt=...)`: unset or blank, the model's default.
        top: words listed per soft token.

    Raises:
        PromptEmbedderError: the instruction is no string; `top` is no number of words, or larger than the vocabulary.
    """
    # Imported here, because the command needs none of it, and sentence-transformers takes seconds.
    from promptembedder.model.instructions import instruction_for
    from promptembedder.model.module import soft_prompt_module

    module = soft_prompt_module(model)
    with torch.inference_mode():
        written = module.soft_tokens(instruction_for(model, instruction))
    return readings_of(module.prompter, written, top)


def readings_of(prompter: Prompter, written: SoftTokens, top: int = 5) -> list[SoftTokenReading]:
    """Read the soft tokens that a prompter wrote for one instruction; `top` and errors as in `explain`."""
    tokenizer = prompter.tokenizer
    with torch.inference_mode():
        weights_KV = written.weights_NKV[0]
        if not isinstance(top, numbers.Integral) or not 1 <= top <= weights_KV.shape[-1]:
            raise PromptEmbedderError(f"top = {top!r}, expected 1 to {weights_KV.shape[-1]}, the prompter's vocabulary")
        entropy_K = torch.special.entr(weights_KV).sum(-1)
        heaviest = weights_KV.topk(top, dim=-1)
    return [
        SoftTokenReading(
            tuple((tokenizer.decode([i]), w) for i, w in zip(ids, weights, strict=True)),
            entropy,
        )
        for ids, weights, entropy in zip(
            heaviest.indices.tolist(), heaviest.values.tolist(), entropy_K.tolist(), strict=True
        )
    ]
