"""The parts of a model, made of two base LLMs as settings want them.

Shapes: V vocabulary, P prompter width, D backbone width, S shared words.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from promptembedder.errors import PromptEmbedderError
from promptembedder.llms.copies import sharing_copy
from promptembedder.llms.device import check_device, resolve_dtype
from promptembedder.llms.identity import fingerprint
from promptembedder.llms.locate import LocatedModel
from promptembedder.llms.open import input_embeddings, load_causal_lm, load_tokenizer
from promptembedder.model.alignment import Alignment
from promptembedder.model.backbone import Backbone
from promptembedder.model.fits import least_squares, matched_norm, moments, random_start
from promptembedder.model.folder import BaseModels
from promptembedder.model.known import KnownInstructions, SoftPromptTable
from promptembedder.model.prompter import Prompter
from promptembedder.model.settings import ModelConfig
from promptembedder.model.vocabulary import shared_vocabulary

_LORA_TARGETS = "all-linear"
# What the product of its matrices is multiplied by; peft's `lora_alpha` is this times the rank.
_LORA_SCALE = 2


class Parts(NamedTuple):
    """What a `SoftPromptTransformer` is made of."""

    prompter: Prompter | KnownInstructions
    alignment: Alignment | SoftPromptTable
    backbone: Backbone
    tokenizer: PreTrainedTokenizerBase
    base_models: BaseModels


def open_parts(
    config: ModelConfig,
    prompter_at: LocatedModel,
    backbone_at: LocatedModel,
    device: str | None,
    seed: int,
    weight_PD: Tensor | None = None,
) -> Parts:
    """Open both LLMs and make the parts; errors as in `build`.

    Args:
        config: the model's settings.
        prompter_at: where the Prompting LLM is; in the backbone's folder, they share their weights.
        backbone_at: where the Embedding LLM is.
        device: where it is to run.
        seed: of LoRA's and a random alignment's start.
        weight_PD: the alignment; unset: as the settings want it.
    """
    backbone_lm, tokenizer = open_backbone(config, backbone_at, device)
    dtype = backbone_lm.dtype
    same = prompter_at.folder == backbone_at.folder
    if config.prompter_training == "full":
        # Trained weights are kept in float32: bfloat16 swallows small updates.
        prompter_lm = load_causal_lm(prompter_at, torch.float32)
    else:
        # LoRA may go into the one tree and leaves the other untouched.
        prompter_lm = sharing_copy(backbone_lm) if same else load_causal_lm(prompter_at, dtype)
    prompter_tokenizer = tokenizer if same else load_tokenizer(prompter_at)
    backbone_fingerprint = fingerprint(backbone_lm)
    identity = BaseModels(
        prompter=prompter_at.name,
        prompter_revision=prompter_at.revision,
        prompter_fingerprint=backbone_fingerprint if same else fingerprint(prompter_lm),
        backbone=backbone_at.name,
        backbone_revision=backbone_at.revision,
        backbone_fingerprint=backbone_fingerprint,
    )
    start = weight_PD
    if start is None:
        start = _alignment_start(config, prompter_lm, prompter_tokenizer, backbone_lm, tokenizer, same, seed)
    widths = tuple(lm.get_input_embeddings().weight.shape[1] for lm in (prompter_lm, backbone_lm))
    if tuple(start.shape) != widths:
        raise PromptEmbedderError(
            f"alignment is {tuple(start.shape)}, but prompter {prompter_at.name} and backbone {backbone_at.name} "
            f"need {widths}"
        )
    prompter = make_prompter(prompter_lm, prompter_tokenizer, config, seed)
    matrix, backbone = pair(config, backbone_lm, start, backbone_at.name)
    return Parts(prompter, matrix, backbone, tokenizer, identity)


def make_prompter(
    lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: ModelConfig, seed: int = 0
) -> Prompter:
    """The prompter of a model with these settings.

    Args:
        lm: the Prompting LLM; LoRA goes into it.
        tokenizer: of the LLM.
        config: the model's settings.
        seed: of LoRA's start.
    """
    return bare_prompter(_trainable(lm, config, seed), tokenizer, config)


def bare_prompter(lm: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, config: ModelConfig) -> Prompter:
    """The prompter over an LLM as it is, with LoRA inside or merged."""
    return Prompter(
        lm,
        tokenizer,
        num_soft_tokens=config.num_soft_tokens,
        temperature=config.softmax_temperature,
        max_request_tokens=config.max_instruction_tokens,
    )


def merge_lora(lm: PreTrainedModel, weights: Path, config: ModelConfig) -> bool:
    """Add the products of a saved LoRA to the weights of an LLM that nothing else uses.

    That spares peft, whose import and wrapping take a second or two.

    Args:
        lm: the Prompting LLM, changed in place.
        weights: LoRA as peft names it.
        config: the model's settings.

    Returns:
        Whether it was done. Not in other precisions than float32, which would lose digits, and not where the file holds
        something else than LoRA of linear layers, which peft is to judge; the LLM is as it was then.

    Raises:
        SafetensorError: the file is damaged.
    """
    state = load_file(weights)
    modules = {f"base_model.model.{name}": module for name, module in lm.named_modules()}
    products = []
    for name in {key.rpartition(".lora_")[0] for key in state}:
        out_R, in_R = (state.pop(f"{name}.lora_{letter}.weight", None) for letter in "BA")
        linear = modules.get(name)
        if type(linear) is not torch.nn.Linear or linear.weight.dtype != torch.float32 or out_R is None or in_R is None:
            return False
        fits = (out_R.shape[0], in_R.shape[1]) == linear.weight.shape
        if not fits or {out_R.shape[1], in_R.shape[0]} != {config.lora_rank}:
            return False
        products.append((linear, out_R, in_R))
    linears = sum(type(module) is torch.nn.Linear for module in modules.values())
    if state or len(products) != linears - (lm.get_output_embeddings() is not None):
        return False
    with torch.no_grad():
        for linear, out_R, in_R in products:
            linear.weight.addmm_(out_R.float(), in_R.float(), alpha=_LORA_SCALE)
    return True


def open_backbone(
    config: ModelConfig, backbone_at: LocatedModel, device: str | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The Embedding LLM, frozen, in the precision that the settings want, and its tokenizer.

    Raises:
        PromptEmbedderError: no such device, or an LLM that cannot be a backbone.
    """
    check_device(device)
    return load_causal_lm(backbone_at, resolve_dtype(config.dtype, device)), load_tokenizer(backbone_at)


