"""Whether an export embeds as the model does, by the engine that will serve it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer

from promptembedder.errors import MissingExtraError, PromptEmbedderError
from promptembedder.export.compiled import Compiled, embed_compiled
from promptembedder.llms.tokens import plain_ids

# Smallest cosine between an export's embedding and the model's, by the precision that either runs in.
BOUNDS = {"float32": 0.99999, "float16": 0.9999, "bfloat16": 0.998, "q8": 0.998}
# Tokens of the longest text that is compared.
_LONGEST = 2048
_SENTENCE = "The harbour office answers letters on Tuesdays, unless the ferry is late. "
_TEXTS = (
    "Rain.",
    "A man is playing a guitar.",
    "a",
    "7",
    "   two  blanks\tand a tab  ",
    "First line\nsecond line\r\n\r\nfourth line\n",
    "She said \"no\", and then 'yes': «oui» “ja”.",
    "Smile 🙂, family 👩‍👩‍👧‍👦, flag 🇪🇺.",
    "naïve café, Straße, Ångström e\u0301",
    "שלום עולם, זה משפט בעברית.",
    "مرحبا بالعالم، هذه جملة عربية.",
    "今天天气很好，我们去公园散步。",  # noqa: RUF001
    "def f(x):\n    return {'a': x[0], \"b\": x[1:]}  # <tag> & %s \\n",
    "<|im_start|>user</s><bos> {text} [INST]",
    "https://example.org/a?b=c&d=%20#e",
)


@dataclass(frozen=True)
class Parity:
    """What a comparison found.

    Attributes:
        smallest_cosine: over all texts and instructions; unset: not checked.
        texts: compared under each instruction.
        bound: that the cosine has to reach.
        missing: what has to be installed for the check; unset: it was made.
    """

    smallest_cosine: float | None
    texts: int
    bound: float
    missing: str | None = None

    def __str__(self) -> str:
        """One line for a person."""
        if self.smallest_cosine is None:
            return f"not checked: {self.missing}"
        return f"smallest cosine to the model {self.smallest_cosine:.7f} (at least {self.bound}), {self.texts} texts"


def parity_texts(model: SentenceTransformer, limit: int) -> list[str]:
    """Texts to compare on, the last one as long as the model reads, or as `_LONGEST` tokens."""
    limit = min(limit, _LONGEST)
    sentence = len(plain_ids(model.tokenizer, _SENTENCE * 2)) - len(plain_ids(model.tokenizer, _SENTENCE))
    long = _SENTENCE * (limit // max(sentence, 1) + 1)
    while len(plain_ids(model.tokenizer, long)) > limit:
        long = long.rstrip().rpartition(" ")[0]
    fitting = [text for text in _TEXTS if len(plain_ids(model.tokenizer, text)) <= limit]
    return [*fitting, *([long] if long.strip() else [])]


def compare(
    compiled: Compiled,
    model: SentenceTransformer,
    names: Sequence[str],
    open_reader: Callable[[str], Callable[[Sequence[str]], NDArray[np.float32]]],
    precision: str,
) -> Parity:
    """Compare an export with the model it was made from.

    Args:
        compiled: what was exported.
        model: its model.
        names: instructions to compare under.
        open_reader: opens the export under an instruction.
        precision: that the export runs in.

    Raises:
        PromptEmbedderError: an embedding is further from the model's than the precision explains.
    """
    bound = min(BOUNDS.get(runs_in, BOUNDS["q8"]) for runs_in in (precision, running_precision(model)))
    texts = parity_texts(model, compiled.max_text_tokens)
    smallest, where = 2.0, ("", "")
    for name in names:
        try:
            found_NE = np.asarray(open_reader(name)(texts), dtype=np.float64)
        except MissingExtraError as error:
            return Parity(None, len(texts), bound, str(error))
        expected_NE = embed_compiled(model, compiled, name, texts).double().numpy()
        if found_NE.shape != expected_NE.shape:
            raise PromptEmbedderError(
                f"the export gives embeddings of shape {found_NE.shape}, the model {expected_NE.shape}"
            )
        # What is not a number is as far as can be.
        cosine_N = np.nan_to_num((_unit(found_NE) * _unit(expected_NE)).sum(-1), nan=-1.0)
        lowest = int(cosine_N.argmin())
        if cosine_N[lowest] < smallest:
            smallest, where = float(cosine_N[lowest]), (name, texts[lowest])
    if smallest < bound:
        raise PromptEmbedderError(
            f"the export does not embed as the model: cosine {smallest:.6f} under instruction {where[0]!r}, at least "
            f"{bound} is expected; first text that differs most: {where[1][:40]!r}; nothing is kept"
        )
    return Parity(min(smallest, 1.0), len(texts), bound)


def running_precision(model: SentenceTransformer) -> str:
    """Precision that a model's backbone runs in."""
    module: Any = model[0]
    return str(module.backbone.lm.dtype).removeprefix("torch.")


def _unit(embeddings_NE: NDArray[np.float64]) -> NDArray[np.float64]:
    scaled: NDArray[np.float64] = embeddings_NE / np.linalg.norm(embeddings_NE, axis=-1, keepdims=True)
    return scaled
