"""Settings: frozen dataclasses, YAML in and out, any of them overridable as `section.name=value`.

Every default lives here and nowhere else. `None` means unset.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import ByteSize, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from promptembedder.errors import PromptEmbedderError

_RULES = ConfigDict(extra="forbid", str_min_length=1, allow_inf_nan=False)

PositiveInt = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Layout = Literal["prefix", "suffix"]
Readout = Literal["last", "mean"]
Precision = Literal["auto", "bfloat16", "float32"]

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, config=_RULES)
class ModelConfig:
    """What a model is made of; all of it is saved with the model.

    Attributes:
        prompter: Prompting LLM: short name, folder, .gguf file or hub id.
        backbone: Embedding LLM, likewise.
        prompter_revision: hub commit of the prompter.
        backbone_revision: hub commit of the backbone.
        layout: `suffix` (text, soft prompt) or `prefix` (instruction, soft prompt, text).
        readout: `last` or `mean`, over the soft tokens (`suffix`) or the text tokens (`prefix`).
        num_soft_tokens: K, 512 at most; each is a forward of the prompter.
        softmax_temperature: divides the prompter's logits before the softmax that mixes its embeddings.
        prompter_training: `lora` keeps the saved model small, `full` trains every weight of the prompter.
        lora_rank: rank of the prompter's LoRA.
        lora_alpha: LoRA scale is alpha / rank.
        alignment_start: `auto` is identity where the two LLMs are the same, otherwise least squares over shared words,
            scaled so that they come out as long as the backbone's.
        condition_on: what the prompter reads; with `instruction_and_text` there is one soft prompt per text.
        dtype: of the frozen weights; `auto` is bfloat16 wherever the hardware computes in it.
        text_pass: `int8` reads texts in dynamic int8 (layout `suffix`, CPU): faster, but docs/performance.md says what
            it loses.
        backbone_layers: read with the first so many layers of the backbone only, which also saves time; unset: all.
        readout_layers: hidden states after these layers, counted from 1, are averaged with the last one into the
            embedding, each through the backbone's last norm.
        deep_soft_prompt: add an alignment per layer, whose output is added at the soft positions of that layer's
            input (layout `suffix`); these start at zero.
        deep_soft_prompt_rank: of these alignments, which are then products of two thin matrices; unset: whole.
        linear_head: a trained square matrix after pooling, started as the identity.
        centred: subtract from embeddings, before any linear head, their mean over some training texts, found once
            before the first step (`promptembedder.centring`).
        instruction_guidance: above 1, embeddings are moved away from what they are under `default_instruction`, so that
            what the instruction asks for counts more (`SoftPromptTransformer.embeddings`); documents under
            `document_instruction` are not. Costs K more tokens a text in layout `suffix`, a second pass over the text
            in `prefix`.
        max_text_tokens: longer texts are cut.
        max_instruction_tokens: longer instructions (and texts the prompter reads) are cut.
        text_template: what the backbone reads as text; `{text}` stands for it.
        instruction_template: layout `suffix`: what the backbone reads between text and soft prompt, `{instruction}` in
            it, such as ` {instruction} This sentence`; unset: the soft prompt alone carries the instruction.
        default_instruction: used where none is given.
        document_instruction: used for the document side (`encode_document`) where none is given.
    """

    prompter: str = "smollm2-135m-instruct"
    backbone: str = "smollm2-135m-instruct"
    prompter_revision: str | None = None
    backbone_revision: str | None = None
    layout: Layout = "suffix"
    readout: Readout = "last"
    num_soft_tokens: Annotated[int, Field(ge=1, le=512)] = 5
    softmax_temperature: PositiveFloat = 1.0
    prompter_training: Literal["lora", "full"] = "lora"
    lora_rank: PositiveInt = 16
    lora_alpha: PositiveInt = 32
    alignment_start: Literal["auto", "identity", "least_squares", "random"] = "auto"
    condition_on: Literal["instruction", "instruction_and_text"] = "instruction"
    dtype: Precision = "auto"
    text_pass: Literal["same", "int8"] = "same"
    backbone_layers: PositiveInt | None = None
    readout_layers: tuple[PositiveInt, ...] = ()
    deep_soft_prompt: bool = False
    deep_soft_prompt_rank: PositiveInt | None = None
    linear_head: bool = False
    centred: bool = False
    instruction_guidance: Annotated[float, Field(ge=1)] = 1.0
    max_text_tokens: PositiveInt = 512
    max_instruction_tokens: PositiveInt = 256
    text_template: str = 'This sentence : "{text}"\nThe'
    instruction_template: str | None = None
    default_instruction: str = "Represent the meaning of the text."
    document_instruction: str = "Represent the document so that a search finds it."

    def __post_init__(self) -> None:
        for name in ("text_template", "instruction_template"):
            if "\\n" in (getattr(self, name) or ""):
                raise ValueError(f"{name} holds a backslash and an n; a line break needs double quotes in YAML")
        if self.text_template.count("{text}") != 1:
            raise ValueError("text_template must hold {text} exactly once")
        if self.instruction_template is not None:
            if self.layout != "suffix":
                raise ValueError(f"instruction_template needs layout 'suffix', found {self.layout!r}")
            if self.instruction_template.count("{instruction}") != 1:
                raise ValueError("instruction_template must hold {instruction} exactly once")
        if self.text_pass == "int8" and self.layout != "suffix":
            raise ValueError(f"text_pass 'int8' needs layout 'suffix', found {self.layout!r}")
        if self.deep_soft_prompt and self.layout != "suffix":
            raise ValueError(f"deep_soft_prompt needs layout 'suffix', found {self.layout!r}")
        if len(set(self.readout_layers)) < len(self.readout_layers):
            raise ValueError(f"readout_layers names a layer twice: {list(self.readout_layers)}")
        if self.instruction_guidance > 1 and self.condition_on != "instruction":
            raise ValueError(f"instruction_guidance needs condition_on 'instruction', found {self.condition_on!r}")
        if self.deep_soft_prompt_rank is not None and not self.deep_soft_prompt:
            raise ValueError("deep_soft_prompt_rank needs deep_soft_prompt")


@dataclass(frozen=True, kw_only=True, config=_RULES)
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


@dataclass(frozen=True, kw_only=True, config=_RULES)
class DataFile:
    """One source of training rows.

    Attributes:
        path: .jsonl, .jsonl.gz, .parquet, or `hub:owner/name` (split `train`).
        weight: how often its batches are drawn relative to its size.
        instruction: for rows without one.
        asymmetric: documents (`pos`, `neg`) get the model's document instruction, not the row's.
        max_rows: use the first so many, in file order.
        aspect: one word for what texts are alike in under the instruction, such as `intent`; see `WarmStartConfig`.
        in_batch_negatives: a row's candidates are all documents of its batch; off: its own positive and negatives
            alone, for rows of so few classes that many of the others are as right. Each row needs a `neg` then, and
            `TrainingConfig.loss` is not the cached one.
    """

    path: str
    weight: PositiveFloat = 1.0
    instruction: str | None = None
    asymmetric: bool = False
    max_rows: PositiveInt | None = None
    aspect: str | None = None
    in_batch_negatives: bool = True


@dataclass(frozen=True, kw_only=True, config=_RULES)
class DataConfig:
    """Training rows.

    Attributes:
        root: folder that relative paths start from; unset: `$PROMPTEMBEDDER_DATA`, else the current folder.
        files: the sources; batches never mix instructions.
        contrast_rows: so many made-up rows more, in which the instruction alone decides what is alike
            (`promptembedder.contrast`); they always have a hard negative. They come in twos, one anchor under two
            instructions in one batch, so a batch holds twice as many; an odd one is left out. About 70 instructions
            share them.
        contrast_in_batch_negatives: as `DataFile.in_batch_negatives`, of the made-up rows.
        max_negatives: hard negatives used per row, at least one where in-batch negatives are off; with them a row that
            has fewer repeats its own.
        max_text_tokens: cut texts here while training; unset: where the model cuts them. Cheaper steps, and layout
            `suffix` reads longer texts afterwards all the same.
    """

    files: tuple[DataFile, ...] = ()
    root: str | None = None
    contrast_rows: Count = 0
    contrast_in_batch_negatives: bool = True
    max_negatives: Count = 1
    max_text_tokens: PositiveInt | None = None

    @property
    def has_rows(self) -> bool:
        """Whether there is anything to train on."""
        return bool(self.files or self.contrast_rows)


@dataclass(frozen=True, kw_only=True, config=_RULES)
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


@dataclass(frozen=True, kw_only=True, config=_RULES)
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


@dataclass(frozen=True, kw_only=True, config=_RULES)
class RunConfig:
    """Everything `promptembedder train` reads; saved as `config.yaml` with the model."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)


