"""One command per verb: parse, call, print. Bad input is one line on standard error and exit code 2."""

from __future__ import annotations

import json
import logging
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from promptembedder.errors import PromptEmbedderError

# Typer carries a click of its own, so the class of wrong usage is reached through one that it gives out.
_UsageError: Any = typer.BadParameter.__base__


app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Instruction-following text embeddings from a frozen LLM, by soft prompts that another LLM writes.",
)


ModelPath = Annotated[
    Path, typer.Argument(metavar="MODEL", help="Saved model: folder, hub id, or name of one in the package.")
]


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="YAML file of settings.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[SECTION.NAME=VALUE]...", help="Settings that replace the file's.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Folder that relative paths of data files start from.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    start: Annotated[
        Path | None,
        typer.Option("--from", metavar="MODEL", help="Start from a saved model (folder, hub id, name), not an LLM."),
    ] = None,
) -> None:
    """Train a model; prints its scores last, as one JSON line."""
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
    anew = {name: getattr(settings.model, name) for name in given}
    result = run(settings, resume=resume, start=start, anew=anew)
    if workers.number() > 0:
        return
    _say(f"saved {result.folder}")
    line = {f"{name}_spearman": round(score, 2) for name, score in result.scores.items()}
    if result.text_state_hit_rate is not None:
        line["text_state_hit_rate"] = round(result.text_state_hit_rate, 4)
    print(json.dumps(line | {"steps": result.steps, "seconds": round(result.seconds, 1), "model": str(result.folder)}))


@app.command()
def encode(
    model: ModelPath,
    texts: Annotated[str, typer.Argument(metavar="[TEXTS]", help="File of texts; - is standard input.")] = "-",
    output: Annotated[Path, typer.Option("--output", "-o", help=".npy, or .parquet with ids.")] = Path("vectors.npy"),
    instruction: Annotated[str | None, typer.Option("--instruction", "-i", help="Unset: the model's default.")] = None,
    document: Annotated[bool, typer.Option("--document", help="Use the model's document instruction.")] = False,
    kind: Annotated[
        Literal["lines", "jsonl", "parquet"] | None, typer.Option("--format", help="Unset: by the file's ending.")
    ] = None,
    text_field: Annotated[str, typer.Option(help="Field of the text in JSONL and Parquet.")] = "text",
    id_field: Annotated[str, typer.Option(help="Field of the id; rows without one get their number.")] = "id",
    batch_size: Annotated[int, typer.Option(min=1, help="Texts per forward.")] = 32,
    max_text_tokens: Annotated[
        int | None, typer.Option(min=1, help="Cut texts after so many tokens; unset: the model's.")
    ] = None,
    instruction_guidance: Annotated[
        float | None, typer.Option(min=1, help="Above 1 the instruction counts more; unset: the model's.")
    ] = None,
    truncate_dim: Annotated[int | None, typer.Option(min=1, help="Keep the first so many dimensions.")] = None,
    precision: Annotated[
        Literal["float32", "float16", "ubinary"], typer.Option(help="How values are stored.")
    ] = "float32",
    bridge: Annotated[Path | None, typer.Option(help="Map the embeddings into an older model's space.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps; unset: the accelerator, if any.")] = None,
) -> None:
    """Embed texts from a file or standard input into .npy or .parquet, in their order."""
    from promptembedder.model.folder import describe

    describe(model)  # no model is said before the libraries are opened, which takes seconds
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
        instruction_guidance=instruction_guidance,
        truncate_dim=truncate_dim,
        precision=precision,
        bridge=bridge,
        device=device,
    )
    _say(f"wrote {output}: {count} embeddings of {width} dimensions, {precision}")


