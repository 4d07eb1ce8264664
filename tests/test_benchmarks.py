"""What the benchmarks compute themselves."""

from __future__ import annotations

import math

import pytest

from transfer import ratios, rows_ratios, smoothed  # of benchmarks/


def curve(every, seconds_per_example=1.0, rate=0.05):
    return [(n, n * seconds_per_example, 60 + 20 * (1 - math.exp(-rate * n))) for n in range(0, 321, every)]


def test_equal_curves_have_a_ratio_of_one():
    """Also where one was scored more often than the other."""
    found = ratios(curve(4), curve(64))
    for name in ("examples_ratio", "time_ratio", "examples_ratio_95", "time_ratio_95"):
        assert found[name] == pytest.approx(1), name


def test_ratios_are_of_where_the_curves_cross():
    theirs = [(0, 0.0, 50.0), (100, 400.0, 70.0), (200, 800.0, 80.0)]
    ours = [(0, 3.0, 60.0), (100, 103.0, 80.0), (200, 203.0, 82.0)]
    found = ratios(ours, theirs)
    assert (found["examples_ratio"], found["time_ratio"]) == (2.0, round(800 / 103, 1))
    # 95 % of 80 is 76: theirs after 160 examples and 640 s, ours after 80 and 83 s.
    assert (found["examples_ratio_95"], found["time_ratio_95"]) == (2.0, round(640 / 83, 1))
    assert not found["without_examples"]


def test_no_single_score_decides_a_smoothed_ratio():
    steady = [(n, float(n), 50.0 + n) for n in range(0, 31, 10)]
    lucky = [(n, float(n), 90.0 if n == 10 else 50.0 + n) for n in range(0, 31, 10)]
    assert smoothed(steady) == [(0, 0.0, 55.0), (10, 10.0, 60.0), (20, 20.0, 70.0), (30, 30.0, 75.0)]
    found = ratios(lucky, steady)
    assert found["examples_ratio"] == 4  # to 80, by the one score: a straight line has it after 7.5 examples
    # Smoothed: 70, 70, 80, 75; to 75.
    assert (found["examples_ratio_smoothed"], found["time_ratio_smoothed"]) == (2, 2)


def test_what_is_never_reached_has_no_ratio():
    found = ratios([(0, 1.0, 50.0), (100, 9.0, 60.0)], [(0, 0.0, 50.0), (100, 90.0, 80.0)])
    assert found["examples_ratio"] is found["time_ratio"] is None


def test_a_start_that_is_there_already():
    found = ratios([(0, 2.0, 81.0)], [(0, 0.0, 50.0), (100, 90.0, 80.0)])
    assert found["without_examples"]
    assert (found["examples_ratio"], found["time_ratio"]) == (None, 45.0)


def test_few_rows_again_and_again_count_once():
    parts = {
        "lora": {"curve": [(0, 0.0, 40.0), (128, 60.0, 80.0), (256, 120.0, 70.0)]},
        "alignment_only": {"curve": [(0, 10.0, 70.0), (128, 40.0, 75.0)]},
        "few_rows": {
            "pairs": {
                "32": {
                    "alignment_only": {"curve": [(0, 10.0, 70.0), (64, 20.0, 80.0)]},
                    "lora": {"curve": [(0, 0.0, 40.0), (64, 30.0, 60.0)]},
                },
                "64": {
                    "alignment_only": {"curve": [(0, 10.0, 70.0), (64, 15.0, 82.0)]},
                    "lora": {"curve": [(0, 0.0, 40.0), (256, 90.0, 77.0)]},
                },
            }
        },
    }
    found = rows_ratios(parts)
    assert (found["rows_ratio"], found["rows_time_ratio"]) == (4.0, 3.0)  # 128 in 60 s, 32 in 20 s
    # 95 % is 76: LoRA after 64 pairs, W after 32 of them, for which it went over them more than once.
    assert found["rows_ratio_95"] == 2.0
    assert found["labels_after_texts"] is None
    few = parts["few_rows"]["pairs"]["32"]
    few["texts_then_rows"] = {"curve": [(0, 10.0, 70.0), (64, 20.0, 76.0), (80, 24.0, 80.0)], "texts": 64}
    found = rows_ratios(parts)
    assert (found["labels_after_texts"], found["time_ratio_after_texts"]) == (16, 2.5)  # 60 s to 24 s
    assert found["labels_after_texts_95"] == 0
    parts["few_rows"]["pairs"] = {}
    assert rows_ratios(parts)["rows_ratio"] is None  # W never gets there in one pass
