"""Arguments of `SentenceTransformer(folder, ...)`: taken or refused by name, none is dropped."""

from __future__ import annotations

import huggingface_hub
import pytest
import torch
from sentence_transformers import SentenceTransformer

import promptembedder
from promptembedder import PromptEmbedderError, SoftPromptTransformer


@pytest.fixture
def folder(tiny_model, tmp_path):
    promptembedder.save(tiny_model(), tmp_path / "model")
    return str(tmp_path / "model")


def opened(folder, **options):
    return SentenceTransformer(folder, device="cpu", trust_remote_code=True, **options)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"dtype": torch.bfloat16}, "bfloat16"),
        ({"torch_dtype": "bfloat16"}, "bfloat16"),
        ({"torch_dtype": torch.float32}, "float32"),
        ({"dtype": "auto"}, "float32"),
    ],
)
def test_the_dtype_is_taken(folder, options, expected):
    module = opened(folder, model_kwargs=options)[0]
    assert module.backbone.lm.dtype == module.prompter.lm.dtype == getattr(torch, expected)


def test_load_takes_the_dtype_of_torch(folder):
    assert promptembedder.load(folder, device="cpu", dtype=torch.bfloat16)[0].backbone.lm.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"model_kwargs": {"torch_dtype": torch.float16}},
            "dtype 'float16' is unknown, expected 'bfloat16'",
        ),
        ({"model_kwargs": {"dtype": "float32", "torch_dtype": "bfloat16"}}, "two different dtypes"),
        (
            {"model_kwargs": {"attn_implementation": "eager"}},
            r"model_kwargs \['attn_implementation'\] are not taken",
        ),
        ({"processor_kwargs": {"model_max_length": 8}}, "processor_kwargs are not taken, .*model.max_seq_length"),
        ({"config_kwargs": {"hidden_size": 8}}, r"config_kwargs are not taken, found \['hidden_size'\]"),
        ({"backend": "onnx"}, "backend 'onnx' is not supported, expected 'torch'"),
    ],
)
def test_what_has_no_effect_is_refused(folder, options, message):
    with pytest.raises(PromptEmbedderError, match=message):
        opened(folder, **options)


def test_unknown_arguments_are_refused(folder):
    with pytest.raises(PromptEmbedderError, match=r"unknown arguments \['backbon'\]; valid: backend"):
        SoftPromptTransformer.load(folder, backbon="elsewhere")
    with pytest.raises(TypeError, match="backbon"):
        promptembedder.load(folder, backbon="elsewhere")


def test_weights_are_never_pickled(folder, tmp_path):
    with pytest.raises(PromptEmbedderError, match="safetensors only: leave safe_serialization on"):
        opened(folder).save_pretrained(str(tmp_path / "again"), safe_serialization=False)


def test_the_hub_is_asked_as_told(monkeypatch):
    asked = []

    def refuse(hub_id, *files, **options):
        asked.append({name: options.get(name) for name in ("token", "cache_dir", "local_files_only")})
        raise OSError

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    for options in ({}, {"token": "secret", "cache_folder": "/cache", "local_files_only": True}):
        with pytest.raises(PromptEmbedderError, match="no model at me/mine"):
            SoftPromptTransformer.load("me/mine", **options)
    assert asked == [
        {"token": None, "cache_dir": None, "local_files_only": None},
        {"token": "secret", "cache_dir": "/cache", "local_files_only": True},
    ]


def test_so_it_is_for_the_llms(folder, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "promptembedder.model.reopen.locate", lambda name, revision, access: asked.append(access) or 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        SoftPromptTransformer.load(folder, token="secret")
    assert [access.arguments for access in asked] == [{"token": "secret"}]
