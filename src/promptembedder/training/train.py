"""Training with sentence-transformers' trainer and losses; what is ours hangs on it (`callbacks`, `warm_start`)."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from datasets import DatasetDict
from sentence_transformers import SentenceTransformer
from sentence_transformers.util.distributed import distributed_evaluation
from transformers import TrainerCallback

from promptembedder import atomic
from promptembedder.config import dump_yaml, parse
from promptembedder.data.rows import TrainingData, load_training_data
from promptembedder.errors import PromptEmbedderError
from promptembedder.model.build import build
from promptembedder.model.folder import folder_of, read_saved
from promptembedder.model.module import SoftPromptTransformer, soft_prompt_module
from promptembedder.model.prompts import default_prompts
from promptembedder.model.settings import ModelConfig
from promptembedder.model.store import load, save
from promptembedder.progress import say
from promptembedder.training import workers
from promptembedder.training.callbacks import AtFirstStep
from promptembedder.training.checks import check_data, check_settings
from promptembedder.training.curves import write_facts
from promptembedder.training.evaluators import pair_evaluator
from promptembedder.training.fit import TrainingResult, fit, open_to_training
from promptembedder.training.run_folder import (
    check_folder,
    checkpoint_of,
    note_settings,
    remove_checkpoints,
    run_folder,
)
from promptembedder.training.settings import RunConfig
from promptembedder.training.teacher import teach
from promptembedder.training.warm_start import warm_start

logger = logging.getLogger(__name__)


# Settings of a model that weights do not depend on: a run that starts from a saved one may change them.
MAY_DIFFER = frozenset({"default_instruction", "document_instruction", "max_text_tokens"})


def train(
    config: RunConfig,
    *,
    resume: bool = False,
    start: str | Path | None = None,
    changed: Mapping[str, Any] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> TrainingResult:
    """Train a model, save it to `<output>/model` and score it: build, warm start, `fit`.

    Args:
        config: all settings.
        resume: go on from the newest complete checkpoint in `<output>`, or from the beginning if an interrupted run
            left none.
        start: folder, name or hub id of a saved model to start from. Its settings replace `config.model`, and there
            is no warm start.
        changed: with `start`, settings of the model that replace the saved ones; those of `MAY_DIFFER`.
        callbacks: further ones for the library's trainer, such as those that report elsewhere.

    Raises:
        PromptEmbedderError: bad data or settings; nothing to resume from, or a checkpoint of another model; an
            interrupted or another run in the way; output not writable.
    """
    if changed and start is None:
        raise PromptEmbedderError("`changed` holds settings for a saved model; give `start`, too")
    if start is not None:
        config = replace(config, model=_structure_of(folder_of(start), config, changed or {}))
    settings, output = config.training, Path(config.training.output)
    if not settings.max_steps:
        raise PromptEmbedderError("training.max_steps is 0, expected at least one step")
    check_settings(
        settings, config.model.layout, scored=config.evaluation.dev is not None, texts=bool(config.data.texts)
    )
    check_folder(output, resume)
    data = _rows(config)
    dev, test = (pair_evaluator(config.evaluation, config.data.root, part) for part in ("dev", "test"))
    if data.datasets:
        check_data(settings, data)
    with run_folder(output):
        checkpoint = checkpoint_of(output, resume, config.model)
        more: dict[str, str] = {}
        if settings.teacher is not None:
            default = config.model.default_instruction
            data, more = teach(config.data, settings, data, default, output, resume=checkpoint is not None)
        if checkpoint is not None:
            note_settings(output, config, resumed=True, **more)
        elif (output / "model").exists():
            # What can still be refused leaves a finished run as it is.
            callbacks = [AtFirstStep(partial(_replace_run, output, config, **more)), *callbacks]
        else:
            note_settings(output, config, resumed=False, **more)
        model, spent = _model(config, data, start, fresh=checkpoint is None)
        with workers.stopping_together():
            fitted = fit(
                model,
                data,
                settings,
                evaluator=dev,
                every_steps=config.evaluation.every_steps,
                max_text_tokens=config.data.max_text_tokens,
                checkpoint=checkpoint,
                spent=spent,
                callbacks=callbacks,
            )
            if workers.number() == 0:
                _save(model, output / "model", config, fitted, start)
            scores = dict(fitted.scores)
            with distributed_evaluation(model) as mine:
                if test is not None and mine:
                    scores["test"] = 100 * test(model)["test_spearman_cosine"]
    return replace(fitted, folder=output / "model", scores=scores)


def _replace_run(output: Path, config: RunConfig, **more: str) -> None:
    """Begin in the folder of a finished run."""
    note_settings(output, config, resumed=False, **more)
    remove_checkpoints(output)
    if workers.number() == 0:
        say(f"{output / 'model'} is of an earlier run, and is replaced when this one ends")


def _rows(config: RunConfig) -> TrainingData:
    """The labelled rows; none where a teacher is enough."""
    if config.training.teacher is not None and not config.data.has_rows:
        return TrainingData(DatasetDict(), {})
    return load_training_data(config.data, config.model.document_instruction, config.training.seed)


def _model(
    config: RunConfig, data: TrainingData, start: str | Path | None, *, fresh: bool
) -> tuple[SentenceTransformer, float]:
    """The model that a run starts with, warmed up if it is a fresh one; seconds that took."""
    if start is not None:
        model = load(start, device=workers.device())
        _set_anew(model, config.model)
        return model, 0.0
    model = build(config.model, device=workers.device(), seed=config.training.seed)
    return model, _warm_start(model, config, data) if fresh else 0.0


def _save(
    model: SentenceTransformer, folder: Path, config: RunConfig, fitted: TrainingResult, start: str | Path | None
) -> None:
    """The model, its settings and what its training took."""
    save(model, folder)
    atomic.write_text(folder / "config.yaml", dump_yaml(config))
    write_facts(
        folder,
        trained_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        steps=fitted.steps,
        examples=fitted.examples,
        seconds=fitted.seconds,
        start=None if start is None else str(start),
    )


def _warm_start(model: SentenceTransformer, config: RunConfig, data: TrainingData) -> float:
    """Teach the prompter a cue, where the settings want it; seconds spent."""
    settings, module = config.training, soft_prompt_module(model)
    began = time.perf_counter()
    if settings.train_prompter and settings.warm_start.steps:
        open_to_training(module, settings)
        warm_start(module, aspects_of(config, module, data), settings.warm_start, settings.seed)
    return time.perf_counter() - began


def aspects_of(config: RunConfig, module: SoftPromptTransformer, data: TrainingData) -> dict[str, str | None]:
    """Every instruction of a run, with its aspect where that is known: what the warm start fits on."""
    known = {*data.instructions, config.evaluation.instruction, module.settings.default_instruction}
    return {instruction: data.aspects.get(instruction) for instruction in sorted(known)}


def _structure_of(start: Path, config: RunConfig, changed: Mapping[str, Any]) -> ModelConfig:
    """Settings of the saved model that a run starts from, those of `changed` replaced."""
    if fixed := sorted(set(changed) - MAY_DIFFER):
        raise PromptEmbedderError(
            f"a run from a saved model keeps its {', '.join(fixed)}; these may change: {', '.join(sorted(MAY_DIFFER))}"
        )
    output = Path(config.training.output).resolve()
    if start.resolve().is_relative_to(output):
        raise PromptEmbedderError(f"{start} lies in training.output, where its successor goes; choose another output")
    saved = read_saved(start)
    if saved.instructions is not None:
        raise PromptEmbedderError(f"{start} is an export and has no Prompting LLM; train the model it was made from")
    model = parse(ModelConfig, {**asdict(saved.config), **changed}, where=str(start))
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
