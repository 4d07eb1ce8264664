"""The `promptembedder` command: module `app`, and `main`, its entry point."""

from promptembedder.cli.app import main

__all__ = ["main"]
