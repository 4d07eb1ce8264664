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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from promptembedder.errors import PromptEmbedderError
from promptembedder.llms import attention, packing, widened
from promptembedder.llms.attention import StatesApart
from promptembedder.llms.packing import Packed
from promptembedder.llms.state_cache import TextStateCache
from promptembedder.llms.states import CACHE_ARGUMENT, States, merged, packed, shallow_copy, stacked, unpacked
from promptembedder.model.settings import Layout, Readout

logger = logging.getLogger(__name__)

# Tokens of one chunk. Smaller ones make slower matrix products, larger ones need more memory; where weights are widened
# for each chunk, that shows.
_CHUNK_TOKENS_CPU = 2048
_CHUNK_TOKENS = 16_384
# Soft prompts that follow a text at once.
_PROMPTS = 64


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
        installed = attention.install(lm)
        self._can_stay_apart = layout == "suffix" and installed
        self._packs = installed and packing.is_possible(lm)
        # In a dict, so that the copies are no part of the module tree: not saved, not moved, not counted.
        self._copies: dict[tuple[str, ...], nn.Module] = {}
        # What texts begin with, where all do: read once, and its states kept.
        self.head_ids: Sequence[int] = ()
        self._head: tuple[tuple[Any, ...], States] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave the LLM's copy and the lock out of pickles for worker processes."""
        return {**self.__dict__, "_copies": {}, "_head": None, "_one_at_a_time": None}

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

    def embed(
        self,
        ids_BT: Tensor,
        mask_BT: Tensor,
        soft_prompts: Sequence[Tensor],
        instructions: Sequence[Tensor],
        cache: TextStateCache | None = None,
    ) -> list[Tensor]:
        """Embed texts under any number of soft prompts; in layout `suffix` every text is read once.

        Args:
            ids_BT: text token ids, padded on either side.
            mask_BT: 1 for tokens, 0 for padding.
            soft_prompts: (N, R, D) each: one for all texts (N = 1) or one per text (N = B).
            instructions: token ids (I,) of the instruction of each soft prompt, for layout `prefix`.
            cache: holds the states of texts in layout `suffix`; unset: every text is read.

        Returns:
            Embeddings (B, E) float32 under each soft prompt, not normalised.
        """
        if self.layout == "prefix":
            return [
                self._read_after_soft_prompt(ids_BT, mask_BT, soft_NKD, instruction_ids_I)
                for soft_NKD, instruction_ids_I in zip(soft_prompts, instructions, strict=True)
            ]
        beside, alone = len(self.head_ids) + self.num_soft_tokens, cache is None and not torch.is_grad_enabled()
        if alone and len(ids_BT) and self._can_pack(int(mask_BT.sum(-1).max()) + beside):
            groups = (soft_prompts[n : n + _PROMPTS] for n in range(0, len(soft_prompts), _PROMPTS))
            return [one for group in groups for one in self._read_packed(ids_BT, mask_BT, group)]
        states = self.read_text(ids_BT, mask_BT, cache)
        return [self.read_soft_prompt(states, soft_NRD) for soft_NRD in soft_prompts]

    def forward(self, ids_BT: Tensor, mask_BT: Tensor, soft_NRD: Tensor, instruction_ids_I: Tensor) -> Tensor:
        """Embed texts under one soft prompt, or one per text: `embed` for a single one."""
        return self.embed(ids_BT, mask_BT, [soft_NRD], [instruction_ids_I])[0]

    # -- texts in a row, without padding ------------------------------------------------------------------------

    def _can_pack(self, tokens: int) -> bool:
        """Whether texts, with all that is read with them, may be packed: within every window of attention."""
        window = getattr(self.lm.config.get_text_config(decoder=True), "sliding_window", None)
        return self._packs and tokens <= (window or tokens)

    def _read_packed(self, ids_BT: Tensor, mask_BT: Tensor, soft_prompts: Sequence[Tensor]) -> Iterator[Tensor]:
        """Layout `suffix` without gradients: texts and all soft prompts in one pass; (B, E) float32 for each."""
        ids_BT, mask_BT, shared = self._without_head(*pad_side(ids_BT, mask_BT, "right"))
        K, prompts = self.num_soft_tokens, len(soft_prompts)
        reader, pooled, order = self._view("soft_tokens", packing.reading_soft_tokens), [], []
        for rows, length in self._chunks(mask_BT, beside=prompts * K):
            picked = [soft_NRD if len(soft_NRD) == 1 else soft_NRD[rows] for soft_NRD in soft_prompts]
            N = max(map(len, picked))
            soft_NIRD = torch.stack([soft_NRD.expand(N, -1, -1) for soft_NRD in picked], dim=1)
            soft_NMD, deep_XRD = soft_NIRD[:, :, :K].flatten(1, 2), soft_NIRD[:, :, K:].flatten(0, 1)
            packed = Packed(
                mask_BT[rows].sum(-1).tolist(),
                shared,
                num_soft_tokens=K,
                num_soft_prompts=prompts,
                device=ids_BT.device,
            )
            inputs_1LD = packed.row(self._embed(ids_BT[rows, :length]), soft_NMD.expand(len(rows), -1, -1))
            with self._one_at_a_time, _deepened(reader, deep_XRD, packed.text_tokens):
                hidden_1LD = self._run_packed(reader, packed, inputs_1LD)
            hidden_XKD = hidden_1LD.view(len(rows) * prompts, K, -1)
            embedding_XE = pool(hidden_XKD, mask_BT.new_ones(hidden_XKD.shape[:2]), self.readout)
            pooled.append(embedding_XE.view(len(rows), prompts, -1))
            order.append(rows)
        return iter(torch.cat(pooled)[torch.cat(order).argsort()].unbind(1))

    def _without_head(self, ids_BT: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor, States | None]:
        """Right-padded texts without the tokens that every text begins with, and the states of these."""
        P = len(self.head_ids)
        if not P or ids_BT.shape[1] <= P or not bool(mask_BT[:, P].all()):
            return ids_BT, mask_BT, None
        if not torch.equal(ids_BT[:, :P], ids_BT.new_tensor(self.head_ids).expand(len(ids_BT), -1)):
            return ids_BT, mask_BT, None
        return ids_BT[:, P:], mask_BT[:, P:], self._head_states(ids_BT[:1, :P])

    def _head_states(self, ids_1P: Tensor) -> States:
        key = (*self.head_ids, str(ids_1P.device), str(self.lm.dtype))
        if self._head is None or self._head[0] != key:
            with torch.inference_mode(False), torch.no_grad():
                states = self._continue(None, self._embed(ids_1P.clone()), torch.ones_like(ids_1P))[1]
            self._head = key, states
        return self._head[1]

    def _run_packed(self, reader: nn.Module, packed: Packed, inputs_1LD: Tensor) -> Tensor:
        output = reader(
            inputs_embeds=inputs_1LD.to(self._running_dtype()),
            attention_mask=inputs_1LD.new_zeros(1, 1, 1, 1),  # handed on as it is, and not read
            position_ids=packed.positions_1L,
            use_cache=False,
            packed=packed,
        )
        return output.last_hidden_state  # type: ignore[no-any-return]

    # -- one segment after another ------------------------------------------------------------------------------

    def _read_after_soft_prompt(
        self, ids_BT: Tensor, mask_BT: Tensor, soft_NKD: Tensor, instruction_ids_I: Tensor
    ) -> Tensor:
        """Layout `prefix`: embeddings (B, E) float32 of texts behind instruction and soft prompt."""
        head = self._read_head(instruction_ids_I, soft_NKD)
        # Text follows the states without a gap, so padding goes to the right: sliding windows count places.
        ids_BT, mask_BT = pad_side(ids_BT, mask_BT, "right")
        packs = len(soft_NKD) == 1 and self._can_pack(int(mask_BT.sum(-1).max()) + head.mask_BL.shape[1])
        pooled, order = [], []
        for rows, length in self._chunks(mask_BT):
            inputs_bTD, mask_bT = self._embed(ids_BT[rows, :length]), mask_BT[rows, :length]
            if packs:
                packed = Packed(mask_bT.sum(-1).tolist(), head, device=ids_BT.device)
                with self._one_at_a_time:
                    hidden_1ND = self._run_packed(self._reader(), packed, packed.row(inputs_bTD))
                hidden_bTD = packed.padded(hidden_1ND)
            else:
                states = head.expanded(len(rows)) if len(soft_NKD) == 1 else head.picked(rows)
                hidden_bTD, _ = self._continue(states, inputs_bTD, mask_bT)
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
        if self._can_pack(mask_BT.shape[1] + self.num_soft_tokens):
            yield from self._read_chunks_packed(*pad_side(ids_BT, mask_BT, "right"))
            return
        for rows, length in self._chunks(mask_BT):
            inputs_bTD, mask_bT = self._embed(ids_BT[rows, -length:]), mask_BT[rows, -length:]
            states = self._continue(None, inputs_bTD, mask_bT)[1]
            yield rows, states.to(self.lm.dtype)

    def _read_chunks_packed(self, ids_BT: Tensor, mask_BT: Tensor) -> Iterator[tuple[Tensor, States]]:
        ids_BT, mask_BT, shared = self._without_head(ids_BT, mask_BT)
        last = self.lm.config.get_text_config(decoder=True).num_hidden_layers - 1
        for rows, length in self._chunks(mask_BT):
            packed = Packed(mask_BT[rows].sum(-1).tolist(), shared, device=ids_BT.device)
            packed.states = []
            with self._one_at_a_time, packed.stopping_at(last):
                self._run_packed(self._reader(), packed, packed.row(self._embed(ids_BT[rows, :length])))
            layers, mask_bS = packed.aligned_right()
            yield rows, stacked(layers, mask_bS, DynamicCache(config=self.lm.config)).to(self.lm.dtype)

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
        with self._one_at_a_time, _deepened(self._reader(), soft_NRD[:, K:]):
            hidden_BKD = self._finish(states, soft_BKD, mask_BK)
        return pool(hidden_BKD, mask_BK, self.readout)

    def _read_head(self, instruction_ids_I: Tensor, soft_NKD: Tensor) -> States:
        """Layout `prefix`, first segment: instruction and soft prompt, once for all texts that share them."""
        instruction_NID = self._embed(instruction_ids_I[None]).expand(len(soft_NKD), -1, -1)
        head_NLD = torch.cat([instruction_NID, soft_NKD], dim=1)
        _, states = self._continue(None, head_NLD, instruction_ids_I.new_ones(head_NLD.shape[:2]))
        return states

    def _reader(self) -> nn.Module:
        """What runs a segment: the LLM, or a copy of it made on first use, which takes and gives float32."""
        return self._view("widened", widened.widened) if widened.helps(self.lm) else self.lm

    def _view(self, name: str, make: Callable[[nn.Module], nn.Module]) -> nn.Module:
        """A copy of the reader that shares its weights, made on first use."""
        weight = next(self.lm.parameters())
        key = (name, str(weight.device), str(weight.dtype))  # buffers do not move with the LLM's
        with self._one_at_a_time:
            if key not in self._copies:
                self._copies[key] = make(self.lm if name == "widened" else self._reader())
            return self._copies[key]

    def _running_dtype(self) -> torch.dtype:
        return torch.float32 if widened.helps(self.lm) else self._embedding_dtype()

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
        with self._one_at_a_time:
            output = reader(
                inputs_embeds=inputs_BLD.to(self._running_dtype()),
                attention_mask=mask_all,
                position_ids=positions_BL,
                **{CACHE_ARGUMENT: cache},
                use_cache=True,
                **more,
            )
        return output.last_hidden_state  # type: ignore[no-any-return]

    def _chunks(self, mask_BT: Tensor, beside: int = 0) -> list[tuple[Tensor, int]]:
        """Rows sorted by length and cut into chunks of bounded size: (row numbers, longest length) each.

        Padding then costs next to nothing and memory is bounded by tokens, whatever the batch.
        """
        limit = _CHUNK_TOKENS_CPU if mask_BT.device.type == "cpu" else _CHUNK_TOKENS
        lengths_B, order_B = mask_BT.sum(-1).sort(stable=True)
        chunks, start = [], 0
        lengths = lengths_B.tolist()
        for n in range(1, len(lengths) + 1):
            if n == len(lengths) or (lengths[n] + beside) * (n + 1 - start) > limit:
                chunks.append((order_B[start:n], lengths[n - 1]))
                start = n
        return chunks

    def _embedding_dtype(self) -> torch.dtype:
        return self.lm.get_input_embeddings().weight.dtype  # type: ignore[no-any-return]

    def _embed(self, ids_BT: Tensor) -> Tensor:
        return self.lm.get_input_embeddings()(ids_BT)  # type: ignore[no-any-return]


