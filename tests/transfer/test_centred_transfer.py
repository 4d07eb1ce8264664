"""Centred transfers: on which texts, and what stays with the old backbone."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from conftest import INSTRUCTION, TEXTS
from promptembedder import load
from promptembedder.training.evaluators import pair_evaluator
from promptembedder.transfer.transfer import transfer

pytestmark = pytest.mark.slow
# The module: `promptembedder.transfer.transfer` names its function, too.
PLACE = sys.modules[transfer.__module__]


def test_the_mean_is_over_more_texts_than_a_few_steps_take(tiny_model, transfer_config, tmp_path, monkeypatch):
    (tmp_path / "texts.txt").write_text("\n".join(f"{text} {n}" for n in range(4) for text in TEXTS))
    counts = []
    for name in ("centre", "distillation_rows"):
        made = getattr(PLACE, name)
        monkeypatch.setattr(PLACE, name, lambda m, some, *a, made=made: counts.append(len(some)) or made(m, some, *a))
    settings = transfer_config(
        texts=("texts.txt",), training={"max_steps": 1}, evaluation={"dev": None}, starts=("ridge",)
    )
    transfer(tiny_model("llama"), settings)
    assert counts == [4 * len(TEXTS), 4]  # a batch of four is all that the old model reads


@pytest.mark.parametrize("layout", ["suffix", "prefix"])
def test_a_closed_form_is_centred_on_plain_texts_without_any_training(tiny_model, transfer_config, tmp_path, layout):
    texts = [f"{text} {n}" for n in range(4) for text in TEXTS]
    (tmp_path / "plain.txt").write_text("".join(f"{text}\n" for text in texts))
    # Not a text with itself: which of these pairs is closest, the last digit decides.
    pairs = [{"sentence1": a, "sentence2": b, "score": len(a)} for a in TEXTS for b in TEXTS if a < b]
    (tmp_path / "different.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    settings = transfer_config(
        training={"max_steps": 0},
        evaluation={"dev": "different.jsonl"},
        texts=(str(tmp_path / "plain.txt"),),
        text_instructions=(INSTRUCTION,),
    )
    old = tiny_model("llama", layout=layout)
    result = transfer(old, settings)
    assert [stage.name for stage in result.stages] == ["closed_form"]
    opened = load(result.folder)[0]
    assert opened.centred
    opened.subtract(None)
    with torch.no_grad():
        features = [opened(opened.preprocess([text], prompt=INSTRUCTION)) for text in texts]
    plain_BE = torch.cat([f["sentence_embedding"] for f in features])
    assert torch.allclose(result.model[0].centre_E, plain_BE.mean(0), atol=1e-5)
    centred_BE = torch.nn.functional.normalize(plain_BE - plain_BE.mean(0), dim=-1)
    assert np.allclose(load(result.folder).encode(texts, prompt=INSTRUCTION), centred_BE, atol=1e-4)
    assert "are centred on" in (result.folder.parent / "report.md").read_text()
    # Every start is scored as it would be used.
    assert result.stages[0].dev == pytest.approx(100 * dev_of(result, settings), abs=1e-4)
    assert not transfer(old, replace(settings, centred=False)).model[0].centred


def dev_of(result, settings):
    evaluator = pair_evaluator(settings.evaluation, settings.data.root, "dev")
    return evaluator(load(result.folder))["dev_spearman_cosine"]


def test_a_centre_belongs_to_the_old_backbone(tiny_model, transfer_config, tmp_path, caplog):
    old = tiny_model("llama")
    old[0].subtract(torch.ones(old[0].get_embedding_dimension()))
    assert not transfer(old, transfer_config()).model[0].centred
    assert "the mean that the model subtracts belongs to its backbone" in caplog.text
    assert not transfer(old, transfer_config(rows=True)).model[0].centred
    trained = transfer(old, transfer_config(rows=True, centred=True))
    new = trained.model[0]
    assert new.centred
    assert new.centre_E.norm() > 0
    assert torch.equal(load(trained.folder)[0].centre_E, new.centre_E)
    assert torch.equal(old[0].centre_E, torch.ones(old[0].get_embedding_dimension()))
    (tmp_path / "texts.txt").write_text("\n".join(f"{text} {n}" for n in range(4) for text in TEXTS))
    for rows in (False, True):
        both = transfer(old, transfer_config(rows=rows, texts=("texts.txt",)))
        assert both.model[0].centred is not rows
