"""Quality next to LoRA: the same rows, batches, steps and loss; mteb's evaluators on the quick suite.

    PROMPTEMBEDDER_DATA=... python benchmarks/quality.py --output runs/quality --report benchmarks/results/quality-cpu

Columns: mean pooling and PromptEOL of the untrained LLM; LoRA (`benchmarks/lora.py`); ours: `prefix` and `suffix`, the
paper's plain configuration (K = 5) in both layouts, recipes `general-prefix.yaml` and `general-suffix.yaml`, and
`best`, recipe `general.yaml`; `real_rows`, the same without its made-up rows, so on LoRA's; `lora_made_up`, LoRA with
them; `lora_teacher`, LoRA on all that `general-teacher.yaml` has, and `best_teacher`, ours on the same from the bare
LLM; for every seed. With `--minilm FOLDER` all-MiniLM-L6-v2 for orientation.
`--suite others`: the folder's tasks that are not in the quick suite, 200 rows each; recipes were chosen by STSBenchmark
dev and, some of them, by the quick suite, never by these.
Every step is kept in `--output` and not done again: stop and go on at will, or run columns in several processes
(`--columns lora` in one, `--columns prefix suffix` in another, then without, to collect). `--choose N` first picks each
trained column's learning rate from three, by STSBenchmark dev after N steps. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lora
import promptembedder
from kept_results import command, kept, one_setting, parsed, parser_of, say
from promptembedder import atomic, evaluation
from promptembedder.evaluation.run import FACTS
from promptembedder.training.curves import read_facts
from promptembedder.training.settings import RunConfig, load_run
from promptembedder.training.train import train

RECIPES = Path(__file__).parents[1] / "recipes"
UNTRAINED = {"mean_pooling": "mean", "prompt_eol": "prompt_eol"}
UNTRAINED_TEMPLATES = {column: evaluation.BASELINES[name] for column, name in UNTRAINED.items()}
# Of what is not trained here.
REVISIONS = {**dict.fromkeys(UNTRAINED, "untrained"), "minilm": "published"}
# Column: its recipe. LoRA takes rows, batches and loss from it.
TRAINED = {
    "lora": "general-suffix",
    "lora_made_up": "general",
    "lora_teacher": "general-teacher",
    "prefix": "general-prefix",
    "suffix": "general-suffix",
    "best": "general",
    "best_teacher": "general-teacher",
    "real_rows": "general",
}
LORA = ("lora", "lora_made_up", "lora_teacher")
SETTINGS = {
    "real_rows": ["data.contrast_rows=0"],
    # The recipe goes on from a model of `general.yaml`, whose settings these are; after the warm start and a few steps
    # the prompter is frozen, as it is in the recipe.
    "best_teacher": [
        "model.deep_rank=32",
        "model.linear_head=true",
        "training.train_prompter=true",
        "training.prompter_steps=40",
        "training.warm_start.steps=240",
    ],
}
TITLES = {
    "quick": "Quality on the quick suite",
    "others": "Quality on the tasks beside the quick suite",
    "full": "Quality on all tasks",
}
# Tasks with rows of the same source among the training files; no task's instruction is in any training row.
TAUGHT = ("CLINC150", "SemEvalCQADup", "TrecQA", "MAGFields", "AGNews", "LiveQAMed", "SST2")
# Made-up rows imitate what home assistants are asked, and titles of questions about programming.
IMITATED = ("HWU64Intent", "HWU64Scenario", "HWU64ScenarioAction", "StackOverflow")
# Ours: times the recipe's learning rates.
FACTORS = (0.5, 1.0, 2.0)


def run_config(column: str, seed: int, steps: int, arguments: argparse.Namespace) -> RunConfig:
    """The recipe's settings."""
    settings = [*SETTINGS.get(column, []), *(arguments.set or [])]
    config = load_run(RECIPES / f"{TRAINED[column]}.yaml", settings, root=str(arguments.data))
    training = replace(
        config.training,
        output=str(arguments.output / "models" / f"{column}-{seed}-{steps}"),
        max_steps=steps,
        batch_size=arguments.batch,
        seed=seed,
    )
    return replace(config, training=training)


def with_rate(config: RunConfig, rate: float) -> RunConfig:
    """Ours: the prompter's rate, and the alignment's in proportion."""
    scale = rate / config.training.prompter_learning_rate
    return replace(
        config,
        training=replace(
            config.training,
            prompter_learning_rate=rate,
            alignment_learning_rate=config.training.alignment_learning_rate * scale,
        ),
    )


def chosen_rate(column: str, arguments: argparse.Namespace) -> float:
    """The learning rate of a column: the best on dev after `--choose` steps; without `--choose` the recipe's."""
    found = kept(arguments.output / "rates" / f"{column}.json", partial(choice_of_rate, column, arguments))
    if found["steps"] != arguments.choose:
        sys.exit(f"{column}: its learning rate was chosen with --choose {found['steps']}; give the same --choose")
    return float(found["rate"])


