"""Alignment: the linear map from the prompter's token-embedding space to the backbone's.

Shapes: K soft tokens, P prompter width, D backbone width, J backbone layers, S shared vocabulary, N prompts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Alignment(nn.Module):
    """`W` (P, D), float32: soft prompt (..., K, D) = soft tokens (..., K, P) @ W.

    Args:
        weight_PD: W.
        layers: J, of the backbone, for a deep soft prompt: one more map (P, D) each, started at zero; 0: none.
        rank: R, of these maps, then products of (P, R) and (R, D); unset: whole matrices.
    """

    def __init__(self, weight_PD: Tensor, layers: int = 0, rank: int | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight_PD.detach().to(torch.float32).clone())
        P, D = weight_PD.shape
        self.deep: nn.Parameter | None = None
        self.deep_in: nn.Parameter | None = None
        self.deep_out: nn.Parameter | None = None
        if layers and rank is None:
            self.deep = nn.Parameter(torch.zeros(layers, P, D))
        elif layers and rank is not None:
            # So long that a step of Adam on `deep_out`, whose size does not depend on the gradient's, moves the soft
            # prompt as far as a step on whole matrices would.
            start_JPR = torch.randn(layers, P, rank, generator=torch.Generator().manual_seed(0)) * P**0.5 / rank
            self.deep_in = nn.Parameter(start_JPR)
            self.deep_out = nn.Parameter(torch.zeros(layers, rank, D))

    @property
    def deep_is_zero(self) -> bool:
        """Whether there is a deep soft prompt, and it is still as it starts."""
        last = self.deep if self.deep is not None else self.deep_out
        return last is not None and not last.any()

    def forward(self, tokens_NKP: Tensor) -> Tensor:
        """Map soft tokens (N, K, P) to a soft prompt (N, K, D), float32; a deep one is (N, (1 + layers) K, D).

        The first K rows enter the backbone, the next K are added to the input of its first layer, and so on.
        """
        tokens_NKP = tokens_NKP.to(self.weight.dtype)
        soft_NKD: Tensor = tokens_NKP @ self.weight
        tokens_N1KP = tokens_NKP[:, None]
        if self.deep is not None:
            deep_NJKD = tokens_N1KP @ self.deep
        elif self.deep_in is not None and self.deep_out is not None:
            deep_NJKD = tokens_N1KP @ self.deep_in @ self.deep_out
        else:
            return soft_NKD
        return torch.cat([soft_NKD, deep_NJKD.flatten(1, 2)], dim=1)


def thinned(deep_JPD: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors (J, P, R) and (J, R, D) of the nearest matrices of rank R (Eckart and Young 1936), both of one length."""
    left, values, right = torch.linalg.svd(deep_JPD.double(), full_matrices=False)
    root_JR = values[:, :rank].sqrt()
    first_JPR, second_JRD = left[..., :rank] * root_JR[:, None], root_JR[..., None] * right[:, :rank]
    return first_JPR.float().contiguous(), second_JRD.float().contiguous()
