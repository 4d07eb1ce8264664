"""What a transfer refuses before the new backbone is opened."""

from __future__ import annotations

import json
import re
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import INSTRUCTION
from promptembedder import PromptEmbedderError, load, save
from promptembedder.transfer.transfer import transfer


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone": ("llama", 32, 0)}, "is the backbone that the model has already"),
        ({"backbone": "nowhere"}, "base model 'nowhere' not found"),
        ({"texts": ("few.txt",)}, "2 different texts for batches of 4"),
        (
            {"texts": ("few.txt",), "training": {"max_steps": 0}},
            "2 different texts to centre embeddings on; give at least 16, or centred=false",
        ),
        (
            {"texts": ("few.txt",), "training": {"batch_size": 2}},
            "2 different texts to centre embeddings on; give at least 16, or centred=false",
        ),
        ({"rows": True, "distillation_learning_rate": 1e-3}, "is for training on plain texts"),
        ({"centred": True}, "centred needs texts or labelled rows"),
        (
            {"training": {"early_stop_patience": 2}, "evaluation": {"dev": None}},
            "early_stop_patience needs evaluation.dev",
        ),
        ({"training": {"text_state_folder": "kept"}}, "text_state_folder needs training.text_state_cache"),
        ({"dtype": "bfloat16"}, "the model's prompter runs in float32"),
        ({"rows": True, "training": {"matryoshka_dims": (99,)}}, "the embedding has 48 dimensions"),
        ({"training": {"train_prompter": False}}, "a transfer trains the alignment alone"),
    ],
)
def test_bad_input_is_said_before_the_backbone_is_opened(
    tiny_model, transfer_config, tmp_path, monkeypatch, changes, message
):
    (tmp_path / "few.txt").write_text("one\ntwo\n")
    model, settings = tiny_model("llama"), transfer_config(**changes)
    monkeypatch.setattr("promptembedder.transfer.rebase.load_causal_lm", lambda *a: pytest.fail("loaded"))
    with pytest.raises(PromptEmbedderError, match=re.escape(message)):
        transfer(model, settings)
    assert not (tmp_path / "moved" / "model").exists()


def test_the_same_backbone_is_known_by_its_weights_too(tiny_model, tiny_lm, transfer_config, tmp_path):
    copied = shutil.copytree(tiny_lm("llama"), tmp_path / "by another name")
    with pytest.raises(PromptEmbedderError, match="is the backbone that the model has already"):
        transfer(tiny_model("llama"), transfer_config(str(copied)))


def test_one_row_teaches_nothing(tiny_model, transfer_config, tmp_path):
    settings = transfer_config(rows=True)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"query": "a", "pos": ["b"], "instruction": INSTRUCTION}) + "\n")
    with pytest.raises(PromptEmbedderError, match="no instruction has two rows to tell apart"):
        transfer(tiny_model("llama"), settings)


def test_not_under_torchrun(tiny_model, transfer_config, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(PromptEmbedderError, match="runs in one process; start it without torchrun"):
        transfer(tiny_model("llama"), transfer_config())


def test_a_backbone_too_big_is_refused_before_it_is_loaded(tiny_model, transfer_config, monkeypatch):
    model = tiny_model("llama")
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("M", (), {"available": 1000, "total": 1000})())
    monkeypatch.setattr(sys.modules[transfer.__module__], "locate", lambda *a: pytest.fail("fetched"))
    with pytest.raises(PromptEmbedderError, match=r"GiB of weights in float32, 0\.0 GiB are free on cpu"):
        transfer(model, transfer_config())


@pytest.mark.slow
def test_the_model_to_be_moved_is_not_overwritten(tiny_model, transfer_config, tmp_path):
    save(tiny_model("llama"), tmp_path / "moved" / "model")
    before = (tmp_path / "moved" / "model" / "alignment.safetensors").read_bytes()
    with pytest.raises(PromptEmbedderError, match=r"holds a model with the old backbone.*training.output"):
        transfer(load(tmp_path / "moved" / "model"), transfer_config())
    assert (tmp_path / "moved" / "model" / "alignment.safetensors").read_bytes() == before
    # An earlier result is.
    elsewhere = transfer_config(training={"output": str(tmp_path / "other")})
    for _ in range(2):
        transfer(load(tmp_path / "moved" / "model"), elsewhere)


def test_a_prompter_to_share_is_compared_by_value_before_anything_is_done(
    tiny_model, transfer_config, tmp_path, monkeypatch
):
    save(tiny_model("llama"), tmp_path / "old")
    weights = tmp_path / "old" / "prompter" / "adapter_model.safetensors"
    save_file({name: value.half() for name, value in load_file(weights).items()}, weights)
    transfer(load(tmp_path / "old"), transfer_config(), share_prompter=tmp_path / "old")
    other = tiny_model("llama")
    with torch.no_grad():
        next(p for n, p in other.named_parameters() if "lora_B" in n).add_(1)
    monkeypatch.setattr(sys.modules[transfer.__module__], "locate", None)
    with pytest.raises(PromptEmbedderError, match="is another one than the model's; it cannot be shared"):
        transfer(other, transfer_config(), share_prompter=tmp_path / "old")


def test_a_transfer_does_not_go_into_a_saved_model(tiny_model, transfer_config, tmp_path):
    save(tiny_model("llama"), tmp_path / "model")
    before = sorted(path.name for path in (tmp_path / "model").iterdir())
    with pytest.raises(PromptEmbedderError, match=r"model is itself a saved model; choose another training\.output"):
        transfer(load(tmp_path / "model"), transfer_config(training={"output": str(tmp_path / "model")}))
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == before


def test_an_unknown_start_is_refused_with_those_that_there_are(transfer_config):
    with pytest.raises(ValueError, match="'ridge', 'weighted' or 'mixture'"):
        transfer_config(starts=("guess",))
