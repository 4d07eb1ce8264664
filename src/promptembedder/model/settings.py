"""What a model is made of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from promptembedder.config import RULES, PositiveFloat, PositiveInt, Retired, retired

Layout = Literal["prefix", "suffix"]
Readout = Literal["last", "mean"]
Precision = Literal["auto", "bfloat16", "float32"]


@dataclass(frozen=True, kw_only=True, config=RULES)
class ModelConfig:
    """What a model is made of; all of it is saved with the model.

    Attributes:
        prompter: Prompting LLM: hub id, folder, .gguf file or short name.
        backbone: Embedding LLM, likewise.
        prompter_revision: hub commit of the prompter.
        backbone_revision: hub commit of the backbone.
        layout: `suffix` (text, soft prompt) or `prefix` (instruction, soft prompt, text).
        readout: `last` or `mean`, over the soft tokens (`suffix`) or the text tokens (`prefix`).
        num_soft_tokens: K, 512 at most; in training each is a forward of the prompter.
        softmax_temperature: divides the prompter's logits before the softmax that mixes its embeddings.
        prompter_training: `lora` keeps the saved model small, `full` trains every weight of the prompter.
        lora_rank: rank of the prompter's LoRA, whose scale is 2 (alpha = 2 x rank).
        alignment_start: `auto` is the identity where the two LLMs are the same, otherwise least squares over shared
            words, scaled to the norm of the backbone's words; `random` is Gaussian.
        dtype: of the frozen weights; `auto` is bfloat16 wherever the hardware computes in it.
        deep_rank: rank of an alignment for every layer of the backbone, whose output is added at the soft positions of
            that layer's input (layout `suffix`); these start at zero. Unset: no deep soft prompt.
        linear_head: a trained square matrix after pooling, started as the identity.
        max_text_tokens: longer texts are truncated.
        max_instruction_tokens: longer instructions are truncated.
        text_template: what the backbone reads as text; `{text}` stands for it.
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
    alignment_start: Literal["auto", "random"] = "auto"
    dtype: Precision = "auto"
    deep_rank: PositiveInt | None = None
    linear_head: bool = False
    max_text_tokens: PositiveInt = 512
    max_instruction_tokens: PositiveInt = 256
    text_template: str = 'This sentence : "{text}"\nThe'
    default_instruction: str = "Represent the meaning of the text."
    document_instruction: str = "Represent the document so that a search finds it."

    RETIRED: ClassVar[Mapping[str, Retired]] = {
        "lora_alpha": Retired(
            lambda alpha, section: alpha == 2 * section.get("lora_rank", 16), "it is always twice lora_rank"
        ),
        "condition_on": retired("instruction", advice="the prompter reads the instruction alone"),
        "text_pass": retired("same", advice="texts are read in the precision of dtype"),
        "backbone_layers": retired(None, advice="all layers are read"),
        "readout_layers": retired([], (), advice="the last layer is read"),
        "deep_soft_prompt": Retired(
            lambda deep, section: not deep or section.get("deep_soft_prompt_rank") is not None,
            "set deep_rank, such as 32, in its place",
        ),
        "deep_soft_prompt_rank": Retired(lambda rank, section: True, "set deep_rank in its place", becomes="deep_rank"),
        "centred": retired(False, advice="a transfer decides it (TransferConfig.centred)"),
        "instruction_guidance": retired(1, 1.0, advice="embeddings are those of the instruction alone"),
        "instruction_template": retired(None, advice="the soft prompt alone carries the instruction"),
    }

    def __post_init__(self) -> None:
        if "\\n" in self.text_template:
            raise ValueError("text_template holds a backslash and an n; a line break needs double quotes in YAML")
        if self.text_template.count("{text}") != 1:
            raise ValueError("text_template must hold {text} exactly once")
        if self.deep_rank is not None and self.layout != "suffix":
            raise ValueError(f"deep_rank needs layout 'suffix', found {self.layout!r}")
