"""`promptembedder bridge`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from promptembedder.cli.arguments import BatchSize, check_input, check_instruction, expanded_text
from promptembedder.errors import PromptEmbedderError


def bridge(
    old: Annotated[Path, typer.Argument(metavar="OLD", help="Model that the index was made with (as for encode).")],
    new: Annotated[Path, typer.Argument(metavar="NEW", help="Model that takes over.")],
    texts: Annotated[
        str,
        typer.Argument(metavar="TEXTS", help="File of texts to fit on; the more the better.", callback=expanded_text),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Safetensors file.")] = Path("bridge.safetensors"),
    instruction: Annotated[str | None, typer.Option("--instruction", "-i", help="Unset: each model's default.")] = None,
    batch_size: BatchSize = 32,
) -> None:
    """Fit a linear map from a new model's embeddings to an old index; prints what it keeps, as one JSON line."""
    check_instruction(instruction)
    check_input(texts)
    from promptembedder.model.folder import describe

    for place in (old, new):
        describe(place)  # a missing model is reported before the other one reads every text
    from promptembedder import atomic
    from promptembedder.bulk.bridge import FEWEST_TEXTS, PROBE, fit, refuse_others
    from promptembedder.data.texts import read_texts
    from promptembedder.model.encode import encode
    from promptembedder.model.store import load

    atomic.refuse_input(output, texts)
    refuse_others(output)
    lines = list(dict.fromkeys(text for _, text in read_texts(texts, None, ids=False)))
    if len(lines) < FEWEST_TEXTS:
        raise PromptEmbedderError(f"a bridge needs at least {FEWEST_TEXTS} different texts, {texts} has {len(lines)}")
    if not output.parent.is_dir() or not os.access(output.parent, os.W_OK):
        raise PromptEmbedderError(f"bridge {output} cannot be written: {output.parent} is no folder open to you")
    by_new, by_old = (
        encode(load(place), [PROBE, *lines], instruction, batch_size=batch_size, show_progress_bar=True)
        for place in (new, old)
    )
    fitted = fit(by_new[1:], by_old[1:], probe_D=by_new[0])
    fitted.save(output)
    print(json.dumps(fitted.facts | {"bridge": str(output)}))
