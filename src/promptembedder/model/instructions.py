"""The instruction that a model reads: the one given, or the model's own."""

from __future__ import annotations

from typing import Any

from sentence_transformers import SentenceTransformer

from promptembedder.model.module import soft_prompt_module
from promptembedder.model.prompts import own_instruction
from promptembedder.text import instruction_or


def instruction_for(model: SentenceTransformer, given: Any = None, *, document: bool = False) -> str:
    """What a model reads where an instruction is given, or none: the same as `model.encode(prompt=given)` reads.

    Args:
        model: made by `build` or `load`.
        given: an instruction; unset or blank: the model's own.
        document: the model's own is that of documents, as in `model.encode_document`.

    Raises:
        PromptEmbedderError: the instruction is no string, or no valid Unicode.
    """
    settings = soft_prompt_module(model).settings
    own = own_instruction(settings, model.prompts, model.default_prompt_name, document=document)
    return instruction_or(given, own)
