"""Losses that the settings name, beside naive ones; the rest of them is tried in `test_training.py`."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from conftest import INSTRUCTION, TEXTS
from promptembedder import PromptEmbedderError, build
from promptembedder.data.rows import load_training_data
from promptembedder.data.settings import DataConfig, DataFile
from promptembedder.training.losses import OpposedLoss, make_loss, make_losses, own_negatives_loss, own_similarity
from promptembedder.training.settings import TrainingConfig
from promptembedder.training.train import train


def test_own_candidates_and_no_others():
    anchors_BD, documents_MD = torch.randn(3, 5), torch.randn(9, 5)
    found = own_similarity(anchors_BD, documents_MD)
    for row in range(3):
        for document in range(9):
            expected = torch.cosine_similarity(anchors_BD[row], documents_MD[document], dim=0)
            assert float(found[row, document]) == pytest.approx(
                float(expected) if document in (row, row + 3, row + 6) else -math.inf, abs=1e-6
            )


@pytest.mark.parametrize("negatives", [1, 2])
def test_own_negatives_loss_is_each_rows_cross_entropy(tiny_model, negatives):
    model = tiny_model()
    columns = [TEXTS[:3], TEXTS[1:4], TEXTS[2:5], TEXTS[:1] * 3][: 2 + negatives]
    features = [model.preprocess(column, prompt=INSTRUCTION) for column in columns]
    loss = own_negatives_loss(model, TrainingConfig(temperature=0.1))(features, None)
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    naive = []
    for row in zip(*columns, strict=True):
        anchor, positive, *others = (torch.tensor(e) for e in model.encode(list(row), prompt=INSTRUCTION))
        weights = [math.exp(float(anchor @ text) / 0.1) for text in (positive, *others)]
        naive.append(-math.log(weights[0] / sum(weights)))
    assert float(loss.detach()) == pytest.approx(sum(naive) / 3, rel=1e-3)


def rows_file(folder, name, instruction):
    rows = [
        {
            "query": f"{TEXTS[n % 5]} {n}",
            "pos": [TEXTS[(n + 1) % 5]],
            "neg": [TEXTS[(n + 2) % 5]],
            "instruction": instruction,
        }
        for n in range(12)
    ]
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_only_the_sources_that_say_so_do_without_in_batch_negatives(tiny_model, tmp_path):
    files = (
        DataFile(path=rows_file(tmp_path, "many.jsonl", "Find it.")),
        DataFile(path=rows_file(tmp_path, "few.jsonl", "Tell the class."), in_batch_negatives=False),
    )
    settings = {"files": files, "contrast_rows": 60, "contrast_in_batch_negatives": False}
    data = load_training_data(DataConfig(**settings), "Be found.", seed=1)
    made = make_losses(tiny_model(), TrainingConfig(), data)
    assert isinstance(made, dict)
    assert set(made) == set(data.datasets)
    in_batch = [
        data.prompts[name]["anchor"]
        for name, loss in made.items()
        if getattr(loss, "one", loss).similarity_fct is not own_similarity
    ]
    assert in_batch == ["Find it."]
    assert {name for name, loss in made.items() if isinstance(loss, OpposedLoss)} == data.opposed
    everywhere = load_training_data(DataConfig(files=files[:1]), "Be found.", seed=1)
    assert isinstance(make_losses(tiny_model(), TrainingConfig(), everywhere), MultipleNegativesRankingLoss)
    alone = load_training_data(DataConfig(contrast_rows=60), "Be found.", seed=1)
    assert isinstance(make_losses(tiny_model(), TrainingConfig(), alone), OpposedLoss)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["infonce", "cached_infonce"])
def test_opposed_rows_have_the_mean_of_both_rows_losses(tiny_model, kind):
    """Gradients too, beside two losses computed one after the other."""
    model = tiny_model()
    data = load_training_data(DataConfig(contrast_rows=200), "Be found.", seed=1)
    config = TrainingConfig(loss=kind, mini_batch_size=2)
    name, rows = next((n, rows[:3]) for n, rows in data.datasets.items() if len(rows) >= 3)
    columns = {column: model.preprocess(rows[column], prompt=data.prompts[name][column]) for column in rows}
    loss = make_losses(model, config, data)(list(columns.values()), None)
    loss.backward()
    weight = model[0].alignment.weight
    together, weight.grad = weight.grad.clone(), None
    separate = []
    for mark in ("", "other_"):
        asked = [columns[f"{mark}{column}"] for column in ("anchor", "positive", "negative_1")]
        separate.append(make_loss(model, replace(config, loss="infonce"))(asked, None))
    (sum(separate) / 2).backward()
    assert float(loss.detach()) == pytest.approx(float(sum(separate).detach()) / 2, rel=1e-4)
    assert float(separate[0].detach()) != pytest.approx(float(separate[1].detach()), rel=1e-3)
    torch.testing.assert_close(together, weight.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("matryoshka", [(), (8, 32)])
def test_training_with_both_kinds(run_config, tmp_path, monkeypatch, matryoshka):
    """Both losses are in use, and every weight has its own learning rate, as with one loss."""
    calls = []
    monkeypatch.setattr(
        "promptembedder.training.losses.own_similarity", lambda *of: calls.append(len(of[0])) or own_similarity(*of)
    )
    files = (
        DataFile(path=rows_file(tmp_path, "many.jsonl", "Find it.")),
        DataFile(path=rows_file(tmp_path, "few.jsonl", "Tell the class."), in_batch_negatives=False),
    )
    rates = {"alignment_learning_rate": 1e-3, "prompter_learning_rate": 1e-5, "warmup": 0}
    config = run_config(max_steps=4, batch_size=4, matryoshka_dims=matryoshka, **rates)
    config = replace(config, data=replace(config.data, files=files))
    before = dict(build(config.model, seed=config.training.seed).named_parameters())
    result = train(config)
    assert all(math.isfinite(line["loss"]) for line in result.history if "loss" in line)
    assert calls
    assert len(calls) < 4 * max(len(matryoshka), 1)
    moved = {n: float((p - before[n]).detach().abs().max()) for n, p in result.model.named_parameters()}
    assert moved["0.alignment.weight"] > 10 * max(size for name, size in moved.items() if "prompter" in name) > 0


def test_prefixes_are_trained_besides_the_whole_embedding(tiny_model):
    model = tiny_model()
    columns = [model.preprocess(texts, prompt=INSTRUCTION) for texts in (TEXTS[:3], TEXTS[1:4])]
    nested = make_loss(model, TrainingConfig(matryoshka_dims=(8, 16), temperature=0.05))
    found = float(nested(columns, None).detach())
    naive = 0.0
    anchors, positives = (torch.tensor(model.encode(texts, prompt=INSTRUCTION)) for texts in (TEXTS[:3], TEXTS[1:4]))
    for width in (8, 16, 32):
        cosines = torch.cosine_similarity(anchors[:, None, :width], positives[None, :, :width], dim=-1)
        naive += float(torch.nn.functional.cross_entropy(20 * cosines, torch.arange(3)))
    assert found == pytest.approx(naive, rel=1e-3)


@pytest.mark.slow
def test_masking_takes_one_hard_negative(run_config, tmp_path):
    rows = [
        {"query": text, "pos": [f"{text} {n}"], "neg": TEXTS[:2], "instruction": INSTRUCTION}
        for n, text in enumerate(TEXTS)
    ]
    (tmp_path / "two.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = run_config(mask_false_negatives=True, max_steps=1)
    data = replace(config.data, files=(DataFile(path="two.jsonl"),), max_negatives=2)
    with pytest.raises(PromptEmbedderError, match=r"takes one hard negative a row: set data.max_negatives=1, or"):
        train(replace(config, data=data))
    assert not (tmp_path / "run").exists()
    train(replace(config, data=data, training=replace(config.training, loss="cached_infonce")))


def test_not_beside_the_cached_loss(run_config, tmp_path):
    config = run_config(loss="cached_infonce")
    config = replace(config, data=DataConfig(root=str(tmp_path), contrast_rows=60, contrast_in_batch_negatives=False))
    with pytest.raises(PromptEmbedderError, match="cached_infonce is for large batches of in-batch negatives"):
        train(config)
    assert not (tmp_path / "run").exists()


def test_matryoshka_wider_than_the_embedding(tiny_model):
    with pytest.raises(PromptEmbedderError, match="holds 64, the embedding has 32"):
        make_loss(tiny_model(), TrainingConfig(matryoshka_dims=(64,)))


@pytest.mark.parametrize("kind", ["infonce", "cached_infonce"])
def test_masked_false_negatives_do_not_count(tiny_model, kind):
    """Those that the model finds closer to the anchor than its positive; beside a naive loss over the others."""
    model = tiny_model()
    # No negative is the positive of its own row: rounding would decide which of the two is closer.
    columns = (TEXTS[:3], TEXTS[2:5], [TEXTS[0], TEXTS[1], f"{TEXTS[4]}, too"])
    features = [model.preprocess(texts, prompt=INSTRUCTION) for texts in columns]
    masked = make_loss(model, TrainingConfig(mask_false_negatives=True, loss=kind, temperature=0.1))
    anchors, positives, negatives = (torch.tensor(model.encode(texts, prompt=INSTRUCTION)) for texts in columns)
    naive, left_out = [], 0
    for n, anchor in enumerate(anchors):
        own = float(anchor @ positives[n])
        others = [*(anchor @ p for i, p in enumerate(positives) if i != n), *(anchor @ text for text in negatives)]
        kept = [float(cosine) for cosine in others if float(cosine) <= own]
        left_out += len(others) - len(kept)
        naive.append(-math.log(math.exp(own / 0.1) / sum(math.exp(c / 0.1) for c in (own, *kept))))
    assert 0 < left_out < 15
    with torch.no_grad():
        assert float(masked(features, None)) == pytest.approx(sum(naive) / 3, rel=1e-3)
