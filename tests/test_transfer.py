"""Moving a model to another backbone: closed forms against known maps, both ways of training, prompter untouched."""

from __future__ import annotations

import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from conftest import INSTRUCTION, TEXTS
from promptembedder import PromptEmbedderError, load, save
from promptembedder.data.settings import DataConfig, DataFile
from promptembedder.llms import locate as locate_module
from promptembedder.llms import open as open_module
from promptembedder.model import vocabulary as vocabulary_module
from promptembedder.model.backbone import Backbone
from promptembedder.model.module import soft_prompt_module
from promptembedder.model.prompter import trained_state
from promptembedder.training import fit as fit_module
from promptembedder.training import train as train_module
from promptembedder.training.curves import read_facts
from promptembedder.training.distillation import SimilarityDistillation, distillation_rows
from promptembedder.training.evaluators import pair_evaluator
from promptembedder.training.settings import EvaluationConfig, RunConfig, TrainingConfig, WarmStartConfig
from promptembedder.transfer.closed_forms import closed_forms
from promptembedder.transfer.rebase import on_backbone
from promptembedder.transfer.settings import TransferConfig
from promptembedder.transfer.transfer import transfer


@pytest.fixture
def config(tiny_lm, tmp_path, run_config):
    """`config(architecture, ...)`: a transfer to another tiny LLM, with the rows and pairs of `run_config`."""
    run_config()  # writes rows.jsonl and pairs.jsonl

    def make(backbone=("qwen2", 48, 5), **changes):
        training = {"output": str(tmp_path / "moved"), "max_steps": 4, "batch_size": 4, "logging_steps": 1}
        training |= changes.pop("training", {})
        evaluation = {"dev": "pairs.jsonl", "every_steps": 2, "instruction": INSTRUCTION} | changes.pop(
            "evaluation", {}
        )
        rows = DataConfig(
            root=str(tmp_path), files=(DataFile(path="rows.jsonl"),) if changes.pop("rows", False) else ()
        )
        return TransferConfig(
            backbone=str(tiny_lm(*backbone)) if isinstance(backbone, tuple) else backbone,
            data=rows,
            training=TrainingConfig(**training),
            evaluation=EvaluationConfig(**evaluation),
            **changes,
        )

    return make


def words_of(lm):
    return lm.get_input_embeddings().weight.detach().double()


def solved(first, second):
    return torch.linalg.lstsq(first, second).solution


def test_closed_forms_recover_a_known_map(tiny_model, tiny_lm):
    """A new backbone whose embeddings are the prompter's, rotated and doubled: every start maps words onto words."""
    model = tiny_model("llama", backbone=str(tiny_lm("llama", 48, 3)), alignment_start="random")
    old = soft_prompt_module(model)
    moved = on_backbone(model, locate_module.locate(str(tiny_lm("llama", 32, 7))))
    new = soft_prompt_module(moved)
    rotation = torch.linalg.qr(torch.randn(32, 32)).Q
    with torch.no_grad():
        words = old.prompter.lm.get_input_embeddings().weight
        new.backbone.lm.get_input_embeddings().weight.copy_(2 * words @ rotation)
        tokens = old.soft_tokens(INSTRUCTION).tokens_NKP[0]
    starts = {start.name: start for start in closed_forms(old, new, [INSTRUCTION])}
    for name in ("least_squares", "procrustes"):
        assert torch.allclose(starts[name].weight_PD, 2 * rotation, atol=1e-5), name
        assert starts[name].reconstruction == pytest.approx(1, abs=1e-5)
    for name in ("ridge", "weighted"):  # shrunk by their penalty
        assert torch.allclose(starts[name].weight_PD, 2 * rotation, atol=0.05), name
    assert torch.allclose(tokens @ starts["mixture"].weight_PD, 2 * tokens @ rotation, atol=0.02)
    # What the trained W does to the soft tokens beyond mixing the old backbone's words, seen in the new one's space.
    among_words = [n for n in range(len(words)) if n not in old.tokenizer.all_special_ids]
    mine, olds, news = (words_of(lm)[among_words] for lm in (old.prompter.lm, old.backbone.lm, new.backbone.lm))
    trained, exact = old.alignment.weight.detach().double(), tokens.double()
    through_old = trained @ solved(olds, news)
    cosine = torch.nn.functional.cosine_similarity
    assert cosine(starts["through_old"].weight_PD.flatten(), through_old.flatten(), dim=0) > 0.999
    drift = (exact @ trained - exact @ solved(mine, olds)) @ solved(olds, news)
    expected = 2 * exact @ rotation.double() + drift
    found = tokens @ starts["mixture_and_drift"].weight_PD
    assert drift.norm() > 0.1 * expected.norm()
    assert (found - expected).norm() < 0.5 * drift.norm()  # ridge shrinks both


def test_closed_forms_are_as_long_as_the_new_backbones_words(tiny_model, tiny_lm):
    model = tiny_model("llama")
    new = soft_prompt_module(on_backbone(model, locate_module.locate(str(tiny_lm("qwen2", 48, 5)))))
    mine, its = words_of(model[0].prompter.lm), words_of(new.backbone.lm)
    shared = vocabulary_module.shared_vocabulary(model[0].prompter.tokenizer, new.tokenizer)
    for start in closed_forms(model[0], new, [INSTRUCTION], only=["least_squares", "ridge", "procrustes", "weighted"]):
        lengths = (mine[shared[0]] @ start.weight_PD.double()).norm(dim=-1)
        expected = float(its[shared[1]].norm(dim=-1).median())
        assert float(lengths.median()) == pytest.approx(expected, rel=1e-3), start.name


