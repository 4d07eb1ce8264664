"""The training loop that runs and transfers share: the library's trainer, and what hangs on it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator
from torch import nn
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerState
from transformers.integrations import TensorBoardCallback
from transformers.trainer import TRAINER_STATE_NAME

from promptembedder.data.rows import TrainingData
from promptembedder.errors import PromptEmbedderError
from promptembedder.llms import widened
from promptembedder.llms.state_cache import TextStateCache, open_text_cache
from promptembedder.model.module import SoftPromptTransformer
from promptembedder.training import workers
from promptembedder.training.callbacks import SoftmaxAnnealing, SoftPromptLeafCallback, TrainingClock
from promptembedder.training.curves import Curve, dev_curve
from promptembedder.training.rates import learning_rates
from promptembedder.training.settings import RunConfig, TrainingConfig
from promptembedder.training.trainer import Trainer

DEV_METRIC = "eval_dev_spearman_cosine"


@dataclass(frozen=True)
class TrainingResult:
    """What a run made.

    Attributes:
        model: the trained model; the best on dev where dev is given.
        folder: where it was saved.
        scores: `dev` and `test`, Spearman x 100, where the files are given.
        steps: optimizer steps taken.
        seconds: wall time of warm start and optimizer steps; scoring dev is in none of it.
        examples: rows trained on, repetitions counted, the last batch of an instruction as if it were full and
            two made-up rows of one anchor as one.
        history: the trainer's log lines.
        text_state_hit_rate: share of the texts whose states were found, where they are kept.
    """

    model: SentenceTransformer
    folder: Path
    scores: dict[str, float]
    steps: int
    examples: int
    seconds: float
    history: list[dict[str, Any]]
    text_state_hit_rate: float | None = None

    def curve(self, before: float = 0.0) -> Curve:
        """Dev scores on the way: (examples, seconds of training, Spearman x 100); `before`: seconds to add."""
        return dev_curve(self.history, self.examples // max(self.steps, 1), DEV_METRIC, before)


@contextmanager
def in_training(
    module: SoftPromptTransformer, cache: TextStateCache | None, max_text_tokens: int | None
) -> Iterator[None]:
    """What a module has during training only; afterwards it is as it was, with the weights that it learnt."""
    before = module.backbone.text_cache
    module.backbone.text_cache = cache
    module.training_text_tokens = max_text_tokens
    try:
        yield
    finally:
        module.backbone.text_cache = before
        module.leaves = None
        module.training_text_tokens = None
        module.prompter.temperature = module.settings.softmax_temperature


def run_trainer(trainer: SentenceTransformerTrainer, checkpoint: str | None, clock: TrainingClock) -> None:
    """Train to the end."""
    if checkpoint is not None:
        state = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
        if _patience_is_spent(trainer, state) or state.global_step >= trainer.args.max_steps:
            # All steps are done and only the end is missing; the library would go on.
            trainer.state = state
            clock.on_train_begin(trainer.args, state, trainer.control)
            # By name: the run's folder may have been moved.
            best = Path(checkpoint).parent / Path(state.best_model_checkpoint or checkpoint).name
            trainer._load_from_checkpoint(str(best))
            return
    trainer.train(resume_from_checkpoint=checkpoint)


def _patience_is_spent(trainer: SentenceTransformerTrainer, state: TrainerState) -> bool:
    """Give the trainer what a checkpoint had left of its patience; whether that is nothing."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, EarlyStoppingCallback):
            spent = state.stateful_callbacks.get(EarlyStoppingCallback.__name__, callback.state())["attributes"]
            callback.early_stopping_patience_counter = spent["early_stopping_patience_counter"]
            return bool(callback.early_stopping_patience_counter >= callback.early_stopping_patience)
    return False


def open_to_training(module: SoftPromptTransformer, settings: TrainingConfig) -> None:
    """Let gradients reach what is to be trained, and nothing else."""
    if not settings.train_alignment and module.alignment.deep_is_zero:
        raise PromptEmbedderError(
            "training.train_alignment is off, so the new deep soft prompt would stay at zero; train the alignment, or "
            "turn model.deep_soft_prompt off"
        )
    module.alignment.requires_grad_(settings.train_alignment)
    for name, parameter in module.prompter.named_parameters():
        parameter.requires_grad_(settings.train_prompter and module.prompter.is_trained(name))


