"""The one source of a model's own instructions, seen from its module: the prompts of the `SentenceTransformer`.

Settings say only what these begin with.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from promptembedder.model.settings import ModelConfig
from promptembedder.text import instruction_or

if TYPE_CHECKING:
    from sentence_transformers.base.model import BaseModel


def default_prompts(settings: ModelConfig) -> dict[str, str]:
    """What prompt names stand for at first; the library's own are empty, so documents would be read as queries."""
    return {"query": settings.default_instruction, "document": settings.document_instruction}


def own_instruction(
    settings: ModelConfig, prompts: Mapping[str, str], default_name: str | None, *, document: bool
) -> str:
    """What a model reads where no instruction is given.

    Args:
        settings: of the model, for prompts that are missing or blank.
        prompts: of the model.
        default_name: the model's `default_prompt_name`; unset: `query`.
        document: what it reads for documents.

    Raises:
        PromptEmbedderError: the prompt is no string, or no valid Unicode.
    """
    name = "document" if document else default_name or "query"
    return instruction_or(prompts.get(name), default_prompts(settings)["document" if document else "query"])


class FollowedModel:
    """The model whose prompts a module reads where it is called without an instruction."""

    def __init__(self) -> None:
        self._model: weakref.ref[BaseModel] | None = None  # which holds the module
        self._prompts: Mapping[str, str] = {}

    def follow(self, model: BaseModel) -> bool:
        """Read a model's prompts from now on; False where another model is followed, which is still in use."""
        followed = self._followed()
        if followed is None:
            self._model = weakref.ref(model)
        return followed is None or followed is model

    def own_instruction(self, settings: ModelConfig, *, document: bool) -> str:
        """The model's own instruction; see the function of that name."""
        model = self._followed()
        default_name = None if model is None else model.default_prompt_name
        return own_instruction(settings, self._its_prompts(), default_name, document=document)

    def _followed(self) -> BaseModel | None:
        return None if self._model is None else self._model()

    def _its_prompts(self) -> Mapping[str, str]:
        model = self._followed()
        return self._prompts if model is None else model.prompts

    def __getstate__(self) -> dict[str, Any]:
        # Copied with its model, as pools of processes do, this holds the very dict that the copy holds.
        return {"_model": None, "_prompts": self._its_prompts()}
