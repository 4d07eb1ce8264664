"""Texts to token ids, as the backbone reads them: what opens a sequence, the template's words, the text.

Shapes: B texts, T text tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from promptembedder.errors import PromptEmbedderError
from promptembedder.llms.tokens import batch_ids, check_ids, opening_ids, plain_ids, without_embedding
from promptembedder.model.settings import Layout
from promptembedder.text import BLANK_READ_AS, check_text, is_blank

logger = logging.getLogger(__name__)


class TextReader:
    """Tokenises texts and, for layout `prefix`, instructions.

    Args:
        tokenizer: the backbone's.
        rows: token embeddings that the backbone has.
        template: what is read as text; `{text}` stands for it.
        layout: of the model.

    Raises:
        PromptEmbedderError: the template has a token that the backbone has no embedding for.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, rows: int, template: str, layout: Layout) -> None:
        self.tokenizer = tokenizer
        self.rows = rows
        self._warned: set[str] = set()
        head, tail = template.split("{text}")
        # What opens a sequence goes before the first words: in layout `prefix` these are the instruction's.
        opening = opening_ids(tokenizer)
        self._opening_ids = opening if layout == "prefix" else []
        # What every text begins with, in both layouts.
        self.head_ids = [*([] if layout == "prefix" else opening), *plain_ids(tokenizer, head)]
        self.tail_ids = plain_ids(tokenizer, tail)
        self._check([*opening, *self.head_ids, *self.tail_ids], "text_template")
        self._unreadable = without_embedding(tokenizer, rows)

    @property
    def beside_texts(self) -> int:
        """Tokens read with every text: opening and template."""
        return len(self._opening_ids) + len(self.head_ids) + len(self.tail_ids)

    def features(self, texts: Iterable[Any], limit: int) -> dict[str, Any]:
        """`input_ids` and `attention_mask`, (B, T), right padded, of texts truncated to `limit` tokens.

        Raises:
            PromptEmbedderError: a text is no string, or holds a token that the backbone has no embedding for.
        """
        return padded([self.framed(ids, limit) for ids in self.ids_of(list(texts))])

    def text_ids(self, text: Any) -> list[int]:
        """Token ids of a text alone, all of them; errors as in `features`."""
        return self.ids_of([text])[0]

    def ids_of(self, texts: Sequence[Any]) -> list[list[int]]:
        """Token ids of each text alone, read by the tokenizer in one call; errors as in `features`."""
        for text in texts:
            check_text(text)
        found = batch_ids(self.tokenizer, [BLANK_READ_AS if is_blank(text) else text for text in texts])
        for n, text in enumerate(texts):
            if is_blank(text) or not found[n]:  # some tokenizers drop characters
                found[n] = plain_ids(self.tokenizer, BLANK_READ_AS)
                self._warn_once("an empty text is read as %r (warned once)", BLANK_READ_AS)
            self._check(found[n], "a text")
        return found

    def framed(self, ids: list[int], limit: int) -> list[int]:
        """What the backbone reads for a text of these token ids: truncated to `limit`, in the template."""
        if len(ids) > limit:
            self._warn_once("a text of %d tokens is truncated to max_text_tokens = %d (warned once)", len(ids), limit)
        return self.head_ids + ids[:limit] + self.tail_ids

    def instruction_ids(self, instruction: str, limit: int) -> list[int]:
        """What layout `prefix` reads before the soft prompt.

        Raises:
            PromptEmbedderError: as in `features`.
        """
        # The end stays: it goes on to the soft prompt.
        ids = self._opening_ids + plain_ids(self.tokenizer, f"{instruction}\n")[-limit:]
        self._check(ids, "an instruction")
        return ids

    def check_readable(self, text: str, name: str) -> None:
        """Refuse a text with a token that the backbone has no embedding for, by its spelling: no text is tokenised.

        Raises:
            PromptEmbedderError: it has one.
        """
        for token in self._unreadable:
            if token in text:
                self._check(plain_ids(self.tokenizer, text), name)

    def _check(self, ids: list[int], what: str) -> None:
        check_ids(self.tokenizer, ids, self.rows, what)

    def _warn_once(self, message: str, *values: Any) -> None:
        if message not in self._warned:
            self._warned.add(message)
            logger.warning(message, *values)


def padded(rows: list[list[int]]) -> dict[str, Any]:
    """Token ids and mask, (B, T) each, right padded.

    What stands in the padding is masked, so 0 does: some pad tokens have no embedding.

    Raises:
        PromptEmbedderError: a text has no tokens.
    """
    if not all(rows):
        raise PromptEmbedderError("a text has no tokens; add words to text_template")
    ids_BT = torch.zeros((len(rows), max(map(len, rows), default=0)), dtype=torch.long)
    mask_BT = torch.zeros_like(ids_BT)
    for n, row in enumerate(rows):
        ids_BT[n, : len(row)] = torch.tensor(row)
        mask_BT[n, : len(row)] = 1
    return {"input_ids": ids_BT, "attention_mask": mask_BT}