@contextmanager
def _deepened(reader: nn.Module, deep_NMD: Tensor, text_tokens: int | None = None) -> Iterator[None]:
    """Add the rows of deep soft prompts (N, J K, D) to the input of each of the J layers, while inside.

    Args:
        reader: the LLM.
        deep_NMD: one for all texts, or one per text; in a packed row those behind every text, or behind each.
        text_tokens: of a packed row; unset: the segment holds soft tokens alone.
    """
    hooks = []
    if deep_NMD.shape[1]:
        layers: Any = reader.layers
        for layer, deep_NKD in zip(layers, deep_NMD.chunk(len(layers), dim=1), strict=True):
            add = _add_to_input if text_tokens is None else partial(_add_to_soft_tokens, text_tokens)
            hooks.append(layer.register_forward_pre_hook(partial(add, deep_NKD)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _add_to_input(offset_NKD: Tensor, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    hidden_BKD, *others = inputs
    return (hidden_BKD + offset_NKD.to(hidden_BKD.dtype), *others)


def _add_to_soft_tokens(text_tokens: int, offset_IKD: Tensor, module: nn.Module, inputs: tuple[Any, ...]) -> None:
    # In place: no gradient passes here, and nothing else holds a layer's input.
    soft_LD = inputs[0][0, text_tokens:]
    offset_MD = offset_IKD.flatten(0, 1).to(soft_LD.dtype)
    soft_LD.view(-1, *offset_MD.shape).add_(offset_MD)


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
