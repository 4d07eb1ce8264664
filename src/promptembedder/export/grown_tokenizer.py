"""The backbone's tokenizer, with soft tokens as words that follow every text by themselves.

A post-processor (`TemplateProcessing` of the library tokenizers) puts template, text and soft tokens together.
Truncation counts what it adds, so that the text is cut and the soft tokens stay.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, normalizers
from transformers import PreTrainedTokenizerBase

from promptembedder.errors import PromptEmbedderError
from promptembedder.export.compiled import Compiled

TEXT = -1  # stands for the text among the token ids of a sequence
_TAIL = "+"  # in place of an instruction's name, which it cannot be


def soft_words(name: str, count: int) -> list[str]:
    """How the soft tokens of an instruction are spelled, such as `<|pe:topic:0|>`: as no text is."""
    return [f"<|pe:{name}:{k}|>" for k in range(count)]


@dataclass(frozen=True)
class GrownTokenizer:
    """A tokenizer with the soft tokens of all instructions.

    Attributes:
        soft_ids: ids of the soft tokens, by instruction.
        tail_ids: ids of words that mean what the template's words after the text do.
        words: tokens in all; ids are below that.
        pad_id: id of the pad token.
    """

    soft_ids: Mapping[str, tuple[int, ...]]
    tail_ids: tuple[int, ...]
    words: int
    pad_id: int
    _spelling: Mapping[int, str]
    _state: Mapping[str, Any]
    _special: Mapping[str, str]

    def spelled(self, name: str) -> str:
        """What a client writes behind a text: the template's words after it, and an instruction's soft tokens."""
        return "".join(self._spelling[i] for i in (*self.tail_ids, *self.soft_ids[name]))

    def write(self, folder: Path, sequence: Sequence[int], limit: int, padding_side: str) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`.

        Args:
            folder: where to.
            sequence: what stands for a text: token ids, and `TEXT` once.
            limit: tokens of the longest sequence.
            padding_side: `left` or `right`.
        """
        state = {**self._state, "post_processor": self._post_processor(sequence)}
        written = json.dumps(state, ensure_ascii=False)
        Tokenizer.from_str(written)  # an error here, rather than with whoever opens it
        (folder / "tokenizer.json").write_text(written, encoding="utf-8")
        _write_settings(folder, limit, padding_side, self._special)

    def _post_processor(self, sequence: Sequence[int]) -> dict[str, Any]:
        # One entry per token: JavaScript's tokenizers read the first id of an entry only, by its spelling.
        words = {i: self._spelling[i] for i in sequence if i != TEXT}
        text = {"Sequence": {"id": "A", "type_id": 0}}
        pieces = [text if i == TEXT else {"SpecialToken": {"id": words[i], "type_id": 0}} for i in sequence]
        return {
            "type": "TemplateProcessing",
            "single": pieces,
            "pair": [*pieces, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {word: {"id": word, "ids": [i], "tokens": [word]} for i, word in words.items()},
        }


def grow(tokenizer: PreTrainedTokenizerBase, compiled: Compiled) -> GrownTokenizer:
    """Add the soft tokens of all instructions to a copy of a tokenizer.

    Raises:
        PromptEmbedderError: it is not one of the library tokenizers, holds such words already, or has gaps where the
            new words would go.
    """
    core = _plain_core(tokenizer)
    known = core.get_vocab(with_added_tokens=True)
    soft = {name: soft_words(name, len(prompt.soft_KD)) for name, prompt in compiled.prompts.items()}
    tail = soft_words(_TAIL, len(compiled.tail_ids))
    words = [*(word for name in soft for word in soft[name]), *tail]
    if taken := sorted(known.keys() & set(words)):
        raise PromptEmbedderError(f"the backbone's tokenizer has the word {taken[0]!r} already; rename the instruction")
    core.add_special_tokens([AddedToken(word, normalized=False, special=True) for word in words])
    grown = core.get_vocab(with_added_tokens=True)
    spelling = {i: word for word, i in grown.items()}
    if len(spelling) != len(grown):
        raise PromptEmbedderError("the backbone's tokenizer has gaps among its ids, so that words cannot be added")
    return GrownTokenizer(
        soft_ids={name: tuple(grown[word] for word in soft[name]) for name in soft},
        tail_ids=tuple(grown[word] for word in tail),
        words=max(spelling) + 1,
        pad_id=int(tokenizer.pad_token_id),
        _spelling=spelling,
        _state=json.loads(core.to_str()),
        _special=_special(tokenizer),
    )


def write_plain(tokenizer: PreTrainedTokenizerBase, limit: int, folder: Path) -> None:
    """Write a tokenizer that reads texts as the model does, and adds nothing to them; it truncates and pads.

    Args:
        tokenizer: the backbone's.
        limit: tokens of the longest text.
        folder: where to write `tokenizer.json` and `tokenizer_config.json`.

    Raises:
        PromptEmbedderError: it is not one of the library tokenizers.
    """
    core = _plain_core(tokenizer)
    core.enable_truncation(limit)
    core.enable_padding(pad_id=int(tokenizer.pad_token_id), pad_token=str(tokenizer.pad_token))
    state = {**json.loads(core.to_str()), "post_processor": None}
    (folder / "tokenizer.json").write_text(json.dumps(state, ensure_ascii=False), encoding="utf-8")
    _write_settings(folder, limit, "right", _special(tokenizer))


def _plain_core(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """A copy that neither truncates nor pads, with Unicode's composed form as the model reads texts."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise PromptEmbedderError(
            f"the backbone's tokenizer, {type(tokenizer).__name__}, has no tokenizer.json, which engines need"
        )
    core = Tokenizer.from_str(backend.to_str())
    core.no_truncation()
    core.no_padding()
    # A tokenizer may have a normalizer of its own.
    own = [] if core.normalizer is None else [core.normalizer]
    core.normalizer = normalizers.Sequence([normalizers.NFC(), *own])
    return core


def _special(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    return {key: str(word) for key, word in tokenizer.special_tokens_map.items() if isinstance(word, str)}


def _write_settings(folder: Path, limit: int, padding_side: str, special: Mapping[str, str]) -> None:
    settings = {
        # The one class that takes tokenizer.json as it is: those of architectures bring a post-processor along.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": limit,
        "padding_side": padding_side,
        "truncation_side": "right",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        **special,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
