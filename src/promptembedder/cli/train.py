"""`promptembedder train`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from promptembedder.cli.arguments import DataFolder, Resume
from promptembedder.errors import PromptEmbedderError, needs_extra
from promptembedder.progress import say


def train(
    config: Annotated[Path, typer.Argument(help="YAML file of settings.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[SECTION.NAME=VALUE]...", help="Settings that replace the file's.")
    ] = None,
    data: DataFolder = None,
    resume: Resume = False,
    start: Annotated[
        Path | None,
        typer.Option("--from", metavar="MODEL", help="Start from a saved model (folder, hub id, name), not an LLM."),
    ] = None,
) -> None:
    """Train a model; prints its scores last, as one JSON line."""
    with needs_extra("train", "training"):
        from promptembedder.training import workers
        from promptembedder.training.settings import given_names, load_run
        from promptembedder.training.train import MAY_DIFFER
        from promptembedder.training.train import train as run

    changeable = tuple(f"model.{name}=" for name in MAY_DIFFER)
    kept = [
        s for s in overrides or [] if s.startswith(("model.", "training.warm_start")) and not s.startswith(changeable)
    ]
    if start is not None and kept:
        raise PromptEmbedderError(f"--from keeps the structure of {start} and has no warm start: leave {kept[0]!r} out")
    settings = load_run(config, overrides or [], root=str(data) if data else None)
    given = MAY_DIFFER & given_names(config, overrides or [], "model") if start is not None else ()
    changed = {name: getattr(settings.model, name) for name in given}
    result = run(settings, resume=resume, start=start, changed=changed)
    if workers.number() > 0:
        return
    say(f"saved {result.folder}")
    line = {f"{name}_spearman": round(score, 2) for name, score in result.scores.items()}
    if result.text_state_hit_rate is not None:
        line["text_state_hit_rate"] = round(result.text_state_hit_rate, 4)
    print(json.dumps(line | {"steps": result.steps, "seconds": round(result.seconds, 1), "model": str(result.folder)}))
