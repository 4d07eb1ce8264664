"""Alignments to a new backbone without training, from what the vocabularies share and what the prompter writes.

Shapes: M soft tokens of several instructions, P prompter width, D and F widths of the new and the old backbone,
S words shared by prompter and new backbone, U by old and new backbone, V vocabulary, X any width.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from promptembedder.errors import PromptEmbedderError
from promptembedder.llms.open import input_embeddings
from promptembedder.model.fits import Moments, folded, least_squares, matched_norm, moments, procrustes, ridge
from promptembedder.model.module import SoftPromptTransformer
from promptembedder.model.vocabulary import shared_vocabulary

logger = logging.getLogger(__name__)


# Below so many shared tokens a fit says nothing about the rest of the vocabulary.
_FEWEST_SHARED = 64
_HELD_BACK = 0.1
# Below this share of the soft tokens' weights a closed form is a poor start.
_LITTLE_SHARED = 0.5
_Pair = tuple[Moments, Moments]


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
    fewer tokens are shared, beside those held back, than the prompter is wide.

    Args:
        old: the trained module.
        new: the module on the new backbone.
        instructions: those whose soft tokens count most, the first ones most of all: soft tokens of the others are not
            looked at where they would come to more than half of the prompter's width.
        only: names wanted; empty: all.

    Raises:
        PromptEmbedderError: an unknown name; none of those wanted can be fitted.
    """
    check_names(only)
    prompter_to_new = shared_vocabulary(old.prompter.tokenizer, new.tokenizer)
    if len(prompter_to_new[0]) < _FEWEST_SHARED:
        return []
    wanted = [name for name in NAMES if not only or name in only]
    to_new = _SharedWords.of(old.prompter.lm, new.backbone.lm, prompter_to_new)
    from_old = None
    if set(THROUGH_OLD) & set(wanted):
        old_to_new = shared_vocabulary(old.tokenizer, new.tokenizer)
        if len(old_to_new[0]) >= _FEWEST_SHARED:
            from_old = _SharedWords.of(old.backbone.lm, new.backbone.lm, old_to_new)
    if from_old is None:
        wanted = [name for name in wanted if name not in THROUGH_OLD]
    if not wanted:
        raise PromptEmbedderError(
            f"starts {', '.join(only)} need {_FEWEST_SHARED} words that old and new backbone share, and there are "
            f"{len(old_to_new[0])}; valid: {', '.join(name for name in NAMES if name not in THROUGH_OLD)}"
        )
    # Soft tokens far fewer than the prompter is wide: where W is bent for each, no room would be left for others.
    most = max(1, old.alignment.weight.shape[0] // (2 * old.settings.num_soft_tokens))
    tokens_MP, mixtures_MV = _soft_tokens(old, instructions[:most])
    if (held := float(mixtures_MV[:, to_new.ids_S].sum(-1).mean())) < _LITTLE_SHARED:
        logger.warning("of what the prompter writes %.0f %% are words that the new backbone has, too", 100 * held)
    trained_PF = old.alignment.weight.detach().float().cpu()
    starts = _fitted(to_new, from_old, trained_PF, mixtures_MV, wanted)
    if not {"mixture", "mixture_and_drift"} & set(wanted):
        return starts
    words_MD = to_new.mixed(tokens_MP, mixtures_MV)
    if "mixture" in wanted:
        starts.append(Start("mixture", folded(to_new.mapping, tokens_MP, words_MD), None))
    if "mixture_and_drift" in wanted and from_old is not None:
        # What the trained W does to the soft tokens beyond mixing the old backbone's own words.
        among_old = shared_vocabulary(old.prompter.tokenizer, old.tokenizer)
        words_MF = _SharedWords.of(old.prompter.lm, old.backbone.lm, among_old).mixed(tokens_MP, mixtures_MV)
        drift_MD = (tokens_MP @ trained_PF - words_MF) @ from_old.mapping
        moved_PD = folded(trained_PF @ from_old.mapping, tokens_MP, words_MD + drift_MD)
        starts.append(Start("mixture_and_drift", moved_PD, None))
    return starts


@dataclass(frozen=True)
class _SharedWords:
    """Words that two vocabularies share; X and Y are the widths of the two LLMs.

    Attributes:
        ids_S: in the first vocabulary.
        others_S: in the second.
        first_SX: what the first LLM feeds itself for them, float32 on the CPU.
        second_SY: what the second does.
    """

    ids_S: Tensor
    others_S: Tensor
    first_SX: Tensor
    second_SY: Tensor

    @classmethod
    def of(cls, first: Any, second: Any, ids: tuple[Tensor, Tensor]) -> _SharedWords:
        """Of two LLMs, by token ids of the same words."""
        return cls(*ids, _embeddings(first, ids[0]), _embeddings(second, ids[1]))

    @cached_property
    def moments(self) -> Moments:
        """Of all words, alike."""
        return moments(self.first_SX, self.second_SY)

    @cached_property
    def mapping(self) -> Tensor:
        """From the first LLM's embeddings to the second's, (X, Y), by ridge regression."""
        return ridge(self.moments)

    def with_and_without(self, held_S: Tensor, weights_S: Tensor | None = None) -> _Pair:
        """Moments of all words and of those that are not held back."""
        whole = self.moments if weights_S is None else moments(self.first_SX, self.second_SY, weights_S)
        held_weights_S = None if weights_S is None else weights_S[held_S]
        return whole, whole.without(moments(self.first_SX[held_S], self.second_SY[held_S], held_weights_S))

    def mixed(self, tokens_MX: Tensor, mixtures_MV: Tensor) -> Tensor:
        """Soft tokens (M, Y) that mix the second LLM's embeddings of the same words.

        What a soft token mixes of words that the second lacks goes through the map.
        """
        weights_MS = mixtures_MV[:, self.ids_S]
        return weights_MS @ self.second_SY + (tokens_MX - weights_MS @ self.first_SX) @ self.mapping


def _fitted(
    to_new: _SharedWords,
    from_old: _SharedWords | None,
    trained_PF: Tensor,
    mixtures_MV: Tensor,
    wanted: Sequence[str],
) -> list[Start]:
    """Starts that map the embeddings of words, each also fitted without a tenth of the words, to be measured on it."""
    S, P = to_new.first_SX.shape
    held_S = torch.zeros(S, dtype=torch.bool)
    held_S[random.Random(0).sample(range(S), max(1, int(_HELD_BACK * S)))] = True
    words = to_new.with_and_without(held_S)
    # Each fits W to all words and to those not held back.
    fits: dict[str, Callable[[], Sequence[Tensor]]] = {
        "ridge": lambda: [ridge(some) for some in words],
        "procrustes": lambda: [procrustes(some) for some in words],
    }
    if words[1].words >= P:
        fits["least_squares"] = lambda: [least_squares(some) for some in words]
    elif list(wanted) == ["least_squares"]:
        raise PromptEmbedderError(
            f"start 'least_squares' needs {P} shared tokens beside those held back, "
            f"the vocabularies share {S}; use 'ridge'"
        )
    if "weighted" in wanted:
        used_S = mixtures_MV[:, to_new.ids_S].sum(0)
        used_S += 1e-2 * used_S.mean()  # words in no mixture count a little, too
        fits["weighted"] = lambda: [ridge(some) for some in to_new.with_and_without(held_S, used_S)]
    if "through_old" in wanted and from_old is not None:
        held_U = torch.isin(from_old.others_S, to_new.others_S[held_S])
        olds = from_old.with_and_without(held_U)
        fits["through_old"] = lambda: [trained_PF @ ridge(some) for some in olds]
    starts = []
    for name in [name for name in wanted if name in fits]:
        whole_PD, part_PD = fits[name]()
        held_SP, true_SD = to_new.first_SX[held_S], to_new.second_SY[held_S]
        cosines = nn.functional.cosine_similarity(held_SP @ part_PD, true_SD, dim=-1)
        weight_PD = matched_norm(whole_PD, to_new.first_SX, to_new.second_SY)
        starts.append(Start(name, weight_PD, float(cosines.mean())))
    return starts


@torch.no_grad()
def _soft_tokens(module: SoftPromptTransformer, instructions: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Soft tokens (M, P) and mixture weights (M, V) that the prompter writes for the instructions, on the CPU."""
    tokens, mixtures = [], []
    for instruction in instructions:
        written = module.soft_tokens(instruction)
        tokens.append(written.tokens_NKP[0].float().cpu())
        mixtures.append(written.weights_NKV[0].float().cpu())
    return torch.cat(tokens), torch.cat(mixtures)


def _embeddings(lm: Any, ids_S: Tensor) -> Tensor:
    """What the LLM feeds itself for tokens, (S, X) float32 on the CPU."""
    matrix_VX, scale = input_embeddings(lm)
    return matrix_VX.detach()[ids_S.to(matrix_VX.device)].float().cpu() * scale
