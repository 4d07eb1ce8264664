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
        layers: J, of the backbone.
        deep_rank: R of a deep soft prompt: one more map for each layer, the product of (P, R) and (R, D), started at
            zero; unset: none.
    """

    def __init__(self, weight_PD: Tensor, layers: int = 0, deep_rank: int | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight_PD.detach().to(torch.float32).clone())
        P, D = weight_PD.shape
        self.deep_in: nn.Parameter | None = None
        self.deep_out: nn.Parameter | None = None
        if deep_rank is not None:
            # So long that a step of Adam on `deep_out`, whose size does not depend on the gradient's, moves the soft
            # prompt as far as a step on whole matrices would.
            generator = torch.Generator().manual_seed(0)
            start_JPR = torch.randn(layers, P, deep_rank, generator=generator) * P**0.5 / deep_rank
            self.deep_in = nn.Parameter(start_JPR)
            self.deep_out = nn.Parameter(torch.zeros(layers, deep_rank, D))

    def forward(self, tokens_NKP: Tensor) -> Tensor:
        """Map soft tokens (N, K, P) to a soft prompt (N, K, D), float32; a deep one is (N, (1 + layers) K, D).

        The first K rows enter the backbone, the next K are added to the input of its first layer, and so on.
        """
        tokens_NKP = tokens_NKP.to(self.weight.dtype)
        soft_NKD: Tensor = tokens_NKP @ self.weight
        if self.deep_in is None or self.deep_out is None:
            return soft_NKD
        deep_NJKD = tokens_NKP[:, None] @ self.deep_in @ self.deep_out
        return torch.cat([soft_NKD, deep_NJKD.flatten(1, 2)], dim=1)
