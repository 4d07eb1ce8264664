"""The training loop that runs and transfers share: the library's trainer, and what hangs on it."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator
from torch import nn
from transformers import EarlyStoppingCallback, PrinterCallback, TrainerCallback, TrainerState
from transformers.integrations import TensorBoardCallback
from transformers.trainer import TRAINER_STATE_NAME

from promptembedder.data.rows import TrainingData
from promptembedder.errors import PromptEmbedderError
from promptembedder.llms import widened
from promptembedder.llms.state_cache import TextStateCache, open_text_cache
from promptembedder.model.leaves import SoftPromptLeaves, TrainingState
from promptembedder.model.module import SoftPromptTransformer, soft_prompt_module
from promptembedder.paths import expanded
from promptembedder.training import workers
from promptembedder.training.arguments import DEV_METRIC, arguments_of, max_grad_norm, save_total_limit
from promptembedder.training.callbacks import PrompterFreeze, SoftPromptLeafCallback, TrainingBar, TrainingClock
from promptembedder.training.checkpoints import CheckpointKeeper, trouble
from promptembedder.training.checks import check_data, largest, warn_of_small_batches
from promptembedder.training.curves import Curve, dev_curve
from promptembedder.training.losses import make_losses
from promptembedder.training.settings import EvaluationConfig, TrainingConfig
from promptembedder.training.trainer import Trainer


@dataclass(frozen=True)
class TrainingResult:
    """What `fit` or `train` made.

    Attributes:
        model: the trained model; the best on dev where dev pairs are given.
        folder: of checkpoints and logs (`fit`), of the saved model (`train`).
        scores: `dev` and, by `train`, `test`, Spearman x 100, where there are such pairs.
        steps: optimizer steps taken, those before a resume counted.
        examples: rows trained on, repetitions counted, the last batch of an instruction as if it were full and
            two made-up rows of one anchor as one.
        seconds: wall time of the steps and of the warm start before them; scoring dev is not in it.
        history: the trainer's log lines; `instructions` are those of the line's last step.
        text_state_hit_rate: share of the texts whose states were found, where states are kept.
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


def fit(
    model: SentenceTransformer,
    data: TrainingData,
    settings: TrainingConfig,
    *,
    output: str | Path | None = None,
    loss: nn.Module | None = None,
    evaluator: EmbeddingSimilarityEvaluator | None = None,
    every_steps: int = EvaluationConfig.every_steps,
    max_text_tokens: int | None = None,
    checkpoint: str | Path | None = None,
    cache: TextStateCache | None = None,
    spent: float = 0.0,
    callbacks: Sequence[TrainerCallback] = (),
) -> TrainingResult:
    """Train a model on rows, in place.

    Args:
        model: made by `build` or `load`.
        data: the rows (`promptembedder.data.rows.load_training_data`).
        settings: steps, batches, rates and losses.
        output: folder of checkpoints and logs; unset: `settings.output`.
        loss: of all datasets, in place of those that the settings name.
        evaluator: scores dev pairs on the way; the best weights are kept (`training.evaluators.pair_evaluator`).
        every_steps: distance of dev scores and of checkpoints.
        max_text_tokens: texts are truncated here while training; unset: where the model truncates them.
        checkpoint: folder of a checkpoint in `output` to go on from.
        cache: states of texts, layout `suffix`; unset: as the settings want it.
        spent: seconds of what came before the first step.
        callbacks: further ones for the library's trainer.

    Raises:
        PromptEmbedderError: rows or settings that do not go together; an argument that cannot be set; a checkpoint that
            is not complete, or cannot be written.
    """
    module = soft_prompt_module(model)
    check_data(settings, data)
    warn_of_small_batches(settings, data)
    open_to_training(module, settings)
    place = expanded(settings.output if output is None else output)
    clock = TrainingClock(spent)
    with ExitStack() as until_then:
        if cache is not None:
            cache.hits = cache.misses = 0
        elif (cache := text_cache(module, settings)) is not None:
            until_then.callback(cache.close)
        losses = make_losses(model, settings, data) if loss is None else loss
        trainer = _trainer(model, data, settings, place, losses, evaluator, every_steps, clock, callbacks)
        until_then.enter_context(module.in_training(TrainingState(SoftPromptLeaves(), cache, max_text_tokens)))
        _run(trainer, checkpoint, clock)
    best = None if evaluator is None else trainer.state.best_metric
    steps = trainer.state.global_step
    return TrainingResult(
        model,
        place,
        {} if best is None else {"dev": 100 * best},
        steps,
        steps * min(settings.batch_size, largest(data)) * settings.gradient_accumulation,
        clock.spent,
        trainer.state.log_history,
        None if cache is None else cache.hit_rate,
    )


