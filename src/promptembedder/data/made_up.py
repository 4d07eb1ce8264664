"""Made-up rows in which the instruction alone decides what is alike.

Rows of most tasks can be told apart without reading the instruction: a positive is close in every respect. Here each
sentence puts together values of several aspects, such as who, what and where; under `Group the sentences by place.` the
positive shares the place and nothing else, the negative everything but the place. Under another instruction the same
two sentences change sides.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations

from promptembedder.data.aspects import instruction_about
from promptembedder.data.families import FAMILIES, Family


@dataclass(frozen=True)
class MadeUpRow:
    """A row and the aspect in which its positive is like the anchor."""

    query: str
    positive: str
    negative: str
    instruction: str
    aspect: str


def contrast_rows(count: int, seed: int, families: Sequence[Family] = FAMILIES) -> list[tuple[MadeUpRow, MadeUpRow]]:
    """Rows in twos: one anchor under two instructions, each about another of its aspects; the same for the same seed.

    Every family has as many as any other, every two aspects of a family as any other two of it.

    Args:
        count: rows, both of each two counted; an odd one is left out.
        seed: of all draws.
        families: kinds of sentences.
    """
    drawn = random.Random(seed)
    asked = [[_Asked(family, pair, drawn) for pair in _pairs(family)] for family in families]
    twos = []
    for n in range(count // 2):
        of_family = asked[n % len(families)]
        twos.append(of_family[n // len(families) % len(of_family)].rows(drawn))
    return twos


def _pairs(family: Family) -> list[tuple[str, str]]:
    """Every two slots as often as instructions are drawn for them.

    A family of two slots has one pair alone; with four draws each slot is asked about in up to four wordings.
    """
    pairs = [*combinations(family.slots, 2)]
    return (4 if len(pairs) == 1 else 2) * pairs


class _Asked:
    """Two slots of a family, and an instruction about each."""

    def __init__(self, family: Family, slots: tuple[str, str], drawn: random.Random) -> None:
        self.family = family
        self.about = [(slot, *_instruction(family, slot, drawn)) for slot in slots]

    def rows(self, drawn: random.Random) -> tuple[MadeUpRow, MadeUpRow]:
        """Both rows of one anchor."""
        anchor = {name: drawn.choice(_values(values)) for name, (_, values) in self.family.slots.items()}
        query = _sentence(self.family, anchor, drawn)
        one, other = (self._row(query, anchor, *about, drawn) for about in self.about)
        return one, other

    def _row(
        self,
        query: str,
        anchor: Mapping[str, Sequence[str]],
        slot: str,
        instruction: str,
        aspect: str,
        drawn: random.Random,
    ) -> MadeUpRow:
        differing = {
            name: drawn.choice([value for value in _values(values) if value != anchor[name]])
            for name, (_, values) in self.family.slots.items()
        }
        positive, negative = (
            _sentence(self.family, values, drawn)
            for values in (differing | {slot: anchor[slot]}, {**anchor, slot: differing[slot]})
        )
        return MadeUpRow(query, positive, negative, instruction, aspect)


def _instruction(family: Family, slot: str, drawn: random.Random) -> tuple[str, str]:
    """An instruction about a slot, and the noun it uses for it."""
    aspect = drawn.choice(family.slots[slot][0])
    others = [name for other in family.slots if other != slot for name in family.slots[other][0] if name != aspect]
    return instruction_about(aspect, drawn.choice(others), drawn.choice(family.things), drawn), aspect


def _sentence(family: Family, values: Mapping[str, Sequence[str]], drawn: random.Random) -> str:
    said = {name: drawn.choice(ways) for name, ways in values.items()}
    return drawn.choice(family.templates).format(**said)


@cache
def _values(text: str) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(way.strip() for way in " ".join(value.split()).split("/")) for value in text.split(";"))
