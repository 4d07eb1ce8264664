"""The product's heart: an input module of sentence-transformers whose prompt is an instruction for a Prompting LLM.

Prompter, alignment and backbone know nothing of each other; here they become one.

Shapes: B texts, T text tokens, S request tokens, I instruction tokens, K soft tokens, D backbone width, R rows of a
soft prompt: K, and K more for each layer of the backbone where it is deep.
"""

from __future__ import annotations

import json
import logging
import numbers
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.model import BaseModel
from sentence_transformers.base.modules import InputModule
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedTokenizerBase

from promptembedder.errors import PromptEmbedderError
from promptembedder.llms.hub import HubAccess
from promptembedder.model.alignment import Alignment
from promptembedder.model.backbone import Backbone
from promptembedder.model.features import Features
from promptembedder.model.folder import (
    ALIGNMENT_FILE,
    CENTRE,
    CONFIG_FILE,
    DRAFT,
    FORMAT_VERSION,
    INSTRUCTIONS,
    KNOWN_VERSION,
    PROMPTER_FOLDER,
    SOFT_PROMPTS_FILE,
    BaseModels,
    SavedModel,
    folder_of,
    read_saved,
)
from promptembedder.model.generation import SoftTokens
from promptembedder.model.handed import taken_dtype
from promptembedder.model.known import KnownInstructions, SoftPromptTable
from promptembedder.model.leaves import SoftPromptLeaves, TrainingState
from promptembedder.model.memory import SoftPromptMemory
from promptembedder.model.parts import Parts
from promptembedder.model.prompter import Opening, Prompter, draft_for, load_trained_state, save_prompter
from promptembedder.model.prompts import FollowedModel, default_prompts
from promptembedder.model.reader import TextReader
from promptembedder.model.reopen import reopen, weights_of
from promptembedder.model.settings import ModelConfig
from promptembedder.text import instruction_or

logger = logging.getLogger(__name__)


