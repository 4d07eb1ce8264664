"""Leaf and text-state cache on against both off: the same quality, less time.

    PROMPTEMBEDDER_DATA=... python benchmarks/leaf_and_cache.py --report benchmarks/results/leaf-and-cache-cpu

The paraphrase recipe on so few rows that they come up several times, for three seeds, from the same warm-started model
each. Per run: Spearman x 100 on pairs of STSBenchmark dev after the last step, and wall time of the steps. The last
line is one JSON object.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import promptembedder
from kept_results import command, parsed, parser_of
from promptembedder import atomic
from promptembedder.model.module import soft_prompt_module
from promptembedder.model.store import save
from promptembedder.training.settings import load_run
from promptembedder.training.train import train
from promptembedder.training.warm_start import warm_start

RECIPE = Path(__file__).parents[1] / "recipes" / "paraphrase-suffix.yaml"
SETTINGS: dict[str, dict[str, Any]] = {
    "off": {"soft_prompt_leaf": False},
    "on": {"soft_prompt_leaf": True, "text_state_cache": 8 * 2**30},
}


def main() -> None:
    parser = parser_of(__doc__, None)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=64, help="of each of the three files")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=36)
    parser.add_argument("--pairs", type=int, default=400, help="of dev")
    arguments = parsed(parser)
    config = load_run(RECIPE, root=str(arguments.data))
    files = tuple(replace(file, max_rows=arguments.rows) for file in config.data.files)
    runs: list[dict[str, Any]] = []
    for seed in range(13, 13 + arguments.seeds):
        with tempfile.TemporaryDirectory() as scratch:
            model = promptembedder.build(config.model, seed=seed)
            module = soft_prompt_module(model)
            warm_start(module, {module.settings.default_instruction: None}, config.training.warm_start, seed)
            save(model, Path(scratch) / "start")
            for name, changes in SETTINGS.items():
                training = replace(
                    config.training,
                    output=str(Path(scratch) / name),
                    max_steps=arguments.steps,
                    batch_size=arguments.batch,
                    seed=seed,
                    **changes,
                )
                run = replace(
                    config,
                    data=replace(config.data, files=files),
                    training=training,
                    evaluation=replace(
                        config.evaluation, dev_pairs=arguments.pairs, every_steps=arguments.steps, test=None
                    ),
                )
                result = train(run, model=promptembedder.load(Path(scratch) / "start"))
                runs.append(
                    {
                        "leaf and cache": name,
                        "seed": seed,
                        "dev_spearman": round(result.scores["dev"], 2),
                        "seconds": round(result.seconds, 1),
                        "hit_rate": result.text_state_hit_rate,
                    }
                )
                print(json.dumps(runs[-1]), flush=True)
    figures: dict[str, Any] = {}
    for name in SETTINGS:
        scores = [run["dev_spearman"] for run in runs if run["leaf and cache"] == name]
        figures[f"dev_spearman_{name}"] = round(statistics.mean(scores), 2)
        figures[f"deviation_{name}"] = round(statistics.stdev(scores), 2) if len(scores) > 1 else None
        seconds = [run["seconds"] for run in runs if run["leaf and cache"] == name]
        figures[f"seconds_{name}"] = round(statistics.median(seconds), 1)
    figures["speedup"] = round(figures["seconds_off"] / figures["seconds_on"], 2)
    if arguments.report:
        record = {"command": command(), "runs": runs, "summary": figures}
        atomic.write_text(arguments.report / "leaf-and-cache.json", json.dumps(record, indent=1) + "\n")
        lines = [f"`{command()}`", "", f"| {' | '.join(runs[0])} |", "| --- |" + " ---: |" * (len(runs[0]) - 1)]
        lines += [f"| {' | '.join(str(value) for value in run.values())} |" for run in runs]
        atomic.write_text(arguments.report / "leaf-and-cache.md", "\n".join([*lines, "", json.dumps(figures), ""]))
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
