"""Texts read one behind the other in a single row, without padding, and soft tokens after each text.

Linear layers and norms see every token once and no padding; only attention puts the texts side by side again. Texts may
share what they begin with: those states are read once and kept. As padding would stand on the right of every text, the
attention among text tokens is plainly causal and needs no mask.

    row:        text 1, text 2, ..., text B, then M soft tokens of text 1, ..., M soft tokens of text B
    attention:  a text token sees the shared states and its text up to itself;
                a soft token sees the shared states, its whole text and its soft prompt up to itself

Shapes: B texts, P tokens of the shared states, N text tokens of all texts, T tokens of the longest text, S = P + T,
I soft prompts of K tokens for every text, M = I K, H key/value heads, A query heads, d head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from promptembedder.llms import widened
from promptembedder.llms.copies import sharing_copy
from promptembedder.llms.states import States


def is_possible(lm: nn.Module) -> bool:
    """Whether an LLM's layers treat every token alone, but for attention: linear layers, embeddings and norms."""
    return widened.is_tokenwise(lm)


class _StatesRead(Exception):  # noqa: N818, it is no error
    """The last layer's keys and values are known; what it would make of text tokens is not needed."""


class Packed:
    """How texts lie in a row; attention over them.

    Args:
        lengths: tokens of each text, without what is shared; at least one each.
        shared: states of the one segment that all texts go on from; unset: none.
        num_soft_tokens: K.
        num_soft_prompts: I; 0: texts alone are read.
        device: of the row.
    """

    def __init__(
        self,
        lengths: list[int],
        shared: States | None,
        *,
        num_soft_tokens: int = 0,
        num_soft_prompts: int = 0,
        device: torch.device,
    ) -> None:
        self.batch, self.text_tokens, self.longest = len(lengths), sum(lengths), max(lengths)
        self.soft_tokens = num_soft_tokens * num_soft_prompts
        self.shared = shared
        self.shared_tokens = 0 if shared is None else shared.mask_BL.shape[1]
        self.equal = min(lengths) == self.longest
        lengths_B = torch.tensor(lengths, device=device)
        place_T = torch.arange(self.longest, device=device)
        self.real_BT = place_T < lengths_B[:, None]
        positions = [place_T.expand(self.batch, -1)[self.real_BT]]
        if not self.equal:
            starts_B = lengths_B.cumsum(0) - lengths_B
            self._rows_BT = (starts_B[:, None] + place_T).clamp(max=self.text_tokens - 1)
            self._back_N = self.real_BT.flatten().nonzero()[:, 0]
        if self.soft_tokens:
            place_M = torch.arange(num_soft_tokens, device=device).repeat(num_soft_prompts)
            prompt_M = torch.arange(num_soft_prompts, device=device).repeat_interleave(num_soft_tokens)
            positions.append((lengths_B[:, None] + place_M).flatten())
            sees_MM = (prompt_M[:, None] == prompt_M) & (place_M[:, None] >= place_M)
            sees_B1MS = torch.cat([self.real_BT.new_ones(self.batch, self.shared_tokens), self.real_BT], dim=1)
            self.sees_text_B1MS = sees_B1MS[:, None, None].expand(-1, -1, self.soft_tokens, -1)
            self.sees_soft_11MM = sees_MM[None, None]
        self.positions_1L = (torch.cat(positions) + self.shared_tokens)[None]
        # Keys and values of the text tokens, layer by layer, where they are wanted.
        self.states: list[tuple[Tensor, Tensor]] | None = None
        self._last: tuple[Tensor, Tensor] | None = None
        self._stop_at: int | None = None

    def row(self, padded_BTX: Tensor, soft_BMX: Tensor | None = None) -> Tensor:
        """Put right-padded texts, and soft tokens behind them, into one row (1, L, X)."""
        texts_NX = padded_BTX[:, : self.longest][self.real_BT]
        return (texts_NX if soft_BMX is None else torch.cat([texts_NX, soft_BMX.flatten(0, 1)]))[None]

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """Attention of one layer.

        Args:
            module: the attention layer; its `layer_idx` finds the shared states.
            query: (1, A, L, d).
            key: (1, H, L, d).
            value: likewise.
            scaling: of the scores.

        Returns:
            (1, L, A, d).
        """
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        query_LAd, key_LHd, value_LHd = (states[0].transpose(0, 1) for states in (query, key, value))
        N, B = self.text_tokens, self.batch
        if self._last is not None:  # soft tokens alone, their texts' states are known
            N, (text_keys_NHd, text_values_NHd) = 0, self._last
        else:
            text_keys_NHd, text_values_NHd = key_LHd[:N], value_LHd[:N]
        if self.states is not None:
            self.states.append((text_keys_NHd, text_values_NHd))
        if self._stop_at == layer:
            self._last = text_keys_NHd, text_values_NHd
            raise _StatesRead
        keys_BHSd = self._side_by_side(text_keys_NHd, self._shared(layer, "keys"))
        values_BHSd = self._side_by_side(text_values_NHd, self._shared(layer, "values"))
        outputs = []
        if N:
            shared_PAd = query.new_zeros(self.shared_tokens, *query_LAd.shape[1:]) if self.shared_tokens else None
            query_BASd = self._side_by_side(query_LAd[:N], shared_PAd)
            output_BASd = scaled_dot_product_attention(
                query_BASd, keys_BHSd, values_BHSd, is_causal=True, scale=scaling, enable_gqa=True
            )
            outputs.append(self._in_a_row(output_BASd))
        if self.soft_tokens:
            query_BAMd, key_BHMd, value_BHMd = (
                rows[N:].reshape(B, -1, *rows.shape[1:]).transpose(1, 2) for rows in (query_LAd, key_LHd, value_LHd)
            )
            output_BAMd = attend_apart(
                query_BAMd,
                (keys_BHSd, values_BHSd, self.sees_text_B1MS),
                (key_BHMd, value_BHMd, self.sees_soft_11MM),
                scaling,
            )
            outputs.append(output_BAMd.transpose(1, 2).flatten(0, 1))
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs))[None]

    def _shared(self, layer: int, kind: str) -> Tensor | None:
        if self.shared is None:
            return None
        return getattr(self.shared.cache.layers[layer], kind)[0].transpose(0, 1)  # type: ignore[no-any-return]

    def _side_by_side(self, texts_NXd: Tensor, shared_PXd: Tensor | None) -> Tensor:
        """(B, X, S, d), padded on the right with whatever."""
        shape = (self.batch, self.longest, *texts_NXd.shape[1:])
        texts_BTXd = texts_NXd.reshape(shape) if self.equal else texts_NXd[self._rows_BT]
        if shared_PXd is not None:
            texts_BTXd = torch.cat([shared_PXd.to(texts_NXd.dtype).expand(self.batch, -1, -1, -1), texts_BTXd], dim=1)
        return texts_BTXd.transpose(1, 2)

    def _in_a_row(self, output_BASd: Tensor) -> Tensor:
        """The reverse: (N, A, d)."""
        output_LAd = output_BASd.transpose(1, 2)[:, self.shared_tokens :].flatten(0, 1)
        return output_LAd if self.equal else output_LAd[self._back_N]

    def padded(self, row_1NX: Tensor) -> Tensor:
        """The reverse of `row` for texts alone: (B, T, X), padded on the right with whatever."""
        return self._side_by_side(row_1NX[0][:, None], None)[:, 0]

    def aligned_right(self) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        """The collected keys and values (B, H, S, d) of each layer, padded on the left, and their mask (B, S)."""
        S = self.shared_tokens + self.longest
        place_S = torch.arange(S, device=self.real_BT.device)
        lengths_B1 = self.real_BT.sum(-1, keepdim=True)
        mask_BS = place_S >= self.longest - lengths_B1
        # Place S - 1 is each text's last token; before its first stand the shared ones.
        before_B1 = lengths_B1.cumsum(0) - lengths_B1
        of_text_BS = place_S - S + lengths_B1
        rows_BS = torch.where(
            of_text_BS >= 0, self.shared_tokens + before_B1 + of_text_BS, self.shared_tokens + of_text_BS
        )
        rows_BS = rows_BS.clamp(min=0)
        layers = []
        for n, kinds in enumerate(self.states or []):
            whole = (
                texts if shared is None else torch.cat([shared.to(texts.dtype), texts])
                for texts, shared in zip(kinds, (self._shared(n, "keys"), self._shared(n, "values")), strict=True)
            )
            keys, values = (states_LHd[rows_BS].transpose(1, 2) for states_LHd in whole)
            layers.append((keys, values))
        return layers, mask_BS.to(torch.int64)

    @contextmanager
    def stopping_at(self, layer: int) -> Iterator[None]:
        """While inside, a pass ends as soon as this layer's keys and values of the texts are known."""
        self._stop_at = layer
        try:
            yield
        except _StatesRead:
            pass
        finally:
            self._stop_at = None


