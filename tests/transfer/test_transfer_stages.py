"""Stages of a transfer: what each trains, at which rate, and how it is resumed."""

from __future__ import annotations

import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from transformers import TrainerCallback

from conftest import INSTRUCTION, TEXTS
from promptembedder import PromptEmbedderError, lock
from promptembedder.data.rows import load_training_data
from promptembedder.data.settings import DataConfig
from promptembedder.model.backbone import Backbone
from promptembedder.model.leaves import TrainingState
from promptembedder.training.fit import fit
from promptembedder.transfer.checks import TRAINED_STAGES
from promptembedder.transfer.rebase import on_backbone
from promptembedder.transfer.transfer import transfer

pytestmark = pytest.mark.slow
# The module: `promptembedder.transfer.transfer` names its function, too.
PLACE = sys.modules[transfer.__module__]


def test_texts_come_before_rows_and_rows_go_on_from_them(tiny_model, transfer_config, tmp_path, caplog):
    (tmp_path / "texts.txt").write_text("\n".join(f"{text} {n}" for n in range(4) for text in TEXTS))
    quiet = {"evaluation": {"dev": None}, "starts": ("ridge",)}  # a start that does not depend on the rows
    texts = transfer(tiny_model("llama"), transfer_config(texts=("texts.txt",), centred=False, **quiet))
    both = transfer(tiny_model("llama"), transfer_config(texts=("texts.txt",), rows=True, **quiet))
    assert [stage.name for stage in both.stages] == ["closed_form", "alignment_unlabelled", "alignment_labelled"]
    assert [stage.steps for stage in both.stages] == [0, 4, 4]
    assert "train_datasets" not in caplog.text  # the library's remark on a second training
    # The same rows from where the texts left off, by hand.
    config = transfer_config(rows=True)
    rows = load_training_data(config.data, texts.model[0].settings.document_instruction, config.training.seed)
    alone = replace(config.training, train_prompter=False, warmup=0)
    fit(texts.model, rows, alone, output=tmp_path / "by_hand")
    expected = texts.model[0].alignment.weight
    assert torch.equal(both.model[0].alignment.weight, expected)


@pytest.mark.parametrize(("warmup", "expected"), [(None, 0.0), (0.5, 0.5)])
def test_w_alone_needs_no_warmup(tiny_model, transfer_config, monkeypatch, warmup, expected):
    seen = []
    monkeypatch.setattr(PLACE, "fit", lambda *a, **k: seen.append(a[2].warmup) or fit(*a, **k))
    transfer(tiny_model("llama"), transfer_config(rows=True, training={"warmup": warmup}))
    assert seen == [expected]


def test_made_up_rows_alone_train_the_alignment(tiny_model, transfer_config, tmp_path):
    settings = transfer_config(evaluation={"dev": None})
    data = DataConfig(root=str(tmp_path), contrast_rows=240)
    result = transfer(tiny_model("llama"), replace(settings, data=data))
    assert [(stage.name, stage.steps) for stage in result.stages] == [("closed_form", 0), ("alignment_labelled", 4)]
    assert not torch.equal(result.model[0].alignment.weight, result.starts[0].weight_PD)


