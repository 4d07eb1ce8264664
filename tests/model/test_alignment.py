"""Alignment starts and the shared vocabulary."""

from __future__ import annotations

import pytest
import torch

from conftest import byte_level_tokenizer, sentencepiece_tokenizer
from promptembedder import PromptEmbedderError, build
from promptembedder.model import fits, vocabulary


def test_least_squares_recovers_a_known_map():
    generator = torch.Generator().manual_seed(0)
    known, prompter = torch.randn(8, 12, generator=generator), torch.randn(50, 8, generator=generator)
    assert torch.allclose(fits.least_squares(fits.moments(prompter, prompter @ known)), known, atol=1e-5)


def test_least_squares_equals_the_normal_equations():
    generator = torch.Generator().manual_seed(0)
    prompter, backbone = torch.randn(50, 8, generator=generator), torch.randn(50, 12, generator=generator)
    naive = torch.linalg.inv(prompter.T @ prompter) @ prompter.T @ backbone
    assert torch.allclose(fits.least_squares(fits.moments(prompter, backbone)), naive, atol=1e-5)


def test_least_squares_refuses_too_few_tokens():
    with pytest.raises(PromptEmbedderError, match="at least 8 shared tokens, the vocabularies share 5"):
        fits.least_squares(fits.moments(torch.randn(5, 8), torch.randn(5, 12)))


def test_random_start_keeps_norms_on_average():
    weight = fits.random_start(256, 256, torch.Generator().manual_seed(0))
    tokens = torch.randn(200, 256)
    assert 0.9 < (tokens @ weight).norm(dim=-1).mean() / tokens.norm(dim=-1).mean() < 1.1


def test_shared_vocabulary_sees_through_spellings():
    first, second = byte_level_tokenizer(), sentencepiece_tokenizer()
    ids_first, ids_second = vocabulary.shared_vocabulary(first, second)
    assert len(ids_first) > 256  # all single bytes, and words
    for a, b in zip(ids_first.tolist(), ids_second.tolist(), strict=True):
        if b > 300:  # beyond the byte fallbacks: decodes to visible text in both
            assert first.decode([a]) == second.decode([b])
    space_words = [first.convert_ids_to_tokens(i) for i in ids_first.tolist()]
    assert any(token.startswith("Ġ") and len(token) > 2 for token in space_words)
    special = {*first.all_special_ids}
    assert not special & set(ids_first.tolist())
    assert not {*second.all_special_ids} & set(ids_second.tolist())


def test_a_byte_fallback_stands_behind_the_character_itself():
    """`<0x61>` spells `a` too, but no text is split into it: its embedding is untrained."""
    first, second = byte_level_tokenizer(), sentencepiece_tokenizer()
    second.add_tokens(["<0xGG>"])  # looks like one, and is none
    of_first = dict(zip(*(ids.tolist() for ids in vocabulary.shared_vocabulary(first, second)), strict=True))
    for character in "aT.":
        assert of_first[first.convert_tokens_to_ids(character)] == second.convert_tokens_to_ids(character)
    assert of_first[first.convert_tokens_to_ids("Z")] == second.convert_tokens_to_ids("<0x5A>")


def test_build_picks_the_start(tiny_settings, tiny_lm):
    same = build(tiny_settings("llama"), device="cpu")[0].alignment.weight
    assert torch.equal(same, torch.eye(32))
    other = build(tiny_settings("llama", backbone=str(tiny_lm("gemma3", 48))), device="cpu")[0]
    assert other.alignment.weight.shape == (32, 48)
    ids_a, ids_b = vocabulary.shared_vocabulary(other.prompter.tokenizer, other.tokenizer)
    prompter_E = other.prompter.lm.get_input_embeddings()(ids_a)  # modules, so that gemma's scale is in
    backbone_E = other.backbone.lm.get_input_embeddings()(ids_b)
    # Least squares up to a factor, by which mapped words are as long as the backbone's.
    naive = torch.linalg.lstsq(prompter_E, backbone_E).solution
    assert torch.cosine_similarity(other.alignment.weight.flatten(), naive.flatten(), dim=0) > 1 - 1e-5
    lengths = (prompter_E @ other.alignment.weight).detach().norm(dim=-1)
    assert float(lengths.median()) == pytest.approx(float(backbone_E.detach().norm(dim=-1).median()), rel=1e-4)
    random = build(tiny_settings("llama", alignment_start="random"), device="cpu", seed=1)[0].alignment.weight
    again = build(tiny_settings("llama", alignment_start="random"), device="cpu", seed=1)[0].alignment.weight
    assert torch.equal(random, again)
    assert not torch.equal(random, torch.eye(32))


def test_ridge_without_penalty_and_with_equal_weights_is_least_squares():
    both = torch.randn(50, 8), torch.randn(50, 12)
    expected = torch.linalg.lstsq(*both).solution
    assert torch.allclose(fits.least_squares(fits.moments(*both)), expected, atol=1e-5)
    assert torch.allclose(fits.ridge(fits.moments(*both), 1e-9), expected, atol=1e-4)
    thrice = fits.moments(*both, torch.full((50,), 3.0))
    assert torch.allclose(fits.ridge(thrice, 1e-9), expected, atol=1e-4)


def test_ridge_counts_a_weight_as_repetitions():
    first, second = torch.randn(30, 4), torch.randn(30, 5)
    twice = torch.cat([first, first[:10]]), torch.cat([second, second[:10]])
    weights = torch.tensor([2.0] * 10 + [1.0] * 20)
    naive = torch.linalg.inv(twice[0].T @ twice[0]) @ twice[0].T @ twice[1]
    assert torch.allclose(fits.ridge(fits.moments(first, second, weights), 1e-12), naive, atol=1e-4)


def test_moments_without_some_words_are_those_of_the_others():
    first, second, weights = torch.randn(30, 4), torch.randn(30, 5), torch.rand(30)
    found = fits.moments(first, second, weights).without(fits.moments(first[:9], second[:9], weights[:9]))
    expected = fits.moments(first[9:], second[9:], weights[9:])
    assert torch.allclose(found.gram_PP, expected.gram_PP)
    assert torch.allclose(found.cross_PD, expected.cross_PD)
    assert found.words == expected.words == 21


def test_folded_sends_soft_tokens_where_they_are_to_go_and_changes_no_more():
    weight, tokens, wanted = torch.randn(20, 9), torch.randn(5, 20), torch.randn(5, 9)
    found = fits.folded(weight, tokens, wanted, 1e-9)
    assert torch.allclose(tokens @ found, wanted, atol=1e-4)
    aside = torch.linalg.svd(tokens).Vh[5:]  # directions that no soft token has
    assert torch.allclose(aside @ found, aside @ weight, atol=1e-4)
