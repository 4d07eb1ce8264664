"""The `promptembedder` command."""

from promptembedder.cli.app import app, main

__all__ = ["app", "main"]