def test_what_the_new_backbone_has_no_words_for_goes_through_the_map(tiny_model, tiny_lm, monkeypatch, caplog):
    """Two thirds of the prompter's words are taken from the new vocabulary."""
    model = tiny_model("llama")
    new = soft_prompt_module(on_backbone(model, locate_module.locate(str(tiny_lm("qwen2", 48, 5)))))
    kept = [ids[::3] for ids in vocabulary_module.shared_vocabulary(model[0].prompter.tokenizer, new.tokenizer)]
    monkeypatch.setattr(vocabulary_module, "shared_vocabulary", lambda *_: kept)
    monkeypatch.setattr("promptembedder.transfer.closed_forms._FEWEST_SHARED", 1)
    (start,) = closed_forms(model[0], new, [INSTRUCTION], only=["mixture"])
    with torch.no_grad():
        written = model[0].soft_tokens(INSTRUCTION)
    weights = written.weights_NKV[0][:, kept[0]].double()
    mine, its = words_of(model[0].prompter.lm)[kept[0]], words_of(new.backbone.lm)[kept[1]]
    gram = mine.T @ mine
    mapped = torch.linalg.solve(gram + 1e-2 * gram.diagonal().mean() * torch.eye(len(gram)), mine.T @ its)
    expected = weights @ its + (written.tokens_NKP[0].double() - weights @ mine) @ mapped
    found = written.tokens_NKP[0] @ start.weight_PD
    assert (found - expected).norm() < 0.05 * expected.norm()
    assert re.search(r"of what the prompter writes \d+ % are words that the new backbone has, too", caplog.text)


@pytest.mark.parametrize("layout", ["prefix", "suffix"])
@pytest.mark.parametrize("kind", ["rows", "texts"])
def test_only_the_alignment_is_trained_and_the_result_opens_alone(tiny_model, config, tmp_path, layout, kind):
    model = tiny_model("llama", layout=layout)
    save(model, tmp_path / "old")
    before = {name: value.clone() for name, value in trained_state(model[0].prompter).items()}
    (tmp_path / "texts.txt").write_text("\n".join(f"{text} {n}" for n in range(4) for text in TEXTS))
    given = {"rows": True} if kind == "rows" else {"texts": ("texts.txt",)}
    result = transfer(model, config(**given, evaluation={"dev": None}))
    after = trained_state(result.model[0].prompter)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [stage.name for stage in result.stages][1].startswith("alignment_")
    assert result.stages[1].examples == 16
    assert not torch.equal(result.model[0].alignment.weight.cpu(), result.starts[0].weight_PD)
    opened = load(tmp_path / "moved" / "model")
    expected = result.model.encode(TEXTS, prompt=INSTRUCTION)
    assert np.allclose(opened.encode(TEXTS, prompt=INSTRUCTION), expected, atol=1e-5)
    assert opened[0].base_models.prompter_fingerprint == model[0].base_models.prompter_fingerprint
    report = json.loads((tmp_path / "moved" / "results.json").read_text())
    assert [stage["name"] for stage in report["stages"]] == [stage.name for stage in result.stages]
    assert (tmp_path / "moved" / "report.md").is_file()


def test_texts_come_before_rows_and_rows_go_on_from_them(tiny_model, config, tmp_path, caplog):
    (tmp_path / "texts.txt").write_text("\n".join(f"{text} {n}" for n in range(4) for text in TEXTS))
    quiet = {"evaluation": {"dev": None}, "starts": ("ridge",)}  # a start that does not depend on the rows
    texts = transfer(tiny_model("llama"), config(texts=("texts.txt",), centred=False, **quiet))
    both = transfer(tiny_model("llama"), config(texts=("texts.txt",), rows=True, **quiet))
    assert [stage.name for stage in both.stages] == ["closed_form", "alignment_unlabelled", "alignment_labelled"]
    assert [stage.steps for stage in both.stages] == [0, 4, 4]
    assert "train_datasets" not in caplog.text  # the library's remark on a second training
    # The same rows from where the texts left off, by hand.
    run = RunConfig(
        model=texts.model[0].settings,
        data=config(rows=True).data,
        training=TrainingConfig(
            output=str(tmp_path / "by_hand"), max_steps=4, batch_size=4, train_prompter=False, warmup=0,
            warm_start=WarmStartConfig(steps=0),
        ),
        evaluation=EvaluationConfig(),
    )  # fmt: skip
    expected = train_module.train(run, model=texts.model).model[0].alignment.weight
    assert torch.equal(both.model[0].alignment.weight, expected)


@pytest.mark.parametrize(("warmup", "expected"), [(None, [0.0, 0.1]), (0.5, [0.5, 0.5])])
def test_w_alone_needs_no_warmup(tiny_model, config, monkeypatch, warmup, expected):
    made, seen = fit_module._arguments, []
    monkeypatch.setattr(fit_module, "_arguments", lambda *a, **k: seen.append(made(*a, **k)) or seen[-1])
    transfer(tiny_model("llama"), config(rows=True, unfrozen_steps=2, training={"warmup": warmup}))
    assert [arguments.warmup_steps for arguments in seen] == expected


