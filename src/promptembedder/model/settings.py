"""What a model is made of."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from promptembedder.config import RULES, PositiveFloat, PositiveInt

Layout = Literal["prefix", "suffix"]
Readout = Literal["last", "mean"]
Precision = Literal["auto", "bfloat16", "float32"]


@dataclass(frozen=True, kw_only=True, config=RULES)
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
