"""What tokenizers make of words, without and with the special tokens that they add by themselves."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from promptembedder.text import composed

_PROBE = "a"


def opening_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that a tokenizer puts before a text; those it puts after would end it before what follows."""
    plain, whole = plain_ids(tokenizer, _PROBE), list(tokenizer(_PROBE)["input_ids"])
    starts = range(len(whole) - len(plain) + 1)
    return next((whole[:n] for n in starts if whole[n : n + len(plain)] == plain), [])


def plain_ids(tokenizer: PreTrainedTokenizerBase, words: str) -> list[int]:
    """Tokens of words in composed form (NFC), no special ones."""
    return list(tokenizer(composed(words), add_special_tokens=False, verbose=False)["input_ids"])


def continuing_ids(tokenizer: PreTrainedTokenizerBase, words: str) -> list[int]:
    """Tokens of words, which begin with a blank, as they go on from others.

    By themselves some tokenizers put a blank of their own before them, and make one token more of it.
    """
    before, both = plain_ids(tokenizer, _PROBE), plain_ids(tokenizer, _PROBE + words)
    return both[len(before) :] if both[: len(before)] == before else plain_ids(tokenizer, words)