def make_trainer(
    model: SentenceTransformer,
    module: SoftPromptTransformer,
    config: RunConfig,
    data: TrainingData,
    losses: nn.Module | dict[str, nn.Module],
    dev: EmbeddingSimilarityEvaluator | None,
    clock: TrainingClock,
    more: Sequence[TrainerCallback],
) -> SentenceTransformerTrainer:
    settings = config.training
    known = {*data.instructions, module.settings.default_instruction, module.settings.document_instruction}
    leaf = SoftPromptLeafCallback(module, settings.max_grad_norm, sorted(known))
    # The leaf's is before TensorBoard's, which would log what is not yet right.
    callbacks: list[TrainerCallback] = [*([leaf] if settings.soft_prompt_leaf else []), clock, TensorBoardCallback()]
    if settings.softmax_temperature_start is not None:
        callbacks.append(SoftmaxAnnealing(module, settings.softmax_temperature_start))
    if settings.early_stop_patience is not None:
        callbacks.append(EarlyStoppingCallback(settings.early_stop_patience))
    # The library would draw examples for a hub page before every training, with a progress bar of their own.
    model.model_card_data.generate_widget_examples = False
    model.model_card_data.train_datasets = []  # those of an earlier training would be a warning
    model.model_card_data.widget = [{"text": next(iter(data.datasets.values()))[0]["anchor"]}]
    trainer = Trainer(
        model=model,
        args=_arguments(config, data, module, scored=dev is not None),
        train_dataset=data.datasets,
        loss=losses,
        evaluator=dev,
        callbacks=[*callbacks, *more],
    )
    leaf.trainer = trainer
    trainer.own_negatives = data.own_negatives
    return trainer


def shared_arguments(settings: TrainingConfig) -> dict[str, Any]:
    """What a run of another method has to share, to be compared: steps, batches, schedule, samplers, seeds."""
    return {
        "max_steps": settings.max_steps,
        "per_device_train_batch_size": settings.batch_size,
        "gradient_accumulation_steps": settings.gradient_accumulation,
        "weight_decay": settings.weight_decay,
        "warmup_steps": settings.warmup_share,
        "lr_scheduler_type": settings.schedule,
        "logging_steps": settings.logging_steps,
        "batch_sampler": "no_duplicates",
        "multi_dataset_batch_sampler": "proportional",
        "seed": settings.seed,
        "data_seed": settings.seed,
        "report_to": [],  # TensorBoard is among the callbacks
    }


def _arguments(
    config: RunConfig, data: TrainingData, module: SoftPromptTransformer, *, scored: bool
) -> SentenceTransformerTrainingArguments:
    """The library's settings; `scored`: there are dev pairs to follow and to choose weights by."""
    settings = config.training
    every = config.evaluation.every_steps
    several = workers.count() > 1
    arguments = SentenceTransformerTrainingArguments(
        **shared_arguments(settings),
        output_dir=str(Path(settings.output)),
        learning_rate=settings.prompter_learning_rate,
        learning_rate_mapping=learning_rates(module, settings),
        max_grad_norm=0.0 if settings.soft_prompt_leaf else settings.max_grad_norm,  # the leaf callback clips itself
        eval_strategy="steps" if scored else "no",
        eval_steps=every if scored else None,
        save_strategy="steps",
        save_steps=every if scored else settings.save_every_steps or every,
        save_total_limit=settings.keep_checkpoints,
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


def text_cache(module: SoftPromptTransformer, settings: TrainingConfig) -> TextStateCache | None:
    """The text-state cache that the settings ask for, opened for the module's backbone."""
    if settings.text_state_cache is None:
        return None
    backbone = module.backbone
    shape = hashlib.sha256(backbone.lm.config.to_json_string().encode()).hexdigest()
    return open_text_cache(
        settings.text_state_cache,
        identity=f"{module.base_models.backbone_fingerprint} {shape} {backbone.lm.dtype} {backbone.text_pass} "
        f"widened={widened.helps(backbone.lm)}",
        precision=settings.text_state_precision,
        folder=settings.text_state_folder,
        worker=workers.local_number(),
        workers=workers.local_count(),
    )
