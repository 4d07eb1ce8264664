"""`promptembedder encode`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from promptembedder.cli.arguments import BatchSize, Device, ModelPath, check_input, check_instruction, expanded_text
from promptembedder.progress import say


def encode(
    model: ModelPath,
    texts: Annotated[
        str, typer.Argument(metavar="[TEXTS]", help="File of texts; - is standard input.", callback=expanded_text)
    ] = "-",
    output: Annotated[Path, typer.Option("--output", "-o", help=".npy, or .parquet with ids.")] = Path("vectors.npy"),
    instruction: Annotated[str | None, typer.Option("--instruction", "-i", help="Unset: the model's default.")] = None,
    document: Annotated[bool, typer.Option("--document", help="Use the model's document instruction.")] = False,
    kind: Annotated[
        Literal["lines", "jsonl", "parquet"] | None, typer.Option("--format", help="Unset: by the file's ending.")
    ] = None,
    text_field: Annotated[str, typer.Option(help="Field of the text in JSONL and Parquet.")] = "text",
    id_field: Annotated[
        str | None, typer.Option(help="Field of the id; unset: id, or the row's number where no row has one.")
    ] = None,
    batch_size: BatchSize = 32,
    max_text_tokens: Annotated[
        int | None, typer.Option(min=1, help="Truncate texts to this many tokens; unset: the model's limit.")
    ] = None,
    truncate_dim: Annotated[int | None, typer.Option(min=1, help="Keep this many dimensions, the first ones.")] = None,
    precision: Annotated[
        Literal["float32", "float16", "ubinary"], typer.Option(help="How values are stored.")
    ] = "float32",
    bridge: Annotated[Path | None, typer.Option(help="Map the embeddings into an older model's space.")] = None,
    device: Device = None,
) -> None:
    """Embed texts from a file or standard input into .npy or .parquet, in their order."""
    check_instruction(instruction)
    check_input(texts)
    from promptembedder.bulk.encode_file import encode_file

    count, width = encode_file(
        model,
        texts,
        output,
        instruction=instruction,
        document=document,
        kind=kind,
        text_field=text_field,
        id_field=id_field,
        batch_size=batch_size,
        max_text_tokens=max_text_tokens,
        truncate_dim=truncate_dim,
        precision=precision,
        bridge=bridge,
        device=device,
    )
    say(f"wrote {output}: {count} embeddings of {width} dimensions, {precision}")
