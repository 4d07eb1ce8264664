"""What a transfer reads before it begins: rows, texts and scored pairs."""

from __future__ import annotations

import random
from dataclasses import dataclass

from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator

from promptembedder.data.readers import data_path
from promptembedder.data.rows import TrainingData, load_training_data
from promptembedder.data.texts import read_texts
from promptembedder.errors import PromptEmbedderError
from promptembedder.training.checks import check_losses, largest
from promptembedder.training.evaluators import pair_evaluator
from promptembedder.transfer.centring import FEWEST
from promptembedder.transfer.settings import TransferConfig


@dataclass(frozen=True)
class Inputs:
    """What a transfer reads before it begins.

    Attributes:
        texts: plain texts, all different.
        drawn: those of them to train on.
        rows: labelled ones.
        dev: scores dev pairs.
        test: scores test pairs.
    """

    texts: list[str]
    drawn: list[str]
    rows: TrainingData | None
    dev: EmbeddingSimilarityEvaluator | None
    test: EmbeddingSimilarityEvaluator | None

    @classmethod
    def read(cls, config: TransferConfig, document_instruction: str) -> Inputs:
        """Read and check everything; documents of rows have the document instruction."""
        dev, test = (pair_evaluator(config.evaluation, config.data.root, part) for part in ("dev", "test"))
        texts = _read_texts(config)
        rows = _read_rows(config, document_instruction)
        if rows is not None:
            check_losses(config.training, rows)
        return cls(texts, _enough(texts, config), rows, dev, test)


def _read_rows(config: TransferConfig, document_instruction: str) -> TrainingData | None:
    if not config.data.has_rows:
        return None
    data = load_training_data(config.data, document_instruction, config.training.seed)
    if config.trains:
        largest(data)
    return data


def _read_texts(config: TransferConfig) -> list[str]:
    texts: list[str] = []
    for source in config.texts:
        texts += [text for _, text in read_texts(str(data_path(source, config.data.root)), None, ids=False)]
    texts = list(dict.fromkeys(texts))
    if config.texts and config.training.max_steps and len(texts) < config.training.batch_size:
        raise PromptEmbedderError(
            f"{len(texts)} different texts for batches of {config.training.batch_size}; give more or smaller batches"
        )
    if config.texts and config.centres and len(texts) < FEWEST:
        raise PromptEmbedderError(
            f"{len(texts)} different texts to centre embeddings on; give at least {FEWEST}, or centred=false"
        )
    return texts


def _enough(texts: list[str], config: TransferConfig) -> list[str]:
    """Those to train on: the old model reads every one of them, so no more than the steps take."""
    steps = config.training.max_steps * config.training.batch_size * config.training.gradient_accumulation
    most = min(config.max_texts, steps or config.max_texts)
    return texts if len(texts) <= most else random.Random(config.training.seed).sample(texts, most)
