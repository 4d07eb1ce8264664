"""How to train, and what to score on the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ByteSize, Field
from pydantic.dataclasses import dataclass

from promptembedder.config import (
    RULES,
    Count,
    Fraction,
    Place,
    PositiveFloat,
    PositiveInt,
    Retired,
    overridden,
    parse,
    read_yaml,
    retired,
)
from promptembedder.data.settings import DataConfig
from promptembedder.model.settings import ModelConfig


@dataclass(frozen=True, kw_only=True, config=RULES)
class WarmStartConfig:
    """Fit the prompter to write a known good cue before contrastive training; no backbone pass is needed.

    Attributes:
        steps: optimizer steps at most; 0 leaves the warm start out.
        cue: its last K tokens are the target. With `{aspect}` among them, what texts are to be alike in under the
            instruction (`DataFile.aspect`) stands there.
        learning_rate: of the prompter, AdamW.
        target_probability: stop once every cue token has this weight in its mixture for some steps on end. Below 1,
            because a saturated softmax passes no gradient on to the contrastive training.
    """

    steps: Count = 120
    cue: str = 'said in a few short words, and as clearly as one can, the {aspect} in one word:"'
    learning_rate: PositiveFloat = 5e-4
    target_probability: Annotated[float, Field(gt=0, lt=1)] = 0.9


@dataclass(frozen=True, kw_only=True, config=RULES)
class EvaluationConfig:
    """Scored sentence pairs (`sentence1`, `sentence2`, `score`) to follow during training and to end on.

    Attributes:
        dev: file for checkpoints and early stop.
        dev_pairs: use this many of dev's pairs, evenly spread; unset: all.
        test: file for the figure printed last.
        instruction: under which both sentences are embedded.
        every_steps: how often dev is scored.
        batch_size: texts per forward.
    """

    dev: str | None = None
    dev_pairs: PositiveInt | None = None
    test: str | None = None
    instruction: str = "Retrieve sentences that mean the same as the given sentence."
    every_steps: PositiveInt = 50
    batch_size: PositiveInt = 64


@dataclass(frozen=True, kw_only=True, config=RULES)
class TrainingConfig:
    """How to train.

    Attributes:
        output: folder of the run: checkpoints, logs and, in `model/`, the result.
        max_steps: optimizer steps; 0, in a transfer alone, trains nothing.
        batch_size: pairs per forward (made-up rows: twos); with `gradient_accumulation` G, G times as many per
            optimizer step.
        gradient_accumulation: forwards per optimizer step.
        prompter_learning_rate: of the prompter's LLM, AdamW.
        alignment_learning_rate: of all other trained matrices (W, deep soft prompt, linear head), AdamW.
        warmup: share of the steps with rising learning rate; unset: a tenth, and none where a transfer trains W alone,
            which starts well.
        temperature: of InfoNCE.
        loss: `infonce`, or `cached_infonce` (gradient cache: large batches in the memory of small ones).
        mini_batch_size: of the gradient cache.
        matryoshka_dims: also train prefixes of the embedding of these widths.
        mask_false_negatives: leave out negatives that the model itself finds closer to the anchor than its
            positive (GISTEmbed with the model as its own guide).
        train_prompter: off: only W is trained.
        prompter_steps: the prompter is trained in this many steps, and frozen afterwards: cheaper steps; unset: in all.
        teacher: an embedding model whose in-batch similarities of `data.texts` and of the rows' texts are learnt beside
            the rows: a saved model, or a sentence-transformers folder or hub id.
        teacher_instructions: under which; empty: those of rows whose aspect is `meaning`, or else the default one.
        teacher_share: share of the batches that are the teacher's, where there are rows, too.
        warm_start: see `WarmStartConfig`.
        early_stop_patience: stop after this many dev scores without a better one.
        text_state_cache: keep the backbone's states of texts, at most this many bytes (`8GiB`) over all workers of
            a machine, so that a text seen again is not read again (layout `suffix`); unset: off, in
            a transfer with rows or dev pairs a third of the free memory, 8 GiB at most.
        text_state_folder: keep them here, from run to run; unset: in memory.
        text_state_precision: of what is kept; `same` changes nothing, `bfloat16` and `int8` are smaller.
        seed: of everything drawn.
        arguments: further arguments of the library's trainer by its own names, such as `weight_decay`,
            `lr_scheduler_type`, `max_grad_norm`, `logging_steps`, `save_steps` or `save_total_limit`
            (`SentenceTransformerTrainingArguments`). Those that have a setting here, or that training decides itself,
            are refused.
    """

    output: Place = "runs/model"
    max_steps: Count = 200
    batch_size: Annotated[int, Field(ge=2)] = 48
    gradient_accumulation: PositiveInt = 1
    prompter_learning_rate: PositiveFloat = 2e-5
    alignment_learning_rate: PositiveFloat = 1e-3
    warmup: Fraction | None = None
    temperature: PositiveFloat = 0.05
    loss: Literal["infonce", "cached_infonce"] = "infonce"
    mini_batch_size: PositiveInt = 32
    matryoshka_dims: tuple[PositiveInt, ...] = ()
    mask_false_negatives: bool = False
    train_prompter: bool = True
    prompter_steps: Count | None = None
    teacher: str | None = None
    teacher_instructions: tuple[str, ...] = ()
    teacher_share: Fraction = 0.5
    warm_start: WarmStartConfig = field(default_factory=WarmStartConfig)
    early_stop_patience: PositiveInt | None = None
    text_state_cache: Annotated[ByteSize, Field(gt=0)] | None = None
    text_state_folder: Place | None = None
    text_state_precision: Literal["same", "bfloat16", "int8"] = "same"
    seed: int = 13
    arguments: dict[str, Any] = field(default_factory=dict)

    RETIRED: ClassVar[Mapping[str, Retired]] = {
        "scale_alignment_rate": retired(True, advice="the rate of W is always scaled by the size of the LLMs' words"),
        "soft_prompt_leaf": retired(True, advice="the prompter always runs once per instruction and step"),
        "train_alignment": retired(True, advice="W is always trained"),
        "softmax_temperature_start": retired(None, advice="the temperature is fixed (model.softmax_temperature)"),
        "schedule": retired("linear", advice="set training.arguments.lr_scheduler_type"),
        "weight_decay": retired(0, 0.0, advice="set training.arguments.weight_decay"),
        "max_grad_norm": retired(1, 1.0, advice="set training.arguments.max_grad_norm"),
        "logging_steps": retired(5, advice="set training.arguments.logging_steps"),
        "keep_checkpoints": retired(2, advice="set training.arguments.save_total_limit"),
        "save_every_steps": retired(None, advice="set training.arguments.save_steps"),
    }

    @property
    def warmup_share(self) -> float:
        """`warmup`, a tenth where it is unset."""
        return 0.1 if self.warmup is None else self.warmup


@dataclass(frozen=True, kw_only=True, config=RULES)
class RunConfig:
    """Everything `promptembedder train` reads; saved as `config.yaml` with the model."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)


def load_run(path: Path, overrides: Sequence[str] = (), root: str | None = None) -> RunConfig:
    """Read a YAML file and apply `section.name=value` overrides; `root` replaces `data.root`, taken as it is.

    Raises:
        PromptEmbedderError: file missing or not YAML, unknown or invalid setting.
    """
    # A section with nothing in it is a section of defaults.
    settings = {name: {} if value is None else value for name, value in read_yaml(path).items()}
    settings = overridden(settings, overrides)
    if root is not None and isinstance(settings.get("data", {}), dict):
        settings["data"] = {**settings.get("data", {}), "root": root}
    return parse(RunConfig, settings, where=str(path))


def given_names(path: Path, overrides: Sequence[str], section: str) -> set[str]:
    """Names of a section's settings that a YAML file or an override gives, whatever the value."""
    return set(overridden(read_yaml(path), overrides).get(section) or {})
