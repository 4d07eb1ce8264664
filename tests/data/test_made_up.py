"""Made-up rows: the instruction's aspect, and nothing else, is what anchor and positive share."""

from __future__ import annotations

import re
from collections import Counter
from itertools import chain, permutations

import pytest

from promptembedder.data.aspects import ASPECTS
from promptembedder.data.families import FAMILIES
from promptembedder.data.made_up import _values, contrast_rows
from promptembedder.data.rows import load_training_data
from promptembedder.data.settings import DataConfig


def bare(text):
    """A text without the marks that templates put around values."""
    return f" {' '.join(re.sub('[.?!,:]', ' ', text).split())} "


def said(sentence, family):
    """Slot -> number of the value that the sentence names; the longest wording found counts."""
    found = {}
    for slot, (_, values) in family.slots.items():
        ways = [(way, n) for n, value in enumerate(_values(values)) for way in value if bare(way) in bare(sentence)]
        found[slot] = max(ways, key=lambda way: len(way[0]))[1]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("seed", [3, 6, 7])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.things[0])
def test_the_positive_shares_the_aspect_and_the_negative_the_rest(seed, family):
    for row in chain.from_iterable(contrast_rows(200, seed, [family])):
        anchor, positive, negative = (said(text, family) for text in (row.query, row.positive, row.negative))
        same = {slot for slot in anchor if anchor[slot] == positive[slot]}
        assert len(same) == 1, row
        assert {slot for slot in anchor if anchor[slot] == negative[slot]} == set(anchor) - same, row
        assert row.aspect in family.slots[same.pop()][0]
        assert f" {row.aspect}" in row.instruction


def test_two_rows_ask_one_anchor_about_different_aspects():
    for one, other in contrast_rows(600, seed=4):
        assert one.query == other.query
        assert one.instruction != other.instruction
        assert one.aspect != other.aspect


def test_every_family_and_every_two_aspects_of_it_have_as_many():
    families = FAMILIES[:2]  # of four slots, six pairs, and of two, one pair
    pairs = Counter(frozenset((one.instruction, other.instruction)) for one, other in contrast_rows(480, 2, families))
    assert sorted(pairs.values()) == [10] * 12 + [30] * 4
    assert len(contrast_rows(7, seed=1)) == 3


def test_aspects_are_words_the_prompter_knows():
    named = {name for family in FAMILIES for names, _ in family.slots.values() for name in names}
    assert named <= set(ASPECTS)


def test_the_same_for_the_same_seed():
    assert contrast_rows(50, seed=1) == contrast_rows(50, seed=1)
    assert contrast_rows(50, seed=1) != contrast_rows(50, seed=2)
    assert contrast_rows(0, seed=1) == []


@pytest.mark.parametrize("negatives", [0, 2])
def test_as_training_data(negatives):
    data = load_training_data(DataConfig(contrast_rows=300, max_negatives=negatives), "Be found.", seed=3)
    assert sum(len(table) for table in data.datasets.values()) == 150
    assert data.opposed == set(data.datasets)
    columns = ["anchor", "positive", *(f"negative_{n + 1}" for n in range(max(negatives, 1)))]
    others = [f"other_{column}" for column in columns]
    for name, table in data.datasets.items():
        prompts = data.prompts[name]
        assert table.column_names == list(prompts) == [*columns, *others]
        assert table["anchor"][:] == table["other_anchor"][:]
        for asked in (columns, others):
            assert len({prompts[column] for column in asked}) == 1  # both sides are read under the row's instruction
            assert data.aspects[prompts[asked[0]]] in prompts[asked[0]]
        assert prompts["anchor"] != prompts["other_anchor"]


def test_no_wording_of_one_aspect_lies_within_anothers():
    for family in FAMILIES:
        ways = {slot: [way for value in _values(values) for way in value] for slot, (_, values) in family.slots.items()}
        for slot, other in permutations(ways, 2):
            within = [(one, two) for one in ways[slot] for two in ways[other] if f" {one} " in f" {two} "]
            assert not within, (slot, other)
        for slot in ways:
            assert len(set(ways[slot])) == len(ways[slot]), slot
