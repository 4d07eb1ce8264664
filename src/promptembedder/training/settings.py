"""How to train, and what to score on the way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import ByteSize, Field
from pydantic.dataclasses import dataclass

from promptembedder.config import RULES, Count, Fraction, PositiveFloat, PositiveInt, overridden, parse, read_yaml
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
        dev_pairs: use so many of dev's pairs, evenly spread; unset: all.
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
        scale_alignment_rate: multiply W's and the deep soft prompt's by a power of two, so that a step is as long,
            measured by the backbone's words, as with SmolLM2-135M for both (`alignment.rate_factor`); off: as given.
        weight_decay: AdamW, on matrices.
        warmup: share of the steps with rising learning rate; unset: a tenth, and none where a transfer trains W alone,
            which starts well.
        schedule: what follows the rise.
        max_grad_norm: gradients are clipped to this norm.
        softmax_temperature_start: anneal the prompter's softmax: its temperature falls (or rises) evenly from this
            one to the model's over the steps; dev is scored at the model's. Unset: fixed.
        temperature: of InfoNCE.
        loss: `infonce`, or `cached_infonce` (gradient cache: large batches in the memory of small ones).
        mini_batch_size: of the gradient cache.
        matryoshka_dims: also train prefixes of the embedding of these widths.
        mask_false_negatives: leave out negatives that the model itself finds closer to the anchor than its
            positive (GISTEmbed with the model as its own guide).
        train_prompter: off: only W is trained.
        train_alignment: off: W stays as it starts. From an identity the soft prompt then stays a mixture of the
            backbone's own words, which carries over to other backbones best.
        warm_start: see `WarmStartConfig`.
        early_stop_patience: stop after so many dev scores without a better one.
        save_every_steps: checkpoint distance; with dev pairs checkpoints come with their scores instead.
        keep_checkpoints: older ones are deleted.
        logging_steps: distance of log lines.
        soft_prompt_leaf: run the prompter once per instruction and step; off: once per forward, with the same
            gradients.
        text_state_cache: keep the backbone's states of texts, so many bytes (`8GiB`) at most over all workers of
            a machine, so that a text seen again is not read again (layout `suffix`); unset: off, in
            a transfer with rows or dev pairs a third of the free memory, 8 GiB at most.
        text_state_folder: keep them here, from run to run; unset: in memory.
        text_state_precision: of what is kept; `same` changes nothing, `bfloat16` and `int8` are smaller.
        seed: of everything drawn.
    """

    output: str = "runs/model"
    max_steps: Count = 200
    batch_size: Annotated[int, Field(ge=2)] = 48
    gradient_accumulation: PositiveInt = 1
    prompter_learning_rate: PositiveFloat = 2e-5
    alignment_learning_rate: PositiveFloat = 1e-3
    scale_alignment_rate: bool = True
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    warmup: Fraction | None = None
    schedule: Literal["linear", "cosine", "constant_with_warmup"] = "linear"
    max_grad_norm: PositiveFloat = 1.0
    softmax_temperature_start: PositiveFloat | None = None
    temperature: PositiveFloat = 0.05
    loss: Literal["infonce", "cached_infonce"] = "infonce"
    mini_batch_size: PositiveInt = 32
    matryoshka_dims: tuple[PositiveInt, ...] = ()
    mask_false_negatives: bool = False
    train_prompter: bool = True
    train_alignment: bool = True
    warm_start: WarmStartConfig = field(default_factory=WarmStartConfig)
    early_stop_patience: PositiveInt | None = None
    save_every_steps: PositiveInt | None = None
    keep_checkpoints: PositiveInt = 2
    logging_steps: PositiveInt = 5
    soft_prompt_leaf: bool = True
    text_state_cache: Annotated[ByteSize, Field(gt=0)] | None = None
    text_state_folder: str | None = None
    text_state_precision: Literal["same", "bfloat16", "int8"] = "same"
    seed: int = 13

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