def test_resumed_equals_uninterrupted(tiny_model, transfer_config, tmp_path, monkeypatch):
    """Stopped in its second stage: the first is not trained again, the second goes on."""
    model, second = tiny_model("llama"), "alignment_labelled"
    (tmp_path / "texts.txt").write_text("\n".join(f"{text} {n}" for n in range(4) for text in TEXTS))

    def settings(name):
        output = {"output": str(tmp_path / name)}
        return transfer_config(rows=True, training=output, texts=("texts.txt",), centred=True)

    whole = transfer(model, settings("whole"))
    taken = []

    class Count(TrainerCallback):
        def __init__(self, stop):
            self.stop = stop

        def on_step_end(self, args, state, control, **kwargs):
            taken.append((Path(args.output_dir).name, state.global_step))
            if self.stop and second in args.output_dir and state.global_step == 3:
                raise KeyboardInterrupt

    monkeypatch.setattr(PLACE, "fit", lambda *a, **k: fit(*a, **k, callbacks=[Count(True)]))
    with pytest.raises(KeyboardInterrupt):
        transfer(model, settings("parts"))
    with pytest.raises(PromptEmbedderError, match=f"{second} holds an interrupted run: --resume it or remove it"):
        transfer(model, settings("parts"))
    taken.clear()
    monkeypatch.setattr(PLACE, "fit", lambda *a, **k: fit(*a, **k, callbacks=[Count(False)]))
    resumed = transfer(model, settings("parts"), resume=True)
    assert taken == [(second, 3), (second, 4)]
    assert torch.equal(resumed.model[0].alignment.weight, whole.model[0].alignment.weight)
    with pytest.raises(PromptEmbedderError, match=r"nothing to resume: .*fresh holds no checkpoint"):
        transfer(model, settings("fresh"), resume=True)
    nothing = settings("parts")
    with pytest.raises(PromptEmbedderError, match=r"nothing to resume: training\.max_steps is 0"):
        transfer(model, replace(nothing, training=replace(nothing.training, max_steps=0)), resume=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"texts": ("other.txt",)}, "texts"),
        ({"text_instructions": ("Another.",)}, "text_instructions"),
        ({"training": {"max_steps": 6, "alignment_learning_rate": 0.1}}, "training.alignment_learning_rate"),
        ({"training": {"max_steps": 3}}, "sample_of_texts"),
        ({}, "old_model"),
    ],
)
def test_a_resumed_transfer_is_the_one_that_began(tiny_model, transfer_config, tmp_path, changes, message):
    for name in ("texts.txt", "other.txt"):
        (tmp_path / name).write_text("\n".join(f"{text} {n}" for n in range(4) for text in TEXTS))
    model = tiny_model("llama")
    shutil.rmtree(transfer(model, transfer_config(texts=("texts.txt",), training={"max_steps": 5})).folder)  # all texts
    if message == "old_model":
        with torch.no_grad():
            model[0].alignment.weight.mul_(2)
    settings = transfer_config(**{"texts": ("texts.txt",), "training": {"max_steps": 6}, **changes})
    with pytest.raises(PromptEmbedderError, match=f"began with another {re.escape(message)} "):
        transfer(model, settings, resume=True)
    if message == "old_model":
        with torch.no_grad():
            model[0].alignment.weight.div_(2)
        resumed = transfer(model, settings, resume=True)
        assert resumed.stages[-1].steps == 6
        assert yaml.safe_load((resumed.folder / "config.yaml").read_text())["training"]["max_steps"] == 6


def test_texts_are_read_under_what_the_model_is_used_with_unless_told(
    tiny_model, transfer_config, tmp_path, monkeypatch
):
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    seen = []
    made = PLACE.distillation_rows
    monkeypatch.setattr(PLACE, "distillation_rows", lambda t, x, i, n: seen.append(tuple(i)) or made(t, x, i, n))
    model = tiny_model("llama", document_instruction="A document.")
    for given in ((), ("One thing.", "Another.")):
        transfer(model, transfer_config(texts=("texts.txt",), text_instructions=given, centred=False))
    assert seen == [
        (INSTRUCTION, model[0].settings.default_instruction, "A document."),
        ("One thing.", "Another."),
    ]


@pytest.mark.parametrize(
    ("changes", "rate"),
    [
        ({"rows": True}, 1e-2),
        ({"texts": ("texts.txt",)}, 1e-2 / 4),  # centred
        ({"texts": ("texts.txt",), "centred": False}, 1e-2),
        ({"texts": ("texts.txt",), "distillation_learning_rate": 1e-3}, 1e-3),
        ({"texts": ("texts.txt",), "rows": True, "centred": True}, 1e-2 + 1e-2 / 4),
        ({"texts": ("texts.txt",), "rows": True, "distillation_learning_rate": 1e-3}, 1e-2 + 1e-3),
    ],
)
def test_learning_rate_of_texts_and_rows(tiny_model, transfer_config, tmp_path, monkeypatch, changes, rate):
    monkeypatch.setattr("promptembedder.training.rates.rate_factor", lambda *_: 1.0)
    (tmp_path / "texts.txt").write_text("\n".join(f"{text} {n}" for n in range(4) for text in TEXTS))
    quiet = {"evaluation": {"dev": None}, "starts": ("ridge",)}
    step = {"max_steps": 1, "alignment_learning_rate": 1e-2}
    start = transfer(tiny_model("llama"), transfer_config(**quiet)).model[0].alignment.weight
    moved = transfer(tiny_model("llama"), transfer_config(**quiet, **changes, training=step)).model[0].alignment.weight
    # Adam's first step is as long as the rate; where there are two stages, some number goes the same way in both.
    assert float((moved - start).detach().abs().max()) == pytest.approx(rate, rel=0.05)


