"""What the benchmarks compute themselves."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

# Of benchmarks/, which pytest has on its path.
import encode_speed
import quality
import transfer_report
from ablations import ABLATIONS
from promptembedder.training.settings import load_run
from transfer import of_few_rows
from transfer_report import pairs_needed, ratios, smoothed

ROOT = Path(__file__).parents[1]


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


def test_few_pairs_again_and_again_count_once():
    parts = {
        "lora": {"curve": [(0, 0.0, 40.0), (64, 30.0, 70.0), (128, 60.0, 80.0), (256, 120.0, 70.0)]},
        "alignment_only": {"curve": [(0, 10.0, 70.0), (128, 40.0, 75.0)]},
    }
    few = {
        16: {"alignment_only": {"curve": [(0, 10.0, 70.0), (320, 90.0, 77.0)]}},
        32: {
            "alignment_only": {"curve": [(0, 10.0, 70.0), (16, 12.0, 75.0), (64, 20.0, 80.0)]},
            "lora": {"curve": [(0, 0.0, 40.0), (64, 30.0, 60.0), (640, 300.0, 76.0)]},
            "texts_then_rows": {"curve": [(0, 10.0, 70.0), (64, 24.0, 76.0), (80, 30.0, 80.0)], "texts": 64},
        },
    }
    found = pairs_needed(parts, few)
    assert (found["pairs"], found["pairs_lora"], found["pairs_ratio"], found["pairs_time_ratio"]) == (32, 128, 4.0, 3.0)
    assert (found["pairs_after_texts"], found["time_ratio_after_texts"]) == (16, 2.0)  # 60 s to 30 s
    # 95 % is 76. Fewest pairs and least seconds each where they are least: LoRA has 32 pairs, and 60 s with 128.
    assert (found["pairs_95"], found["pairs_lora_95"], found["pairs_ratio_95"]) == (16, 32, 2.0)
    assert (found["pairs_time_ratio_95"], found["time_ratio_after_texts_95"]) == (3.0, 2.5)
    assert found["pairs_after_texts_95"] == 0
    found = pairs_needed(parts, {})
    assert (found["pairs"], found["pairs_lora"], found["pairs_ratio"]) == (None, 128, None)  # never in one pass


def test_few_pairs_are_of_two_files_and_kept_nowhere_on_disk(tmp_path):
    arguments = argparse.Namespace(
        output=tmp_path, data=tmp_path, states="4000GiB", set=None, steps=8, batch=16, pairs=9, every=2, few_steps=5
    )
    config = of_few_rows(arguments, "gemma-3-270m", 24)
    assert [file.max_rows for file in config.data.files] == [12, 12]
    assert (config.training.batch_size, config.training.max_steps) == (12, 5)
    assert config.training.text_state_cache is config.training.text_state_folder is None
    assert of_few_rows(arguments, "gemma-3-270m", 64).training.batch_size == 16


def test_a_transfer_leaves_one_report_one_json_and_one_picture(tmp_path):
    theirs = {"test": 71.0, "curve": [(0, 0.0, 50.0), (100, 400.0, 70.0), (200, 800.0, 80.0)]}
    ours = {"test": 72.5, "curve": [(0, 3.0, 60.0), (100, 103.0, 80.0), (200, 203.0, 82.0)]}
    few = {16: {"alignment_only": {"test": 70.0, "curve": [(0, 1.0, None), (16, 2.0, 71.0), (32, 3.0, 71.0)]}}}
    parts = {"start": {"hard_cue": 61.234, "starts_dev": {}}, "alignment_only": ours, "lora": theirs}
    measured = transfer_report.Measured(parts, few, {"lora": 65.678})
    transfer_report.write(tmp_path, "python benchmarks/transfer.py", {"llm": measured, "other": measured})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.md", "transfer.json", "transfer.png"]
    report = (tmp_path / "report.md").read_text().splitlines()
    assert "| hard_cue | 61.23 | 61.23 |" in report
    assert "| examples_ratio | 2.0 | 2.0 |" in report
    assert "| without_examples | no | no |" in report
    assert "| quick_lora | 65.68 | 65.68 |" in report
    assert "| 16 | alignment_only | 70.00 | 71.00 | 2 |" in report  # the first of two equal scores
    assert not any("without_labels" in line for line in report)  # nothing was trained on texts alone
    record = json.loads((tmp_path / "transfer.json").read_text())
    assert record["backbones"]["llm"]["figures"]["time_ratio"] == round(800 / 103, 1)


@pytest.mark.parametrize("name", ABLATIONS)
def test_settings_of_ablations_are_valid(name):
    assert load_run(ROOT / "recipes" / "general.yaml", ABLATIONS[name]).data.has_rows


@pytest.mark.parametrize("column", quality.TRAINED)
def test_settings_of_quality_are_valid(column):
    recipe = ROOT / "recipes" / f"{quality.TRAINED[column]}.yaml"
    assert load_run(recipe, quality.SETTINGS.get(column, [])).data.has_rows


def test_speeds_are_medians_and_ratios_are_taken_within_a_round(monkeypatch):
    taken = iter(
        [
            *(9.0, 9.0, 9.0, 9.0, 9.0),  # the round that warms up
            *(1.0, 2.0, 1.0, 2.0, 4.0),
            *(2.0, 4.0, 4.0, 4.0, 4.0),
            *(4.0, 8.0, 2.0, 8.0, 8.0),
        ]
    )
    monkeypatch.setattr(encode_speed, "seconds", lambda run: next(taken))
    found = encode_speed.speeds(dict.fromkeys(encode_speed.VARIANTS, lambda: None), texts=8, rounds=3)
    assert found == {
        "backbone": 4.0,
        "words": 2.0,
        "soft_prompt": 4.0,
        "soft_prompts_2": 4.0,
        "soft_prompts_8": 16.0,
        "soft_prompt_to_words": 2.0,  # of 2, 1 and 4
        "soft_prompts_2_to_words": 2.0,
        "soft_prompts_8_to_words": 8.0,  # of 4, 8 and 8
    }


@pytest.mark.parametrize("mixed", [False, True])
def test_texts_have_the_lengths_that_are_named(tiny_model, mixed):
    model = tiny_model()
    texts = encode_speed.texts_of(model, 12, 20, mixed)
    lengths = [len(model.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    assert len(set(texts)) == 20
    assert (min(lengths) < 9) == mixed
    assert max(lengths) <= 14


def test_a_deep_soft_prompt_is_reduced_to_the_nearest_rank():
    spec = importlib.util.spec_from_file_location("release_model", ROOT / "scripts" / "release_model.py")
    release_model = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(release_model)
    whole = torch.randn(3, 12, 9, generator=torch.Generator().manual_seed(0))
    first, second = release_model.thinned(whole, 4)
    assert (first.shape, second.shape) == ((3, 12, 4), (3, 4, 9))
    for matrix, product in zip(whole.numpy(), (first @ second).numpy(), strict=True):
        values = np.linalg.svd(matrix, compute_uv=False)
        assert np.linalg.norm(matrix - product) == pytest.approx(np.linalg.norm(values[4:]), rel=1e-4)
    assert first.norm().item() == pytest.approx(second.norm().item(), rel=1e-4)
