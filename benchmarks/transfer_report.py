"""What the transfer benchmark reports of the parts that it ran: ratios, tables, one picture.

- `examples_ratio`, `time_ratio`: examples and seconds LoRA takes to its best dev score, over those `alignment_only`
  takes to the same score. Unset where `alignment_only` never gets there, or has the score before any example
  (`without_examples`). Between two scores the curve is a straight line. Scoring dev costs nobody time.
- `..._95`: the same to 95 % of LoRA's best score. `..._smoothed`: every score is the mean of three neighbours.
- `without_labels`: whether `unlabelled` reaches LoRA's best score, which takes no labelled row.
- `pairs`, `pairs_lora`: the fewest labelled pairs with which W on rows and LoRA reach that score, among the few pairs
  or on the way through all rows. `pairs_after_texts`: those of W after plain texts. A run counts what it had seen at
  its first score that is high enough. Dev pairs, which choose the weights of all, count for nobody.
- `pairs_ratio`: LoRA's pairs over ours. `pairs_time_ratio`, `time_ratio_after_texts`: the same of the least seconds.
- `quick_...`: mean over the tasks of the quick suite.
"""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import pictures
from promptembedder import atomic
from promptembedder.training.curves import Curve

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


class Measured(NamedTuple):
    """What was run on one backbone.

    Attributes:
        parts: what each part came to: `test`, and `curve` where it was trained.
        few: the same by number of labelled pairs.
        quick: mean over the quick suite of each part whose model was evaluated.
    """

    parts: dict[str, dict[str, Any]]
    few: dict[int, dict[str, Any]]
    quick: dict[str, float]


def figures_of(measured: Measured) -> dict[str, Any]:
    """All figures of a backbone; see the top of this file."""
    parts = measured.parts
    found: dict[str, Any] = {name: value for name, value in parts.get("start", {}).items() if name in FIGURES}
    found |= {name: part["test"] for name, part in parts.items() if "test" in part}
    found = {name: round(value, 2) for name, value in found.items()}
    if "lora" in parts:
        lora = parts["lora"]["curve"]
        if "alignment_only" in parts:
            found |= ratios(parts["alignment_only"]["curve"], lora)
        if "unlabelled" in parts:
            found |= without_labels(parts["unlabelled"]["curve"], lora)
        if "alignment_only" in parts and measured.few:
            found |= pairs_needed(parts, measured.few)
    return found | {f"quick_{part}": round(mean, 2) for part, mean in measured.quick.items()}


def tables(backbones: dict[str, Measured]) -> str:
    """Figures by backbone, then what a few labelled pairs come to."""
    figures = {backbone: figures_of(measured) for backbone, measured in backbones.items()}
    quick = dict.fromkeys(name for found in figures.values() for name in found if name.startswith("quick_"))
    lines = [f"| figure | {' | '.join(figures)} |", "| --- |" + " ---: |" * len(figures)]
    lines += [
        f"| {name} | {' | '.join(shown(found.get(name)) for found in figures.values())} |"
        for name in (*FIGURES, *quick)
        if any(name in found for found in figures.values())
    ]
    for backbone, measured in backbones.items():
        if measured.few:
            lines += few_rows_table(backbone, measured.few)
    return "\n".join(lines)


def shown(value: float | bool | None) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "-" if value is None else str(value)


def write(folder: Path, command: str, backbones: dict[str, Measured]) -> None:
    """Write `report.md`, `transfer.json` and `transfer.png`."""
    curves = {}
    for backbone, measured in backbones.items():
        curves[backbone] = curves_of(measured.parts)
        curves |= {f"{backbone}, {pairs} labelled pairs": curves_of(few) for pairs, few in measured.few.items()}
    if drawn := {title: parts for title, parts in curves.items() if parts}:
        pictures.curves(folder / "transfer.png", drawn)
    record = {
        "command": command,
        "backbones": {
            backbone: {"figures": figures_of(measured), "parts": measured.parts, "few_rows": measured.few}
            for backbone, measured in backbones.items()
        },
    }
    picture = "\n\n![Dev score against examples and seconds](transfer.png)" if drawn else ""
    atomic.write_text(folder / "report.md", f"`{command}`\n\n{tables(backbones)}{picture}\n")
    atomic.write_text(folder / "transfer.json", json.dumps(record, indent=1) + "\n")


def curves_of(parts: dict[str, dict[str, Any]]) -> dict[str, Curve]:
    return {name: part["curve"] for name, part in parts.items() if "curve" in part}


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


def few_rows_table(backbone: str, few: dict[int, dict[str, Any]]) -> list[str]:
    """What so few pairs come to: test, and best dev score with the seconds until then."""
    lines = ["", f"| {backbone}: labelled pairs | part | test | best dev | seconds until then |"]
    lines.append("| ---: | --- | ---: | ---: | ---: |")
    for pairs, parts in few.items():
        for name, part in parts.items():
            dev, seconds = max((dev, -seconds) for _, seconds, dev in part["curve"] if dev is not None)
            lines.append(f"| {pairs} | {name} | {part['test']:.2f} | {dev:.2f} | {-seconds:.0f} |")
    return lines