def test_soft_tokens_of_a_frozen_prompter_are_made_once(tiny_model, transfer_config, monkeypatch):
    model = tiny_model("llama", num_soft_tokens=2)  # so few that the closed forms take every instruction
    calls = []
    made = type(model[0]).soft_tokens
    monkeypatch.setattr(
        type(model[0]), "soft_tokens", lambda self, i: calls.append(torch.is_grad_enabled()) or made(self, i)
    )
    transfer(model, transfer_config(rows=True, evaluation={"dev": None}, training={"max_steps": 6}))
    # Once for each default instruction and each of the rows in the closed forms, once for these in all six steps.
    assert len(calls) == 6


def test_resume_finds_nothing_of_an_earlier_transfer(tiny_model, transfer_config, tmp_path):
    settings = {"arguments": {"save_total_limit": 9}}  # every two steps, with the dev scores
    (tmp_path / "texts.txt").write_text("\n".join(f"{text} {n}" for n in range(4) for text in TEXTS))
    model, moved = tiny_model("llama"), tmp_path / "moved"
    transfer(model, transfer_config(rows=True, texts=("texts.txt",), training=settings))
    assert (moved / "alignment_unlabelled" / "checkpoint-2").is_dir()
    transfer(model, transfer_config(rows=True, training=settings))
    assert not list((moved / "alignment_unlabelled").glob("checkpoint-*"))
    assert (moved / "alignment_labelled" / "checkpoint-4").is_dir()


def test_the_old_model_reads_no_more_texts_than_the_steps_take(tiny_model, transfer_config, tmp_path, monkeypatch):
    (tmp_path / "texts.txt").write_text("\n".join(f"{text} {n}" for n in range(20) for text in TEXTS))
    seen = []
    made = PLACE.distillation_rows
    monkeypatch.setattr(PLACE, "distillation_rows", lambda t, x, i, n: seen.append(len(x)) or made(t, x, i, n))
    transfer(tiny_model("llama"), transfer_config(texts=("texts.txt",)))  # four steps of four
    assert seen == [16]