def _trainer(
    model: SentenceTransformer,
    data: TrainingData,
    settings: TrainingConfig,
    output: Path,
    losses: Any,
    evaluator: EmbeddingSimilarityEvaluator | None,
    every_steps: int,
    clock: TrainingClock,
    callbacks: Sequence[TrainerCallback],
) -> Trainer:
    """The library's trainer with what hangs on it."""
    module = soft_prompt_module(model)
    known = {*data.instructions, module.settings.default_instruction, module.settings.document_instruction}
    leaf = SoftPromptLeafCallback(module, max_grad_norm(settings), sorted(known))
    # The leaf's is before TensorBoard's, which would log what is not yet right.
    hooks: list[TrainerCallback] = [leaf, clock, TensorBoardCallback(), TrainingBar()]
    hooks.append(CheckpointKeeper(save_total_limit(settings)))
    if settings.train_prompter and settings.prompter_steps is not None:
        hooks.append(PrompterFreeze(module, settings.prompter_steps))
    if settings.early_stop_patience is not None:
        hooks.append(EarlyStoppingCallback(settings.early_stop_patience))
    _leave_card_alone(model, data)
    trainer = Trainer(
        model=model,
        args=arguments_of(settings, data, module, output, every_steps, scored=evaluator is not None),
        train_dataset=data.datasets,
        loss=losses,
        evaluator=evaluator,
        callbacks=[*hooks, *callbacks],
    )
    trainer.remove_callback(PrinterCallback)  # prints dictionaries
    leaf.trainer = trainer
    trainer.own_negatives, trainer.neighbourhoods = data.own_negatives, data.neighbourhoods
    return trainer


def open_to_training(module: SoftPromptTransformer, settings: TrainingConfig) -> None:
    """Let gradients reach what is to be trained, and nothing else.

    Raises:
        PromptEmbedderError: the model is an export, which has no Prompting LLM.
    """
    lm: nn.Module = module.prompter.lm
    for name, parameter in lm.named_parameters(prefix="lm"):
        parameter.requires_grad_(settings.train_prompter and module.prompter.is_trained(name))
    module.alignment.requires_grad_(True)


def _leave_card_alone(model: SentenceTransformer, data: TrainingData) -> None:
    """Keep the library from drawing examples for a hub page before every training, with a bar of their own."""
    model.model_card_data.generate_widget_examples = False
    model.model_card_data.train_datasets = []  # those of an earlier training would be a warning
    model.model_card_data.widget = [{"text": next(iter(data.datasets.values()))[0]["anchor"]}]


def _run(trainer: SentenceTransformerTrainer, checkpoint: str | Path | None, clock: TrainingClock) -> None:
    """Train to the end."""
    if checkpoint is not None:
        if (why := trouble(Path(checkpoint), contents=False)) is not None:
            raise PromptEmbedderError(f"checkpoint {checkpoint} is not complete: {why}")
        state = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
        if _patience_is_spent(trainer, state) or state.global_step >= trainer.args.max_steps:
            # All steps are done and only the end is missing; the library would go on.
            trainer.state = state
            clock.on_train_begin(trainer.args, state, trainer.control)
            # By name: the run's folder may have been moved.
            best = Path(checkpoint).parent / Path(state.best_model_checkpoint or checkpoint).name
            trainer._load_from_checkpoint(str(best))
            return
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except (OSError, SafetensorError, RuntimeError) as error:
        half = Path(trainer.args.output_dir) / f"checkpoint-{trainer.state.global_step}"
        if trainer.control.should_save and half.is_dir() and trouble(half, contents=False) is not None:
            shutil.rmtree(half, ignore_errors=True)  # on a full disk, what it takes is needed
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            raise PromptEmbedderError(
                f"{half} cannot be written ({reason}); make room on the disk and go on with --resume"
            ) from error
        raise


def _patience_is_spent(trainer: SentenceTransformerTrainer, state: TrainerState) -> bool:
    """Give the trainer what a checkpoint had left of its patience; whether that is nothing."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, EarlyStoppingCallback):
            spent = state.stateful_callbacks.get(EarlyStoppingCallback.__name__, callback.state())["attributes"]
            callback.early_stopping_patience_counter = spent["early_stopping_patience_counter"]
            return bool(callback.early_stopping_patience_counter >= callback.early_stopping_patience)
    return False


def text_cache(module: SoftPromptTransformer, settings: TrainingConfig) -> TextStateCache | None:
    """The text-state cache that the settings ask for, opened for the module's backbone."""
    if settings.text_state_cache is None:
        return None
    backbone = module.backbone
    shape = hashlib.sha256(backbone.lm.config.to_json_string().encode()).hexdigest()
    return open_text_cache(
        settings.text_state_cache,
        identity=f"{module.base_models.backbone_fingerprint} {shape} {backbone.lm.dtype} "
        f"widened={widened.helps(backbone.lm)}",
        precision=settings.text_state_precision,
        folder=settings.text_state_folder,
        worker=workers.local_number(),
        workers=workers.local_count(),
    )