def test_least_squares_needs_more_words_than_the_prompter_is_wide(tiny_lm, tiny_model):
    old = tiny_model("llama", prompter=str(tiny_lm("llama", 384)), alignment_start="random")
    new = on_backbone(old, locate_module.locate(str(tiny_lm("qwen2"))))[0]
    names = {start.name for start in closed_forms(old[0], new, [INSTRUCTION])}
    assert names == {"ridge", "procrustes", "weighted", "through_old", "mixture", "mixture_and_drift"}
    with pytest.raises(PromptEmbedderError, match=r"'least_squares' needs 384 shared tokens .*; use 'ridge'"):
        closed_forms(old[0], new, [INSTRUCTION], only=["least_squares"])


def test_starts_are_chosen_by_dev_or_else_by_reconstruction(tiny_model, config):
    by_dev = transfer(tiny_model("llama"), config(("gemma3", 32, 0))).starts
    assert [start.dev for start in by_dev] == sorted((start.dev for start in by_dev), reverse=True)
    without = transfer(tiny_model("llama"), config(("gemma3", 32, 0), evaluation={"dev": None})).starts
    assert without[0].name.startswith("mixture")
    fitted = [start.reconstruction for start in without if start.reconstruction is not None]
    assert fitted == sorted(fitted, reverse=True)


def test_unfrozen_steps_train_a_prompter_of_its_own(tiny_model, config):
    model = tiny_model("llama")
    before = {name: value.clone() for name, value in trained_state(model[0].prompter).items()}
    result = transfer(model, config(rows=True, unfrozen_steps=3, evaluation={"dev": None}))
    assert result.stages[-1].name == "unfrozen"
    after = trained_state(result.model[0].prompter)
    assert not all(torch.equal(before[name], after[name]) for name in before)
    untouched = trained_state(model[0].prompter)
    assert all(torch.equal(before[name], untouched[name]) for name in before)


def test_made_up_rows_alone_train_the_alignment(tiny_model, config, tmp_path):
    settings = config(evaluation={"dev": None})
    data = DataConfig(root=str(tmp_path), contrast_rows=240)
    result = transfer(tiny_model("llama"), replace(settings, data=data))
    assert [(stage.name, stage.steps) for stage in result.stages] == [("closed_form", 0), ("alignment_labelled", 4)]
    assert not torch.equal(result.model[0].alignment.weight, result.starts[0].weight_PD)


@pytest.mark.parametrize("second", ["unfrozen", "alignment_labelled"])
def test_resumed_equals_uninterrupted(tiny_model, config, tmp_path, monkeypatch, second):
    """Stopped in its second stage: the first is not trained again, the second goes on."""
    model = tiny_model("llama")
    (tmp_path / "texts.txt").write_text("\n".join(f"{text} {n}" for n in range(4) for text in TEXTS))
    stages = {"unfrozen_steps": 4} if second == "unfrozen" else {"texts": ("texts.txt",), "centred": True}

    def settings(name):
        return config(rows=True, training={"output": str(tmp_path / name)}, **stages)

    whole = transfer(model, settings("whole"))
    made = fit_module.make_trainer
    taken = []

    class Count(TrainerCallback):
        def __init__(self, stop):
            self.stop = stop

        def on_step_end(self, args, state, control, **kwargs):
            taken.append((Path(args.output_dir).name, state.global_step))
            if self.stop and second in args.output_dir and state.global_step == 3:
                raise KeyboardInterrupt

    def counting(stop):
        def make(*arguments):
            trainer = made(*arguments)
            trainer.add_callback(Count(stop))
            return trainer

        return make

    monkeypatch.setattr(fit_module, "_trainer", counting(True))
    with pytest.raises(KeyboardInterrupt):
        transfer(model, settings("parts"))
    with pytest.raises(PromptEmbedderError, match=f"{second} holds an interrupted run: --resume it or remove it"):
        transfer(model, settings("parts"))
    taken.clear()
    monkeypatch.setattr(fit_module, "_trainer", counting(False))
    resumed = transfer(model, settings("parts"), resume=True)
    assert taken == [(second, 3), (second, 4)]
    assert torch.equal(resumed.model[0].alignment.weight, whole.model[0].alignment.weight)
    kept, expected = (trained_state(result.model[0].prompter) for result in (resumed, whole))
    assert all(torch.equal(kept[name], expected[name]) for name in expected)
    with pytest.raises(PromptEmbedderError, match=r"nothing to resume: .*fresh holds no checkpoint"):
        transfer(model, settings("fresh"), resume=True)
    nothing = settings("parts")
    with pytest.raises(PromptEmbedderError, match=r"nothing to resume: training\.max_steps is 0"):
        transfer(
            model, replace(nothing, unfrozen_steps=0, training=replace(nothing.training, max_steps=0)), resume=True
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"texts": ("other.txt",)}, "texts"),
        ({"text_instructions": ("Another.",)}, "text_instructions"),
        ({"distillation_temperature": 0.1}, "distillation_temperature"),
        ({"training": {"max_steps": 6, "alignment_learning_rate": 0.1}}, "training.alignment_learning_rate"),
        ({"training": {"max_steps": 3}}, "sample_of_texts"),
        ({}, "old_model"),
    ],
)
def test_a_resumed_transfer_is_the_one_that_began(tiny_model, config, tmp_path, changes, message):
    for name in ("texts.txt", "other.txt"):
        (tmp_path / name).write_text("\n".join(f"{text} {n}" for n in range(4) for text in TEXTS))
    model = tiny_model("llama")
    shutil.rmtree(transfer(model, config(texts=("texts.txt",), training={"max_steps": 5})).folder)  # all texts
    if message == "old_model":
        with torch.no_grad():
            model[0].alignment.weight.mul_(2)
    settings = config(**{"texts": ("texts.txt",), "training": {"max_steps": 6}, **changes})
    with pytest.raises(PromptEmbedderError, match=f"began with another {re.escape(message)} "):
        transfer(model, settings, resume=True)
    if message == "old_model":
        with torch.no_grad():
            model[0].alignment.weight.div_(2)
        resumed = transfer(model, settings, resume=True)
        assert resumed.stages[-1].steps == 6
        assert yaml.safe_load((resumed.folder / "config.yaml").read_text())["training"]["max_steps"] == 6


