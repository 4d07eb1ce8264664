"""Models saved before format 2 name their first module by this path."""

from promptembedder.model.module import SoftPromptTransformer

__all__ = ["SoftPromptTransformer"]
