"""What batches hold: a text once, unless rows keep to their own negatives; for a teacher, neighbours."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformerTrainer
from sentence_transformers.base.sampler import DefaultBatchSampler
from torch import nn
from torch.utils.data import BatchSampler, RandomSampler, Sampler

from promptembedder.data.rows import Neighbourhoods
from promptembedder.model.store import restore


class NeighbourhoodSampler(Sampler[int]):
    """Goes from one neighbourhood to the next, in a random order and within each in a random order.

    Args:
        near: neighbourhoods of the rows, and how many rows are drawn in an epoch: fewer or more than there are.
        generator: draws.
    """

    def __init__(self, near: Neighbourhoods, generator: torch.Generator | None) -> None:
        self._of = torch.tensor(near.of)
        self._draws = near.draws
        self._generator = generator

    def __len__(self) -> int:
        return self._draws

    def __iter__(self) -> Iterator[int]:
        left = self._draws
        while left:
            places = torch.randperm(int(self._of.max()) + 1, generator=self._generator)[self._of]
            shuffled = torch.randperm(len(places), generator=self._generator)
            order = shuffled[torch.argsort(places[shuffled], stable=True)][:left]
            left -= len(order)
            yield from order.tolist()


class OwnNegativesTrainer(SentenceTransformerTrainer):  # type: ignore[misc]
    """The library's trainer, in whose batches of `own_negatives` a text may stand twice.

    No row of these datasets is compared with another's, and rows of few classes would each fill a batch alone.

    Attributes:
        own_negatives: names of datasets (`TrainingData.own_negatives`).
        neighbourhoods: by name of dataset (`TrainingData.neighbourhoods`).
    """

    own_negatives: frozenset[str] = frozenset()
    neighbourhoods: Mapping[str, Neighbourhoods] = {}

    def get_batch_sampler(self, dataset: Dataset, **options: Any) -> BatchSampler | None:
        """The sampler of one dataset."""
        if any(dataset is self.train_dataset[name] for name in self.own_negatives):
            drawn = RandomSampler(dataset, generator=options["generator"])
            return DefaultBatchSampler(drawn, **options)  # type: ignore[no-any-return]
        for name, near in self.neighbourhoods.items():
            if dataset is self.train_dataset[name]:
                return DefaultBatchSampler(NeighbourhoodSampler(near, options["generator"]), **options)  # type: ignore[no-any-return]
        return super().get_batch_sampler(dataset, **options)  # type: ignore[no-any-return]


class Trainer(OwnNegativesTrainer):
    """Goes back to a checkpoint by its trained weights.

    The library opens the whole model again, both LLMs in the precision and on the device of a fresh start, copies
    everything over what is there, and where that fails goes on with a line in the log.
    """

    def _load_from_checkpoint(self, checkpoint_path: str, model: nn.Module | None = None) -> None:
        restore(self.model, checkpoint_path)

    def _load_best_model(self) -> None:
        if self.state.best_model_checkpoint is not None:
            restore(self.model, self.state.best_model_checkpoint)
