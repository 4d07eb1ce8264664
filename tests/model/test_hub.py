"""Models by hub id: found, pushed, refused, with the hub's client replaced."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base import model as library_model

import promptembedder
from conftest import TEXTS, assert_same_embeddings
from promptembedder import PromptEmbedderError
from promptembedder.llms.locate import locate
from promptembedder.model.folder import describe


def test_a_model_opens_by_its_hub_id(tiny_model, hub, monkeypatch, tmp_path):
    place, asked = hub
    model = tiny_model()
    promptembedder.save(model, place / "me" / "mine")
    monkeypatch.chdir(tmp_path)
    assert_same_embeddings(promptembedder.load("me/mine", device="cpu").encode(TEXTS), model.encode(TEXTS))
    assert describe("me/mine") == describe(place / "me" / "mine")
    assert asked
    assert all(hub_id == "me/mine" and not {"*", "*.py", "*.bin"} & set(patterns) for hub_id, patterns in asked)
    # As the library opens a model's modules.
    opened = SentenceTransformer(modules=[type(model[0]).load("me/mine"), *list(model)[1:]], device="cpu")
    assert_same_embeddings(opened.encode(TEXTS), model.encode(TEXTS))
    # A folder of that name goes first.
    asked.clear()
    promptembedder.save(model, tmp_path / "me" / "mine")
    promptembedder.load("me/mine", device="cpu")
    assert not asked


def test_a_folder_of_the_owners_name_does_not_hide_the_hub(tiny_model, hub, monkeypatch, tmp_path):
    place, _ = hub
    promptembedder.save(tiny_model(), place / "me" / "mine")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "me" / "something").mkdir(parents=True)
    assert describe("me/mine") == describe(place / "me" / "mine")


def test_a_mistyped_folder_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *a, **k: pytest.fail("asked the hub"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mine" / "model").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "model" / "promptembedder.json").write_text("{}")
    with pytest.raises(PromptEmbedderError, match="no model at runs/mistyped; models by name: smollm2-135m"):
        promptembedder.load("runs/mistyped")


def test_a_revision_of_a_model_on_the_hub(tiny_model, hub):
    place, asked = hub
    old, new = tiny_model(), tiny_model()
    with torch.no_grad():
        new[0].alignment.weight.mul_(-1)
    promptembedder.save(new, place / "me" / "mine")
    promptembedder.save(old, place / "me" / "mine@v1")
    for revision, model in ((None, new), ("v1", old)):
        opened = promptembedder.load("me/mine", device="cpu", revision=revision)
        assert_same_embeddings(opened.encode(TEXTS), model.encode(TEXTS))
    assert {hub_id for hub_id, _ in asked} == {"me/mine", "me/mine@v1"}
    assert not np.allclose(old.encode(TEXTS), new.encode(TEXTS), atol=1e-3)


def test_a_pushed_model_opens_by_its_hub_id(tiny_model, hub, monkeypatch):
    """The library's own `push_to_hub`, its network calls replaced."""
    place, _ = hub
    api = SimpleNamespace(
        create_repo=lambda repo_id, **_: SimpleNamespace(repo_id=repo_id),
        upload_folder=lambda repo_id, folder_path, **_: SimpleNamespace(
            commit_url=shutil.copytree(folder_path, place / repo_id)
        ),
    )
    monkeypatch.setattr(library_model, "HfApi", lambda token: api)
    monkeypatch.setattr(library_model, "load_file_path", lambda *a, **k: None)
    model = tiny_model()
    model.push_to_hub("me/mine")
    assert_same_embeddings(promptembedder.load("me/mine", device="cpu").encode(TEXTS), model.encode(TEXTS))


def test_what_the_hubs_client_raises_is_one_line(tiny_model, hub, monkeypatch):
    """It need not be an error of the operating system, nor the hub's own."""
    place, _ = hub
    promptembedder.save(tiny_model(), place / "me" / "mine")

    def broken(*args, **kwargs):
        raise RuntimeError("proxy")

    monkeypatch.setattr("huggingface_hub.snapshot_download", broken)
    with pytest.raises(PromptEmbedderError, match=r"model me/mine could not be fetched from the hub .RuntimeError."):
        promptembedder.load("me/mine")
    with pytest.raises(PromptEmbedderError, match=r"base model me/lm could not be fetched from the hub .RuntimeError."):
        locate("me/lm")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", broken)
    with pytest.raises(PromptEmbedderError, match="no model at me/mine"):
        promptembedder.load("me/mine")


@pytest.mark.parametrize("name", ["else/theirs", "me/nothing"])
def test_a_hub_id_without_a_model_of_ours_is_refused(hub, name):
    _, asked = hub
    with pytest.raises(PromptEmbedderError, match=f"no model at {name}: no such folder, and the hub has none of ours"):
        promptembedder.load(name)
    assert not asked
