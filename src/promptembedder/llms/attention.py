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
        scaling: of the scores.
        **kwargs: further arguments of `transformers`.

    Returns:
        (B, K, H x R, d), and None in the place of weights.
    """
    if earlier is None:
        return sdpa_attention_forward(  # type: ignore[no-any-return]
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
    layer = earlier.layers[module.layer_idx]
    B, heads, K, d = query.shape
    H, T = key.shape[1], layer.keys.shape[2]
    # Query heads of one key/value head become rows of one product; nothing is repeated.
    query_BHQd = query.reshape(B, H, heads // H * K, d) * (scaling if scaling is not None else d**-0.5)
    # States may be kept in a narrower precision than the new tokens are computed in.
    earlier_keys, earlier_values = layer.keys.to(query.dtype), layer.values.to(query.dtype)
    scores_BHQS = torch.cat([query_BHQd @ earlier_keys.mT, query_BHQd @ key.mT], dim=-1)
    scores_BHQS = scores_BHQS.to(torch.promote_types(scores_BHQS.dtype, torch.float32))
    if attention_mask is None:
        place_K = torch.arange(K, device=query.device)
        attention_mask = torch.cat([place_K.new_ones(K, T).bool(), place_K[:, None] >= place_K], dim=1)[None, None]
    hidden_BHQS = ~attention_mask.expand(-1, 1, K, T + K).repeat(1, 1, heads // H, 1)
    weights_BHQS = scores_BHQS.masked_fill(hidden_BHQS, torch.finfo(scores_BHQS.dtype).min).softmax(-1).to(query.dtype)
    output_BHQd = weights_BHQS[..., :T] @ earlier_values + weights_BHQS[..., T:] @ value
    return output_BHQd.reshape(B, heads, K, d).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, attend)


AttentionMaskInterface.register(NAME, sdpa_mask)
