"""Training on tiny LLMs: what moves, what must not, and that resuming and leaves change nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import promptembedder
from conftest import INSTRUCTION, TEXTS, assert_same_embeddings, assert_same_model
from promptembedder import PromptEmbedderError, build, load, save
from promptembedder.data.rows import load_training_data
from promptembedder.model.leaves import TrainingState
from promptembedder.model.module import SoftPromptTransformer
from promptembedder.training.evaluators import pair_evaluator
from promptembedder.training.fit import fit
from promptembedder.training.losses import make_loss
from promptembedder.training.settings import load_run
from promptembedder.training.train import train


def state_of(model, kind):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad == (kind == "trained")}


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["prefix", "suffix"])
def test_training_moves_prompter_and_alignment_and_nothing_else(run_config, layout):
    config = run_config(model={"layout": layout})
    start = build(config.model, device="cpu", seed=config.training.seed)
    frozen, trained = state_of(start, "frozen"), state_of(start, "trained")
    result = train(config)
    model = result.model
    assert all(torch.equal(frozen[n], p) for n, p in model.named_parameters() if n in frozen)
    moved = {n.split(".")[1] for n, p in model.named_parameters() if n in trained and not torch.equal(trained[n], p)}
    assert moved == {"prompter", "alignment"}
    assert not model[0].backbone.lm.training
    assert result.steps == 4
    assert set(result.scores) == {"test"}
    loaded = promptembedder.load(result.folder, device="cpu")
    assert_same_model(model, loaded)
    assert_same_embeddings(loaded.encode(TEXTS, prompt=INSTRUCTION), model.encode(TEXTS, prompt=INSTRUCTION))


@pytest.mark.slow
def test_alignment_alone(run_config):
    config = run_config(train_prompter=False)
    before = dict(build(config.model, device="cpu", seed=config.training.seed).named_parameters())
    model = train(config).model
    moved = [n for n, p in model.named_parameters() if not torch.equal(before[n], p)]
    assert moved == ["0.alignment.weight"]


@pytest.mark.slow
def test_full_prompter_leaves_the_backbone_alone(run_config):
    config = run_config(model={"prompter_training": "full"})
    start = build(config.model, device="cpu", seed=config.training.seed)[0]
    before, prompter = dict(start.backbone.named_parameters()), dict(start.prompter.named_parameters())
    model = train(config).model
    assert all(torch.equal(before[n], p) for n, p in model[0].backbone.named_parameters())
    assert any(not torch.equal(prompter[n], p) for n, p in model[0].prompter.named_parameters())


def test_training_lowers_the_loss(run_config):
    config = run_config(max_steps=25, alignment_learning_rate=1e-2, arguments={"save_steps": 25})
    columns = [[f"{text} {n}" for n, text in enumerate(TEXTS)], [f"{n} {text}" for n, text in enumerate(TEXTS)]]

    def loss(model):
        features = [model.preprocess(column, prompt=INSTRUCTION) for column in columns]
        with torch.no_grad():
            return float(make_loss(model, config.training)(features, None))

    before = loss(build(config.model, device="cpu", seed=config.training.seed))
    result = train(config)
    assert loss(result.model) < 0.9 * before
    norms = [line["grad_norm"] for line in result.history if "grad_norm" in line]
    assert len(norms) == 25
    assert min(norms) > 0


@pytest.mark.slow
def test_what_a_saved_model_keeps_of_its_own_is_said(run_config, caplog):
    start = train(run_config("first", max_steps=1)).folder
    caplog.clear()
    train(run_config("second", max_steps=1), start=start)
    assert "section model is not taken" not in caplog.text
    train(run_config("third", max_steps=1, model={"num_soft_tokens": 3}), start=start)
    assert f"{start} keeps its own num_soft_tokens; the run's section model is not taken" in caplog.text


@pytest.mark.slow
def test_what_weights_do_not_depend_on_may_be_changed(run_config, caplog):
    start = train(run_config("first", max_steps=1)).folder
    changed = {
        "default_instruction": "Another.",
        "document_instruction": "To be found.",
        "max_text_tokens": 3,
    }
    trained = train(run_config("second", max_steps=1), start=start, changed=changed)
    assert "section model is not taken" not in caplog.text
    saved = load(trained.folder, device="cpu")
    for model in (trained.model, saved):
        assert {name: getattr(model[0].settings, name) for name in changed} == changed
        assert model.prompts == {"query": "Another.", "document": "To be found."}
        assert model.max_seq_length == 3
    assert saved[0].settings.num_soft_tokens == load(start, device="cpu")[0].settings.num_soft_tokens
    with pytest.raises(PromptEmbedderError, match=r"texts of 5000 tokens.* too long for the backbone"):
        train(run_config("third", max_steps=1), start=start, changed={"max_text_tokens": 5000})
    with pytest.raises(PromptEmbedderError, match="keeps its num_soft_tokens; these may change: "):
        train(run_config("fourth"), start=start, changed={"num_soft_tokens": 3})
    with pytest.raises(PromptEmbedderError, match=r"max_text_tokens = 0: .* greater than or equal to 1"):
        train(run_config("fifth"), start=start, changed={"max_text_tokens": 0})


@pytest.mark.slow
def test_what_has_learnt_before_has_no_warm_start(run_config):
    start = train(run_config("first", max_steps=1)).folder
    tiny = {"prompter_learning_rate": 1e-9, "alignment_learning_rate": 1e-9}
    after = train(run_config("second", max_steps=1, warm_steps=3, **tiny), start=start).model
    before = dict(load(start, device="cpu").named_parameters())
    assert all(torch.allclose(value, before[name], atol=1e-6) for name, value in after.named_parameters())
    with pytest.raises(PromptEmbedderError, match="`changed` holds settings for a saved model"):
        train(run_config("changed"), changed={"max_text_tokens": 3})


@pytest.mark.slow
def test_fit_trains_a_model_in_place(run_config, tmp_path):
    """The loop that runs and transfers share, on rows and pairs that are handed in, with a loss of one's own."""
    config = run_config(evaluation={"dev": "pairs.jsonl"})
    model = build(config.model, device="cpu")
    before = model[0].alignment.weight.detach().clone()
    data = load_training_data(config.data, config.model.document_instruction, seed=1)
    dev = pair_evaluator(config.evaluation, config.data.root, "dev")
    fitted = fit(
        model,
        data,
        config.training,
        loss=make_loss(model, config.training),
        evaluator=dev,
        every_steps=2,
        output=tmp_path / "fit",
    )
    assert fitted.steps == 4
    assert not torch.equal(model[0].alignment.weight, before)
    assert fitted.scores["dev"] == pytest.approx(100 * dev(model)["dev_spearman_cosine"])  # the best weights are there
    assert [steps for steps, _, _ in fitted.curve()] == [8, 16]
    assert {path.name for path in (tmp_path / "fit").glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    assert not (tmp_path / "run").exists()
    assert model[0].training_state == TrainingState()


@pytest.mark.slow
def test_other_users_may_read_a_saved_model(run_config):
    folder = train(run_config(max_steps=1)).folder
    assert {path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file()} == {0o644}


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"loss": "cached_infonce", "mini_batch_size": 2},
        {"matryoshka_dims": (8, 16)},
        {"mask_false_negatives": True},
        {"mask_false_negatives": True, "loss": "cached_infonce", "mini_batch_size": 2},
        {"gradient_accumulation": 2},
    ],
)
def test_variants_run(run_config, changes):
    result = train(run_config(max_steps=2, **changes))
    assert all(np.isfinite(line["loss"]) for line in result.history if "loss" in line)


