"""`promptembedder compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from promptembedder.errors import needs_extra
from promptembedder.progress import say


def compare(
    results: Annotated[list[Path], typer.Argument(help="Folders that evaluate wrote, of one model or of many.")],
    to: Annotated[str | None, typer.Option(help="Model that ratios and differences are taken to.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of report and pictures.")] = Path("comparison"),
) -> None:
    """Put results of several models on one page; prints the table."""
    with needs_extra("evaluate", "comparison"):
        from promptembedder import evaluation

    comparison = evaluation.compare(evaluation.read_columns(results), to)
    evaluation.write_report(comparison, output)
    print(evaluation.markdown(comparison))
    say(f"wrote {output}/report.md, {output}/report.html")
