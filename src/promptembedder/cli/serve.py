"""`promptembedder serve`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from promptembedder.cli.arguments import Device, named_instructions
from promptembedder.errors import needs_extra

# No option: other users of a machine see the options of a process.
API_KEY = "PROMPTEMBEDDER_API_KEY"


def serve(
    models: Annotated[
        list[Path], typer.Argument(metavar="MODEL...", help="Saved models: folders, hub ids, or names in the package.")
    ],
    named: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=TEXT", help="Instruction for clients that ask for MODEL:NAME; may be repeated."),
    ] = None,
    instructions: Annotated[
        Path | None, typer.Option(help="File of instructions, one a line, to read before clients send them.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8000,
    batch_tokens: Annotated[
        int | None, typer.Option(min=1, help="Of one forward pass; unset: 2048 on a CPU, 16384 on an accelerator.")
    ] = None,
    queue_tokens: Annotated[int, typer.Option(min=1, help="Of all waiting texts; beyond: status 429.")] = 1_000_000,
    request_tokens: Annotated[int, typer.Option(min=1, help="Of one request; beyond: status 413.")] = 300_000,
    new_instructions: Annotated[
        int, typer.Option(min=1, help="Unseen ones that wait, a client's share is a quarter; beyond: status 429.")
    ] = 64,
    device: Device = None,
    dtype: Annotated[
        Literal["bfloat16", "float32"] | None, typer.Option(help="Precision of the LLMs; unset: as saved.")
    ] = None,
) -> None:
    """Answer POST /v1/embeddings as OpenAI does, with an instruction per request; see docs/serve.md.

    Clients must send the key in the environment variable PROMPTEMBEDDER_API_KEY, if that is set.
    """
    by_name = named_instructions(named or [])
    with needs_extra("serve", "promptembedder serve"):
        from promptembedder.data.texts import read_texts
        from promptembedder.serving import ServeSettings
        from promptembedder.serving import serve as answer

    settings = ServeSettings(
        host=host,
        port=port,
        api_key=os.environ.get(API_KEY) or None,
        batch_tokens=batch_tokens,
        queue_tokens=queue_tokens,
        request_tokens=request_tokens,
        new_instructions=new_instructions,
    )
    lines = [] if instructions is None else [text for _, text in read_texts(str(instructions), None, ids=False)]
    answer(models, settings, named=by_name, instructions=lines, device=device, dtype=dtype)
