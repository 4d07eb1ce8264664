"""Memory and start of a `soft-prompt` export beside its model, each opened and used once in a process of its own.

    python benchmarks/start.py MODEL EXPORT --rounds 3

Both embed one text under the export's first instruction. `seconds` are of the processor, from the import to the
embedding; `mb` is the peak of resident memory above that after the imports.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from promptembedder.export.export_folder import read_facts

_CODE = """
import json, resource, sys, time
import promptembedder, sentence_transformers
from promptembedder.model import store
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
before, start = peak(), time.process_time()
model = promptembedder.load(sys.argv[1], device="cpu", dtype="float32")
embedding = model.encode("A man plays a guitar.", prompt=sys.argv[2])
print("found", json.dumps([time.process_time() - start, peak() - before, embedding.tolist()]))
"""


def opened(folder: Path, instruction: str) -> tuple[float, float, list[float]]:
    """Seconds, megabytes and the embedding."""
    ran = subprocess.run(
        [sys.executable, "-c", _CODE, str(folder), instruction], capture_output=True, text=True, check=True
    )
    seconds, megabytes, embedding = json.loads(ran.stdout.split("found ")[1])
    return seconds, megabytes, embedding


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("export", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    instruction = read_facts(arguments.export)["instructions"][0]["instruction"]
    found = [
        [opened(place, instruction) for place in (arguments.model, arguments.export)] for _ in range(arguments.rounds)
    ]
    figures = {
        "seconds": [statistics.median(one[side][0] for one in found) for side in (0, 1)],
        "mb": [statistics.median(one[side][1] for one in found) for side in (0, 1)],
    }
    apart = max(abs(a - b) for a, b in zip(found[0][0][2], found[0][1][2], strict=True))
    ratios = {name: round(export / model, 3) for name, (model, export) in figures.items()}
    print(json.dumps({**figures, "ratios": ratios, "largest_difference": apart}))


if __name__ == "__main__":
    main()
