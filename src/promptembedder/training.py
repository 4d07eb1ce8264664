"""Training with sentence-transformers' trainer and losses; what is ours hangs on it (`callbacks`, `warm_start`)."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator
from sentence_transformers.util.distributed import distributed_evaluation
from torch import Tensor, nn
from transformers import EarlyStoppingCallback, PreTrainedModel, TrainerCallback, TrainerState
from transformers.integrations import TensorBoardCallback
from transformers.trainer import TRAINER_STATE_NAME

from promptembedder import alignment, atomic, base_models, widened, workers
from promptembedder.batches import OwnNegativesTrainer, rows_for_batches
from promptembedder.building import build
from promptembedder.callbacks import SoftmaxAnnealing, SoftPromptLeafCallback, TrainingClock
from promptembedder.centring import centre, sample_of_rows
from promptembedder.config import ModelConfig, RunConfig, TrainingConfig, dump_yaml, parse
from promptembedder.data import TrainingData, load_training_data
from promptembedder.errors import PromptEmbedderError
from promptembedder.losses import check_losses, make_losses
from promptembedder.model import load, refuse_foreign, restore, save, soft_prompt_module
from promptembedder.module import SoftPromptTransformer, default_prompts
from promptembedder.run_folder import checkpoint_of, make_folder, note_settings
from promptembedder.saved import folder_of, read_settings
from promptembedder.scored_pairs import pair_evaluator
from promptembedder.text_cache import TextStateCache, open_text_cache
from promptembedder.training_facts import Curve, dev_curve, write_facts
from promptembedder.warm_start import warm_start

logger = logging.getLogger(__name__)

_DEV_METRIC = "eval_dev_spearman_cosine"
# Settings of a model that weights do not depend on: a run that starts from a saved one may set them anew.
MAY_DIFFER = frozenset({"default_instruction", "document_instruction", "instruction_guidance", "max_text_tokens"})
# Names as the trainer sees them, in the loss: `model.0.alignment.weight`, a linear head's `model.1.linear.weight`.
_ALIGNMENT, _HEAD = r"\.alignment\.", r"\.\d+\.linear\."


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
        return dev_curve(self.history, self.examples // max(self.steps, 1), _DEV_METRIC, before)


def train(
    config: RunConfig,
    *,
    resume: bool = False,
    start: str | Path | None = None,
    anew: Mapping[str, Any] | None = None,
    model: SentenceTransformer | None = None,
    data: TrainingData | None = None,
    loss: nn.Module | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> TrainingResult:
    """Train a model, save it to `<output>/model` and score it.

    Args:
        config: all settings.
        resume: go on from the last checkpoint in `<output>`.
        start: folder, name or hub id of a saved model to start from. Its settings replace `config.model`, and there
            is no warm start.
        anew: with `start`, settings of the model that replace the saved ones; those of `MAY_DIFFER`.
        model: start from this one, as it is, instead of building `config.model`: no warm start either. A text-state
            cache that its backbone has already is used in place of the one that the settings ask for, and stays.
        data: train on these rows instead of `config.data`'s.
        loss: of all datasets, in place of those that the settings name.
        callbacks: further ones for the library's trainer, such as those that report elsewhere.

    Raises:
        PromptEmbedderError: `start` and `model` together; bad data or settings; nothing to resume from, or a
            checkpoint of another model; an interrupted run in the way; output not writable.
    """
    if start is not None and model is not None:
        raise PromptEmbedderError("start and model are both given; a run begins with one of them")
    if anew and start is None:
        raise PromptEmbedderError("anew is for settings of a saved model to start from; give start, too")
    if start is not None:
        config = replace(config, model=_structure_of(folder_of(start), config, anew or {}))
    elif model is not None:
        config = replace(config, model=soft_prompt_module(model).settings)
    if start is not None or model is not None:  # it has learnt before
        none = replace(config.training.warm_start, steps=0)
        config = replace(config, training=replace(config.training, warm_start=none))
    settings, output = config.training, Path(config.training.output)
    if not settings.max_steps:
        raise PromptEmbedderError("training.max_steps is 0, expected at least one step")
    check_run(config)
    checkpoint = checkpoint_of(output, resume, config.model)
    if data is None:
        data = load_training_data(config.data, config.model.document_instruction, settings.seed)
    check_losses(settings, data)
    dev, test = (pair_evaluator(config.evaluation, config.data.root, part) for part in ("dev", "test"))
    most_rows = largest(data)
    if most_rows < settings.batch_size:
        logger.warning("training.batch_size is %d, but batches hold %d: no more rows", settings.batch_size, most_rows)
    workers.check(settings.batch_size, rows_for_batches(data, settings.batch_size))
    make_folder(output, fresh=checkpoint is None)
    note_settings(output, config, resumed=checkpoint is not None)
    if start is not None:
        model = load(start, device=workers.device())
        _set_anew(model, config.model)
    elif model is None:
        model = build(config.model, device=workers.device(), seed=settings.seed)
    module = soft_prompt_module(model)
    cache = module.backbone.text_cache
    if cache is None:
        cache = text_cache(module, settings)
    else:
        cache.hits = cache.misses = 0
    losses = make_losses(model, settings, data) if loss is None else loss
    _open_to_training(module, settings)
    clock = TrainingClock(_prepare(config, module, data) if checkpoint is None else 0.0)
    trainer = _trainer(model, module, config, data, losses, dev, clock, callbacks)
    with workers.stopping_together():
        with _in_training(module, cache, config.data.max_text_tokens):
            _run(trainer, checkpoint, clock)
        steps = trainer.state.global_step
        examples = steps * min(settings.batch_size, most_rows) * settings.gradient_accumulation
        folder = output / "model"
        if workers.number() == 0:
            _save(model, folder, config, steps=steps, examples=examples, seconds=clock.spent, start=start)
        best = None if dev is None else trainer.state.best_metric
        scores = {} if best is None else {"dev": 100 * best}
        with distributed_evaluation(model) as mine:
            if test is not None and mine:
                scores["test"] = 100 * test(model)["test_spearman_cosine"]
    return TrainingResult(
        model,
        folder,
        scores,
        steps,
        examples,
        clock.spent,
        trainer.state.log_history,
        None if cache is None else cache.hit_rate,
    )


class _Trainer(OwnNegativesTrainer):
    """Goes back to a checkpoint by its trained weights.

    The library opens the whole model again, both LLMs in the precision and on the device of a fresh start, copies
    everything over what is there, and where that fails goes on with a line in the log.
    """

    def _load_from_checkpoint(self, checkpoint_path: str, model: nn.Module | None = None) -> None:
        restore(self.model, checkpoint_path)

    def _load_best_model(self) -> None:
        if self.state.best_model_checkpoint is not None:
            restore(self.model, self.state.best_model_checkpoint)


@contextmanager
def _in_training(
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


def _run(trainer: SentenceTransformerTrainer, checkpoint: str | None, clock: TrainingClock) -> None:
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


def _save(
    model: SentenceTransformer,
    folder: Path,
    config: RunConfig,
    *,
    steps: int,
    examples: int,
    seconds: float,
    start: str | Path | None,
) -> None:
    """The model, its settings and what its training took."""
    save(model, folder)
    atomic.write_text(folder / "config.yaml", dump_yaml(config))
    write_facts(
        folder,
        trained_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        steps=steps,
        examples=examples,
        seconds=seconds,
        start=None if start is None else str(start),
    )


def _prepare(config: RunConfig, module: SoftPromptTransformer, data: TrainingData) -> float:
    """What comes before the first step, where the settings want it; seconds spent."""
    settings = config.training
    began = time.perf_counter()
    if settings.train_prompter and settings.warm_start.steps:
        warm_start(module, aspects_of(config, module, data), settings.warm_start, settings.seed)
    if module.settings.centred and not module.centre_E.any():  # what has learnt keeps the centre that it learnt with
        centre(module, sample_of_rows(data, settings.seed), config.data.max_text_tokens)
    return time.perf_counter() - began


def aspects_of(config: RunConfig, module: SoftPromptTransformer, data: TrainingData) -> dict[str, str | None]:
    """Every instruction of a run, with its aspect where that is known: what the warm start fits on."""
    known = {*data.instructions, config.evaluation.instruction, module.settings.default_instruction}
    return {instruction: data.aspects.get(instruction) for instruction in sorted(known)}


def _structure_of(start: Path, config: RunConfig, anew: Mapping[str, Any]) -> ModelConfig:
    """Settings of the saved model that a run starts from, those of `anew` replaced."""
    if fixed := sorted(set(anew) - MAY_DIFFER):
        raise PromptEmbedderError(f"a run from a saved model keeps its {', '.join(fixed)}; anew: {sorted(MAY_DIFFER)}")
    output = Path(config.training.output).resolve()
    if start.resolve().is_relative_to(output):
        raise PromptEmbedderError(f"{start} lies in training.output, where its successor goes; choose another output")
    model = parse(ModelConfig, read_settings(start)["model"], where=str(start))
    model = parse(ModelConfig, {**asdict(model), **anew}, where=str(start))
    if left_out := [
        f.name for f in fields(model) if getattr(config.model, f.name) not in (f.default, getattr(model, f.name))
    ]:
        logger.warning("%s keeps its own %s; the run's section model is not taken", start, ", ".join(left_out))
    return model


def _set_anew(model: SentenceTransformer, settings: ModelConfig) -> None:
    """Give a model other settings of `MAY_DIFFER`."""
    module = soft_prompt_module(model)
    before = default_prompts(module.settings)
    model.prompts |= {name: text for name, text in default_prompts(settings).items() if text != before[name]}
    model.max_seq_length = settings.max_text_tokens  # which may be more than the backbone reads
    module.settings = settings


def largest(data: TrainingData) -> int:
    """Rows of the instruction that has most.

    Raises:
        PromptEmbedderError: no instruction has two.
    """
    most = max(len(rows) for rows in data.datasets.values())
    if most < 2:
        raise PromptEmbedderError(
            "no instruction has two rows to tell apart; give more training rows (with and without `neg` count apart)"
        )
    return most


def check_run(config: RunConfig) -> None:
    """Refuse settings that contradict each other, before anything is read or made.

    Raises:
        PromptEmbedderError: they do.
    """
    settings, layout = config.training, config.model.layout
    if not (settings.train_prompter or settings.train_alignment):
        raise PromptEmbedderError("nothing to train: training.train_prompter and training.train_alignment are both off")
    if settings.early_stop_patience is not None and config.evaluation.dev is None:
        raise PromptEmbedderError("training.early_stop_patience needs evaluation.dev")
    if settings.softmax_temperature_start is not None and not settings.train_prompter:
        raise PromptEmbedderError("training.softmax_temperature_start needs training.train_prompter")
    if settings.text_state_cache is not None and layout != "suffix":
        raise PromptEmbedderError(
            f"training.text_state_cache needs model.layout 'suffix', found {layout!r}: there a text's states "
            "depend on the soft prompt"
        )
    if settings.text_state_folder is not None and settings.text_state_cache is None:
        raise PromptEmbedderError("training.text_state_folder needs training.text_state_cache, its size")
    refuse_foreign(Path(settings.output) / "model")


def _open_to_training(module: SoftPromptTransformer, settings: TrainingConfig) -> None:
    """Let gradients reach what is to be trained, and nothing else."""
    if not settings.train_alignment and module.alignment.deep_is_zero:
        raise PromptEmbedderError(
            "training.train_alignment is off, so the new deep soft prompt would stay at zero; train the alignment, or "
            "turn model.deep_soft_prompt off"
        )
    module.alignment.requires_grad_(settings.train_alignment)
    for name, parameter in module.prompter.named_parameters():
        parameter.requires_grad_(settings.train_prompter and module.prompter.is_trained(name))


def _trainer(
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
    trainer = _Trainer(
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
        learning_rate_mapping=_learning_rates(module, settings),
        max_grad_norm=0.0 if settings.soft_prompt_leaf else settings.max_grad_norm,  # the leaf callback clips itself
        eval_strategy="steps" if scored else "no",
        eval_steps=every if scored else None,
        save_strategy="steps",
        save_steps=every if scored else settings.save_every_steps or every,
        save_total_limit=settings.keep_checkpoints,
        load_best_model_at_end=scored,
        metric_for_best_model=_DEV_METRIC if scored else None,
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


def _learning_rates(module: SoftPromptTransformer, settings: TrainingConfig) -> dict[str, float]:
    """Of what is not the prompter's, by name pattern."""
    rate = settings.alignment_learning_rate
    factor = 1.0
    if settings.scale_alignment_rate:
        factor = alignment.rate_factor(_words(module.prompter.lm), _words(module.backbone.lm))
    if factor != 1 and workers.number() == 0:
        logger.info("learning rate of W: %g x %g, by the size of the two LLMs' words", rate, factor)
    return {_ALIGNMENT: rate * factor} | ({_HEAD: rate} if module.settings.linear_head else {})


def _words(lm: PreTrainedModel) -> Tensor:
    """Some thousand token embeddings (S, width), as the LLM reads them."""
    matrix_VX, scale = base_models.input_embeddings(lm)
    return alignment.some_words(matrix_VX) * scale


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
