"""What is said of base LLMs whose files are damaged, closed to us or named in capitals."""

from __future__ import annotations

import shutil

import pytest
import torch

from promptembedder import PromptEmbedderError
from promptembedder.llms.convert import CACHE_ENV, cache_dir
from promptembedder.llms.locate import LocatedModel, locate
from promptembedder.llms.open import load_causal_lm, load_config, load_tokenizer


@pytest.mark.parametrize("name", ["mine.gguf", "MINE.GGUF"])
def test_a_gguf_file_is_named_as_the_user_names_it(tmp_path, monkeypatch, name):
    monkeypatch.setenv(CACHE_ENV, str(tmp_path / "cache"))
    file = tmp_path / name
    file.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(PromptEmbedderError) as caught:
        locate(str(file))
    assert str(caught.value).startswith(f"{file} cannot be read as a GGUF language model: ")
    assert "model.gguf" not in str(caught.value)
    assert ".mine-" not in str(caught.value)  # the scratch folder


def test_the_cache_may_be_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(CACHE_ENV, "~/models")
    assert cache_dir() == tmp_path / "models"


@pytest.mark.parametrize("part", ["weights", "config", "tokenizer"])
def test_a_damaged_copy_is_named_with_its_remedy(tiny_lm, tmp_path, monkeypatch, part):
    monkeypatch.setenv(CACHE_ENV, str(tmp_path / "cache"))
    copy = shutil.copytree(tiny_lm(), tmp_path / "cache" / "llm-v1")
    file = copy / {"weights": "model.safetensors", "config": "config.json", "tokenizer": "tokenizer.json"}[part]
    file.write_bytes(file.read_bytes()[:40])
    use = load_tokenizer if part == "tokenizer" else lambda located: load_causal_lm(located, torch.float32)
    beginning = f"base model llm: {part} cannot be opened: "
    for folder, revision, remedy in (
        (copy, None, f"; its converted copy may be damaged: remove {copy}, and it is converted again"),
        (shutil.copytree(copy, tmp_path / "hub"), "c" * 40, f"; its copy may be damaged: remove {tmp_path / 'hub'}"),
        (shutil.copytree(copy, tmp_path / "own"), None, ""),
    ):
        with pytest.raises(PromptEmbedderError) as caught:
            use(LocatedModel("llm", folder, revision))
        assert str(caught.value).startswith(beginning)
        assert remedy in str(caught.value)
        assert ("remove" in str(caught.value)) == bool(remedy)


def test_an_unknown_architecture_from_the_hub_is_not_called_damaged(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "of-tomorrow"}')
    with pytest.raises(PromptEmbedderError, match="config cannot be opened") as caught:
        load_config(LocatedModel("owner/llm", tmp_path, "c" * 40))
    assert "damaged" not in str(caught.value)


def test_files_that_may_not_be_read_are_not_called_missing(tiny_lm, tmp_path, closed):
    folder = shutil.copytree(tiny_lm(), tmp_path / "llm")
    weights = folder / "model.safetensors"
    weights.write_bytes(b"")  # any error of the library
    closed(weights)
    with pytest.raises(PromptEmbedderError, match=f"{weights} cannot be read: Permission denied"):
        load_causal_lm(locate(str(folder)), torch.float32)
    tokenizer = folder / "tokenizer.json"
    tokenizer.write_bytes(b"")
    closed(tokenizer)
    with pytest.raises(PromptEmbedderError, match=r"tokenizer cannot be opened: .* cannot be read: Permission denied$"):
        load_tokenizer(locate(str(folder)))
    closed(folder / "config.json")
    with pytest.raises(PromptEmbedderError, match=r"config\.json cannot be read: Permission denied"):
        locate(str(folder))
    gguf = tmp_path / "llm.gguf"
    gguf.write_bytes(b"GGUF")
    closed(gguf)
    with pytest.raises(PromptEmbedderError, match=f"{gguf} cannot be read: Permission denied"):
        locate(str(gguf))
