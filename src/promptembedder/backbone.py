"""Frozen Embedding LLM: reads a text and a soft prompt, in one of two layouts, into an embedding.

Both layouts are one idea: run the first segment, keep its key/value states, continue with the second.

    prefix:  [instruction, soft prompt] -> [text]      gradient through every text token
    suffix:  [text] -> [soft prompt]                   gradient through the K soft tokens only

Shapes: B texts, T text tokens, I instruction tokens, K soft tokens, D backbone width, E embedding width (= D),
N soft prompts (1, shared by the batch, or B), L tokens of the segment at hand.
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from promptembedder.errors import PromptEmbedderError

Layout = Literal["prefix", "suffix"]
Readout = Literal["last", "mean"]
TextPass = Literal["same", "int8"]

# Padded tokens of one chunk. Small chunks waste less padding; below these sizes matrix products get slower.
_CHUNK_TOKENS_CPU = 512
_CHUNK_TOKENS = 16_384


@dataclass(frozen=True)
class States:
    """Key/value states of a segment that came first, to continue from any number of times.

    Attributes:
        cache: as `transformers` keeps it; never updated in place by this module.
        mask_BL: 1 for tokens, 0 for padding, of everything the cache holds.
    """

    cache: DynamicCache
    mask_BL: Tensor

    def expanded(self, batch: int) -> States:
        """Share the states of one row among `batch` rows (no copy); gradients add up on the one row."""
        if len(self.mask_BL) == batch:
            return self
        cache = _shallow_copy(self.cache)
        for layer in cache.layers:
            layer.keys = layer.keys.expand(batch, -1, -1, -1)
            layer.values = layer.values.expand(batch, -1, -1, -1)
        return States(cache, self.mask_BL.expand(batch, -1))

    def picked(self, rows: Tensor) -> States:
        """The states of some rows."""
        cache = _shallow_copy(self.cache)
        cache.batch_select_indices(rows)
        return States(cache, self.mask_BL[rows])


class Backbone(nn.Module):
    """The frozen LLM without its output head. Its parameters never need gradients and never leave eval mode.

    Args:
        lm: decoder that takes `inputs_embeds`, `position_ids` and `past_key_values` (`AutoModel` style).
        layout: where the soft prompt stands, see the module's docstring.
        readout: `suffix`: the last soft token or the mean over the K soft tokens; `prefix`: the last text token
            or the mean over the text tokens.
        text_pass: `int8` runs the pass over the text in layout `suffix` with weights and activations in dynamic
            int8 (float32 models on the CPU); the soft prompt is read in full precision all the same.

    Raises:
        PromptEmbedderError: int8 with layout `prefix` or with a model that is not float32.
    """

    def __init__(self, lm: PreTrainedModel, *, layout: Layout, readout: Readout, text_pass: TextPass = "same") -> None:
        super().__init__()
        self.lm = lm.requires_grad_(False).eval()
        self.layout = layout
        self.readout = readout
        self.text_pass = text_pass
        # In a list, so that the int8 copy is no part of the module tree: not saved, not moved, not counted.
        self._int8_lm: list[nn.Module] = []
        if text_pass == "int8" and (layout != "suffix" or lm.dtype != torch.float32):
            raise PromptEmbedderError(
                f"text_pass 'int8' needs layout 'suffix' and dtype float32, found {layout!r} and {lm.dtype}"
            )

    def __getstate__(self) -> dict[str, Any]:
        """Leave the int8 copy out of pickles for worker processes; they make their own."""
        return {**self.__dict__, "_int8_lm": []}

    def train(self, mode: bool = True) -> Backbone:
        """Stay in eval mode: frozen means frozen."""
        super().train(mode)
        self.lm.eval()
        return self

    @property
    def width(self) -> int:
        """D, which is also E."""
        return int(self.lm.config.get_text_config(decoder=True).hidden_size)

    def forward(self, ids_BT: Tensor, mask_BT: Tensor, soft_NKD: Tensor, instruction_ids_I: Tensor) -> Tensor:
        """Embed texts under soft prompts.

        Args:
            ids_BT: text token ids, padded on either side.
            mask_BT: 1 for tokens, 0 for padding.
            soft_NKD: one soft prompt for all texts (N = 1) or one per text (N = B).
            instruction_ids_I: the instruction in the backbone's tokens; read by layout `prefix` only.

        Returns:
            (B, E) float32, not normalised.
        """
        if self.layout == "suffix":
            return self.read_soft_prompt(self.read_text(ids_BT, mask_BT), soft_NKD)
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

    def read_text(self, ids_BT: Tensor, mask_BT: Tensor) -> States:
        """Layout `suffix`, first segment: key/value states of the texts, without gradient.

        They do not depend on what follows, so one pass serves any number of soft prompts.
        """
        # Padding goes to the left, so that the soft prompt follows the text without a gap.
        ids_BT, mask_BT = pad_side(ids_BT, mask_BT, "left")
        parts = []
        with torch.no_grad():
            for rows, length in self._chunks(mask_BT):
                mask_bT = mask_BT[rows, mask_BT.shape[1] - length :]
                ids_bT = ids_BT[rows, mask_BT.shape[1] - length :]
                parts.append((rows, self._continue(None, self._embed(ids_bT), mask_bT, self._text_lm())[1]))
        return _merged(parts)

    def read_soft_prompt(self, states: States, soft_NKD: Tensor) -> Tensor:
        """Layout `suffix`, second segment: embeddings (B, E) float32 of the texts behind `states`."""
        batch = len(states.mask_BL)
        soft_BKD = soft_NKD.to(self.lm.dtype).expand(batch, -1, -1)
        mask_BK = states.mask_BL.new_ones(soft_BKD.shape[:2])
        hidden_BKD, _ = self._continue(states, soft_BKD, mask_BK)
        return pool(hidden_BKD, mask_BK, self.readout)

    def _read_head(self, instruction_ids_I: Tensor, soft_NKD: Tensor) -> States:
        """Layout `prefix`, first segment: instruction and soft prompt, once for all texts that share them."""
        instruction_NID = self._embed(instruction_ids_I[None]).expand(len(soft_NKD), -1, -1)
        head_NLD = torch.cat([instruction_NID, soft_NKD.to(self.lm.dtype)], dim=1)
        _, states = self._continue(None, head_NLD, instruction_ids_I.new_ones(head_NLD.shape[:2]))
        return states

    def _text_lm(self) -> nn.Module:
        """The LLM that reads texts in layout `suffix`: itself, or its int8 copy, made on first use."""
        if self.text_pass == "same":
            return self.lm  # type: ignore[no-any-return]
        if self.lm.device.type != "cpu":
            raise PromptEmbedderError(f"text_pass 'int8' runs on the CPU only, the model is on {self.lm.device}")
        if not self._int8_lm:
            self._int8_lm.append(_int8_copy(self.lm))
        return self._int8_lm[0]

    def _continue(
        self, before: States | None, inputs_BLD: Tensor, mask_BL: Tensor, lm: nn.Module | None = None
    ) -> tuple[Tensor, States]:
        """Run one segment after another. The one place where anything enters the LLM."""
        cache: Any = DynamicCache(config=self.lm.config) if before is None else _shallow_copy(before.cache)
        mask_all = mask_BL if before is None else torch.cat([before.mask_BL, mask_BL], dim=1)
        positions_BL = (mask_all.cumsum(-1) - 1).clamp(min=0)[:, -mask_BL.shape[1] :]
        output = (lm or self.lm)(
            inputs_embeds=inputs_BLD,
            attention_mask=mask_all,
            position_ids=positions_BL,
            past_key_values=cache,
            use_cache=True,
        )
        return output.last_hidden_state, States(cache, mask_all)

    def _chunks(self, mask_BT: Tensor) -> list[tuple[Tensor, int]]:
        """Rows sorted by length and cut into chunks of bounded size: (row numbers, longest length) each.

        Padding then costs next to nothing and memory is bounded by tokens, whatever the batch.
        """
        limit = _CHUNK_TOKENS_CPU if mask_BT.device.type == "cpu" else _CHUNK_TOKENS
        lengths_B, order_B = mask_BT.sum(-1).sort(stable=True)
        chunks, start = [], 0
        lengths = lengths_B.tolist()
        for n in range(1, len(lengths) + 1):
            if n == len(lengths) or lengths[n] * (n + 1 - start) > limit:
                chunks.append((order_B[start:n], lengths[n - 1]))
                start = n
        return chunks

    def _embed(self, ids_BT: Tensor) -> Tensor:
        return self.lm.get_input_embeddings()(ids_BT)  # type: ignore[no-any-return]


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


def _shallow_copy(cache: DynamicCache) -> DynamicCache:
    """A cache with layers of its own that share the tensors: `update` replaces tensors, it does not write into them."""
    fresh = copy.copy(cache)
    fresh.layers = [copy.copy(layer) for layer in cache.layers]
    return fresh


def _merged(parts: list[tuple[Tensor, States]]) -> States:
    """Put the states of chunks back into one batch; chunks come shortest first, rows are aligned on the right."""
    if len(parts) == 1:
        rows, states = parts[0]
        return states.picked(rows.argsort())
    _, longest = parts[-1]
    batch = sum(len(rows) for rows, _ in parts)
    cache = _shallow_copy(longest.cache)
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
            setattr(layer, name, whole)
    return States(cache, mask_BL)


def _int8_copy(lm: nn.Module) -> nn.Module:
    """The LLM with its linear layers in dynamic int8; everything else is shared with the original."""
    shared: dict[int, Any] = {id(t): t for t in [*lm.parameters(), *lm.buffers()]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the eager quantisation API is announced to move to another package
        return torch.ao.quantization.quantize_dynamic(  # type: ignore[no-any-return, no-untyped-call]
            copy.deepcopy(lm, shared), {nn.Linear}, dtype=torch.qint8, inplace=True
        )
