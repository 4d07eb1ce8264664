"""What batches of rows hold: a text once, unless rows are compared with their own negatives only."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from sentence_transformers import SentenceTransformerTrainer
from sentence_transformers.base.sampler import DefaultBatchSampler
from torch import nn
from torch.utils.data import BatchSampler, RandomSampler

from promptembedder.model.store import restore


class OwnNegativesTrainer(SentenceTransformerTrainer):  # type: ignore[misc]
    """The library's trainer, in whose batches of `own_negatives` a text may stand twice.

    No row of these datasets is compared with another's, and rows of few classes would each fill a batch alone.

    Attributes:
        own_negatives: names of datasets (`TrainingData.own_negatives`).
    """

    own_negatives: frozenset[str] = frozenset()

    def get_batch_sampler(self, dataset: Dataset, **options: Any) -> BatchSampler | None:
        """The sampler of one dataset."""
        if any(dataset is self.train_dataset[name] for name in self.own_negatives):
            drawn = RandomSampler(dataset, generator=options["generator"])
            return DefaultBatchSampler(drawn, **options)  # type: ignore[no-any-return]
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
