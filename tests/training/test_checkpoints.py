"""Checkpoints: the best comes back, a resumed run equals an uninterrupted one, stopped runs are not overwritten."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from conftest import SECOND, assert_same_model
from promptembedder import PromptEmbedderError, build, save
from promptembedder.data.rows import load_training_data
from promptembedder.training.curves import read_facts
from promptembedder.training.evaluators import pair_evaluator
from promptembedder.training.fit import fit
from promptembedder.training.train import train

pytestmark = pytest.mark.slow


def test_the_best_checkpoint_comes_back_to_the_last_digit(run_config, tmp_path):
    config = run_config(
        model={"linear_head": True},
        evaluation={"dev": "pairs.jsonl"},
        alignment_learning_rate=1e-2,
        early_stop_patience=1,
    )
    model = build(config.model)
    # A checkpoint that names another precision than the open LLMs have.
    model[0].settings = replace(model[0].settings, dtype="bfloat16")
    frozen = {name: p.clone() for name, p in model[0].backbone.named_parameters()}
    data = load_training_data(config.data, config.model.document_instruction, config.training.seed)
    dev = pair_evaluator(config.evaluation, config.data.root, "dev")
    result = fit(model, data, config.training, evaluator=dev, every_steps=2)
    scores = {line["step"]: line["eval_dev_spearman_cosine"] for line in result.history if "eval_runtime" in line}
    best = max(scores, key=lambda step: scores[step])
    kept = load_file(tmp_path / "run" / f"checkpoint-{best}" / "1_Dense" / "model.safetensors")["linear.weight"]
    assert torch.equal(model[1].linear.weight, kept)
    assert not torch.equal(kept, kept.bfloat16().float())
    for name, parameter in model[0].backbone.named_parameters():
        assert torch.equal(parameter, frozen[name]), name


def test_a_best_checkpoint_that_cannot_be_read_ends_the_run(run_config, monkeypatch):
    def failing(*_):
        raise PromptEmbedderError("gone")

    monkeypatch.setattr("promptembedder.training.trainer.restore", failing)
    with pytest.raises(PromptEmbedderError, match="gone"):
        train(run_config(evaluation={"dev": "pairs.jsonl"}))


@pytest.mark.parametrize(("layout", "dtype"), [("prefix", "float32"), ("suffix", "float32"), ("suffix", "bfloat16")])
def test_resumed_equals_uninterrupted(run_config, tmp_path, layout, dtype):
    model = {"layout": layout, "linear_head": layout == "suffix", "dtype": dtype}
    start = build(run_config(model=model).model, device="cpu")
    start[0].subtract(torch.linspace(0.0, 0.1, 32))
    save(start, tmp_path / "start")
    settings = {"max_steps": 4, "arguments": {"save_steps": 2}}
    whole = train(run_config("whole", model=model, **settings), start=tmp_path / "start").model
    # The same run, stopped after two steps: its schedule must be that of four.
    config = run_config("parts", model=model, **settings)

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 2
            return control

    halfway = train(config, start=tmp_path / "start", callbacks=[Stop()])
    assert halfway.steps == 2
    resumed = train(config, start=tmp_path / "start", resume=True)
    assert resumed.steps == 4
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, dict(resumed.model.named_parameters())[name]), name
    assert whole[0].centre_E.any()
    assert torch.equal(whole[0].centre_E, resumed.model[0].centre_E)


@pytest.mark.parametrize("dev", ["pairs.jsonl", None])
def test_a_run_stopped_after_its_last_step(run_config, dev):
    """Only the saved model is missing: no further step is taken, and the best or last weights are there."""
    config = run_config(
        max_steps=4, arguments={"save_steps": 2, "save_total_limit": 9}, evaluation={"dev": dev, "every_steps": 1}
    )
    whole = train(config)
    shutil.rmtree(whole.folder)
    resumed = train(config, resume=True)
    assert (resumed.steps, resumed.scores) == (4, whole.scores)
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(parameter, dict(resumed.model.named_parameters())[name]), name


def test_a_run_from_a_saved_model_goes_on_from_its_checkpoint(run_config, tmp_path):
    """Resumed, it takes the checkpoint's weights, not the start's; the facts still name the start."""
    start = train(run_config("first", max_steps=2)).folder
    config = run_config("second", max_steps=4, arguments={"save_steps": 2})
    whole = train(config, start=start)
    shutil.rmtree(whole.folder)
    shutil.rmtree(whole.folder.parent / "checkpoint-4")
    resumed = train(config, start=start, resume=True)
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(parameter, dict(resumed.model.named_parameters())[name]), name
    assert read_facts(resumed.folder)["start"] == str(start)


def test_a_finished_run_whose_folder_has_moved(run_config, tmp_path):
    config = run_config("here", max_steps=2, evaluation={"dev": "pairs.jsonl", "every_steps": 1})
    whole = train(config)
    shutil.rmtree(whole.folder)
    (tmp_path / "here").rename(tmp_path / "there")
    resumed = train(run_config("there", max_steps=2, evaluation={"dev": "pairs.jsonl", "every_steps": 1}), resume=True)
    assert resumed.scores == whole.scores
    assert_same_model(resumed.model, whole.model)


@pytest.mark.parametrize("name", ["dev", "dev_pairs", "instruction"])
def test_a_resumed_run_has_the_dev_scores_it_began_with(run_config, tmp_path, name):
    before = {"dev": "pairs.jsonl", "every_steps": 1}
    whole = train(run_config(max_steps=2, evaluation=before))
    shutil.rmtree(whole.folder)
    shutil.copy(tmp_path / "pairs.jsonl", tmp_path / "others.jsonl")
    other = {"dev": "others.jsonl", "dev_pairs": 7, "instruction": SECOND}[name]
    with pytest.raises(PromptEmbedderError, match=f"began with another evaluation.{name} "):
        train(run_config(max_steps=3, evaluation={**before, name: other}), resume=True)
    changed = {**before, "test": None, "every_steps": 3, "batch_size": 2}
    train(run_config(max_steps=3, evaluation=changed), resume=True)


def test_checkpoints_hold_trained_parts_only(run_config, tmp_path):
    train(run_config(arguments={"save_steps": 2}))
    weights = sorted(p.name for p in (tmp_path / "run" / "checkpoint-2").rglob("*.safetensors"))
    assert weights == ["adapter_model.safetensors", "alignment.safetensors"]


def test_best_on_dev_is_kept_and_early_stop_stops(run_config):
    evaluation = {"dev": "pairs.jsonl", "every_steps": 1}
    config = run_config(max_steps=12, evaluation=evaluation, early_stop_patience=2, prompter_learning_rate=1e-2)
    result = train(config)
    dev = [line["eval_dev_spearman_cosine"] for line in result.history if "eval_dev_spearman_cosine" in line]
    assert result.scores["dev"] == pytest.approx(100 * max(dev))
    assert result.scores["test"] == pytest.approx(100 * max(dev))  # same file: the best model was loaded back
    assert result.steps < 12


@pytest.mark.parametrize("end", ["after it stopped", "while it waited"])
def test_patience_goes_on_where_a_run_was_stopped(run_config, end):
    """A resumed run takes no step more than one that was not stopped."""
    evaluation = {"dev": "pairs.jsonl", "every_steps": 1}
    changes = {"prompter_learning_rate": 1e-2, "arguments": {"save_total_limit": 12}}
    config = run_config(max_steps=12, evaluation=evaluation, early_stop_patience=3, **changes)
    whole = train(config)
    assert whole.steps < 12
    shutil.rmtree(whole.folder)
    if end == "while it waited":
        shutil.rmtree(whole.folder.parent / f"checkpoint-{whole.steps}")
    resumed = train(config, resume=True)
    assert (resumed.steps, resumed.scores) == (whole.steps, whole.scores)


def test_a_run_again_in_the_folder_of_a_finished_one(run_config):
    """Its checkpoints count; the longer run's are gone."""
    output = Path(train(run_config(max_steps=4, arguments={"save_steps": 2}, evaluation={"dev": None})).folder).parent
    assert {folder.name for folder in output.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    train(run_config(max_steps=2, arguments={"save_steps": 1}, evaluation={"dev": None}))
    assert {folder.name for folder in output.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-2"}


def test_what_is_no_checkpoint_of_ours_stays(run_config, tmp_path):
    (tmp_path / "run" / "checkpoint-best").mkdir(parents=True)
    (tmp_path / "run" / "checkpoint-notes.txt").write_text("mine")
    train(run_config(max_steps=3, arguments={"save_steps": 1, "save_total_limit": 1}))
    assert (tmp_path / "run" / "checkpoint-best").is_dir()
    assert (tmp_path / "run" / "checkpoint-notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"batch_size": 8}, "training.batch_size"),
        ({"seed": 5, "temperature": 0.1}, "training.seed, training.temperature"),
    ],
)
def test_a_run_goes_on_with_the_settings_it_began_with(run_config, changed, named):
    train(run_config(max_steps=2, arguments={"save_steps": 1}))
    with pytest.raises(PromptEmbedderError, match=f"run began with another {named} .see begun.yaml.; give the settin"):
        train(run_config(max_steps=2, arguments={"save_steps": 1}, **changed), resume=True)
    moved = run_config(max_steps=3, arguments={"save_steps": 1, "logging_steps": 2})
    assert train(moved, resume=True).steps == 3
    config = run_config(max_steps=3, arguments={"save_steps": 1})
    with pytest.raises(PromptEmbedderError, match=r"began with another data.max_negatives"):
        train(replace(config, data=replace(config.data, max_negatives=0)), resume=True)


def test_an_interrupted_run_is_not_overwritten(run_config):
    config = run_config(max_steps=2, arguments={"save_steps": 1})
    output = Path(train(config).folder).parent
    shutil.rmtree(output / "model")
    with pytest.raises(PromptEmbedderError, match="holds an interrupted run: --resume it or remove it"):
        train(config)
    assert (output / "checkpoint-2").is_dir()


def test_a_checkpoint_of_another_model_is_refused(run_config):
    train(run_config())
    with pytest.raises(PromptEmbedderError, match="made with another text_template; give the settings it had"):
        train(run_config(model={"text_template": "Another: {text}"}), resume=True)


def test_nothing_to_resume(run_config):
    with pytest.raises(PromptEmbedderError, match="nothing to resume"):
        train(run_config(), resume=True)