@pytest.mark.parametrize("fails", [False, True])
def test_the_old_model_stays_as_it_was(tiny_model, config, monkeypatch, fails):
    model = tiny_model("llama")
    open_before = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    expected = model.encode(TEXTS, prompt=INSTRUCTION)
    if fails:
        monkeypatch.setattr("promptembedder.transfer.transfer._train_stages", lambda *a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            transfer(model, config(rows=True))
    else:
        transfer(model, config(rows=True))
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == open_before
    assert np.array_equal(model.encode(TEXTS, prompt=INSTRUCTION), expected)


def test_texts_are_read_under_what_the_model_is_used_with_unless_told(tiny_model, config, tmp_path, monkeypatch):
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    seen = []
    place = sys.modules["promptembedder.transfer"]
    made = place.distillation_rows
    monkeypatch.setattr(place, "distillation_rows", lambda t, x, i, n: seen.append(tuple(i)) or made(t, x, i, n))
    model = tiny_model("llama", document_instruction="A document.")
    for given in ((), ("One thing.", "Another.")):
        transfer(model, config(texts=("texts.txt",), text_instructions=given, centred=False))
    assert seen == [
        (INSTRUCTION, model[0].settings.default_instruction, "A document."),
        ("One thing.", "Another."),
    ]


@pytest.mark.parametrize(
    ("changes", "rate"),
    [
        ({"rows": True}, 1e-2),
        ({"texts": ("texts.txt",)}, 1e-2 / 4),  # centred
        ({"texts": ("texts.txt",), "centred": False}, 1e-2),
        ({"texts": ("texts.txt",), "distillation_learning_rate": 1e-3}, 1e-3),
        ({"texts": ("texts.txt",), "rows": True, "centred": True}, 1e-2 + 1e-2 / 4),
        ({"texts": ("texts.txt",), "rows": True, "distillation_learning_rate": 1e-3}, 1e-2 + 1e-3),
    ],
)
def test_learning_rate_of_texts_and_rows(tiny_model, config, tmp_path, changes, rate):
    (tmp_path / "texts.txt").write_text("\n".join(f"{text} {n}" for n in range(4) for text in TEXTS))
    quiet = {"evaluation": {"dev": None}, "starts": ("ridge",)}
    step = {"max_steps": 1, "alignment_learning_rate": 1e-2, "scale_alignment_rate": False}
    start = transfer(tiny_model("llama"), config(**quiet)).model[0].alignment.weight
    moved = transfer(tiny_model("llama"), config(**quiet, **changes, training=step)).model[0].alignment.weight
    # Adam's first step is as long as the rate; where there are two stages, some number goes the same way in both.
    assert float((moved - start).detach().abs().max()) == pytest.approx(rate, rel=0.05)


def test_the_mean_is_over_more_texts_than_a_few_steps_take(tiny_model, config, tmp_path, monkeypatch):
    (tmp_path / "texts.txt").write_text("\n".join(f"{text} {n}" for n in range(4) for text in TEXTS))
    place = sys.modules["promptembedder.transfer"]
    counts = []
    for name in ("centre", "distillation_rows"):
        made = getattr(place, name)
        monkeypatch.setattr(place, name, lambda m, some, *a, made=made: counts.append(len(some)) or made(m, some, *a))
    settings = config(texts=("texts.txt",), training={"max_steps": 1}, evaluation={"dev": None}, starts=("ridge",))
    transfer(tiny_model("llama"), settings)
    assert counts == [4 * len(TEXTS), 4]  # a batch of four is all that the old model reads


def test_the_old_model_reads_as_much_of_a_text_as_the_new_one(tiny_model):
    model = tiny_model("llama", text_template="{text}")
    longest = max(TEXTS, key=len)
    first = model.tokenizer.decode(model.tokenizer(longest, add_special_tokens=False)["input_ids"][:1])
    (rows,) = distillation_rows(model, [longest], [INSTRUCTION], 1).datasets.values()
    (expected,) = model.encode([first], prompt=INSTRUCTION)
    assert np.allclose(rows["label"][0], expected, atol=1e-5)
    assert not np.allclose(rows["label"][0], model.encode([longest], prompt=INSTRUCTION)[0], atol=1e-3)


def test_the_corrected_instructions_leave_room_for_others(tiny_model, tiny_lm, monkeypatch):
    old = tiny_model("llama", num_soft_tokens=4)  # of width 32
    new = on_backbone(old, locate_module.locate(str(tiny_lm("qwen2", 48, 5))))
    asked = []
    made = type(old[0]).soft_tokens
    monkeypatch.setattr(type(old[0]), "soft_tokens", lambda self, i: asked.append(i) or made(self, i))
    closed_forms(old[0], new[0], list("abcdefgh"))
    assert asked == ["a", "b", "c", "d"]


def test_distillation_loss_equals_a_naive_sum():
    student, teacher = torch.randn(4, 6, requires_grad=True), torch.randn(4, 3)
    unit = torch.nn.functional.normalize
    loss = SimilarityDistillation(lambda features: {"sentence_embedding": unit(features["x"], dim=-1)}, 0.1)
    found = loss([{"x": student}], teacher)
    S, T = unit(student, dim=-1).detach().double().numpy(), unit(teacher, dim=-1).double().numpy()
    naive = 0.0
    for i in range(4):
        others = [j for j in range(4) if j != i]
        p, q = (np.exp(np.array([X[i] @ X[j] / 0.1 for j in others])) for X in (T, S))
        p, q = p / p.sum(), q / q.sum()
        naive += float((p * np.log(p / q)).sum()) / 4
    assert found.item() == pytest.approx(naive, rel=1e-4)
    found.backward()
    assert torch.isfinite(student.grad).all()


def test_soft_tokens_of_a_frozen_prompter_are_made_once(tiny_model, config, monkeypatch):
    model = tiny_model("llama", num_soft_tokens=2)  # so few that the closed forms take every instruction
    calls = []
    made = type(model[0]).soft_tokens
    monkeypatch.setattr(
        type(model[0]), "soft_tokens", lambda self, i: calls.append(torch.is_grad_enabled()) or made(self, i)
    )
    transfer(model, config(rows=True, evaluation={"dev": None}, training={"max_steps": 6}))
    # Once for each default instruction and each of the rows in the closed forms, once for these in all six steps.
    assert len(calls) == 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone": ("llama", 32, 0)}, "is the backbone that the model has already"),
        ({"backbone": "nowhere"}, "base model 'nowhere' not found"),
        ({"texts": ("few.txt",)}, "2 different texts for batches of 4"),
        (
            {"texts": ("few.txt",), "training": {"max_steps": 0}},
            "2 different texts to centre embeddings on; give at least 16, or centred=false",
        ),
        (
            {"texts": ("few.txt",), "training": {"batch_size": 2}},
            "2 different texts to centre embeddings on; give at least 16, or centred=false",
        ),
        ({"rows": True, "distillation_learning_rate": 1e-3}, "is for training on plain texts"),
        ({"centred": True}, "centred needs texts or labelled rows"),
        ({"unfrozen_steps": 3}, "needs labelled rows"),
        (
            {"training": {"early_stop_patience": 2}, "evaluation": {"dev": None}},
            "early_stop_patience needs evaluation.dev",
        ),
        ({"training": {"text_state_folder": "kept"}}, "text_state_folder needs training.text_state_cache"),
        ({"dtype": "bfloat16"}, "the model's prompter runs in float32"),
        ({"rows": True, "training": {"matryoshka_dims": (99,)}}, "the embedding has 48 dimensions"),
        ({"backbone_layers": 3}, "backbone_layers = 3, but"),
        ({"starts": ("guess",)}, "unknown start 'guess'; valid: least_squares, ridge"),
        ({"training": {"train_prompter": False}}, "a transfer trains the alignment alone"),
        ({"training": {"train_alignment": False}}, "a transfer trains the alignment alone"),
    ],
)
def test_bad_input_is_said_before_the_backbone_is_opened(tiny_model, config, tmp_path, monkeypatch, changes, message):
    (tmp_path / "few.txt").write_text("one\ntwo\n")
    model, settings = tiny_model("llama"), config(**changes)
    monkeypatch.setattr(open_module, "load_causal_lm", lambda *a: pytest.fail("loaded"))
    with pytest.raises(PromptEmbedderError, match=re.escape(message)):
        transfer(model, settings)
    assert not (tmp_path / "moved" / "model").exists()


