"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ModelPath = Annotated[
    Path, typer.Argument(metavar="MODEL", help="Saved model: folder, hub id, or name of one in the package.")
]
BatchSize = Annotated[int, typer.Option(min=1, help="Texts per forward pass.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or mps; unset: the accelerator, if any.")]
AsJson = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]
DataFolder = Annotated[Path | None, typer.Option(help="Folder that relative paths of data files start from.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue from the last checkpoint.")]
