"""Transfer of a trained prompter to unseen backbones, next to training from scratch and to LoRA, on STSBenchmark.

    PROMPTEMBEDDER_DATA=... python benchmarks/transfer.py --model runs/paraphrase-suffix/model \
        --backbones gemma-3-270m qwen2.5-coder-0.5b-instruct --report benchmarks/results/transfer-cpu

Rows, batches and loss are those of the recipe `paraphrase-suffix.yaml` for all; dev (pairs of STSBenchmark dev) is
followed every `--every` steps, test is STSBenchmark. Per backbone:

- `hard_cue`: PromptEOL, untrained; `closed_form`: the prompter moved and embeddings centred on the rows' texts, nothing
  trained; `hard_cue_centred`, `closed_form_plain`: the cue centred, too, the closed form not;
- `alignment_only`: W trained on the labelled rows; `unlabelled`: W trained on the rows' texts alone, after the old
  model's similarities, embeddings centred; `texts_then_rows`: on texts, then on the labelled rows, `--steps` of each,
  nothing centred;
- `from_scratch`: prompter and W trained anew for this backbone; `lora`: LoRA on it (`benchmarks/lora.py`). Both see the
  rows that W sees; what the prompter learnt before, on the old backbone, is what a transfer has more;
- dev pairs choose the closed form and, of every part, the best weights on the way;
- `examples_ratio`, `time_ratio`: examples and seconds LoRA takes to its best dev score, which is also that of the model
  it leaves, over those alignment-only takes to the same score; `..._95` likewise to 95 % of it. Unset where
  alignment-only does not get there, and no ratio of examples where the closed form is there before any
  (`without_examples`). Both are scored every `--every` steps, with a straight line between; dev is in nobody's time.
  `..._smoothed`: the same where every score of both is the mean of three neighbours, so that no single one decides.
  `without_labels`: whether `unlabelled` gets to that score, which takes no labelled row at all.
- with `--few PAIRS...`, `few_rows`: W on rows, W on texts and then rows, and LoRA on so few labelled pairs alone, which
  `--few-steps` steps go through again and again. Half come from each of the recipe's first two files, in file order;
  those of the first have a labelled negative, too. Seconds of W hold the reading of every text; LoRA has the rate that
  was chosen for it on all rows. Sizes that were run before are in the report, too;
- `pairs`, `pairs_lora`: the fewest labelled pairs with which W on rows and LoRA get to LoRA's best dev score (unset:
  never), of the few or of all rows on the way there; `pairs_after_texts`: those of W after plain texts. What is counted
  is what a run had seen at the first score that is high enough. `pairs_ratio` is of the first two, `pairs_time_ratio`
  and `time_ratio_after_texts` of the least seconds that each takes to the score in any run; `..._95` is to 95 % of it.
  The dev pairs, which choose the weights of all, are in nobody's count;
- LoRA's learning rate is the best of three on dev after `--choose` steps, for each backbone, unless `--lora-rate` says
  it.

With `--states 40GiB` a backbone's text states are kept on disk from part to part. Alignment-only comes before the other
trained parts, so that its seconds hold the reading of every text; those of `unlabelled` and `from_scratch` do not.
With `--quick PART...` the models of these parts are evaluated on the quick suite too (`quick_...`, mean over tasks).
Every part is kept in `--output` and not run again. The last lines are one JSON object per backbone.

And back: `--model OUTPUT/gemma-3-270m/from_scratch/model --backbones smollm2-135m-instruct` and another `--output`.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr
from sentence_transformers import SentenceTransformer

import lora
import promptembedder
from kept_results import command, kept, one_setting, parsed, parser_of, say
from promptembedder import atomic, evaluation
from promptembedder.data.rows import load_training_data
from promptembedder.data.scored_pairs import read_scored_pairs
from promptembedder.data.settings import DataConfig
from promptembedder.llms import locate as locate_module
from promptembedder.model.baselines import hard_cue
from promptembedder.model.module import soft_prompt_module
from promptembedder.training.curves import Curve, draw_curves, read_facts
from promptembedder.training.evaluators import pair_evaluator
from promptembedder.training.fit import text_cache
from promptembedder.training.settings import RunConfig, load_run
from promptembedder.training.train import train
from promptembedder.transfer.centring import sample_of_texts
from promptembedder.transfer.rebase import on_backbone
from promptembedder.transfer.report import TransferResult
from promptembedder.transfer.settings import TransferConfig
from promptembedder.transfer.transfer import transfer

RECIPE = Path(__file__).parents[1] / "recipes" / "paraphrase-suffix.yaml"
TEST = "sts/STSBenchmark.jsonl.gz"


def recipe(arguments: argparse.Namespace, backbone: str) -> RunConfig:
    """The recipe's settings on a backbone; the parts are scored on test by `tested`."""
    settings = list(arguments.set or [])
    if arguments.states:
        folder = place_of(arguments, backbone).resolve() / "states"
        settings += [f"training.text_state_cache={arguments.states}", f"training.text_state_folder={folder}"]
    config = load_run(RECIPE, settings, root=str(arguments.data))
    training = replace(config.training, max_steps=arguments.steps, batch_size=arguments.batch)
    evaluation = replace(config.evaluation, dev_pairs=arguments.pairs, every_steps=arguments.every, test=TEST)
    return replace(config, model=replace(config.model, backbone=backbone), training=training, evaluation=evaluation)


