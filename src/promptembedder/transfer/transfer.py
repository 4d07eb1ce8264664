"""Move a trained model to another backbone: the prompter stays, only the alignment `W` is new.

First in closed form from what the vocabularies share; then, if there is something to train on, by training `W` alone:
on plain texts by making the new model's similarities agree with the old one's, on labelled rows, or on one after the
other.

Shapes: P prompter width, D width of the new backbone.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from pydantic import ByteSize
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator
from torch import nn

from promptembedder import atomic, progress
from promptembedder.config import dump_yaml
from promptembedder.data.rows import TrainingData
from promptembedder.errors import PromptEmbedderError
from promptembedder.llms.device import resolve_dtype
from promptembedder.llms.identity import digest
from promptembedder.llms.locate import LocatedModel, locate, peek_config
from promptembedder.llms.state_cache import TextStateCache
from promptembedder.model.fits import random_start
from promptembedder.model.folder import CENTRE
from promptembedder.model.instructions import instruction_for
from promptembedder.model.leaves import TrainingState
from promptembedder.model.module import SoftPromptTransformer, soft_prompt_module
from promptembedder.model.prompter import trained_state
from promptembedder.model.store import save
from promptembedder.training.checkpoints import newest_complete
from promptembedder.training.curves import seconds_of, write_facts
from promptembedder.training.distillation import TEMPERATURE, SimilarityDistillation
from promptembedder.training.fit import fit, text_cache
from promptembedder.training.run_folder import note_settings, remove_checkpoints, run_folder
from promptembedder.training.settings import TrainingConfig
from promptembedder.training.teacher import distillation_rows
from promptembedder.transfer.centring import Sample, centre, sample_of_rows, sample_of_texts
from promptembedder.transfer.checks import (
    TRAINED_STAGES,
    check_memory,
    check_shape,
    check_transfer,
    warn_of_what_stays_behind,
)
from promptembedder.transfer.closed_forms import Start, closed_forms
from promptembedder.transfer.inputs import Inputs
from promptembedder.transfer.rebase import on_backbone
from promptembedder.transfer.report import Stage, TransferResult, write_report
from promptembedder.transfer.settings import TransferConfig

logger = logging.getLogger(__name__)


_MOST_INSTRUCTIONS = 40
_MOST_STATES = 8 * 2**30  # a container may have less memory than the machine says


def transfer(
    model: SentenceTransformer,
    config: TransferConfig,
    *,
    share_prompter: str | Path | None = None,
    resume: bool = False,
) -> TransferResult:
    """Move a trained model to another backbone, save it to `<output>/model` and report on it.

    The prompter's weights are not touched. The two models share one prompter in memory, so what moves, casts or trains
    the prompter of one does so for both; load the saved model for one that shares nothing.

    Args:
        model: the trained model.
        config: all settings; the output folder is `config.training.output`.
        share_prompter: see `promptembedder.save`.
        resume: go on from the newest complete checkpoint of an interrupted transfer with the same settings, or from the
            beginning if there is none.

    Raises:
        PromptEmbedderError: the same backbone again, one that does not fit into memory or shares no vocabulary;
            bad data or settings; nothing to resume, or an interrupted or another transfer in the way.
    """
    old = soft_prompt_module(model)
    output = Path(config.training.output)
    check_transfer(model, config, share_prompter, resume)
    given = Inputs.read(config, instruction_for(model, document=True))
    located = _find_backbone(old, config)  # before there is a folder of the run
    with run_folder(output):
        _begin(old, config, given.drawn, resume)
        # No device is named: the new model goes where the old one is.
        moved = on_backbone(model, located, dtype=config.dtype)
        new = soft_prompt_module(moved)
        warn_of_what_stays_behind(old, config)
        with _flags_kept(new.prompter):
            starts, fitting = _starts(old, new, config, _instructions(model, config, given.rows))
            if starts[0].name == "random" and config.centred is None:
                config = replace(config, centred=False)  # the mean would be that of noise
            sample = _sample(model, config, given)
            with _states_held(new, config.training, again=given.dev is not None or given.rows is not None) as cache:
                starts, centring = _begin_with_best(moved, starts, given.dev, sample, config.data.max_text_tokens)
                name = "random" if starts[0].name == "random" else "closed_form"
                stages = [Stage(name, starts[0].dev, fitting + centring, 0)]
                stages += _train_stages(model, moved, config, given, stages[0], resume, cache)
                scores = {} if stages[-1].dev is None else {"dev": stages[-1].dev}
                if given.test is not None:
                    scores["test"] = 100 * given.test(moved)["test_spearman_cosine"]
        save(moved, output / "model", share_prompter=share_prompter)
        atomic.write_text(output / "model" / "config.yaml", dump_yaml(config))
        _note(moved, stages, output / "model")
        result = TransferResult(moved, output / "model", tuple(stages), tuple(starts), scores)
        write_report(result, output, located.name)
        return result


def _begin(old: SoftPromptTransformer, config: TransferConfig, drawn: list[str], resume: bool) -> None:
    """Write down what a transfer begins with, or refuse to go on with something else."""
    output = Path(config.training.output)
    for stage in () if resume else TRAINED_STAGES:
        remove_checkpoints(output / stage)  # a later `resume` must not find what an earlier transfer left there
    # A model that has learnt since would teach other similarities, or have W aligned with another prompter's words.
    learnt = {**trained_state(old.prompter), **old.alignment.state_dict()}
    if old.centred:
        learnt[CENTRE] = old.centre_E
    sample = hashlib.sha256("\n".join(drawn).encode()).hexdigest()  # how many depends on the steps
    note_settings(output, config, resumed=resume, old_model=digest(learnt), sample_of_texts=sample)


def _find_backbone(old: SoftPromptTransformer, config: TransferConfig) -> LocatedModel:
    """Where the new backbone is; one that does not fit into memory is refused before it is converted."""
    device = old.alignment.weight.device
    dtype = resolve_dtype(config.dtype or old.settings.dtype, device)
    if (peeked := peek_config(config.backbone, config.backbone_revision)) is not None:
        check_memory(config.backbone, peeked, dtype, device)
    located = locate(config.backbone, config.backbone_revision)
    check_shape(located, config)
    return located


@contextmanager
def _flags_kept(prompter: nn.Module) -> Iterator[None]:
    """Leave open to training what was: the two models share the prompter."""
    trained = {parameter: parameter.requires_grad for parameter in prompter.parameters()}
    try:
        yield
    finally:
        for parameter, flag in trained.items():
            parameter.requires_grad_(flag)


def _note(model: SentenceTransformer, stages: list[Stage], folder: Path) -> None:
    """Write what the transfer took beside the model."""
    steps = sum(stage.steps for stage in stages)
    trained = [p for name, p in model.named_parameters() if steps and p.requires_grad and ".prompter." not in name]
    write_facts(
        folder,
        trained_parameters=sum(p.numel() for p in trained),
        steps=steps,
        examples=sum(stage.examples for stage in stages),
        seconds=sum(stage.seconds for stage in stages),
    )


def _starts(
    old: SoftPromptTransformer,
    new: SoftPromptTransformer,
    config: TransferConfig,
    instructions: list[str],
) -> tuple[list[Start], float]:
    """Closed forms, or a random start where there are none and something to train on; seconds it took."""
    begin = time.perf_counter()
    starts = closed_forms(old, new, instructions, only=config.starts)
    if not starts:
        if not config.trains:
            raise PromptEmbedderError(
                f"{config.backbone} shares too few tokens with the prompter for a closed-form start; give rows or "
                "texts, and training.max_steps, to train the alignment on"
            )
        logger.warning("the vocabularies share too little for a closed-form start; W starts at random")
        P, D = new.alignment.weight.shape
        generator = torch.Generator().manual_seed(config.training.seed)
        starts = [Start("random", random_start(P, D, generator), None)]
    return starts, time.perf_counter() - begin


def _train_stages(
    model: SentenceTransformer,
    moved: SentenceTransformer,
    config: TransferConfig,
    given: Inputs,
    start: Stage,
    resume: bool,
    cache: TextStateCache | None,
) -> list[Stage]:
    """The steps with training that the settings want: on plain texts, then on rows."""
    settings = replace(
        config.training,
        train_prompter=False,
        # The closed form is a good start, and Adam's first steps are as long as the later ones, not longer.
        warmup=0.0 if config.training.warmup is None else config.training.warmup,
    )
    stages = [start]
    if given.drawn and settings.max_steps:
        begin = time.perf_counter()
        instructions = config.text_instructions or _instructions(model, config)
        taught = distillation_rows(model, given.drawn, instructions, config.data.max_text_tokens)
        teacher = time.perf_counter() - begin
        on_texts = replace(settings, alignment_learning_rate=config.learning_rate_on_texts)
        stage = _Training("alignment_unlabelled", moved, config, on_texts, resume, given.dev, cache)
        stages.append(stage.run(taught, stages, SimilarityDistillation(moved, TEMPERATURE), teacher))
    if given.rows is not None and settings.max_steps:
        stage = _Training("alignment_labelled", moved, config, settings, resume, given.dev, cache)
        stages.append(stage.run(given.rows, stages))
    return stages[1:]


@dataclass(frozen=True)
class _Training:
    """One stage with training, its checkpoints in a folder of its name."""

    name: str
    model: SentenceTransformer
    config: TransferConfig
    settings: TrainingConfig
    resume: bool
    dev: EmbeddingSimilarityEvaluator | None
    cache: TextStateCache | None

    def run(
        self, data: TrainingData, stages: list[Stage], loss: nn.Module | None = None, preparing: float = 0.0
    ) -> Stage:
        """Train, or leave the model as it was where that was better on dev.

        Args:
            data: rows.
            stages: those before; the curve's times count from the beginning of the first one.
            loss: in place of that of the settings.
            preparing: seconds beside the steps.
        """
        output = Path(self.config.training.output) / self.name
        settings = replace(self.settings, output=str(output))
        checkpoint = newest_complete(output, soft_prompt_module(self.model).settings) if self.resume else None
        if checkpoint is None:
            remove_checkpoints(output)
        before = [(parameter, parameter.detach().clone()) for parameter in _trainable(self.model)]
        fitted = fit(
            self.model,
            data,
            settings,
            loss=loss,
            evaluator=self.dev,
            every_steps=self.config.evaluation.every_steps,
            max_text_tokens=self.config.data.max_text_tokens,
            checkpoint=checkpoint,
            cache=self.cache,
        )
        save(self.model, output / "model")
        dev, was = fitted.scores.get("dev"), stages[-1].dev
        worse = dev is not None and was is not None and dev < was
        if worse:
            logger.warning("%s: dev fell from %.2f to %.2f, so the weights before it are kept", self.name, was, dev)
            with torch.no_grad():
                for parameter, value in before:
                    parameter.copy_(value)
            dev = was
        examples, seconds = (sum(getattr(stage, of) for stage in stages) for of in ("examples", "seconds"))
        return Stage(
            self.name,
            dev,
            preparing + seconds_of(fitted.history),
            fitted.examples,
            fitted.steps,
            [(examples + seen, at, score) for seen, at, score in fitted.curve(seconds + preparing)],
            kept=not worse,
        )


def _trainable(model: SentenceTransformer) -> list[nn.Parameter]:
    """Every weight that a step may train: all but those of the two LLMs."""
    module = soft_prompt_module(model)
    frozen = {id(p) for p in module.backbone.parameters()}
    frozen |= {id(p) for name, p in module.prompter.named_parameters() if not module.prompter.is_trained(name)}
    return [p for p in model.parameters() if id(p) not in frozen]


def _begin_with_best(
    model: SentenceTransformer, starts: list[Start], dev: Any, sample: Sample, max_text_tokens: int | None
) -> tuple[list[Start], float]:
    """Set the best start: by dev score, or by reconstruction with the mixtures of words before all that are fitted.

    Returns:
        Starts, best first, and the seconds of setting one and reading what embeddings are centred on.
    """
    module = soft_prompt_module(model)
    if dev is None:
        # A mixture of words is not fitted to words, so it has no reconstruction. Where there were dev pairs it was
        # among the best.
        ranked = sorted(starts, key=lambda s: (s.name == "mixture", s.reconstruction or 0.0), reverse=True)
        return ranked, _begin_with(module, ranked[0], sample, max_text_tokens)
    scored, seconds = [], []
    for start in progress.bar(starts, "Closed forms"):
        seconds.append(_begin_with(module, start, sample, max_text_tokens))
        scored.append(replace(start, dev=100 * dev(model)["dev_spearman_cosine"]))
    ranked = sorted(scored, key=lambda s: s.dev if s.dev is not None and s.dev == s.dev else -1e9, reverse=True)
    _begin_with(module, ranked[0], sample, max_text_tokens)
    return ranked, seconds[0]  # the later ones find the sample's states


@contextmanager
def _states_held(
    module: SoftPromptTransformer, settings: TrainingConfig, *, again: bool
) -> Iterator[TextStateCache | None]:
    """While inside, a text whose states are held is not read again, for whatever start, step or score.

    In layout `suffix` only, where a text's states depend on nothing that is trained.

    Args:
        module: the new model's.
        settings: say what may be held; where they do not, it is some of the memory.
        again: whether texts come up more than once; if not, nothing is held that the settings do not want held.
    """
    budget = settings.text_state_cache
    if budget is None and again:
        budget = ByteSize(min(psutil.virtual_memory().available // 3, _MOST_STATES))
    cache = None
    if module.settings.layout == "suffix" and budget:
        cache = text_cache(module, replace(settings, text_state_cache=budget))
    try:
        with module.in_training(TrainingState(text_cache=cache)):
            yield cache
    finally:
        if cache is not None:
            cache.close()


def _begin_with(module: SoftPromptTransformer, start: Start, sample: Sample, max_text_tokens: int | None) -> float:
    """Set W, and what is subtracted from embeddings made with it; seconds it took."""
    begin = time.perf_counter()
    with torch.no_grad():
        module.alignment.weight.copy_(start.weight_PD)
    if sample:
        centre(module, sample, max_text_tokens)
    return time.perf_counter() - begin


def _sample(old: SentenceTransformer, config: TransferConfig, given: Inputs) -> Sample:
    """Texts to centre embeddings on: plain ones where there are some, as they are likelier the user's own."""
    if not config.centres:
        return []
    if given.rows is None or given.texts:
        return sample_of_texts(
            given.texts, config.text_instructions or _instructions(old, config), config.training.seed
        )
    return sample_of_rows(given.rows, config.training.seed)


def _instructions(old: SentenceTransformer, config: TransferConfig, rows: TrainingData | None = None) -> list[str]:
    """Those that matter in this transfer: of the rows or texts, the evaluation and the model."""
    scored = config.evaluation.dev or config.evaluation.test
    named = [*config.text_instructions, config.evaluation.instruction if scored else None]
    named += [instruction_for(old), instruction_for(old, document=True)]
    named += [] if rows is None else rows.instructions
    return list(dict.fromkeys(text for text in named if text))[:_MOST_INSTRUCTIONS]
