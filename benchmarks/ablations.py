"""What each choice is worth: one change at a time, scored on parts that are nobody's test set.

    PROMPTEMBEDDER_DATA=... python benchmarks/ablations.py --report benchmarks/results/ablations-cpu

Rows: seven training files, the last `--held` rows of each held back. Figures: Spearman x 100 on STSBenchmark dev pairs
(`sts`), share of held-back rows whose positive is closer to the anchor than the negative, under the row's instruction:
of tasks that were trained on (`seen`) and of two that were not (`unseen`); `spread`: mean distance between the soft
prompts of instructions over their mean norm, 0 where the instruction is ignored. Seconds are of warm start and steps.
Every run is kept in `--output` and not done again; `--only NAME...` does some. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common import command, kept, one_setting, parsed, parser_of, say
from promptembedder import atomic
from promptembedder.config import DataConfig, DataFile, RunConfig, load_run
from promptembedder.data import Row, read_rows
from promptembedder.model import soft_prompt_module
from promptembedder.training import pair_evaluator, train
from promptembedder.training_facts import read_facts

RECIPES = Path(__file__).parents[1] / "recipes"
SEEN = ("snli_triplets", "clinc150_domain", "clinc150_intent", "mag_field_dev", "cr_sentiment")
PAIRS_ONLY = ("quora_paraphrases", "conala_rewrites")
UNSEEN = ("snips_intent", "subj")
TEXT = 'This sentence : "{text}"'
RATE = "training.prompter_learning_rate"


def frame(text_template: str, cue: str) -> tuple[str, str]:
    """Settings of a text template and of the cue that goes on from it."""
    return (f"model.text_template={json.dumps(text_template)}", f"training.warm_start.cue={json.dumps(cue)}")


ONE_CUE = frame(TEXT, 'means in one word:"')
# Name: settings that differ from the base, the recipe general.yaml.
ABLATIONS: dict[str, tuple[str, ...]] = {
    "base": (),
    "one cue for all": ONE_CUE,
    "one cue for all, prompter rate 2e-4": (*ONE_CUE, f"{RATE}=2e-4"),
    "no warm start": ("training.warm_start.steps=0",),
    "no warm start, prompter rate 2e-4": ("training.warm_start.steps=0", f"{RATE}=2e-4"),
    "warm start to 0.5": ("training.warm_start.target_probability=0.5",),
    "prompter rate 5e-6": (f"{RATE}=5e-6",),
    "prompter rate 6e-5": (f"{RATE}=6e-5",),
    "prompter rate 2e-4": (f"{RATE}=2e-4",),
    "alignment rate 3e-4": ("training.alignment_learning_rate=3e-4",),
    "alignment rate 3e-3": ("training.alignment_learning_rate=3e-3",),
    "layout prefix": (
        "model.layout=prefix",
        f"model.text_template={json.dumps(TEXT + ' means in one word:' + chr(34))}",
        "training.warm_start.steps=0",
        f"{RATE}=2e-4",
    ),
    "K = 1": ("model.num_soft_tokens=1", *frame(TEXT + "\nIn one word, its", "{aspect}")),
    "K = 2": ("model.num_soft_tokens=2", *frame(TEXT + "\nIn one word, the", '{aspect}:"')),
    "K = 10": ("model.num_soft_tokens=10", *frame(TEXT, 'The main {aspect} of this sentence in one word:"')),
    "K = 20": (
        "model.num_soft_tokens=20",
        *frame(TEXT, 'said in few short words, as clear as one can, the main {aspect} of this sentence in one word:"'),
    ),
    "softmax temperature 0.5": ("model.softmax_temperature=0.5",),
    "softmax temperature 2": ("model.softmax_temperature=2",),
    "read-out mean": ("model.readout=mean",),
    "20 of 30 layers": ("model.backbone_layers=20",),
    "25 of 30 layers": ("model.backbone_layers=25",),
    "instruction in words": (
        f"model.text_template={json.dumps(TEXT)}",
        f"model.instruction_template={json.dumps(chr(10) + '{instruction}' + chr(10) + 'The')}",
    ),
    "LoRA rank 4": ("model.lora_rank=4", "model.lora_alpha=8"),
    "LoRA rank 64": ("model.lora_rank=64", "model.lora_alpha=128"),
    "whole prompter": ("model.prompter_training=full", f"{RATE}=5e-6", "training.warm_start.learning_rate=5e-5"),
    "alignment frozen": ("training.train_alignment=false",),
    "hidden offset": ("model.hidden_offset=true",),
    "conditioned on text too": ("model.condition_on=instruction_and_text",),
    "contrastive temperature 0.02": ("training.temperature=0.02",),
    "contrastive temperature 0.1": ("training.temperature=0.1",),
    "no hard negatives": ("data.max_negatives=0",),
    "2 hard negatives": ("data.max_negatives=2",),
    "false negatives masked": ("training.mask_false_negatives=true",),
    "deep soft prompt": ("model.deep_soft_prompt=true",),
    "linear head": ("model.linear_head=true",),
    "texts in int8": ("model.text_pass=int8",),
    "one instruction for all": (),
}


def config_of(name: str, seed: int, arguments: argparse.Namespace) -> RunConfig:
    config = load_run(RECIPES / "general.yaml", [*(arguments.set or []), *ABLATIONS[name]], root=str(arguments.data))
    named = {Path(file.path).name: file for file in config.data.files}
    files = tuple(
        replace(named[f"{source}.jsonl.gz"], max_rows=count_rows(source, arguments) - arguments.held)
        for source in (*SEEN, *PAIRS_ONLY)
    )
    training = replace(
        config.training,
        output=str(arguments.output / "models" / f"{name.replace(' ', '-')}-{seed}"),
        max_steps=arguments.steps,
        batch_size=arguments.batch,
        save_every_steps=arguments.steps,
        seed=seed,
    )
    data: DataConfig = replace(config.data, files=files)
    evaluation = replace(config.evaluation, dev="sts/STSBenchmark.dev.jsonl.gz", every_steps=arguments.steps)
    return replace(config, data=data, training=training, evaluation=replace(evaluation, dev_pairs=arguments.pairs))


def count_rows(source: str, arguments: argparse.Namespace) -> int:
    return len(rows_of(source, arguments))


def rows_of(source: str, arguments: argparse.Namespace) -> list[Row]:
    return list(read_rows(DataFile(path=f"train/{source}.jsonl.gz"), str(arguments.data)))


def triplets_right(
    model: Any, sources: tuple[str, ...], arguments: argparse.Namespace, instruction: str | None
) -> float:
    """Share x 100 of held-back rows in the right order; the mean over sources."""
    shares = []
    for source in sources:
        rows = [row for row in rows_of(source, arguments)[-arguments.held :] if row.neg]
        under = instruction or rows[0].instruction
        anchor, positive, negative = (
            model.encode(texts, prompt=under, batch_size=64)
            for texts in ([r.query for r in rows], [r.pos[0] for r in rows], [r.neg[0] for r in rows])
        )
        shares.append(100 * float(np.mean((anchor * positive).sum(-1) > (anchor * negative).sum(-1))))
    return statistics.mean(shares)


def spread(model: Any, arguments: argparse.Namespace) -> float:
    """How far apart the soft prompts of different instructions are: mean distance over their mean norm."""
    module = soft_prompt_module(model)
    with torch.no_grad():
        prompts = [module.soft_prompt(rows_of(source, arguments)[0].instruction) for source in (*SEEN, *UNSEEN)]
    flat = torch.cat(prompts).flatten(1).float().cpu()
    return float(torch.pdist(flat).mean() / flat.norm(dim=-1).mean())


def run(name: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    config = config_of(name, seed, arguments)
    instruction = config.model.default_instruction if name == "one instruction for all" else None
    with tempfile.TemporaryDirectory() as scratch:
        if instruction is not None:
            files = []
            for n, file in enumerate(config.data.files):
                rows = list(read_rows(file, config.data.root))
                place = Path(scratch) / f"{n}.jsonl"
                records = [{"query": r.query, "pos": r.pos, "neg": r.neg, "instruction": instruction} for r in rows]
                place.write_text("".join(json.dumps(record) + "\n" for record in records))
                files.append(DataFile(path=str(place)))
            config = replace(config, data=replace(config.data, files=tuple(files)))
        result = train(config)
    facts = read_facts(result.folder) or {}
    evaluator = pair_evaluator(config.evaluation, config.data.root, "dev")
    assert evaluator is not None
    start = time.perf_counter()
    sts = 100 * evaluator(result.model)["dev_spearman_cosine"]
    return {
        "sts": round(sts, 2),
        "seen": round(triplets_right(result.model, SEEN, arguments, instruction), 2),
        "unseen": round(triplets_right(result.model, UNSEEN, arguments, instruction), 2),
        "spread": round(spread(result.model, arguments), 4),
        "seconds": facts.get("seconds"),
        "evaluation_seconds": round(time.perf_counter() - start, 1),
        "trained_parameters": facts.get("trained_parameters"),
        "megabytes": round(sum(p.stat().st_size for p in Path(result.folder).rglob("*") if p.is_file()) / 1e6, 1),
    }


def table(found: dict[str, list[dict[str, Any]]]) -> str:
    base = mean_of(found["base"]) if "base" in found else None
    lines = [
        "| change | sts | seen | unseen | spread | seconds | trained | MB |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, runs in found.items():
        figures = mean_of(runs)
        shown = [
            f"{figures[key]:.1f}" + (f" ({figures[key] - base[key]:+.1f})" if base and name != "base" else "")
            for key in ("sts", "seen", "unseen")
        ]
        lines.append(
            f"| {name} | {' | '.join(shown)} | {figures['spread']:.3f} | {figures['seconds']:.0f} "
            f"| {figures['trained_parameters'] / 1e6:.1f} M | {figures['megabytes']:.0f} |"
        )
    return "\n".join(lines)


def mean_of(runs: list[dict[str, Any]]) -> dict[str, float]:
    return {key: statistics.mean(run[key] for run in runs) for key in runs[0]}


def main() -> None:
    parser = parser_of(__doc__, "runs/ablations")
    parser.add_argument("--only", nargs="+", choices=list(ABLATIONS), metavar="NAME")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--pairs", type=int, default=250, help="of STSBenchmark dev")
    parser.add_argument("--held", type=int, default=80, help="rows held back of each file")
    parser.add_argument("--seeds", type=int, nargs="+", default=[13])
    parser.add_argument("--set", nargs="+", metavar="SECTION.NAME=VALUE", help="change the base")
    arguments = parsed(parser)
    names = ("steps", "batch", "pairs", "held", "set")
    one_setting(arguments.output, {name: getattr(arguments, name) for name in names})
    found: dict[str, list[dict[str, Any]]] = {}
    for name in ABLATIONS:
        for seed in arguments.seeds:
            place = arguments.output / f"{name.replace(' ', '-')}-{seed}.json"
            if place.is_file() or arguments.only is None or name in arguments.only:
                say(f"{name}, seed {seed}")
                found.setdefault(name, []).append(kept(place, partial(run, name, seed, arguments)))
                say(json.dumps(found[name][-1]))
    print(table(found))
    if arguments.report:
        record = {"command": command(), "runs": found}
        atomic.write_text(arguments.report / "ablations.md", f"`{command()}`\n\n{table(found)}\n")
        atomic.write_text(arguments.report / "ablations.json", json.dumps(record, indent=1) + "\n")
    print(json.dumps({name: mean_of(runs)["sts"] for name, runs in found.items()}))


if __name__ == "__main__":
    main()
