"""Key/value states of text segments: continue from them, merge them into batches, pack them row by row.

Shapes: B texts, L tokens of everything the states hold, H key/value heads, d head width, G keys and values of the
layers of one kind (twice the number of layers).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import DynamicCache

# Name of the argument of an LLM's `forward` that takes the states to continue from.
CACHE_ARGUMENT = "cache" if Version(transformers.__version__) >= Version("5.24") else "past_key_values"


@dataclass(frozen=True)
class States:
    """Key/value states of a segment that came first, to continue from any number of times.

    Attributes:
        cache: as `transformers` keeps it; never updated in place by this package.
        mask_BL: 1 for tokens, 0 for padding, of everything the cache holds.
    """

    cache: DynamicCache
    mask_BL: Tensor

    def expanded(self, batch: int) -> States:
        """Share the states of one row among `batch` rows (no copy); gradients add up on the one row."""
        if len(self.mask_BL) == batch:
            return self
        cache = shallow_copy(self.cache)
        for layer in cache.layers:
            layer.keys = layer.keys.expand(batch, -1, -1, -1)
            layer.values = layer.values.expand(batch, -1, -1, -1)
        return States(cache, self.mask_BL.expand(batch, -1))

    def to(self, dtype: torch.dtype) -> States:
        """The states in another precision."""
        if all(layer.keys.dtype == dtype for layer in self.cache.layers):
            return self
        cache = shallow_copy(self.cache)
        for layer in cache.layers:
            layer.keys, layer.values, layer.dtype = layer.keys.to(dtype), layer.values.to(dtype), dtype
        return States(cache, self.mask_BL)

    def picked(self, rows: Tensor) -> States:
        """The states of some rows."""
        cache = shallow_copy(self.cache)
        cache.batch_select_indices(rows)
        return States(cache, self.mask_BL[rows])


def shallow_copy(cache: DynamicCache) -> DynamicCache:
    """A cache with layers of its own that share the tensors: `update` replaces tensors, it does not write into them."""
    fresh = copy.copy(cache)
    fresh.layers = [copy.copy(layer) for layer in cache.layers]
    return fresh


def merged(parts: Sequence[tuple[Tensor, States]]) -> States:
    """Put the states of chunks back into one batch.

    Args:
        parts: row numbers and states of each chunk, shortest texts first. They are emptied in the process, so
            that memory never holds a long batch twice.

    Returns:
        One batch, rows in order, aligned on the right.
    """
    if len(parts) == 1:
        rows, states = parts[0]
        return states.picked(rows.argsort())
    _, longest = parts[-1]
    batch = sum(len(rows) for rows, _ in parts)
    cache = shallow_copy(longest.cache)
    mask_BL = longest.mask_BL.new_zeros(batch, longest.mask_BL.shape[1])
    for rows, part in parts:
        mask_BL[rows, mask_BL.shape[1] - part.mask_BL.shape[1] :] = part.mask_BL
    for n, layer in enumerate(cache.layers):
        for name in ("keys", "values"):
            whole = getattr(layer, name)
            whole = whole.new_zeros(batch, *whole.shape[1:])
            for rows, part in parts:
                tensor = getattr(part.cache.layers[n], name)
                whole[rows, :, whole.shape[2] - tensor.shape[2] :] = tensor
                setattr(part.cache.layers[n], name, tensor.new_empty(0))
            setattr(layer, name, whole)
    return States(cache, mask_BL)


def packed(states: States) -> list[list[Tensor]]:
    """Every row's states without its padding (which stands on the left).

    Returns:
        Per row one tensor (G, H, L, d) for each kind of layer: full attention, and sliding windows, which keep their
        last tokens only.
    """
    lengths = states.mask_BL.sum(-1).tolist()
    rows: list[list[Tensor]] = [[] for _ in lengths]
    for layers in _kinds(states.cache):
        whole_GBHLd = torch.stack([tensor for layer in layers for tensor in (layer.keys, layer.values)])
        for n, length in enumerate(lengths):
            row_GHLd = whole_GBHLd[:, n, :, max(0, whole_GBHLd.shape[3] - length) :]
            rows[n].append(row_GHLd.clone(memory_format=torch.contiguous_format))
    return rows


def unpacked(rows: Iterable[Sequence[Tensor]], mask_BL: Tensor, empty: DynamicCache, dtype: torch.dtype) -> States:
    """The reverse of `packed`: one batch, aligned on the right, on the mask's device.

    Args:
        rows: as `packed` gives them, from any batches; any floating dtype, any device.
        mask_BL: which places of the batch are tokens; its padding stands on the left.
        empty: an unused cache of the LLM.
        dtype: of the LLM.
    """
    for layers, parts in zip(_kinds(empty), zip(*rows, strict=True), strict=True):
        G, H, _, d = parts[0].shape
        longest = max(part.shape[2] for part in parts)
        whole_GBHLd = torch.zeros(G, len(parts), H, longest, d, dtype=dtype, device=mask_BL.device)
        for n, part_GHLd in enumerate(parts):
            whole_GBHLd[:, n, :, longest - part_GHLd.shape[2] :].copy_(
                part_GHLd, non_blocking=mask_BL.device.type == "cuda"
            )
        for n, layer in enumerate(layers):
            layer.lazy_initialization(whole_GBHLd[2 * n], whole_GBHLd[2 * n + 1])
            layer.keys, layer.values = whole_GBHLd[2 * n], whole_GBHLd[2 * n + 1]
            if layer.is_sliding:
                layer.cumulative_length = mask_BL.shape[1]
    return States(empty, mask_BL)


def stacked(layers: Sequence[tuple[Tensor, Tensor]], mask_BL: Tensor, empty: DynamicCache) -> States:
    """States of keys and values (B, H, L, d) of each layer, none beyond a layer's window.

    Args:
        layers: of the LLM, in order.
        mask_BL: 1 for tokens, 0 for padding.
        empty: an unused cache of the LLM.
    """
    for layer, (keys, values) in zip(empty.layers, layers, strict=True):
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        if layer.is_sliding:
            layer.cumulative_length = mask_BL.shape[1]
    return States(empty, mask_BL)


def _kinds(cache: DynamicCache) -> list[list[Any]]:
    """The cache's layers, those with the same window together."""
    kinds: dict[Any, list[Any]] = {}
    for layer in cache.layers:
        kinds.setdefault(getattr(layer, "sliding_window", None), []).append(layer)
    return list(kinds.values())
