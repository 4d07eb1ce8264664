"""Training with sentence-transformers' trainer and losses; what is ours hangs on it (`callbacks`, `warm_start`)."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from sentence_transformers import SentenceTransformer
from sentence_transformers.util.distributed import distributed_evaluation
from torch import nn
from transformers import TrainerCallback

from promptembedder import atomic
from promptembedder.config import dump_yaml, parse
from promptembedder.data.rows import TrainingData, load_training_data
from promptembedder.errors import PromptEmbedderError
from promptembedder.model.build import build
from promptembedder.model.folder import folder_of, read_settings
from promptembedder.model.module import SoftPromptTransformer, default_prompts, soft_prompt_module
from promptembedder.model.settings import ModelConfig
from promptembedder.model.store import load, save
from promptembedder.training import workers
from promptembedder.training.callbacks import TrainingClock
from promptembedder.training.checks import check_losses, check_run, largest, rows_for_batches
from promptembedder.training.curves import write_facts
from promptembedder.training.evaluators import pair_evaluator
from promptembedder.training.fit import (
    TrainingResult,
    in_training,
    make_trainer,
    open_to_training,
    run_trainer,
    text_cache,
)
from promptembedder.training.losses import make_losses
from promptembedder.training.run_folder import checkpoint_of, make_folder, note_settings
from promptembedder.training.settings import RunConfig
from promptembedder.training.warm_start import warm_start
from promptembedder.transfer.centring import centre, sample_of_rows

logger = logging.getLogger(__name__)


# Settings of a model that weights do not depend on: a run that starts from a saved one may set them anew.
MAY_DIFFER = frozenset({"default_instruction", "document_instruction", "instruction_guidance", "max_text_tokens"})


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
    open_to_training(module, settings)
    clock = TrainingClock(_prepare(config, module, data) if checkpoint is None else 0.0)
    trainer = make_trainer(model, module, config, data, losses, dev, clock, callbacks)
    with workers.stopping_together():
        with in_training(module, cache, config.data.max_text_tokens):
            run_trainer(trainer, checkpoint, clock)
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
