"""What the frozen LLM gives without any training, to compare with.

Shapes: B texts, T text tokens, E embedding width, D backbone width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from promptembedder import progress
from promptembedder.model.backbone import pool
from promptembedder.model.module import SoftPromptTransformer
from promptembedder.text import checked_texts, fill_blanks

# PromptEOL (arXiv 2307.16645).
PROMPT_EOL = 'This sentence : "{text}" means in one word:"'


def mean_pooling(module: SoftPromptTransformer, texts: Iterable[str], *, batch_size: int = 32) -> NDArray[np.float32]:
    """Mean of the last hidden states over the bare text: (N, E), unit length."""
    lm = module.backbone.lm

    def embed(batch: list[str]) -> Tensor:
        encoded = module.tokenizer(
            batch, padding=True, truncation=True, max_length=module.settings.max_text_tokens, return_tensors="pt"
        ).to(lm.device)
        ids_BT = encoded["input_ids"] * encoded["attention_mask"]  # some pad tokens have no embedding
        hidden_BTD = lm(input_ids=ids_BT, attention_mask=encoded["attention_mask"]).last_hidden_state
        return pool(hidden_BTD, encoded["attention_mask"], "mean")

    return _embedded(embed, texts, batch_size)


def hard_cue(
    module: SoftPromptTransformer, texts: Iterable[str], template: str = PROMPT_EOL, *, batch_size: int = 32
) -> NDArray[np.float32]:
    """Last hidden state after a text and a cue in words, both in the template: (N, E), unit length."""
    lm = module.backbone.lm
    reader = SoftPromptTransformer(
        module.prompter,
        module.alignment,
        module.backbone,
        module.tokenizer,
        # Layout `prefix` opens a sequence with its instruction, and here is none.
        replace(module.settings, text_template=template, layout="suffix"),
        module.base_models,
    )

    def embed(batch: list[str]) -> Tensor:
        features = reader.preprocess(batch)
        ids_BT, mask_BT = (features[name].to(lm.device) for name in ("input_ids", "attention_mask"))
        hidden_BTD = lm(input_ids=ids_BT, attention_mask=mask_BT).last_hidden_state
        return pool(hidden_BTD, mask_BT, "last")

    return _embedded(embed, texts, batch_size)


def _embedded(embed: Callable[[list[str]], Tensor], given: Iterable[str], batch_size: int) -> NDArray[np.float32]:
    texts = fill_blanks(checked_texts(given))
    by_length = sorted(range(len(texts)), key=lambda n: -len(texts[n]))
    result: list[NDArray[np.float32]] = [np.empty(0, dtype=np.float32)] * len(texts)
    with torch.inference_mode():
        for start in progress.bar(range(0, len(texts), batch_size), "Batches", leave=False):
            picked = by_length[start : start + batch_size]
            unit_BE = torch.nn.functional.normalize(embed([texts[n] for n in picked]), dim=-1)
            for n, embedding in zip(picked, unit_BE.float().cpu().numpy(), strict=True):
                result[n] = embedding
    return np.stack(result)