class SoftTokensOnly(nn.Module):
    """An LLM's last layer, whose output for text tokens nobody reads.

    Args:
        layer: gives keys and values of all tokens, and everything else for soft tokens alone.
    """

    def __init__(self, layer: nn.Module, place: int) -> None:
        super().__init__()
        self.layer, self.place = layer, place

    def forward(self, hidden_1LD: Tensor, *args: Any, packed: Packed, **others: Any) -> Any:
        """The layer's output (1, B M, D) at the soft tokens."""
        N, L = packed.text_tokens, hidden_1LD.shape[1]

        def part(value: Any, start: int, stop: int) -> Any:
            if isinstance(value, tuple):
                return tuple(part(one, start, stop) for one in value)
            whole = isinstance(value, Tensor) and value.dim() > 1 and value.shape[1] == L
            return value[:, start:stop] if whole else value

        with packed.stopping_at(self.place):
            texts = {name: part(value, 0, N) for name, value in others.items()}
            self.layer(hidden_1LD[:, :N], *(part(value, 0, N) for value in args), packed=packed, **texts)
        soft = {name: part(value, N, L) for name, value in others.items()}
        return self.layer(hidden_1LD[:, N:], *(part(value, N, L) for value in args), packed=packed, **soft)


def reading_soft_tokens(lm: nn.Module) -> nn.Module:
    """A view of an LLM whose last layer is a `SoftTokensOnly`; the weights are the LLM's own."""
    view: Any = sharing_copy(lm)
    last = len(view.layers) - 1
    view.layers[last] = SoftTokensOnly(view.layers[last], last)
    return view  # type: ignore[no-any-return]