class SoftPromptTransformer(InputModule):
    """Text and instruction to a sentence embedding, through a soft prompt that another LLM writes.

    Used as the first module of a plain `SentenceTransformer`; `promptembedder.build` and `load` make one.

    Args:
        prompter: writes soft tokens for an instruction; in an export, the instructions that it holds.
        alignment: maps them into the backbone's input space; in an export, a table of soft prompts.
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
        prompter: Prompter | KnownInstructions,
        alignment: Alignment | SoftPromptTable,
        backbone: Backbone,
        tokenizer: PreTrainedTokenizerBase,
        config: ModelConfig,
        base_models: BaseModels,
    ) -> None:
        super().__init__()
        # First, because sentence-transformers casts the modules after this one to the dtype of its first parameter, and
        # embeddings are float32 whatever the LLMs run in.
        self.alignment = alignment
        # That of an export refuses whatever needs an LLM.
        self.prompter: Prompter = prompter  # type: ignore[assignment]
        self.backbone = backbone
        self.settings = config
        self.tokenizer = tokenizer
        self.base_models = base_models
        self.centre_E: Tensor
        self.register_buffer("centre_E", torch.zeros(backbone.width))
        self.centred = False
        self.training_state = TrainingState()
        self._model = FollowedModel()
        self._memory = SoftPromptMemory()
        backbone.check_room(config.max_text_tokens, self._beside_texts)

    @classmethod
    def of(cls, parts: Parts, config: ModelConfig) -> SoftPromptTransformer:
        """A module made of parts; errors as in the constructor."""
        return cls(parts.prompter, parts.alignment, parts.backbone, parts.tokenizer, config, parts.base_models)

    def on_model_ready(self, model: BaseModel) -> None:
        """Make the model's prompts the one source of its two instructions (called by sentence-transformers)."""
        for name, instruction in default_prompts(self.settings).items():
            model.prompts[name] = instruction_or(model.prompts.get(name), instruction)
        if not self._model.follow(model):  # two models share this module, each with prompts of its own
            model.default_prompt_name = model.default_prompt_name or "query"

    # -- texts and instructions to features ---------------------------------------------------------------------

    def preprocess(
        self, inputs: Sequence[Any], prompt: str | None = None, task: str | None = None, **unknown: Any
    ) -> dict[str, Any]:
        """Tokenise texts and put the instruction beside them.

        Args:
            inputs: texts; blank ones are read as a full stop.
            prompt: the instruction; unset or blank: the model's own, for documents where `task` is `document`.
            task: `query`, `document` or unset, as sentence-transformers hands it over.
            **unknown: refused, so that a misspelt argument is not lost.

        Returns:
            `input_ids` and `attention_mask`, (B, T), right padded; `instruction`, a string.

        Raises:
            PromptEmbedderError: a text or instruction that is no string, an unknown argument or task. No number of the
                text is given: sentence-transformers sorts texts by length and hands over a batch of them.
        """
        if unknown.pop("processing_kwargs", None):
            raise PromptEmbedderError("processing_kwargs are not taken; model.max_seq_length sets how much is read")
        if unknown:
            raise PromptEmbedderError(f"unknown arguments {sorted(unknown)}; valid: prompt, task")
        if task not in (None, "query", "document"):
            raise PromptEmbedderError(f"task {task!r} is unknown, expected 'query' or 'document'")
        instruction = instruction_or(prompt, self._model.own_instruction(self.settings, document=task == "document"))
        most = self.settings.max_text_tokens
        limit = min(most, self.training_state.max_text_tokens or most)
        return {**self.reader.features(inputs, limit), "instruction": instruction}

    def check_instruction(self, instruction: str) -> None:
        """Refuse an instruction that one of the two LLMs cannot read, without running it.

        Raises:
            PromptEmbedderError: a token has no embedding, or the prompter's chat template does not take it.
        """
        self.prompter.tokenize([instruction])
        self.instruction_ids(instruction)

    @contextmanager
    def in_training(self, state: TrainingState) -> Iterator[None]:
        """While inside, the module has what training needs; afterwards what it had before."""
        before, self.training_state = self.training_state, state
        try:
            yield
        finally:
            self.training_state = before

    @contextmanager
    def truncating(self, max_text_tokens: int | None) -> Iterator[None]:
        """While inside, texts are truncated to this number of tokens, if the model reads more."""
        with self.in_training(replace(self.training_state, max_text_tokens=max_text_tokens)):
            yield

    @property
    def _beside_texts(self) -> int:
        """Tokens that the backbone reads beside a text's, at most."""
        instruction = self.settings.max_instruction_tokens if self.settings.layout == "prefix" else 0
        return self.reader.beside_texts + instruction + self.settings.num_soft_tokens

    # -- features to embeddings ---------------------------------------------------------------------------------

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        """Add `sentence_embedding` (B, E) float32 to the features of `preprocess`."""
        instruction = features.get("instruction", self.settings.default_instruction)
        (embedding_BE,) = self.embed(features["input_ids"], features["attention_mask"], [instruction])
        if self.training_state.leaves is not None and torch.is_grad_enabled():
            self.training_state.leaves.embedding_bytes += embedding_BE.nbytes
        return Features(features, sentence_embedding=embedding_BE)

    def embed(self, ids_BT: Tensor, mask_BT: Tensor, instructions: Sequence[str]) -> list[Tensor]:
        """Embed texts under any number of instructions; in layout `suffix` every text is read once.

        Args:
            ids_BT: text token ids, as `preprocess` gives them.
            mask_BT: 1 for tokens, 0 for padding.
            instructions: what to embed the texts under.

        Returns:
            Embeddings (B, E) float32 under each instruction.
        """
        soft_prompts = self.soft_prompts(instructions)
        ids = [self.instruction_ids(instruction) for instruction in instructions]
        return self.embed_under(ids_BT, mask_BT, soft_prompts, ids)

    def embed_under(
        self, ids_BT: Tensor, mask_BT: Tensor, soft_prompts: Sequence[Tensor], instruction_ids: Sequence[Tensor]
    ) -> list[Tensor]:
        """As `embed`, with soft prompts at hand: (1, R, D) each for all texts, or (B, R, D) with one per text."""
        cache = self.training_state.text_cache
        embeddings = self.backbone.embed(ids_BT, mask_BT, soft_prompts, instruction_ids, cache)
        return [self._centred(embedding_BE) for embedding_BE in embeddings]

    def _centred(self, embedding_BE: Tensor) -> Tensor:
        embedding_BE = embedding_BE.to(self.alignment.weight.dtype)  # as a linear head is, also after `model.half()`
        return embedding_BE - self.centre_E if self.centred else embedding_BE

    def subtract(self, centre_E: Tensor | None) -> None:
        """From now on subtract this from every embedding; None: nothing."""
        self.centre_E.copy_(torch.zeros_like(self.centre_E) if centre_E is None else centre_E)
        self.centred = centre_E is not None

    def soft_tokens(self, instruction: str) -> SoftTokens:
        """What the prompter writes for an instruction alone: tokens (1, K, P) and weights (1, K, V)."""
        return self._soft_tokens([instruction])

    def _soft_tokens(self, instructions: Sequence[str], opening: Opening | None = None) -> SoftTokens:
        ids_NS, mask_NS = self.prompter.tokenize(instructions)
        device = self.alignment.weight.device
        # Not in a training step: its passes with and without gradients must agree, and so must workers.
        at_once = self.training_state.leaves is None and not torch.is_grad_enabled()
        # Fused attention adds up in any order on GPUs; workers must get the same bits.
        with sdpa_kernel(SDPBackend.MATH) if device.type == "cuda" else nullcontext():
            written = self.prompter(ids_NS.to(device), mask_NS.to(device), opening, at_once=at_once)
        return written  # type: ignore[no-any-return]

    def soft_prompt(self, instruction: str) -> Tensor:
        """The soft prompt (1, R, D) of an instruction; see `soft_prompts`."""
        return self.soft_prompts([instruction])[0]

    def soft_prompts(self, instructions: Sequence[str]) -> list[Tensor]:
        """The soft prompts (1, R, D) of instructions.

        Without gradients they are computed once and remembered until a weight or the temperature changes. With
        gradients each is a leaf of the current step where `training_state` has leaves (see `SoftPromptLeaves`), else
        part of the graph.
        """
        if torch.is_grad_enabled():
            return [self._soft_prompt_of_step(instruction) for instruction in instructions]
        # Sums of the values, not tensor versions: the fused optimizers that trainers use do not raise versions.
        parameters = (*self.alignment.parameters(), *self.prompter.trained_parameters())
        sums = torch.stack([p.detach().sum() for p in parameters])
        version = torch.cat([sums, sums.new_tensor([self.prompter.temperature])])
        return self._memory.recall(
            instructions,
            version,
            self.prompter.read_opening,
            lambda missing, opening: self.alignment(self._soft_tokens(missing, opening).tokens_NKP),
        )

    def _soft_prompt_of_step(self, instruction: str) -> Tensor:
        leaves = self.training_state.leaves
        if leaves is None:
            return self.alignment(self.soft_tokens(instruction).tokens_NKP)  # type: ignore[no-any-return]
        leaf_1RD: Tensor = leaves.leaf(
            instruction, lambda: self.alignment(self._soft_tokens_of_step(instruction, leaves))
        )
        return leaf_1RD

    def _soft_tokens_of_step(self, instruction: str, leaves: SoftPromptLeaves) -> Tensor:
        if any(parameter.requires_grad for parameter in self.prompter.parameters()):
            return self.soft_tokens(instruction).tokens_NKP
        return leaves.constant(instruction, lambda: self.soft_tokens(instruction).tokens_NKP)

    def instruction_ids(self, instruction: str) -> Tensor:
        """The instruction (I,) as the backbone reads it in layout `prefix`; empty in layout `suffix`."""
        if self.settings.layout == "suffix":
            ids = []
        else:
            words = self.prompter.words_of(instruction)
            ids = self.reader.instruction_ids(words, self.settings.max_instruction_tokens)
        return torch.tensor(ids, dtype=torch.long, device=self.alignment.weight.device)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "training_state": TrainingState()}

    # -- what sentence-transformers asks of a module ------------------------------------------------------------

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:  # type: ignore[override]
        """The backbone's."""
        return self.reader.tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        rows = len(self.backbone.lm.get_input_embeddings().weight)
        self.reader = TextReader(tokenizer, rows, self.settings.text_template, self.settings.layout)
        self.backbone.head_ids = self.reader.head_ids

    def get_embedding_dimension(self) -> int:
        """E, the width of an embedding."""
        return self.backbone.width

    @property
    def max_seq_length(self) -> int:
        """Text tokens read at most; may be set, to any kind of integer."""
        return self.settings.max_text_tokens

    @max_seq_length.setter
    def max_seq_length(self, tokens: int) -> None:
        if not isinstance(tokens, numbers.Integral) or isinstance(tokens, bool) or tokens < 1:
            raise PromptEmbedderError(f"max_seq_length must be a positive number of tokens, found {tokens!r}")
        limit = int(tokens)
        self.backbone.check_room(limit, self._beside_texts)
        self.settings = replace(self.settings, max_text_tokens=limit)

    def get_config_dict(self) -> dict[str, Any]:
        """Everything `save` writes into `promptembedder.json`."""
        known: dict[str, Any] = (
            {INSTRUCTIONS: self.prompter.named} if isinstance(self.prompter, KnownInstructions) else {}
        )
        return {
            "format_version": KNOWN_VERSION if known else FORMAT_VERSION,
            "embedding_dimension": self.get_embedding_dimension(),
            "prompter_dimension": self.alignment.weight.shape[0],
            "centred": self.centred,
            "model": asdict(self.settings),
            "base_models": asdict(self.base_models),
            **known,
        }

    def save(self, output_path: str, *, safe_serialization: bool = True) -> None:
        """Write settings, alignment and the prompter's trained weights; the two LLMs are named, not copied.

        An export writes its table of soft prompts in place of alignment and prompter.

        Raises:
            PromptEmbedderError: `safe_serialization` is off, which would be pickle.
        """
        if not safe_serialization:
            raise PromptEmbedderError("weights are saved as safetensors only: leave safe_serialization on")
        folder = Path(output_path)
        folder.mkdir(parents=True, exist_ok=True)
        stored = {name: value.detach().cpu().contiguous() for name, value in self.alignment.named_parameters()}
        if self.centred:
            stored[CENTRE] = self.centre_E.cpu().contiguous()
        settings = self.get_config_dict()
        if isinstance(self.prompter, KnownInstructions):
            save_file(stored, folder / SOFT_PROMPTS_FILE)
        else:
            save_file(stored, folder / ALIGNMENT_FILE)
            save_prompter(self.prompter, folder / PROMPTER_FOLDER)
            asked = (self.settings.default_instruction, self.settings.document_instruction)
            settings[DRAFT] = draft_for(self.prompter, *asked)
        (folder / CONFIG_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(
        cls,
        model_name_or_path: str,
        subfolder: str = "",
        revision: str | None = None,
        *,
        device: str | None = None,
        dtype: str | None = None,
        prompter: str | None = None,
        backbone: str | None = None,
        token: str | bool | None = None,
        cache_folder: str | None = None,
        local_files_only: bool = False,
        **handed: Any,
    ) -> SoftPromptTransformer:
        """Open a saved module from its folder or hub id; see `promptembedder.load` for whole models and arguments.

        `token`, `cache_folder` and `local_files_only` are for the hub, `handed` is the rest of what
        `SentenceTransformer(folder, ...)` hands over.

        Raises:
            PromptEmbedderError: as in `promptembedder.load`; an argument that is unknown or has no effect here.
        """
        named = taken_dtype(handed)
        access = HubAccess(token, cache_folder, local_files_only)
        saved = read_saved(folder_of(model_name_or_path, revision, access) / subfolder)
        parts, config = reopen(
            saved, device=device, dtype=dtype or named, prompter=prompter, backbone=backbone, access=access
        )
        module = cls.of(parts, config)
        module._restore(saved)
        return module

    def restore(self, folder: Path) -> None:
        """Put saved weights of alignment, centre and prompter into this module; no LLM is opened.

        Raises:
            PromptEmbedderError: a file is missing or damaged, or weights have other names or shapes.
        """
        self._restore(read_saved(folder))

    def _restore(self, saved: SavedModel) -> None:
        with weights_of(saved) as stored:
            if isinstance(self.prompter, Prompter):
                load_trained_state(self.prompter, saved.prompter_weights)
                self.prompter.take_draft(saved.draft)
        expected = self.alignment.state_dict() | ({CENTRE: self.centre_E} if saved.centred else {})
        have, wanted = ({name: tuple(value.shape) for name, value in tensors.items()} for tensors in (stored, expected))
        if have != wanted:
            raise PromptEmbedderError(f"{saved.weights_file} holds {have}, expected {wanted}")
        self.subtract(stored.pop(CENTRE) if saved.centred else None)
        self.alignment.load_state_dict(stored)


# Saved models name the class by a path that survives moves within the package.
SoftPromptTransformer.__module__ = "promptembedder"


def soft_prompt_module(model: SentenceTransformer | Sequence[torch.nn.Module]) -> SoftPromptTransformer:
    """The `SoftPromptTransformer` inside a model, or at the head of its modules.

    Raises:
        PromptEmbedderError: the model has none.
    """
    module = model[0]
    if not isinstance(module, SoftPromptTransformer):
        raise PromptEmbedderError(f"not a promptembedder model: its first module is {type(module).__name__}")
    return module
