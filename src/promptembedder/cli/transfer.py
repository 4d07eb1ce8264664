"""`promptembedder transfer`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from promptembedder.cli.arguments import DataFolder, ModelPath, Resume
from promptembedder.errors import PromptEmbedderError, needs_extra
from promptembedder.progress import say


def transfer(
    model: ModelPath,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[SECTION.NAME=VALUE]...", help="Further settings, such as training.max_steps=75."),
    ] = None,
    backbone: Annotated[
        str, typer.Option(help="The new LLM, which reads texts: name, folder, .gguf file, hub id.")
    ] = "",
    train: Annotated[list[str] | None, typer.Option(help="File of labelled rows; may be repeated.")] = None,
    texts: Annotated[list[str] | None, typer.Option(help="File of plain texts, before any rows; repeatable.")] = None,
    dev: Annotated[str | None, typer.Option(help="Scored pairs to choose and report by.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of model, report and picture.")] = Path(
        "runs/transfer"
    ),
    data: DataFolder = None,
    share_prompter: Annotated[
        bool, typer.Option("--share-prompter", help="Point to MODEL's prompter instead of copying it.")
    ] = False,
    resume: Resume = False,
) -> None:
    """Move a trained model to another backbone: a new alignment matrix, the same prompter."""
    with needs_extra("train", "transfer"):
        from promptembedder.config import parse_settings
        from promptembedder.model.store import load
        from promptembedder.transfer.checks import check_alone
        from promptembedder.transfer.settings import TransferConfig
        from promptembedder.transfer.transfer import transfer as move

    check_alone()
    if not backbone:
        raise PromptEmbedderError("give the new backbone: --backbone NAME")
    settings: dict[str, Any] = {"backbone": backbone, "texts": texts or [], "training": {"output": str(output)}}
    settings["data"] = {"files": [{"path": path} for path in train or []]} | ({"root": str(data)} if data else {})
    settings["evaluation"] = {"dev": dev} if dev else {}
    config = parse_settings(TransferConfig, settings, overrides or [], where="transfer")
    old = load(model, dtype=None if config.dtype == "auto" else config.dtype)
    result = move(old, config, share_prompter=model if share_prompter else None, resume=resume)
    for stage in result.stages:
        score = "" if stage.dev is None else f"dev {stage.dev:6.2f}  "
        say(f"{stage.name:22} {score}{stage.seconds:8.1f} s  {stage.examples} examples")
    line: dict[str, Any] = {f"{name}_spearman": round(score, 2) for name, score in result.scores.items()}
    print(json.dumps(line | {"start": result.starts[0].name, "model": str(result.folder)}))
