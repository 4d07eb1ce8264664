"""The bridge between two models' spaces: a known map is found, what it keeps is measured, bad input is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import save_file

from conftest import TEXTS
from promptembedder import PromptEmbedderError, save
from promptembedder.bulk.bridge import Bridge, fit, load


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.fixture
def embedded():
    drawn = np.random.default_rng(0)
    new = unit(drawn.normal(size=(400, 12)))
    rotation = np.linalg.qr(drawn.normal(size=(16, 16)))[0][:12]
    return new, unit(new @ rotation), rotation


def test_a_known_map_is_found(embedded):
    new, old, rotation = embedded
    bridge = fit(new, old)
    assert np.allclose(bridge(new), old, atol=1e-3)
    assert np.allclose(unit(bridge.weight_DF), rotation, atol=1e-3)
    assert bridge.facts["cosine"] > 0.999
    assert bridge.facts["neighbours_kept"] > 0.99


def test_what_is_lost_is_measured_on_texts_held_back(embedded):
    new, old, _ = embedded
    unrelated = unit(np.random.default_rng(1).normal(size=old.shape))
    lost = fit(new, unrelated).facts
    assert lost["cosine"] < 0.3
    assert lost["neighbours_kept"] < 0.2


def test_saved_and_opened(embedded, tmp_path):
    new, old, _ = embedded
    bridge = fit(new, old)
    bridge.save(tmp_path / "b.safetensors")
    opened = load(tmp_path / "b.safetensors")
    assert np.array_equal(opened(new), bridge(new))
    assert opened.facts == bridge.facts
    opened.check(old[0])  # fitted without a probe: for anyone
    fit(new, old, probe_D=new[0]).save(tmp_path / "b.safetensors")
    load(tmp_path / "b.safetensors").check(new[0] + 1e-3)
    with pytest.raises(PromptEmbedderError, match="fitted for another model or under another instruction"):
        load(tmp_path / "b.safetensors").check(new[1])
    assert [path.name for path in tmp_path.iterdir()] == ["b.safetensors"]


def test_bad_input(embedded, tmp_path):
    new, old, _ = embedded
    with pytest.raises(PromptEmbedderError, match="at least 100 texts encoded by both models, found 50 and 50"):
        fit(new[:50], old[:50])
    with pytest.raises(PromptEmbedderError, match="found 400 and 399"):
        fit(new, old[:399])
    with pytest.raises(PromptEmbedderError, match=r"takes embeddings of 12 dimensions, found shape \(400, 16\)"):
        fit(new, old)(old)
    with pytest.raises(PromptEmbedderError, match="no bridge at"):
        load(tmp_path / "none.safetensors")
    (tmp_path / "bad.safetensors").write_text("no")
    with pytest.raises(PromptEmbedderError, match=r"bad.safetensors is not a bridge"):
        load(tmp_path / "bad.safetensors")
    for weight in (np.ones(3, np.float32), np.full((2, 2), np.nan, np.float32)):
        save_file({"weight": weight}, tmp_path / "bad.safetensors", metadata={"facts": "{}"})
        with pytest.raises(PromptEmbedderError, match=r"bad.safetensors is not a bridge"):
            load(tmp_path / "bad.safetensors")
    with pytest.raises(PromptEmbedderError, match="by the old model are not finite"):
        fit(new, np.where(np.arange(len(old))[:, None] == 3, np.nan, old))
    (tmp_path / "file").touch()
    with pytest.raises(PromptEmbedderError, match="cannot be written"):
        Bridge(np.eye(2, dtype=np.float32), {}).save(tmp_path / "file" / "b.safetensors")


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("promptembedder.bulk.bridge.save_file", full)
    with pytest.raises(PromptEmbedderError, match=r"b.safetensors cannot be written: No space left"):
        Bridge(np.eye(2, dtype=np.float32), {}).save(tmp_path / "b.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_commands(tiny_model, tiny_lm, tmp_path, command):
    new = tiny_model("qwen2", backbone=str(tiny_lm("qwen2", 48, 5)), alignment_start="random")
    save(tiny_model("llama"), tmp_path / "old")
    save(new, tmp_path / "new")
    (tmp_path / "texts.txt").write_text("\n".join(f"{text} {n}" for n in range(25) for text in TEXTS))
    done = command(
        "bridge", tmp_path / "old", tmp_path / "new", tmp_path / "texts.txt", "-o", tmp_path / "b.safetensors"
    )
    assert done.code == 0, done.err
    facts = json.loads(done.out.splitlines()[-1])
    assert facts["texts"] == 125
    encoded = ("encode", tmp_path / "new", tmp_path / "texts.txt", "--bridge", tmp_path / "b.safetensors")
    assert command(*encoded, "-o", tmp_path / "v.npy").code == 0
    vectors = np.load(tmp_path / "v.npy")
    assert vectors.shape == (125, 32)
    lines = (tmp_path / "texts.txt").read_text().splitlines()
    assert np.allclose(vectors, load(tmp_path / "b.safetensors")(new.encode(lines)), atol=1e-5)
    wrong = command(*encoded, "--truncate-dim", 8, "-o", tmp_path / "w.npy")
    assert (wrong.code, len(wrong.err.strip().splitlines())) == (2, 1)
    other = command(*encoded, "-i", "Something else altogether.", "-o", tmp_path / "w.npy")
    assert other.code == 2
    assert "fitted for another model or under another instruction" in other.err
    assert not (tmp_path / "w.npy").exists()
    nowhere = command("bridge", tmp_path / "old", tmp_path / "new", tmp_path / "texts.txt", "-o", tmp_path / "no" / "b")
    assert "cannot be written" in nowhere.err
    folder = command("bridge", tmp_path / "old", tmp_path / "new", tmp_path / "texts.txt", "-o", tmp_path / "new")
    assert "it is a folder" in folder.err
    blank = command("bridge", tmp_path / "old", tmp_path / "new", tmp_path / "texts.txt", "-i", " ")
    assert "--instruction must be a sentence" in blank.err
    gone = command("bridge", tmp_path / "none", tmp_path / "new", tmp_path / "texts.txt", "-o", tmp_path / "g")
    assert len(gone.err.strip().splitlines()) == 1  # no bar: nothing was read
    assert f"no model at {tmp_path / 'none'}" in gone.err


def test_a_bridge_that_may_not_be_read_is_not_called_missing(tmp_path, closed):
    path = tmp_path / "bridge.safetensors"
    Bridge(np.eye(4, dtype=np.float32), {}).save(path)
    closed(path)
    with pytest.raises(PromptEmbedderError, match=f"{path} cannot be read: Permission denied"):
        load(path)
