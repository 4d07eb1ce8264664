"""Differentiable generation: soft tokens that an LLM writes after a request, in turn or all at once.

No sampling and no argmax: soft token k = softmax(logits_k / temperature) @ embeddings, fed back as the next input
(PromptEmbedder, arXiv 2605.28066; the relaxation as in GIRCSE).

Shapes: N requests, S request tokens, K soft tokens, J = K - 1 of them fed back, P prompter width, V vocabulary, M rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from promptembedder.llms.open import input_embeddings
from promptembedder.llms.states import CACHE_ARGUMENT

# Words of less weight than this share of the dtype's epsilon are skipped. A million of them add less than one epsilon.
_NO_WEIGHT = 1e-6
# A soft token is at rest if no component changes by more than this share of the draft's largest one. It bounds what is
# fed back; the tokens after it change less, where each is mostly one word. bfloat16 resolves less: epsilon / 8 there.
_AT_REST = 1e-5


class SoftTokens(NamedTuple):
    """What the prompter wrote.

    Attributes:
        tokens_NKP: soft tokens in the prompter's input-embedding space.
        weights_NKV: of every token of the vocabulary in each mixture; they sum to 1.
    """

    tokens_NKP: Tensor
    weights_NKV: Tensor


class Request(NamedTuple):
    """Requests, partly read.

    Attributes:
        ids_NS: token ids, padded.
        mask_NS: 1 for tokens, 0 for padding.
        cache: states of the first tokens; what is read is added.
        shared: how many tokens are in it; at least one is left to read.
    """

    ids_NS: Tensor
    mask_NS: Tensor
    cache: DynamicCache
    shared: int


def soft_tokens_in_turn(lm: nn.Module, request: Request, count: int, temperature: float) -> SoftTokens:
    """`count` soft tokens one after the other, each with a pass of its own; gradients go through all of them."""
    rest_NSP, positions_NS = _unread(lm, request)
    inputs_NSP, mask_NS = rest_NSP, request.mask_NS
    tokens: list[Tensor] = []
    weights: list[Tensor] = []
    for _ in range(count):
        if tokens:
            inputs_NSP = tokens[-1]
            mask_NS = torch.cat([mask_NS, mask_NS.new_ones(len(mask_NS), 1)], dim=1)
            positions_NS = positions_NS[:, -1:] + 1
        token_N1P, weights_N1V = _read(lm, request.cache, inputs_NSP, mask_NS, positions_NS, 1, temperature)
        tokens.append(token_N1P)
        weights.append(weights_N1V)
    return SoftTokens(torch.cat(tokens, 1), torch.cat(weights, 1))


def soft_tokens_at_once(
    lm: nn.Module, request: Request, draft_ids: Sequence[int], temperature: float
) -> tuple[SoftTokens, int]:
    """Soft tokens as a fixed point: all from a draft, and again from those found, until they are at rest.

    Soft token k depends on those before it alone, so every pass gets one more of them right whatever the draft, and K
    passes are the most (Jacobi iteration: Song et al. 2021, arXiv 2002.03629; in decoding Santilli et al. 2023,
    arXiv 2305.10427). A prompter that writes the same cue after one word of its own takes two.

    Args:
        lm: a causal LM.
        request: is read; its cache must be able to go back.
        draft_ids: J tokens that may be near the first J soft tokens.
        temperature: of the softmax.

    Returns:
        K = J + 1 soft tokens, and the number of passes.
    """
    rest_NSP, positions_NS = _unread(lm, request)
    N, J = len(request.ids_NS), len(draft_ids)
    drafted_1J = request.ids_NS.new_tensor([draft_ids])
    tokens_NJP = lm.get_input_embeddings()(drafted_1J).repeat(N, 1, 1)  # type: ignore[operator]
    limit = max(_AT_REST, torch.finfo(tokens_NJP.dtype).eps / 8) * float(tokens_NJP.abs().max())
    mask_NS = torch.cat([request.mask_NS, request.mask_NS.new_ones(N, J)], dim=1)
    later_1J = torch.arange(1, J + 1, device=positions_NS.device)[None]
    positions_NS = torch.cat([positions_NS, positions_NS[:, -1:] + later_1J], dim=1)
    # The first pass reads the rest of the request and the draft, and finds all soft tokens; each later one reads those
    # that moved first, and finds what follows them.
    inputs_NSP, first, passes = torch.cat([rest_NSP, tokens_NJP], dim=1), 0, 0
    found: SoftTokens | None = None
    rested_N11 = torch.zeros(N, 1, 1, dtype=torch.bool, device=tokens_NJP.device)
    while True:
        positions_here_NS = positions_NS[:, -inputs_NSP.shape[1] :]
        new = _read(lm, request.cache, inputs_NSP, mask_NS, positions_here_NS, J + 1 - first, temperature)
        passes += 1
        if found is not None:
            # A request at rest keeps its soft tokens, whatever others of its batch still do.
            pairs = zip(found, new, strict=True)
            new = SoftTokens(*(torch.where(rested_N11, old[:, first:], late) for old, late in pairs))
            found = SoftTokens(*(torch.cat([o[:, :first], n], dim=1) for o, n in zip(found, new, strict=True)))
        else:
            found = new
        moved_NJ = (found.tokens_NKP[:, :J] - tokens_NJP).abs().amax(-1) > limit
        tokens_NJP = found.tokens_NKP[:, :J]
        rested_N11 = ~moved_NJ.any(-1)[:, None, None]
        moving = moved_NJ.any(0).nonzero()[:, 0].tolist()
        if not moving:
            return found, passes
        request.cache.crop(moving[0] - J)  # negative: the number of states to forget
        inputs_NSP, first = tokens_NJP[:, moving[0] :], moving[0] + 1


def mixture(weights_MV: Tensor, embeddings_VP: Tensor) -> Tensor:
    """Means (M, P) of embeddings, weighted.

    Without gradients, words of no weight to speak of are not read: a mixture of few words costs less than a pass over
    the whole matrix of embeddings.
    """
    if not torch.is_grad_enabled() and embeddings_VP.device.type == "cpu":
        ids = (weights_MV > _NO_WEIGHT * torch.finfo(embeddings_VP.dtype).eps).any(0).nonzero()[:, 0]
        if len(ids) < len(embeddings_VP) // 8:
            return weights_MV[:, ids].to(embeddings_VP.dtype) @ embeddings_VP[ids]
    return weights_MV.to(embeddings_VP.dtype) @ embeddings_VP


def last_places(count: int, tokens: int, like: Tensor) -> Tensor:
    """Places of the last tokens, for `logits_to_keep`.

    By place, not by number: of a number the LLM makes a slice, and torch multiplies a slice of a longer row by a copy
    of the output embeddings, which takes longer than the rest of the pass.
    """
    return torch.arange(tokens - count, tokens, device=like.device)


def _unread(lm: nn.Module, request: Request) -> tuple[Tensor, Tensor]:
    """Embeddings and positions of the tokens that are not in the cache."""
    positions_NS = (request.mask_NS.cumsum(-1) - 1).clamp(min=0)
    rest_NSP = lm.get_input_embeddings()(request.ids_NS[:, request.shared :])  # type: ignore[operator]
    return rest_NSP, positions_NS[:, request.shared :]


def _read(
    lm: nn.Module,
    cache: DynamicCache,
    inputs_NSP: Tensor,
    mask_NS: Tensor,
    positions_NS: Tensor,
    count: int,
    temperature: float,
) -> SoftTokens:
    """The soft tokens that follow the last `count` inputs."""
    embeddings_VP, scale = input_embeddings(lm)  # type: ignore[arg-type]
    output: Any = lm(
        inputs_embeds=inputs_NSP,
        attention_mask=mask_NS,
        position_ids=positions_NS,
        **{CACHE_ARGUMENT: cache},
        use_cache=True,
        logits_to_keep=last_places(count, inputs_NSP.shape[1], inputs_NSP),
    )
    logits_NKV = output.logits[:, -count:]
    logits_NKV = logits_NKV.to(torch.promote_types(logits_NKV.dtype, torch.float32))
    weights_NKV = torch.softmax(logits_NKV / temperature, dim=-1)
    tokens_MP = mixture(weights_NKV.flatten(0, 1), embeddings_VP) * scale
    return SoftTokens(tokens_MP.view(*weights_NKV.shape[:2], -1), weights_NKV)