def test_the_same_backbone_is_known_by_its_weights_too(tiny_model, tiny_lm, config, tmp_path):
    copied = shutil.copytree(tiny_lm("llama"), tmp_path / "by another name")
    with pytest.raises(PromptEmbedderError, match="is the backbone that the model has already"):
        transfer(tiny_model("llama"), config(str(copied)))


def test_resume_finds_nothing_of_an_earlier_transfer(tiny_model, config, tmp_path):
    settings = {"save_every_steps": 2, "keep_checkpoints": 9}
    model = tiny_model("llama")
    transfer(model, config(rows=True, unfrozen_steps=2, training=settings))
    moved = tmp_path / "moved"
    assert (moved / "unfrozen" / "checkpoint-2").is_dir()
    transfer(model, config(rows=True, training=settings))
    assert not list((moved / "unfrozen").glob("checkpoint-*"))
    assert (moved / "alignment_labelled" / "checkpoint-4").is_dir()


def test_the_old_model_reads_no_more_texts_than_the_steps_take(tiny_model, config, tmp_path, monkeypatch):
    (tmp_path / "texts.txt").write_text("\n".join(f"{text} {n}" for n in range(20) for text in TEXTS))
    seen = []
    place = sys.modules["promptembedder.transfer"]
    made = place.distillation_rows
    monkeypatch.setattr(place, "distillation_rows", lambda t, x, i, n: seen.append(len(x)) or made(t, x, i, n))
    transfer(tiny_model("llama"), config(texts=("texts.txt",)))  # four steps of four
    assert seen == [16]


def test_one_row_teaches_nothing(tiny_model, config, tmp_path):
    settings = config(rows=True)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"query": "a", "pos": ["b"], "instruction": INSTRUCTION}) + "\n")
    with pytest.raises(PromptEmbedderError, match="no instruction has two rows to tell apart"):
        transfer(tiny_model("llama"), settings)


