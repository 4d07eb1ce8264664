"""`promptembedder explain`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from promptembedder.cli.arguments import AsJson, ModelPath, check_instruction, check_output


def explain(
    model: ModelPath,
    instruction: Annotated[str | None, typer.Argument(help="Unset: the model's default instruction.")] = None,
    top: Annotated[int, typer.Option(min=1, help="Words listed per soft token.")] = 5,
    as_json: AsJson = False,
) -> None:
    """Show the words that each soft token of an instruction mixes, with their weights."""
    check_output()
    check_instruction(instruction, "INSTRUCTION")
    import torch

    from promptembedder.model.explain import readings_of
    from promptembedder.model.folder import describe, folder_of, read_saved
    from promptembedder.model.reopen import reopen_prompter

    # The prompter alone: neither the backbone nor sentence-transformers, whose import takes longer than all else.
    saved = read_saved(folder_of(model))
    asked = instruction or describe(model)["default_instruction"]
    prompter = reopen_prompter(saved)
    with torch.inference_mode():
        readings = readings_of(prompter, prompter(*prompter.tokenize([asked]), at_once=True), top)
    if as_json:
        print(json.dumps({"instruction": asked, "soft_tokens": [asdict(r) for r in readings]}))
        return
    print(f"instruction: {asked}")
    for n, reading in enumerate(readings, 1):
        words = "  ".join(f"{word!r} {weight:.2f}" for word, weight in reading.words)
        print(f"soft token {n}  entropy {reading.entropy:5.2f} nats  {words}")
