"""How fast a model embeds, next to the same backbone in sentence-transformers with the instruction in words.

    OMP_NUM_THREADS=1 python benchmarks/encode_speed.py smollm2-135m --report benchmarks/results/encode-speed-cpu

Figures are embeddings a second, at texts of random words: all of one length, and of mixed lengths up to it. The
variants run in turn, in one process and one precision; every figure is a median over `--rounds`, every ratio a median
of the ratios within a round.

- `backbone`: the LLM reads the bare text; mean of its last hidden states.
- `words`: the LLM reads `Instruct: INSTRUCTION`, a line break and `Query: TEXT`; last token. Every further instruction
  reads every text again, so the figure holds for any number of instructions. It is also that of an LLM with a merged
  LoRA, which has weights of the same shapes and reads the same tokens.
- `soft_prompt`: the model, under one instruction.
- `soft_prompts_2`, `soft_prompts_8`: the model, every text under several instructions in one call of
  `promptembedder.encode`.

`query_ms` is the time of one short query: `words`, and the model under a `new` instruction, which the prompter has to
read first, and under a `remembered` one. `cold_start_seconds` are seconds of processor time of whole processes. The
last line is one JSON object.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling

import pictures
import promptembedder
from kept_results import command, say
from promptembedder import atomic
from promptembedder.data.aspects import ASPECTS
from promptembedder.evaluation import plain_reader
from promptembedder.llms.locate import locate
from promptembedder.llms.quiet import quiet_transformers
from promptembedder.model.module import soft_prompt_module

# Of 15 tokens each, for SmolLM2.
INSTRUCTIONS = [
    f"Group the texts by {aspect}, and by nothing else that they may share."
    for aspect in ("topic", "feeling", "length", "style", "place", "time", "age", "tone")
]
IN_WORDS = "Instruct: {instruction}\nQuery: {text}"
INSTRUCTION_TOKENS = 64  # room beside the text, so that no instruction is truncated
SEVERAL = (2, 8)
OURS = ("soft_prompt", *(f"soft_prompts_{n}" for n in SEVERAL))
VARIANTS = ("backbone", "words", *OURS)
RATIO = "{}_to_words"
COLD = {
    "import_sentence_transformers": "import sentence_transformers",
    "load_and_encode": "import promptembedder; promptembedder.load({model!r}).encode(['A text.'])",
    "explain": "import sys; from promptembedder.cli import main; sys.argv[1:] = ['explain', {model!r}]; main()",
}
BATCH: dict[str, Any] = {"batch_size": 32, "show_progress_bar": False}


def texts_of(model: SentenceTransformer, tokens: int, count: int, mixed: bool = False) -> list[str]:
    """Different texts of about that many tokens, or of four up to that many."""
    drawn = random.Random(tokens)
    words = [" ".join(drawn.choices(ASPECTS, k=2 * tokens)) for _ in range(count)]
    lengths = [drawn.randint(4, tokens) if mixed else tokens for _ in words]
    encoded = [model.tokenizer(text, add_special_tokens=False)["input_ids"] for text in words]
    return [str(model.tokenizer.decode(ids[:length])) for ids, length in zip(encoded, lengths, strict=True)]


def plain(model: SentenceTransformer, pooling_mode: str, max_tokens: int) -> SentenceTransformer:
    """The model's backbone in sentence-transformers, in the same precision, without a chat template."""
    module = soft_prompt_module(model)
    located = locate(module.base_models.backbone, module.base_models.backbone_revision)
    with quiet_transformers():
        reader = plain_reader(str(located.folder), module.backbone.lm.dtype)
    reader.tokenizer.padding_side = "right"
    pooling = Pooling(reader.get_embedding_dimension(), pooling_mode=pooling_mode)
    built = SentenceTransformer(modules=[reader, pooling, Normalize()], device=str(model.device))
    built.max_seq_length = max_tokens
    return built


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def speeds(runs: Mapping[str, Callable[[], object]], texts: int, rounds: int) -> dict[str, float]:
    """Embeddings a second of each variant, and how many times as fast as `words` the model is."""
    rows: list[dict[str, float]] = []
    for turn in range(rounds + 1):
        taken = {name: seconds(run) for name, run in runs.items()}
        if turn:  # the first round warms up
            made = {
                name: texts * int(name.removeprefix("soft_prompts_")) if "prompts" in name else texts for name in taken
            }
            row = {name: made[name] / spent for name, spent in taken.items()}
            rows.append(row | {RATIO.format(name): row[name] / row["words"] for name in OURS})
    return {name: round(statistics.median(row[name] for row in rows), 2) for name in rows[0]}


def query_ms(model: SentenceTransformer, words: SentenceTransformer, rounds: int) -> dict[str, float]:
    """Milliseconds of one query of eight words."""
    query = " ".join(ASPECTS[:8])
    in_words = IN_WORDS.format(instruction=INSTRUCTIONS[0], text=query)
    runs: dict[str, Callable[[int], object]] = {
        "words": lambda n: words.encode([in_words], show_progress_bar=False),
        "new": lambda n: model.encode([query], prompt=f"Find number {n}.", show_progress_bar=False),
        "remembered": lambda n: model.encode([query], prompt=INSTRUCTIONS[0], show_progress_bar=False),
    }
    taken = {name: [seconds(partial(run, n)) for n in range(2 * rounds + 1)] for name, run in runs.items()}
    return {name: round(1000 * statistics.median(spent[1:]), 1) for name, spent in taken.items()}