def test_not_under_torchrun(tiny_model, config, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(PromptEmbedderError, match="runs in one process; start it without torchrun"):
        transfer(tiny_model("llama"), config())


def test_a_training_that_makes_dev_worse_is_not_kept(tiny_model, config, tmp_path, monkeypatch, caplog):
    result = transfer(
        tiny_model("llama", linear_head=True),
        config(rows=True, unfrozen_steps=2, training={"alignment_learning_rate": 3}),
    )
    start, trained, unfrozen = result.stages
    assert not trained.kept
    assert [examples for examples, _, _ in trained.curve] == [8, 16]
    assert min(dev for _, _, dev in trained.curve) < start.dev
    assert trained.dev == start.dev
    assert torch.equal(result.model[0].alignment.weight, result.starts[0].weight_PD)
    assert torch.equal(result.model[1].linear.weight, torch.eye(48))
    assert unfrozen.dev >= start.dev
    assert result.scores["dev"] >= start.dev
    assert "so the weights before it are kept" in caplog.text
    assert "alignment_labelled, not kept" in (tmp_path / "moved" / "report.md").read_text()


def test_closed_forms_need_no_words_shared_with_the_old_backbone(tiny_model, tiny_lm, monkeypatch):
    """Words that the prompter and the new backbone share are enough for all but two."""
    old = tiny_model("qwen2", backbone=str(tiny_lm("llama")))
    new = on_backbone(old, locate_module.locate(str(tiny_lm("gemma3", 48))))
    made, nothing = vocabulary_module.shared_vocabulary, torch.zeros(0, dtype=torch.long)
    among = lambda a, b: (nothing, nothing) if a is old[0].tokenizer else made(a, b)  # noqa: E731
    monkeypatch.setattr(vocabulary_module, "shared_vocabulary", among)
    names = {start.name for start in closed_forms(old[0], new[0], [INSTRUCTION])}
    assert {"ridge", "weighted", "mixture"} <= names
    assert not {"through_old", "mixture_and_drift"} & names
    with pytest.raises(PromptEmbedderError, match=r"starts through_old need 64 words .* there are 0; valid: least_sq"):
        closed_forms(old[0], new[0], [INSTRUCTION], only=["through_old"])


def test_a_backbone_too_big_is_refused_before_it_is_loaded(tiny_model, config, monkeypatch):
    model = tiny_model("llama")
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("M", (), {"available": 1000, "total": 1000})())
    monkeypatch.setattr(locate_module, "locate", lambda *a: pytest.fail("fetched"))
    with pytest.raises(PromptEmbedderError, match=r"GiB of weights in float32, 0\.0 GiB are free on cpu"):
        transfer(model, config())


def test_without_a_shared_vocabulary(tiny_model, config, tmp_path, monkeypatch, caplog):
    nothing = torch.zeros(0, dtype=torch.long)
    monkeypatch.setattr(vocabulary_module, "shared_vocabulary", lambda *a: (nothing, nothing))
    with pytest.raises(PromptEmbedderError, match="shares too few tokens with the prompter for a closed-form start"):
        transfer(tiny_model("llama"), config())
    result = transfer(tiny_model("llama"), config(rows=True))
    assert result.starts[0].name == result.stages[0].name == "random"
    assert "W starts at random" in caplog.text
    (tmp_path / "texts.txt").write_text("\n".join(f"{text} {n}" for n in range(4) for text in TEXTS))
    assert not transfer(tiny_model("llama"), config(texts=("texts.txt",))).model[0].settings.centred
    asked = config(texts=("texts.txt",), centred=True)
    assert transfer(tiny_model("llama"), asked).model[0].settings.centred


def test_command(tiny_model, tiny_lm, tmp_path, command, run_config):
    run_config()
    save(tiny_model("llama"), tmp_path / "model")
    options = (
        "--backbone",
        tiny_lm("qwen2", 48, 5),
        "--data",
        tmp_path,
        "--train",
        "rows.jsonl",
        "--dev",
        "pairs.jsonl",
    )
    small = ("training.max_steps=2", "training.batch_size=4", "evaluation.every_steps=1")
    done = command("transfer", tmp_path / "model", *small, *options, "-o", tmp_path / "out")
    assert done.code == 0, done.err
    line = json.loads(done.out.splitlines()[-1])
    assert set(line) == {"dev_spearman", "start", "model"}
    assert command("info", line["model"]).code == 0
    wrong = command("transfer", tmp_path / "model")
    assert (wrong.code, wrong.err.strip()) == (2, "promptembedder: give the new backbone: --backbone NAME")


def test_the_model_to_be_moved_is_not_overwritten(tiny_model, config, tmp_path):
    save(tiny_model("llama"), tmp_path / "moved" / "model")
    before = (tmp_path / "moved" / "model" / "alignment.safetensors").read_bytes()
    with pytest.raises(PromptEmbedderError, match=r"holds a model with the old backbone.*training.output"):
        transfer(load(tmp_path / "moved" / "model"), config())
    assert (tmp_path / "moved" / "model" / "alignment.safetensors").read_bytes() == before
    # An earlier result is.
    elsewhere = config(training={"output": str(tmp_path / "other")})
    for _ in range(2):
        transfer(load(tmp_path / "moved" / "model"), elsewhere)


