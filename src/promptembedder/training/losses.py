"""The library's contrastive losses that the settings name.

Shapes: B rows of a batch, M documents (B positives, then B of each hard negative), D width.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.util import cos_sim
from torch import Tensor, nn

from promptembedder.data.rows import TrainingData
from promptembedder.errors import PromptEmbedderError
from promptembedder.training import workers
from promptembedder.training.distillation import TEMPERATURE, SimilarityDistillation
from promptembedder.training.settings import TrainingConfig


def make_losses(
    model: SentenceTransformer, config: TrainingConfig, data: TrainingData
) -> nn.Module | dict[str, nn.Module]:
    """The loss of all datasets, or one per dataset where some have opposed rows or do without in-batch negatives."""
    kinds = {name: (name in data.own_negatives, name in data.opposed) for name in data.datasets}

    def made(own: bool, opposed: bool) -> nn.Module:
        make = own_negatives_loss if own else make_loss
        # Two of them: a cached loss keeps its batch until the backward pass.
        return OpposedLoss(model, make(model, config), make(model, config)) if opposed else make(model, config)

    of_kind = {kind: made(*kind) for kind in sorted({kinds[name] for name in kinds if name not in data.neighbourhoods})}
    if not data.neighbourhoods and len(of_kind) == 1:
        return of_kind.popitem()[1]
    taught = SimilarityDistillation(model, TEMPERATURE)
    return {name: taught if name in data.neighbourhoods else of_kind[kind] for name, kind in kinds.items()}


class OpposedLoss(nn.Module):
    """Mean of two losses: one of the first half of the columns, one of the second, which are opposed rows.

    Args:
        model: what both of them hold; the trainer puts its wrapper for several workers into losses that have one.
        one: of the first half.
        other: of the second.
    """

    def __init__(self, model: nn.Module, one: nn.Module, other: nn.Module) -> None:
        super().__init__()
        self.model, self.one, self.other = model, one, other

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor) -> Tensor:
        """The mean, a scalar; arguments as sentence-transformers' losses have them."""
        columns = list(sentence_features)
        half = len(columns) // 2
        mean: Tensor = (self.one(columns[:half], labels) + self.other(columns[half:], labels)) / 2
        return mean


def make_loss(model: SentenceTransformer, config: TrainingConfig) -> nn.Module:
    """In-batch InfoNCE: plain, cached, masked; for Matryoshka widths where the settings say."""
    scale = 1.0 / config.temperature
    shared = workers.count() > 1
    loss: nn.Module
    if config.mask_false_negatives and config.loss == "cached_infonce":
        loss = losses.CachedGISTEmbedLoss(
            model,
            guide=model,
            temperature=config.temperature,
            mini_batch_size=config.mini_batch_size,
            contrast_anchors=False,
            contrast_positives=False,
            gather_across_devices=shared,
        )
    elif config.mask_false_negatives:
        loss = losses.GISTEmbedLoss(
            model,
            guide=model,
            temperature=config.temperature,
            contrast_anchors=False,
            contrast_positives=False,
            gather_across_devices=shared,
        )
    elif config.loss == "cached_infonce":
        loss = losses.CachedMultipleNegativesRankingLoss(
            model, scale=scale, mini_batch_size=config.mini_batch_size, gather_across_devices=shared
        )
    else:
        loss = losses.MultipleNegativesRankingLoss(model, scale=scale, gather_across_devices=shared)
    return _matryoshka(model, loss, config)


def own_negatives_loss(model: SentenceTransformer, config: TrainingConfig) -> nn.Module:
    """InfoNCE over a row's own candidates: its positive and its hard negatives.

    Where rows fall into few classes, many of a batch's other positives are as right as a row's own. Without a column of
    negatives the loss is zero.
    """
    # Every worker has its rows' candidates: nothing is gathered.
    loss = losses.MultipleNegativesRankingLoss(model, scale=1.0 / config.temperature, similarity_fct=own_similarity)
    return _matryoshka(model, loss, config)


def own_similarity(anchors_BD: Tensor, documents_MD: Tensor) -> Tensor:
    """Cosine similarities (B, M), minus infinity between an anchor and documents of other rows."""
    rows, documents = len(anchors_BD), len(documents_MD)
    row_B = torch.arange(rows, device=anchors_BD.device)
    row_of_document_M = torch.arange(documents, device=anchors_BD.device) % rows
    similarity_BM: Tensor = cos_sim(anchors_BD, documents_MD)
    return similarity_BM.masked_fill(row_of_document_M != row_B[:, None], -torch.inf)


def _matryoshka(model: SentenceTransformer, loss: nn.Module, config: TrainingConfig) -> nn.Module:
    if not config.matryoshka_dims:
        return loss
    width = model.get_embedding_dimension()
    if width is not None and max(config.matryoshka_dims) > width:
        raise PromptEmbedderError(
            f"training.matryoshka_dims holds {max(config.matryoshka_dims)}, the embedding has {width} dimensions"
        )
    # The whole embedding too: the library trains the widths it is given and nothing beyond.
    widths = {*config.matryoshka_dims} | ({width} if width is not None else set())
    nested: nn.Module = losses.MatryoshkaLoss(model, loss, matryoshka_dims=sorted(widths, reverse=True))
    return nested