def choice_of_rate(column: str, arguments: argparse.Namespace) -> dict[str, Any]:
    recipes = run_config(column, arguments.seeds[0], 1, arguments).training.prompter_learning_rate
    rates = lora.RATES if column in LORA else tuple(recipes * factor for factor in FACTORS)
    if not arguments.choose:
        return {"steps": 0, "rate": rates[1]}
    tried: dict[float, float] = {}
    for rate in rates:
        place = arguments.output / "rates" / f"{column}-{rate:g}-{arguments.choose}-steps"
        tried[rate] = kept(
            place.with_name(place.name + ".json"), partial(after_few_steps, column, rate, place, arguments)
        )["dev"]
        say(f"{column}: learning rate {rate:g} gives {tried[rate]:.2f} on dev after {arguments.choose} steps")
    return {"steps": arguments.choose, "rate": max(tried, key=lambda rate: tried[rate]), "dev": tried}


def after_few_steps(column: str, rate: float, output: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """Dev score of a column after `--choose` steps with a learning rate."""
    config = run_config(column, arguments.seeds[0], arguments.choose, arguments)
    dev = replace(config.evaluation, dev="sts/STSBenchmark.dev.jsonl.gz", every_steps=arguments.choose)
    config = replace(config, evaluation=dev, training=replace(config.training, output=str(output)))
    if column in LORA:
        return {"dev": lora.dev_score(lora.train(config, learning_rate=rate).model, config)}
    return {"dev": train(with_rate(config, rate)).scores["dev"]}


def trained_encoder(column: str, seed: int, arguments: argparse.Namespace) -> evaluation.InstructedEncoder:
    """Train the column's model, unless that is done, and open it."""
    config = run_config(column, seed, arguments.steps, arguments)
    folder = Path(config.training.output) / "model"
    if read_facts(folder) is None:
        rate = chosen_rate(column, arguments)
        say(f"{column}, seed {seed}: {arguments.steps} steps of {arguments.batch} pairs, learning rate {rate:g}")
        if column in LORA:
            lora.train(config, learning_rate=rate, output=folder)
        else:
            resume = any(folder.parent.glob("checkpoint-*"))
            train(with_rate(config, rate), resume=resume)
    name = f"quality/{column}-{seed}"
    if column in LORA:
        return lora.encoder(config, folder, name, revision(seed, arguments))
    return evaluation.InstructedEncoder(
        promptembedder.load(folder), name, revision(seed, arguments), training=read_facts(folder)
    )


def revision(seed: int, arguments: argparse.Namespace) -> str:
    return f"seed-{seed}-steps-{arguments.steps}"


def untrained_encoder(column: str, arguments: argparse.Namespace) -> evaluation.InstructedEncoder:
    if column == "minilm":
        opened = evaluation.open_model(str(arguments.minilm))
        return evaluation.InstructedEncoder(opened.model, "quality/minilm", REVISIONS[column])
    config = run_config("suffix", 0, 1, arguments)
    opened = evaluation.open_model(config.model.backbone, baseline=UNTRAINED[column])
    tokenizer, limit, (_, template) = opened.model.tokenizer, config.model.max_text_tokens, UNTRAINED_TEMPLATES[column]

    def wrap(text: str, instruction: str) -> str:
        # The text is cut as the others cut it; the cue after it stays.
        return template.format(text=lora.cut(tokenizer, [text], limit)[0])

    return evaluation.InstructedEncoder(
        opened.model, f"quality/{column}", REVISIONS[column], wrap=wrap, instructed=False
    )


def folder_of(name: str, of: str, arguments: argparse.Namespace) -> Path:
    """Where the scores of a model's revision are, in mteb's layout."""
    return Path(arguments.output / arguments.suite / "results" / f"quality__{name}" / of)


def evaluate(name: str, encoder: Any, arguments: argparse.Namespace) -> None:
    given = evaluation.read_instructions(arguments.data / "instructions.json")
    others = None
    if arguments.suite == "others":
        every = [task.metadata.name for task in evaluation.local_tasks(arguments.data)]
        others = [name for name in every if name not in evaluation.QUICK]
    tasks = evaluation.local_tasks(arguments.data, others, instructions=given, quick=arguments.suite != "full")
    result = evaluation.evaluate(encoder, tasks, arguments.output / arguments.suite, batch_size=64)
    say(f"{name}: mean {result.mean:.2f}")


def new_tasks(comparison: evaluation.Comparison, names: list[str]) -> float:
    """Mean of some columns over tasks whose sources were not trained on, nor anything that imitates them."""
    scores = [comparison.columns[name].scores for name in names]
    tasks = [task for task in comparison.shared if task not in (*TAUGHT, *IMITATED)]
    return statistics.mean(of[task] for of in scores for task in tasks)


def collect(arguments: argparse.Namespace) -> dict[str, Any]:
    """Table and figures of everything that is there; seeds of a column are averaged."""
    wanted = [folder_of(f"{c}-{s}", revision(s, arguments), arguments) for c in TRAINED for s in arguments.seeds]
    wanted += [folder_of(column, of, arguments) for column, of in REVISIONS.items()]
    # A column whose evaluation was stopped would leave its tasks alone for all to be compared on.
    done = [folder for folder in wanted if (folder / FACTS).is_file()]
    comparison = evaluation.compare(evaluation.read_columns(done))
    seeds: dict[str, list[str]] = {}
    for name in comparison.columns:
        base, _, seed = name.rpartition("-")
        seeds.setdefault(base if base in TRAINED and seed.isdigit() else name, []).append(name)
    mean = {base: statistics.mean(comparison.mean(name) for name in names) for base, names in seeds.items()}
    figures: dict[str, Any] = {"mean": {base: round(value, 2) for base, value in mean.items()}}
    figures["mean_of_new_tasks"] = {base: round(new_tasks(comparison, names), 2) for base, names in seeds.items()}
    if "lora" in mean:
        # Of the seeds that both have: LoRA's differ by points.
        pairs = {
            base: [
                (comparison.mean(f"{base}-{seed}"), comparison.mean(f"lora-{seed}"))
                for seed in arguments.seeds
                if {f"{base}-{seed}", f"lora-{seed}"} <= set(comparison.columns)
            ]
            for base in TRAINED
            if base in mean and base != "lora"
        }
        figures = {
            "ratio_to_lora": {
                base: round(sum(ours for ours, _ in both) / sum(theirs for _, theirs in both), 4)
                for base, both in pairs.items()
                if both
            },
            "ratio_by_seed": {base: [round(ours / theirs, 4) for ours, theirs in both] for base, both in pairs.items()},
        } | figures
    figures["seeds"] = {base: len(names) for base, names in seeds.items() if base in TRAINED}
    rates = [arguments.output / "rates" / f"{column}.json" for column in TRAINED]
    figures["learning_rates"] = {file.stem: json.loads(file.read_text())["rate"] for file in rates if file.is_file()}
    of_lora = {
        name: column.training.get("learning_rate") for name, column in comparison.columns.items() if column.training
    }
    figures["learning_rates"] |= {name: rate for name, rate in of_lora.items() if rate is not None}
    if arguments.report:
        to = "lora-" + str(arguments.seeds[0])
        shown = evaluation.Comparison(
            comparison.columns, comparison.shared, to if to in comparison.columns else None, comparison.kinds
        )
        write_report(shown, figures, arguments)
    print(evaluation.markdown(comparison))
    return figures


def write_report(comparison: evaluation.Comparison, figures: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Write `report.md`, `quality.json` and `by-kind.png`."""
    with tempfile.TemporaryDirectory() as scratch:
        evaluation.write_report(comparison, Path(scratch))
        columns = json.loads((Path(scratch) / "comparison.json").read_text(encoding="utf-8"))
        arguments.report.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(Path(scratch) / "by-kind.png", arguments.report / "by-kind.png")
    table = evaluation.markdown(comparison)
    picture = "![Mean score by kind of task](by-kind.png)"
    report = f"# {TITLES[arguments.suite]}\n\n`{command()}`\n\n{table}\n\n{picture}\n"
    atomic.write_text(arguments.report / "report.md", report)
    record = {"command": command(), "figures": figures, "columns": columns}
    atomic.write_text(arguments.report / "quality.json", json.dumps(record, indent=1) + "\n")


def main() -> None:
    parser = parser_of(__doc__, "runs/quality")
    parser.add_argument("--columns", nargs="*", help="run these only; none: collect what is there")
    parser.add_argument("--seeds", type=int, nargs="+", default=[13, 14])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--suite", choices=["quick", "others", "full"], default="quick")
    parser.add_argument("--choose", type=int, default=0, metavar="STEPS", help="pick learning rates first")
    parser.add_argument("--minilm", type=Path, help="folder of all-MiniLM-L6-v2")
    parser.add_argument("--set", nargs="+", metavar="SECTION.NAME=VALUE", help="change the recipes' settings")
    arguments = parsed(parser)
    known = [*UNTRAINED, *TRAINED, *(["minilm"] if arguments.minilm else [])]
    columns = known if arguments.columns is None else arguments.columns
    if wrong := set(columns) - set(known):
        parser.error(f"unknown columns {sorted(wrong)}; valid: {', '.join(known)}")
    one_setting(arguments.output, {name: getattr(arguments, name) for name in ("batch", "set")})
    for column in columns:
        for seed in arguments.seeds if column in TRAINED else [None]:
            name = column if seed is None else f"{column}-{seed}"
            of = REVISIONS[column] if seed is None else revision(seed, arguments)
            # Written after the last task: a column whose scores are there needs no model any more.
            if (folder_of(name, of, arguments) / FACTS).is_file():
                say(f"{name}: scores are there")
            elif seed is None:
                evaluate(name, untrained_encoder(column, arguments), arguments)
            else:
                evaluate(name, trained_encoder(column, seed, arguments), arguments)
    print(json.dumps(collect(arguments)))


if __name__ == "__main__":
    main()
