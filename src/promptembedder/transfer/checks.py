"""What a transfer refuses or warns of, before the new backbone is opened."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import psutil
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoModelForCausalLM

from promptembedder.errors import PromptEmbedderError
from promptembedder.llms.device import resolve_dtype
from promptembedder.llms.locate import LocatedModel
from promptembedder.llms.open import load_config
from promptembedder.model.folder import CONFIG_FILE, read_saved
from promptembedder.model.module import SoftPromptTransformer, soft_prompt_module
from promptembedder.model.store import lender_of
from promptembedder.training import workers
from promptembedder.training.checkpoints import checkpoints
from promptembedder.training.checks import check_settings
from promptembedder.training.run_folder import interrupted, refuse_interrupted
from promptembedder.transfer.settings import TransferConfig

logger = logging.getLogger(__name__)


# In the order in which they are run.
TRAINED_STAGES = ("alignment_unlabelled", "alignment_labelled")


def check_alone() -> None:
    """Refuse several workers."""
    if workers.count() > 1:
        raise PromptEmbedderError("a transfer runs in one process; start it without torchrun")


def check_transfer(
    model: SentenceTransformer, config: TransferConfig, share_prompter: str | Path | None, resume: bool
) -> None:
    """Refuse settings that contradict each other, before anything is read or made."""
    check_alone()
    target = Path(config.training.output) / "model"
    old = soft_prompt_module(model)
    check_settings(config.training, old.settings.layout, scored=config.evaluation.dev is not None)
    if (Path(config.training.output) / CONFIG_FILE).is_file():
        raise PromptEmbedderError(f"{config.training.output} is itself a saved model; choose another training.output")
    if target.exists() and _backbone_in(target) == old.base_models.backbone_fingerprint:
        raise PromptEmbedderError(
            f"{target} holds a model with the old backbone, perhaps the one to be moved; choose another training.output"
        )
    running = old.prompter.embeddings_dtype
    if (
        config.dtype is not None
        and old.settings.prompter_training == "lora"  # trained whole, it is float32 always
        and resolve_dtype(config.dtype, old.alignment.weight.device) != running
    ):
        raise PromptEmbedderError(
            f"dtype {config.dtype}: the model's prompter runs in {str(running).removeprefix('torch.')} here, and a "
            "saved model opens both LLMs in one precision; open the model in the precision that the new one is to have"
        )
    if share_prompter is not None:
        lender_of(model, share_prompter, target)
    if not config.training.train_prompter:
        raise PromptEmbedderError("training.train_prompter is for training; a transfer trains the alignment alone")
    if config.centred and not config.has_data:
        raise PromptEmbedderError("centred needs texts or labelled rows (texts, data.files) to take the mean of")
    if config.distillation_learning_rate is not None and not (config.texts and config.training.max_steps):
        raise PromptEmbedderError(
            "distillation_learning_rate is for training on plain texts (texts, training.max_steps)"
        )
    if resume and not config.trains:
        raise PromptEmbedderError("nothing to resume: training.max_steps is 0, so nothing is trained")
    output = Path(config.training.output)
    if resume and not interrupted(output) and not any(checkpoints(output / stage) for stage in TRAINED_STAGES):
        raise PromptEmbedderError(f"nothing to resume: {output} holds no checkpoint")
    for stage in () if resume else TRAINED_STAGES:
        refuse_interrupted(output / stage)


def warn_of_what_stays_behind(old: SoftPromptTransformer, config: TransferConfig) -> None:
    """Warn of what belongs to the old backbone and is not trained on the new one."""
    if not config.trains and (old.settings.deep_rank is not None or old.settings.linear_head):
        logger.warning(
            "the model's deep soft prompt or linear head belongs to its backbone and starts again; without rows or "
            "texts to train on the new one goes without"
        )
    if old.centred and not config.centres:
        logger.warning("the mean that the model subtracts belongs to its backbone; the new one subtracts nothing")


def check_shape(located: LocatedModel, config: TransferConfig) -> None:
    """Refuse settings that the backbone is too small for, from its config alone."""
    shape = load_config(located).get_text_config(decoder=True)
    if max(config.training.matryoshka_dims, default=0) > shape.hidden_size:
        raise PromptEmbedderError(
            f"training.matryoshka_dims holds {max(config.training.matryoshka_dims)}, "
            f"the embedding has {shape.hidden_size} dimensions"
        )


def check_memory(name: str, config: Any, dtype: torch.dtype, device: torch.device) -> None:
    """Refuse a backbone that cannot fit, from its config alone."""
    try:
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(config)
    except ValueError:
        return  # no causal LM, which is refused elsewhere
    needed = sum(p.numel() for p in empty.parameters()) * torch.empty(0, dtype=dtype).element_size()
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if needed > free:
        raise PromptEmbedderError(
            f"{name} needs {needed / 2**30:.1f} GiB of weights in {str(dtype).removeprefix('torch.')}, "
            f"{free / 2**30:.1f} GiB are free on {device}"
        )


def _backbone_in(folder: Path) -> Any:
    """Fingerprint of a saved model's backbone; `None` in a folder that holds no model."""
    return read_saved(folder).base_models.backbone_fingerprint if any(folder.iterdir()) else None
