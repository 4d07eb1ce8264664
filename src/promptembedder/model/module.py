"""The product's heart: an input module of sentence-transformers whose prompt is an instruction for a Prompting LLM.

Prompter, alignment and backbone know nothing of each other; here they become one.

Shapes: B texts, T text tokens, S request tokens, I instruction tokens, K soft tokens, D backbone width, R rows of a
soft prompt: K, and K more for each layer of the backbone where it is deep.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from cachetools import LRUCache
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.model import BaseModel
from sentence_transformers.base.modules import InputModule
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedTokenizerBase

from promptembedder.config import parse
from promptembedder.errors import PromptEmbedderError
from promptembedder.llms.tokens import opening_ids, plain_ids
from promptembedder.model.alignment import Alignment
from promptembedder.model.backbone import Backbone, Embedder
from promptembedder.model.folder import (
    ALIGNMENT_FILE,
    CENTRE,
    CONFIG_FILE,
    FORMAT_VERSION,
    PROMPTER_FOLDER,
    PROMPTER_WEIGHTS,
    BaseModels,
    folder_of,
)
from promptembedder.model.leaves import SoftPromptLeaves
from promptembedder.model.prompter import Prompter, SoftTokens, trained_state
from promptembedder.model.settings import ModelConfig
from promptembedder.text import check_text

logger = logging.getLogger(__name__)


# Soft prompts remembered at inference: thousands, or, at 31 x 5 x 576 floats of a deep one, some 180.
_REMEMBERED_BYTES = 64 * 2**20


def default_prompts(settings: ModelConfig) -> dict[str, str]:
    """What `prompt_name` stands for; the library's own are empty, which would be the queries' for documents, too."""
    return {"query": settings.default_instruction, "document": settings.document_instruction}


def _memory() -> LRUCache[str, Tensor]:
    return LRUCache(_REMEMBERED_BYTES, getsizeof=lambda soft_1RD: soft_1RD.nbytes)


class SoftPromptTransformer(InputModule):
    """Text and instruction to a sentence embedding, through a soft prompt that another LLM writes.

    Used as the first module of a plain `SentenceTransformer`; `promptembedder.build` and `load` make one.

    Args:
        prompter: writes soft tokens for an instruction.
        alignment: maps them into the backbone's input space.
        backbone: the frozen LLM that reads text and soft prompt.
        tokenizer: the backbone's.
        config: the model's settings.
        base_models: identity of the two LLMs.

    Raises:
        PromptEmbedderError: the settings allow longer texts than the backbone reads.
    """

    save_in_root = True

    def __init__(
        self,
        prompter: Prompter,
        alignment: Alignment,
        backbone: Backbone,
        tokenizer: PreTrainedTokenizerBase,
        config: ModelConfig,
        base_models: BaseModels,
    ) -> None:
        super().__init__()
        # First, because sentence-transformers casts the modules after this one to the dtype of its first parameter, and
        # embeddings are float32 whatever the LLMs run in.
        self.alignment = alignment
        self.prompter = prompter
        self.backbone = backbone
        self.tokenizer = tokenizer
        self.settings = config
        self.base_models = base_models
        self.centre_E: Tensor
        self.register_buffer("centre_E", torch.zeros(backbone.width))
        self.leaves: SoftPromptLeaves | None = None
        self.training_text_tokens: int | None = None
        self._remembered = _memory()
        self._remembering = threading.RLock()  # servers encode in several threads
        self._remembered_for: Tensor | None = None
        self._said_truncated = False
        head, tail = config.text_template.split("{text}")
        # What opens a sequence goes before the first words: in layout `prefix` these are the instruction's.
        opening = opening_ids(tokenizer)
        self._opening_ids = opening if config.layout == "prefix" else []
        self._head_ids = [*([] if config.layout == "prefix" else opening), *plain_ids(self.tokenizer, head)]
        self._tail_ids = plain_ids(self.tokenizer, tail)
        backbone.check_room(config.max_text_tokens, self._beside_texts)

    def on_model_ready(self, model: BaseModel) -> None:
        """Give `prompt_name` the model's two instructions, where the saved ones are empty (sentence-transformers)."""
        for name, instruction in default_prompts(self.settings).items():
            model.prompts[name] = model.prompts.get(name) or instruction

    # -- texts and instructions to features ---------------------------------------------------------------------

    def preprocess(
        self, inputs: Sequence[Any], prompt: str | None = None, task: str | None = None, **unknown: Any
    ) -> dict[str, Any]:
        """Tokenise texts and put the instruction beside them.

        Args:
            inputs: texts; each a non-empty string.
            prompt: the instruction; unset or empty: the model's default, or its document instruction when
                `task` is `document`.
            task: `query`, `document` or unset, as sentence-transformers hands it over.
            **unknown: refused, so that a misspelt argument is not lost.

        Returns:
            `input_ids` and `attention_mask`, (B, T), right padded; `instruction`, a string; with texts in the
            prompter's reach also `request_ids` and `request_mask`, (B, 1, S).

        Raises:
            PromptEmbedderError: a text that is empty or no string, an unknown argument.
        """
        if unknown.pop("processing_kwargs", None):
            raise PromptEmbedderError("processing_kwargs are not taken; model.max_seq_length sets how much is read")
        if unknown:
            raise PromptEmbedderError(f"unknown arguments {sorted(unknown)}; valid: prompt, task")
        default = self.settings.document_instruction if task == "document" else self.settings.default_instruction
        instruction = prompt or default
        rows = [self._text_ids(text, n) for n, text in enumerate(inputs)]
        features: dict[str, Any] = self._padded(rows)
        features["instruction"] = instruction
        if self.settings.condition_on == "instruction_and_text":
            requests = [f"{instruction}\n\nText: {text}" for text in inputs]
            ids_BS, mask_BS = self.prompter.tokenize(requests)
            # The extra dimension keeps losses that trim padding columns (gradient cache) off these.
            features["request_ids"], features["request_mask"] = ids_BS[:, None], mask_BS[:, None]
        return features

    @contextmanager
    def cutting_texts(self, limit: int | None) -> Iterator[None]:
        """While inside, texts are cut at so many tokens, if that is fewer than the model reads."""
        before, self.training_text_tokens = self.training_text_tokens, limit
        try:
            yield
        finally:
            self.training_text_tokens = before

    def _text_ids(self, text: Any, n: int) -> list[int]:
        check_text(text, n)
        limit = min(self.settings.max_text_tokens, self.training_text_tokens or self.settings.max_text_tokens)
        ids = plain_ids(self.tokenizer, text)
        if len(ids) > limit and not self._said_truncated:
            self._said_truncated = True
            logger.warning("a text of %d tokens is read up to max_text_tokens = %d (said once)", len(ids), limit)
        return self._head_ids + ids[:limit] + self._tail_ids

    def _padded(self, rows: list[list[int]]) -> dict[str, Any]:
        length = max(len(row) for row in rows)
        ids_BT = torch.full((len(rows), length), int(self.tokenizer.pad_token_id or 0))
        mask_BT = torch.zeros_like(ids_BT)
        for n, row in enumerate(rows):
            ids_BT[n, : len(row)] = torch.tensor(row)
            mask_BT[n, : len(row)] = 1
        return {"input_ids": ids_BT, "attention_mask": mask_BT}

    @property
    def _beside_texts(self) -> int:
        """Tokens that the backbone reads beside a text's, at most."""
        words = self.settings.layout == "prefix" or self.settings.instruction_template is not None
        instruction = self.settings.max_instruction_tokens if words else 0
        around = len(self._opening_ids) + len(self._head_ids) + len(self._tail_ids)
        return around + instruction + self.settings.num_soft_tokens

    # -- features to embeddings ---------------------------------------------------------------------------------

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        """Add `sentence_embedding` (B, E) float32 to the features of `preprocess`."""
        instruction = features.get("instruction", self.settings.default_instruction)
        embed = self.backbone.embedder(features["input_ids"], features["attention_mask"])
        if "request_ids" in features:
            tokens_NKP = self.prompter(features["request_ids"][:, 0], features["request_mask"][:, 0]).tokens_NKP
            embedding_BE = embed(self.alignment(tokens_NKP), self.instruction_ids(instruction))
            embedding_BE = self._centred(embedding_BE)
        else:
            (embedding_BE,) = self.embeddings(embed, [instruction])
        if self.leaves is not None and torch.is_grad_enabled():
            self.leaves.embedding_bytes += embedding_BE.nbytes
        return {**features, "sentence_embedding": embedding_BE}

    def embeddings(self, embed: Embedder, instructions: Sequence[str]) -> Iterator[Tensor]:
        """Embeddings (B, E) of the texts at hand under one instruction after another.

        With `instruction_guidance` w above 1: w e(instruction) - (w - 1) e(default instruction). This is
        classifier-free guidance (Ho and Salimans, arXiv 2207.12598, eq. 6, whose w is ours less 1) with the default
        instruction in the place of no condition. Under the default instruction itself, and under that of documents,
        nothing changes.

        Args:
            embed: of the backbone, holds the texts.
            instructions: in words.
        """
        default, weight = self.settings.default_instruction, self.settings.instruction_guidance
        # Documents are looked for under any instruction: they stay where queries are.
        unguided = (default, self.settings.document_instruction)
        default_BE: Tensor | None = None
        for instruction in instructions:
            embedding_BE = embed(self.soft_prompt(instruction), self.instruction_ids(instruction))
            if weight > 1 and instruction not in unguided:
                if default_BE is None:
                    default_BE = embed(self.soft_prompt(default), self.instruction_ids(default))
                embedding_BE = weight * embedding_BE - (weight - 1) * default_BE
            yield self._centred(embedding_BE)

    def _centred(self, embedding_BE: Tensor) -> Tensor:
        embedding_BE = embedding_BE.to(self.alignment.weight.dtype)  # as a linear head is, also after `model.half()`
        return embedding_BE - self.centre_E if self.settings.centred else embedding_BE

    def subtract(self, centre_E: Tensor | None) -> None:
        """Subtract this from every embedding, as `ModelConfig.centred` says; `None`: nothing."""
        self.centre_E.copy_(torch.zeros_like(self.centre_E) if centre_E is None else centre_E)
        self.settings = replace(self.settings, centred=centre_E is not None)

    def soft_tokens(self, instruction: str) -> SoftTokens:
        """What the prompter writes for an instruction alone: tokens (1, K, P) and weights (1, K, V)."""
        ids_NS, mask_NS = self.prompter.tokenize([instruction])
        device = self.alignment.weight.device
        # Fused attention adds up in any order on GPUs; workers must get the same bits.
        with sdpa_kernel(SDPBackend.MATH) if device.type == "cuda" else nullcontext():
            return self.prompter(ids_NS.to(device), mask_NS.to(device))  # type: ignore[no-any-return]

    def soft_prompt(self, instruction: str) -> Tensor:
        """The soft prompt (1, R, D) of an instruction.

        Without gradients it is computed once and remembered until a weight or the temperature changes. With
        gradients it is a leaf of the current step where `leaves` is set (see `SoftPromptLeaves`), else part of the
        graph.
        """
        if not torch.is_grad_enabled():
            with self._remembering:
                return self._remembered_soft_prompt(instruction)
        if self.leaves is None:
            return self.alignment(self.soft_tokens(instruction).tokens_NKP)  # type: ignore[no-any-return]
        leaves = self.leaves
        return leaves.leaf(instruction, lambda: self.alignment(self._soft_tokens_of_step(instruction, leaves)))

    def _soft_tokens_of_step(self, instruction: str, leaves: SoftPromptLeaves) -> Tensor:
        if any(parameter.requires_grad for parameter in self.prompter.parameters()):
            return self.soft_tokens(instruction).tokens_NKP
        return leaves.constant(instruction, lambda: self.soft_tokens(instruction).tokens_NKP)

    def _remembered_soft_prompt(self, instruction: str) -> Tensor:
        # Sums of the values, not tensor versions: the fused optimizers that trainers use do not raise versions.
        parameters = (*self.alignment.parameters(), *self.prompter.trained_parameters())
        sums = torch.stack([p.detach().sum() for p in parameters])
        sums = torch.cat([sums, sums.new_tensor([self.prompter.temperature])])
        before = self._remembered_for
        # The library moves models between devices, and these tensors do not go along.
        if before is None or before.device != sums.device or not torch.equal(sums, before):
            self._remembered.clear()
            self._remembered_for = sums
        if (known_1RD := self._remembered.get(instruction)) is not None:
            return known_1RD
        # Not an inference tensor: training code may meet it again outside inference mode.
        with torch.inference_mode(False), torch.no_grad():
            soft_1RD: Tensor = self.alignment(self.soft_tokens(instruction).tokens_NKP)
        if soft_1RD.nbytes <= self._remembered.maxsize:
            self._remembered[instruction] = soft_1RD
        return soft_1RD

    def instruction_ids(self, instruction: str) -> Tensor:
        """The instruction (I,) as the backbone reads it; empty in layout `suffix` without an `instruction_template`."""
        template = self.settings.instruction_template
        words = f"{instruction}\n" if self.settings.layout == "prefix" else None
        if words is None and template is not None:
            words = template.replace("{instruction}", instruction)
        # The end stays: there the template goes on to the soft prompt.
        ids = [] if words is None else plain_ids(self.tokenizer, words)[-self.settings.max_instruction_tokens :]
        return torch.tensor(self._opening_ids + ids, dtype=torch.long, device=self.alignment.weight.device)

    def __getstate__(self) -> dict[str, Any]:
        # Pools of processes get the model on the CPU, what it remembers may lie on an accelerator.
        return {**self.__dict__, "_remembered": None, "_remembered_for": None, "_remembering": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._remembered, self._remembering = _memory(), threading.RLock()

    # -- what sentence-transformers asks of a module ------------------------------------------------------------

    def get_embedding_dimension(self) -> int:
        """E, the width of an embedding."""
        return self.backbone.width

    @property
    def max_seq_length(self) -> int:
        """Text tokens read at most; may be set."""
        return self.settings.max_text_tokens

    @max_seq_length.setter
    def max_seq_length(self, tokens: int) -> None:
        if not isinstance(tokens, int) or tokens < 1:
            raise PromptEmbedderError(f"max_seq_length must be a positive number of tokens, found {tokens!r}")
        self.backbone.check_room(tokens, self._beside_texts)
        self.settings = replace(self.settings, max_text_tokens=tokens)

    @property
    def instruction_guidance(self) -> float:
        """How much the instruction counts, see `embeddings`; may be set, also on a model trained at 1."""
        return self.settings.instruction_guidance

    @instruction_guidance.setter
    def instruction_guidance(self, weight: float) -> None:
        changed = {**asdict(self.settings), "instruction_guidance": weight}
        self.settings = parse(ModelConfig, changed, where="model")

    def get_config_dict(self) -> dict[str, Any]:
        """Everything `save` writes into `promptembedder.json`."""
        return {
            "format_version": FORMAT_VERSION,
            "embedding_dimension": self.get_embedding_dimension(),
            "prompter_dimension": self.alignment.weight.shape[0],
            "model": asdict(self.settings),
            "base_models": asdict(self.base_models),
        }

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        """Write settings, alignment and the prompter's trained weights; the two LLMs are named, not copied."""
        folder = Path(output_path)
        (folder / PROMPTER_FOLDER).mkdir(parents=True, exist_ok=True)
        stored = {name: value.detach().cpu().contiguous() for name, value in self.alignment.named_parameters()}
        if self.settings.centred:
            stored[CENTRE] = self.centre_E.cpu().contiguous()
        save_file(stored, folder / ALIGNMENT_FILE)
        save_file(trained_state(self.prompter), folder / PROMPTER_FOLDER / PROMPTER_WEIGHTS)
        peft_config = getattr(self.prompter.lm, "peft_config", None)
        if peft_config is not None:
            peft_config["default"].save_pretrained(str(folder / PROMPTER_FOLDER))
        (folder / CONFIG_FILE).write_text(json.dumps(self.get_config_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(
        cls, model_name_or_path: str, subfolder: str = "", revision: str | None = None, **kwargs: Any
    ) -> SoftPromptTransformer:
        """Open a saved module from its folder or hub id; see `promptembedder.load` for whole models."""
        from promptembedder.model.store import load_module

        return load_module(folder_of(model_name_or_path, revision) / subfolder)


def soft_prompt_module(model: SentenceTransformer | Sequence[torch.nn.Module]) -> SoftPromptTransformer:
    """The `SoftPromptTransformer` inside a model, or at the head of its modules.

    Raises:
        PromptEmbedderError: the model has none.
    """
    module = model[0]
    if not isinstance(module, SoftPromptTransformer):
        raise PromptEmbedderError(f"not a promptembedder model: its first module is {type(module).__name__}")
    return module
