"""Embeddings of the demo by method, and two figures for each.

Shapes: N texts, E embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer

from promptembedder.demo.corpus import ARTICLE, HEADLINE, TOPIC, Article
from promptembedder.model import baselines
from promptembedder.model.encode import encode
from promptembedder.model.module import soft_prompt_module

# (N, E) of "headlines", of "articles" under the search instruction, and of articles under the "topics" one.
Embedded = dict[str, NDArray[np.float32]]
METHODS = {
    "mean_pooling": "untrained, mean of last hidden states",
    "hard_cue": "untrained, PromptEOL cue",
    "shipped": "`smollm2-135m`, as shipped",
    "trained": "trained soft prompts",
}
FIGURES = {"ndcg_at_10": "nDCG@10, headline to article", "v_measure": "V-measure, topics"}


def embed_articles(
    trained: SentenceTransformer, shipped: SentenceTransformer | None, articles: list[Article]
) -> dict[str, Embedded]:
    """Embeddings of headlines and articles by method.

    Args:
        trained: the demo's model; the baselines use its backbone, without an instruction.
        shipped: the model of the package; None: left out.
        articles: N of them.
    """
    module = soft_prompt_module(trained)
    headlines, bodies = [a.headline for a in articles], [a.body for a in articles]
    embedded: dict[str, Embedded] = {}
    for method, embed in (("mean_pooling", baselines.mean_pooling), ("hard_cue", baselines.hard_cue)):
        articles_NE = embed(module, bodies)
        embedded[method] = {"headlines": embed(module, headlines), "articles": articles_NE, "topics": articles_NE}
    for method, model in (("trained", trained), ("shipped", shipped)):
        if model is not None:
            articles_NE, topics_NE = encode(model, bodies, [ARTICLE, TOPIC])
            headlines_NE = encode(model, headlines, HEADLINE)
            embedded[method] = {"headlines": headlines_NE, "articles": articles_NE, "topics": topics_NE}
    return embedded


def score(embedded: dict[str, Embedded], articles: list[Article]) -> dict[str, Any]:
    """The two figures (`FIGURES`) of every method, 0 to 1."""
    topics = [a.topic for a in articles]
    return {
        "ndcg_at_10": {m: round(ndcg_at_10(e["headlines"], e["articles"]), 4) for m, e in embedded.items()},
        "v_measure": {m: round(v_measure(e["topics"], topics), 4) for m, e in embedded.items()},
    }


def ndcg_at_10(queries_NE: NDArray[np.float32], documents_NE: NDArray[np.float32]) -> float:
    """Mean nDCG@10 where document n alone is relevant to query n."""
    from sklearn.metrics import ndcg_score

    return float(ndcg_score(np.eye(len(queries_NE)), queries_NE @ documents_NE.T, k=10))


def v_measure(embeddings_NE: NDArray[np.float32], groups: Sequence[str]) -> float:
    """V-measure of k-means clusters against the groups, mean of three seeds."""
    from sklearn.cluster import KMeans
    from sklearn.metrics import v_measure_score

    scores = [
        v_measure_score(groups, KMeans(len(set(groups)), n_init=10, random_state=seed).fit_predict(embeddings_NE))
        for seed in range(3)
    ]
    return float(np.mean(scores))
