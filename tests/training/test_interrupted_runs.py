"""Runs that end in the middle of a checkpoint: the newest complete one is taken, and nothing is lost or made up."""

from __future__ import annotations

import json
import re
import resource
import shutil
from pathlib import Path

import pytest
from transformers import TrainerCallback

from conftest import assert_same_model
from promptembedder import PromptEmbedderError, build, lock
from promptembedder.data.rows import load_training_data
from promptembedder.training.checkpoints import COMPLETE_FILE, checkpoints, newest_complete, trouble
from promptembedder.training.fit import fit
from promptembedder.training.train import train

pytestmark = pytest.mark.slow
EVERY_STEP = {"save_steps": 1, "save_total_limit": 9}


def cut(path):
    path.write_bytes(path.read_bytes()[:-9])


def flipped(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def unmarked(folder):
    (folder / COMPLETE_FILE).unlink()


@pytest.fixture
def four_steps(run_config):
    """A run of four steps with a checkpoint each: its settings, its result, its folder."""
    config = run_config(max_steps=4, arguments=EVERY_STEP)
    whole = train(config)
    return config, whole, Path(config.training.output)


DAMAGE = {
    "no optimizer": (lambda c: (c / "optimizer.pt").unlink(), "optimizer.pt is missing"),
    "optimizer cut": (lambda c: cut(c / "optimizer.pt"), r"optimizer.pt has \d+ of \d+ bytes"),
    "no schedule": (lambda c: (c / "scheduler.pt").unlink(), "scheduler.pt is missing"),
    "state cut": (lambda c: cut(c / "trainer_state.json"), r"trainer_state.json has \d+ of \d+ bytes"),
    "no random state": (lambda c: (c / "rng_state.pth").unlink(), "rng_state.pth is missing"),
    "another number": (lambda c: flipped(c / "alignment.safetensors"), "alignment.safetensors is damaged"),
    "mark cut": (lambda c: cut(c / COMPLETE_FILE), "complete.json is damaged"),
    "old, optimizer cut": (lambda c: (unmarked(c), cut(c / "optimizer.pt")), "optimizer.pt is damaged"),
    "old, optimizer flipped": (lambda c: (unmarked(c), flipped(c / "optimizer.pt")), "optimizer.pt is damaged"),
    "old, state cut": (lambda c: (unmarked(c), cut(c / "trainer_state.json")), "trainer_state.json is damaged"),
    "old, weights cut": (lambda c: (unmarked(c), cut(c / "alignment.safetensors")), "alignment.safetensors is damaged"),
    "old, no prompter": (
        lambda c: (unmarked(c), shutil.rmtree(c / "prompter")),
        "adapter_model.safetensors is missing",
    ),
}


def test_the_newest_complete_checkpoint_is_taken_and_skipped_ones_are_named(four_steps, caplog):
    config, _, output = four_steps
    newest = output / "checkpoint-4"
    shutil.copytree(newest, output / "kept")
    for damage, reason in DAMAGE.values():
        caplog.clear()
        damage(newest)
        assert newest_complete(output, config.model) == output / "checkpoint-3"
        (line,) = caplog.messages
        assert line.startswith(f"{newest} is skipped: ")
        assert re.search(f"{reason}$", line), line
        shutil.rmtree(newest)
        shutil.copytree(output / "kept", newest)
    unmarked(newest)  # of an earlier version
    caplog.clear()
    assert newest_complete(output, config.model) == newest
    assert not caplog.messages


def test_resumed_from_the_checkpoint_before_a_damaged_one_equals_the_whole_run(four_steps):
    config, whole, output = four_steps
    shutil.rmtree(whole.folder)
    (output / "checkpoint-4" / "optimizer.pt").unlink()
    cut(output / "checkpoint-3" / "trainer_state.json")
    resumed = train(config, resume=True)
    assert_same_model(resumed.model, whole.model)
    assert [line["loss"] for line in resumed.history if "loss" in line] == [
        line["loss"] for line in whole.history if "loss" in line
    ]
    assert all(trouble(checkpoint) is None for checkpoint in checkpoints(output))


def test_a_run_without_a_complete_checkpoint_starts_from_the_beginning(four_steps, caplog):
    config, whole, output = four_steps
    for checkpoint in checkpoints(output):
        (checkpoint / "optimizer.pt").unlink()
    with pytest.raises(PromptEmbedderError, match="holds a finished model and no complete checkpoint"):
        train(config, resume=True)
    shutil.rmtree(whole.folder)
    assert_same_model(train(config, resume=True).model, whole.model)
    assert f"{output} holds no complete checkpoint: the run starts from the beginning" in caplog.text
    # Killed before its first checkpoint.
    for folder in (whole.folder, *checkpoints(output)):
        shutil.rmtree(folder)
    assert train(config, resume=True).steps == 4


def test_a_damaged_best_checkpoint_is_no_end_to_go_on_to(run_config, caplog):
    evaluation = {"dev": "pairs.jsonl", "every_steps": 1}
    config = run_config(max_steps=3, evaluation=evaluation, arguments=EVERY_STEP, alignment_learning_rate=1e-9)
    result = train(config)
    state = json.loads((Path(config.training.output) / "checkpoint-3" / "trainer_state.json").read_text())
    best = Path(state["best_model_checkpoint"])
    assert best.name != "checkpoint-3"
    shutil.rmtree(result.folder)
    (best / "alignment.safetensors").unlink()
    assert train(config, resume=True).scores == result.scores
    assert f"checkpoint-3 is skipped: the best one before it, {best.name}, is not complete: align" in caplog.text


def test_older_checkpoints_go_only_when_the_new_one_is_marked(run_config, monkeypatch):
    config = run_config(max_steps=3, arguments={"save_steps": 1, "save_total_limit": 1})
    output = Path(config.training.output)
    whole = train(run_config("whole", max_steps=3))

    def stopped(checkpoint):
        if checkpoint.name == "checkpoint-2":
            raise KeyboardInterrupt

    monkeypatch.setattr("promptembedder.training.checkpoints.mark_complete", stopped)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    assert [c.name for c in checkpoints(output)] == ["checkpoint-1", "checkpoint-2"]
    monkeypatch.undo()
    (output / "checkpoint-2" / "optimizer.pt").unlink()
    assert_same_model(train(config, resume=True).model, whole.model)
    assert [c.name for c in checkpoints(output)] == ["checkpoint-3"]


def test_a_checkpoint_that_is_half_removed_is_none(run_config, monkeypatch):
    config = run_config(max_steps=2, arguments={"save_steps": 1, "save_total_limit": 1})
    output = Path(config.training.output)
    monkeypatch.setattr("promptembedder.training.checkpoints.shutil.rmtree", lambda *a, **k: None)  # killed meanwhile
    train(config)
    assert [c.name for c in checkpoints(output)] == ["checkpoint-2"]
    monkeypatch.undo()
    train(config, resume=True)
    train(config)
    assert not list(output.glob(".removed-*"))


def test_a_disk_that_is_full_is_one_line_and_leaves_no_half_checkpoint(run_config):
    config = run_config(max_steps=3, arguments={"save_steps": 1})
    output = Path(config.training.output)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    class Fill(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:  # less than the optimizer takes
                size = (output / "checkpoint-1" / "optimizer.pt").stat().st_size
                resource.setrlimit(resource.RLIMIT_FSIZE, (size - 100, before[1]))

    try:
        with pytest.raises(PromptEmbedderError, match=r"checkpoint-2 cannot be written .*; make room on the disk a"):
            train(config, callbacks=[Fill()])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [c.name for c in checkpoints(output)] == ["checkpoint-1"]
    assert train(config, resume=True).steps == 3


def test_fit_refuses_a_checkpoint_that_is_not_complete(four_steps):
    config, _, output = four_steps
    (output / "checkpoint-2" / "optimizer.pt").unlink()
    data = load_training_data(config.data, "", config.training.seed)
    with pytest.raises(PromptEmbedderError, match=r"checkpoint-2 is not complete: optimizer.pt is missing"):
        fit(build(config.model), data, config.training, checkpoint=output / "checkpoint-2")


def test_one_run_at_a_time(run_config):
    config = run_config(max_steps=1)
    output = Path(config.training.output)
    with lock.held(output):
        for resume in (False, True):
            (output / "begun.yaml").touch()
            with pytest.raises(PromptEmbedderError, match=f"another run is writing to output folder {output}; wait"):
                train(config, resume=resume)
    assert [path.name for path in output.iterdir() if path.name != lock.LOCK_FILE] == ["begun.yaml"]
    assert train(config).folder.is_dir()


def test_a_run_gives_the_text_states_back(run_config, tmp_path):
    states = {"text_state_cache": 2**20, "text_state_folder": str(tmp_path / "states")}
    for precision in ("same", "int8"):
        states["text_state_precision"] = precision
        train(run_config(precision, max_steps=1, model={"layout": "suffix"}, **states))
        assert {path.name for path in (tmp_path / "states").glob(".*")} == {".lock"}
