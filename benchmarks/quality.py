"""Quality next to LoRA: the same rows, batches, steps and loss; mteb's evaluators on the quick suite.

    PROMPTEMBEDDER_DATA=... python benchmarks/quality.py --output runs/quality --report benchmarks/results/quality-cpu

Columns: mean pooling and PromptEOL of the untrained LLM; LoRA (`benchmarks/lora.py`), ours in the layouts `prefix` and
`suffix` as the recipes `general-*.yaml` say, for every seed; with `--minilm FOLDER` all-MiniLM-L6-v2 for orientation.
Every step is kept in `--output` and not done again: stop and go on at will, or run columns in several processes
(`--columns lora` in one, `--columns prefix suffix` in another, then without, to collect). `--choose N` first picks each
trained column's learning rate from three, by STSBenchmark dev after N steps. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import lora
import promptembedder
from promptembedder import base_models, evaluation
from promptembedder.config import RunConfig, load_run
from promptembedder.data import DATA_ENV
from promptembedder.training import train
from promptembedder.training_facts import read_facts

RECIPES = Path(__file__).parents[1] / "recipes"
UNTRAINED = {"mean_pooling": "mean", "prompt_eol": "prompt_eol"}
UNTRAINED_TEMPLATES = {column: evaluation.BASELINES[name] for column, name in UNTRAINED.items()}
TRAINED = ("lora", "prefix", "suffix")
LEARNING_RATES = {"lora": (1e-4, 2e-4, 5e-4), "ours": (1e-4, 2e-4, 4e-4)}
DEFAULT = {"lora": 2e-4, "ours": 2e-4}


def run_config(column: str, seed: int, steps: int, arguments: argparse.Namespace) -> RunConfig:
    """The recipe's settings; LoRA takes rows, batches and loss from `suffix`."""
    recipe = RECIPES / f"general-{'prefix' if column == 'prefix' else 'suffix'}.yaml"
    config = load_run(recipe, arguments.set or [], root=str(arguments.data))
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
    """The learning rate with the best dev score after `--choose` steps; the default without it."""
    family = "lora" if column == "lora" else "ours"
    if not arguments.choose:
        return DEFAULT[family]
    tried: dict[str, float] = {}
    kept = arguments.output / f"rates-{column}.json"
    if kept.is_file():
        tried = json.loads(kept.read_text())
    for rate in LEARNING_RATES[family]:
        if f"{rate:g}" in tried:
            continue
        config = run_config(column, arguments.seeds[0], arguments.choose, arguments)
        dev = replace(config.evaluation, dev="sts/STSBenchmark.dev.jsonl.gz", every_steps=arguments.choose)
        config = replace(
            with_rate(config, rate) if family == "ours" else config,
            evaluation=dev,
            training=replace(
                config.training,
                output=str(arguments.output / "rates" / f"{column}-{rate:g}"),
                **({} if family == "lora" else _rates(config, rate)),
            ),
        )
        if family == "lora":
            tried[f"{rate:g}"] = lora.dev_score(lora.train(config, learning_rate=rate).model, config)
        else:
            tried[f"{rate:g}"] = train(config).scores["dev"]
        write(kept, json.dumps(tried, indent=1))
        say(f"{column}: learning rate {rate:g} gives {tried[f'{rate:g}']:.2f} on dev after {arguments.choose} steps")
    return float(max(tried, key=lambda rate: tried[rate]))


def _rates(config: RunConfig, rate: float) -> dict[str, float]:
    scaled = with_rate(config, rate).training
    return {
        "prompter_learning_rate": scaled.prompter_learning_rate,
        "alignment_learning_rate": scaled.alignment_learning_rate,
    }


def trained_encoder(column: str, seed: int, arguments: argparse.Namespace) -> evaluation.InstructedEncoder:
    """Train the column's model, unless that is done, and open it."""
    config = run_config(column, seed, arguments.steps, arguments)
    folder = Path(config.training.output) / "model"
    if read_facts(folder) is None:
        rate = chosen_rate(column, arguments)
        say(f"{column}, seed {seed}: {arguments.steps} steps of {arguments.batch} pairs, learning rate {rate:g}")
        if column == "lora":
            lora.train(config, learning_rate=rate, output=folder)
        else:
            resume = any(folder.parent.glob("checkpoint-*"))
            train(with_rate(config, rate), resume=resume)
    facts = read_facts(folder)
    if column == "lora":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = base_models.resolve_dtype(config.model.dtype, device)
        model = lora.load(config.model.backbone, folder, dtype, device)
        return evaluation.InstructedEncoder(
            model,
            f"quality/{column}-{seed}",
            revision(seed, arguments),
            wrap=lambda text, instruction: lora.TEMPLATE.format(instruction=instruction, text=text),
            document_instruction=config.model.document_instruction,
            training=facts,
        )
    return evaluation.InstructedEncoder(
        promptembedder.load(folder), f"quality/{column}-{seed}", revision(seed, arguments), training=facts
    )


def revision(seed: int, arguments: argparse.Namespace) -> str:
    return f"seed-{seed}-steps-{arguments.steps}"


