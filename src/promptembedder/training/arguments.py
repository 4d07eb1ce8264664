"""Arguments of the library's trainer: those that settings decide, and those that a user may add."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from sentence_transformers import SentenceTransformerTrainingArguments

from promptembedder.data.rows import TrainingData
from promptembedder.errors import PromptEmbedderError
from promptembedder.model.module import SoftPromptTransformer
from promptembedder.training import workers
from promptembedder.training.rates import learning_rates
from promptembedder.training.settings import TrainingConfig

DEV_METRIC = "eval_dev_spearman_cosine"
# What `training.arguments` may replace.
_DEFAULTS: dict[str, Any] = {
    "weight_decay": 0.0,
    "lr_scheduler_type": "linear",
    "max_grad_norm": 1.0,
    "logging_steps": 5,
    "save_total_limit": 2,
}
# Arguments that have a setting of their own.
_SETTINGS = {
    "output_dir": "training.output",
    "max_steps": "training.max_steps",
    "num_train_epochs": "training.max_steps",
    "per_device_train_batch_size": "training.batch_size",
    "per_device_eval_batch_size": "evaluation.batch_size",
    "gradient_accumulation_steps": "training.gradient_accumulation",
    "learning_rate": "training.prompter_learning_rate",
    "learning_rate_mapping": "training.alignment_learning_rate",
    "warmup_steps": "training.warmup",
    "warmup_ratio": "training.warmup",
    "eval_steps": "evaluation.every_steps",
    "seed": "training.seed",
    "data_seed": "training.seed",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
}
_DECIDED = {
    *("prompts", "batch_sampler", "multi_dataset_batch_sampler", "router_mapping", "fp16_full_eval", "bf16_full_eval"),
    *("save_strategy", "eval_strategy", "do_train", "do_eval", "do_predict", "load_best_model_at_end"),
    *("metric_for_best_model", "greater_is_better", "accelerator_config", "ddp_find_unused_parameters"),
    *("ddp_broadcast_buffers", "dataloader_drop_last", "use_cpu", "no_cuda", "report_to", "disable_tqdm"),
    *("resume_from_checkpoint", "gradient_checkpointing", "remove_unused_columns", "local_rank", "deepspeed", "fsdp"),
}


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Refuse arguments that the library does not know, and those that are not a user's to set.

    Raises:
        PromptEmbedderError: an unknown name, with the nearest valid ones; one that a setting or our training decides;
            a value that the library refuses.
    """
    known = {field.name for field in fields(SentenceTransformerTrainingArguments) if field.init}
    for name in arguments:
        if name in _SETTINGS:
            raise PromptEmbedderError(f"training.arguments.{name} has a setting of its own: {_SETTINGS[name]}")
        if name in _DECIDED:
            raise PromptEmbedderError(f"training.arguments.{name} is decided by the training itself; leave it out")
        if name not in known:
            near = difflib.get_close_matches(name, known - _SETTINGS.keys() - _DECIDED, n=3, cutoff=0.4)
            raise PromptEmbedderError(
                f"training.arguments.{name} is no argument of the trainer; nearest: {', '.join(near) or 'none'}"
            )
    norm = arguments.get("max_grad_norm", 1.0)
    if isinstance(norm, bool) or not isinstance(norm, (int, float)) or not norm > 0:
        raise PromptEmbedderError(f"training.arguments.max_grad_norm is {norm!r}, expected a positive number")
    try:
        SentenceTransformerTrainingArguments(output_dir="unused", use_cpu=True, report_to=[], **arguments)
    except (TypeError, ValueError) as error:
        raise PromptEmbedderError(f"training.arguments: {' '.join(str(error).split())[:300]}") from None


def max_grad_norm(settings: TrainingConfig) -> float:
    """The norm that gradients are clipped to."""
    return float({**_DEFAULTS, **settings.arguments}["max_grad_norm"])


def save_total_limit(settings: TrainingConfig) -> int | None:
    """How many checkpoints are kept (`CheckpointKeeper`)."""
    limit = {**_DEFAULTS, **settings.arguments}["save_total_limit"]
    return None if limit is None else int(limit)


def shared_arguments(settings: TrainingConfig) -> dict[str, Any]:
    """What a run of another method has to share, to be compared: steps, batches, schedule, samplers, seeds."""
    return {
        **_DEFAULTS,
        **settings.arguments,
        "max_steps": settings.max_steps,
        "per_device_train_batch_size": settings.batch_size,
        "gradient_accumulation_steps": settings.gradient_accumulation,
        "warmup_steps": settings.warmup_share,
        "batch_sampler": "no_duplicates",
        "multi_dataset_batch_sampler": "proportional",
        "seed": settings.seed,
        "data_seed": settings.seed,
        "report_to": [],  # TensorBoard is among the callbacks
        "disable_tqdm": True,  # a bar of our own is
    }


def arguments_of(
    settings: TrainingConfig,
    data: TrainingData,
    module: SoftPromptTransformer,
    output: Path,
    every_steps: int,
    *,
    scored: bool,
) -> SentenceTransformerTrainingArguments:
    """The library's arguments of a run.

    Args:
        settings: how to train.
        data: its datasets' prompts are instructions.
        module: the model's first module.
        output: folder of checkpoints and logs.
        every_steps: distance of dev scores and of checkpoints.
        scored: there are dev pairs to follow and to choose weights by.
    """
    several = workers.count() > 1
    shared = shared_arguments(settings)
    save_steps = shared.pop("save_steps", every_steps)
    arguments = SentenceTransformerTrainingArguments(
        # The leaf callback clips, and the checkpoint keeper removes checkpoints.
        **{**shared, "max_grad_norm": 0.0, "save_total_limit": None},
        output_dir=str(output),
        learning_rate=settings.prompter_learning_rate,
        learning_rate_mapping=learning_rates(module, settings),
        eval_strategy="steps" if scored else "no",
        eval_steps=every_steps if scored else None,
        save_strategy="steps",
        save_steps=every_steps if scored else save_steps,
        load_best_model_at_end=scored,
        metric_for_best_model=DEV_METRIC if scored else None,
        greater_is_better=True if scored else None,
        prompts=data.prompts,
        # Workers cut every batch among them, so that it keeps to one instruction; a short one cannot be cut.
        dataloader_drop_last=several,
        accelerator_config={"split_batches": several},
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,
        use_cpu=module.alignment.weight.device.type == "cpu",
    )
    # Several accelerators without a launcher: one is used. Replicas in threads cannot share the step's leaves.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments
