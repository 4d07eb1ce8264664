"""The vocabulary of a GGUF file: the backbone's, copies of the template's words, and soft tokens.

Shapes: W words of the grown vocabulary, V rows of the backbone's word embeddings, D backbone width.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from promptembedder.errors import PromptEmbedderError
from promptembedder.export.compiled import Compiled
from promptembedder.export.grown_tokenizer import TEXT, soft_words
from promptembedder.llms.tokens import plain_ids

_OTHERS = "export in format sentence-transformers or soft-prompt"
_SPACE = "\u2581"  # what SentencePiece writes for a space
# Words that llama.cpp may know by their spelling.
_TAG = re.compile(r"_?<[!-~]+>")
_BYTE = re.compile("<0x[0-9A-F]{2}>")
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# llama.cpp's names of the patterns by which words are parted, and of whether a word of the vocabulary is left whole.
_SPLITS = {
    (_CONTRACTIONS + r"\p{N}" + _REST, False): "qwen2",
    (_CONTRACTIONS + r"\p{N}{1,3}" + _REST, False): "smaug-bpe",
    (_CONTRACTIONS + r"\p{N}{1,3}" + _REST, True): "llama-bpe",
}


@dataclass(frozen=True)
class Words:
    """A grown vocabulary.

    Attributes:
        tokens: W spellings; the place is the id.
        kinds: of each, as GGUF names them.
        merges: of the byte-pair encoding.
        pre: llama.cpp's name of how words are parted; None: they are not, as in SentencePiece's models.
        special: ids of `bos`, `eos`, `unk` and `pad`, as far as there are.
        copies: ids of copies, by the id of the token they stand for.
        soft_ids: ids of soft tokens, by instruction.
        prefixes: what goes before a text, by instruction.
        suffixes: what goes after it.
        around: tokens in both, by instruction.
    """

    tokens: list[str]
    kinds: list[int]
    merges: list[str]
    pre: str | None
    special: Mapping[str, int]
    copies: Mapping[int, int]
    soft_ids: Mapping[str, tuple[int, ...]]
    prefixes: Mapping[str, str]
    suffixes: Mapping[str, str]
    around: Mapping[str, int]

    @property
    def count(self) -> int:
        """W."""
        return len(self.tokens)

    def add_to(self, writer: gguf.GGUFWriter) -> None:
        """Write the vocabulary; llama.cpp is to add no token of its own."""
        writer.add_vocab_size(self.count)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.kinds)
        if self.pre is None:
            writer.add_tokenizer_model("llama")
            writer.add_token_scores(self.scores())
            writer.add_add_space_prefix(False)
        else:
            writer.add_tokenizer_model("gpt2")
            writer.add_tokenizer_pre(self.pre)
            writer.add_token_merges(self.merges)
        for name, token_id in self.special.items():
            getattr(writer, f"add_{name}_token_id")(token_id)
        writer.add_add_bos_token(False)
        writer.add_add_eos_token(False)

    def scores(self) -> list[float]:
        """Of each token, as SentencePiece has them: the sooner two parts become it, the higher."""
        places: dict[str, int] = {}
        for place, merge in enumerate(self.merges):
            places.setdefault(merge.replace(" ", ""), place)
        return [-float(places.get(token, len(self.merges))) for token in self.tokens]

    def rows(self, table_VD: torch.Tensor, compiled: Compiled) -> NDArray[np.float32]:
        """The word embeddings (W, D)."""
        grown_WD = torch.zeros(self.count, table_VD.shape[1])
        kept = min(len(table_VD), self.count)  # some LLMs have spare rows, some tokenizers words without a row
        grown_WD[:kept] = table_VD[:kept].detach().float().cpu()
        for meant, copy in self.copies.items():
            grown_WD[copy] = table_VD[meant].detach().float().cpu()
        for name, ids in self.soft_ids.items():
            grown_WD[list(ids)] = compiled.vocabulary_rows(name)
        found: NDArray[np.float32] = grown_WD.numpy()
        return found


def grown_words(tokenizer: PreTrainedTokenizerBase, compiled: Compiled) -> Words:
    """The backbone's vocabulary with what stands around texts.

    Raises:
        PromptEmbedderError: the tokenizer is of a kind that is not known here.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = json.loads(backend.to_str()) if backend is not None else {"model": {}}
    pre = _pre(state)
    spelled = {i: word for word, i in state["model"]["vocab"].items()}
    kind_of = dict.fromkeys(spelled, gguf.TokenType.NORMAL)
    for added in state["added_tokens"]:
        spelled[added["id"]] = added["content"]
        kind_of[added["id"]] = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
    if pre is None:
        kind_of |= {i: gguf.TokenType.BYTE for i, word in spelled.items() if _BYTE.fullmatch(word)}
        kind_of[state["model"]["vocab"][state["model"]["unk_token"]]] = gguf.TokenType.UNKNOWN
    else:
        for i in _never_read(tokenizer, spelled, kind_of):
            spelled[i], kind_of[i] = f"[UNREAD{i}]", gguf.TokenType.UNUSED
    ids = range(max(spelled) + 1)
    tokens = [spelled.get(i, f"[PAD{i}]") for i in ids]
    kinds = [int(kind_of.get(i, gguf.TokenType.UNUSED)) for i in ids]

    def grow(words: list[str]) -> tuple[int, ...]:
        if taken := sorted(set(words) & set(spelled.values())):
            raise PromptEmbedderError(f"the backbone's tokenizer has the word {taken[0]!r}; rename the instruction")
        tokens.extend(words)
        kinds.extend([int(gguf.TokenType.CONTROL)] * len(words))
        return tuple(range(len(tokens) - len(words), len(tokens)))

    soft = {name: grow(soft_words(name, compiled.num_soft_tokens)) for name in compiled.prompts}
    sequences = {name: compiled.sequence(name, [TEXT], soft[name]) for name in compiled.prompts}
    softs = {i for found in soft.values() for i in found}
    meant = sorted({i for found in sequences.values() for i in found if i != TEXT} - softs)
    copies = dict(zip(meant, grow([f"<|pe:={i}|>" for i in meant]), strict=True))
    before, after = {}, {}
    for name, sequence in sequences.items():
        own = [i if i == TEXT else copies.get(i, i) for i in sequence]
        place = own.index(TEXT)
        before[name] = "".join(tokens[i] for i in own[:place])
        after[name] = "".join(tokens[i] for i in own[place + 1 :])
    merges = [m if isinstance(m, str) else " ".join(m) for m in state["model"]["merges"]]
    special = {name: getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "unk", "pad")}
    known = {name: i for name, i in special.items() if i is not None}
    around = {name: len(sequence) - 1 for name, sequence in sequences.items()}
    return Words(tokens, kinds, merges, pre, known, copies, soft, before, after, around)


