"""Training on tiny LLMs: what moves, what must not, and that resuming and leaves change nothing."""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from sentence_transformers.base.sampler import NoDuplicatesBatchSampler
from transformers import TrainerCallback

import promptembedder
from conftest import INSTRUCTION, SECOND, TEXTS, assert_same_embeddings, assert_same_model
from promptembedder import PromptEmbedderError, build, load
from promptembedder.data.rows import TrainingData
from promptembedder.data.settings import DataConfig, DataFile
from promptembedder.model.leaves import SoftPromptLeaves
from promptembedder.model.module import SoftPromptTransformer
from promptembedder.model.prompter import Prompter
from promptembedder.training import rates as rates_module
from promptembedder.training.callbacks import SoftPromptLeafCallback
from promptembedder.training.checks import rows_for_batches
from promptembedder.training.curves import read_facts
from promptembedder.training.losses import make_loss
from promptembedder.training.settings import EvaluationConfig, TrainingConfig, load_run
from promptembedder.training.train import train


def state_of(model, kind):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad == (kind == "trained")}


@pytest.mark.parametrize("layout", ["prefix", "suffix"])
def test_training_moves_prompter_and_alignment_and_nothing_else(run_config, layout):
    config = run_config(model={"layout": layout})
    model = build(config.model, device="cpu")
    frozen, trained = state_of(model, "frozen"), state_of(model, "trained")
    result = train(config, model=model)
    assert all(torch.equal(frozen[n], p) for n, p in model.named_parameters() if n in frozen)
    moved = {n.split(".")[1] for n, p in model.named_parameters() if n in trained and not torch.equal(trained[n], p)}
    assert moved == {"prompter", "alignment"}
    assert not model[0].backbone.lm.training
    assert result.steps == 4
    assert set(result.scores) == {"test"}
    loaded = promptembedder.load(result.folder, device="cpu")
    assert_same_model(model, loaded)
    assert_same_embeddings(loaded.encode(TEXTS, prompt=INSTRUCTION), model.encode(TEXTS, prompt=INSTRUCTION))


def test_alignment_alone(run_config):
    config = run_config(train_prompter=False)
    model = build(config.model, device="cpu")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    train(config, model=model)
    moved = [n for n, p in model.named_parameters() if not torch.equal(before[n], p)]
    assert moved == ["0.alignment.weight"]


def test_full_prompter_leaves_the_backbone_alone(run_config):
    config = run_config(model={"prompter_training": "full"})
    model = build(config.model, device="cpu")
    before = {n: p.detach().clone() for n, p in model[0].backbone.named_parameters()}
    prompter = {n: p.detach().clone() for n, p in model[0].prompter.named_parameters()}
    train(config, model=model)
    assert all(torch.equal(before[n], p) for n, p in model[0].backbone.named_parameters())
    assert any(not torch.equal(prompter[n], p) for n, p in model[0].prompter.named_parameters())


def test_training_lowers_the_loss(run_config):
    config = run_config(max_steps=25, alignment_learning_rate=1e-2, save_every_steps=25)
    model = build(config.model, device="cpu")
    columns = [[f"{text} {n}" for n, text in enumerate(TEXTS)], [f"{n} {text}" for n, text in enumerate(TEXTS)]]

    def loss():
        features = [model.preprocess(column, prompt=INSTRUCTION) for column in columns]
        with torch.no_grad():
            return float(make_loss(model, config.training)(features, None))

    before = loss()
    history = train(config, model=model).history
    assert loss() < 0.9 * before
    norms = [line["grad_norm"] for line in history if "grad_norm" in line]
    assert len(norms) == 25
    assert min(norms) > 0


@pytest.mark.parametrize(("layout", "dtype"), [("prefix", "float32"), ("suffix", "float32"), ("suffix", "bfloat16")])
def test_resumed_equals_uninterrupted(run_config, layout, dtype):
    model = {"layout": layout, "linear_head": layout == "suffix", "centred": True, "dtype": dtype}
    whole = train(run_config("whole", model=model, max_steps=4, save_every_steps=2)).model
    # The same run, stopped after two steps: its schedule must be that of four.
    config = run_config("parts", model=model, max_steps=4, save_every_steps=2)

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 2
            return control

    halfway = train(config, callbacks=[Stop()])
    assert halfway.steps == 2
    resumed = train(config, resume=True)
    assert resumed.steps == 4
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, dict(resumed.model.named_parameters())[name]), name
    assert whole[0].centre_E.any()
    assert torch.equal(whole[0].centre_E, resumed.model[0].centre_E)


