"""The same prompter before another backbone."""

from __future__ import annotations

from dataclasses import replace

import torch
from sentence_transformers import SentenceTransformer

from promptembedder.errors import PromptEmbedderError
from promptembedder.llms.device import resolve_dtype
from promptembedder.llms.identity import fingerprint as fingerprint_of
from promptembedder.llms.locate import LocatedModel
from promptembedder.llms.open import load_causal_lm, load_config, load_tokenizer
from promptembedder.model.build import assemble
from promptembedder.model.module import SoftPromptTransformer, soft_prompt_module
from promptembedder.model.parts import pair
from promptembedder.model.settings import ModelConfig, Precision
from promptembedder.transfer.checks import (
    check_memory,
)


def on_backbone(
    model: SentenceTransformer,
    located: LocatedModel,
    *,
    dtype: Precision | None = None,
) -> SentenceTransformer:
    """The same prompter before another backbone, with an alignment of zeros; the two models share the prompter.

    A deep soft prompt starts at zero again, a linear head at the identity, and nothing is subtracted from embeddings:
    these belong to a backbone.

    Raises:
        PromptEmbedderError: the backbone is the same, or does not fit into memory.
    """
    old = soft_prompt_module(model)
    settings: ModelConfig = replace(
        old.settings,
        backbone=located.name,
        backbone_revision=located.revision,
        dtype=dtype or old.settings.dtype,
    )
    device = old.alignment.weight.device
    precision = resolve_dtype(settings.dtype, device)
    again = f"{located.name} is the backbone that the model has already; name another one"
    if (located.name, located.revision) == (old.base_models.backbone, old.base_models.backbone_revision):
        raise PromptEmbedderError(again)
    check_memory(located.name, load_config(located), precision, device)
    lm = load_causal_lm(located, precision).to(device)
    fingerprint = fingerprint_of(lm)
    if fingerprint == old.base_models.backbone_fingerprint:
        raise PromptEmbedderError(again)
    P = old.alignment.weight.shape[0]
    width = lm.get_input_embeddings().weight.shape[1]
    matrix, backbone = pair(settings, lm, torch.zeros(P, width), located.name)
    identity = replace(
        old.base_models,
        backbone=located.name,
        backbone_revision=located.revision,
        backbone_fingerprint=fingerprint,
    )
    module = SoftPromptTransformer(
        old.prompter,
        matrix.to(device),
        backbone,
        load_tokenizer(located),
        settings,
        identity,
    )
    moved = assemble(module, str(device))
    moved.prompts, moved.default_prompt_name = dict(model.prompts), model.default_prompt_name
    if model.truncate_dim is not None and model.truncate_dim < width:
        moved.truncate_dim = model.truncate_dim
    return moved
