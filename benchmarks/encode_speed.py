"""How fast a model embeds, beside its backbone without soft prompts (mean of the last hidden states, same precision).

    python benchmarks/encode_speed.py smollm2-135m --report benchmarks/results/encode-speed-cpu

Texts are made of random words. Per length: texts a second of the plain backbone, of the model under one instruction,
and of texts times instructions under two at once; medians of `--rounds`, one after the other in turn. Then the
milliseconds of one short query whose instruction is new, which the prompter has to read, and of one whose instruction
is remembered. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling

import promptembedder
from kept_results import command, say
from promptembedder import atomic, evaluation
from promptembedder.data.aspects import ASPECTS
from promptembedder.llms import locate as locate_module
from promptembedder.llms import quiet as quiet_module
from promptembedder.model.module import soft_prompt_module

INSTRUCTIONS = ["Group the texts by topic.", "Group the texts by the feeling that they express."]


def texts_of(model: SentenceTransformer, tokens: int, count: int) -> list[str]:
    """Texts of about so many tokens, none of them twice."""
    drawn = random.Random(tokens)
    words = [" ".join(drawn.choices(ASPECTS, k=2 * tokens)) for _ in range(count)]
    encoded = [model.tokenizer(text, add_special_tokens=False)["input_ids"][:tokens] for text in words]
    return [str(model.tokenizer.decode(ids)) for ids in encoded]


def plain(model: SentenceTransformer) -> SentenceTransformer:
    """The backbone alone, as sentence-transformers reads with an LLM."""
    module = soft_prompt_module(model)
    located = locate_module.locate(module.base_models.backbone, module.base_models.backbone_revision)
    with quiet_module.quiet_transformers():
        reader = evaluation.plain_reader(str(located.folder), module.backbone.lm.dtype)
    reader.tokenizer.padding_side = "right"
    pooling = Pooling(reader.get_embedding_dimension(), pooling_mode="mean")
    return SentenceTransformer(modules=[reader, pooling, Normalize()], device=str(model.device))


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder, name or hub id of a saved model")
    parser.add_argument("--lengths", type=int, nargs="+", default=[16, 64, 128], metavar="TOKENS")
    parser.add_argument("--texts", type=int, default=128)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", help="unset: the accelerator, if there is one")
    parser.add_argument("--report", type=Path, help="folder of figures and table")
    arguments = parser.parse_args()
    model = promptembedder.load(arguments.model, device=arguments.device)
    backbone = plain(model)
    model.max_seq_length = backbone.max_seq_length = max(arguments.lengths)
    rows, figures = [], {}
    for length in arguments.lengths:
        texts = texts_of(model, length, arguments.texts)
        batch = {"batch_size": arguments.batch, "show_progress_bar": False}
        runs: dict[str, Callable[[], object]] = {
            "plain": partial(backbone.encode, texts, **batch),
            "one_instruction": partial(model.encode, texts, prompt=INSTRUCTIONS[0], **batch),
            "two_instructions": partial(promptembedder.encode, model, texts, INSTRUCTIONS, **batch),
        }
        taken: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(arguments.rounds + 1):
            for name, run in runs.items():
                spent = seconds(run)
                if turn:  # the first is to warm up
                    taken[name].append(spent)
        count = {"plain": 1, "one_instruction": 1, "two_instructions": 2}
        found = {name: count[name] * len(texts) / statistics.median(spent) for name, spent in taken.items()}
        figures[str(length)] = {name: round(value, 1) for name, value in found.items()}
        rows.append(f"| {length} | " + " | ".join(f"{found[name]:.1f}" for name in runs) + " |")
        say(rows[-1])
    query = [" ".join(ASPECTS[:8])]
    ask = partial(model.encode, query, show_progress_bar=False)
    new = [seconds(partial(ask, prompt=f"Find number {n}.")) for n in range(2 * arguments.rounds)]
    known = [seconds(partial(ask, prompt=INSTRUCTIONS[0])) for _ in range(4 * arguments.rounds)]
    latency = {"new": round(1000 * statistics.median(new), 1), "remembered": round(1000 * statistics.median(known), 1)}
    machine = {
        "device": str(model.device),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "dtype": str(soft_prompt_module(model).backbone.lm.dtype).removeprefix("torch."),
    }
    result = {"texts_per_second": figures, "query_ms": latency} | machine
    table = [
        "| tokens a text | backbone alone, texts a second | under an instruction | texts x 2 instructions |",
        "| ---: | ---: | ---: | ---: |",
        *rows,
        "",
        f"One query: {latency['new']} ms under a new instruction, {latency['remembered']} ms under a remembered one.",
    ]
    if arguments.report:
        arguments.report.mkdir(parents=True, exist_ok=True)
        atomic.write_text(arguments.report / "encode-speed.md", "\n".join(table) + "\n")
        record = {"command": command(), **result}
        atomic.write_text(arguments.report / "encode-speed.json", json.dumps(record, indent=1) + "\n")
    print("\n".join(table))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
