"""The warm start: what the prompter learns to write before anything else, and the instructions it learns on."""

from __future__ import annotations

import itertools
import re
import sys
from dataclasses import replace

import pytest
import torch

from conftest import CUE, INSTRUCTION, SECOND
from promptembedder import PromptEmbedderError
from promptembedder.data.aspects import made_up_instructions
from promptembedder.model.explain import explain
from promptembedder.training.settings import WarmStartConfig
from promptembedder.training.train import train
from promptembedder.training.warm_start import warm_start


def test_warm_start_writes_the_cue(tiny_model):
    module = tiny_model(prompter_training="full")[0]
    config = WarmStartConfig(cue=CUE, steps=150, learning_rate=1e-2, target_probability=0.9)
    reached = warm_start(module, {INSTRUCTION: None, SECOND: None}, config, seed=0)
    assert reached >= 0.9
    cue = module.prompter.tokenizer(" " + config.cue, add_special_tokens=False)["input_ids"][-5:]
    with torch.no_grad():
        soft = module.soft_tokens(INSTRUCTION).tokens_NKP[0]
        hard = module.prompter.lm.get_input_embeddings()(torch.tensor(cue))
    assert torch.nn.functional.cosine_similarity(soft, hard).min() > 0.9


@pytest.mark.slow
def test_warm_start_writes_each_instructions_aspect(tiny_model, monkeypatch):
    """Made-up instructions too, whose aspects are in the cue; words of one token in the tiny vocabulary stand in."""
    monkeypatch.setattr("promptembedder.data.aspects.ASPECTS", ("in", "a", "the", "splits-into-many"))
    monkeypatch.setattr("promptembedder.data.aspects.MEANING", "as")
    model = tiny_model(prompter_training="full", num_soft_tokens=2)
    config = WarmStartConfig(cue="{aspect} and", steps=300, learning_rate=5e-3, target_probability=0.8)
    warm_start(model[0], {INSTRUCTION: "the", SECOND: "in", "Not said.": None}, config, seed=0)
    invented = dict(itertools.islice(made_up_instructions(("in", "a", "the"), seed=9), 20))
    right = [
        [word.words[0][0] for word in explain(model, text)] == [f" {word}", " and"] for text, word in invented.items()
    ]
    assert sum(right) >= 14  # a third by chance
    for text, aspect in ((INSTRUCTION, "the"), (SECOND, "in")):
        assert [word.words[0][0] for word in explain(model, text)] == [f" {aspect}", " and"]


@pytest.mark.slow
def test_training_hands_the_aspects_of_the_settings_on(run_config, monkeypatch):
    given = {}
    # The module: `promptembedder.training.train` names its function, too.
    place = sys.modules[train.__module__]
    monkeypatch.setattr(place, "warm_start", lambda module, aspects, *rest: given.update(aspects))
    config = run_config(warm_steps=1, max_steps=1)
    (file,) = config.data.files
    train(replace(config, data=replace(config.data, files=(replace(file, aspect="topic"),))))
    default, evaluated = config.model.default_instruction, config.evaluation.instruction
    assert given == {INSTRUCTION: "topic", SECOND: "topic", default: None, evaluated: None}


def test_warm_start_that_falls_short_says_so(tiny_model, caplog):
    reached = warm_start(tiny_model()[0], {INSTRUCTION: None}, WarmStartConfig(cue=CUE, steps=2), seed=0)
    assert reached < 0.9
    assert re.search(
        r"after 2 steps \d+ % of the cue's tokens have a weight below target_probability, 0.90", caplog.text
    )


def test_a_few_words_missed_in_the_warm_start_are_not_worth_a_warning(tiny_model, caplog, monkeypatch):
    weights = torch.full((8, 5), 0.99).log().requires_grad_()
    monkeypatch.setattr("promptembedder.training.warm_start._log_weights", lambda *_: weights + few)
    few = torch.zeros(8, 5)
    few[0, 0] = -3
    assert warm_start(tiny_model()[0], {INSTRUCTION: None}, WarmStartConfig(cue=CUE, steps=9), seed=0) < 0.1
    assert not caplog.text


def test_warm_start_refuses_an_aspect_of_several_tokens(tiny_model, monkeypatch):
    monkeypatch.setattr("promptembedder.data.aspects.ASPECTS", ("in", "a"))
    monkeypatch.setattr("promptembedder.data.aspects.MEANING", "as")
    module = tiny_model(num_soft_tokens=2)[0]
    config = WarmStartConfig(cue="{aspect} and")
    with pytest.raises(PromptEmbedderError, match=r"aspect 'splits' is not one token"):
        warm_start(module, {INSTRUCTION: "splits"}, config, seed=0)
    with pytest.raises(PromptEmbedderError, match=r"not among the last 2 tokens"):
        warm_start(module, {INSTRUCTION: None}, WarmStartConfig(cue="{aspect} the and as"), seed=0)


def test_warm_start_leaves_out_known_aspects_that_the_vocabulary_splits(tiny_model, monkeypatch, caplog):
    module = tiny_model(num_soft_tokens=2)[0]
    monkeypatch.setattr("promptembedder.data.aspects.ASPECTS", ("the", "a", "in", "topic"))
    monkeypatch.setattr("promptembedder.data.aspects.MEANING", "as")
    config = WarmStartConfig(cue="{aspect} and", steps=1)
    warm_start(module, {INSTRUCTION: "the", SECOND: "topic"}, config, seed=0)
    assert "splits topic: no warm start for these" in caplog.text


def test_warm_start_without_aspects_where_the_vocabulary_splits_them(tiny_model, caplog):
    module = tiny_model(prompter_training="full")[0]
    warm_start(module, {INSTRUCTION: "topic"}, WarmStartConfig(steps=150, learning_rate=1e-2), seed=0)
    assert "one cue for all instructions" in caplog.text
    with torch.no_grad():
        written = module.prompter.tokenizer.decode(module.soft_tokens(INSTRUCTION).weights_NKV[0].argmax(-1))
    assert ' meaning in one word:"'.endswith(written)


def test_warm_start_needs_a_cue_of_k_tokens(tiny_model):
    module = tiny_model(num_soft_tokens=20)[0]
    with pytest.raises(PromptEmbedderError, match=r"warm_start.cue has \d+ tokens for 20 soft tokens"):
        warm_start(module, {INSTRUCTION: None}, WarmStartConfig(cue="one"), seed=0)
