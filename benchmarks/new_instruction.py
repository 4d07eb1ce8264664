"""Seconds of one text under a new and under a remembered instruction, beside another checkout of this project.

    PROMPTEMBEDDER_DATA=... python benchmarks/new_instruction.py --before ../before/src

Two processes, one per checkout, take turns instruction by instruction. Prints one JSON object: medians of both in
milliseconds, their ratios, and the medians of the ratios of single turns.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from promptembedder import evaluation

_CODE = """
import json, sys, time
import promptembedder
model = promptembedder.load("smollm2-135m", device="cpu")
for text in ("A man plays a guitar.", "A man plays a guitar on stage."):
    model.encode([text], prompt="To begin with.")
print("ready", flush=True)
for line in sys.stdin:
    seconds = []
    for text in ("A man plays a guitar.", "A man plays the guitar."):
        start = time.perf_counter()
        model.encode([text], prompt=json.loads(line))
        seconds.append(time.perf_counter() - start)
    print("found", json.dumps(seconds), flush=True)
"""


def opened(source: Path) -> subprocess.Popen[str]:
    """A process that imports the package from a folder."""
    environment = {**os.environ, "PYTHONPATH": str(source.resolve())}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    return subprocess.Popen([sys.executable, "-c", _CODE], text=True, env=environment, **pipes)  # type: ignore[call-overload,no-any-return]


def answer(process: subprocess.Popen[str], word: str) -> str:
    """The rest of the next line that begins with a word."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(word):
            return line[len(word) :]
    sys.exit("a process ended before its answer")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="folder `src` of the other checkout")
    known = os.environ.get("PROMPTEMBEDDER_DATA")
    parser.add_argument("--data", type=Path, default=known, required=known is None, help="has instructions.json")
    parser.add_argument("--number", type=int, default=20, help="of instructions")
    arguments = parser.parse_args()
    given = evaluation.read_instructions(arguments.data / "instructions.json")
    instructions = list(dict.fromkeys(text for text in given.values() if isinstance(text, str)))[: arguments.number]
    sources = {"before": arguments.before, "now": Path(__file__).parents[1] / "src"}
    processes = {name: opened(source) for name, source in sources.items()}
    for process in processes.values():
        answer(process, "ready")
    found: dict[str, list[list[float]]] = {name: [] for name in processes}
    for instruction in instructions:
        for name, process in processes.items():
            assert process.stdin is not None
            process.stdin.write(json.dumps(instruction) + "\n")
            process.stdin.flush()
            found[name].append(json.loads(answer(process, "found")))
    for process in processes.values():
        process.kill()
    report = {}
    for place, kind in enumerate(("new", "remembered")):
        before, now = ([turn[place] for turn in found[name]] for name in ("before", "now"))
        report[kind] = {
            "before_ms": round(1e3 * statistics.median(before), 1),
            "now_ms": round(1e3 * statistics.median(now), 1),
            "ratio": round(statistics.median(now) / statistics.median(before), 3),
            "ratio_of_turns": round(statistics.median(b / a for a, b in zip(before, now, strict=True)), 3),
        }
    print(json.dumps({"instructions": len(instructions), **report}))


if __name__ == "__main__":
    main()
