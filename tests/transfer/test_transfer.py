"""Moving a model to another backbone: closed forms against known maps, both ways of training, prompter untouched."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch

from conftest import INSTRUCTION, TEXTS
from promptembedder import PromptEmbedderError, load, save
from promptembedder.model.prompter import trained_state
from promptembedder.training.curves import read_facts
from promptembedder.transfer.transfer import transfer


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["prefix", "suffix"])
@pytest.mark.parametrize("kind", ["rows", "texts"])
def test_only_the_alignment_is_trained_and_the_result_opens_alone(tiny_model, transfer_config, tmp_path, layout, kind):
    model = tiny_model("llama", layout=layout)
    save(model, tmp_path / "old")
    before = {name: value.clone() for name, value in trained_state(model[0].prompter).items()}
    (tmp_path / "texts.txt").write_text("\n".join(f"{text} {n}" for n in range(4) for text in TEXTS))
    given = {"rows": True} if kind == "rows" else {"texts": ("texts.txt",)}
    result = transfer(model, transfer_config(**given, evaluation={"dev": None}))
    after = trained_state(result.model[0].prompter)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [stage.name for stage in result.stages][1].startswith("alignment_")
    assert result.stages[1].examples == 16
    assert not torch.equal(result.model[0].alignment.weight.cpu(), result.starts[0].weight_PD)
    opened = load(tmp_path / "moved" / "model")
    expected = result.model.encode(TEXTS, prompt=INSTRUCTION)
    assert np.allclose(opened.encode(TEXTS, prompt=INSTRUCTION), expected, atol=1e-5)
    assert opened[0].base_models.prompter_fingerprint == model[0].base_models.prompter_fingerprint
    report = json.loads((tmp_path / "moved" / "results.json").read_text())
    assert [stage["name"] for stage in report["stages"]] == [stage.name for stage in result.stages]
    assert (tmp_path / "moved" / "report.md").is_file()


def test_starts_are_chosen_by_dev_or_else_by_reconstruction(tiny_model, transfer_config):
    by_dev = transfer(tiny_model("llama"), transfer_config(("gemma3", 32, 0))).starts
    assert [start.dev for start in by_dev] == sorted((start.dev for start in by_dev), reverse=True)
    without = transfer(tiny_model("llama"), transfer_config(("gemma3", 32, 0), evaluation={"dev": None})).starts
    assert without[0].name.startswith("mixture")
    fitted = [start.reconstruction for start in without if start.reconstruction is not None]
    assert fitted == sorted(fitted, reverse=True)


@pytest.mark.slow
@pytest.mark.parametrize("fails", [False, True])
def test_the_old_model_stays_as_it_was(tiny_model, transfer_config, monkeypatch, fails):
    model = tiny_model("llama")
    open_before = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    expected = model.encode(TEXTS, prompt=INSTRUCTION)
    if fails:
        monkeypatch.setattr(sys.modules[transfer.__module__], "_train_stages", lambda *a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            transfer(model, transfer_config(rows=True))
    else:
        transfer(model, transfer_config(rows=True))
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == open_before
    assert np.array_equal(model.encode(TEXTS, prompt=INSTRUCTION), expected)


@pytest.mark.slow
def test_without_a_shared_vocabulary(tiny_model, transfer_config, tmp_path, monkeypatch, caplog):
    nothing = torch.zeros(0, dtype=torch.long)
    monkeypatch.setattr("promptembedder.transfer.closed_forms.shared_vocabulary", lambda *a: (nothing, nothing))
    with pytest.raises(PromptEmbedderError, match="shares too few tokens with the prompter for a closed-form start"):
        transfer(tiny_model("llama"), transfer_config())
    result = transfer(tiny_model("llama"), transfer_config(rows=True))
    assert result.starts[0].name == result.stages[0].name == "random"
    assert "W starts at random" in caplog.text
    (tmp_path / "texts.txt").write_text("\n".join(f"{text} {n}" for n in range(4) for text in TEXTS))
    assert not transfer(tiny_model("llama"), transfer_config(texts=("texts.txt",))).model[0].centred
    asked = transfer_config(texts=("texts.txt",), centred=True)
    assert transfer(tiny_model("llama"), asked).model[0].centred


@pytest.mark.slow
def test_command(tiny_model, tiny_lm, tmp_path, command, run_config):
    run_config()
    save(tiny_model("llama"), tmp_path / "model")
    options = (
        "--backbone",
        tiny_lm("qwen2", 48, 5),
        "--data",
        tmp_path,
        "--train",
        "rows.jsonl",
        "--dev",
        "pairs.jsonl",
    )
    small = ("training.max_steps=2", "training.batch_size=4", "evaluation.every_steps=1")
    done = command("transfer", tmp_path / "model", *small, *options, "-o", tmp_path / "out")
    assert done.code == 0, done.err
    line = json.loads(done.out.splitlines()[-1])
    assert set(line) == {"dev_spearman", "start", "model"}
    assert command("info", line["model"]).code == 0
    wrong = command("transfer", tmp_path / "model")
    assert (wrong.code, wrong.err.strip()) == (2, "promptembedder: give the new backbone: --backbone NAME")


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "steps"), [(False, 4), (True, 0), (True, 4)])
def test_what_belongs_to_the_old_backbone_starts_anew(tiny_model, transfer_config, rows, steps, caplog):
    old = tiny_model("llama", deep_rank=3, linear_head=True)
    with torch.no_grad():
        old[0].alignment.deep_out.normal_(std=0.1)
    # Without dev pairs: a training that made dev worse would be taken back.
    settings = transfer_config(rows=rows, training={"max_steps": steps}, evaluation={"dev": None})
    moved = transfer(old, settings).model[0]
    assert moved.alignment.deep_out.shape == (2, 3, 48)
    trained = rows and steps > 0
    assert bool(moved.alignment.deep_out.any()) is trained
    assert ("starts again" in caplog.text) is not trained


def test_prompts_and_a_shorter_embedding_are_handed_on(tiny_model, transfer_config):
    old = tiny_model("llama")
    old.prompts, old.default_prompt_name, old.truncate_dim = {"query": INSTRUCTION}, "query", 8
    result = transfer(old, transfer_config())
    for moved in (result.model, load(result.folder)):
        assert (moved.prompts["query"], moved.default_prompt_name, moved.truncate_dim) == (INSTRUCTION, "query", 8)
        assert moved.encode(["A text."]).shape == (1, 8)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_transfer_leaves_the_old_models_weights_alone(tiny_model, transfer_config, dtype):
    old = tiny_model("llama", dtype=dtype, linear_head=True)
    before = {name: p.detach().clone() for name, p in old.named_parameters()}
    result = transfer(old, transfer_config(rows=True))
    for name, parameter in old.named_parameters():
        assert torch.equal(parameter, before[name]), name
    opened = load(result.folder)
    assert torch.equal(opened[1].linear.weight, result.model[1].linear.weight)


def test_a_shared_prompter(tiny_model, transfer_config, tmp_path):
    save(tiny_model("llama"), tmp_path / "old")
    result = transfer(load(tmp_path / "old"), transfer_config(), share_prompter=tmp_path / "old")
    folder = tmp_path / "moved" / "model"
    assert not (folder / "prompter").exists()
    expected = result.model.encode(TEXTS)
    assert np.allclose(load(folder).encode(TEXTS), expected, atol=1e-5)
    # The two folders may move together.
    (tmp_path / "elsewhere").mkdir()
    for name in ("old", "moved"):
        (tmp_path / name).rename(tmp_path / "elsewhere" / name)
    there = tmp_path / "elsewhere" / "moved" / "model"
    assert np.allclose(load(there).encode(TEXTS), expected, atol=1e-5)
    # Saved again, the model stands alone.
    save(load(there), tmp_path / "alone")
    assert np.allclose(load(tmp_path / "alone").encode(TEXTS), expected, atol=1e-5)
    weights = tmp_path / "elsewhere" / "old" / "prompter" / "adapter_model.safetensors"
    other = tiny_model("llama")
    with torch.no_grad():
        next(p for n, p in other.named_parameters() if "lora_B" in n).add_(1)
    save(other, tmp_path / "other")
    # A model that shares a prompter can lend it on.
    again = transfer_config(("gemma3", 32, 0), training={"output": str(tmp_path / "third")})
    transfer(load(there), again, share_prompter=there)
    assert load(tmp_path / "third" / "model").encode(TEXTS).shape == (5, 32)
    with pytest.raises(PromptEmbedderError, match="is another one than the model's; it cannot be shared"):
        save(load(there), tmp_path / "wrong", share_prompter=tmp_path / "other")
    assert not (tmp_path / "wrong").exists()
    weights.write_bytes((tmp_path / "other" / "prompter" / weights.name).read_bytes())
    with pytest.raises(PromptEmbedderError, match="which has been altered since"):
        load(there)
    weights.unlink()
    with pytest.raises(PromptEmbedderError, match="which is not there"):
        load(there)


def test_nothing_is_said_to_be_trained_by_a_closed_form(tiny_model, transfer_config):
    result = transfer(tiny_model("llama"), transfer_config())
    assert read_facts(result.folder)["trained_parameters"] == read_facts(result.folder)["steps"] == 0
