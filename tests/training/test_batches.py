"""Batches: whole where rows have their own negatives, small ones are warned of, rows are truncated."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from sentence_transformers.base.sampler import NoDuplicatesBatchSampler

from conftest import SECOND, TEXTS
from promptembedder.data.rows import TrainingData
from promptembedder.data.settings import DataConfig, DataFile
from promptembedder.model.module import SoftPromptTransformer
from promptembedder.training.checks import rows_for_batches
from promptembedder.training.settings import EvaluationConfig
from promptembedder.training.train import train


def few_classes(folder, own_negatives):
    """Rows of two classes, each with the other one as its negative."""
    labels = ("That is praise.", "That is blame.")
    rows = [
        {"query": f"{TEXTS[n % 5]} {n}", "pos": [labels[n % 2]], "neg": [labels[1 - n % 2]], "instruction": SECOND}
        for n in range(24)
    ]
    (folder / "classes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataConfig(root=str(folder), files=(DataFile(path="classes.jsonl", in_batch_negatives=not own_negatives),))


@pytest.mark.slow
@pytest.mark.parametrize("own_negatives", [True, False])
def test_batches_of_rows_that_share_texts(run_config, tmp_path, monkeypatch, caplog, own_negatives):
    """Whole where rows have only their own negatives; else a text stands in a batch once, which is said."""
    config = replace(run_config(max_steps=3, batch_size=8), data=few_classes(tmp_path, own_negatives))
    sizes = []
    made = SoftPromptTransformer.forward
    monkeypatch.setattr(
        SoftPromptTransformer,
        "forward",
        lambda self, features: sizes.append(len(features["input_ids"])) or made(self, features),
    )
    train(replace(config, evaluation=EvaluationConfig()))
    assert set(sizes) == ({8, 16} if own_negatives else {1, 2})  # anchors, documents
    said = "batches hold about 1 rows, because a batch holds a text once ('That is praise.' stands in 24 of 24)"
    assert (said in caplog.text) != own_negatives


@pytest.mark.parametrize(("often", "small"), [(100, False), (700, True)])
def test_one_text_in_many_rows(caplog, monkeypatch, often, small):
    """Beside the batches that the library's sampler makes."""
    rows = {
        "anchor": [f"a {n}" for n in range(1000)],
        "positive": ["yes"] * often + [f"p {n}" for n in range(often, 1000)],
    }
    data = TrainingData(DatasetDict({"task": Dataset.from_dict(rows)}), {"task": {"anchor": "Answer."}})
    sampler = NoDuplicatesBatchSampler(data.datasets["task"], 48, drop_last=False, generator=torch.Generator())
    batches = [len(batch) for batch in itertools.islice(sampler, 1000 // 48)]
    assert (np.mean(batches) < 24) == small
    assert rows_for_batches(data, 48) == {"task (Answer.)": 1000}  # some batches are full: workers can share these
    assert max(batches) == 48
    assert ("batches hold about 16 rows" in caplog.text) == small
    assert ("a batch holds a text once" in caplog.text) == small
    assert rows_for_batches(data, 400) == {"task (Answer.)": 1000 if often == 100 else 301}


@pytest.mark.slow
def test_batches_smaller_than_asked_for_are_said(run_config, caplog):
    train(run_config("small", max_steps=1))
    assert "training.batch_size" not in caplog.text
    train(run_config("large", max_steps=1, batch_size=4000))
    assert "training.batch_size is 4000, but batches hold" in caplog.text


@pytest.mark.slow
def test_rows_are_cut_and_dev_is_not(run_config, monkeypatch):
    seen = []
    tokenise = SoftPromptTransformer.preprocess

    def watched(module, inputs, prompt=None, **kwargs):
        features = tokenise(module, inputs, prompt, **kwargs)
        seen.append(features["input_ids"].shape[1])
        return features

    monkeypatch.setattr(SoftPromptTransformer, "preprocess", watched)
    evaluation = {"dev": "pairs.jsonl", "every_steps": 1, "test": None}
    config = run_config(max_steps=2, evaluation=evaluation, model={"text_template": "{text}"})
    tokenizer = train(replace(config, data=replace(config.data, max_text_tokens=1))).model.tokenizer
    longest = max(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in TEXTS)
    assert 1 in seen  # rows
    assert longest in seen  # dev pairs; rows have a number more
