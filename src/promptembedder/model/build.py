"""Put a new model together from two base LLMs and its settings."""

from __future__ import annotations

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize

from promptembedder.llms.locate import locate
from promptembedder.model.module import SoftPromptTransformer
from promptembedder.model.parts import open_parts
from promptembedder.model.settings import ModelConfig


def build(config: ModelConfig | None = None, *, device: str | None = None, seed: int = 13) -> SentenceTransformer:
    """Make an untrained model: a plain `SentenceTransformer` of `SoftPromptTransformer` and `Normalize`.

    Args:
        config: the model's settings; unset: the defaults.
        device: where it runs; unset: the accelerator, if there is one.
        seed: of LoRA's and a random alignment's start.

    Raises:
        PromptEmbedderError: a base LLM cannot be had or is not supported, a setting does not fit it.
    """
    config = config or ModelConfig()
    prompter_at = locate(config.prompter, config.prompter_revision)
    backbone_at = locate(config.backbone, config.backbone_revision)
    parts = open_parts(config, prompter_at, backbone_at, device, seed)
    return assemble(SoftPromptTransformer.of(parts, config), device)


def assemble(module: SoftPromptTransformer, device: str | None) -> SentenceTransformer:
    """A `SentenceTransformer` of a module and what the settings put after it."""
    modules: list[torch.nn.Module] = [module]
    if module.settings.linear_head:
        width = module.get_embedding_dimension()
        head = Dense(width, width, bias=False, activation_function=None, init_weight=torch.eye(width))
        modules.append(head)
    return SentenceTransformer(modules=[*modules, Normalize()], device=device, similarity_fn_name="cosine")
