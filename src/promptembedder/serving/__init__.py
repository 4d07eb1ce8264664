"""Embeddings over HTTP, with an instruction per request."""

from promptembedder.serving.run import serve
from promptembedder.serving.settings import ServeSettings

__all__ = ["ServeSettings", "serve"]
