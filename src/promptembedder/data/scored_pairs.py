"""Sentence pairs with a similarity score."""

from __future__ import annotations

from promptembedder.data.readers import records, text_field
from promptembedder.errors import PromptEmbedderError, shown


def read_scored_pairs(path: str, root: str | None) -> tuple[list[str], list[str], list[float]]:
    """Read sentence pairs with a similarity score: fields `sentence1`, `sentence2`, `score`.

    Raises:
        PromptEmbedderError: file missing or damaged, field missing, score no finite number.
    """
    first, second, scores = [], [], []
    for where, record in records(path, root):
        score = record.get("score")
        if isinstance(score, bool) or not isinstance(score, (int, float)) or not abs(score) < 1e300:
            raise PromptEmbedderError(f"{where}: field 'score' is {shown(score)}, expected a number")
        first.append(text_field(record, "sentence1", where))
        second.append(text_field(record, "sentence2", where))
        scores.append(float(score))
    if not scores:
        raise PromptEmbedderError(f"{path} holds no pairs")
    if len(set(scores)) < 2:
        raise PromptEmbedderError(
            f"{path} holds one score only ({scores[0]}); a rank correlation needs two that differ"
        )
    return first, second, scores
