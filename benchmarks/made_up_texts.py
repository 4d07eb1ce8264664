"""Short made-up texts, as many as one likes, the same for the same seed.

    python benchmarks/made_up_texts.py 200000 corpus/ --files 8

writes JSONL files of rows with `id`, `text` and `year`.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

WORDS = [
    *("the", "a", "river", "town", "bank", "guitar", "rain", "bridge", "children", "rates", "bread", "water", "light"),
    *(
        "slow",
        "old",
        "two",
        "walk",
        "play",
        "meaning",
        "harbour",
        "letter",
        "ferry",
        "garden",
        "night",
        "music",
        "road",
    ),
    *("opens", "raises", "sells", "finds", "loses", "reads", "writes", "builds", "answers", "waits", "under", "over"),
]


def texts(count: int, *, seed: int = 13, least: int = 4, most: int = 16) -> Iterator[str]:
    """Texts of `least` to `most` words and a number, so that no two are the same."""
    drawn = random.Random(seed)
    for n in range(count):
        yield f"{' '.join(drawn.choices(WORDS, k=drawn.randint(least, most)))} {seed}-{n}"


def write_corpus(folder: Path, count: int, *, files: int = 8, seed: int = 13, first: int = 0) -> None:
    """Write `count` rows to so many JSONL files; their ids begin with `first`."""
    folder.mkdir(parents=True, exist_ok=True)
    source, size = texts(count, seed=seed), -(-count // files)
    for number in range(files):
        with (folder / f"{seed:02d}-{number:03d}.jsonl").open("w", encoding="utf-8") as file:
            for n in range(number * size, min(count, (number + 1) * size)):
                row = {"id": first + n, "text": next(source), "year": 1990 + n % 30}
                file.write(json.dumps(row) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", type=int)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--files", type=int, default=8)
    parser.add_argument("--seed", type=int, default=13)
    arguments = parser.parse_args()
    write_corpus(arguments.folder, arguments.count, files=arguments.files, seed=arguments.seed)


if __name__ == "__main__":
    main()
