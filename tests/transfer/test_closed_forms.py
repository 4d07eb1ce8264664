"""Closed-form starts: known maps are found, words count by what the prompter writes."""

from __future__ import annotations

import re

import pytest
import torch

from conftest import INSTRUCTION
from promptembedder.llms.locate import locate
from promptembedder.model.module import soft_prompt_module
from promptembedder.model.vocabulary import shared_vocabulary
from promptembedder.transfer.closed_forms import closed_forms
from promptembedder.transfer.rebase import on_backbone


def words_of(lm):
    return lm.get_input_embeddings().weight.detach().double()


def test_closed_forms_recover_a_known_map(tiny_model, tiny_lm):
    """A new backbone whose embeddings are the prompter's, rotated and doubled: every start maps words onto words."""
    model = tiny_model("llama", backbone=str(tiny_lm("llama", 48, 3)), alignment_start="random")
    old = soft_prompt_module(model)
    moved = on_backbone(model, locate(str(tiny_lm("llama", 32, 7))))
    new = soft_prompt_module(moved)
    rotation = torch.linalg.qr(torch.randn(32, 32)).Q
    with torch.no_grad():
        words = old.prompter.lm.get_input_embeddings().weight
        new.backbone.lm.get_input_embeddings().weight.copy_(2 * words @ rotation)
        tokens = old.soft_tokens(INSTRUCTION).tokens_NKP[0]
    starts = {start.name: start for start in closed_forms(old, new, [INSTRUCTION])}
    for name in ("ridge", "weighted"):  # shrunk by their penalty
        assert torch.allclose(starts[name].weight_PD, 2 * rotation, atol=0.05), name
    assert torch.allclose(tokens @ starts["mixture"].weight_PD, 2 * tokens @ rotation, atol=0.02)
    assert starts["ridge"].reconstruction == pytest.approx(1, abs=0.01)


def test_closed_forms_are_as_long_as_the_new_backbones_words(tiny_model, tiny_lm):
    model = tiny_model("llama")
    new = soft_prompt_module(on_backbone(model, locate(str(tiny_lm("qwen2", 48, 5)))))
    mine, its = words_of(model[0].prompter.lm), words_of(new.backbone.lm)
    shared = shared_vocabulary(model[0].prompter.tokenizer, new.tokenizer)
    for start in closed_forms(model[0], new, [INSTRUCTION], only=["ridge", "weighted"]):
        lengths = (mine[shared[0]] @ start.weight_PD.double()).norm(dim=-1)
        expected = float(its[shared[1]].norm(dim=-1).median())
        assert float(lengths.median()) == pytest.approx(expected, rel=1e-3), start.name


def test_what_the_new_backbone_has_no_words_for_goes_through_the_map(tiny_model, tiny_lm, monkeypatch, caplog):
    """Two thirds of the prompter's words are taken from the new vocabulary."""
    model = tiny_model("llama")
    new = soft_prompt_module(on_backbone(model, locate(str(tiny_lm("qwen2", 48, 5)))))
    kept = [ids[::3] for ids in shared_vocabulary(model[0].prompter.tokenizer, new.tokenizer)]
    monkeypatch.setattr("promptembedder.transfer.closed_forms.shared_vocabulary", lambda *_: kept)
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


def test_the_corrected_instructions_leave_room_for_others(tiny_model, tiny_lm, monkeypatch):
    old = tiny_model("llama", num_soft_tokens=4)  # of width 32
    new = on_backbone(old, locate(str(tiny_lm("qwen2", 48, 5))))
    asked = []
    made = type(old[0]).soft_tokens
    monkeypatch.setattr(type(old[0]), "soft_tokens", lambda self, i: asked.append(i) or made(self, i))
    closed_forms(old[0], new[0], list("abcdefgh"))
    assert asked == ["a", "b", "c", "d"]
