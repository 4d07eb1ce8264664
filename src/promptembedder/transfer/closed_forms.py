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

from promptembedder.llms.open import input_embeddings
from promptembedder.model.fits import Moments, folded, matched_norm, moments, ridge
from promptembedder.model.module import SoftPromptTransformer
from promptembedder.model.vocabulary import shared_vocabulary
from promptembedder.transfer.settings import StartName

logger = logging.getLogger(__name__)


# With fewer shared tokens a fit says nothing about the rest of the vocabulary.
_FEWEST_SHARED = 64
_HELD_BACK = 0.1
# Below this share of the soft tokens' weights a closed form is a poor start.
_LITTLE_SHARED = 0.5


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


NAMES: tuple[StartName, ...] = ("ridge", "weighted", "mixture")


def closed_forms(
    old: SoftPromptTransformer, new: SoftPromptTransformer, instructions: Sequence[str], only: Sequence[StartName] = ()
) -> list[Start]:
    """Alignments to a new backbone without training; empty where the vocabularies share next to nothing.

    | name | W |
    | --- | --- |
    | `ridge` | from the prompter's to the new backbone's embeddings of shared tokens |
    | `weighted` | ridge, tokens weighted by their share in the mixtures of the soft tokens |
    | `mixture` | ridge, corrected so that each soft token of the instructions becomes the same mixture of words |

    All but the last are scaled to the norm of the new backbone's embeddings.

    Args:
        old: the trained module.
        new: the module on the new backbone.
        instructions: those whose soft tokens count most, the first ones most of all: soft tokens of the others are not
            looked at where they would come to more than half of the prompter's width.
        only: names wanted; empty: all.

    """
    rows = len(input_embeddings(old.prompter.lm)[0]), len(input_embeddings(new.backbone.lm)[0])  # type: ignore[arg-type]
    prompter_to_new = shared_vocabulary(old.prompter.tokenizer, new.tokenizer, rows)
    if len(prompter_to_new[0]) < _FEWEST_SHARED:
        return []
    wanted = [name for name in NAMES if not only or name in only]
    to_new = _SharedWords.of(old.prompter.lm, new.backbone.lm, prompter_to_new)
    # Soft tokens far fewer than the prompter is wide: where W is bent for each, no room would be left for others.
    most = max(1, old.alignment.weight.shape[0] // (2 * old.settings.num_soft_tokens))
    tokens_MP, mixtures_MV = _soft_tokens(old, instructions[:most])
    if (held := float(mixtures_MV[:, to_new.ids_S].sum(-1).mean())) < _LITTLE_SHARED:
        logger.warning("of what the prompter writes %.0f %% are words that the new backbone has, too", 100 * held)
    starts = _fitted(to_new, mixtures_MV, wanted)
    if "mixture" in wanted:
        words_MD = to_new.mixed(tokens_MP, mixtures_MV)
        starts.append(Start("mixture", folded(to_new.mapping, tokens_MP, words_MD), None))
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

    def with_and_without(self, held_S: Tensor, weights_S: Tensor | None = None) -> tuple[Moments, Moments]:
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


def _fitted(to_new: _SharedWords, mixtures_MV: Tensor, wanted: Sequence[StartName]) -> list[Start]:
    """Starts that map the embeddings of words, each also fitted without a tenth of the words, to be measured on it."""
    S = len(to_new.first_SX)
    held_S = torch.zeros(S, dtype=torch.bool)
    held_S[random.Random(0).sample(range(S), max(1, int(_HELD_BACK * S)))] = True
    # Each fits W to all words and to those not held back.
    fits: dict[str, Callable[[], Sequence[Tensor]]] = {}
    if "ridge" in wanted:
        fits["ridge"] = lambda: [ridge(some) for some in to_new.with_and_without(held_S)]
    if "weighted" in wanted:
        used_S = mixtures_MV[:, to_new.ids_S].sum(0)
        used_S += 1e-2 * used_S.mean()  # words in no mixture count a little, too
        fits["weighted"] = lambda: [ridge(some) for some in to_new.with_and_without(held_S, used_S)]
    starts = []
    for name, fitted in fits.items():
        whole_PD, part_PD = fitted()
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
