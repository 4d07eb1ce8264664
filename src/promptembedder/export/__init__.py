"""Compiled instructions, for engines that never heard of this package."""

from promptembedder.export.compiled import Compiled, CompiledInstruction, compile_model
from promptembedder.export.export import Exported, FoldData, add, export

__all__ = ["Compiled", "CompiledInstruction", "Exported", "FoldData", "add", "compile_model", "export"]
