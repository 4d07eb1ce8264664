"""What tokenizers put around texts by themselves."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from conftest import byte_level_tokenizer, sentencepiece_tokenizer
from promptembedder.llms.tokens import continuing_ids, opening_ids, plain_ids


def prepending_tokenizer(around: str = "<bos> $A") -> PreTrainedTokenizerFast:
    """Puts a blank of its own before a text, as Llama 2 and Mistral 7B have it."""
    words = ["<unk>", "<bos>", "<eos>", "<end>", "▁", "▁a", "▁topic", "▁in", "▁word"]
    core = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    specials = [(word, words.index(word)) for word in ("<bos>", "<eos>", "<end>")]
    core.post_processor = processors.TemplateProcessing(single=around, special_tokens=specials)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>")


@pytest.mark.parametrize(
    ("around", "opening"),
    [
        ("$A", []),
        ("<bos> $A", ["<bos>"]),
        ("$A <eos>", []),
        ("<bos> $A <eos>", ["<bos>"]),
        ("$A <end>", []),  # closes a text, though it is not the one that ends generation
        ("<bos> <end> $A <end> <eos>", ["<bos>", "<end>"]),
    ],
)
def test_only_what_stands_before_a_text_opens_it(around: str, opening: list[str]) -> None:
    tokenizer = prepending_tokenizer(around)
    assert tokenizer.convert_ids_to_tokens(opening_ids(tokenizer)) == opening


def test_openings_of_the_usual_tokenizers() -> None:
    assert opening_ids(byte_level_tokenizer()) == []
    tokenizer = sentencepiece_tokenizer()
    assert opening_ids(tokenizer) == [tokenizer.bos_token_id]


def test_words_go_on_from_others_without_a_blank_of_the_tokenizers_own() -> None:
    tokenizer = prepending_tokenizer()
    assert tokenizer.convert_ids_to_tokens(plain_ids(tokenizer, " topic in")) == ["▁", "▁topic", "▁in"]
    assert tokenizer.convert_ids_to_tokens(continuing_ids(tokenizer, " topic in")) == ["▁topic", "▁in"]
    byte_level = byte_level_tokenizer()
    assert continuing_ids(byte_level, " in a word") == plain_ids(byte_level, " in a word")
