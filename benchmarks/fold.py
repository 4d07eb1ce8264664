"""What a fold keeps of a deep model: the quick suite deep, with its soft tokens alone, and folded.

    python benchmarks/fold.py smollm2-135m --texts FILE --rows 5 10 20 --report benchmarks/results/fold-cpu

Every task's instruction, and the one of documents, is folded on the same plain texts, which are of no task.
Seconds are those of all instructions, folded together in one call, divided by their number.
Every column is kept in `--output` and not made again.
So are the backbone's states of the tasks' texts, in bfloat16: every text is read once for all columns.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from sentence_transformers import SentenceTransformer

import promptembedder
from kept_results import command, kept, one_setting, parsed, parser_of, say
from promptembedder import atomic, evaluation
from promptembedder.data.texts import read_texts
from promptembedder.evaluation.tasks import InstructionTriplets
from promptembedder.export.compiled import DOCUMENT, Compiled, compile_model
from promptembedder.export.fold import fold
from promptembedder.export.soft_prompt import compiled_model
from promptembedder.llms.state_cache import open_text_cache
from promptembedder.model.module import soft_prompt_module


def instructions_of(task: Any, encoder: evaluation.InstructedEncoder) -> list[str]:
    """What its texts are read under, documents aside; triplets have an instruction each."""
    if not isinstance(task, InstructionTriplets):
        return [encoder.made_with(task.metadata)["instruction"]]
    task.load_data()
    return sorted({row["instruction"] for row in task.dataset["test"]})


def column(
    model: SentenceTransformer, compiled: Compiled, name: str, arguments: Any, texts: list[str]
) -> dict[str, Any]:
    """Scores of the tasks, and facts of the fold."""
    facts: dict[str, Any] = {}
    if name == "rows alone":
        bare = {key: replace(prompt, deep_JKD=None) for key, prompt in compiled.prompts.items()}
        compiled = compiled.with_prompts(bare)
        model = compiled_model(compiled, model)
    elif name != "deep":
        start = time.perf_counter()
        found = fold(model, compiled, texts, rows=int(name.split()[-1]))
        facts = found.facts | {"seconds": (time.perf_counter() - start) / len(compiled.prompts)}
        say(f"{name}: {facts}")
        compiled = found.compiled
        model = compiled_model(compiled, model)
    slug = name.replace(" ", "-")
    # Scores found in `--output` must be of this fold, not of one made earlier.
    revision = hashlib.sha256("".join(map(compiled.digest, compiled.prompts)).encode()).hexdigest()[:16]
    encoder = evaluation.InstructedEncoder(model, f"fold/{slug}", revision)
    cache = open_text_cache(
        arguments.states * 2**30,
        identity=compiled.backbone_fingerprint,
        precision="bfloat16",
        folder=arguments.output / "states",
    )
    module = soft_prompt_module(model)
    with module.in_training(replace(module.training_state, text_cache=cache)):
        result = evaluation.evaluate(encoder, arguments.tasks, arguments.output, batch_size=64)
    return {"scores": result.scores, "mean": result.mean, **facts}


def report(columns: dict[str, Any]) -> str:
    """Markdown."""
    names = list(columns)
    lines = ["| | " + " | ".join(names) + " |", "| --- |" + " ---: |" * len(names)]
    for task in columns[names[0]]["scores"]:
        scores = " | ".join(f"{columns[name]['scores'][task]:.2f}" for name in names)
        lines += [f"| {task} | {scores} |"]
    lines.append("| **mean** | " + " | ".join(f"{columns[name]['mean']:.2f}" for name in names) + " |")
    deep = columns["deep"]["mean"] if "deep" in columns else float("nan")
    lines.append(
        "| of the deep mean, % | " + " | ".join(f"{100 * columns[n]['mean'] / deep:.1f}" for n in names) + " |"
    )
    for key in ("cosine", "neighbours_kept"):
        of = [
            statistics.mean(one[key] for one in columns[name]["kept"].values()) if "kept" in columns[name] else None
            for name in names
        ]
        lines.append(f"| {key} | " + " | ".join("-" if one is None else f"{one:.3f}" for one in of) + " |")
    seconds = [columns[name].get("seconds") for name in names]
    lines.append("| seconds an instruction | " + " | ".join("-" if s is None else f"{s:.0f}" for s in seconds) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run the command line."""
    parser = parser_of(__doc__, "runs/fold")
    parser.add_argument("model")
    parser.add_argument("--texts", required=True, help="plain texts to fold on")
    parser.add_argument("--rows", type=int, nargs="+", default=[5, 10, 20])
    parser.add_argument("--states", type=int, default=16, help="GiB of disk for states of texts")
    parser.add_argument("--tasks", nargs="+", help="unset: all of the quick suite")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    arguments = parsed(parser)
    texts = [text for _, text in read_texts(arguments.texts, None, ids=False)]
    one_setting(arguments.output, {"model": arguments.model, "texts": arguments.texts, "dtype": arguments.dtype})
    given = evaluation.read_instructions(arguments.data / "instructions.json")
    arguments.tasks = evaluation.local_tasks(arguments.data, arguments.tasks, instructions=given, quick=True)
    model = promptembedder.load(arguments.model, device="cpu", dtype=arguments.dtype)
    encoder = evaluation.InstructedEncoder(model, "fold/deep", "1")
    own: dict[str, str] = {}  # names by instruction: tasks may share one
    for task in arguments.tasks:
        for number, text in enumerate(instructions_of(task, encoder)):
            own.setdefault(text, f"{task.metadata.name}-{number}" if number else task.metadata.name)
    document = encoder.made_with(arguments.tasks[0].metadata)["document_instruction"]
    compiled = compile_model(model, {name: text for text, name in own.items() if text != document})
    assert compiled.prompts[DOCUMENT].instruction == document
    columns: dict[str, Any] = {}
    for name in ["deep", "rows alone", *(f"folded, {rows}" for rows in arguments.rows)]:
        place = arguments.output / "columns" / (name.replace(" ", "-").replace(",", "") + ".json")
        columns[name] = kept(place, partial(column, model, compiled, name, arguments, texts))
        print(report(columns), flush=True)
    if arguments.report:
        arguments.report.mkdir(parents=True, exist_ok=True)
        atomic.write_text(arguments.report / "report.md", f"# Folds\n\n`{command()}`\n\n{report(columns)}\n")
        figures = json.dumps({"command": command(), "columns": columns}, indent=1)
        atomic.write_text(Path(arguments.report) / "fold.json", figures + "\n")


if __name__ == "__main__":
    main()