@dataclass(frozen=True, kw_only=True, config=_RULES)
class TransferConfig:
    """How a trained model moves to another backbone.

    Attributes:
        backbone: the new Embedding LLM: short name, folder, .gguf file or hub id.
        backbone_revision: hub commit of it.
        dtype: of its weights; unset: as the old model's.
        backbone_layers: of it, from the input; unset: all, whatever the old model reads.
        starts: closed-form alignments to choose from, by name; empty: all that there are.
        data: labelled rows to train the alignment on; no files: none.
        texts: files of plain texts, on which the new model learns to agree with the old one, before any rows.
        text_instructions: under which they are read; empty: the evaluation's, if there is one, the model's default
            one and that of its documents.
        max_texts: train on so many of them at most, and no more than the steps take.
        distillation_temperature: of both softmaxes over in-batch similarities.
        distillation_learning_rate: of W and whatever else is trained with it, on texts. Unset: as on rows
            (`training.alignment_learning_rate`), and a quarter of it where embeddings are centred. Scaled as that one.
        training: steps, batch and learning rate of the alignment; the prompter stays as it is.
        centred: subtract from the new model's embeddings their mean over some of the texts or rows
            (`ModelConfig.centred`). Unset: where there are some and no row is trained on. The closed form is better
            with it and so is W on plain texts, W on rows is not (docs/research-log.md).
        unfrozen_steps: steps with the prompter open too, after the alignment's.
        evaluation: dev pairs to choose and report by; test pairs for the last figure.
    """

    backbone: str
    backbone_revision: str | None = None
    dtype: Precision | None = None
    backbone_layers: PositiveInt | None = None
    starts: tuple[str, ...] = ()
    data: DataConfig = field(default_factory=DataConfig)
    texts: tuple[str, ...] = ()
    text_instructions: tuple[str, ...] = ()
    max_texts: PositiveInt = 4096
    distillation_temperature: PositiveFloat = 0.05
    distillation_learning_rate: PositiveFloat | None = None
    training: TrainingConfig = field(default_factory=lambda: TrainingConfig(output="runs/transfer"))
    centred: bool | None = None
    unfrozen_steps: Count = 0
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    @property
    def has_data(self) -> bool:
        """Whether there are rows or texts."""
        return self.data.has_rows or bool(self.texts)

    @property
    def trains(self) -> bool:
        """Whether anything is trained, not only fitted in closed form."""
        return (self.training.max_steps > 0 and self.has_data) or (self.unfrozen_steps > 0 and self.data.has_rows)

    @property
    def centres(self) -> bool:
        """Whether embeddings are centred."""
        trains_on_rows = self.data.has_rows and self.trains
        return self.has_data and (not trains_on_rows if self.centred is None else self.centred)

    @property
    def learning_rate_on_texts(self) -> float:
        """`distillation_learning_rate`, or what it is where it is unset."""
        on_rows = self.training.alignment_learning_rate
        return self.distillation_learning_rate or (on_rows / 4 if self.centres else on_rows)


