"""Make plain texts for a teacher from documents: paragraphs, and sentences of them as short texts.

    python scripts/document_texts.py FOLDER --output $PROMPTEMBEDDER_DATA/document-texts.txt

Reads all `.txt` and `.md` files below FOLDER. Paragraphs end at an empty line, and long ones are cut at ends of
sentences. Half of them give a sentence besides, so that a teacher compares short texts with long ones. What is mostly
numbers or symbols is left out.
"""

from __future__ import annotations

import argparse
import random
import re
from collections.abc import Iterator
from pathlib import Path

from promptembedder import atomic

PARAGRAPH_WORDS = range(25, 231)
SENTENCE_WORDS = range(6, 41)
# Long paragraphs are cut where they reach one of these numbers of words, so that lengths vary.
CUTS = (60, 110, 170)
# Share of letters and blanks below which a text is a table, a formula or a list of numbers.
LETTERS = 0.86
SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z(])")


def is_prose(text: str) -> bool:
    """Whether a text is made of words."""
    return sum(letter.isalpha() or letter == " " for letter in text) >= LETTERS * len(text)


def parts(paragraph: str, draw: random.Random) -> Iterator[list[str]]:
    """A paragraph as lists of sentences, each a part of a paragraph's usual length."""
    part: list[str] = []
    words, enough = 0, draw.choice(CUTS)
    for sentence in SENTENCE_END.split(" ".join(paragraph.split())):
        part.append(sentence)
        words += len(sentence.split())
        if words >= enough:
            yield part
            part, words, enough = [], 0, draw.choice(CUTS)
    if part:
        yield part


def texts_of(document: str, draw: random.Random) -> Iterator[str]:
    """Paragraphs of a document, and a sentence of half of them."""
    for paragraph in re.split(r"\n\s*\n", document):
        for sentences in parts(paragraph, draw):
            text = " ".join(sentences)
            if len(text.split()) not in PARAGRAPH_WORDS or not is_prose(text):
                continue
            yield text
            short = [s for s in sentences if len(s.split()) in SENTENCE_WORDS and is_prose(s)]
            if short and draw.random() < 0.5:
                yield draw.choice(short)


def main() -> None:
    """Write the texts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of documents")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=13)
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    found: dict[str, None] = {}
    for path in sorted(p for ending in ("txt", "md") for p in arguments.folder.rglob(f"*.{ending}")):
        found |= dict.fromkeys(texts_of(path.read_text(encoding="utf-8", errors="replace"), draw))
    if not found:
        parser.error(f"no .txt or .md file in {arguments.folder} holds a paragraph of {PARAGRAPH_WORDS.start} words")
    texts = list(found)
    draw.shuffle(texts)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    with atomic.replacing(arguments.output) as scratch:
        Path(scratch).write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    print(f"{len(texts)} texts in {arguments.output}")


if __name__ == "__main__":
    main()