def untested(config: RunConfig) -> RunConfig:
    return replace(config, evaluation=replace(config.evaluation, test=None))


@contextmanager
def kept_states(arguments: argparse.Namespace, backbone: str, model: SentenceTransformer) -> Iterator[None]:
    """While inside, the model takes texts' states from the backbone's folder and keeps them there, with `--states`."""
    module = soft_prompt_module(model)
    module.backbone.text_cache = text_cache(module, recipe(arguments, backbone).training)
    try:
        yield
    finally:
        module.backbone.text_cache = None


def tested(arguments: argparse.Namespace, backbone: str, model: SentenceTransformer) -> float:
    """Spearman x 100 on test."""
    config = recipe(arguments, backbone)
    test = pair_evaluator(config.evaluation, config.data.root, "test")
    assert test is not None
    with kept_states(arguments, backbone, model):
        return 100 * float(test(model)["test_spearman_cosine"])


def place_of(arguments: argparse.Namespace, backbone: str) -> Path:
    """Where everything of a backbone goes; it may be a path or a hub id."""
    return Path(arguments.output / slug(backbone))


def slug(backbone: str) -> str:
    return re.sub(r"[^\w.-]+", "-", backbone).strip("-")


def moved(
    arguments: argparse.Namespace,
    backbone: str,
    name: str,
    texts: list[str] | None,
    *,
    rows: bool,
    config: RunConfig | None = None,
) -> dict[str, Any]:
    """Closed form, then W alone on texts, on rows or on one after the other; `config` is the recipe where unset."""
    config, output = untested(config or recipe(arguments, backbone)), place_of(arguments, backbone) / name
    resumed = any(output.glob("*/checkpoint-*"))
    if name == "alignment_only" and not resumed:
        # Its seconds are compared with LoRA's, which reads every text: none may have been read by an earlier run.
        shutil.rmtree(place_of(arguments, backbone) / "states", ignore_errors=True)
    files = () if texts is None else (plain_texts(arguments, backbone, name, texts),)
    result: TransferResult = transfer(
        promptembedder.load(arguments.model),
        TransferConfig(
            backbone=backbone,
            data=config.data if rows else DataConfig(root=config.data.root),
            texts=files,
            text_instructions=() if texts is None else (config.evaluation.instruction,),
            training=replace(config.training, output=str(output)),
            evaluation=config.evaluation,
        ),
        resume=resumed,
    )
    start, *trained = result.stages
    curve = [(0, start.seconds, start.dev), *(point for stage in trained for point in stage.curve)]
    test = tested(arguments, backbone, result.model)
    found = {"test": test, "dev": result.scores["dev"], "start": result.starts[0].name, "curve": curve}
    return found if texts is None else found | {"texts": trained[0].examples}


