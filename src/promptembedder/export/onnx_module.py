"""The backbone with everything around it as one torch module, from token ids of texts to embeddings, and its tracing.

No sorting and no cutting: masks and positions are computed from the attention mask, so padding may stand on either
side, and a gap between a text and what follows it does not matter.

Shapes: B texts, T text tokens, I instruction tokens, K soft tokens, J layers, R rows of a soft prompt (K, or K + J K
where it is deep), S tokens of the whole sequence, H key/value heads, G query heads for each, d head width, D backbone
width, E embedding width.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from promptembedder.errors import PromptEmbedderError
from promptembedder.export.compiled import Compiled
from promptembedder.llms import attention
from promptembedder.llms.copies import sharing_copy
from promptembedder.llms.quiet import quiet_transformers
from promptembedder.model.module import soft_prompt_module

ATTENTION = "promptembedder_onnx"
OUTPUT = "sentence_embedding"
# Of the operators; of the year 2022, which engines know.
OPSET = 18


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    *,
    masks: Mapping[int | None, Tensor],
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention as `transformers` calls it, by plain matrix products.

    Args:
        module: the attention layer.
        query: (B, H G, S, d).
        key: (B, H, S, d).
        value: likewise.
        attention_mask: not read, `masks` are.
        scaling: of the scores; unset: one over the root of d.
        sliding_window: of the layer; unset: it sees everything before.
        masks: what to add to the scores (B, 1, S, S), by window.
        **others: further arguments of `transformers`.

    Returns:
        (B, S, H G, d), and None in the place of weights.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    # Heads that share keys are a dimension of their own: nothing is repeated.
    query_BHGSd = torch.unflatten(query * scaling, 1, (int(key.shape[1]), -1))
    scores_BHGSS = query_BHGSd @ key[:, :, None].transpose(-1, -2) + masks[sliding_window][:, :, None]
    output_BHGSd = scores_BHGSS.softmax(-1) @ value[:, :, None]
    return output_BHGSd.flatten(1, 2).transpose(1, 2), None


AttentionInterface.register(ATTENTION, attend)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


class WholeModel(nn.Module):
    """Texts and soft prompts to embeddings of length 1.

    Args:
        compiled: template, layout, read-out, centre and head.
        lm: the backbone with the attention of this module.
    """

    head_ids: Tensor
    tail_ids: Tensor

    def __init__(self, compiled: Compiled, lm: Any) -> None:
        super().__init__()
        self.lm: Any = lm
        self.layout, self.readout, self.K = compiled.layout, compiled.readout, compiled.num_soft_tokens
        self.is_deep = compiled.is_deep
        self.windows = _windows(lm)
        self.template = len(compiled.head_ids), len(compiled.tail_ids)
        self.head_ids: Tensor
        self.tail_ids: Tensor
        self.register_buffer("head_ids", torch.tensor(compiled.head_ids, dtype=torch.long))
        self.register_buffer("tail_ids", torch.tensor(compiled.tail_ids, dtype=torch.long))
        self.centre_D, self.head_ED = compiled.centre_D, compiled.head_ED
        self._deep_JBKD: tuple[Tensor, ...] = ()
        if self.is_deep:
            for number, layer in enumerate(lm.layers):
                layer.register_forward_pre_hook(partial(self._deepen, number))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        soft_BRD: Tensor,
        before_BI: Tensor | None = None,
        before_mask_BI: Tensor | None = None,
    ) -> Tensor:
        """Embed texts.

        Args:
            input_ids: (B, T) of the texts alone, padded on either side.
            attention_mask: (B, T), 1 for tokens, 0 for padding.
            soft_BRD: the soft prompt of each text.
            before_BI: what layout `prefix` reads before the soft tokens.
            before_mask_BI: its mask.

        Returns:
            (B, E).
        """
        batch = input_ids.shape[0]
        words: Any = self.lm.get_input_embeddings()
        ones_BH, ones_BL = (attention_mask.new_ones(batch, count) for count in self.template)
        text_mask_BT = torch.cat([ones_BH, attention_mask, ones_BL], dim=1)
        head_BH, tail_BL = (ids.expand(batch, -1) for ids in (self.head_ids, self.tail_ids))
        # Some pad tokens have no embedding.
        text_BTD = words(torch.cat([head_BH, input_ids * attention_mask, tail_BL], dim=1))
        soft_BKD = soft_BRD[:, : self.K]
        soft_mask_BK = attention_mask.new_ones(batch, self.K)
        if self.layout == "suffix":
            inputs, masks = [text_BTD, soft_BKD], [text_mask_BT, soft_mask_BK]
        else:
            assert before_BI is not None
            assert before_mask_BI is not None
            inputs = [words(before_BI), soft_BKD, text_BTD]
            masks = [before_mask_BI, soft_mask_BK, text_mask_BT]
        self._deep_JBKD = torch.split(soft_BRD[:, self.K :], self.K, dim=1) if self.is_deep else ()
        hidden_BSD = self._read(torch.cat(inputs, dim=1), torch.cat(masks, dim=1))
        pooled_BD = self._pool(hidden_BSD, text_mask_BT)
        if self.centre_D is not None:
            pooled_BD = pooled_BD - self.centre_D
        embedding_BE = pooled_BD if self.head_ED is None else pooled_BD @ self.head_ED.T
        return nn.functional.normalize(embedding_BE, dim=-1)

    def _read(self, inputs_BSD: Tensor, mask_BS: Tensor) -> Tensor:
        """Last hidden states (B, S, D)."""
        position_BS = (mask_BS.cumsum(-1) - 1).clamp(min=0)
        place_S = torch.arange(mask_BS.shape[1], device=mask_BS.device)
        before_SS = place_S[:, None] >= place_S
        distance_BSS = position_BS[:, :, None] - position_BS[:, None]
        seen_BSS = before_SS & mask_BS[:, None].bool()
        masks: dict[int | None, Tensor] = {}
        for window in self.windows:
            within_BSS = seen_BSS if window is None else seen_BSS & (distance_BSS < window)
            away = torch.where(within_BSS, 0.0, torch.finfo(inputs_BSD.dtype).min)
            masks[window] = away[:, None].to(inputs_BSD.dtype)
        output = self.lm(
            inputs_embeds=inputs_BSD,
            attention_mask=inputs_BSD.new_zeros(1, 1, 1, 1),  # handed on as it is, and not read
            position_ids=position_BS,
            use_cache=False,
            masks=masks,
        )
        return output.last_hidden_state  # type: ignore[no-any-return]

    def _deepen(self, number: int, layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Add a layer's rows of the soft prompts to its input at the soft tokens, which are the last ones."""
        hidden_BSD, *others = inputs
        soft_BKD = hidden_BSD[:, -self.K :] + self._deep_JBKD[number]
        return (torch.cat([hidden_BSD[:, : -self.K], soft_BKD], dim=1), *others)

    def _pool(self, hidden_BSD: Tensor, text_mask_BT: Tensor) -> Tensor:
        if self.layout == "suffix":
            return hidden_BSD[:, -1] if self.readout == "last" else hidden_BSD[:, -self.K :].mean(1)
        text_BTD = hidden_BSD[:, -text_mask_BT.shape[1] :]
        weights_BT = text_mask_BT.to(hidden_BSD.dtype)
        if self.readout == "last":
            if self.template[1]:
                return text_BTD[:, -1]
            # One for the last token, zero for all others.
            count_BT = text_mask_BT.cumsum(-1)
            weights_BT = weights_BT * (count_BT == count_BT[:, -1:]).to(hidden_BSD.dtype)
        return (text_BTD * weights_BT[..., None]).sum(1) / weights_BT.sum(-1, keepdim=True).clamp(min=1)


