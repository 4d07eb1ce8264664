"""Frozen Embedding LLM: reads a text and a soft prompt, in one of two layouts, into an embedding.

Both layouts are one idea: run the first segment, keep its key/value states, continue with the second.

    prefix:  [instruction, soft prompt] -> [text]      gradient through every text token
    suffix:  [text] -> [soft prompt]                   gradient through the K soft tokens only

Shapes: B texts, T text tokens, I instruction tokens, K soft tokens, D backbone width, E embedding width (= D),
N soft prompts (1, shared by the batch, or B), R rows of a soft prompt: K, and K more for each of J layers where it is
deep; L tokens of the segment at hand.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from promptembedder.errors import PromptEmbedderError
from promptembedder.llms import attention, widened
from promptembedder.llms.attention import StatesApart
from promptembedder.llms.state_cache import TextStateCache
from promptembedder.llms.states import CACHE_ARGUMENT, States, merged, packed, shallow_copy, unpacked
from promptembedder.model.settings import Layout, Readout

logger = logging.getLogger(__name__)


# Soft prompts (N, R, D) and the instruction's tokens (I,) to embeddings (B, E) of the texts at hand.
Embedder = Callable[[Tensor, Tensor], Tensor]
# Padded tokens of one chunk. Small chunks waste less padding; below these sizes matrix products get slower, and
# widening the weights for each chunk shows.
_CHUNK_TOKENS_CPU = 512
_CHUNK_TOKENS_WIDENED = 2048
_CHUNK_TOKENS = 16_384


class Backbone(nn.Module):
    """The frozen LLM without its output head. Its parameters never need gradients and never leave eval mode.

    Args:
        lm: decoder that takes `inputs_embeds`, `position_ids` and states to continue from (`AutoModel` style).
        layout: where the soft prompt stands, see the module's docstring.
        readout: `suffix`: the last soft token or the mean over the K soft tokens; `prefix`: the last text token
            or the mean over the text tokens.
        num_soft_tokens: K. Rows of a soft prompt beyond these are of a deep one (layout `suffix`): K more for each
            layer, added to its input.
    """

    def __init__(
        self,
        lm: PreTrainedModel,
        *,
        layout: Layout,
        readout: Readout,
        num_soft_tokens: int,
    ) -> None:
        super().__init__()
        self.lm = lm.requires_grad_(False).eval()
        self.layout = layout
        self.readout = readout
        self.num_soft_tokens = num_soft_tokens
        # Hooks on the LLM's layers add what belongs to one request, so another thread's must wait.
        self._one_at_a_time = threading.RLock()
        self._can_stay_apart = layout == "suffix" and attention.install(lm)
        # In a dict, so that the copies are no part of the module tree: not saved, not moved, not counted.
        self._copies: dict[str, nn.Module] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Leave the LLM's copy and the lock out of pickles for worker processes."""
        return {**self.__dict__, "_copies": {}, "_one_at_a_time": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._one_at_a_time = threading.RLock()

    def train(self, mode: bool = True) -> Backbone:
        """Stay in eval mode: frozen means frozen. As in `Prompter.train`, no module of the LLM is visited."""
        self.training = mode
        if self.lm.training:
            self.lm.eval()
        return self

    @property
    def width(self) -> int:
        """D, which is also E."""
        return int(self.lm.config.get_text_config(decoder=True).hidden_size)

    def check_room(self, tokens: int, beside: int) -> None:
        """Refuse texts longer than the LLM has positions for.

        Args:
            tokens: of the longest text.
            beside: what else is read with it: template, instruction, soft prompt.

        Raises:
            PromptEmbedderError: it has fewer.
        """
        positions = getattr(self.lm.config.get_text_config(decoder=True), "max_position_embeddings", None)
        if positions is not None and tokens + beside > positions:
            raise PromptEmbedderError(
                f"texts of {tokens} tokens, with {beside} beside them, are too long for the backbone, which reads "
                f"{positions}"
            )

    def embedder(self, ids_BT: Tensor, mask_BT: Tensor, cache: TextStateCache | None = None) -> Embedder:
        """Texts to be embedded under any number of soft prompts: `forward` with its first two arguments given.

        In layout `suffix` they are read here, once.

        Args:
            ids_BT: text token ids, padded on either side.
            mask_BT: 1 for tokens, 0 for padding.
            cache: holds the states of texts in layout `suffix`; unset: every text is read.
        """
        if self.layout == "suffix":
            states = self.read_text(ids_BT, mask_BT, cache)
            return lambda soft_NRD, instruction_ids_I: self.read_soft_prompt(states, soft_NRD)
        return partial(self._read_after_soft_prompt, ids_BT, mask_BT)

    def forward(self, ids_BT: Tensor, mask_BT: Tensor, soft_NRD: Tensor, instruction_ids_I: Tensor) -> Tensor:
        """Embed texts under soft prompts.

        Args:
            ids_BT: text token ids, padded on either side.
            mask_BT: 1 for tokens, 0 for padding.
            soft_NRD: one soft prompt for all texts (N = 1) or one per text (N = B).
            instruction_ids_I: the instruction in the backbone's tokens, for layout `prefix`.

        Returns:
            (B, E) float32, not normalised.
        """
        return self.embedder(ids_BT, mask_BT)(soft_NRD, instruction_ids_I)

    def _read_after_soft_prompt(
        self, ids_BT: Tensor, mask_BT: Tensor, soft_NKD: Tensor, instruction_ids_I: Tensor
    ) -> Tensor:
        """Layout `prefix`: embeddings (B, E) float32 of texts behind instruction and soft prompt."""
        head = self._read_head(instruction_ids_I, soft_NKD)
        # Text follows the states without a gap, so padding goes to the right: sliding windows count places.
        ids_BT, mask_BT = pad_side(ids_BT, mask_BT, "right")
        pooled, order = [], []
        for rows, length in self._chunks(mask_BT):
            states = head.expanded(len(rows)) if len(soft_NKD) == 1 else head.picked(rows)
            mask_bT = mask_BT[rows, :length]
            hidden_bTD, _ = self._continue(states, self._embed(ids_BT[rows, :length]), mask_bT)
            pooled.append(pool(hidden_bTD, mask_bT, self.readout))
            order.append(rows)
        return torch.cat(pooled)[torch.cat(order).argsort()]

    def read_text(self, ids_BT: Tensor, mask_BT: Tensor, cache: TextStateCache | None = None) -> States:
        """Layout `suffix`, first segment: key/value states of the texts, without gradient.

        They do not depend on what follows, so one pass serves any number of soft prompts. Only texts that the cache
        does not hold are read.
        """
        # Padding goes to the left, so that the soft prompt follows the text without a gap.
        ids_BT, mask_BT = pad_side(ids_BT, mask_BT, "left")
        length = int(mask_BT.sum(-1).max())
        ids_BT, mask_BT = ids_BT[:, -length:], mask_BT[:, -length:]
        with torch.no_grad():
            if cache is None:
                return merged(list(self._read_chunks(ids_BT, mask_BT)))
            return self._read_through(cache, ids_BT, mask_BT)

    def _read_chunks(self, ids_BT: Tensor, mask_BT: Tensor) -> Iterator[tuple[Tensor, States]]:
        """Row numbers and states of each chunk, shortest texts first; padding stands on the left."""
        for rows, length in self._chunks(mask_BT):
            inputs_bTD, mask_bT = self._embed(ids_BT[rows, -length:]), mask_BT[rows, -length:]
            states = self._continue(None, inputs_bTD, mask_bT)[1]
            yield rows, states.to(self.lm.dtype)

    def _read_through(self, cache: TextStateCache, ids_BT: Tensor, mask_BT: Tensor) -> States:
        """Read only those texts whose states the cache does not hold."""
        keys = [cache.key(ids_T[mask_T.bool()]) for ids_T, mask_T in zip(ids_BT, mask_BT, strict=True)]
        found = {n: row for n, key in enumerate(keys) if (row := cache.get(key, ids_BT.device)) is not None}
        missing_M = torch.tensor([n for n in range(len(keys)) if n not in found], device=ids_BT.device)
        if len(missing_M):
            for rows, states in self._read_chunks(ids_BT[missing_M], mask_BT[missing_M]):
                for n, row in zip(missing_M[rows].tolist(), packed(states), strict=True):
                    found[n] = cache.put(keys[n], row)
        empty = DynamicCache(config=self.lm.config)
        return unpacked((found[n] for n in range(len(keys))), mask_BT, empty, self.lm.dtype)

    def read_soft_prompt(self, states: States, soft_NRD: Tensor) -> Tensor:
        """Layout `suffix`, second segment: embeddings (B, E) float32 of the texts behind `states`."""
        K = self.num_soft_tokens
        soft_BKD = soft_NRD[:, :K].expand(len(states.mask_BL), -1, -1)
        mask_BK = states.mask_BL.new_ones(soft_BKD.shape[:2])
        with self._one_at_a_time, self._deepened(soft_NRD[:, K:]):
            hidden_BKD = self._finish(states, soft_BKD, mask_BK)
        return pool(hidden_BKD, mask_BK, self.readout)

    @contextmanager
    def _deepened(self, deep_NMD: Tensor) -> Iterator[None]:
        """Add K rows of a deep soft prompt (N, J K, D) to the input of each of the J layers, while inside."""
        hooks = []
        if deep_NMD.shape[1]:
            layers: Any = self._reader().layers
            for layer, deep_NKD in zip(layers, deep_NMD.chunk(len(layers), dim=1), strict=True):
                hooks.append(layer.register_forward_pre_hook(partial(_add_to_input, deep_NKD)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _read_head(self, instruction_ids_I: Tensor, soft_NKD: Tensor) -> States:
        """Layout `prefix`, first segment: instruction and soft prompt, once for all texts that share them."""
        instruction_NID = self._embed(instruction_ids_I[None]).expand(len(soft_NKD), -1, -1)
        head_NLD = torch.cat([instruction_NID, soft_NKD], dim=1)
        _, states = self._continue(None, head_NLD, instruction_ids_I.new_ones(head_NLD.shape[:2]))
        return states

    def _reader(self) -> nn.Module:
        """What runs a segment: the LLM, or a copy of it made on first use, which takes and gives float32."""
        if not widened.helps(self.lm):
            return self.lm  # type: ignore[no-any-return]
        with self._one_at_a_time:
            if "widened" not in self._copies:
                self._copies["widened"] = widened.widened(self.lm)
            return self._copies["widened"]

    def _continue(self, before: States | None, inputs_BLD: Tensor, mask_BL: Tensor) -> tuple[Tensor, States]:
        """Run one segment after another.

        Args:
            before: states to continue from, left as they are; unset: a first segment.
            inputs_BLD: embeddings of the segment.
            mask_BL: 1 for tokens, 0 for padding.

        Returns:
            The segment's last hidden states (B, L, D), and the states to continue from.
        """
        cache = DynamicCache(config=self.lm.config) if before is None else shallow_copy(before.cache)
        mask_all = mask_BL if before is None else torch.cat([before.mask_BL, mask_BL], dim=1)
        return self._call(inputs_BLD, mask_all, cache), States(cache, mask_all)

    def _finish(self, before: States, inputs_BLD: Tensor, mask_BL: Tensor) -> Tensor:
        """Run a segment that nothing follows; its last hidden states (B, L, D).

        Where the LLM allows it, its states are not joined with those before (see `attention`).
        """
        if not self._can_stay_apart:
            return self._continue(before, inputs_BLD, mask_BL)[0]
        cache = StatesApart(before.cache)
        mask_all = torch.cat([before.mask_BL, mask_BL], dim=1)
        return self._call(inputs_BLD, mask_all, cache, earlier=cache)

    def _call(self, inputs_BLD: Tensor, mask_all: Tensor, cache: Any, **more: Any) -> Tensor:
        """The one place where anything enters the LLM; `mask_all` covers what is in the cache, too."""
        reader = self._reader()
        positions_BL = (mask_all.cumsum(-1) - 1).clamp(min=0)[:, -inputs_BLD.shape[1] :]
        dtype = self._embedding_dtype() if reader is self.lm else torch.float32
        with self._one_at_a_time:
            output = reader(
                inputs_embeds=inputs_BLD.to(dtype),
                attention_mask=mask_all,
                position_ids=positions_BL,
                **{CACHE_ARGUMENT: cache},
                use_cache=True,
                **more,
            )
        return output.last_hidden_state  # type: ignore[no-any-return]

    def _chunks(self, mask_BT: Tensor) -> list[tuple[Tensor, int]]:
        """Rows sorted by length and cut into chunks of bounded size: (row numbers, longest length) each.

        Padding then costs next to nothing and memory is bounded by tokens, whatever the batch.
        """
        limit = _CHUNK_TOKENS_CPU if mask_BT.device.type == "cpu" else _CHUNK_TOKENS
        if widened.helps(self.lm):
            limit = _CHUNK_TOKENS_WIDENED
        lengths_B, order_B = mask_BT.sum(-1).sort(stable=True)
        chunks, start = [], 0
        lengths = lengths_B.tolist()
        for n in range(1, len(lengths) + 1):
            if n == len(lengths) or lengths[n] * (n + 1 - start) > limit:
                chunks.append((order_B[start:n], lengths[n - 1]))
                start = n
        return chunks

    def _embedding_dtype(self) -> torch.dtype:
        return self.lm.get_input_embeddings().weight.dtype  # type: ignore[no-any-return]

    def _embed(self, ids_BT: Tensor) -> Tensor:
        return self.lm.get_input_embeddings()(ids_BT)  # type: ignore[no-any-return]


def _add_to_input(offset_NKD: Tensor, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    hidden_BKD, *others = inputs
    return (hidden_BKD + offset_NKD.to(hidden_BKD.dtype), *others)


def pool(hidden_BLD: Tensor, mask_BL: Tensor, readout: Readout) -> Tensor:
    """Embeddings (B, D), at least float32, from last hidden states: the last token's, or the mean over tokens."""
    hidden_BLD = hidden_BLD.to(torch.promote_types(hidden_BLD.dtype, torch.float32))
    if readout == "mean":
        weights_BL = mask_BL / mask_BL.sum(-1, keepdim=True)
        return (hidden_BLD * weights_BL[..., None]).sum(1)
    last_B = mask_BL.shape[1] - 1 - mask_BL.flip(-1).argmax(-1)
    return hidden_BLD[torch.arange(len(hidden_BLD), device=hidden_BLD.device), last_B]


def pad_side(ids_BT: Tensor, mask_BT: Tensor, side: Literal["left", "right"]) -> tuple[Tensor, Tensor]:
    """Move every row's padding to one side, keeping the order of its tokens."""
    order_BT = mask_BT.argsort(dim=-1, stable=True, descending=side == "right")
    return ids_BT.gather(-1, order_BT), mask_BT.gather(-1, order_BT)
