"""Alignments to a new backbone without training, from what the vocabularies share and what the prompter writes.

Shapes: M soft tokens of several instructions, P prompter width, D and F widths of the new and the old backbone,
S words shared by prompter and new backbone, U by old and new backbone, V vocabulary, X any width.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from promptembedder import alignment, base_models
from promptembedder.errors import PromptEmbedderError
from promptembedder.module import SoftPromptTransformer

logger = logging.getLogger(__name__)

# Below so many shared tokens a fit says nothing about the rest of the vocabulary.
_FEWEST_SHARED = 64
_HELD_BACK = 0.1
# Below this share of the soft tokens' weights a closed form is a poor start.
_LITTLE_SHARED = 0.5
# Token ids of the same words in two vocabularies.
_Pairs = tuple[Tensor, Tensor]


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


NAMES = ("least_squares", "ridge", "procrustes", "weighted", "through_old", "mixture", "mixture_and_drift")
# They need words that the old and the new backbone share.
THROUGH_OLD = ("through_old", "mixture_and_drift")


def check_names(names: Sequence[str]) -> None:
    """Refuse names that no closed form has.

    Raises:
        PromptEmbedderError: an unknown name.
    """
    if wrong := [name for name in names if name not in NAMES]:
        raise PromptEmbedderError(f"unknown start {wrong[0]!r}; valid: {', '.join(NAMES)}")


def closed_forms(
    old: SoftPromptTransformer, new: SoftPromptTransformer, instructions: Sequence[str], only: Sequence[str] = ()
) -> list[Start]:
    """Alignments to a new backbone without training; empty where the vocabularies share next to nothing.

    | name | W |
    | --- | --- |
    | `least_squares`, `ridge`, `procrustes` | from the prompter's to the new backbone's embeddings of shared tokens |
    | `weighted` | ridge, tokens weighted by their share in the mixtures of the soft tokens |
    | `through_old` | the trained W, then ridge from the old backbone's embeddings to the new one's |
    | `mixture` | ridge, corrected so that each soft token of the instructions becomes the same mixture of words |
    | `mixture_and_drift` | `through_old`, corrected likewise, plus what training moved the soft prompt by |

    All but the last two are scaled to the norm of the new backbone's embeddings. `least_squares` is left out where
    fewer tokens are shared than the prompter is wide.

    Args:
        old: the trained module.
        new: the module on the new backbone.
        instructions: those whose soft tokens count most.
        only: names wanted; empty: all.

    Raises:
        PromptEmbedderError: an unknown name; `least_squares` alone is wanted and cannot be fitted.
    """
    check_names(only)
    prompter_to_new = alignment.shared_vocabulary(old.prompter.tokenizer, new.tokenizer)
    old_to_new = alignment.shared_vocabulary(old.tokenizer, new.tokenizer)
    if len(prompter_to_new[0]) < _FEWEST_SHARED:
        return []
    wanted = [name for name in NAMES if not only or name in only]
    if len(old_to_new[0]) < _FEWEST_SHARED:
        wanted = [name for name in wanted if name not in THROUGH_OLD]
    tokens_MP, mixtures_MV = _soft_tokens(old, instructions)
    if (held := float(mixtures_MV[:, prompter_to_new[0]].sum(-1).mean())) < _LITTLE_SHARED:
        logger.warning("of what the prompter writes %.0f %% are words that the new backbone has, too", 100 * held)
    starts = _fitted(old, new, prompter_to_new, old_to_new, mixtures_MV, wanted)
    if {"mixture", "mixture_and_drift"} & set(wanted):
        starts += _mixtures(old, new, prompter_to_new, old_to_new, tokens_MP, mixtures_MV, wanted)
    return starts


def _fitted(
    old: SoftPromptTransformer,
    new: SoftPromptTransformer,
    prompter_to_new: _Pairs,
    old_to_new: _Pairs,
    mixtures_MV: Tensor,
    wanted: Sequence[str],
) -> list[Start]:
    """Starts that map the embeddings of words, each also fitted without a tenth of the words, to be measured on it."""
    prompter_SP, new_SD = _shared(old.prompter.lm, new.backbone.lm, prompter_to_new)
    S = len(prompter_SP)
    held_S = torch.zeros(S, dtype=torch.bool)
    held_S[random.Random(0).sample(range(S), max(1, int(_HELD_BACK * S)))] = True
    held_U = torch.isin(old_to_new[1], prompter_to_new[1][held_S])
    used_S = mixtures_MV[:, prompter_to_new[0]].sum(0)
    used_S += 1e-2 * used_S.mean()  # words in no mixture count a little, too
    trained_PF = old.alignment.weight.detach().float().cpu()
    # Each fits W to the words S or U that it is given.
    fits: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "ridge": lambda s, _: alignment.ridge(prompter_SP[s], new_SD[s]),
        "procrustes": lambda s, _: alignment.procrustes(prompter_SP[s], new_SD[s]),
        "weighted": lambda s, _: alignment.ridge(prompter_SP[s], new_SD[s], weights_S=used_S[s]),
    }
    if "through_old" in wanted:
        old_UF, new_UD = _shared(old.backbone.lm, new.backbone.lm, old_to_new)
        fits["through_old"] = lambda _, u: trained_PF @ alignment.ridge(old_UF[u], new_UD[u])
    if int((~held_S).sum()) >= prompter_SP.shape[1]:
        fits["least_squares"] = lambda s, _: alignment.least_squares(prompter_SP[s], new_SD[s])
    elif list(wanted) == ["least_squares"]:
        raise PromptEmbedderError(
            f"start 'least_squares' needs {prompter_SP.shape[1]} shared tokens beside those held back, "
            f"the vocabularies share {S}; use 'ridge'"
        )
    starts = []
    for name in [name for name in wanted if name in fits]:
        part_PD = fits[name](~held_S, ~held_U)
        cosines = nn.functional.cosine_similarity(prompter_SP[held_S] @ part_PD, new_SD[held_S], dim=-1)
        whole_PD = fits[name](torch.ones_like(held_S), torch.ones_like(held_U))
        starts.append(Start(name, alignment.matched_norm(whole_PD, prompter_SP, new_SD), float(cosines.mean())))
    return starts


def _mixtures(
    old: SoftPromptTransformer,
    new: SoftPromptTransformer,
    prompter_to_new: _Pairs,
    old_to_new: _Pairs,
    tokens_MP: Tensor,
    mixtures_MV: Tensor,
    wanted: Sequence[str],
) -> list[Start]:
    """Starts that send the instructions' soft tokens where the same mixtures of the new backbone's words are."""
    words_SP, new_SD = _shared(old.prompter.lm, new.backbone.lm, prompter_to_new)
    to_new_PD = alignment.ridge(words_SP, new_SD)
    words_MD = _mixed(tokens_MP, mixtures_MV[:, prompter_to_new[0]], words_SP, new_SD, to_new_PD)
    starts = []
    if "mixture" in wanted:
        starts.append(Start("mixture", alignment.folded(to_new_PD, tokens_MP, words_MD), None))
    if "mixture_and_drift" in wanted:
        to_new_FD = alignment.ridge(*_shared(old.backbone.lm, new.backbone.lm, old_to_new))
        trained_PF = old.alignment.weight.detach().float().cpu()
        # What the trained W does to the soft tokens beyond mixing the old backbone's own words.
        among_old = alignment.shared_vocabulary(old.prompter.tokenizer, old.tokenizer)
        words_SP, old_SF = _shared(old.prompter.lm, old.backbone.lm, among_old)
        to_old_PF = alignment.ridge(words_SP, old_SF)
        words_MF = _mixed(tokens_MP, mixtures_MV[:, among_old[0]], words_SP, old_SF, to_old_PF)
        drift_MD = (tokens_MP @ trained_PF - words_MF) @ to_new_FD
        moved_PD = alignment.folded(trained_PF @ to_new_FD, tokens_MP, words_MD + drift_MD)
        starts.append(Start("mixture_and_drift", moved_PD, None))
    return starts


@torch.no_grad()
def _soft_tokens(module: SoftPromptTransformer, instructions: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Soft tokens (M, P) and mixture weights (M, V) that the prompter writes for the instructions, on the CPU."""
    tokens, mixtures = [], []
    for instruction in instructions:
        written = module.soft_tokens(instruction)
        tokens.append(written.tokens_NKP[0].float().cpu())
        mixtures.append(torch.softmax(written.logits_NKV[0].float().cpu() / module.prompter.temperature, dim=-1))
    return torch.cat(tokens), torch.cat(mixtures)


def _mixed(tokens_MP: Tensor, weights_MS: Tensor, words_SP: Tensor, others_SX: Tensor, map_PX: Tensor) -> Tensor:
    """Soft tokens (M, X) that mix another LLM's embeddings of the same words.

    What a soft token mixes of words that the other LLM lacks goes through the map.
    """
    return weights_MS @ others_SX + (tokens_MP - weights_MS @ words_SP) @ map_PX


def _shared(first: Any, second: Any, ids: _Pairs) -> tuple[Tensor, Tensor]:
    """Two LLMs' embeddings of the words that their vocabularies share."""
    return _embeddings(first, ids[0]), _embeddings(second, ids[1])


def _embeddings(lm: Any, ids_S: Tensor) -> Tensor:
    """What the LLM feeds itself for tokens, (S, X) float32 on the CPU."""
    matrix_VX, scale = base_models.input_embeddings(lm)
    return matrix_VX.detach()[ids_S.to(matrix_VX.device)].float().cpu() * scale
