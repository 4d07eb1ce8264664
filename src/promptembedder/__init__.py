"""Instruction-following text embeddings from a frozen LLM, by soft prompts that another LLM writes."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from promptembedder.errors import PromptEmbedderError

if TYPE_CHECKING:
    from promptembedder.data.settings import DataConfig, DataFile
    from promptembedder.model.build import build
    from promptembedder.model.encode import encode
    from promptembedder.model.explain import explain
    from promptembedder.model.module import SoftPromptTransformer
    from promptembedder.model.settings import ModelConfig
    from promptembedder.model.store import load, save
    from promptembedder.training.settings import EvaluationConfig, RunConfig, TrainingConfig, WarmStartConfig
    from promptembedder.transfer.settings import TransferConfig

# Opened on first use: the libraries behind them take seconds, which `promptembedder --help` need not wait for.
_PLACES = {
    "DataConfig": "data.settings",
    "DataFile": "data.settings",
    "EvaluationConfig": "training.settings",
    "ModelConfig": "model.settings",
    "RunConfig": "training.settings",
    "SoftPromptTransformer": "model.module",
    "TrainingConfig": "training.settings",
    "TransferConfig": "transfer.settings",
    "WarmStartConfig": "training.settings",
    "build": "model.build",
    "encode": "model.encode",
    "explain": "model.explain",
    "load": "model.store",
    "save": "model.store",
}

__all__ = [
    "DataConfig",
    "DataFile",
    "EvaluationConfig",
    "ModelConfig",
    "PromptEmbedderError",
    "RunConfig",
    "SoftPromptTransformer",
    "TrainingConfig",
    "TransferConfig",
    "WarmStartConfig",
    "build",
    "encode",
    "explain",
    "load",
    "save",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PLACES])