def _never_read(
    tokenizer: PreTrainedTokenizerBase, spelled: Mapping[int, str], kind_of: Mapping[int, gguf.TokenType]
) -> list[int]:
    """Words such as `</s>` that stand in the vocabulary, and that the tokenizer parts before it looks there.

    llama.cpp takes some of them for control tokens, whatever their kind, and would read one token in place of several.
    """
    tags = [(i, word) for i, word in spelled.items() if kind_of[i] == gguf.TokenType.NORMAL and _TAG.fullmatch(word)]
    return [i for i, word in tags if plain_ids(tokenizer, word) != [i]]


def _pre(state: Mapping[str, Any]) -> str | None:
    """llama.cpp's name of a way to part words: of the tokenizer as it is, whatever its LLM is called."""
    if _is_sentence_piece(state):
        return None
    if state["model"].get("type") != "BPE" or state["model"].get("byte_fallback"):
        raise PromptEmbedderError(
            f"the backbone's tokenizer is neither a byte-level BPE nor one of SentencePiece's; {_OTHERS}"
        )
    normalizer = (state["normalizer"] or {"type": "NFC"})["type"]
    if normalizer != "NFC":  # which clients do themselves
        raise PromptEmbedderError(f"the backbone's tokenizer has a normalizer {normalizer}, llama.cpp none; {_OTHERS}")
    whole = bool(state["model"].get("ignore_merges"))
    parted = state["pre_tokenizer"] or {}
    steps = parted.get("pretokenizers", [parted])
    kinds = [step.get("type") for step in steps]
    plain = not steps[-1].get("add_prefix_space", True)
    if not whole and kinds == ["ByteLevel"] and plain and steps[0].get("use_regex", True):
        return "gpt-2"
    digits = kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"] and steps[1]["use_regex"]
    if not whole and plain and digits:
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and plain and steps[0]["behavior"] == "Isolated" and not steps[1]["use_regex"]:
        found = _SPLITS.get((steps[0]["pattern"].get("Regex", ""), whole))
        if found is not None:
            return found
    raise PromptEmbedderError(f"the backbone's tokenizer parts words as llama.cpp does not; {_OTHERS}")


def _is_sentence_piece(state: Mapping[str, Any]) -> bool:
    """Whether a tokenizer is a BPE of SentencePiece that adds no space before a text, such as Gemma's."""
    model, normalizer, parted = state["model"], state["normalizer"] or {}, state["pre_tokenizer"] or {}
    # Where spaces are already replaced, nothing is parted at them.
    whole = not parted or (parted.get("type") == "Split" and parted["pattern"] == {"String": " "})
    spaces = normalizer.get("type") == "Replace" and normalizer["pattern"] == {"String": " "}
    return bool(
        model.get("type") == "BPE"
        and model.get("byte_fallback")
        and model.get("unk_token") is not None
        and not model.get("ignore_merges")
        and spaces
        and normalizer["content"] == _SPACE
        and whole
    )