def attend_apart(
    query_BAMd: Tensor,
    earlier: tuple[Tensor, Tensor, Tensor],
    new: tuple[Tensor, Tensor, Tensor],
    scaling: float | None,
) -> Tensor:
    """Attention of a few new tokens over many earlier ones and themselves, without joining the two.

    Args:
        query_BAMd: of the new tokens.
        earlier: keys and values (B, H, S, d), and (B or 1, 1, M, S): true where a new token may look.
        new: likewise for the M new tokens.
        scaling: of the scores; unset: one over the root of d.

    Returns:
        (B, A, M, d).
    """
    (earlier_keys, earlier_values, sees_earlier), (key, value, sees_new) = earlier, new
    B, A, M, d = query_BAMd.shape
    H, S = earlier_keys.shape[1:3]
    # Query heads of one key/value head become rows of one product; nothing is repeated.
    query_BHQd = query_BAMd.reshape(B, H, A // H * M, d) * (scaling if scaling is not None else d**-0.5)
    scores_BHQL = torch.cat([query_BHQd @ earlier_keys.mT, query_BHQd @ key.mT], dim=-1)
    scores_BHQL = scores_BHQL.to(torch.promote_types(scores_BHQL.dtype, torch.float32))
    sees_B1ML = torch.cat([sees_earlier.expand(B, -1, -1, -1), sees_new.expand(B, -1, -1, -1)], dim=-1)
    hidden_B1QL = ~sees_B1ML.repeat(1, 1, A // H, 1)
    scores_BHQL = scores_BHQL.masked_fill(hidden_B1QL, torch.finfo(scores_BHQL.dtype).min)
    weights_BHQL = scores_BHQL.softmax(-1).to(query_BAMd.dtype)
    output_BHQd = weights_BHQL[..., :S] @ earlier_values + weights_BHQL[..., S:] @ value
    return output_BHQd.reshape(B, A, M, d)
