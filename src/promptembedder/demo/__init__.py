"""The demo: train and compare on real text."""

from promptembedder.demo.run import run_demo

__all__ = ["run_demo"]
