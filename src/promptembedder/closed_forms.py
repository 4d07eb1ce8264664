"""Alignments to a new backbone without training, from what the vocabularies share and what the prompter writes.

Shapes: M soft tokens of several instructions, P prompter width, D and F widths of the new and the old backbone,
S shared vocabulary, V vocabulary, X any width.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from promptembedder import alignment, base_models
from promptembedder.errors import PromptEmbedderError
from promptembedder.module import SoftPromptTransformer

# Below so many shared tokens a fit says nothing about the rest of the vocabulary.
_FEWEST_SHARED = 64
_HELD_BACK = 0.1


@dataclass(frozen=True)
class Start:
    """A closed-form alignment.

    Attributes:
        name: of the way it was made.
        weight_PD: W.
        reconstruction: mean cosine of mapped and true embeddings over tokens held back from the fit; unset where
            W is not fitted to tokens.
        dev: Spearman x 100 with it, where dev pairs are given.
    """

    name: str
    weight_PD: Tensor
    reconstruction: float | None
    dev: float | None = None


def closed_forms(
    old: SoftPromptTransformer, new: SoftPromptTransformer, instructions: Sequence[str], only: Sequence[str] = ()
) -> list[Start]:
    """Alignments to a new backbone without training; empty where the vocabularies share next to nothing.

    | name | W |
    | --- | --- |
    | `least_squares`, `ridge`, `procrustes` | from the prompter's to the new backbone's embeddings of shared tokens |
    | `weighted` | ridge, tokens weighted by their share in the mixtures of the soft tokens |
    | `through_old` | the trained W, then least squares from the old backbone's embeddings to the new one's |
    | `mixture` | ridge, corrected so that each soft token of the instructions becomes the same mixture of words |
    | `mixture_and_drift` | `through_old`, corrected likewise, plus what training moved the soft prompt by |

    All but the last two are scaled to the norm of the new backbone's embeddings.

    Args:
        old: the trained module.
        new: the module on the new backbone.
        instructions: those whose soft tokens count most.
        only: names wanted; empty: all.

    Raises:
        PromptEmbedderError: an unknown name.
    """
    names = ("least_squares", "ridge", "procrustes", "weighted", "through_old", "mixture", "mixture_and_drift")
    if wrong := [name for name in only if name not in names]:
        raise PromptEmbedderError(f"unknown start {wrong[0]!r}; valid: {', '.join(names)}")
    ids_prompter, ids_new = alignment.shared_vocabulary(old.prompter.tokenizer, new.tokenizer)
    ids_old, ids_new_too = alignment.shared_vocabulary(old.tokenizer, new.tokenizer)
    if min(len(ids_prompter), len(ids_old)) < _FEWEST_SHARED:
        return []
    embeddings_VP, embeddings_new_VD = _embeddings(old.prompter.lm), _embeddings(new.backbone.lm)
    embeddings_old_VF = _embeddings(old.backbone.lm)
    prompter_SP, backbone_SD = embeddings_VP[ids_prompter], embeddings_new_VD[ids_new]
    tokens_MP, mixtures_MV = _soft_tokens(old, instructions)
    # A soft token is a mixture of words, and the words exist in both; what is not shared is spread over the rest.
    words_MD = _mixed(mixtures_MV, ids_prompter, ids_new, embeddings_new_VD)
    shared_MS = mixtures_MV[:, ids_prompter]
    used_S = shared_MS.sum(0) + 1e-2 / len(ids_prompter) * float(shared_MS.sum())
    to_new_FD = alignment.ridge(embeddings_old_VF[ids_old], embeddings_new_VD[ids_new_too])
    trained_PF = old.alignment.weight.detach().float().cpu()
    through_PD = trained_PF @ to_new_FD
    # What the trained W does to the soft tokens beyond mixing the old backbone's own words.
    old_ids_of_prompter = alignment.shared_vocabulary(old.prompter.tokenizer, old.tokenizer)
    mixed_MF = _mixed(mixtures_MV, *old_ids_of_prompter, embeddings_old_VF)
    drift_MD = (tokens_MP @ trained_PF - mixed_MF) @ to_new_FD

    held = torch.zeros(len(ids_prompter), dtype=torch.bool)
    held[random.Random(0).sample(range(len(held)), max(1, int(_HELD_BACK * len(held))))] = True
    held_old = torch.isin(ids_new_too, ids_new[held])

    def closeness(weight_PD: Tensor) -> float:
        cosines = nn.functional.cosine_similarity(prompter_SP[held] @ weight_PD, backbone_SD[held], dim=-1)
        return float(cosines.mean())

    def fitted(fit: Callable[[Tensor, Tensor, Tensor | None], Tensor], weights_S: Tensor | None = None) -> Start:
        part = fit(prompter_SP[~held], backbone_SD[~held], None if weights_S is None else weights_S[~held])
        weight_PD = fit(prompter_SP, backbone_SD, weights_S)
        return Start("", alignment.matched_norm(weight_PD, prompter_SP, backbone_SD), closeness(part))

    def through_old() -> Start:
        part_FD = alignment.ridge(embeddings_old_VF[ids_old[~held_old]], embeddings_new_VD[ids_new_too[~held_old]])
        return Start("", alignment.matched_norm(through_PD, prompter_SP, backbone_SD), closeness(trained_PF @ part_FD))

    makers: dict[str, Callable[[], Start]] = {
        "least_squares": lambda: fitted(lambda a, b, _: alignment.ridge(a, b, penalty=1e-6)),
        "ridge": lambda: fitted(lambda a, b, _: alignment.ridge(a, b)),
        "procrustes": lambda: fitted(lambda a, b, _: alignment.procrustes(a, b)),
        "weighted": lambda: fitted(lambda a, b, w: alignment.ridge(a, b, weights_S=w), used_S),
        "through_old": through_old,
        "mixture": lambda: Start(
            "", alignment.folded(alignment.ridge(prompter_SP, backbone_SD), tokens_MP, words_MD), None
        ),
        "mixture_and_drift": lambda: Start("", alignment.folded(through_PD, tokens_MP, words_MD + drift_MD), None),
    }
    return [replace(make(), name=name) for name, make in makers.items() if not only or name in only]


@torch.no_grad()
def _soft_tokens(module: SoftPromptTransformer, instructions: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Soft tokens (M, P) and mixture weights (M, V) that the prompter writes for the instructions, on the CPU."""
    tokens, mixtures = [], []
    for instruction in instructions:
        written = module.soft_tokens(instruction)
        tokens.append(written.tokens_NKP[0].float().cpu())
        mixtures.append(torch.softmax(written.logits_NKV[0].float().cpu() / module.prompter.temperature, dim=-1))
    return torch.cat(tokens), torch.cat(mixtures)


def _mixed(mixtures_MV: Tensor, ids_from: Tensor, ids_to: Tensor, embeddings_VX: Tensor) -> Tensor:
    """Soft tokens (M, X) that mix another LLM's embeddings of the same words."""
    shared_MS = mixtures_MV[:, ids_from]
    return (shared_MS / shared_MS.sum(-1, keepdim=True).clamp(min=1e-9)) @ embeddings_VX[ids_to]


def _embeddings(lm: Any) -> Tensor:
    matrix_VX, scale = base_models.input_embeddings(lm)
    return matrix_VX.detach().float().cpu() * scale
