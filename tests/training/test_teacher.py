"""A teacher: its embeddings beside rows, batches of neighbours, what is refused, and that a model learns from it."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import DatasetDict
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling

from conftest import INSTRUCTION, TEXTS
from promptembedder import PromptEmbedderError, TrainingConfig
from promptembedder.data.rows import Neighbourhoods, TrainingData, load_training_data
from promptembedder.data.settings import DataConfig, DataFile
from promptembedder.evaluation.encoder import plain_reader
from promptembedder.training import teacher as teaching
from promptembedder.training.callbacks import PrompterFreeze
from promptembedder.training.run_folder import note_settings
from promptembedder.training.settings import RunConfig
from promptembedder.training.teacher import TEACHER_FILE, neighbourhoods, open_teacher, teach
from promptembedder.training.train import train
from promptembedder.training.trainer import NeighbourhoodSampler

MANY = [f"{text} {n}" for n in range(8) for text in TEXTS]


@pytest.fixture
def teacher(tiny_lm, tmp_path):
    """A folder of an ordinary embedding model, of another width than the student."""
    reader = plain_reader(str(tiny_lm("qwen2", width=48)), torch.float32)
    built = SentenceTransformer(modules=[reader, Pooling(48, pooling_mode="mean"), Normalize()], device="cpu")
    built.save(str(tmp_path / "teacher"))
    return tmp_path / "teacher"


@pytest.fixture
def plain(tmp_path):
    (tmp_path / "plain.txt").write_text("".join(f"{text}\n" for text in MANY))
    return DataConfig(root=str(tmp_path), texts=("plain.txt",))


def settings_of(teacher, tmp_path, **changes):
    given = {"output": str(tmp_path / "run"), "max_steps": 6, "batch_size": 8, "teacher": str(teacher)}
    return TrainingConfig(**(given | changes))


def taught(config, settings, tmp_path, **options):
    return teach(config, settings, TrainingData(DatasetDict(), {}), INSTRUCTION, tmp_path / "run", **options)


@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_labels_are_the_teachers_embeddings(teacher, plain, tmp_path, monkeypatch, dtype, near):
    monkeypatch.setattr(teaching, "resolve_dtype", lambda *setting: dtype)
    monkeypatch.setattr(teaching, "open_teacher", lambda name, device: open_teacher(name, "cpu"))
    data, _ = taught(plain, settings_of(teacher, tmp_path), tmp_path)
    (rows,) = data.datasets.values()
    expected = SentenceTransformer(str(teacher), device="cpu").encode(rows["anchor"])
    found = np.array(rows["label"])
    np.testing.assert_allclose(found, expected, atol=near)
    assert np.allclose(found, expected, atol=1e-5) == (dtype is torch.float32)
    assert data.prompts == {"teacher_1": {"anchor": INSTRUCTION}}
    assert set(rows["anchor"]) <= set(MANY)


def test_neighbours_are_near_each_other():
    draw = np.random.default_rng(0)
    corner = draw.permutation(np.repeat(np.eye(4), 16, axis=0))
    points = corner + 0.01 * draw.standard_normal(corner.shape)
    found = np.array(neighbourhoods(points.astype(np.float32), 8, seed=1))
    assert len(set(found)) == 4
    for place in set(found):
        assert len({int(row.argmax()) for row in corner[found == place]}) == 1


@pytest.mark.parametrize("draws", [5, 12, 30])
def test_a_sampler_goes_neighbourhood_by_neighbourhood(draws):
    near = Neighbourhoods(of=(0, 1, 2) * 4, draws=draws)
    drawn = list(NeighbourhoodSampler(near, torch.Generator().manual_seed(3)))
    assert len(drawn) == len(NeighbourhoodSampler(near, None)) == draws
    for start in range(0, draws, 12):
        part = drawn[start : start + 12]
        assert len(set(part)) == len(part)
        places = [n % 3 for n in part]
        assert sum(a != b for a, b in itertools.pairwise(places)) <= 2


@pytest.mark.slow
def test_a_model_learns_the_teachers_similarities(teacher, plain, tiny_lm, tmp_path):
    lm = str(tiny_lm("llama"))
    settings = settings_of(teacher, tmp_path, max_steps=30, alignment_learning_rate=5e-3, warm_start={"steps": 0})
    model = {"prompter": lm, "backbone": lm, "dtype": "float32", "lora_rank": 4, "default_instruction": INSTRUCTION}
    result = train(RunConfig(model=model, data=plain, training=settings))
    losses = [line["loss"] for line in result.history if "loss" in line]
    assert losses[-1] < 0.7 * losses[0]


def test_rows_and_teacher_share_the_batches(teacher, plain, tmp_path):
    lines = [{"query": text, "pos": [text[::-1]], "instruction": INSTRUCTION} for text in MANY]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = replace(plain, files=(DataFile(path="rows.jsonl", aspect="meaning"),))
    rows = load_training_data(config, INSTRUCTION, 1)
    settings = settings_of(teacher, tmp_path, max_steps=100, teacher_share=0.25)
    data, _ = teach(config, settings, rows, "Unused.", tmp_path / "run")
    drawn = sum(near.draws for near in data.neighbourhoods.values())
    assert drawn == pytest.approx(len(MANY) / 3, abs=1)
    assert [data.prompts[name]["anchor"] for name in data.neighbourhoods] == [INSTRUCTION]


def test_embeddings_are_kept_for_later_runs(teacher, plain, tmp_path, monkeypatch):
    settings = settings_of(teacher, tmp_path)
    first, known = taught(plain, settings, tmp_path)
    embeddings = teaching.embeddings

    def embed_few(model, texts, instructions):
        return embeddings(model, texts, instructions) if len(texts) < len(MANY) / 2 else pytest.fail("embedded again")

    monkeypatch.setattr(teaching, "embeddings", embed_few)
    # A run that was stopped before its first checkpoint starts again from the beginning.
    for resume in (True, False):
        again, same = taught(plain, settings, tmp_path, resume=resume)
        assert known == same
        assert again.datasets["teacher_1"]["label"] == first.datasets["teacher_1"]["label"]
    (tmp_path / "run" / TEACHER_FILE).write_bytes(b"damaged")
    with pytest.raises(pytest.fail.Exception, match="embedded again"):
        taught(plain, settings, tmp_path, resume=True)


def test_flat_similarities_are_said(teacher, plain, tmp_path, monkeypatch, caplog):
    flat = np.ones((len(MANY), 3), dtype=np.float32) / np.sqrt(3)
    monkeypatch.setattr("promptembedder.training.teacher.embeddings", lambda m, texts, i: [flat[: len(texts)]])
    taught(plain, settings_of(teacher, tmp_path), tmp_path)
    assert "nearly equally alike" in caplog.text


def test_what_is_refused(teacher, plain, tmp_path):
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("empty", "no embedding model: the folder has no modules.json"),
        ("nowhere", "no such folder"),
    ):
        with pytest.raises(PromptEmbedderError, match=message):
            open_teacher(str(tmp_path / name))
    with pytest.raises(PromptEmbedderError, match="40 different texts for a teacher and batches of 64"):
        taught(plain, settings_of(teacher, tmp_path, batch_size=64), tmp_path)
    with pytest.raises(PromptEmbedderError, match=r"data\.texts needs training\.teacher"):
        train(RunConfig(data=plain, training=TrainingConfig(output=str(tmp_path / "run"))))


def test_a_teacher_with_code_of_its_own_is_refused(teacher):
    modules = json.loads((teacher / "modules.json").read_text())
    modules[0]["type"] = "theirs.Module"
    (teacher / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(PromptEmbedderError, match="cannot be opened"):
        open_teacher(str(teacher))


def test_the_prompter_is_frozen_after_its_steps(tiny_model):
    module = tiny_model("llama")[0]
    module.prompter.requires_grad_(True)
    freeze, state = PrompterFreeze(module, 3), type("State", (), {"global_step": 2})()
    freeze.on_step_begin(None, state, None)
    assert any(parameter.requires_grad for parameter in module.prompter.parameters())
    state.global_step = 3
    freeze.on_step_begin(None, state, None)
    assert not any(parameter.requires_grad for parameter in module.prompter.parameters())


def test_embeddings_of_many_instructions_keep_their_order(tmp_path):
    instructions = [f"Instruction {n}." for n in range(12)]
    made = [np.full((2, 3), n, dtype=np.float32) for n in range(12)]
    teaching._keep(tmp_path, "known", ["a", "b"], instructions, made)
    kept = teaching._kept(tmp_path, "known", ["a", "b"], instructions)
    assert [float(embedded[0, 0]) for embedded in kept] == list(range(12))


def test_another_teacher_is_refused_in_a_resume(teacher, plain, tmp_path):
    settings = settings_of(teacher, tmp_path)
    _, facts = taught(plain, settings, tmp_path)
    note_settings(tmp_path / "run", settings, resumed=False, **facts)
    model = SentenceTransformer(str(teacher), device="cpu")
    with torch.no_grad():
        next(model.parameters()).add_(1)
    model.save(str(tmp_path / "other"))
    kept = (tmp_path / "run" / TEACHER_FILE).read_bytes()
    with pytest.raises(PromptEmbedderError, match=r"began with another training\.teacher"):
        taught(plain, settings_of(tmp_path / "other", tmp_path), tmp_path, resume=True)
    assert (tmp_path / "run" / TEACHER_FILE).read_bytes() == kept


def test_a_teacher_in_the_output_or_without_numbers_is_refused(teacher, plain, tmp_path, monkeypatch):
    with pytest.raises(PromptEmbedderError, match=r"lies in training\.output"):
        taught(plain, settings_of(tmp_path / "run" / "model", tmp_path), tmp_path)
    nothing = np.full((len(MANY), 3), np.nan, dtype=np.float32)
    monkeypatch.setattr("promptembedder.training.teacher.embeddings", lambda m, texts, i: [nothing[: len(texts)]])
    with pytest.raises(PromptEmbedderError, match="not numbers"):
        taught(plain, settings_of(teacher, tmp_path), tmp_path)


def test_another_pooling_is_another_teacher(teacher, plain, tmp_path):
    settings = settings_of(teacher, tmp_path)
    first, known = taught(plain, settings, tmp_path)
    pooling = next(teacher.glob("*Pooling/config.json"))
    pooling.write_text(pooling.read_text().replace('"mean"', '"cls"'))
    again, same = taught(plain, settings, tmp_path)
    assert same == known  # the weights are
    assert not np.allclose(again.datasets["teacher_1"]["label"], first.datasets["teacher_1"]["label"], atol=1e-3)
    pooling.write_text(pooling.read_text().replace('"cls"', '"mean"'))
    with pytest.raises(PromptEmbedderError, match=r"began with another training\.teacher"):
        taught(plain, settings, tmp_path, resume=True)


def test_other_texts_are_refused_in_a_resume(teacher, plain, tiny_lm, tmp_path):
    lm = str(tiny_lm("llama"))
    settings = settings_of(teacher, tmp_path, arguments={"save_steps": 3}, warm_start={"steps": 0})
    model = {"prompter": lm, "backbone": lm, "dtype": "float32", "lora_rank": 4, "default_instruction": INSTRUCTION}
    train(RunConfig(model=model, data=plain, training=settings))
    (tmp_path / "plain.txt").write_text("".join(f"{text}!\n" for text in MANY))
    with pytest.raises(PromptEmbedderError, match=r"began with other data\.texts"):
        train(RunConfig(model=model, data=plain, training=replace(settings, max_steps=9)), resume=True)
    (tmp_path / "plain.txt").write_text("".join(f"{text}\n" for text in MANY))
    train(RunConfig(model=model, data=plain, training=replace(settings, max_steps=9)), resume=True)


def test_a_refusal_leaves_a_finished_run_as_it_is(teacher, plain, tiny_lm, tmp_path):
    lm = str(tiny_lm("llama"))
    settings = settings_of(teacher, tmp_path, arguments={"save_steps": 3}, warm_start={"steps": 0})
    model = {"prompter": lm, "backbone": lm, "dtype": "float32", "lora_rank": 4, "default_instruction": INSTRUCTION}
    train(RunConfig(model=model, data=plain, training=settings))

    def files():
        found = [path for path in (tmp_path / "run").rglob("*") if path.is_file() and path.name != TEACHER_FILE]
        return {path: path.read_bytes() for path in found}

    before = files()
    too_large = replace(settings, seed=2, text_state_cache=10**18, text_state_folder=str(tmp_path / "states"))
    with pytest.raises(PromptEmbedderError, match="larger than the room"):
        train(RunConfig(model=model, data=plain, training=too_large))
    assert files() == before
    inside = replace(too_large, text_state_folder=str(tmp_path / "run" / "model" / "states"))
    with pytest.raises(PromptEmbedderError, match=r"lies in .*model, which is replaced"):
        train(RunConfig(model=model, data=plain, training=inside))
    train(RunConfig(model=model, data=plain, training=replace(settings, seed=2, max_steps=3)))
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-3"]
