"""Draw plain texts for a teacher from files of training rows: one text a line, all different.

    python scripts/teacher_texts.py --data FOLDER --output runs/teacher-texts.txt
    python scripts/teacher_texts.py --data FOLDER --output runs/all-texts.txt --all

The first line draws those of `recipes/general-teacher.yaml`, the second those of `recipes/general-all.yaml`.
"""

from __future__ import annotations

import argparse
import os
import random
from pathlib import Path

from promptembedder import atomic
from promptembedder.data.readers import records

# Of the shorter list.
MOST = 8500
# Texts taken of each file: queries, and texts that answer them. Long ones are few, because reading them costs most.
DRAWN = {
    "agnews_headlines": (300, 600),
    "clinc150_intent": (1500, 0),
    "conala_rewrites": (500, 500),
    "cr_sentiment": (400, 0),
    "mag_field_dev": (900, 0),
    "medquad": (500, 200),
    "nq_qed": (300, 100),
    "quora_paraphrases": (1500, 1000),
    "rte_entailment": (300, 300),
    "scitldr_summary_abstract": (400, 600),
    "scitldr_title_abstract": (300, 0),
    "semeval_cqa_dup": (100, 100),
    "snips_intent": (300, 0),
    "snli_triplets": (1000, 1500),
    "subj": (400, 0),
    "trecqa_train": (70, 250),
    "wikipedia_sections": (0, 200),
    "wikiqa_dev": (100, 300),
    "xquad_en": (300, 150),
}
# The same for `--all`: every text of a side, or this number.
EVERY = 10**6
ALL = dict.fromkeys(DRAWN, (EVERY, EVERY)) | {
    "clinc150_intent": (EVERY, 0),
    "conala_code": (0, 600),
    "cr_sentiment": (EVERY, 0),
    "mag_field_dev": (EVERY, 0),
    "medquad": (2500, 1500),
    "scitldr_summary_abstract": (EVERY, 1800),
    "scitldr_title_abstract": (EVERY, 0),
    "snips_intent": (2000, 0),
    "snli_triplets": (EVERY, 7000),
    "subj": (EVERY, 0),
    "wikipedia_sections": (0, EVERY),
}


def draw(data: Path, numbers_of: dict[str, tuple[int, int]], seed: int) -> list[str]:
    """The texts, shuffled; a text holds no line break."""
    found: dict[str, None] = {}
    for name, numbers in numbers_of.items():
        sides: tuple[set[str], set[str]] = (set(), set())
        for _, row in records(f"train/{name}.jsonl.gz", str(data)):
            sides[0].add(row["query"])
            sides[1].update(row["pos"] + row.get("neg", []))
        for texts, number in zip(sides, numbers, strict=True):
            some = sorted({" ".join(text.split()) for text in texts} - {""})
            found |= dict.fromkeys(random.Random(f"{seed} {name}").sample(some, min(number, len(some))))
    drawn = list(found)
    random.Random(seed).shuffle(drawn)
    return drawn


def main() -> None:
    """Write the texts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = os.environ.get("PROMPTEMBEDDER_DATA")
    parser.add_argument("--data", type=Path, default=known, required=known is None, help="folder of training rows")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--all", action="store_true", help="nearly all texts, in place of 8,500")
    parser.add_argument("--seed", type=int, default=13)
    arguments = parser.parse_args()
    texts = draw(arguments.data, ALL if arguments.all else DRAWN, arguments.seed)
    texts = texts if arguments.all else texts[:MOST]
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    with atomic.replacing(arguments.output) as scratch:
        Path(scratch).write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    print(f"{len(texts)} texts in {arguments.output}")


if __name__ == "__main__":
    main()
