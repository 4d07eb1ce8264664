"""Second module trees over the same weights."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import TypeVar

from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def sharing_copy(module: M, shared: Iterable[Tensor]) -> M:
    """A deep copy whose module tree is its own, while these tensors of it are the original's."""
    return copy.deepcopy(module, {id(tensor): tensor for tensor in shared})


def tensors(module: nn.Module) -> list[Tensor]:
    """All parameters and buffers."""
    return [*module.parameters(), *module.buffers()]
