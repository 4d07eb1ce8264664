"""Instruction-following text embeddings from a frozen LLM, by soft prompts that another LLM writes."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from promptembedder.errors import PromptEmbedderError

if TYPE_CHECKING:
    from promptembedder.model.build import build
    from promptembedder.model.encode import encode
    from promptembedder.model.module import SoftPromptTransformer
    from promptembedder.model.settings import ModelConfig
    from promptembedder.model.store import load, save
    from promptembedder.training.settings import RunConfig

# Opened on first use: the libraries behind them take seconds, which `promptembedder --help` need not wait for.
_PLACES = {
    "ModelConfig": "model.settings",
    "RunConfig": "training.settings",
    "SoftPromptTransformer": "model.module",
    "build": "model.build",
    "encode": "model.encode",
    "load": "model.store",
    "save": "model.store",
}

__all__ = [
    "ModelConfig",
    "PromptEmbedderError",
    "RunConfig",
    "SoftPromptTransformer",
    "build",
    "encode",
    "load",
    "save",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PLACES])
