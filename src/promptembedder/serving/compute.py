"""Texts of many requests, each under instructions of its own, through a model in one pass.

Shapes: B texts, T text tokens, I instructions of a text, R rows of a soft prompt, D backbone width, E embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from torch import Tensor

from promptembedder.model.module import SoftPromptTransformer, soft_prompt_module
from promptembedder.model.reader import padded


@dataclass(frozen=True, eq=False)
class SoftPrompt:
    """An instruction, read by the prompter.

    Attributes:
        instruction: its words.
        soft_1RD: its soft prompt, on the device.
        ids_I: what the backbone reads of it in layout `prefix`.
    """

    instruction: str
    soft_1RD: Tensor
    ids_I: Tensor


@torch.no_grad()
def write(module: SoftPromptTransformer, instruction: str) -> SoftPrompt:
    """Let the prompter read an instruction; alone, so that its last bits depend on nothing else."""
    return SoftPrompt(instruction, module.soft_prompt(instruction), module.instruction_ids(instruction))


@dataclass(frozen=True, eq=False)
class Row:
    """A text, and the soft prompts that it is read under.

    Attributes:
        ids: its tokens, as the backbone reads them.
        prompts: one or several.
    """

    ids: list[int]
    prompts: tuple[SoftPrompt, ...]


@torch.inference_mode()
def embed_rows(model: SentenceTransformer, rows: Sequence[Row]) -> list[NDArray[np.float32]]:
    """Embeddings (I, E) float32 of each text.

    Args:
        model: made by `build` or `load`.
        rows: one or several; they may differ in their instructions, and in how many they have.
    """
    module = soft_prompt_module(model)
    groups: dict[object, list[int]] = {}
    for n, row in enumerate(rows):
        # In layout `prefix` the soft prompt is read first, and texts go on from it.
        alike = len(row.prompts) if module.settings.layout == "suffix" else tuple(map(id, row.prompts))
        groups.setdefault(alike, []).append(n)
    found: list[NDArray[np.float32]] = [np.empty(0, np.float32)] * len(rows)
    for picked in groups.values():
        embedding_IBE = _embed(model, module, [rows[n] for n in picked])
        for place, n in enumerate(picked):
            found[n] = embedding_IBE[:, place]
    return found


def _embed(model: SentenceTransformer, module: SoftPromptTransformer, rows: list[Row]) -> NDArray[np.float32]:
    features = padded([row.ids for row in rows])
    ids_BT, mask_BT = (features[name].to(model.device) for name in ("input_ids", "attention_mask"))
    columns = list(zip(*(row.prompts for row in rows), strict=True))
    soft_prompts = [
        column[0].soft_1RD if len(set(column)) == 1 else torch.cat([prompt.soft_1RD for prompt in column])
        for column in columns
    ]
    embeddings = []
    for embedding_BE in module.embed_under(ids_BT, mask_BT, soft_prompts, [column[0].ids_I for column in columns]):
        features = {"sentence_embedding": embedding_BE}
        for later in list(model)[1:]:
            features = later(features)
        embeddings.append(features["sentence_embedding"])
    return torch.stack(embeddings).float().cpu().numpy()  # type: ignore[no-any-return]
