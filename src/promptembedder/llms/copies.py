"""Second module trees over the same weights."""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import nn

M = TypeVar("M", bound=nn.Module)


def sharing_copy(module: M) -> M:
    """A deep copy whose module tree is its own, while all parameters and buffers are the original's."""
    return copy.deepcopy(module, {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())})