def untrained(arguments: argparse.Namespace, backbone: str) -> dict[str, Any]:
    """Test scores of the hard cue and of the closed form, each as it is and with the mean over some texts taken away.

    The cue's is taken from vectors of unit length; its hidden states are nearly all equally long.
    """
    config = recipe(arguments, backbone)
    old = promptembedder.load(arguments.model)
    module = soft_prompt_module(on_backbone(old, locate_module.locate(backbone)))
    first, second, scores = read_scored_pairs(TEST, config.data.root)
    texts = texts_of_rows(arguments, backbone)
    sample = [text for text, _ in sample_of_texts(texts, [config.evaluation.instruction], config.training.seed)]
    one, other, some = (hard_cue(module, part, batch_size=64) for part in (first, second, sample))
    centre = some.mean(0)
    cues = {
        "hard_cue": spearman(one, other, scores),
        "hard_cue_centred": spearman(one - centre, other - centre, scores),
    }
    closed: dict[str, float] = {}
    for name, centred in (("closed_form_plain", False), ("closed_form", True)):
        result = transfer(
            old,
            TransferConfig(
                backbone=backbone,
                data=replace(DataConfig(root=config.data.root), max_text_tokens=config.data.max_text_tokens),
                texts=(plain_texts(arguments, backbone, "closed_form", texts),) if centred else (),
                text_instructions=(config.evaluation.instruction,),
                training=replace(config.training, output=str(place_of(arguments, backbone) / name), max_steps=0),
                evaluation=untested(config).evaluation,
            ),
        )
        closed[name] = tested(arguments, backbone, result.model)
        closed |= {f"{name}_dev": round(result.scores["dev"], 2)}
    starts = {start.name: round(start.dev or 0.0, 2) for start in result.starts}
    return {**cues, **closed, "starts_dev": starts}


def spearman(first_NE: NDArray[Any], second_NE: NDArray[Any], scores: list[float]) -> float:
    """Of cosines, x 100."""
    cosines_N = (first_NE * second_NE).sum(-1) / np.linalg.norm(first_NE, axis=-1) / np.linalg.norm(second_NE, axis=-1)
    return 100 * float(spearmanr(cosines_N, scores).statistic)


def plain_texts(arguments: argparse.Namespace, backbone: str, part: str, texts: list[str]) -> str:
    """A file of them."""
    path = place_of(arguments, backbone) / part / "texts.jsonl"
    atomic.write_text(path, "".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path.resolve())


def scratch(arguments: argparse.Namespace, backbone: str) -> dict[str, Any]:
    """Prompter and W trained anew before the new backbone."""
    config = untested(recipe(arguments, backbone))
    output = place_of(arguments, backbone) / "from_scratch"
    prompter = soft_prompt_module(promptembedder.load(arguments.model)).settings.prompter
    model = replace(config.model, prompter=prompter)
    config = replace(config, model=model, training=replace(config.training, output=str(output)))
    result = train(config, resume=any(output.glob("checkpoint-*")))
    return {
        "test": tested(arguments, backbone, result.model),
        "dev": result.scores["dev"],
        "curve": result.curve(),
    }


def peer(arguments: argparse.Namespace, backbone: str) -> dict[str, Any]:
    config = recipe(arguments, backbone)
    output = place_of(arguments, backbone) / "lora" / "model"
    tried: dict[float, float] = {}
    for rate in lora.RATES if arguments.lora_rate is None else ():
        place = place_of(arguments, backbone) / f"lora-{rate:g}-{arguments.choose}-steps.json"
        tried[rate] = kept(place, partial(after_few_steps, config, rate, arguments.choose))["dev"]
        say(f"{backbone}: LoRA at {rate:g} has {tried[rate]:.2f} on dev after {arguments.choose} steps")
    chosen = arguments.lora_rate or max(tried, key=lambda rate: tried[rate])
    return trained_lora(config, chosen, output) | {"learning_rate": chosen, "tried": tried}


