"""Alignments in closed form, from the embeddings of words that two vocabularies share.

Shapes: P prompter width, D backbone width, S shared vocabulary, M soft tokens, V vocabulary, X any width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from promptembedder.errors import PromptEmbedderError

_MEASURED_WORDS = 4096


def random_start(P: int, D: int, generator: torch.Generator | None = None) -> Tensor:
    """Gaussian entries of variance 1 / P, so that the norm of a soft token is kept on average."""
    weight_PD: Tensor = torch.randn(P, D, generator=generator) * P**-0.5
    return weight_PD


class Moments(NamedTuple):
    """What fits to shared words need of these: sums over words `s`, in float64 on the CPU.

    Attributes:
        gram_PP: `sum_s w_s p_s^T p_s` of the prompter's embeddings `p_s`.
        cross_PD: `sum_s w_s p_s^T b_s` with the backbone's embeddings `b_s`.
        words: S.
    """

    gram_PP: Tensor
    cross_PD: Tensor
    words: int

    def without(self, others: Moments) -> Moments:
        """The moments of the words that are not among `others`, of which they are a part."""
        return Moments(self.gram_PP - others.gram_PP, self.cross_PD - others.cross_PD, self.words - others.words)


def moments(prompter_SP: Tensor, backbone_SD: Tensor, weights_S: Tensor | None = None) -> Moments:
    """Sums over shared words, from which any of the fits below takes a moment.

    Args:
        prompter_SP: the prompter's embeddings of the shared tokens.
        backbone_SD: the backbone's embeddings of the same tokens, in the same order.
        weights_S: importance of each token, not negative; unset: all alike.
    """
    first, second = prompter_SP.double().cpu(), backbone_SD.double().cpu()
    weighted = first if weights_S is None else first * weights_S.double().cpu()[:, None]
    return Moments(weighted.T @ first, weighted.T @ second, len(first))


def least_squares(shared: Moments) -> Tensor:
    """The `W` (P, D) that minimises `||prompter @ W - backbone||_F` over the shared vocabulary.

    By the normal equations, which in float64 leave float32 embeddings their precision.

    Raises:
        PromptEmbedderError: fewer shared tokens than P: the problem has no unique solution.
    """
    P = len(shared.gram_PP)
    if shared.words < P:
        raise PromptEmbedderError(
            f"alignment_start 'auto' needs at least {P} shared tokens, the vocabularies share "
            f"{shared.words}; use 'random'"
        )
    weight_PD: Tensor = torch.linalg.lstsq(shared.gram_PP, shared.cross_PD, driver="gelsd").solution.float()
    return weight_PD


def ridge(shared: Moments, penalty: float = 1e-2) -> Tensor:
    """The `W` (P, D) that minimises `sum_s w_s ||p_s @ W - b_s||^2 + lambda ||W||_F^2`.

    Defined for any number of shared tokens, unlike `least_squares`.

    Args:
        shared: moments of the shared words.
        penalty: lambda, relative to the mean eigenvalue of the weighted Gram matrix.
    """
    gram_PP = shared.gram_PP.clone()
    gram_PP.diagonal().add_(penalty * float(gram_PP.diagonal().mean()))
    weight_PD: Tensor = torch.linalg.solve(gram_PP, shared.cross_PD).float()
    return weight_PD


def folded(weight_PD: Tensor, tokens_MP: Tensor, wanted_MD: Tensor, penalty: float = 1e-4) -> Tensor:
    """The `W'` closest to `W` (Frobenius norm) that maps given soft tokens to given places.

    `W' = W + S^T (S S^T + lambda I)^-1 (T - S W)`, the smallest correction, for M <= P soft tokens.

    Args:
        weight_PD: W.
        tokens_MP: S, soft tokens of the prompter.
        wanted_MD: T, where they are to go.
        penalty: lambda relative to the mean of the diagonal of `S S^T`; soft tokens can be nearly the same.
    """
    W, S, T = (tensor.detach().double().cpu() for tensor in (weight_PD, tokens_MP, wanted_MD))
    gram_MM = S @ S.T
    gram_MM.diagonal().add_(penalty * float(gram_MM.diagonal().mean()))
    corrected_PD: Tensor = (W + S.T @ torch.linalg.solve(gram_MM, T - S @ W)).float()
    return corrected_PD


def some_words(words_VX: Tensor) -> Tensor:
    """Some thousand rows of a matrix of token embeddings, float32 on the CPU: enough for a median."""
    return words_VX.detach()[:: max(1, len(words_VX) // _MEASURED_WORDS)].float().cpu()


def matched_norm(weight_PD: Tensor, prompter_SP: Tensor, backbone_SD: Tensor) -> Tensor:
    """`W` scaled so that mapped tokens are, at the median, as long as the backbone's own embeddings."""
    mapped_S = (some_words(prompter_SP) @ weight_PD).norm(dim=-1)
    scaled_PD: Tensor = weight_PD * (some_words(backbone_SD).norm(dim=-1).median() / mapped_S.median())
    return scaled_PD
