"""Instruction-following text embeddings from a frozen LLM, by soft prompts that another LLM writes."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from promptembedder.errors import PromptEmbedderError

if TYPE_CHECKING:
    from promptembedder.building import build
    from promptembedder.config import ModelConfig, RunConfig
    from promptembedder.model import encode, load, save
    from promptembedder.module import SoftPromptTransformer

# Opened on first use: the libraries behind them take seconds, which `promptembedder --help` need not wait for.
_PLACES = {
    "ModelConfig": "config",
    "RunConfig": "config",
    "SoftPromptTransformer": "module",
    "build": "building",
    "encode": "model",
    "load": "model",
    "save": "model",
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
