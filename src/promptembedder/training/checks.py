"""What a run refuses or warns of, before a model is opened."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path

from promptembedder.data.rows import TrainingData
from promptembedder.errors import PromptEmbedderError
from promptembedder.model.settings import Layout
from promptembedder.model.store import refuse_foreign
from promptembedder.training import workers
from promptembedder.training.arguments import check_arguments
from promptembedder.training.settings import TrainingConfig

logger = logging.getLogger(__name__)


def largest(data: TrainingData) -> int:
    """Rows of the instruction that has most.

    Raises:
        PromptEmbedderError: no instruction has two.
    """
    most = max(len(rows) for rows in data.datasets.values())
    if most < 2:
        raise PromptEmbedderError(
            "no instruction has two rows to tell apart; give more training rows (with and without `neg` count apart)"
        )
    return most


def check_settings(settings: TrainingConfig, layout: Layout, *, scored: bool, texts: bool = False) -> None:
    """Refuse settings that contradict each other, before anything is read or made.

    Args:
        settings: how to train.
        layout: of the model.
        scored: whether there are dev pairs.
        texts: whether there are plain texts for a teacher.

    Raises:
        PromptEmbedderError: they do, or an argument of the trainer cannot be set.
    """
    check_arguments(settings.arguments)
    if settings.early_stop_patience is not None and not scored:
        raise PromptEmbedderError("training.early_stop_patience needs evaluation.dev")
    if settings.text_state_cache is not None and layout != "suffix":
        raise PromptEmbedderError(
            f"training.text_state_cache needs model.layout 'suffix', found {layout!r}: there a text's states "
            "depend on the soft prompt"
        )
    if texts and settings.teacher is None:
        raise PromptEmbedderError("data.texts needs training.teacher, the model that they are embedded by")
    if settings.text_state_folder is not None and settings.text_state_cache is None:
        raise PromptEmbedderError("training.text_state_folder needs training.text_state_cache, its size")
    model = Path(settings.output) / "model"
    if settings.text_state_folder is not None and Path(settings.text_state_folder).resolve().is_relative_to(
        model.resolve()
    ):
        raise PromptEmbedderError(
            f"training.text_state_folder {settings.text_state_folder} lies in {model}, which is replaced; choose "
            "another folder"
        )
    refuse_foreign(model)


def check_data(settings: TrainingConfig, data: TrainingData) -> None:
    """Refuse rows that the settings cannot be applied to.

    Raises:
        PromptEmbedderError: the loss cannot take these rows, no instruction has two, or workers cannot share a batch.
    """
    check_losses(settings, data)
    largest(data)
    if workers.count() > 1:
        workers.check(settings.batch_size, rows_for_batches(data, settings.batch_size))


def warn_of_small_batches(settings: TrainingConfig, data: TrainingData) -> None:
    """Warn if batches hold fewer rows than `batch_size`, for want of rows or because texts repeat."""
    if (most := largest(data)) < settings.batch_size:
        logger.warning("training.batch_size is %d, but batches hold %d: no more rows", settings.batch_size, most)
    rows_for_batches(data, settings.batch_size)


def rows_for_batches(data: TrainingData, batch_size: int) -> dict[str, int]:
    """Rows of each dataset; where texts that repeat leave no full batch, as many as go together.

    Warn if batches hold far fewer rows than `batch_size`. A batch of rows with in-batch negatives holds a text once,
    and an epoch has as many batches as rows that are all different would fill.
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
    """A bound on the rows in `batches` batches: each holds every text of a column once, also the commonest one."""
    by_column = (sum(min(found, batches) for found in counts.values()) for counts in columns)
    return max(1, min(rows - times + min(times, batches), *by_column))


def check_losses(config: TrainingConfig, data: TrainingData) -> None:
    """Refuse what a loss cannot do with these rows, before a model is opened.

    Raises:
        PromptEmbedderError: a cached loss where rows do without in-batch negatives; several hard negatives a row where
            false negatives are masked without a cache.
    """
    several = any("negative_2" in rows.column_names for rows in data.datasets.values())
    if several and config.mask_false_negatives and config.loss == "infonce":
        raise PromptEmbedderError(
            "training.mask_false_negatives takes one hard negative a row: set data.max_negatives=1, or "
            "training.loss=cached_infonce"
        )
    if data.own_negatives and config.loss == "cached_infonce":
        raise PromptEmbedderError(
            "training.loss cached_infonce is for large batches of in-batch negatives; take infonce, or leave "
            "in_batch_negatives and contrast_in_batch_negatives on"
        )