@pytest.mark.parametrize("dev", ["pairs.jsonl", None])
def test_a_run_stopped_after_its_last_step(run_config, dev):
    """Only the saved model is missing: no further step is taken, and the best or last weights are there."""
    config = run_config(max_steps=4, save_every_steps=2, evaluation={"dev": dev, "every_steps": 1}, keep_checkpoints=9)
    whole = train(config)
    shutil.rmtree(whole.folder)
    resumed = train(config, resume=True)
    assert (resumed.steps, resumed.scores) == (4, whole.scores)
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(parameter, dict(resumed.model.named_parameters())[name]), name


def test_a_run_from_a_saved_model_goes_on_from_its_checkpoint(run_config, tmp_path):
    """Resumed, it takes the checkpoint's weights, not the start's; the facts still name the start."""
    start = train(run_config("first", max_steps=2)).folder
    config = run_config("second", max_steps=4, save_every_steps=2)
    whole = train(config, start=start)
    shutil.rmtree(whole.folder)
    shutil.rmtree(whole.folder.parent / "checkpoint-4")
    resumed = train(config, start=start, resume=True)
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(parameter, dict(resumed.model.named_parameters())[name]), name
    assert read_facts(resumed.folder)["start"] == str(start)


def test_what_a_saved_model_keeps_of_its_own_is_said(run_config, caplog):
    start = train(run_config("first", max_steps=1)).folder
    caplog.clear()
    train(run_config("second", max_steps=1), start=start)
    assert "section model is not taken" not in caplog.text
    train(run_config("third", max_steps=1, model={"num_soft_tokens": 3}), start=start)
    assert f"{start} keeps its own num_soft_tokens; the run's section model is not taken" in caplog.text


def test_what_weights_do_not_depend_on_may_be_set_anew(run_config, caplog):
    start = train(run_config("first", max_steps=1)).folder
    anew = {
        "default_instruction": "Another.",
        "document_instruction": "To be found.",
        "max_text_tokens": 3,
        "instruction_guidance": 1.5,
    }
    trained = train(run_config("second", max_steps=1), start=start, anew=anew)
    assert "section model is not taken" not in caplog.text
    saved = load(trained.folder, device="cpu")
    for model in (trained.model, saved):
        assert {name: getattr(model[0].settings, name) for name in anew} == anew
        assert model.prompts == {"query": "Another.", "document": "To be found."}
        assert model.max_seq_length == 3
    assert saved[0].settings.num_soft_tokens == load(start, device="cpu")[0].settings.num_soft_tokens
    with pytest.raises(PromptEmbedderError, match=r"texts of 5000 tokens.* too long for the backbone"):
        train(run_config("third", max_steps=1), start=start, anew={"max_text_tokens": 5000})
    with pytest.raises(PromptEmbedderError, match="keeps its num_soft_tokens; anew: "):
        train(run_config("fourth"), start=start, anew={"num_soft_tokens": 3})
    with pytest.raises(PromptEmbedderError, match=r"instruction_guidance = 0.5: .* greater than or equal to 1"):
        train(run_config("fifth"), start=start, anew={"instruction_guidance": 0.5})


def test_a_model_that_is_given_is_taken_as_it_is(run_config, tiny_model, tmp_path):
    model = tiny_model()
    before = {name: value.clone() for name, value in model.named_parameters()}
    config = run_config(max_steps=1, prompter_learning_rate=1e-9, alignment_learning_rate=1e-9, warm_steps=3)
    train(config, model=model)
    assert all(torch.allclose(value, before[name], atol=1e-6) for name, value in model.named_parameters())
    with pytest.raises(PromptEmbedderError, match="anew is for settings of a saved model to start from"):
        train(run_config("anew"), anew={"max_text_tokens": 3})
    with pytest.raises(PromptEmbedderError, match="start and model are both given"):
        train(run_config("both"), model=model, start=tmp_path)


