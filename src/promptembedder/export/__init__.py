"""Compiled instructions, for engines that never heard of this package."""

from promptembedder.export.compiled import Compiled, CompiledInstruction, compile_model

__all__ = ["Compiled", "CompiledInstruction", "compile_model"]
