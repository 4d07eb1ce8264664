"""`promptembedder demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from promptembedder.errors import needs_extra


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of report, picture and model.")] = Path(
        "runs/demo"
    ),
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 20,
) -> None:
    """Train on BBC news with SmolLM2-135M and compare with the untrained LLM (minutes on two CPU cores)."""
    with needs_extra("demo", "the demo"):
        import matplotlib  # noqa: F401 - the picture comes last; better to know now
        import sklearn  # noqa: F401

        from promptembedder.demo.run import run_demo

    print(run_demo(output, steps=steps))