def _windows(lm: Any) -> set[int | None]:
    """Every width of attention that a layer of the LLM may have."""
    window = getattr(lm.config.get_text_config(decoder=True), "sliding_window", None)
    return {None, window}


def whole_model(compiled: Compiled, model: SentenceTransformer) -> WholeModel:
    """A model as one module in float32 on the CPU; it shares the weights where these are so already.

    Raises:
        PromptEmbedderError: the backbone has an attention of its own.
    """
    lm: Any = soft_prompt_module(model).backbone.lm
    if lm.config._attn_implementation != attention.NAME:
        raise PromptEmbedderError(
            f"the backbone's attention, {lm.config._attn_implementation!r}, cannot be written as a graph; export to "
            "soft-prompt"
        )
    shared = all(p.dtype == torch.float32 and p.device.type == "cpu" for p in lm.parameters())
    lm = sharing_copy(lm) if shared else copy.deepcopy(lm).to("cpu", torch.float32)
    with quiet_transformers():
        lm.set_attn_implementation(ATTENTION)
    return WholeModel(compiled, lm.eval()).eval()


@torch.no_grad()
def trace(compiled: Compiled, model: SentenceTransformer, file: Path) -> None:
    """Write the graph of a model with its weights; inputs are those of `WholeModel.forward`.

    By torch's older exporter. The newer one computes with symbolic sizes, which takes it 25 times as long.

    Raises:
        PromptEmbedderError: as in `whole_model`; torch cannot trace the backbone.
    """
    rows = next(iter(compiled.prompts.values())).rows
    inputs = {
        "input_ids": torch.ones(2, 5, dtype=torch.long),
        "attention_mask": torch.ones(2, 5, dtype=torch.long),
        "soft_BRD": rows.expand(2, -1, -1),
    }
    sizes = {"input_ids": {0: "batch", 1: "length"}, "attention_mask": {0: "batch", 1: "length"}}
    if compiled.layout == "prefix":
        inputs |= {name: torch.ones(2, 3, dtype=torch.long) for name in ("before_BI", "before_mask_BI")}
        sizes |= {name: {0: "batch", 1: "opening"} for name in ("before_BI", "before_mask_BI")}
    sizes |= {"soft_BRD": {0: "batch"}, OUTPUT: {0: "batch"}}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                whole_model(compiled, model),
                tuple(inputs.values()),
                str(file),
                input_names=list(inputs),
                output_names=[OUTPUT],
                dynamic_axes=sizes,
                opset_version=OPSET,
                dynamo=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        first = str(error).strip().splitlines()[0]
        raise PromptEmbedderError(f"backbone {compiled.backbone} cannot be written as a graph: {first}") from error