@app.command()
def evaluate(
    model: Annotated[
        str,
        typer.Argument(help="Saved model (as for encode), one of sentence-transformers, LLM with --baseline."),
    ],
    data: Annotated[Path | None, typer.Option(help="Folder of tasks; unset: mteb's own, from the hub.")] = None,
    task: Annotated[list[str] | None, typer.Option(help="Name of a task or mteb benchmark; may be repeated.")] = None,
    suite: Annotated[
        Literal["quick", "full"] | None,
        typer.Option(help="Which tasks of --data. quick (the default): eleven known ones, sampled; full: all of them."),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Results, in mteb's layout.")] = Path("results"),
    baseline: Annotated[
        str | None, typer.Option(help="Take MODEL as an untrained LLM: mean, last, prompt_eol, hard_instruction.")
    ] = None,
    instructions: Annotated[
        Path | None,
        typer.Option(
            help="JSON of task name to instruction; unset: instructions.json in the data folder, or mteb's own."
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts per forward.")] = 32,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps; unset: the accelerator, if any.")] = None,
) -> None:
    """Score a model with mteb's tasks and metrics; prints the main scores x 100, as one JSON line at the end."""
    evaluation = _evaluation()
    if data is None and not task:
        raise PromptEmbedderError("give --data FOLDER, or --task NAME for tasks from the hub")
    if data is None:
        if suite is not None:
            raise PromptEmbedderError("--suite is for tasks of a folder: give --data FOLDER, or leave it out")
        given = {} if instructions is None else evaluation.read_instructions(instructions)
        tasks = evaluation.hub_tasks(task or [], given)
        if instructions is not None:
            _say_unknown(instructions, set(given) - {found.metadata.name for found in tasks})
    else:
        suite = suite or "quick"
        own = data / "instructions.json"
        given = evaluation.read_instructions(instructions or own) if instructions or own.is_file() else {}
        if instructions is not None:
            _say_unknown(instructions, set(given) - {t.metadata.name for t in evaluation.local_tasks(data)})
        tasks = evaluation.local_tasks(data, task, instructions=given, quick=suite == "quick")
        for found in tasks:
            found.load_data()  # what is wrong in a row is said before the model opens
        output = output / suite  # the same task has other rows in each
    encoder = evaluation.open_model(model, baseline=baseline, device=device)
    if instructions is not None and not encoder.reads_instructions:
        raise PromptEmbedderError(
            f"{model} reads no instructions; leave --instructions out, or give an LLM with --baseline hard_instruction"
        )
    result = evaluation.evaluate(encoder, tasks, output, batch_size=batch_size)
    for name, score in result.scores.items():
        _say(f"{name:24} {result.kinds[name]:20} {score:6.2f}")
    scores = {name: round(score, 2) for name, score in result.scores.items()}
    print(json.dumps({"mean": round(result.mean, 2), "scores": scores, "results": str(result.folder)}))


@app.command()
def transfer(
    model: ModelPath,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[SECTION.NAME=VALUE]...", help="Further settings, such as training.max_steps=75."),
    ] = None,
    backbone: Annotated[str, typer.Option(help="The new Embedding LLM: short name, folder, .gguf file, hub id.")] = "",
    train: Annotated[list[str] | None, typer.Option(help="File of labelled rows; may be repeated.")] = None,
    texts: Annotated[list[str] | None, typer.Option(help="File of plain texts, before any rows; repeatable.")] = None,
    dev: Annotated[str | None, typer.Option(help="Scored pairs to choose and report by.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of model, report and picture.")] = Path(
        "runs/transfer"
    ),
    data: Annotated[Path | None, typer.Option(help="Folder that relative paths of data files start from.")] = None,
    share_prompter: Annotated[
        bool, typer.Option("--share-prompter", help="Point to MODEL's prompter instead of copying it.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
) -> None:
    """Move a trained model to another backbone: a new alignment matrix, the same prompter."""
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
        _say(f"{stage.name:22} {score}{stage.seconds:8.1f} s  {stage.examples} examples")
    line: dict[str, Any] = {f"{name}_spearman": round(score, 2) for name, score in result.scores.items()}
    print(json.dumps(line | {"start": result.starts[0].name, "model": str(result.folder)}))


@app.command()
def bridge(
    old: Annotated[Path, typer.Argument(metavar="OLD", help="Model that the index was made with (as for encode).")],
    new: Annotated[Path, typer.Argument(metavar="NEW", help="Model that takes over.")],
    texts: Annotated[str, typer.Argument(metavar="TEXTS", help="File of texts to fit on; the more the better.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Safetensors file.")] = Path("bridge.safetensors"),
    instruction: Annotated[str | None, typer.Option("--instruction", "-i", help="Unset: each model's default.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts per forward.")] = 32,
) -> None:
    """Fit a linear map from a new model's embeddings to an old index; prints what it keeps, as one JSON line."""
    from promptembedder.bulk.bridge import FEWEST_TEXTS, PROBE, fit
    from promptembedder.data.texts import read_texts
    from promptembedder.model.encode import encode as embed
    from promptembedder.model.folder import describe
    from promptembedder.model.store import load

    if instruction is not None and not instruction.strip():
        raise PromptEmbedderError("--instruction must be a sentence")
    for place in (old, new):
        describe(place)  # a model that is not there is said before the other one reads every text
    lines = list(dict.fromkeys(text for _, text in read_texts(texts, None, ids=False)))
    if len(lines) < FEWEST_TEXTS:
        raise PromptEmbedderError(f"a bridge needs at least {FEWEST_TEXTS} different texts, {texts} has {len(lines)}")
    if output.is_dir():
        raise PromptEmbedderError(f"bridge {output} cannot be written: it is a folder")
    if not output.parent.is_dir() or not os.access(output.parent, os.W_OK):
        raise PromptEmbedderError(f"bridge {output} cannot be written: {output.parent} is no folder open to you")
    by_new, by_old = (
        embed(load(place), [PROBE, *lines], instruction, batch_size=batch_size, show_progress_bar=True)
        for place in (new, old)
    )
    fitted = fit(by_new[1:], by_old[1:], probe_D=by_new[0])
    fitted.save(output)
    print(json.dumps(fitted.facts | {"bridge": str(output)}))


@app.command()
def compare(
    results: Annotated[list[Path], typer.Argument(help="Folders that evaluate wrote, of one model or of many.")],
    to: Annotated[str | None, typer.Option(help="Model that ratios are taken to.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of report and pictures.")] = Path("comparison"),
) -> None:
    """Put results of several models on one page; prints the table."""
    evaluation = _evaluation()
    comparison = evaluation.compare(evaluation.read_columns(results), to)
    evaluation.write_report(comparison, output)
    print(evaluation.markdown(comparison))
    _say(f"wrote {output}/report.md, {output}/report.html")


@app.command()
def explain(
    model: ModelPath,
    instruction: Annotated[str | None, typer.Argument(help="Unset: the model's default instruction.")] = None,
    top: Annotated[int, typer.Option(min=1, help="Words listed per soft token.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Show the words that each soft token of an instruction mixes, with their weights."""
    from promptembedder.model.explain import explain as read
    from promptembedder.model.module import soft_prompt_module
    from promptembedder.model.store import load

    embedder = load(model)
    asked = instruction if instruction is not None else soft_prompt_module(embedder).settings.default_instruction
    readings = read(embedder, asked, top)
    if as_json:
        print(json.dumps({"instruction": asked, "soft_tokens": [asdict(r) for r in readings]}))
        return
    print(f"instruction: {asked}")
    for n, reading in enumerate(readings, 1):
        words = "  ".join(f"{word!r} {weight:.2f}" for word, weight in reading.words)
        print(f"soft token {n}  entropy {reading.entropy:5.2f} nats  {words}")


@app.command()
def info(
    model: ModelPath,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Show what a saved model is made of; opens no LLM."""
    from promptembedder.model.folder import describe

    facts = describe(model)
    if as_json:
        print(json.dumps(facts))
        return
    for name, value in facts.items():
        on_one_line = str(value).replace("\n", "\\n")
        print(f"{name:24} {on_one_line}")


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of report, picture and model.")] = Path(
        "runs/demo"
    ),
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 20,
) -> None:
    """Train on BBC news with SmolLM2-135M and compare with the untrained LLM (minutes on two CPU cores)."""
    from promptembedder.demo.run import run_demo

    print(run_demo(output, steps=steps))


def _evaluation() -> Any:
    try:
        from promptembedder import evaluation
    except ImportError as error:
        missing = "mteb" if error.name is None else error.name
        raise PromptEmbedderError(
            f"this command needs mteb, and {missing} cannot be imported; install the extra: pip install '.[evaluate]'"
        ) from error
    return evaluation


def _say_unknown(path: Path, names: set[str]) -> None:
    # No error: one file may serve several folders.
    if names:
        logging.getLogger(__name__).warning("%s names tasks that are not there: %s", path, ", ".join(sorted(names)))


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def main() -> None:
    """Entry point of the `promptembedder` command."""
    import warnings

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    # Deprecations inside the libraries are ours to follow up, not the user's.
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    try:
        sys.exit(app(standalone_mode=False))
    except _UsageError as error:
        command = "promptembedder" if error.ctx is None else error.ctx.command_path
        _say(f"promptembedder: {' '.join(error.format_message().split())} (see {command} --help)")
        sys.exit(2)
    except typer.Abort:
        _say("promptembedder: stopped")
        sys.exit(130)
    except PromptEmbedderError as error:
        _say(f"promptembedder: {' '.join(str(error).split())}")
        sys.exit(2)
    except BrokenPipeError:  # whoever reads our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:  # such as a folder that may not be looked into, or a disk that is full
        place = "" if error.filename is None else f"{error.filename}: "
        _say(f"promptembedder: {place}{error.strerror or error}")
        sys.exit(2)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which is not imported for this
            raise
        _say("promptembedder: out of memory on the device; use smaller batches (--batch-size, training.batch_size)")
        sys.exit(2)
    except KeyboardInterrupt:
        _say("promptembedder: stopped")
        sys.exit(130)
