"""Closed-form starts: known maps are found, words count by what the prompter writes."""

from __future__ import annotations

import re

import pytest
import torch

from conftest import INSTRUCTION
from promptembedder import PromptEmbedderError
from promptembedder.llms import locate as locate_module
from promptembedder.model import vocabulary as vocabulary_module
from promptembedder.model.module import soft_prompt_module
from promptembedder.transfer.closed_forms import closed_forms
from promptembedder.transfer.rebase import on_backbone


def words_of(lm):
    return lm.get_input_embeddings().weight.detach().double()


def solved(first, second):
    return torch.linalg.lstsq(first, second).solution


def test_closed_forms_recover_a_known_map(tiny_model, tiny_lm):
    """A new backbone whose embeddings are the prompter's, rotated and doubled: every start maps words onto words."""
    model = tiny_model("llama", backbone=str(tiny_lm("llama", 48, 3)), alignment_start="random")
    old = soft_prompt_module(model)
    moved = on_backbone(model, locate_module.locate(str(tiny_lm("llama", 32, 7))))
    new = soft_prompt_module(moved)
    rotation = torch.linalg.qr(torch.randn(32, 32)).Q
    with torch.no_grad():
        words = old.prompter.lm.get_input_embeddings().weight
        new.backbone.lm.get_input_embeddings().weight.copy_(2 * words @ rotation)
        tokens = old.soft_tokens(INSTRUCTION).tokens_NKP[0]
    starts = {start.name: start for start in closed_forms(old, new, [INSTRUCTION])}
    for name in ("least_squares", "procrustes"):
        assert torch.allclose(starts[name].weight_PD, 2 * rotation, atol=1e-5), name
        assert starts[name].reconstruction == pytest.approx(1, abs=1e-5)
    for name in ("ridge", "weighted"):  # shrunk by their penalty
        assert torch.allclose(starts[name].weight_PD, 2 * rotation, atol=0.05), name
    assert torch.allclose(tokens @ starts["mixture"].weight_PD, 2 * tokens @ rotation, atol=0.02)
    # What the trained W does to the soft tokens beyond mixing the old backbone's words, seen in the new one's space.
    among_words = [n for n in range(len(words)) if n not in old.tokenizer.all_special_ids]
    mine, olds, news = (words_of(lm)[among_words] for lm in (old.prompter.lm, old.backbone.lm, new.backbone.lm))
    trained, exact = old.alignment.weight.detach().double(), tokens.double()
    through_old = trained @ solved(olds, news)
    cosine = torch.nn.functional.cosine_similarity
    assert cosine(starts["through_old"].weight_PD.flatten(), through_old.flatten(), dim=0) > 0.999
    drift = (exact @ trained - exact @ solved(mine, olds)) @ solved(olds, news)
    expected = 2 * exact @ rotation.double() + drift
    found = tokens @ starts["mixture_and_drift"].weight_PD
    assert drift.norm() > 0.1 * expected.norm()
    assert (found - expected).norm() < 0.5 * drift.norm()  # ridge shrinks both


def test_closed_forms_are_as_long_as_the_new_backbones_words(tiny_model, tiny_lm):
    model = tiny_model("llama")
    new = soft_prompt_module(on_backbone(model, locate_module.locate(str(tiny_lm("qwen2", 48, 5)))))
    mine, its = words_of(model[0].prompter.lm), words_of(new.backbone.lm)
    shared = vocabulary_module.shared_vocabulary(model[0].prompter.tokenizer, new.tokenizer)
    for start in closed_forms(model[0], new, [INSTRUCTION], only=["least_squares", "ridge", "procrustes", "weighted"]):
        lengths = (mine[shared[0]] @ start.weight_PD.double()).norm(dim=-1)
        expected = float(its[shared[1]].norm(dim=-1).median())
        assert float(lengths.median()) == pytest.approx(expected, rel=1e-3), start.name


