"""Embeddings without the mean of a sample."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from conftest import INSTRUCTION, SECOND, TEXTS
from promptembedder import build
from promptembedder.data.rows import load_training_data
from promptembedder.training.train import train
from promptembedder.transfer.centring import centre, sample_of_rows


@pytest.mark.parametrize("option", [{}, {"condition_on": "instruction_and_text"}, {"instruction_guidance": 1.5}])
def test_centred_embeddings_have_the_samples_mean_taken_away(tiny_model, option):
    module = tiny_model(linear_head=True, **option)[0]
    sample = [(text, (INSTRUCTION, SECOND)[n % 2]) for n, text in enumerate(TEXTS)]

    def one_by_one():
        with torch.no_grad():
            found = [module(module.preprocess([text], prompt=how))["sentence_embedding"][0] for text, how in sample]
        return torch.stack(found)

    before_BE = one_by_one()
    assert before_BE.mean(0).norm() > 0.1
    centre(module, sample)
    assert torch.allclose(one_by_one(), before_BE - before_BE.mean(0), atol=1e-5)
    centre(module, sample)  # of what the embeddings are without it
    assert torch.allclose(module.centre_E, before_BE.mean(0), atol=1e-5)
    module.subtract(None)
    assert torch.equal(one_by_one(), before_BE)


def test_training_centres_on_its_rows_once(run_config):
    config = run_config(model={"centred": True}, alignment_learning_rate=1e-2)
    found = train(config)
    plain = build(config.model, seed=config.training.seed)[0]
    plain.subtract(None)
    data = load_training_data(config.data, config.model.document_instruction, config.training.seed)
    texts = [
        (t, data.prompts[name][end])
        for name, rows in data.datasets.items()
        for end in ("anchor", "positive")
        for t in rows[end]
    ]
    with torch.no_grad():
        every = [plain(plain.preprocess([t], prompt=how))["sentence_embedding"][0] for t, how in texts]
    centre_E = torch.stack(every).mean(0)
    assert torch.allclose(found.model[0].centre_E, centre_E, atol=1e-5)
    # What has learnt before keeps the centre that it learnt with.
    given = train(run_config("given", model={"centred": True}), model=build(config.model, seed=config.training.seed))
    assert torch.allclose(given.model[0].centre_E, centre_E, atol=1e-5)
    again = train(run_config("again", alignment_learning_rate=1e-2), start=found.folder)
    assert torch.equal(again.model[0].centre_E, found.model[0].centre_E)
    assert not torch.equal(again.model[0].alignment.weight, found.model[0].alignment.weight)


def test_made_up_rows_are_centred_on_where_there_are_no_others(run_config):
    files = run_config().data
    both, alone = (load_training_data(replace(d, contrast_rows=60), "", 1) for d in (files, replace(files, files=())))
    real = {t for rows in load_training_data(files, "", 1).datasets.values() for t in rows["anchor"]}
    positives = {t for rows in load_training_data(files, "", 1).datasets.values() for t in rows["positive"]}
    drawn = {text for text, _ in sample_of_rows(both, 1)}
    assert drawn & real
    assert drawn & positives
    assert drawn <= real | positives
    assert len(sample_of_rows(alone, 1)) == 60  # 30 twos, both ends
    assert {how for _, how in sample_of_rows(alone, 1)} <= set(alone.instructions)
