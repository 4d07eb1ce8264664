"""What each choice is worth: one change at a time, scored on parts that are nobody's test set.

    PROMPTEMBEDDER_DATA=... python benchmarks/ablations.py --report benchmarks/results/ablations-cpu

Rows: seven training files, the last `--held` rows of each held back. Figures: Spearman x 100 on STSBenchmark dev pairs
(`sts`), share of held-back rows whose positive is closer to the anchor than the negative, under the row's instruction:
of five tasks, trained on unless the entry leaves some out (`seen`), and of two that never are (`unseen`); `requests`,
`remarks`, `manners`: share of made-up texts, of kinds never trained on (but for one entry), that are in order under two
instructions which swap positive and negative; `spread`: mean distance between the soft prompts of instructions over
their mean norm, 0 where the instruction is ignored. Seconds are of warm start and steps; layout `suffix` reads every
text once for all runs (text-state cache on disk, up to `--states`), so they say nothing of the change. With contrast
rows the warm start knows their instructions too.
Every run is kept in `--output` and not done again; `--only NAME...` does some. `--model` scores a saved model on the
made-up texts alone; to a model trained on all kinds of rows, requests are no unseen kind. The last line is one JSON
object.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import statistics
import tempfile
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

import pictures
import promptembedder
from kept_results import command, kept, one_setting, parsed, parser_of, say
from promptembedder import atomic
from promptembedder.data.families import FAMILIES, Family
from promptembedder.data.made_up import contrast_rows
from promptembedder.data.rows import Row, TrainingData, load_training_data, read_rows
from promptembedder.data.settings import DataConfig, DataFile
from promptembedder.model.build import build
from promptembedder.model.leaves import TrainingState
from promptembedder.model.module import soft_prompt_module
from promptembedder.model.prompter import load_trained_state, trained_state
from promptembedder.model.store import save
from promptembedder.training.evaluators import pair_evaluator
from promptembedder.training.fit import fit, text_cache
from promptembedder.training.settings import RunConfig, load_run
from promptembedder.training.train import aspects_of
from promptembedder.training.warm_start import warm_start

RECIPES = Path(__file__).parents[1] / "recipes"
SEEN = ("snli_triplets", "clinc150_domain", "clinc150_intent", "mag_field_dev", "cr_sentiment")
PAIRS_ONLY = ("quora_paraphrases", "conala_rewrites")
FEW = ("snli_triplets", "clinc150_intent", "cr_sentiment")
FEW_CLASSES = ("clinc150_domain", "mag_field_dev", "cr_sentiment")
UNSEEN = ("snips_intent", "subj")
TEXT = 'This sentence : "{text}"'
RATE = "training.prompter_learning_rate"


def frame(text_template: str, cue: str) -> tuple[str, str]:
    """Settings of a text template and of the cue that goes on from it."""
    return (f"model.text_template={json.dumps(text_template)}", f"training.warm_start.cue={json.dumps(cue)}")


QWEN = "qwen2.5-coder-0.5b-instruct"
ONE_CUE = frame(TEXT, 'means in one word:"')
# Name: settings that differ from the base, the recipe general.yaml.
ABLATIONS: dict[str, tuple[str, ...]] = {
    "base": (),
    "one cue for all": ONE_CUE,
    "one cue for all, prompter rate 2e-4": (*ONE_CUE, f"{RATE}=2e-4"),
    "no warm start": ("training.warm_start.steps=0",),
    "no warm start, prompter rate 2e-4": ("training.warm_start.steps=0", f"{RATE}=2e-4"),
    "no warm start, prompter rate 2e-4, no deep soft prompt": (
        "training.warm_start.steps=0",
        f"{RATE}=2e-4",
        "model.deep_rank=null",
    ),
    "warm start to 0.5": ("training.warm_start.target_probability=0.5",),
    "prompter rate 5e-6": (f"{RATE}=5e-6",),
    "prompter rate 6e-5": (f"{RATE}=6e-5",),
    "prompter rate 2e-4": (f"{RATE}=2e-4",),
    "alignment rate 2e-4": ("training.alignment_learning_rate=2e-4",),
    "alignment rate 1e-3": ("training.alignment_learning_rate=1e-3",),
    "alignment rate 3e-3": ("training.alignment_learning_rate=3e-3",),
    # Compare with `no warm start, prompter rate 2e-4, no deep soft prompt`; here the cue stands in the text.
    "layout prefix, no warm start, prompter rate 2e-4, no deep soft prompt": (
        "model.layout=prefix",
        "model.deep_rank=null",
        f"model.text_template={json.dumps(TEXT + ' means in one word:' + chr(34))}",
        "training.warm_start.steps=0",
        f"{RATE}=2e-4",
    ),
    "K = 1": ("model.num_soft_tokens=1", *frame(TEXT + "\nIn one word, its", "{aspect}")),
    "K = 2": ("model.num_soft_tokens=2", *frame(TEXT + "\nIn one word, the", '{aspect}:"')),
    "K = 10": ("model.num_soft_tokens=10", *frame(TEXT, 'The main {aspect} of this sentence in one word:"')),
    "K = 20": (
        "model.num_soft_tokens=20",
        *frame(
            TEXT + " said in", 'few short words, as clear as one can, the main {aspect} of this sentence in one word:"'
        ),
    ),
    "softmax temperature 0.5": ("model.softmax_temperature=0.5",),
    "softmax temperature 2": ("model.softmax_temperature=2",),
    "read-out mean": ("model.readout=mean",),
    "LoRA rank 4": ("model.lora_rank=4",),
    "LoRA rank 64": ("model.lora_rank=64",),
    "whole prompter": ("model.prompter_training=full", f"{RATE}=5e-6", "training.warm_start.learning_rate=5e-5"),
    "contrastive temperature 0.02": ("training.temperature=0.02",),
    "contrastive temperature 0.1": ("training.temperature=0.1",),
    "no hard negatives": ("data.max_negatives=0",),
    "2 hard negatives": ("data.max_negatives=2",),
    "false negatives masked": ("training.mask_false_negatives=true",),
    "no deep soft prompt": ("model.deep_rank=null",),
    "no linear head": ("model.linear_head=false",),
    "neither": ("model.deep_rank=null", "model.linear_head=false"),
    "prompter SmolLM2, backbone Qwen2.5-Coder-0.5B": (f"model.backbone={QWEN}",),
    "prompter Qwen2.5-Coder-0.5B, backbone SmolLM2": (f"model.prompter={QWEN}",),
    "no contrast rows": ("data.contrast_rows=0",),
    "one instruction for all, no contrast rows": ("data.contrast_rows=0",),
    "three training files": ("data.contrast_rows=12000",),  # a quarter of the batches there, too
    "half the contrast rows": ("data.contrast_rows=12000",),
    "twice the contrast rows": ("data.contrast_rows=48000",),
    "files of few classes with own negatives": (),
    "contrast rows with own negatives": ("data.contrast_in_batch_negatives=false",),
    "requests among the contrast rows": (),
}


# Held out of every run but one: what an assistant is asked to do, and with what. Kept apart from the package's kinds,
# so that figures stay comparable when those change.
REQUESTS = Family(
    ("request", "command", "message"),
    (
        "{do} {thing}",
        "please {do} {thing}",
        "could you {do} {thing}?",
    ),
    {
        "do": (
            ("action", "command"),
            """set up/create; delete/get rid of; show me/tell me about; change/update; look for/search for; order/buy;
            forward/share; explain/clarify; start/turn on; stop/turn off; repeat/say again; check/have a look at;
            rate/review; remind me of/don't let me forget; rename/give another name to; hide/keep from others;
            describe/give me details of; recommend/suggest; reply to/answer; book/reserve; raise/turn up; lower/turn
            down; list/read out; save/store""",
        ),
        "thing": (
            ("subject", "domain", "object"),
            """the alarm/my wake up call; the meeting/my appointment; the song/my playlist; the email/the message from
            tom; the shopping list/what I need from the grocer; the flight/my plane ticket; the pizza/my take-away; the
            forecast/the weather report; the lamp/the light in the kitchen; the headlines/the morning news; the bank
            transfer/my last payment; the photo/the picture of our dog; the recipe/how to bake bread; the taxi/my ride
            home; the heating/the thermostat; the podcast/the radio show; the stock price/my shares; the vacuum
            cleaner/the robot that sweeps; the timer/the countdown; the audiobook/the novel on my phone; the game/the
            quiz; the contact/the phone number of anna; the tweet/my post; the traffic/the jam on the motorway""",
        ),
    },
)
# Held out of every run: what moves people, and about what.
REMARKS = Family(
    ("remark",),
    ("{feel} {matter}", "I am {feel} {matter}", "we were {feel} {matter}", "everybody here is {feel} {matter}"),
    {
        "feel": (
            ("feeling",),
            """happy about/delighted with; angry about/furious at; worried about/anxious because of; proud of/full of
            pride in; bored with/tired of; surprised by/amazed at; sorry about/full of regret over; jealous
            of/envious of; curious about/eager to know about; grateful for/thankful for; ashamed of/embarrassed by;
            afraid of/scared of; disappointed by/let down by; hopeful about/optimistic about""",
        ),
        "matter": (
            ("matter",),
            """the new office/our other workplace; the exam/the test at school; the food/what was for dinner; the
            neighbours/the people next door; the holiday/our trip; the weather/the rain; the car/the old vehicle; the
            baby/our newborn; the match/how our team played; the bill/what it all costs; the boss/the head of the
            department; the dog/our puppy; the party/the birthday celebration; the doctor/the man at the clinic""",
        ),
    },
)
# Held out of every run: how something is asked for, and what. No value is one of the training rows'.
MANNERS = Family(
    ("request",),
    ("{manner} {chore}", "{manner} {chore} today", "well, {manner} {chore}", "{manner} {chore}, as I said"),
    {
        "manner": (
            ("style",),
            """I would be most grateful if you could/might I trouble you to/I should be much obliged if you would; do it
            at once and/without any backtalk/no excuses this time, just; it would be super cool to/how about we
            just/feel like having a go and; I beg you on my knees to/I am crying while I ask you to/please please
            please, I implore you to; all persons concerned are required to/under paragraph nine the tenant
            shall/failure to comply notwithstanding, the party must; be a darling and/sweetie, could you/my love, would
            you; it is high time somebody bothered to/of course nobody ever thinks to/as usual I am the only one to;
            verily thou shalt/I bid thee, good knight, to/hear ye, go forth and""",
        ),
        "chore": (
            ("content",),
            """empty the bin/take out the rubbish; feed the cat/give the kitten its food; water the plants/give the
            flowers a drink; wash the car/clean the windscreen; sweep the stairs/brush the steps; lay the table/put out
            plates and forks; walk the dog/take the puppy outside; lock the door/turn the key in the lock; make the
            bed/change the sheets; iron the shirt/press the blouse; peel the potatoes/prepare the vegetables; collect
            the parcel/fetch the package; pay the rent/send the landlord his money; phone grandma/ring your
            grandmother""",
        ),
    },
)
ASKED = {
    "manner": "Sort the requests by the style that they are written in.",
    "chore": "Sort the requests by the content, however it is put.",
    "do": "Sort the requests by the action that they ask for.",
    "thing": "Sort the requests by the subject that they are about.",
    "feel": "Sort the remarks by the feeling that they show.",
    "matter": "Sort the remarks by the matter that they are about.",
}
REQUESTS_TOO = "requests among the contrast rows"


def config_of(name: str, seed: int, arguments: argparse.Namespace) -> RunConfig:
    config = load_run(RECIPES / "general.yaml", [*(arguments.set or []), *ABLATIONS[name]], root=str(arguments.data))
    named = {Path(file.path).name: file for file in config.data.files}
    sources = FEW if name == "three training files" else (*SEEN, *PAIRS_ONLY)
    files = tuple(
        replace(
            named[f"{source}.jsonl.gz"],
            max_rows=count_rows(source, arguments) - arguments.held,
            in_batch_negatives=name != "files of few classes with own negatives" or source not in FEW_CLASSES,
        )
        for source in sources
    )
    training = replace(
        config.training,
        output=str(arguments.output / "models" / f"{name.replace(' ', '-')}-{seed}"),
        max_steps=arguments.steps,
        batch_size=arguments.batch,
        arguments={**config.training.arguments, "save_steps": arguments.steps},
        seed=seed,
    )
    if config.model.layout == "suffix":
        states = arguments.output / f"states-{config.model.backbone}"
        training = replace(training, text_state_cache=arguments.states, text_state_folder=str(states))
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


def both_ways(model: Any, family: Family, slots: tuple[str, str]) -> float:
    """Share x 100 of made-up texts in the right order under two instructions that swap them; a quarter by chance."""
    rows = [about_first for about_first, _ in contrast_rows(400, 0, [family])]
    right = []
    for slot, sign in zip(slots, (1, -1), strict=True):
        anchor, positive, negative = (
            model.encode(texts, prompt=ASKED[slot], batch_size=64)
            for texts in ([r.query for r in rows], [r.positive for r in rows], [r.negative for r in rows])
        )
        right.append(sign * ((anchor * positive).sum(-1) - (anchor * negative).sum(-1)) > 0)
    return 100 * float(np.mean(right[0] & right[1]))


def on_made_up(model: Any) -> dict[str, float]:
    """`both_ways` of the kinds held out."""
    return {
        "requests": round(both_ways(model, REQUESTS, ("do", "thing")), 2),
        "remarks": round(both_ways(model, REMARKS, ("feel", "matter")), 2),
        "manners": round(both_ways(model, MANNERS, ("manner", "chore")), 2),
    }


def spread(model: Any, arguments: argparse.Namespace) -> float:
    """How far apart the soft prompts of different instructions are: mean distance over their mean norm."""
    module = soft_prompt_module(model)
    with torch.no_grad():
        prompts = [module.soft_prompt(rows_of(source, arguments)[0].instruction) for source in (*SEEN, *UNSEEN)]
    flat = torch.cat(prompts).flatten(1).float().cpu()
    return float(torch.pdist(flat).mean() / flat.norm(dim=-1).mean())


def run(name: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    config = config_of(name, seed, arguments)
    instruction = config.model.default_instruction if name == "one instruction for all, no contrast rows" else None
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
        families = [family for family in FAMILIES if name == REQUESTS_TOO or "request" not in family.things]
        data = load_training_data(config.data, config.model.document_instruction, seed, families=families)
        model, warm_seconds = started(config, data, arguments)
        fitted = fit(model, data, config.training, max_text_tokens=config.data.max_text_tokens)
    folder = Path(config.training.output) / "model"
    save(model, folder)
    evaluator = pair_evaluator(config.evaluation, config.data.root, "dev")
    assert evaluator is not None
    start = time.perf_counter()
    module = soft_prompt_module(model)
    with module.in_training(TrainingState(text_cache=text_cache(module, config.training))):
        sts = 100 * evaluator(model)["dev_spearman_cosine"]
    return {
        "sts": round(sts, 2),
        "seen": round(triplets_right(model, SEEN, arguments, instruction), 2),
        "unseen": round(triplets_right(model, UNSEEN, arguments, instruction), 2),
        **on_made_up(model),
        "spread": round(spread(model, arguments), 4),
        "seconds": round(warm_seconds + fitted.seconds, 1),
        "evaluation_seconds": round(time.perf_counter() - start, 1),
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "megabytes": round(sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) / 1e6, 1),
    }


OF_THE_PROMPTER = (
    *("prompter", "prompter_revision", "num_soft_tokens", "softmax_temperature", "prompter_training", "lora_rank"),
    *("max_instruction_tokens", "dtype"),
)


def started(config: RunConfig, data: TrainingData, arguments: argparse.Namespace) -> tuple[Any, float]:
    """A model after its warm start, and the seconds of that.

    Changes that leave prompter, cue and instructions alone share one warm start, which is most of a short run.
    """
    settings = config.training
    model = build(config.model, seed=settings.seed)
    if not settings.warm_start.steps:
        return model, 0.0
    module = soft_prompt_module(model)
    aspects = aspects_of(config, module, data)
    known = {name: getattr(config.model, name) for name in OF_THE_PROMPTER}
    known |= {"warm_start": asdict(settings.warm_start), "aspects": aspects, "seed": settings.seed}
    place = arguments.output / "warm" / hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]
    weights = place.with_suffix(".safetensors")

    def warm() -> dict[str, Any]:
        began = time.perf_counter()
        reached = warm_start(module, aspects, settings.warm_start, settings.seed)
        seconds = time.perf_counter() - began
        save_file(trained_state(module.prompter), weights)
        return {"seconds": seconds, "reached": reached}

    place.parent.mkdir(parents=True, exist_ok=True)
    seconds: float = kept(place.with_suffix(".json"), warm)["seconds"]
    load_trained_state(module.prompter, weights)
    return model, seconds


def table(found: dict[str, list[dict[str, Any]]]) -> str:
    base = mean_of(found["base"]) if "base" in found else None
    lines = [
        "| change | sts | seen | unseen | requests | remarks | manners | spread | seconds | trained | MB |",
        "| --- |" + 10 * " ---: |",
    ]
    for name, runs in found.items():
        figures = mean_of(runs)
        shown = [
            f"{figures[key]:.1f}" + (f" ({figures[key] - base[key]:+.1f})" if base and name != "base" else "")
            for key in ("sts", "seen", "unseen", "requests", "remarks", "manners")
        ]
        lines.append(
            f"| {name} | {' | '.join(shown)} | {figures['spread']:.3f} | {figures['seconds']:.0f} "
            f"| {figures['trained_parameters'] / 1e6:.1f} M | {figures['megabytes']:.0f} |"
        )
    return "\n".join(lines)


def against_base(found: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, float]]:
    """Change of three scores of every run but the base."""
    base = mean_of(found["base"])
    means = {name: mean_of(runs) for name, runs in found.items() if name != "base"}
    return {name: {key: mean[key] - base[key] for key in ("sts", "seen", "unseen")} for name, mean in means.items()}


def mean_of(runs: list[dict[str, Any]]) -> dict[str, float]:
    return {key: statistics.mean(run[key] for run in runs) for key in runs[0]}


def main() -> None:
    parser = parser_of(__doc__, "runs/ablations")
    parser.add_argument("--only", nargs="+", choices=list(ABLATIONS), metavar="NAME")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--pairs", type=int, default=250, help="of STSBenchmark dev")
    parser.add_argument("--states", default="12GiB", help="at most so much on disk for states of texts")
    parser.add_argument("--held", type=int, default=80, help="rows held back of each file")
    parser.add_argument("--seeds", type=int, nargs="+", default=[13])
    parser.add_argument("--set", nargs="+", metavar="SECTION.NAME=VALUE", help="change the base")
    parser.add_argument("--model", help="a saved model, to score on made-up texts")
    arguments = parsed(parser)
    if arguments.model:
        print(json.dumps(on_made_up(promptembedder.load(arguments.model))))
        return
    names = ("steps", "batch", "pairs", "held", "set")
    kinds = hashlib.sha256(repr(FAMILIES).encode()).hexdigest()[:16]
    one_setting(arguments.output, {name: getattr(arguments, name) for name in names} | {"kinds of rows": kinds})
    found: dict[str, list[dict[str, Any]]] = {}
    for name in ABLATIONS:
        for seed in arguments.seeds:
            place = arguments.output / f"{name.replace(' ', '-')}-{seed}.json"
            if place.is_file() or arguments.only is None or name in arguments.only:
                say(f"{name}, seed {seed}")
                found.setdefault(name, []).append(kept(place, partial(run, name, seed, arguments)))
                gc.collect()  # a trainer and its model refer to each other, a gigabyte a run
                say(json.dumps(found[name][-1]))
    print(table(found))
    if arguments.report:
        record = {"command": command(), "runs": found}
        picture = ""
        if "base" in found and len(found) > 1:
            pictures.changes(arguments.report / "ablations.png", against_base(found), "change against the base, points")
            picture = "\n![Change of each score against the base](ablations.png)\n"
        atomic.write_text(arguments.report / "ablations.md", f"`{command()}`\n\n{table(found)}\n{picture}")
        atomic.write_text(arguments.report / "ablations.json", json.dumps(record, indent=1) + "\n")
    print(json.dumps({name: mean_of(runs)["sts"] for name, runs in found.items()}))


if __name__ == "__main__":
    main()
