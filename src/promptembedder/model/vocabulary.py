"""Words that two vocabularies share.

Shapes: S shared words.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

_WORD_MARK = "\u2581"  # sentencepiece's visible blank
_BYTE_FALLBACK = re.compile("<0x[0-9A-Fa-f]{2}>")


def shared_vocabulary(
    first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase, rows: tuple[int, int] | None = None
) -> tuple[Tensor, Tensor]:
    """Token ids (S,) and (S,) of the spellings that two vocabularies share, special tokens left out.

    Spellings are compared as bytes: byte-level BPE (`Ġthe`), sentencepiece (`▁the`) and byte fallbacks
    (`<0x0A>`) come out the same. A byte fallback counts only where no other token has its spelling: no text is ever
    split into it, so that its embedding is untrained.

    Args:
        first: a tokenizer.
        second: another one.
        rows: embeddings that the two LLMs have; tokens without one are left out. Unset: every token has one.
    """
    spelled_first, spelled_second = _spellings(first), _spellings(second)
    shared = sorted(spelled_first.keys() & spelled_second.keys())
    ids_first = torch.tensor([spelled_first[s] for s in shared], dtype=torch.long)
    ids_second = torch.tensor([spelled_second[s] for s in shared], dtype=torch.long)
    if rows is None:
        return ids_first, ids_second
    embedded_S = (ids_first < rows[0]) & (ids_second < rows[1])
    return ids_first[embedded_S], ids_second[embedded_S]


def _spellings(tokenizer: PreTrainedTokenizerBase) -> dict[bytes, int]:
    special = set(tokenizer.all_special_ids) | {
        i for i, token in getattr(tokenizer, "added_tokens_decoder", {}).items() if token.special
    }
    backend = getattr(tokenizer, "backend_tokenizer", None)
    # The state of a part is JSON; that of the whole would hold the vocabulary, too, seconds of parsing.
    parts = [] if backend is None else [backend.pre_tokenizer, backend.decoder]
    byte_level = any(part is not None and b"ByteLevel" in part.__getstate__() for part in parts)
    byte_of = _byte_level_alphabet()
    spelled: dict[bytes, int] = {}
    fallbacks: dict[bytes, int] = {}
    for token, index in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        if index in special:
            continue
        if byte_level:
            if not all(c in byte_of for c in token):
                continue
            spelling = bytes(byte_of[c] for c in token)
        elif _BYTE_FALLBACK.fullmatch(token):
            fallbacks[bytes([int(token[3:5], 16)])] = index
            continue
        else:
            spelling = token.replace(_WORD_MARK, " ").encode()
        spelled.setdefault(spelling, index)
    return fallbacks | spelled


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes, character to byte."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in set(printable)]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}
