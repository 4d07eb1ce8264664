"""`promptembedder encode`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from promptembedder.cli.arguments import (
    Device,
    ModelPath,
    check_input,
    check_instruction,
    expanded_text,
    named_instructions,
    only_one,
)
from promptembedder.errors import PromptEmbedderError, needs_extra
from promptembedder.progress import say

# Of a corpus only, with the names of their parameters.
_CORPUS_OPTIONS = {
    "--named": "named",
    "--keep": "keep",
    "--chunk-tokens": "chunk_tokens",
    "--overlap": "overlap",
    "--batch-tokens": "batch_tokens",
    "--limit": "limit",
    "--strict": "strict",
    "--ray": "ray",
    "--workers": "workers",
    "--devices-per-worker": "devices_per_worker",
}


def encode(
    model: ModelPath,
    sources: Annotated[
        list[str] | None,
        typer.Argument(metavar="SOURCE", help="File of texts, - is standard input; or a corpus, see -o."),
    ] = None,
    output: Annotated[
        str,
        typer.Option(
            "--output",
            "-o",
            help=".npy or .parquet file; or FOLDER/ for a corpus: files, folders, globs, addresses such as s3://b/c.",
            callback=expanded_text,
        ),
    ] = "vectors.npy",
    instructions: Annotated[
        list[str] | None, typer.Option("--instruction", "-i", metavar="TEXT", help="Unset: the model's default.")
    ] = None,
    document: Annotated[bool, typer.Option("--document", help="Use the model's document instruction.")] = False,
    named: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=TEXT", help="Corpus: instruction with a column of its own; may be repeated."),
    ] = None,
    kind: Annotated[
        Literal["lines", "jsonl", "csv", "parquet"] | None,
        typer.Option("--format", help="Unset: by the file's ending; csv: corpus only."),
    ] = None,
    text_field: Annotated[str, typer.Option(help="Field of the text.")] = "text",
    id_field: Annotated[
        str | None, typer.Option(help="Field of the id; unset: id, or the row's number where no row has one.")
    ] = None,
    keep: Annotated[
        list[str] | None, typer.Option(metavar="COLUMN", help="Corpus: column to pass through; may be repeated.")
    ] = None,
    chunk_tokens: Annotated[
        int | None, typer.Option(min=1, help="Corpus: a row for each part of a text; tokens of a part.")
    ] = None,
    overlap: Annotated[int, typer.Option(min=0, help="Tokens that a part shares with the one before.")] = 0,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Texts per forward pass; unset: 32. Single file.")
    ] = None,
    batch_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Corpus: tokens per forward pass; unset: 2048 on a CPU, 16384 on an accelerator."),
    ] = None,
    max_text_tokens: Annotated[
        int | None, typer.Option(min=1, help="Truncate texts to this many tokens; unset: the model's limit.")
    ] = None,
    truncate_dim: Annotated[int | None, typer.Option(min=1, help="Keep this many dimensions, the first ones.")] = None,
    precision: Annotated[
        Literal["float32", "float16", "int8", "binary", "ubinary"],
        typer.Option(help="How values are stored; int8 and binary: corpus only."),
    ] = "float32",
    bridge: Annotated[
        Path | None, typer.Option(help="Map the embeddings into an older model's space. Not for a corpus.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Corpus: stop after this number of rows.")] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Corpus: stop at a row that cannot be used, instead of leaving it out.")
    ] = False,
    ray: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="Corpus: run on a Ray cluster; auto: the one here; local: start one."),
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Models on the cluster; unset: 1.")] = None,
    devices_per_worker: Annotated[
        float | None,
        typer.Option(min=0, help="GPUs of each, or a part of one, or else CPU cores; unset: 1, or all cores."),
    ] = None,
    device: Device = None,
) -> None:
    """Embed texts of a file in their order, or a corpus in parts; the same command goes on where it was stopped."""
    check_instruction(instruction := only_one(instructions))
    given = {name: value for name, value in locals().items() if name in _CORPUS_OPTIONS.values()}
    places = [expanded_text(source) for source in sources or ["-"]]
    for source in places:
        check_input(source)
    shared: dict[str, Any] = {
        "instruction": instruction,
        "document": document,
        "kind": kind,
        "text_field": text_field,
        "id_field": id_field,
        "max_text_tokens": max_text_tokens,
        "truncate_dim": truncate_dim,
        "precision": precision,
        "device": device,
    }
    if output.endswith("/") or "://" in output or (os.path.isdir(output) and not output.endswith((".npy", ".parquet"))):
        for option, value in (("--bridge", bridge), ("--batch-size", batch_size)):
            if value is not None:
                raise PromptEmbedderError(f"{option} is not for a corpus")
        _encode_corpus(model, places, output, **shared, **given)
        return
    for option, name in _CORPUS_OPTIONS.items():
        if given[name]:
            raise PromptEmbedderError(f"{option} is for a corpus: give a folder as output, such as -o vectors/")
    if len(places) > 1 or os.path.isdir(places[0]) or "://" in places[0]:
        raise PromptEmbedderError(f"{places[-1]} is a corpus: give a folder as output, such as -o vectors/")
    if kind == "csv" or precision == "int8" or precision == "binary":
        raise PromptEmbedderError("csv, int8 and binary are for a corpus: give a folder as output, such as -o vectors/")
    from promptembedder.bulk.encode_file import encode_file

    if batch_size is not None:
        shared["batch_size"] = batch_size
    count, width = encode_file(
        model,
        places[0],
        Path(output),
        bridge=bridge,
        **shared,
    )
    say(f"wrote {output}: {count} embeddings of {width} dimensions, {precision}")


def _encode_corpus(
    model: Path,
    sources: list[str],
    output: str,
    *,
    instruction: str | None,
    document: bool,
    named: list[str] | None,
    kind: Any,
    text_field: str,
    id_field: str | None,
    keep: list[str] | None,
    limit: int | None,
    strict: bool,
    ray: str | None,
    workers: int | None,
    devices_per_worker: float | None,
    **settings: Any,
) -> None:
    if "-" in sources:
        raise PromptEmbedderError("a corpus cannot be standard input: it is read again to go on after a stop")
    if ray is None and (workers is not None or devices_per_worker is not None):
        raise PromptEmbedderError("--workers and --devices-per-worker are for a cluster: give --ray, too")
    by_name = named_instructions(named or [])
    with needs_extra("parquet", "a corpus"):
        from promptembedder.bulk.corpus import encode_corpus
        from promptembedder.bulk.job import Job, chosen_instructions
    runner = None
    if ray is not None:
        with needs_extra("bulk", "--ray"):
            from promptembedder.bulk.ray_runner import RayRunner
        runner = RayRunner(ray, workers or 1, devices_per_worker)
    chosen = chosen_instructions(str(model), instruction, document, by_name)
    job = Job(str(model), chosen, keep=tuple(keep or ()), **settings)
    done = encode_corpus(
        job,
        sources,
        output,
        kind=kind,
        text_field=text_field,
        id_field=id_field,
        limit=limit,
        strict=strict,
        runner=runner,
    )
    held = f"{done.written} rows" if done.written == done.rows else f"{done.written} parts of {done.rows} texts"
    left_out = f", {done.rejected} rows left out, see rejects.jsonl" if done.rejected else ""
    whole = "" if done.complete else "; the corpus has more"
    say(f"{output} holds {held}: embedded {done.embedded}, skipped {done.skipped} known ones{left_out}{whole}")