def test_what_the_new_backbone_has_no_words_for_goes_through_the_map(tiny_model, tiny_lm, monkeypatch, caplog):
    """Two thirds of the prompter's words are taken from the new vocabulary."""
    model = tiny_model("llama")
    new = soft_prompt_module(on_backbone(model, locate_module.locate(str(tiny_lm("qwen2", 48, 5)))))
    kept = [ids[::3] for ids in vocabulary_module.shared_vocabulary(model[0].prompter.tokenizer, new.tokenizer)]
    monkeypatch.setattr(vocabulary_module, "shared_vocabulary", lambda *_: kept)
    monkeypatch.setattr("promptembedder.transfer.closed_forms._FEWEST_SHARED", 1)
    (start,) = closed_forms(model[0], new, [INSTRUCTION], only=["mixture"])
    with torch.no_grad():
        written = model[0].soft_tokens(INSTRUCTION)
    weights = written.weights_NKV[0][:, kept[0]].double()
    mine, its = words_of(model[0].prompter.lm)[kept[0]], words_of(new.backbone.lm)[kept[1]]
    gram = mine.T @ mine
    mapped = torch.linalg.solve(gram + 1e-2 * gram.diagonal().mean() * torch.eye(len(gram)), mine.T @ its)
    expected = weights @ its + (written.tokens_NKP[0].double() - weights @ mine) @ mapped
    found = written.tokens_NKP[0] @ start.weight_PD
    assert (found - expected).norm() < 0.05 * expected.norm()
    assert re.search(r"of what the prompter writes \d+ % are words that the new backbone has, too", caplog.text)


def test_least_squares_needs_more_words_than_the_prompter_is_wide(tiny_lm, tiny_model):
    old = tiny_model("llama", prompter=str(tiny_lm("llama", 384)), alignment_start="random")
    new = on_backbone(old, locate_module.locate(str(tiny_lm("qwen2"))))[0]
    names = {start.name for start in closed_forms(old[0], new, [INSTRUCTION])}
    assert names == {"ridge", "procrustes", "weighted", "through_old", "mixture", "mixture_and_drift"}
    with pytest.raises(PromptEmbedderError, match=r"'least_squares' needs 384 shared tokens .*; use 'ridge'"):
        closed_forms(old[0], new, [INSTRUCTION], only=["least_squares"])


def test_the_corrected_instructions_leave_room_for_others(tiny_model, tiny_lm, monkeypatch):
    old = tiny_model("llama", num_soft_tokens=4)  # of width 32
    new = on_backbone(old, locate_module.locate(str(tiny_lm("qwen2", 48, 5))))
    asked = []
    made = type(old[0]).soft_tokens
    monkeypatch.setattr(type(old[0]), "soft_tokens", lambda self, i: asked.append(i) or made(self, i))
    closed_forms(old[0], new[0], list("abcdefgh"))
    assert asked == ["a", "b", "c", "d"]


def test_closed_forms_need_no_words_shared_with_the_old_backbone(tiny_model, tiny_lm, monkeypatch):
    """Words that the prompter and the new backbone share are enough for all but two."""
    old = tiny_model("qwen2", backbone=str(tiny_lm("llama")))
    new = on_backbone(old, locate_module.locate(str(tiny_lm("gemma3", 48))))
    made, nothing = vocabulary_module.shared_vocabulary, torch.zeros(0, dtype=torch.long)
    among = lambda a, b: (nothing, nothing) if a is old[0].tokenizer else made(a, b)  # noqa: E731
    monkeypatch.setattr(vocabulary_module, "shared_vocabulary", among)
    names = {start.name for start in closed_forms(old[0], new[0], [INSTRUCTION])}
    assert {"ridge", "weighted", "mixture"} <= names
    assert not {"through_old", "mixture_and_drift"} & names
    with pytest.raises(PromptEmbedderError, match=r"starts through_old need 64 words .* there are 0; valid: least_sq"):
        closed_forms(old[0], new[0], [INSTRUCTION], only=["through_old"])