def test_a_training_that_makes_dev_worse_is_not_kept(tiny_model, transfer_config, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(PLACE, "fit", lambda *a, **k: replace(fit(*a, **k), scores={"dev": -100.0}))
    old = tiny_model("llama", linear_head=True)
    result = transfer(old, transfer_config(rows=True, training={"alignment_learning_rate": 3}))
    start, trained = result.stages
    assert not trained.kept
    assert [examples for examples, _, _ in trained.curve] == [8, 16]
    assert trained.dev == start.dev
    assert torch.equal(result.model[0].alignment.weight, result.starts[0].weight_PD)
    assert torch.equal(result.model[1].linear.weight, torch.eye(48))
    assert result.scores["dev"] >= start.dev
    assert "so the weights before it are kept" in caplog.text
    assert "alignment_labelled, not kept" in (tmp_path / "moved" / "report.md").read_text()


@pytest.mark.parametrize("own", [{}, {"text_state_cache": 2**26, "text_state_folder": "states"}])
def test_the_new_backbone_reads_each_text_once(tiny_model, transfer_config, tmp_path, monkeypatch, own):
    """For all starts, the mean, steps, dev and test scores together; on disk for the next transfer, too."""
    if own:
        own = {**own, "text_state_folder": str(tmp_path / own["text_state_folder"])}
    old = tiny_model(layout="suffix")
    calls = []
    read = Backbone._read_chunks

    def reading(self, ids_BT, mask_BT):
        if self is not old[0].backbone:
            calls.append({tuple(ids_T[mask_T.bool()].tolist()) for ids_T, mask_T in zip(ids_BT, mask_BT, strict=True)})
        return read(self, ids_BT, mask_BT)

    monkeypatch.setattr(Backbone, "_read_chunks", reading)
    plain = [f"{text}, and {n}" for n in range(4) for text in TEXTS]
    (tmp_path / "plain.txt").write_text("".join(f"{text}\n" for text in plain))
    other = [{"sentence1": f"{text} once", "sentence2": f"{text} more", "score": len(text)} for text in TEXTS]
    (tmp_path / "other.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in other))
    settings = transfer_config(
        training={"max_steps": 20, **own},
        evaluation={"test": "other.jsonl"},
        texts=(str(tmp_path / "plain.txt"),),
        rows=True,
        centred=True,
    )
    moved = transfer(old, settings)
    texts = [text for call in calls for text in call]
    assert len(texts) == len(set(texts))
    rows = {row["query"] for row in map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())}
    assert len(texts) > len(TEXTS) + len(plain) + 2 * len(other) + len(rows) // 2  # of all kinds
    assert moved.model[0].training_state == TrainingState()
    calls.clear()
    transfer(old, replace(settings, training=replace(settings.training, output=str(tmp_path / "next"))))
    assert bool(calls) != bool(own)


@pytest.mark.parametrize(("layout", "rows"), [("prefix", True), ("suffix", False)])
def test_what_comes_up_once_is_not_held(tiny_model, transfer_config, tmp_path, monkeypatch, layout, rows):
    (tmp_path / "plain.txt").write_text("".join(f"{text}, and {n}\n" for n in range(4) for text in TEXTS))
    opened = []
    monkeypatch.setattr(PLACE, "text_cache", lambda *given: opened.append(given))
    transfer(
        tiny_model(layout=layout),
        transfer_config(
            rows=rows, texts=(str(tmp_path / "plain.txt"),), evaluation={"dev": "pairs.jsonl" if rows else None}
        ),
    )
    assert not opened


def test_nothing_is_held_after_an_error(tiny_model, transfer_config, monkeypatch):
    made = []
    monkeypatch.setattr(PLACE, "on_backbone", lambda *a, **k: made.append(on_backbone(*a, **k)) or made[0])
    monkeypatch.setattr(PLACE, "_train_stages", lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        transfer(tiny_model(layout="suffix"), transfer_config(rows=True))
    assert made[0][0].training_state == TrainingState()


def test_a_transfer_goes_on_from_its_newest_complete_checkpoint(tiny_model, transfer_config, tmp_path, caplog):
    """In each stage; without one the stage starts from its beginning, and a transfer from its own."""
    (tmp_path / "texts.txt").write_text("\n".join(f"{text} {n}" for n in range(4) for text in TEXTS))
    settings = transfer_config(rows=True, texts=("texts.txt",), training={"arguments": {"save_total_limit": 9}})
    model, moved = tiny_model("llama"), tmp_path / "moved"
    whole = transfer(model, settings).model[0].alignment.weight
    shutil.rmtree(moved / "model")
    (moved / "alignment_unlabelled" / "checkpoint-4" / "optimizer.pt").unlink()
    for checkpoint in (moved / "alignment_labelled").glob("checkpoint-*"):
        (checkpoint / "trainer_state.json").write_text("{")
    assert torch.equal(transfer(model, settings, resume=True).model[0].alignment.weight, whole)
    assert f"{moved}/alignment_unlabelled/checkpoint-4 is skipped: optimizer.pt is missing" in caplog.text
    assert f"{moved}/alignment_labelled/checkpoint-2 is skipped: trainer_state.json has 1 of" in caplog.text
    for folder in ("model", *TRAINED_STAGES):  # killed in its closed forms
        shutil.rmtree(moved / folder)
    assert torch.equal(transfer(model, settings, resume=True).model[0].alignment.weight, whole)


def test_one_transfer_at_a_time(tiny_model, transfer_config, tmp_path):
    with (
        lock.held(tmp_path / "moved"),
        pytest.raises(PromptEmbedderError, match="another run is writing to output"),
    ):
        transfer(tiny_model("llama"), transfer_config())
    assert [path.name for path in (tmp_path / "moved").iterdir()] == [lock.LOCK_FILE]