def cold_start(model: str, rounds: int) -> dict[str, float]:
    """Seconds of processor time of processes that do one thing and end."""
    taken: dict[str, list[float]] = {name: [] for name in COLD}
    for _ in range(rounds):
        for name, code in COLD.items():
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run([sys.executable, "-c", code.format(model=model)], check=True, capture_output=True)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            taken[name].append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return {name: round(statistics.median(spent), 2) for name, spent in taken.items()}


def table(result: Mapping[str, Any]) -> str:
    figures, latency, cold = (result[name] for name in ("embeddings_per_second", "query_ms", "cold_start_seconds"))
    several = " | ".join(f"{n} soft prompts at once" for n in SEVERAL)
    lines = [
        "Embeddings a second:",
        "",
        f"| tokens a text | backbone, no instruction | instruction in words | soft prompt | {several} |",
        "| --- " + "| ---: " * len(VARIANTS) + "|",
        *(f"| {n} | {' | '.join(f'{row[name]:.1f}' for name in VARIANTS)} |" for n, row in figures.items()),
        "",
        "Times as fast as the instruction in words, which reads the text once per instruction:",
        "",
        f"| tokens a text | soft prompt | {several} |",
        "| --- " + "| ---: " * len(OURS) + "|",
        *(
            f"| {n} | {' | '.join(f'{row[ratio]:.2f}' for ratio in map(RATIO.format, OURS))} |"
            for n, row in figures.items()
        ),
        "",
        f"One query: {latency['words']} ms with the instruction in words, {latency['remembered']} ms with the soft "
        f"prompt of a remembered instruction, {latency['new']} ms with that of a new one.",
    ]
    if cold:
        lines += [
            "",
            f"Processor time of a start: {cold['load_and_encode']} s to load the model and encode a text, "
            f"{cold['explain']} s for `promptembedder explain`, {cold['import_sentence_transformers']} s for "
            "`import sentence_transformers` alone.",
        ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder, name or hub id of a saved model")
    parser.add_argument("--lengths", type=int, nargs="+", default=[16, 64, 128, 512], metavar="TOKENS")
    parser.add_argument("--texts", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cold", action="store_true", help="measure starts of whole processes, too")
    parser.add_argument("--device", help="unset: the accelerator, if there is one")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], help="unset: as saved")
    parser.add_argument("--report", type=Path, help="folder of figures, table and picture")
    arguments = parser.parse_args()
    model = promptembedder.load(arguments.model, device=arguments.device, dtype=arguments.dtype)
    longest = max(arguments.lengths)
    model.max_seq_length = longest
    backbone, words = plain(model, "mean", longest), plain(model, "lasttoken", longest + INSTRUCTION_TOKENS)
    figures: dict[str, dict[str, float]] = {}
    for length, mixed in itertools.product(arguments.lengths, (False, True)):
        texts = texts_of(model, length, arguments.texts, mixed)
        in_words = [IN_WORDS.format(instruction=INSTRUCTIONS[0], text=text) for text in texts]
        runs: dict[str, Callable[[], object]] = {
            "backbone": partial(backbone.encode, texts, **BATCH),
            "words": partial(words.encode, in_words, **BATCH),
            "soft_prompt": partial(model.encode, texts, prompt=INSTRUCTIONS[0], **BATCH),
        }
        for n in SEVERAL:
            runs[f"soft_prompts_{n}"] = partial(promptembedder.encode, model, texts, INSTRUCTIONS[:n], **BATCH)
        name = f"up to {length}" if mixed else str(length)
        figures[name] = speeds(runs, len(texts), arguments.rounds)
        say(f"{name} tokens: {json.dumps(figures[name])}")
    latency = query_ms(model, words, arguments.rounds)
    machine = {
        "device": str(model.device),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "dtype": str(soft_prompt_module(model).backbone.lm.dtype).removeprefix("torch."),
    }
    cold = cold_start(arguments.model, arguments.rounds) if arguments.cold else {}
    result = {"embeddings_per_second": figures, "query_ms": latency, "cold_start_seconds": cold} | machine
    if arguments.report:
        groups = [f"{length} tokens a text" for length in figures]
        series = {name: [row[name] for row in figures.values()] for name in VARIANTS}
        pictures.bars(arguments.report / "encode-speed.png", groups, series, "embeddings a second")
        head = f"`{command()}`, {', '.join(f'{name} {value}' for name, value in machine.items())}"
        picture = "![Embeddings a second by length](encode-speed.png)"
        report = f"{head}\n\n{table(result)}\n\n{picture}\n"
        atomic.write_text(arguments.report / "encode-speed.md", report)
        record = {"command": command(), **result}
        atomic.write_text(arguments.report / "encode-speed.json", json.dumps(record, indent=1) + "\n")
    print(table(result))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