def parse(kind: type[T], settings: Mapping[str, Any], where: str) -> T:
    """Check settings and build the dataclass `kind`.

    Raises:
        PromptEmbedderError: unknown name, wrong type or value; names the field, the value and what is valid.
    """
    try:
        return TypeAdapter(kind).validate_python(dict(settings))
    except ValidationError as error:
        raise PromptEmbedderError(f"{where}: {_one_line(error, kind)}") from None


def parse_settings(kind: type[T], settings: Mapping[str, Any], overrides: Sequence[str], where: str) -> T:
    """As `parse`, after `section.name=value` overrides."""
    return parse(kind, _overridden(settings, overrides), where=where)


def load_run(path: Path, overrides: Sequence[str] = (), root: str | None = None) -> RunConfig:
    """Read a YAML file and apply `section.name=value` overrides; `root` replaces `data.root`, taken as it is.

    Raises:
        PromptEmbedderError: file missing or not YAML, unknown or invalid setting.
    """
    # A section with nothing in it is a section of defaults.
    settings = {name: {} if value is None else value for name, value in read_yaml(path).items()}
    settings = _overridden(settings, overrides)
    if root is not None and isinstance(settings.get("data", {}), dict):
        settings["data"] = {**settings.get("data", {}), "root": root}
    return parse(RunConfig, settings, where=str(path))