@pytest.mark.parametrize(("rows", "steps"), [(False, 4), (True, 0), (True, 4)])
def test_what_belongs_to_the_old_backbone_starts_anew(tiny_model, config, rows, steps, caplog):
    old = tiny_model("llama", deep_soft_prompt=True, linear_head=True, backbone_layers=1)
    moved = transfer(old, config(rows=rows, training={"max_steps": steps})).model[0]
    assert moved.settings.backbone_layers is None
    assert len(moved.alignment.deep) == 2 > len(old[0].alignment.deep)
    assert ("starts anew" in caplog.text) is not (rows and steps > 0)
    kept = transfer(old, config(backbone_layers=1)).model[0]
    assert len(kept.alignment.deep) == 1


@pytest.mark.parametrize("layout", ["suffix", "prefix"])
def test_a_closed_form_is_centred_on_plain_texts_without_any_training(tiny_model, config, tmp_path, layout):
    texts = [f"{text} {n}" for n in range(4) for text in TEXTS]
    (tmp_path / "plain.txt").write_text("".join(f"{text}\n" for text in texts))
    # Not a text with itself: which of these pairs is closest, the last digit decides.
    pairs = [{"sentence1": a, "sentence2": b, "score": len(a)} for a in TEXTS for b in TEXTS if a < b]
    (tmp_path / "different.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    settings = config(
        training={"max_steps": 0},
        evaluation={"dev": "different.jsonl"},
        texts=(str(tmp_path / "plain.txt"),),
        text_instructions=(INSTRUCTION,),
    )
    old = tiny_model("llama", layout=layout)
    result = transfer(old, settings)
    assert [stage.name for stage in result.stages] == ["closed_form"]
    opened = load(result.folder)[0]
    assert opened.settings.centred
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
    assert not transfer(old, replace(settings, centred=False)).model[0].settings.centred


@pytest.mark.parametrize("own", [{}, {"text_state_cache": 2**26, "text_state_folder": "states"}])
def test_the_new_backbone_reads_each_text_once(tiny_model, config, tmp_path, monkeypatch, own):
    """For all starts, the mean, steps, dev and test scores together; on disk for the next transfer, too."""
    if own:
        own = {**own, "text_state_folder": str(tmp_path / own["text_state_folder"])}
    old = tiny_model(layout="suffix")
    calls = []
    read = Backbone._read_chunks

    def reading(self, ids_BT, mask_BT):
        if self is not old[0].backbone:
            calls.append({tuple(ids_T[mask_T.bool()].tolist()) for ids_T, mask_T in zip(ids_BT, mask_BT, strict=True)})
        return read(self, ids_BT, mask_BT)

    monkeypatch.setattr(Backbone, "_read_chunks", reading)
    plain = [f"{text}, and {n}" for n in range(4) for text in TEXTS]
    (tmp_path / "plain.txt").write_text("".join(f"{text}\n" for text in plain))
    other = [{"sentence1": f"{text} once", "sentence2": f"{text} more", "score": len(text)} for text in TEXTS]
    (tmp_path / "other.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in other))
    settings = config(
        training={"max_steps": 20, **own},
        evaluation={"test": "other.jsonl"},
        texts=(str(tmp_path / "plain.txt"),),
        rows=True,
        centred=True,
    )
    moved = transfer(old, settings)
    texts = [text for call in calls for text in call]
    assert len(texts) == len(set(texts))
    rows = {row["query"] for row in map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())}
    assert len(texts) > len(TEXTS) + len(plain) + 2 * len(other) + len(rows) // 2  # of all kinds
    assert moved.model[0].backbone.text_cache is None
    calls.clear()
    transfer(old, replace(settings, training=replace(settings.training, output=str(tmp_path / "next"))))
    assert bool(calls) != bool(own)


@pytest.mark.parametrize(("layout", "rows"), [("prefix", True), ("suffix", False)])
def test_what_comes_up_once_is_not_held(tiny_model, config, tmp_path, monkeypatch, layout, rows):
    (tmp_path / "plain.txt").write_text("".join(f"{text}, and {n}\n" for n in range(4) for text in TEXTS))
    opened = []
    monkeypatch.setattr(sys.modules["promptembedder.transfer"], "text_cache", lambda *given: opened.append(given))
    transfer(
        tiny_model(layout=layout),
        config(rows=rows, texts=(str(tmp_path / "plain.txt"),), evaluation={"dev": "pairs.jsonl" if rows else None}),
    )
    assert not opened