def trained_lora(config: RunConfig, rate: float, output: Path) -> dict[str, Any]:
    done = lora.train(config, learning_rate=rate, output=output, follow=True)
    test = replace(config, evaluation=replace(config.evaluation, dev=config.evaluation.test, dev_pairs=None))
    return {"test": lora.dev_score(done.model, test), "curve": done.curve}


def few_rows(arguments: argparse.Namespace, backbone: str) -> dict[int, dict[str, Any]]:
    """W and LoRA on a handful of labelled pairs, seen again and again; every part of it is kept on its own.

    Returns:
        By number of pairs, what each of `FEW_PARTS` came to, those of earlier commands included.
    """
    place = place_of(arguments, backbone)
    for wanted in arguments.few:
        config = of_few_rows(arguments, backbone, wanted)
        pairs = pairs_of(config)
        for part in FEW_PARTS:
            name = f"few_rows-{pairs}x{arguments.few_steps}-{part}"
            say(f"{backbone}: {pairs} labelled pairs, {part}")
            kept(place / f"{name}.json", partial(trained_on_few, arguments, backbone, part, name, config))
    found: dict[int, dict[str, Any]] = {}
    for path in place.glob(f"few_rows-*x{arguments.few_steps}-*.json"):
        _, size, part = path.stem.split("-")
        found.setdefault(int(size.split("x")[0]), {})[part] = json.loads(path.read_text(encoding="utf-8"))
    return {pairs: {part: found[pairs][part] for part in FEW_PARTS if part in found[pairs]} for pairs in sorted(found)}


def trained_on_few(
    arguments: argparse.Namespace, backbone: str, part: str, name: str, config: RunConfig
) -> dict[str, Any]:
    if part == "lora":
        place = place_of(arguments, backbone)
        rate = kept(place / "lora.json", partial(peer, arguments, backbone))["learning_rate"]
        return trained_lora(config, rate, place / name / "model")
    before = texts_of_rows(arguments, backbone) if part == "texts_then_rows" else None
    return moved(arguments, backbone, name, before, rows=True, config=config)


def of_few_rows(arguments: argparse.Namespace, backbone: str, pairs: int) -> RunConfig:
    """The recipe on that many labelled pairs, whose texts nobody has read before."""
    config = recipe(arguments, backbone)
    of_each = pairs // 2
    training = replace(
        config.training,
        max_steps=arguments.few_steps,
        batch_size=min(arguments.batch, of_each),
        text_state_cache=None,
        text_state_folder=None,
    )
    files = tuple(replace(file, max_rows=of_each) for file in config.data.files[:2])
    return replace(config, data=replace(config.data, files=files), training=training)


def pairs_of(config: RunConfig) -> int:
    """Labelled pairs: a row may have several positives."""
    data = load_training_data(config.data, config.model.document_instruction, config.training.seed)
    return sum(len(rows) for rows in data.datasets.values())


def after_few_steps(config: RunConfig, rate: float, steps: int) -> dict[str, float]:
    """LoRA's dev score after a few steps, none of which is kept."""
    with tempfile.TemporaryDirectory() as scratch:
        training = replace(config.training, max_steps=steps, output=f"{scratch}/model")
        return {"dev": lora.dev_score(lora.train(replace(config, training=training), learning_rate=rate).model, config)}


def quick(arguments: argparse.Namespace, backbone: str, part: str) -> dict[str, Any]:
    """The quick suite's scores of the model that a part left."""
    folder = place_of(arguments, backbone) / part / "model"
    name = f"{slug(backbone)}/{part}"
    if part == "lora":
        encoder = lora.encoder(recipe(arguments, backbone), folder, name, REVISION)
        states: AbstractContextManager[None] = nullcontext()
    else:
        model = promptembedder.load(folder)
        encoder = evaluation.InstructedEncoder(model, name, REVISION, training=read_facts(folder))
        states = kept_states(arguments, backbone, model)
    given = evaluation.read_instructions(arguments.data / "instructions.json")
    tasks = evaluation.local_tasks(arguments.data, instructions=given, quick=True)
    with states:
        result = evaluation.evaluate(encoder, tasks, arguments.output / "quick", batch_size=64)
    return {"mean": result.mean, "scores": result.scores}


