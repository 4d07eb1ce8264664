"""README of plain folders."""
from promptembedder.export.compiled import Compiled


def readme(compiled: Compiled, dtype: str, limits: dict[str, int], copy: bool) -> str:
    return ""