def given_names(path: Path, overrides: Sequence[str], section: str) -> set[str]:
    """Names of a section's settings that a YAML file or an override gives, whatever the value."""
    return set(_overridden(read_yaml(path), overrides).get(section) or {})


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file of sections, nothing checked but that.

    Raises:
        PromptEmbedderError: file missing or not YAML.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PromptEmbedderError(
            f"config {path} cannot be read: {getattr(error, 'strerror', None) or error}"
        ) from None
    try:
        settings = yaml.safe_load(text) or {}
    except (yaml.YAMLError, ValueError) as error:  # the second: a date that is none
        raise PromptEmbedderError(f"config {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict):
        raise PromptEmbedderError(f"config {path} must be a mapping of sections, found {type(settings).__name__}")
    return settings


def dump_yaml(config: Any) -> str:
    """The settings as YAML that `load_run` reads back to an equal object."""
    return yaml.safe_dump(json.loads(json.dumps(asdict(config))), sort_keys=False, allow_unicode=True)


def _overridden(settings: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    result: dict[str, Any] = copy.deepcopy(dict(settings))
    for override in overrides:
        name, equals, value = override.partition("=")
        if not equals or not name:
            raise PromptEmbedderError(f"override {override!r} must look like section.name=value")
        *sections, last = name.split(".")
        place = result
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise PromptEmbedderError(f"override {override!r}: {section!r} is not a section")
        place[last] = _value(value)
    return result


def _value(text: str) -> Any:
    """What the command line gives, read as YAML; a sentence stays one where YAML sees a mapping or a comment in it."""
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):
        return text
    if isinstance(value, dict) and (not text.lstrip().startswith("{") or all(v is None for v in value.values())):
        return text  # "Topic: which?", "{text}"
    return text if isinstance(value, str) and " #" in text and " #" not in value else value


def _one_line(error: ValidationError, kind: type) -> str:
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"]) or kind.__name__
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        valid = ", ".join(_valid_names(kind, first["loc"][:-1]))
        return f"unknown setting {place!r}; valid here: {valid}{more}"
    return f"{place} = {first['input']!r}: {first['msg']}{more}"


def _valid_names(kind: Any, path: Sequence[int | str]) -> list[str]:
    for part in path:
        if isinstance(part, int):
            continue
        annotation = next((f.type for f in fields(kind) if f.name == part), None)
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        named = [c if is_dataclass(c) else globals().get(str(c).strip("'")) for c in candidates]
        named += [DataFile] if part == "files" else []
        kind = next((c for c in named if is_dataclass(c)), kind)
    return [f.name for f in fields(kind)]