@pytest.mark.slow
def test_documents_have_the_instruction_of_the_model_that_is_trained(run_config, tiny_model, tmp_path, monkeypatch):
    save(tiny_model(document_instruction="Be found."), tmp_path / "start")
    config = run_config(max_steps=1)
    files = tuple(replace(file, asymmetric=True) for file in config.data.files)
    config = replace(config, data=replace(config.data, files=files))
    asked = []
    whole = SoftPromptTransformer.soft_prompts
    monkeypatch.setattr(
        SoftPromptTransformer, "soft_prompts", lambda self, texts: asked.extend(texts) or whole(self, texts)
    )
    result = train(config, start=tmp_path / "start")
    assert "Be found." in asked
    assert config.model.document_instruction not in asked
    assert load_run(result.folder / "config.yaml").model == result.model[0].settings


def test_output_not_writable(run_config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PromptEmbedderError, match="cannot be written"):
        train(run_config("file/below"))


def test_early_stop_needs_dev(run_config):
    with pytest.raises(PromptEmbedderError, match=r"needs evaluation\.dev"):
        train(run_config(early_stop_patience=2))


def test_no_steps_are_for_transfers(run_config, tmp_path):
    with pytest.raises(PromptEmbedderError, match=r"training\.max_steps is 0, expected at least one step"):
        train(run_config(max_steps=0))
    assert not (tmp_path / "run").exists()