def write_quick_report(arguments: argparse.Namespace, backbone: str) -> None:
    """The quick suite's table and pictures, LoRA as the measure where it is there."""
    place = arguments.output / "quick" / "results"
    folders = [place / f"{slug(backbone)}__{part}" / REVISION for part in arguments.quick]
    comparison = evaluation.compare(evaluation.read_columns(folders), "lora" if "lora" in arguments.quick else None)
    evaluation.write_report(comparison, arguments.report / f"{slug(backbone)}-quick", f"Quick suite on {backbone}")


def draw(parts: dict[str, dict[str, Any]], path: Path, title: str) -> None:
    with_curve = {name: part["curve"] for name, part in parts.items() if "curve" in part}
    curves = {name: [at for at in curve if at[2] is not None] for name, curve in with_curve.items()}
    draw_curves(curves, path, title)


def few_rows_table(backbone: str, few: dict[int, dict[str, Any]]) -> list[str]:
    """What so few pairs come to: test, and best dev score with the seconds until then."""
    lines = ["", f"| {backbone}: labelled pairs | part | test | best dev | seconds until then |"]
    lines.append("| ---: | --- | ---: | ---: | ---: |")
    for pairs, parts in few.items():
        for name, part in parts.items():
            dev, seconds = max((dev, -seconds) for _, seconds, dev in part["curve"] if dev is not None)
            lines.append(f"| {pairs} | {name} | {part['test']:.2f} | {dev:.2f} | {-seconds:.0f} |")
    return lines


def reached(curve: Curve, score: float) -> tuple[float, float] | None:
    """Examples and seconds at which a curve first reaches a score, on a straight line between the points."""
    before: tuple[float, float, float] | None = None
    for examples, seconds, dev in curve:
        if dev is None:
            continue
        if dev >= score:
            if before is None:
                return examples, seconds
            part = (score - before[2]) / (dev - before[2])
            return before[0] + part * (examples - before[0]), before[1] + part * (seconds - before[1])
        before = examples, seconds, dev
    return None


def smoothed(curve: Curve) -> Curve:
    """Each score as the mean of itself and its neighbours."""
    scored = [(examples, seconds, dev) for examples, seconds, dev in curve if dev is not None]
    around = [scored[max(0, n - 1) : n + 2] for n in range(len(scored))]
    return [
        (examples, seconds, statistics.mean(dev for _, _, dev in near))
        for (examples, seconds, _), near in zip(scored, around, strict=True)
    ]


def ratios(ours: Curve, theirs: Curve) -> dict[str, float | bool | None]:
    """How many times fewer examples and seconds ours takes to LoRA's best dev score, and to 95 % of it.

    Of ours only what was scored after as many examples as LoRA counts: a finer grid would be an advantage.
    """
    scored = {examples for examples, _, _ in theirs}
    ours = [point for point in ours if point[0] in scored]
    figures: dict[str, float | bool | None] = {}
    for name, part, (mine, others) in (
        ("", 1.0, (ours, theirs)),
        ("_95", 0.95, (ours, theirs)),
        ("_smoothed", 1.0, (smoothed(ours), smoothed(theirs))),
    ):
        score = part * max(dev for _, _, dev in others if dev is not None)
        we, they = reached(mine, score), reached(others, score)
        examples = seconds = None
        if we is not None and they is not None:
            examples = round(they[0] / we[0], 1) if we[0] else None
            seconds = round(they[1] / max(we[1], 1e-9), 1)
        figures |= {
            f"examples_ratio{name}": examples,
            f"time_ratio{name}": seconds,
            f"without_examples{name}": we is not None and we[0] == 0,
        }
    return figures


