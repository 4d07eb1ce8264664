"""`promptembedder export`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from promptembedder.cli.arguments import (
    Device,
    ModelPath,
    check_instruction,
    check_output,
    named_instructions,
    only_one,
)
from promptembedder.errors import PromptEmbedderError
from promptembedder.progress import say

if TYPE_CHECKING:
    from promptembedder.export.export import FoldData


def export(
    model: ModelPath,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the export.")] = Path("export"),
    to: Annotated[str | None, typer.Option(help="soft-prompt (if unset), sentence-transformers, gguf or onnx.")] = None,
    instructions: Annotated[
        list[str] | None,
        typer.Option(
            "--instruction", "-i", metavar="TEXT", help="Instruction named query; unset: the model's default."
        ),
    ] = None,
    named: Annotated[
        list[str] | None, typer.Option(metavar="NAME=TEXT", help="A further instruction; may be repeated.")
    ] = None,
    add: Annotated[bool, typer.Option("--add", help="Put instructions into an existing export.")] = False,
    show: Annotated[bool, typer.Option("--list", help="Show what the export in --output holds, and stop.")] = False,
    precision: Annotated[str | None, typer.Option(help="Of the weights; unset: the format's own.")] = None,
    texts: Annotated[
        str | None, typer.Option(help="File of plain texts to fold a deep soft prompt on, a few hundred.")
    ] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="Soft tokens of a fold; unset: 10.")] = None,
    dev: Annotated[str | None, typer.Option(help="Scored pairs to report the quality of a fold by.")] = None,
    device: Device = None,
) -> None:
    """Write a model under some instructions for another engine; prints their digests, as one JSON line."""
    check_output()
    check_instruction(instruction := only_one(instructions))
    from promptembedder.atomic import refuse_input
    from promptembedder.export.export import add as add_to
    from promptembedder.export.export import export as write
    from promptembedder.export.export import format_module
    from promptembedder.export.export_folder import read_facts
    from promptembedder.model.folder import folder_of
    from promptembedder.model.instructions import instruction_for
    from promptembedder.model.named import check_named
    from promptembedder.model.store import load

    if show:
        _show(read_facts(output))
        return
    form = "soft-prompt" if to is None else to
    format_module(form)
    asked = _named(instruction, named or [])
    check_named(asked)
    if add and not asked:
        raise PromptEmbedderError("--add needs a further instruction: --named NAME=TEXT")
    if add and (to is not None or precision is not None):
        raise PromptEmbedderError("--add keeps the format and precision of the export: leave --to and --precision out")
    if add:
        read_facts(output)
    refuse_input(output, folder_of(model))
    folding = _fold_data(texts, rows, dev)
    embedder = load(model, device=device)
    if add:
        done = add_to(embedder, asked, output, folding=folding)
    else:
        own = {"query": instruction_for(embedder)}
        if instruction is None and own["query"] not in asked.values():
            asked = own | asked
        done = write(embedder, asked, output, to=form, name=str(model), precision=precision, folding=folding)
    say(str(done.parity))
    fold = done.facts["fold"]
    if fold is not None:
        _say_fold(fold)
    print(json.dumps({"export": str(output), "digests": done.digests, "parity": done.facts["parity"], "fold": fold}))


def _named(instruction: str | None, named: list[str]) -> dict[str, str]:
    found = named_instructions(named)
    if instruction is not None and "query" in found:
        raise PromptEmbedderError("--named query: the name is given twice, --instruction is named query")
    return found if instruction is None else {"query": instruction, **found}


def _fold_data(texts: str | None, rows: int | None, dev: str | None) -> FoldData | None:
    from promptembedder.data.scored_pairs import read_scored_pairs
    from promptembedder.data.texts import read_texts
    from promptembedder.export.export import FoldData
    from promptembedder.export.fold import FEWEST_TEXTS

    if texts is None:
        for option, value in (("--rows", rows), ("--dev", dev)):
            if value is not None:
                raise PromptEmbedderError(f"{option} is for a fold: give --texts FILE, too")
        return None
    lines = list(dict.fromkeys(text for _, text in read_texts(texts, None, ids=False)))
    if len(lines) < FEWEST_TEXTS:
        raise PromptEmbedderError(f"a fold needs at least {FEWEST_TEXTS} different texts, {texts} has {len(lines)}")
    return FoldData(lines, rows, None if dev is None else read_scored_pairs(dev, None))


def _show(facts: dict[str, Any]) -> None:
    print(f"format {facts['format']}, of model {facts['model']}, backbone {facts['backbone']['name']}")
    for entry in facts["instructions"]:
        print(f"{entry['name']:24} {entry['digest']}  {' '.join(entry['instruction'].split())}")


def _say_fold(fold: dict[str, Any]) -> None:
    say(f"folded into {fold['rows']} soft tokens; on texts held back:")
    for name, kept in fold["kept"].items():
        if fold["headless"]:
            line = f"{name}: correlation with the model's similarities {kept['similarity']:.4f}"
        else:
            line = f"{name}: cosine to the deep model {kept['cosine']:.4f}"
        line += f", neighbours kept {kept['neighbours_kept']:.0%}"
        if "spearman" in kept:
            line += f", Spearman {kept['spearman']:.1f} (deep model {kept['spearman_deep']:.1f})"
        say(line)
    say("embeddings of a fold do not match an index made by the deep model: encode the documents with the export")
