"""What `instruction_guidance` does to a trained model, by weight: on parts that are nobody's test set, then on one.

    PROMPTEMBEDDER_DATA=... python benchmarks/guidance.py smollm2-135m --report benchmarks/results/guidance-cpu

`requests`, `remarks`: share x 100 of made-up texts in order under two instructions that swap positive and negative (25
by chance; `ablations.py`). Then the last `--held` rows of training files, share whose positive is closer than the
negative (the model may have been trained on them: what matters is what the weight changes), and Spearman x 100 on
STSBenchmark dev pairs. The weight that is best on requests and remarks together is then tried on HWU64ScenarioAction,
beside 1. The last line is one JSON object.
"""

from __future__ import annotations

import json
import statistics
from typing import Any

import promptembedder
from ablations import REMARKS, REQUESTS, SEEN, UNSEEN, both_ways, triplets_right
from kept_results import command, parsed, parser_of, say
from promptembedder import atomic, evaluation
from promptembedder.llms.state_cache import open_text_cache
from promptembedder.model.module import soft_prompt_module
from promptembedder.training.evaluators import pair_evaluator
from promptembedder.training.settings import EvaluationConfig

TASK = "HWU64ScenarioAction"
SWAPPED = {"requests": (REQUESTS, ("do", "thing")), "remarks": (REMARKS, ("feel", "matter"))}


def scores(model: Any, arguments: Any) -> dict[str, float]:
    """All figures that are nobody's test set."""
    settings = EvaluationConfig(dev="sts/STSBenchmark.dev.jsonl.gz", dev_pairs=arguments.pairs)
    pairs = pair_evaluator(settings, str(arguments.data), "dev")
    assert pairs is not None
    figures = {name: both_ways(model, *which) for name, which in SWAPPED.items()}
    figures |= {source: triplets_right(model, (source,), arguments, None) for source in (*SEEN, *UNSEEN)}
    return figures | {"sts": 100 * float(pairs(model)["dev_spearman_cosine"])}


def on_the_task(model: Any, weight: float, arguments: Any) -> dict[str, float]:
    """Shares of triplets in order, and of swapped pairs that are right both ways."""
    encoder = evaluation.InstructedEncoder(model, "guidance/model", f"weight-{weight:g}")
    tasks = evaluation.local_tasks(arguments.data, [TASK], quick=True)
    result = evaluation.evaluate(encoder, tasks, arguments.output, batch_size=64)
    found = json.loads((result.folder / f"{TASK}.json").read_text())["scores"]["test"][0]
    return {name: 100 * found[name] for name in ("main_score", "both_orders")}


def main() -> None:
    parser = parser_of(__doc__, "runs/guidance")
    parser.add_argument("model", help="folder or name of a saved model")
    parser.add_argument("--weights", type=float, nargs="+", default=[1.0, 1.2, 1.33, 1.6, 2.0])
    parser.add_argument("--pairs", type=int, default=200, help="of STSBenchmark dev")
    parser.add_argument("--held", type=int, default=60, help="rows of each training file")
    arguments = parsed(parser)
    model = promptembedder.load(arguments.model)
    module = soft_prompt_module(model)
    if module.settings.layout == "suffix":
        module.backbone.text_cache = open_text_cache(4 * 2**30, identity="guidance")
    found: dict[float, dict[str, float]] = {}
    for weight in arguments.weights:
        module.instruction_guidance = weight
        found[weight] = {name: round(score, 1) for name, score in scores(model, arguments).items()}
        say(f"{weight:g}: {json.dumps(found[weight])}")
    best = max(found, key=lambda weight: statistics.mean(found[weight][name] for name in SWAPPED))
    task = {}
    for weight in dict.fromkeys([1.0, best]):
        module.instruction_guidance = weight
        task[weight] = {name: round(score, 1) for name, score in on_the_task(model, weight, arguments).items()}
    names = list(next(iter(found.values())))
    lines = ["| weight | " + " | ".join(names) + " |", "| ---: |" + " ---: |" * len(names)]
    lines += [f"| {weight:g} | " + " | ".join(str(row[name]) for name in names) + " |" for weight, row in found.items()]
    print("\n".join(lines))
    if arguments.report:
        record = {"command": command(), "by_weight": found, "best": best, TASK: task}
        atomic.write_text(arguments.report / "guidance.json", json.dumps(record, indent=1) + "\n")
        atomic.write_text(arguments.report / "guidance.md", f"`{command()}`\n\n" + "\n".join(lines) + "\n")
    print(json.dumps({"best": best, TASK: task}))


if __name__ == "__main__":
    main()