def pair(config: ModelConfig, lm: PreTrainedModel, weight_PD: Tensor, name: str) -> tuple[Alignment, Backbone]:
    """Backbone and alignment that fit each other, as the settings want them; errors as in `backbone_of`."""
    layers = lm.config.get_text_config(decoder=True).num_hidden_layers
    return Alignment(weight_PD, layers, config.deep_rank), backbone_of(config, lm, name)


def backbone_of(config: ModelConfig, lm: PreTrainedModel, name: str) -> Backbone:
    """The backbone that reads with an LLM, as the settings want it.

    Raises:
        PromptEmbedderError: a deep soft prompt for an LLM whose layers cannot be reached.
    """
    decoder: Any = lm.base_model
    count = decoder.config.get_text_config(decoder=True).num_hidden_layers
    if config.deep_rank is not None and len(getattr(decoder, "layers", ())) != count:
        raise PromptEmbedderError(f"deep_rank needs an LLM with a list of its {count} layers, {name} has none")
    return Backbone(decoder, layout=config.layout, readout=config.readout, num_soft_tokens=config.num_soft_tokens)


def _trainable(lm: PreTrainedModel, config: ModelConfig, seed: int) -> torch.nn.Module:
    """The prompter's LLM with LoRA inside, or with every weight open to training."""
    if config.prompter_training == "full":
        return lm.requires_grad_(True)  # type: ignore[no-any-return]
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(
        r=config.lora_rank,
        lora_alpha=_LORA_SCALE * config.lora_rank,
        target_modules=_LORA_TARGETS,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.manual_seed(seed)
        # peft asks an LLM for an attribute that transformers has renamed.
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        return get_peft_model(lm, settings)  # type: ignore[no-any-return]


def _alignment_start(
    config: ModelConfig,
    prompter_lm: PreTrainedModel,
    prompter_tokenizer: Any,
    backbone_lm: PreTrainedModel,
    tokenizer: Any,
    same: bool,
    seed: int,
) -> Tensor:
    prompter_VP, prompter_scale = input_embeddings(prompter_lm)
    backbone_VD, backbone_scale = input_embeddings(backbone_lm)
    P, D = prompter_VP.shape[1], backbone_VD.shape[1]
    if config.alignment_start == "random":
        return random_start(P, D, torch.Generator().manual_seed(seed))
    if same:
        return torch.eye(P)
    ids_prompter, ids_backbone = shared_vocabulary(prompter_tokenizer, tokenizer, (len(prompter_VP), len(backbone_VD)))
    words_SP, words_SD = prompter_VP[ids_prompter] * prompter_scale, backbone_VD[ids_backbone] * backbone_scale
    # Least squares shrinks words, the more so the worse the prompter's embeddings predict the backbone's.
    fitted_PD = least_squares(moments(words_SP, words_SD))
    return matched_norm(fitted_PD, words_SP, words_SD)