def pairs_needed(parts: dict[str, Any], few: dict[int, dict[str, Any]]) -> dict[str, float | None]:
    """Labelled pairs and seconds that W and LoRA take to LoRA's best dev score and to 95 % of it; see above."""
    best = max(dev for _, _, dev in parts["lora"]["curve"] if dev is not None)
    figures: dict[str, float | None] = {}
    for name, share in (("", 1.0), ("_95", 0.95)):
        runs = {math.inf: parts} | few
        we, they = (least(runs, part, share * best) for part in ("alignment_only", "lora"))
        # Of the run on all rows the seconds leave out the reading of texts.
        after = least(few, "texts_then_rows", share * best)
        figures |= {f"pairs{name}": we.pairs, f"pairs_lora{name}": they.pairs, f"pairs_after_texts{name}": after.pairs}
        figures |= {
            f"pairs_ratio{name}": times_fewer(they.pairs, we.pairs),
            f"pairs_time_ratio{name}": times_fewer(they.seconds, we.seconds),
            f"time_ratio_after_texts{name}": times_fewer(they.seconds, after.seconds),
        }
    return figures


class Least(NamedTuple):
    """What it takes to get to a score, each in the run that takes least; None: none gets there."""

    pairs: int | None
    seconds: float | None


def least(runs: dict[Any, dict[str, Any]], part: str, score: float) -> Least:
    """The fewest labelled pairs and, in whichever run, the least seconds with which a part gets to a score."""
    ways = []
    for pairs, run in runs.items():
        there = [at for at in run.get(part, {"curve": []})["curve"] if at[2] is not None and at[2] >= score]
        if there:
            examples, seconds, _ = there[0]
            ways.append((int(min(pairs, max(0, examples - run[part].get("texts", 0)))), seconds))
    return Least(min((way[0] for way in ways), default=None), min((way[1] for way in ways), default=None))


def times_fewer(theirs: float | None, ours: float | None) -> float | None:
    return None if theirs is None or not ours else round(theirs / ours, 1)


def without_labels(ours: Curve, theirs: Curve) -> dict[str, bool]:
    """Whether the plain texts alone reach LoRA's best dev score, and 95 % of it."""
    best = max(dev for _, _, dev in theirs if dev is not None)
    return {f"without_labels{name}": reached(ours, part * best) is not None for name, part in (("", 1), ("_95", 0.95))}


def even(text: str) -> int:
    number = int(text)
    if number < 4 or number % 2:
        raise argparse.ArgumentTypeError(f"{number} cannot be shared by two files, a batch of at least 2 from each")
    return number