def few_classes(folder, own_negatives):
    """Rows of two classes, each with the other one as its negative."""
    labels = ("That is praise.", "That is blame.")
    rows = [
        {"query": f"{TEXTS[n % 5]} {n}", "pos": [labels[n % 2]], "neg": [labels[1 - n % 2]], "instruction": SECOND}
        for n in range(24)
    ]
    (folder / "classes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataConfig(root=str(folder), files=(DataFile(path="classes.jsonl", in_batch_negatives=not own_negatives),))


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


def test_a_finished_run_whose_folder_has_moved(run_config, tmp_path):
    config = run_config("here", max_steps=2, evaluation={"dev": "pairs.jsonl", "every_steps": 1})
    whole = train(config)
    shutil.rmtree(whole.folder)
    (tmp_path / "here").rename(tmp_path / "there")
    resumed = train(run_config("there", max_steps=2, evaluation={"dev": "pairs.jsonl", "every_steps": 1}), resume=True)
    assert resumed.scores == whole.scores
    assert_same_model(resumed.model, whole.model)


@pytest.mark.parametrize("name", ["dev", "dev_pairs", "instruction"])
def test_a_resumed_run_has_the_dev_scores_it_began_with(run_config, tmp_path, name):
    before = {"dev": "pairs.jsonl", "every_steps": 1}
    whole = train(run_config(max_steps=2, evaluation=before))
    shutil.rmtree(whole.folder)
    shutil.copy(tmp_path / "pairs.jsonl", tmp_path / "others.jsonl")
    other = {"dev": "others.jsonl", "dev_pairs": 7, "instruction": SECOND}[name]
    with pytest.raises(PromptEmbedderError, match=f"began with another evaluation.{name} "):
        train(run_config(max_steps=3, evaluation={**before, name: other}), resume=True)
    changed = {**before, "test": None, "every_steps": 3, "batch_size": 2}
    train(run_config(max_steps=3, evaluation=changed), resume=True)


def test_batches_smaller_than_asked_for_are_said(run_config, caplog):
    train(run_config("small", max_steps=1))
    assert "training.batch_size" not in caplog.text
    train(run_config("large", max_steps=1, batch_size=4000))
    assert "training.batch_size is 4000, but batches hold" in caplog.text


def test_other_users_may_read_a_saved_model(run_config):
    folder = train(run_config(max_steps=1)).folder
    assert {path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file()} == {0o644}


def test_checkpoints_hold_trained_parts_only(run_config, tmp_path):
    train(run_config(save_every_steps=2))
    weights = sorted(p.name for p in (tmp_path / "run" / "checkpoint-2").rglob("*.safetensors"))
    assert weights == ["adapter_model.safetensors", "alignment.safetensors"]


def test_best_on_dev_is_kept_and_early_stop_stops(run_config):
    evaluation = {"dev": "pairs.jsonl", "every_steps": 1}
    config = run_config(max_steps=12, evaluation=evaluation, early_stop_patience=2, prompter_learning_rate=1e-2)
    result = train(config)
    dev = [line["eval_dev_spearman_cosine"] for line in result.history if "eval_dev_spearman_cosine" in line]
    assert result.scores["dev"] == pytest.approx(100 * max(dev))
    assert result.scores["test"] == pytest.approx(100 * max(dev))  # same file: the best model was loaded back
    assert result.steps < 12


@pytest.mark.parametrize("end", ["after it stopped", "while it waited"])
def test_patience_goes_on_where_a_run_was_stopped(run_config, end):
    """A resumed run takes no step more than one that was not stopped."""
    evaluation = {"dev": "pairs.jsonl", "every_steps": 1}
    changes = {"prompter_learning_rate": 1e-2, "keep_checkpoints": 12}
    config = run_config(max_steps=12, evaluation=evaluation, early_stop_patience=3, **changes)
    whole = train(config)
    assert whole.steps < 12
    shutil.rmtree(whole.folder)
    if end == "while it waited":
        shutil.rmtree(whole.folder.parent / f"checkpoint-{whole.steps}")
    resumed = train(config, resume=True)
    assert (resumed.steps, resumed.scores) == (whole.steps, whole.scores)


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


@pytest.mark.parametrize("stopped", [False, True])
def test_an_annealed_softmax_ends_at_the_models_temperature(run_config, stopped, monkeypatch):
    seen = []
    generate = Prompter.forward

    def watched(prompter, *inputs):
        seen.append((torch.is_grad_enabled(), prompter.temperature))
        return generate(prompter, *inputs)

    monkeypatch.setattr(Prompter, "forward", watched)
    evaluation = {"dev": "pairs.jsonl", "every_steps": 2}
    settings = {"max_steps": 5, "softmax_temperature_start": 2.0, "keep_checkpoints": 9}
    config = run_config(**settings, evaluation=evaluation, model={"softmax_temperature": 0.5})
    result = train(config)
    expected = [2.0, 1.625, 1.25, 0.875, 0.5]
    if stopped:  # after its second step
        shutil.rmtree(result.folder)
        for later in result.folder.parent.glob("checkpoint-[3-9]"):
            shutil.rmtree(later)
        seen.clear()
        result = train(config, resume=True)
        expected = expected[2:]
    in_steps = [temperature for trained, temperature in seen if trained]
    assert list(dict.fromkeys(in_steps)) == pytest.approx(expected)
    assert {temperature for trained, temperature in seen if not trained} == {0.5}
    assert result.model[0].prompter.temperature == 0.5


@pytest.mark.parametrize("kind", ["plain", "cached", "accumulated"])
@pytest.mark.parametrize("layout", ["prefix", "suffix"])
def test_leaf_gives_the_same_gradients(tiny_model, kind, layout):
    """One backward through the prompter per step equals one per forward."""
    model = tiny_model(layout=layout)
    module = model[0]
    loss = make_loss(model, TrainingConfig(loss="cached_infonce" if kind == "cached" else "infonce", mini_batch_size=2))
    batches = [(TEXTS[:4], INSTRUCTION), (TEXTS[1:], SECOND if kind == "accumulated" else INSTRUCTION)]
    found = []
    for leaves in (None, SoftPromptLeaves()):
        model.zero_grad()
        module.leaves = leaves
        for texts, instruction in batches:
            columns = [model.preprocess(t, prompt=instruction) for t in (texts, texts[::-1], texts[1:] + texts[:1])]
            loss(columns, None).backward()
        if leaves is not None:
            assert all(p.grad is None for p in module.prompter.parameters())
            leaves.backward()
        found.append({n: p.grad.clone() for n, p in module.named_parameters() if p.requires_grad})
    module.leaves = None
    for name, gradient in found[0].items():
        assert torch.allclose(gradient, found[1][name], atol=1e-5, rtol=1e-4), name
    assert max(float(g.abs().max()) for g in found[0].values()) > 1e-3


def test_prompter_runs_once_per_instruction_and_step(run_config, monkeypatch):
    from promptembedder.model.module import SoftPromptTransformer

    calls, original = [], SoftPromptTransformer.soft_tokens

    def counted(self, instruction):
        if torch.is_grad_enabled():
            calls.append(instruction)
        return original(self, instruction)

    monkeypatch.setattr(SoftPromptTransformer, "soft_tokens", counted)
    train(run_config(max_steps=4))
    assert len(calls) == 4  # one instruction per batch, whatever the number of columns


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


def test_conditioned_on_text_trains(run_config):
    for layout in ("prefix", "suffix"):
        model = {"condition_on": "instruction_and_text", "layout": layout}
        result = train(run_config(layout, model=model, max_steps=2, loss="cached_infonce", mini_batch_size=2))
        opened = [value for name, value in result.model.named_parameters() if "lora_B" in name]
        assert any(value.any() for value in opened)  # they start at zero


def test_a_run_again_in_the_folder_of_a_finished_one(run_config):
    """Its checkpoints count; the longer run's are gone."""
    output = Path(train(run_config(max_steps=4, save_every_steps=2, evaluation={"dev": None})).folder).parent
    assert {folder.name for folder in output.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    train(run_config(max_steps=2, save_every_steps=1, evaluation={"dev": None}))
    assert {folder.name for folder in output.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-2"}


def test_what_is_no_checkpoint_of_ours_stays(run_config, tmp_path):
    (tmp_path / "run" / "checkpoint-best").mkdir(parents=True)
    (tmp_path / "run" / "checkpoint-notes.txt").write_text("mine")
    train(run_config(max_steps=1))
    assert (tmp_path / "run" / "checkpoint-best").is_dir()
    assert (tmp_path / "run" / "checkpoint-notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"batch_size": 8}, "training.batch_size"),
        ({"seed": 5, "temperature": 0.1}, "training.seed, training.temperature"),
    ],
)
def test_a_run_goes_on_with_the_settings_it_began_with(run_config, changed, named):
    train(run_config(max_steps=2, save_every_steps=1))
    with pytest.raises(PromptEmbedderError, match=f"run began with another {named} .see begun.yaml.; give the settin"):
        train(run_config(max_steps=2, save_every_steps=1, **changed), resume=True)
    moved = run_config(max_steps=3, save_every_steps=1, logging_steps=2)
    assert train(moved, resume=True).steps == 3
    config = run_config(max_steps=3, save_every_steps=1)
    with pytest.raises(PromptEmbedderError, match=r"began with another data.max_negatives"):
        train(replace(config, data=replace(config.data, max_negatives=0)), resume=True)


def test_documents_have_the_instruction_of_the_model_that_is_trained(run_config, tiny_model):
    model = tiny_model(document_instruction="Be found.")
    config = run_config(max_steps=1)
    files = tuple(replace(file, asymmetric=True) for file in config.data.files)
    config = replace(config, data=replace(config.data, files=files))
    asked = []
    whole = model[0].soft_prompt
    model[0].soft_prompt = lambda instruction, *a, **k: asked.append(instruction) or whole(instruction, *a, **k)
    folder = train(config, model=model).folder
    assert "Be found." in asked
    assert config.model.document_instruction not in asked
    assert load_run(folder / "config.yaml").model == model[0].settings


def test_an_interrupted_run_is_not_overwritten(run_config):
    config = run_config(max_steps=2, save_every_steps=1)
    output = Path(train(config).folder).parent
    shutil.rmtree(output / "model")
    with pytest.raises(PromptEmbedderError, match="holds an interrupted run: --resume it or remove it"):
        train(config)
    assert (output / "checkpoint-2").is_dir()


def test_a_checkpoint_of_another_model_is_refused(run_config):
    train(run_config())
    with pytest.raises(PromptEmbedderError, match="made with another text_template; give the settings it had"):
        train(run_config(model={"text_template": "Another: {text}"}), resume=True)


def test_fp16_is_refused(tiny_model):
    """The trainer scales the gradients that it has; those of soft prompts come later."""
    callback = SoftPromptLeafCallback(tiny_model()[0], max_grad_norm=1.0)
    with pytest.raises(PromptEmbedderError, match="train in bf16"):
        callback.on_train_begin(SimpleNamespace(fp16=True), None, None)
    callback.on_train_begin(SimpleNamespace(fp16=False), None, None)


def test_nothing_to_resume(run_config):
    with pytest.raises(PromptEmbedderError, match="nothing to resume"):
        train(run_config(), resume=True)


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


@pytest.mark.parametrize("changes", [{}, {"loss": "cached_infonce", "mini_batch_size": 2}])
def test_leaf_and_cache_change_nothing_but_the_cost(run_config, tmp_path, changes):
    """The same weights with both on as with both off; later epochs read no text again."""
    found = []
    for on in (False, True):
        more = {"text_state_cache": "1MiB", "text_state_folder": str(tmp_path / "states")} if on else {}
        config = run_config(f"run-{on}", max_steps=24, soft_prompt_leaf=on, save_every_steps=24, **changes, **more)
        result = train(config)
        found.append({n: p for n, p in result.model.named_parameters() if p.requires_grad})
        assert result.model[0].backbone.text_cache is None
    for name, weight in found[0].items():
        assert torch.allclose(weight, found[1][name], atol=1e-5), name
    cached_loss = "loss" in changes  # it reads every text twice, the second time from the cache
    rates = [line["text_state_hit_rate"] for line in result.history if "text_state_hit_rate" in line]
    assert rates[0] == (0.5 if cached_loss else 0)
    assert result.text_state_hit_rate == rates[-1] == (0.75 if cached_loss else 0.5)  # two epochs
    again = train(run_config("again", text_state_cache=2**20, text_state_folder=str(tmp_path / "states")))
    assert again.text_state_hit_rate == 1.0


@pytest.mark.parametrize(
    ("model", "training", "message"),
    [
        ({"layout": "prefix"}, {"text_state_cache": "1MiB"}, "text_state_cache needs model.layout 'suffix'"),
        ({}, {"text_state_folder": "here"}, "text_state_folder needs training.text_state_cache"),
        ({}, {"text_state_cache": 2**60, "text_state_folder": "here"}, "larger than the room on the disk"),
        ({}, {"text_state_cache": 2**60}, "larger than the memory"),
    ],
)
def test_text_state_cache_that_cannot_be(run_config, tmp_path, monkeypatch, model, training, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PromptEmbedderError, match=message):
        train(run_config(model=model, **training))


@pytest.mark.parametrize("scale", [True, False])
def test_only_the_alignments_rate_is_scaled_by_the_words(run_config, monkeypatch, caplog, scale):
    monkeypatch.setattr(rates_module, "rate_factor", lambda *_: 4.0)
    option = {"deep_soft_prompt": True, "linear_head": True}
    config = run_config(model=option, alignment_learning_rate=1e-3, scale_alignment_rate=scale, max_steps=1, warmup=0)
    before = dict(build(config.model, seed=config.training.seed).named_parameters())
    with caplog.at_level("INFO"):
        after = dict(train(config).model.named_parameters())
    moved = {name: float((after[name] - before[name]).detach().abs().max()) for name in after}
    rate = 4e-3 if scale else 1e-3
    assert moved["0.alignment.weight"] == pytest.approx(rate, rel=0.05)
    assert moved["0.alignment.deep"] == pytest.approx(rate, rel=0.05)
    assert moved["1.linear.weight"] == pytest.approx(1e-3, rel=0.05)
    assert ("learning rate of W: 0.001 x 4" in caplog.text) == scale
