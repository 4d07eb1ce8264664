"""Second module trees over the same weights."""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import nn

M = TypeVar("M", bound=nn.Module)


def sharing_copy(module: M) -> M:
    """A deep copy with its own module tree that shares all parameters and buffers with the original."""
    return copy.deepcopy(module, {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())})