def main() -> None:
    parser = parser_of(__doc__, "runs/transfer-benchmark")
    parser.add_argument("--model", type=Path, required=True, help="the trained model, as the recipe makes it")
    parser.add_argument("--backbones", nargs="+", default=["gemma-3-270m", "qwen2.5-coder-0.5b-instruct"])
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--pairs", type=int, default=300, help="of dev")
    parser.add_argument("--every", type=int, default=10, help="steps between dev scores")
    parser.add_argument("--choose", type=int, default=15, metavar="STEPS", help="of the runs that pick LoRA's rate")
    parser.add_argument("--few", nargs="+", type=even, default=[], metavar="PAIRS", help="labelled pairs, even numbers")
    parser.add_argument("--few-steps", type=int, default=32, metavar="STEPS", help="of the runs on so few pairs")
    parser.add_argument("--lora-rate", type=float, help="LoRA's learning rate; unset: chosen")
    parser.add_argument("--states", metavar="SIZE", help="keep text states on disk, e.g. 40GiB")
    parser.add_argument("--set", nargs="+", metavar="SECTION.NAME=VALUE", help="change the recipe's settings")
    parser.add_argument("--quick", nargs="+", default=[], choices=QUICK, metavar="PART", help=", ".join(QUICK))
    arguments = parsed(parser)
    names = ("steps", "batch", "pairs", "every", "choose", "lora_rate", "states", "set")
    settings = {name: getattr(arguments, name) for name in names} | {"model": str(arguments.model.resolve())}
    one_setting(arguments.output, settings)
    figures: dict[str, dict[str, Any]] = {}
    shown = [*FIGURES, *(f"quick_{part}" for part in arguments.quick)]
    tables: list[str] = []
    lines = ["| backbone | " + " | ".join(shown) + " |", "| --- |" + " ---: |" * len(shown)]
    for backbone in arguments.backbones:
        parts = {}
        for name in (part for part in PARTS if part in arguments.parts):
            say(f"{backbone}: {name}")
            parts[name] = kept(
                place_of(arguments, backbone) / f"{name}.json", partial(PARTS[name], arguments, backbone)
            )
        found: dict[str, Any] = {k: v for k, v in parts.get("start", {}).items() if k in FIGURES}
        found |= {name: part["test"] for name, part in parts.items() if "test" in part}
        found = {name: round(value, 2) for name, value in found.items()}
        if {"alignment_only", "lora"} <= set(parts):
            found |= ratios(parts["alignment_only"]["curve"], parts["lora"]["curve"])
        if {"unlabelled", "lora"} <= set(parts):
            found |= without_labels(parts["unlabelled"]["curve"], parts["lora"]["curve"])
        if few := few_rows(arguments, backbone):
            tables += few_rows_table(backbone, few)
            if {"alignment_only", "lora"} <= set(parts):
                found |= pairs_needed(parts, few)
        for part in arguments.quick:
            say(f"{backbone}: quick suite, {part}")
            place = place_of(arguments, backbone) / f"quick_{part}.json"
            found[f"quick_{part}"] = round(kept(place, partial(quick, arguments, backbone, part))["mean"], 2)
        figures[backbone] = found
        lines.append(f"| {backbone} | " + " | ".join(str(found.get(name, "-")) for name in shown) + " |")
        if arguments.report:
            arguments.report.mkdir(parents=True, exist_ok=True)
            draw(parts, arguments.report / f"{slug(backbone)}.png", backbone)
            for pairs, parts_of_few in few.items():
                picture = arguments.report / f"{slug(backbone)}-{pairs}-pairs.png"
                draw(parts_of_few, picture, f"{backbone}, {pairs} labelled pairs")
            if arguments.quick:
                write_quick_report(arguments, backbone)
            record = {"command": command(), "figures": found, "parts": parts, "few_rows": few}
            atomic.write_text(arguments.report / f"{slug(backbone)}.json", json.dumps(record, indent=1) + "\n")
    if arguments.report:
        atomic.write_text(arguments.report / "report.md", "\n".join(lines + tables) + "\n")
    print("\n".join(lines + tables))
    for backbone, found in figures.items():
        print(json.dumps({"backbone": backbone} | found))


def texts_of_rows(arguments: argparse.Namespace, backbone: str) -> list[str]:
    """The anchors of the labelled rows, as plain texts."""
    config = recipe(arguments, backbone)
    data = load_training_data(config.data, config.model.document_instruction, config.training.seed)
    return sorted({text for rows in data.datasets.values() for text in rows["anchor"]})


PARTS: dict[str, Callable[[argparse.Namespace, str], dict[str, Any]]] = {
    "start": untrained,
    "alignment_only": lambda a, backbone: moved(a, backbone, "alignment_only", None, rows=True),
    "unlabelled": lambda a, backbone: moved(a, backbone, "unlabelled", texts_of_rows(a, backbone), rows=False),
    "texts_then_rows": lambda a, backbone: moved(a, backbone, "texts_then_rows", texts_of_rows(a, backbone), rows=True),
    "from_scratch": scratch,
    "lora": peer,
}
FEW_PARTS = ("alignment_only", "texts_then_rows", "lora")
QUICK = ("closed_form", "alignment_only", "unlabelled", "texts_then_rows", "from_scratch", "lora")
REVISION = "transfer"
FIGURES = (
    *("hard_cue", "hard_cue_centred", "closed_form_plain", "closed_form"),
    *("alignment_only", "unlabelled", "texts_then_rows", "from_scratch", "lora"),
    *("examples_ratio", "time_ratio", "without_examples", "without_labels"),
    *("examples_ratio_95", "time_ratio_95", "without_examples_95", "without_labels_95"),
    *("examples_ratio_smoothed", "time_ratio_smoothed"),
    *(
        f"{figure}{of}"
        for of in ("", "_95")
        for figure in (
            *("pairs", "pairs_lora", "pairs_ratio", "pairs_time_ratio"),
            *("pairs_after_texts", "time_ratio_after_texts"),
        )
    ),
)


if __name__ == "__main__":
    main()
