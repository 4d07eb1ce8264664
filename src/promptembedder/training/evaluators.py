"""Dev and test pairs: the library's evaluator under the run's instruction."""

from __future__ import annotations

from typing import Any, Literal

from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator

from promptembedder.data.scored_pairs import read_scored_pairs
from promptembedder.model.module import soft_prompt_module
from promptembedder.training.settings import EvaluationConfig


def spread(count: int, at_most: int | None) -> list[int]:
    """Positions of at most `at_most` of `count` pairs, evenly spread."""
    picked = count if at_most is None else min(at_most, count)
    return [n * count // picked for n in range(picked)]


class _UnderInstruction(EmbeddingSimilarityEvaluator):  # type: ignore[misc]
    """Embeds both sentences under one instruction.

    Whole also while a run cuts its rows shorter, so that scores on the way compare with those before and after.
    """

    instruction: str

    def embed_inputs(self, model: SentenceTransformer, sentences: list[str], **options: Any) -> Any:
        with soft_prompt_module(model).truncating(None):
            return super().embed_inputs(model, sentences, prompt=self.instruction, **options)


def pair_evaluator(
    config: EvaluationConfig, root: str | None, part: Literal["dev", "test"]
) -> EmbeddingSimilarityEvaluator | None:
    """The library's evaluator of the dev or test pairs, which embeds both sentences under the instruction.

    None where the settings name no file for the part. Of dev `dev_pairs` pairs count, evenly spread.
    """
    path, at_most = (config.dev, config.dev_pairs) if part == "dev" else (config.test, None)
    if path is None:
        return None
    first, second, scores = read_scored_pairs(path, root)
    picked = spread(len(scores), at_most)
    first, second = [first[n] for n in picked], [second[n] for n in picked]
    scores = [scores[n] for n in picked]
    evaluator = _UnderInstruction(
        first, second, scores, batch_size=config.batch_size, main_similarity="cosine", name=part, write_csv=False
    )
    evaluator.instruction = config.instruction
    return evaluator
