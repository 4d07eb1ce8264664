"""Saved models: identical when opened, whole or not at all, refused where damaged."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import promptembedder
from conftest import FIRST_QUICK, INSTRUCTION, TEXTS, assert_same_embeddings, assert_same_model
from promptembedder import PromptEmbedderError
from promptembedder.model import folder as places
from promptembedder.model.folder import describe


def raising(error):
    def fail(*_):
        raise error

    return fail


@pytest.mark.parametrize("architecture", FIRST_QUICK)
@pytest.mark.parametrize("changes", [{}, {"prompter_training": "full"}, {"layout": "prefix", "readout": "mean"}])
def test_saved_and_loaded_is_identical(tiny_model, tmp_path, architecture, changes):
    model = tiny_model(architecture, **changes)
    model[0].alignment.weight.data.add_(0.01)
    model.prompts["same"] = INSTRUCTION
    promptembedder.save(model, tmp_path / "saved")
    loaded = promptembedder.load(tmp_path / "saved", device="cpu")
    assert_same_model(model, loaded)
    assert_same_embeddings(model.encode(TEXTS, prompt=INSTRUCTION), loaded.encode(TEXTS, prompt_name="same"))
    assert loaded[0].settings == model[0].settings
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, p in loaded.named_parameters() if p.requires_grad}
    assert not list(tmp_path.glob(".saved*"))
    assert {p.suffix for p in (tmp_path / "saved").rglob("*") if p.is_file()} <= {".json", ".safetensors", ".md"}


def test_different_prompter_and_backbone(tiny_model, tiny_lm, tmp_path):
    model = tiny_model("llama", backbone=str(tiny_lm("gemma3", 48)))
    embeddings = model.encode(TEXTS, prompt=INSTRUCTION)
    assert embeddings.shape == (len(TEXTS), 48)
    promptembedder.save(model, tmp_path / "saved")
    loaded = promptembedder.load(tmp_path / "saved", device="cpu")
    assert_same_model(model, loaded)
    assert_same_embeddings(embeddings, loaded.encode(TEXTS, prompt=INSTRUCTION))


def test_save_refuses_a_folder_that_is_no_model_and_replaces_one_that_is(tiny_model, tmp_path):
    model = tiny_model()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(PromptEmbedderError, match="exists and is not a saved model"):
        promptembedder.save(model, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"
    promptembedder.save(model, tmp_path / "saved")
    promptembedder.save(model, tmp_path / "saved")
    (tmp_path / "file").write_text("")
    with pytest.raises(PromptEmbedderError, match="cannot write a model"):
        promptembedder.save(model, tmp_path / "file" / "below")
    (tmp_path / "link").symlink_to(tmp_path / "saved")
    promptembedder.save(tiny_model(layout="prefix"), tmp_path / "link")
    assert promptembedder.load(tmp_path / "saved", device="cpu")[0].settings.layout == "prefix"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link", "mine", "saved"]


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), OSError(28, "No space left on device"), SafetensorError("full")]
)
def test_a_save_that_fails_leaves_the_former_model(tiny_model, tmp_path, monkeypatch, error):
    promptembedder.save(tiny_model(), tmp_path / "saved")

    def fails(one, other):
        raise error

    monkeypatch.setattr("promptembedder.atomic._exchange", fails)
    with pytest.raises((PromptEmbedderError, KeyboardInterrupt)):
        promptembedder.save(tiny_model(layout="prefix"), tmp_path / "saved")
    assert promptembedder.load(tmp_path / "saved", device="cpu")[0].settings.layout == "suffix"
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_save_leaves_the_users_files_in_a_model_folder_alone(tiny_model, tmp_path):
    folder = tmp_path / "saved"
    promptembedder.save(tiny_model(linear_head=True), folder)
    (folder / "config.yaml").write_text("of the former model")
    notes = ("notes.txt", ".git/HEAD", "prompter/notes.txt", "1_Dense/notes.txt")
    for name in notes:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("mine")
    (folder / "alignment.safetensors").chmod(0o600)
    model = tiny_model()
    promptembedder.save(model, folder)
    promptembedder.save(model, tmp_path / "fresh")
    both = (folder, tmp_path / "fresh")
    found, fresh = ({str(p.relative_to(at)) for p in at.rglob("*") if p.is_file()} for at in both)
    assert found == fresh | set(notes)
    assert {(folder / name).read_text() for name in notes} == {"mine"}
    assert [(at / "alignment.safetensors").stat().st_mode & 0o777 for at in both] == [0o600, 0o644]
    assert_same_model(model, promptembedder.load(folder, device="cpu"))
    assert describe(folder) == describe(tmp_path / "fresh")  # its size is the model's


@pytest.fixture
def saved(tiny_model, tmp_path):
    promptembedder.save(tiny_model(), tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize(
    "name",
    ["promptembedder.json", "alignment.safetensors", "prompter/adapter_model.safetensors", "modules.json"],
)
def test_missing_file(saved, name):
    (saved / name).unlink()
    with pytest.raises(PromptEmbedderError, match=f"has no {name}"):
        promptembedder.load(saved)


def test_missing_folder(tmp_path):
    with pytest.raises(PromptEmbedderError, match="no model at"):
        promptembedder.load(tmp_path / "nowhere")


def test_a_model_of_the_package_opens_by_name(saved, monkeypatch, tmp_path):
    expected = promptembedder.load(saved, device="cpu").encode(TEXTS)
    monkeypatch.setattr(places, "PLACE", saved.parent)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert places.shipped_names() == ["saved"]
    assert_same_embeddings(promptembedder.load("saved", device="cpu").encode(TEXTS), expected)
    assert describe("saved") == describe(saved)
    with pytest.raises(PromptEmbedderError, match="no model at saves; models by name: saved"):
        promptembedder.load("saves")
    with pytest.raises(PromptEmbedderError, match="comes with the package, which may move"):
        promptembedder.save(promptembedder.load("saved"), tmp_path / "copy", share_prompter="saved")
    (tmp_path / "elsewhere" / "saved").mkdir()  # no model, so it hides none
    assert describe("saved") == describe(saved)
    shutil.copytree(saved, tmp_path / "elsewhere" / "saved", dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "elsewhere" / "saved" / "prompter")
    with pytest.raises(PromptEmbedderError, match="model folder saved has no prompter"):
        promptembedder.load("saved")


def test_a_model_stored_in_half_precision_opens(tiny_model, tmp_path):
    model = tiny_model(linear_head=True, deep_rank=3)
    with torch.no_grad():
        for parameter in (*model[0].alignment.parameters(), model[1].linear.weight):
            parameter.add_(0.1 * torch.randn_like(parameter))
    expected = model.encode(TEXTS, prompt=INSTRUCTION)
    promptembedder.save(model, tmp_path / "saved")
    for file in (tmp_path / "saved").rglob("*.safetensors"):
        save_file({name: value.half() for name, value in load_file(file).items()}, file)
    opened = promptembedder.load(tmp_path / "saved", device="cpu")
    assert {p.dtype for p in opened.parameters() if p.requires_grad} == {torch.float32}
    assert np.allclose(opened.encode(TEXTS, prompt=INSTRUCTION), expected, atol=1e-2)


def test_a_model_comes_with_the_package():
    assert "smollm2-135m" in places.shipped_names()


@pytest.mark.parametrize("name", places.shipped_names())
def test_every_model_of_the_package_is_whole(name):
    facts = describe(name)
    assert facts["layout"] == "suffix"
    assert facts["size_mb"] < 15
    folder = places.shipped_folder(name)
    assert f'load("{name}")' in (folder / "README.md").read_text()
    for file in folder.rglob("*"):
        if file.suffix in (".json", ".yaml"):
            assert not re.search(r"/(root|home|tmp|work)\b", file.read_text()), file


def test_a_saved_model_has_a_draft_of_soft_tokens(tiny_model, tmp_path):
    one_word = {"softmax_temperature": 1e-3, "document_instruction": INSTRUCTION}  # as after a warm start
    model = tiny_model(default_instruction=INSTRUCTION, **one_word)
    promptembedder.save(model, tmp_path / "saved")
    usual = model[0].soft_tokens(model[0].settings.default_instruction).weights_NKV[0].argmax(-1).tolist()
    written = json.loads((tmp_path / "saved" / places.CONFIG_FILE).read_text())
    assert written["draft"] == usual[:-1]
    assert model[0].prompter.draft_ids is None
    assert promptembedder.load(tmp_path / "saved", device="cpu")[0].prompter.draft_ids == usual[:-1]


def test_a_model_without_a_draft_opens(saved):
    settings = saved / places.CONFIG_FILE
    before = promptembedder.load(saved, device="cpu").encode(TEXTS, prompt=INSTRUCTION)
    written = json.loads(settings.read_text())
    del written["draft"]
    settings.write_text(json.dumps(written))
    assert_same_embeddings(promptembedder.load(saved, device="cpu").encode(TEXTS, prompt=INSTRUCTION), before)


def test_an_instruction_that_cannot_be_read_does_not_stop_a_save(tiny_model, tmp_path, monkeypatch, caplog):
    model = tiny_model()
    monkeypatch.setattr(type(model[0].prompter), "draft_of", raising(PromptEmbedderError("no tokens")))
    promptembedder.save(model, tmp_path / "saved")
    assert "without a draft of its soft tokens: no tokens" in caplog.text
    assert promptembedder.load(tmp_path / "saved", device="cpu")[0].prompter.draft_ids is None


@pytest.mark.parametrize("draft", ["no" * 999, [-1], [], [1, 2], [10**6, 1, 1, 1], [2**70, 1, 1, 1], [1] * 9999])
def test_a_draft_of_no_tokens_is_refused(saved, draft):
    settings = saved / places.CONFIG_FILE
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"draft": draft}))
    with pytest.raises(PromptEmbedderError, match=r"must be (a list of token ids|4 token ids below)") as refused:
        promptembedder.load(saved, device="cpu")
    assert places.CONFIG_FILE in str(refused.value)
    assert len(str(refused.value)) < 500


def test_one_soft_token_has_no_draft(tiny_model, tmp_path):
    promptembedder.save(tiny_model(num_soft_tokens=1), tmp_path / "saved")
    settings = tmp_path / "saved" / places.CONFIG_FILE
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"draft": []}))
    with pytest.raises(PromptEmbedderError, match="must be null, found"):
        promptembedder.load(tmp_path / "saved", device="cpu")


def test_newer_format(saved):
    settings = json.loads((saved / "promptembedder.json").read_text())
    (saved / "promptembedder.json").write_text(json.dumps({**settings, "format_version": 99}))
    with pytest.raises(PromptEmbedderError, match="format version 99, this promptembedder reads up to 3"):
        promptembedder.load(saved)


def test_damaged_weights(saved):
    path = saved / "alignment.safetensors"
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(PromptEmbedderError, match="damaged safetensors"):
        promptembedder.load(saved)


def test_backbone_of_other_width_or_weights(saved, tiny_lm):
    path = saved / "promptembedder.json"
    settings = json.loads(path.read_text())

    def load_with(backbone):
        bases = {**settings["base_models"], "backbone": str(backbone)}
        path.write_text(json.dumps({**settings, "base_models": bases}))
        promptembedder.load(saved)

    with pytest.raises(PromptEmbedderError, match=r"alignment is \(32, 32\), but .* need \(32, 48\)"):
        load_with(tiny_lm("llama", 48))
    with pytest.raises(PromptEmbedderError, match="has other weights"):
        load_with(tiny_lm("llama", 32, seed=7))


def test_an_llm_that_was_moved(tiny_model, tiny_lm, tmp_path):
    before = Path(shutil.copytree(tiny_lm(), tmp_path / "before"))
    model = tiny_model(prompter=str(before), backbone=str(before))
    expected = model.encode(TEXTS, prompt=INSTRUCTION)
    promptembedder.save(model, tmp_path / "saved")
    before.rename(tmp_path / "now")
    with pytest.raises(PromptEmbedderError, match=r"prompter .*before is no longer there; .*load\(\.\.\., prompter="):
        promptembedder.load(tmp_path / "saved", device="cpu")
    opened = promptembedder.load(tmp_path / "saved", device="cpu", backbone=str(tmp_path / "now"))
    assert_same_embeddings(opened.encode(TEXTS, prompt=INSTRUCTION), expected)
    assert opened[0].base_models.prompter == opened[0].base_models.backbone == str(tmp_path / "now")
    with pytest.raises(PromptEmbedderError, match="has other weights"):
        promptembedder.load(tmp_path / "saved", device="cpu", backbone=str(tiny_lm("llama", 32, seed=7)))


def test_prompter_weights_that_do_not_fit(saved, tiny_model, tmp_path):
    promptembedder.save(tiny_model(lora_rank=8), tmp_path / "other")
    name = "prompter/adapter_model.safetensors"
    shutil.copy(tmp_path / "other" / name, saved / name)
    with pytest.raises(PromptEmbedderError, match="weights do not fit the prompter"):
        promptembedder.load(saved)


def test_prompter_opens_with_peft(saved, tiny_lm):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    lm = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_lm("llama")), saved / "prompter")
    ours = promptembedder.load(saved, device="cpu")[0].prompter.lm
    theirs = {n: p for n, p in lm.named_parameters() if "lora_" in n}
    assert theirs
    for name, parameter in ours.named_parameters():
        if "lora_" in name:
            assert torch.equal(parameter, theirs[name])


def test_describe_reads_files_only(saved, monkeypatch):
    monkeypatch.setattr("promptembedder.model.reopen.locate", None)
    facts = describe(saved)
    assert facts["layout"] == "suffix"
    assert facts["alignment"] == "32 x 32"
    assert facts["dimensions"] == 32
    assert "llama" in facts["prompter"]
