"""Instruction-following text embeddings from a frozen LLM, by soft prompts that another LLM writes."""

from promptembedder.config import ModelConfig, RunConfig
from promptembedder.errors import PromptEmbedderError
from promptembedder.model import build, encode, load, save
from promptembedder.module import SoftPromptTransformer

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