def test_nothing_is_held_after_an_error(tiny_model, config, monkeypatch):
    place, made = sys.modules["promptembedder.transfer"], []
    monkeypatch.setattr(place, "on_backbone", lambda *a, **k: made.append(on_backbone(*a, **k)) or made[0])
    monkeypatch.setattr(place, "_train_stages", lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        transfer(tiny_model(layout="suffix"), config(rows=True))
    assert made[0][0].backbone.text_cache is None


def dev_of(result, settings):
    evaluator = pair_evaluator(settings.evaluation, settings.data.root, "dev")
    return evaluator(load(result.folder))["dev_spearman_cosine"]


def test_a_centre_belongs_to_the_old_backbone(tiny_model, config, tmp_path, caplog):
    old = tiny_model("llama", centred=True)
    old[0].subtract(torch.ones(old[0].get_embedding_dimension()))
    assert not transfer(old, config()).model[0].settings.centred
    assert "the mean that the model subtracts belongs to its backbone" in caplog.text
    assert not transfer(old, config(rows=True)).model[0].settings.centred
    unfrozen = config(rows=True, unfrozen_steps=1, training={"max_steps": 0})
    assert not transfer(old, unfrozen).model[0].settings.centred  # it trains
    trained = transfer(old, config(rows=True, centred=True))
    new = trained.model[0]
    assert new.settings.centred
    assert new.centre_E.norm() > 0
    assert torch.equal(load(trained.folder)[0].centre_E, new.centre_E)
    assert torch.equal(old[0].centre_E, torch.ones(old[0].get_embedding_dimension()))
    (tmp_path / "texts.txt").write_text("\n".join(f"{text} {n}" for n in range(4) for text in TEXTS))
    for rows in (False, True):
        both = transfer(old, config(rows=rows, texts=("texts.txt",)))
        assert both.model[0].settings.centred is not rows


def test_layers_that_are_read_belong_to_the_old_backbone(tiny_model, config, caplog):
    result = transfer(tiny_model("llama", readout_layers=(1,)), config())
    assert result.model[0].settings.readout_layers == result.model[0].backbone.readout_layers == ()
    assert "readout_layers belongs to the model's backbone" in caplog.text


def test_prompts_and_a_shorter_embedding_are_handed_on(tiny_model, config):
    old = tiny_model("llama")
    old.prompts, old.default_prompt_name, old.truncate_dim = {"query": INSTRUCTION}, "query", 8
    result = transfer(old, config())
    for moved in (result.model, load(result.folder)):
        assert (moved.prompts["query"], moved.default_prompt_name, moved.truncate_dim) == (INSTRUCTION, "query", 8)
        assert moved.encode(["A text."]).shape == (1, 8)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_transfer_leaves_the_old_models_weights_alone(tiny_model, config, dtype):
    old = tiny_model("llama", dtype=dtype, linear_head=True)
    before = {name: p.detach().clone() for name, p in old.named_parameters()}
    result = transfer(old, config(rows=True))
    for name, parameter in old.named_parameters():
        assert torch.equal(parameter, before[name]), name
    opened = load(result.folder)
    assert torch.equal(opened[1].linear.weight, result.model[1].linear.weight)


def test_a_prompter_to_share_is_compared_by_value_before_anything_is_done(tiny_model, config, tmp_path, monkeypatch):
    save(tiny_model("llama"), tmp_path / "old")
    weights = tmp_path / "old" / "prompter" / "adapter_model.safetensors"
    save_file({name: value.half() for name, value in load_file(weights).items()}, weights)
    transfer(load(tmp_path / "old"), config(), share_prompter=tmp_path / "old")
    other = tiny_model("llama")
    with torch.no_grad():
        next(p for n, p in other.named_parameters() if "lora_B" in n).add_(1)
    monkeypatch.setattr("promptembedder.llms.locate.locate", None)
    with pytest.raises(PromptEmbedderError, match="is another one than the model's; it cannot be shared"):
        transfer(other, config(), share_prompter=tmp_path / "old")


def test_a_shared_prompter(tiny_model, config, tmp_path):
    save(tiny_model("llama"), tmp_path / "old")
    result = transfer(load(tmp_path / "old"), config(), share_prompter=tmp_path / "old")
    folder = tmp_path / "moved" / "model"
    assert not (folder / "prompter").exists()
    expected = result.model.encode(TEXTS)
    assert np.allclose(load(folder).encode(TEXTS), expected, atol=1e-5)
    # The two folders may move together.
    (tmp_path / "elsewhere").mkdir()
    for name in ("old", "moved"):
        (tmp_path / name).rename(tmp_path / "elsewhere" / name)
    there = tmp_path / "elsewhere" / "moved" / "model"
    assert np.allclose(load(there).encode(TEXTS), expected, atol=1e-5)
    # Saved again, the model stands alone.
    save(load(there), tmp_path / "alone")
    assert np.allclose(load(tmp_path / "alone").encode(TEXTS), expected, atol=1e-5)
    weights = tmp_path / "elsewhere" / "old" / "prompter" / "adapter_model.safetensors"
    other = tiny_model("llama")
    with torch.no_grad():
        next(p for n, p in other.named_parameters() if "lora_B" in n).add_(1)
    save(other, tmp_path / "other")
    # A model that shares a prompter can lend it on.
    again = config(("gemma3", 32, 0), training={"output": str(tmp_path / "third")})
    transfer(load(there), again, share_prompter=there)
    assert load(tmp_path / "third" / "model").encode(TEXTS).shape == (5, 32)
    with pytest.raises(PromptEmbedderError, match="is another one than the model's; it cannot be shared"):
        save(load(there), tmp_path / "wrong", share_prompter=tmp_path / "other")
    assert not (tmp_path / "wrong").exists()
    weights.write_bytes((tmp_path / "other" / "prompter" / weights.name).read_bytes())
    with pytest.raises(PromptEmbedderError, match="which has been altered since"):
        load(there)
    weights.unlink()
    with pytest.raises(PromptEmbedderError, match="which is not there"):
        load(there)


def test_a_transfer_does_not_go_into_a_saved_model(tiny_model, config, tmp_path):
    save(tiny_model("llama"), tmp_path / "model")
    before = sorted(path.name for path in (tmp_path / "model").iterdir())
    with pytest.raises(PromptEmbedderError, match=r"model is itself a saved model; choose another training\.output"):
        transfer(load(tmp_path / "model"), config(training={"output": str(tmp_path / "model")}))
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == before


def test_nothing_is_said_to_be_trained_by_a_closed_form(tiny_model, config):
    result = transfer(tiny_model("llama"), config())
    assert read_facts(result.folder)["trained_parameters"] == read_facts(result.folder)["steps"] == 0
