"""Sources of training rows."""

from __future__ import annotations

from pydantic.dataclasses import dataclass

from promptembedder.config import RULES, Count, PositiveFloat, PositiveInt


@dataclass(frozen=True, kw_only=True, config=RULES)
class DataFile:
    """One source of training rows.

    Attributes:
        path: .jsonl, .jsonl.gz, .parquet, or `hub:owner/name` (split `train`).
        weight: how often its batches are drawn relative to its size.
        instruction: for rows without one.
        asymmetric: documents (`pos`, `neg`) get the model's document instruction, not the row's.
        max_rows: use this many rows, the first ones in file order.
        aspect: one word for what texts are alike in under the instruction, such as `intent`; see `WarmStartConfig`.
        in_batch_negatives: a row's candidates are all documents of its batch; off: its own positive and negatives
            alone, for rows of so few classes that many of the others are as right. Each row needs a `neg` then, and
            `TrainingConfig.loss` is not the cached one.
    """

    path: str
    weight: PositiveFloat = 1.0
    instruction: str | None = None
    asymmetric: bool = False
    max_rows: PositiveInt | None = None
    aspect: str | None = None
    in_batch_negatives: bool = True


@dataclass(frozen=True, kw_only=True, config=RULES)
class DataConfig:
    """Training rows.

    Attributes:
        root: folder that relative paths start from; unset: `$PROMPTEMBEDDER_DATA`, else the current folder.
        files: the sources; batches never mix instructions.
        contrast_rows: number of made-up rows besides, in which the instruction alone decides what is alike
            (`promptembedder.contrast`); they always have a hard negative. They come in twos, one anchor under two
            instructions in one batch, so a batch holds twice as many; an odd one is left out. About 70 instructions
            share them.
        contrast_in_batch_negatives: as `DataFile.in_batch_negatives`, of the made-up rows.
        max_negatives: hard negatives used per row, at least one where in-batch negatives are off; with them a row that
            has fewer repeats its own.
        max_text_tokens: cut texts here while training; unset: where the model cuts them. Cheaper steps, and layout
            `suffix` reads longer texts afterwards all the same.
        texts: files of plain texts for `TrainingConfig.teacher`.
        strict: refuse a row with `pos` equal to `query`, `neg` equal to `pos` or, if not asymmetric, `neg` equal to
            `query`; off: such rows are counted in a warning, and trained on.
    """

    files: tuple[DataFile, ...] = ()
    root: str | None = None
    texts: tuple[str, ...] = ()
    contrast_rows: Count = 0
    contrast_in_batch_negatives: bool = True
    max_negatives: Count = 1
    max_text_tokens: PositiveInt | None = None
    strict: bool = False

    @property
    def has_rows(self) -> bool:
        """Whether there is anything to train on."""
        return bool(self.files or self.contrast_rows)
