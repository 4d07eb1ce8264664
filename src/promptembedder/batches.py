"""What batches of rows hold: a text once, unless rows are compared with their own negatives only."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

from datasets import Dataset
from sentence_transformers import SentenceTransformerTrainer
from sentence_transformers.base.sampler import DefaultBatchSampler
from torch.utils.data import BatchSampler, RandomSampler

from promptembedder import workers
from promptembedder.data import TrainingData

logger = logging.getLogger(__name__)


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


def rows_for_batches(data: TrainingData, batch_size: int) -> dict[str, int]:
    """Rows of each dataset; where texts that repeat leave no full batch, as many as go together.

    Small batches are said. A batch of rows with in-batch negatives holds a text once, and an epoch has as many batches
    as rows that are all different would fill.
    """
    found = {}
    for name, rows in data.datasets.items():
        said = f"{name} ({data.prompts.get(name, {}).get('anchor', '')})"
        found[said] = len(rows)
        columns = [Counter(rows[column]) for column in rows.column_names if isinstance(rows[0][column], str)]
        if name in data.own_negatives or not columns:
            continue
        (text, times), *_ = sum(columns, Counter()).most_common(1)
        times = min(times, len(rows))  # a row may hold a text twice
        batches = max(1, len(rows) // batch_size)
        if (most := _most_rows(columns, len(rows), times, 1)) < min(batch_size, len(rows)):
            found[said] = most
        together = _most_rows(columns, len(rows), times, batches) // batches
        if 2 * together <= min(batch_size, len(rows)) and workers.number() == 0:
            logger.warning(
                "%s: batches hold about %d rows, because a batch holds a text once (%r stands in %d of %d); rows of "
                "few classes want in_batch_negatives: false and a `neg` each",
                *(said, together, text[:60], times, len(rows)),
            )
    return found


def _most_rows(columns: list[Counter[str]], rows: int, times: int, batches: int) -> int:
    """A bound on the rows in so many batches: every text of a column comes in each once, as the commonest of all."""
    by_column = (sum(min(found, batches) for found in counts.values()) for counts in columns)
    return max(1, min(rows - times + min(times, batches), *by_column))
