"""Embeddings without the mean of a sample."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from conftest import INSTRUCTION, SECOND, TEXTS
from promptembedder import build, load, save
from promptembedder.data.rows import load_training_data
from promptembedder.training.train import train
from promptembedder.transfer.centring import centre, sample_of_rows


def test_centred_embeddings_have_the_samples_mean_taken_away(tiny_model):
    module = tiny_model(linear_head=True)[0]
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


def test_rows_are_centred_on_under_their_instructions(run_config):
    config = run_config()
    module = build(config.model, device="cpu")[0]
    data = load_training_data(config.data, config.model.document_instruction, config.training.seed)
    texts = [
        (text, data.prompts[name][end])
        for name, rows in data.datasets.items()
        for end in ("anchor", "positive")
        for text in rows[end]
    ]
    with torch.no_grad():
        every = [module(module.preprocess([text], prompt=how))["sentence_embedding"][0] for text, how in texts]
    centre(module, sample_of_rows(data, config.training.seed))
    assert torch.allclose(module.centre_E, torch.stack(every).mean(0), atol=1e-5)


@pytest.mark.slow
def test_what_has_learnt_with_a_centre_keeps_it(run_config, tiny_model, tmp_path):
    model = tiny_model()
    model[0].subtract(torch.linspace(0.0, 0.1, 32))
    save(model, tmp_path / "start")
    trained = train(run_config(alignment_learning_rate=1e-2), start=tmp_path / "start")
    assert trained.model[0].centred
    assert torch.equal(trained.model[0].centre_E, model[0].centre_E)
    assert torch.equal(load(trained.folder, device="cpu")[0].centre_E, model[0].centre_E)
    assert not torch.equal(trained.model[0].alignment.weight, model[0].alignment.weight)


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
