"""Attention of a few new tokens over many earlier ones whose states are constants.

The usual way joins earlier and new states into fresh tensors, repeats them for grouped heads and keeps all of it for
backward, layer by layer: for K soft tokens after a text, far more memory traffic than work. Here both parts stay apart:
scores are computed on each, the softmax runs over both, and no gradient is formed for the earlier part.

Shapes: B batch, H key/value heads, R query heads per key/value head, K new tokens, T earlier tokens, d head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from promptembedder.llms.packing import Packed, attend_apart
from promptembedder.llms.states import shallow_copy

NAME = "sdpa_or_apart"


class StatesApart(DynamicCache):
    """Earlier states that new ones are not joined to: `update` returns the new states unchanged."""

    def __init__(self, cache: DynamicCache) -> None:
        self.__dict__.update(shallow_copy(cache).__dict__)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return the new states alone."""
        return key_states, value_states


def install(lm: PreTrainedModel) -> bool:
    """Let an LLM with scaled dot-product attention accept `earlier=`; False if it has another attention."""
    if lm.config._attn_implementation not in ("sdpa", NAME):
        return False
    lm.set_attn_implementation(NAME)
    return bool(lm.config._attn_implementation == NAME)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    earlier: StatesApart | None = None,
    packed: Packed | None = None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as `transformers` calls it; with `earlier`, over its states and the new ones.

    Args:
        module: the attention layer; its `layer_idx` finds the layer's states.
        query: (B, H x R, K, d).
        key: of the new tokens, (B, H, K, d) with `earlier`.
        value: likewise.
        attention_mask: (B, 1, K, T + K), true where a token may attend; None: causal, nothing padded.
        earlier: states of the tokens before; unset: scaled dot-product attention.
        packed: how texts lie in a single row; unset: they do not.
        scaling: of the scores.
        **kwargs: further arguments of `transformers`.

    Returns:
        (B, K, H x R, d), and None in the place of weights.
    """
    if packed is not None:
        return packed.attend(module, query, key, value, scaling), None
    if earlier is None:
        return sdpa_attention_forward(  # type: ignore[no-any-return]
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
    layer = earlier.layers[module.layer_idx]
    K, T = query.shape[2], layer.keys.shape[2]
    if attention_mask is None:
        place_K = torch.arange(K, device=query.device)
        attention_mask = torch.cat([place_K.new_ones(K, T).bool(), place_K[:, None] >= place_K], dim=1)[None, None]
    # States may be kept in a narrower precision than the new tokens are computed in.
    before = layer.keys.to(query.dtype), layer.values.to(query.dtype), attention_mask[..., :T]
    output = attend_apart(query, before, (key, value, attention_mask[..., T:]), scaling)
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, attend)


AttentionMaskInterface.register(NAME, sdpa_mask)
