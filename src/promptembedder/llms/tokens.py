"""Token ids of words, and the special tokens that a tokenizer adds before a text."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from promptembedder.errors import PromptEmbedderError
from promptembedder.text import composed

_PROBE = "a"


def opening_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that a tokenizer puts before a text.

    Special tokens after the text are left out, because they would end the text before the soft tokens.
    """
    plain, whole = plain_ids(tokenizer, _PROBE), list(tokenizer(_PROBE)["input_ids"])
    starts = range(len(whole) - len(plain) + 1)
    return next((whole[:n] for n in starts if whole[n : n + len(plain)] == plain), [])


def plain_ids(tokenizer: PreTrainedTokenizerBase, words: str) -> list[int]:
    """Token ids of words in composed form (NFC), without special tokens."""
    return batch_ids(tokenizer, [words])[0]


def batch_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """As `plain_ids` of each text, in one call: tokenizers read many texts on all cores."""
    if not texts:
        return []
    read = tokenizer([composed(text) for text in texts], add_special_tokens=False, verbose=False)
    return [list(ids) for ids in read["input_ids"]]


def continuing_ids(tokenizer: PreTrainedTokenizerBase, words: str) -> list[int]:
    """Token ids of words that begin with a blank and continue a text.

    Some tokenizers put their own blank before words that stand alone, and make one more token of it.
    """
    before, both = plain_ids(tokenizer, _PROBE), plain_ids(tokenizer, _PROBE + words)
    return both[len(before) :] if both[: len(before)] == before else plain_ids(tokenizer, words)


def check_ids(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], rows: int, what: str) -> None:
    """Refuse tokens that an LLM has no embedding for; some tokenizers have more tokens than their LLM has embeddings.

    Args:
        tokenizer: that made the ids.
        ids: of some words.
        rows: how many embeddings the LLM has.
        what: name of the words, for the error.

    Raises:
        PromptEmbedderError: a token has none.
    """
    if ids and max(ids) >= rows:
        token = tokenizer.convert_ids_to_tokens(max(ids))
        raise PromptEmbedderError(f"{what} holds the token {token!r}, which the LLM has no embedding for")


def without_embedding(tokenizer: PreTrainedTokenizerBase, rows: int) -> list[str]:
    """Added tokens that an LLM of this number of embeddings has none for, as they are spelled in a text."""
    return [token for token, index in tokenizer.get_added_vocab().items() if index >= rows]
