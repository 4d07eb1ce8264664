"""The parts of a saved model, opened again: the two LLMs found, checked, and put together.

Shapes: P prompter width, D backbone width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from promptembedder.errors import PromptEmbedderError
from promptembedder.llms.device import resolve_dtype
from promptembedder.llms.hub import AS_CONFIGURED, HubAccess
from promptembedder.llms.identity import fingerprint
from promptembedder.llms.locate import CARRIED_MODELS, LocatedModel, locate
from promptembedder.llms.open import load_causal_lm, load_tokenizer
from promptembedder.model.folder import BaseModels, SavedModel
from promptembedder.model.handed import dtype_name
from promptembedder.model.known import KnownInstructions, SoftPromptTable
from promptembedder.model.parts import (
    Parts,
    backbone_of,
    bare_prompter,
    make_prompter,
    merge_lora,
    open_backbone,
    open_parts,
)
from promptembedder.model.prompter import Prompter, load_trained_state
from promptembedder.model.settings import ModelConfig
from promptembedder.paths import check_readable, is_there


def reopen(
    saved: SavedModel,
    *,
    device: str | None = None,
    dtype: str | None = None,
    prompter: str | None = None,
    backbone: str | None = None,
    access: HubAccess = AS_CONFIGURED,
) -> tuple[Parts, ModelConfig]:
    """Open the LLMs of a saved model and make its parts, with the saved W and the settings that they run with.

    Args:
        saved: the model.
        device: where it is to run.
        dtype: `bfloat16` or `float32` in place of the saved one.
        prompter: where the Prompting LLM is now.
        backbone: where the Embedding LLM is now.
        access: how the hub is asked.

    Raises:
        PromptEmbedderError: as in `load`.
    """
    config, expected = saved.config, saved.base_models
    if (precision := dtype_name(dtype)) is not None:
        config = replace(config, dtype=precision)  # type: ignore[arg-type]
    if saved.instructions is not None:
        return _reopen_known(saved, config, saved.instructions, device, prompter, backbone, access), config
    with weights_of(saved) as stored:
        if expected.prompter == expected.backbone:
            prompter, backbone = prompter or backbone, backbone or prompter
        prompter_at = _at(expected.prompter, expected.prompter_revision, prompter, "prompter", access)
        backbone_at = _at(expected.backbone, expected.backbone_revision, backbone, "backbone", access)
        parts = open_parts(config, prompter_at, backbone_at, device, seed=0, weight_PD=stored["weight"].float())
    _check_identity(saved, "prompter", parts.base_models.prompter_fingerprint)
    _check_identity(saved, "backbone", parts.base_models.backbone_fingerprint)
    return parts, config


def reopen_prompter(saved: SavedModel) -> Prompter:
    """Open the prompter of a saved model alone, on the CPU, with its trained weights.

    Raises:
        PromptEmbedderError: as in `load`.
    """
    expected = saved.base_models
    with weights_of(saved):
        located = _at(expected.prompter, expected.prompter_revision, None, "prompter", AS_CONFIGURED)
        whole = saved.config.prompter_training == "full"
        lm = load_causal_lm(located, torch.float32 if whole else resolve_dtype(saved.config.dtype, "cpu"))
        _check_identity(saved, "prompter", fingerprint(lm))
        if not whole and merge_lora(lm, saved.prompter_weights, saved.config):
            prompter = bare_prompter(lm, load_tokenizer(located), saved.config)
        else:
            prompter = make_prompter(lm, load_tokenizer(located), saved.config)
            load_trained_state(prompter, saved.prompter_weights)
        prompter.take_draft(saved.draft)
    return prompter


def _reopen_known(
    saved: SavedModel,
    config: ModelConfig,
    instructions: dict[str, str],
    device: str | None,
    prompter: str | None,
    backbone: str | None,
    access: HubAccess,
) -> Parts:
    """The parts of an export that holds soft prompts: the Embedding LLM alone is opened."""
    if prompter is not None:
        raise PromptEmbedderError(f"{saved.folder} holds soft prompts and opens no Prompting LLM: leave prompter out")
    expected = saved.base_models
    with weights_of(saved) as stored:
        weight_NRD = stored["weight"]
        backbone_at = _at(expected.backbone, expected.backbone_revision, backbone, "backbone", access)
        lm, tokenizer = open_backbone(config, backbone_at, device)
    _check_identity(saved, "backbone", fingerprint(lm))
    layers = int(lm.config.get_text_config(decoder=True).num_hidden_layers)
    rows = config.num_soft_tokens * (1 if config.deep_rank is None else 1 + layers)
    expected_shape = (len(instructions), rows, saved.embedding_dimension)
    if tuple(weight_NRD.shape) != expected_shape:
        raise PromptEmbedderError(
            f"{saved.weights_file} holds soft prompts of shape {tuple(weight_NRD.shape)}, expected {expected_shape}"
        )
    if not weight_NRD.is_floating_point() or not bool(weight_NRD.isfinite().all()):
        raise PromptEmbedderError(f"{saved.weights_file} holds soft prompts that are no finite floating-point numbers")
    reader = backbone_of(config, lm, backbone_at.name)
    bases = replace(expected, backbone=backbone_at.name, backbone_revision=backbone_at.revision)
    return Parts(KnownInstructions(instructions), SoftPromptTable(weight_NRD), reader, tokenizer, bases)


def _check_identity(saved: SavedModel, role: str, have: str) -> None:
    expected = saved.base_models
    want = getattr(expected, f"{role}_fingerprint")
    if want != have:
        raise PromptEmbedderError(
            f"{saved.folder}: {role} {getattr(expected, role)} has other weights (fingerprint {have[:12]}) than "
            f"the model was trained with ({want[:12]}){_remedy(expected, role)}"
        )


@contextmanager
def weights_of(saved: SavedModel) -> Iterator[dict[str, Tensor]]:
    """The tensors of alignment and centre by name; inside, a damaged weights file is one line.

    Raises:
        PromptEmbedderError: a weights file is missing or damaged.
    """
    file = saved.weights_file
    for needed in (file, *([] if saved.instructions else [saved.prompter_weights])):
        if not is_there(needed):
            raise PromptEmbedderError(f"model folder {saved.folder} has no {needed.relative_to(saved.folder)}")
        check_readable(needed)
    try:
        stored = load_file(file)
        if "weight" not in stored:
            raise PromptEmbedderError(f"{file} holds {sorted(stored)}, expected 'weight' too")
        yield stored
    except SafetensorError as error:
        raise PromptEmbedderError(f"model folder {saved.folder} holds a damaged safetensors file: {error}") from error


def _at(name: str, revision: str | None, instead: str | None, role: str, access: HubAccess) -> LocatedModel:
    """An LLM where it was, or where it is now."""
    if instead is not None:
        return locate(instead, access=access)
    if Path(name).is_absolute() and not is_there(Path(name)):
        raise PromptEmbedderError(
            f"{role} {name} is no longer there; promptembedder.load(..., {role}=...) says where it is"
        )
    return locate(name, revision, access)


def _remedy(expected: BaseModels, role: str) -> str:
    """How to get the weights that a short name stands for, where another copy of the LLM was found."""
    carried = CARRIED_MODELS.get(getattr(expected, role))
    if carried is None or getattr(expected, f"{role}_revision") is not None:
        return ""
    return f"; those come with: {carried.install}"
