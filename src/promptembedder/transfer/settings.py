"""How a trained model moves to another backbone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import ClassVar, Literal

from pydantic.dataclasses import dataclass

from promptembedder.config import RULES, PositiveFloat, PositiveInt, Retired, retired
from promptembedder.data.settings import DataConfig
from promptembedder.model.settings import Precision
from promptembedder.training.settings import EvaluationConfig, TrainingConfig

# Closed-form starts.
StartName = Literal["ridge", "weighted", "mixture"]


@dataclass(frozen=True, kw_only=True, config=RULES)
class TransferConfig:
    """How a trained model moves to another backbone.

    Attributes:
        backbone: the new Embedding LLM: short name, folder, .gguf file or hub id.
        backbone_revision: hub commit of it.
        dtype: of its weights; unset: as the old model's.
        starts: closed-form alignments to choose from, by name; empty: all that there are.
        data: labelled rows to train the alignment on; no files: none.
        texts: files of plain texts, on which the new model learns to agree with the old one, before any rows.
        text_instructions: under which they are read; empty: the evaluation's, if there is one, the model's default
            one and that of its documents.
        max_texts: train on at most this many, and no more than the steps take.
        distillation_learning_rate: of W and whatever else is trained with it, on texts. Unset: as on rows
            (`training.alignment_learning_rate`), and a quarter of it where embeddings are centred. Scaled as that one.
        training: steps, batch and learning rate of the alignment; the prompter stays as it is.
        centred: subtract from the new model's embeddings their mean over some of the texts or rows
            (`ModelConfig.centred`). Unset: where there are some and no row is trained on. The closed form is better
            with it and so is W on plain texts, W on rows is not (docs/research-log.md).
        evaluation: dev pairs to choose and report by; test pairs for the last figure.
    """

    backbone: str
    backbone_revision: str | None = None
    dtype: Precision | None = None
    starts: tuple[StartName, ...] = ()
    data: DataConfig = field(default_factory=DataConfig)
    texts: tuple[str, ...] = ()
    text_instructions: tuple[str, ...] = ()
    max_texts: PositiveInt = 4096
    distillation_learning_rate: PositiveFloat | None = None
    training: TrainingConfig = field(default_factory=lambda: TrainingConfig(output="runs/transfer"))
    centred: bool | None = None
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    RETIRED: ClassVar[Mapping[str, Retired]] = {
        "backbone_layers": retired(None, advice="all layers are read"),
        "distillation_temperature": retired(0.05, advice="it is 0.05"),
        "unfrozen_steps": retired(0, advice="train the moved model further: promptembedder train --from"),
    }

    @property
    def has_data(self) -> bool:
        """Whether there are rows or texts."""
        return self.data.has_rows or bool(self.texts)

    @property
    def trains(self) -> bool:
        """Whether anything is trained, not only fitted in closed form."""
        return self.training.max_steps > 0 and self.has_data

    @property
    def centres(self) -> bool:
        """Whether embeddings are centred."""
        trains_on_rows = self.data.has_rows and self.trains
        return self.has_data and (not trains_on_rows if self.centred is None else self.centred)

    @property
    def learning_rate_on_texts(self) -> float:
        """`distillation_learning_rate`, or what it is where it is unset."""
        on_rows = self.training.alignment_learning_rate
        return self.distillation_learning_rate or (on_rows / 4 if self.centres else on_rows)