def one_setting(arguments: argparse.Namespace) -> None:
    """Refuse an output folder whose models were made with other settings."""
    settings = {"batch": arguments.batch, "set": arguments.set, "choose": arguments.choose}
    place = arguments.output / "settings.json"
    if not place.is_file():
        write(place, json.dumps(settings))
    found = json.loads(place.read_text())
    if different := [name for name in settings if found.get(name) != settings[name]]:
        sys.exit(f"{arguments.output} was made with other settings ({', '.join(different)}); choose another --output")


def untrained_encoder(column: str, arguments: argparse.Namespace) -> evaluation.InstructedEncoder:
    if column == "minilm":
        opened = evaluation.open_model(str(arguments.minilm))
        return evaluation.InstructedEncoder(opened.model, "quality/minilm", "published")
    config = run_config("suffix", 0, 1, arguments)
    opened = evaluation.open_model(config.model.backbone, baseline=UNTRAINED[column])
    tokenizer, limit, (_, template) = opened.model.tokenizer, config.model.max_text_tokens, UNTRAINED_TEMPLATES[column]

    def wrap(text: str, instruction: str) -> str:
        # The text is cut as the others cut it; the cue after it stays.
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return template.format(text=text if len(ids) <= limit else tokenizer.decode(ids[:limit]))

    return evaluation.InstructedEncoder(opened.model, f"quality/{column}", "untrained", wrap=wrap, instructed=False)


def evaluate(name: str, encoder: Any, arguments: argparse.Namespace) -> None:
    given = json.loads((arguments.data / "instructions.json").read_text())
    tasks = evaluation.local_tasks(arguments.data, instructions=given, quick=arguments.suite == "quick")
    result = evaluation.evaluate(encoder, tasks, arguments.output / arguments.suite, batch_size=64)
    say(f"{name}: mean {result.mean:.2f}")


def collect(arguments: argparse.Namespace) -> dict[str, Any]:
    """Table and figures of everything that is there; seeds of a column are averaged."""
    place = arguments.output / arguments.suite / "results"
    wanted = [place / f"quality__{c}-{s}" / revision(s, arguments) for c in TRAINED for s in arguments.seeds]
    wanted += [place / f"quality__{column}" for column in (*UNTRAINED, "minilm")]
    comparison = evaluation.compare(evaluation.read_columns([folder for folder in wanted if folder.is_dir()]))
    seeds: dict[str, list[str]] = {}
    for name in comparison.columns:
        base, _, seed = name.rpartition("-")
        seeds.setdefault(base if base in TRAINED and seed.isdigit() else name, []).append(name)
    mean = {base: statistics.mean(comparison.mean(name) for name in names) for base, names in seeds.items()}
    figures: dict[str, Any] = {"mean": {base: round(value, 2) for base, value in mean.items()}}
    if "lora" in mean:
        figures = {
            "ratio_to_lora": {
                base: round(mean[base] / mean["lora"], 4) for base in ("prefix", "suffix") if base in mean
            }
        } | figures
    figures["seeds"] = {base: len(names) for base, names in seeds.items() if base in TRAINED}
    if arguments.report:
        to = "lora-" + str(arguments.seeds[0])
        shown = evaluation.Comparison(
            comparison.columns, comparison.shared, to if to in comparison.columns else None, comparison.kinds
        )
        evaluation.write_report(shown, arguments.report, "Quality on the quick suite")
        record = {"command": " ".join(["python benchmarks/quality.py", *sys.argv[1:]]), "figures": figures}
        write(arguments.report / "quality.json", json.dumps(record, indent=1))
    print(evaluation.markdown(comparison))
    return figures


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}")
    scratch.write_text(text + "\n")
    scratch.replace(path)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get(DATA_ENV), help=f"unset: ${DATA_ENV}")
    parser.add_argument("--output", type=Path, default=Path("runs/quality"), help="models and results, kept")
    parser.add_argument("--report", type=Path, help="folder of table and pictures")
    parser.add_argument("--columns", nargs="*", help="run these only; none: collect what is there")
    parser.add_argument("--seeds", type=int, nargs="+", default=[13, 14])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--suite", choices=["quick", "full"], default="quick")
    parser.add_argument("--choose", type=int, default=0, metavar="STEPS", help="pick learning rates first")
    parser.add_argument("--minilm", type=Path, help="folder of all-MiniLM-L6-v2")
    parser.add_argument("--set", nargs="+", metavar="SECTION.NAME=VALUE", help="change the recipes' settings")
    arguments = parser.parse_args()
    if arguments.data is None:
        parser.error(f"give --data or set {DATA_ENV}")
    arguments.data = Path(arguments.data)
    known = [*UNTRAINED, *TRAINED, *(["minilm"] if arguments.minilm else [])]
    columns = known if arguments.columns is None else arguments.columns
    if wrong := set(columns) - set(known):
        parser.error(f"unknown columns {sorted(wrong)}; valid: {', '.join(known)}")
    one_setting(arguments)
    for column in columns:
        if column in TRAINED:
            for seed in arguments.seeds:
                evaluate(f"{column}-{seed}", trained_encoder(column, seed, arguments), arguments)
        else:
            evaluate(column, untrained_encoder(column, arguments), arguments)
    print(json.dumps(collect(arguments)))


if __name__ == "__main__":
    main()
