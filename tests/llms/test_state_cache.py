"""Text-state cache: changes no embedding, keeps its budget, survives damage, serves texts in any company."""

from __future__ import annotations

import logging
import os

import numpy as np
import psutil
import pytest
import torch

from conftest import ARCHITECTURES, FIRST_QUICK, INSTRUCTION, TEXTS
from promptembedder import PromptEmbedderError
from promptembedder.llms.state_cache import open_text_cache
from promptembedder.llms.states import packed, unpacked
from promptembedder.model.leaves import TrainingState
from promptembedder.training.losses import make_loss
from promptembedder.training.settings import TrainingConfig

MIB = 2**20


def embed(module, texts):
    """As training does: with gradients, so that texts and soft prompt are two segments."""
    return module(module.preprocess(texts, prompt=INSTRUCTION))["sentence_embedding"].detach()


def hold(module, cache):
    """From now on the module keeps states of texts here, as it does in training."""
    module.training_state = TrainingState(text_cache=cache)
    return cache


def opened(folder=None, budget=MIB, identity="one", **options):
    return open_text_cache(budget, identity=identity, folder=folder, **options)


@pytest.mark.parametrize("architecture", FIRST_QUICK)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("where", ["memory", "disk"])
def test_bitwise_the_same_embeddings(tiny_model, tmp_path, architecture, dtype, where):
    module = tiny_model(architecture, dtype=dtype)[0]
    without = embed(module, TEXTS)
    cache = hold(module, opened(tmp_path / "states" if where == "disk" else None))
    filled, found = embed(module, TEXTS), embed(module, TEXTS)
    assert (cache.hits, cache.misses) == (len(TEXTS), len(TEXTS))
    assert torch.equal(filled, without)
    assert torch.equal(found, without)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_in_other_company(tiny_model, architecture):
    """Found and new texts in one batch, longest first or last, windows shorter than texts among them."""
    module = tiny_model(architecture)[0]
    expected = embed(module, TEXTS)
    for first in ([0, 1], [3], [2, 4, 0]):
        hold(module, opened())
        embed(module, [TEXTS[n] for n in first])
        assert torch.allclose(embed(module, TEXTS), expected, atol=1e-5)
        for n, text in enumerate(TEXTS):
            assert torch.allclose(embed(module, [text])[0], expected[n], atol=1e-5)
        assert module.training_state.text_cache.misses == len(TEXTS)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packed_rows_make_the_same_states(tiny_model, architecture):
    module = tiny_model(architecture)[0]
    features = module.preprocess(TEXTS)
    states = module.backbone.read_text(features["input_ids"], features["attention_mask"])
    empty = type(states.cache)(config=module.backbone.lm.config)
    again = unpacked(packed(states), states.mask_BL, empty, torch.float32)
    for one, other in zip(states.cache.layers, again.cache.layers, strict=True):
        assert one.get_seq_length() == other.get_seq_length()
        seen = states.mask_BL[:, None, -one.keys.shape[2] :, None].bool()
        for name in ("keys", "values"):
            assert torch.equal(getattr(one, name) * seen, getattr(other, name) * seen)


@pytest.mark.parametrize(("precision", "size", "close"), [("bfloat16", 0.5, 0.02), ("int8", 0.33, 0.03)])
def test_smaller_precisions(tiny_model, tmp_path, precision, size, close):
    module = tiny_model()[0]
    exact = embed(module, TEXTS)
    full = hold(module, opened())
    embed(module, TEXTS)
    for folder in (None, tmp_path / precision):
        cache = hold(module, opened(folder, precision=precision))
        computed, found = embed(module, TEXTS), embed(module, TEXTS)
        assert torch.equal(computed, found)  # a text reads the same whether just computed or found
        assert not torch.equal(found, exact)
        assert (1 - torch.cosine_similarity(found, exact)).max() < close
        if folder is None:
            assert cache.used_bytes <= size * full.used_bytes


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_least_recently_used_goes_first(tiny_model, tmp_path, where):
    module = tiny_model()[0]
    texts = [f"{word} text" for word in ("one", "two", "six", "ten")]
    sizes = []
    for n in (1, 3):
        cache = hold(module, opened(tmp_path / str(n) if where == "disk" else None))
        embed(module, texts[:n])
        sizes.append(cache.used_bytes)
    assert sizes[1] == pytest.approx(3 * sizes[0], rel=0.35)
    folder = tmp_path / "small" if where == "disk" else None
    cache = hold(module, opened(folder, budget=sizes[1] + 8))
    embed(module, texts[:3])
    embed(module, texts[:1])  # used again, so the second is the oldest now
    embed(module, texts[3:])
    assert cache.used_bytes <= sizes[1] + 8
    device = torch.device("cpu")
    ids = [module.preprocess([text])["input_ids"][0] for text in texts]
    held = [cache.get(cache.key(row), device) is not None for row in ids]
    assert held[0]
    assert not held[1]
    assert held[3]
    if folder:
        assert sum(p.stat().st_size for p in folder.rglob("*.states")) == cache.used_bytes


def test_a_text_larger_than_the_budget_is_not_kept(tiny_model, tmp_path):
    module = tiny_model()[0]
    expected = embed(module, TEXTS)
    for folder in (None, tmp_path / "states"):
        cache = hold(module, opened(folder, budget=100))
        assert torch.equal(embed(module, TEXTS), expected)
        assert cache.used_bytes == 0


def test_found_again_in_another_run(tiny_model, tmp_path):
    module = tiny_model()[0]
    hold(module, opened(tmp_path / "states"))
    expected = embed(module, TEXTS)
    used = module.training_state.text_cache.used_bytes
    cache = hold(module, opened(tmp_path / "states"))
    assert cache.used_bytes == used
    assert torch.equal(embed(module, TEXTS), expected)
    assert cache.misses == 0


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_damaged_files_are_noticed(tiny_model, tmp_path, caplog, damage):
    module = tiny_model()[0]
    hold(module, opened(tmp_path / "states"))
    expected = embed(module, TEXTS)
    for path in (tmp_path / "states").rglob("*.states"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes({"cut": content[:-9], "flipped": content, "empty": b""}[damage])
    cache = hold(module, opened(tmp_path / "states"))
    with caplog.at_level(logging.WARNING):
        assert torch.equal(embed(module, TEXTS), expected)
    assert cache.misses == len(TEXTS)
    assert caplog.text.count("damaged text states") == 1
    assert torch.equal(embed(module, TEXTS), expected)
    assert cache.hits == len(TEXTS)  # rebuilt


@pytest.mark.parametrize("change", ["identity", "precision", "index"])
def test_states_of_another_backbone_are_rebuilt(tiny_model, tmp_path, caplog, change):
    module = tiny_model()[0]
    hold(module, opened(tmp_path / "states"))
    embed(module, TEXTS)
    module.training_state.text_cache.close()
    if change == "index":
        (tmp_path / "states" / "text-states.json").write_text("{")
    options = {"identity": {"identity": "two"}, "precision": {"precision": "int8"}, "index": {}}[change]
    with caplog.at_level(logging.WARNING):
        cache = opened(tmp_path / "states", **options)
    assert "belong to another backbone or precision" in caplog.text
    assert cache.used_bytes == 0
    assert not list((tmp_path / "states").rglob("*.states"))


def test_unwritable_and_foreign_folders(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PromptEmbedderError, match=r"text-state folder .*below cannot be written"):
        opened(tmp_path / "file" / "below")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(PromptEmbedderError, match="holds other files"):
        opened(tmp_path / "thesis")
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"


def test_a_file_that_holds_no_states_stays_where_it_is(tiny_model, tmp_path):
    module = tiny_model()[0]
    hold(module, opened(tmp_path / "states"))
    embed(module, TEXTS)
    module.training_state.text_cache.close()
    (tmp_path / "states" / "ab").mkdir(exist_ok=True)
    other = tmp_path / "states" / "ab" / "readme.states"
    other.write_text("mine")
    again = opened(tmp_path / "states", budget=10)
    assert again.used_bytes == 0
    assert other.read_text() == "mine"


def test_budget_larger_than_what_there_is(tmp_path):
    with pytest.raises(PromptEmbedderError, match=r"text_state_cache of .* GiB is larger than the memory"):
        opened(budget=psutil.virtual_memory().total + 1)
    with pytest.raises(PromptEmbedderError, match=r"GiB is larger than the room on the disk of"):
        opened(tmp_path / "states", budget=2**60)


def test_only_its_own_files_are_thrown_away(tiny_model, tmp_path):
    """A folder that others write to as well, a run's output for one: they keep what is theirs."""
    module = tiny_model()[0]
    hold(module, opened(tmp_path / "states"))
    embed(module, TEXTS)
    module.training_state.text_cache.close()
    (tmp_path / "states" / "model").mkdir()
    (tmp_path / "states" / "model" / "weights").write_text("dear")
    (tmp_path / "states" / "notes.txt").write_text("dear")
    opened(tmp_path / "states", identity="two")
    assert (tmp_path / "states" / "model" / "weights").read_text() == "dear"
    assert (tmp_path / "states" / "notes.txt").exists()
    assert not list((tmp_path / "states").rglob("*.states"))


def test_two_backbones_never_read_each_other(tiny_model, tmp_path):
    """Not even where a lock does not hold, as on some network file systems."""
    module = tiny_model()[0]
    early = opened(tmp_path / "states", identity="one")
    early.close()
    late = opened(tmp_path / "states", identity="two")
    hold(module, early)
    embed(module, TEXTS)
    hold(module, late)
    embed(module, TEXTS)
    assert late.hits == 0


def test_states_in_use_are_not_thrown_away(tiny_model, tmp_path):
    module = tiny_model()[0]
    first = hold(module, opened(tmp_path / "states"))
    embed(module, TEXTS)
    second = opened(tmp_path / "states")  # the same backbone may
    for options in ({"identity": "two"}, {"precision": "int8"}):
        with pytest.raises(PromptEmbedderError, match="another run keeps states of another backbone or precision in"):
            opened(tmp_path / "states", **options)
    first.close()
    with pytest.raises(PromptEmbedderError, match="another run"):
        opened(tmp_path / "states", identity="two")
    assert len(list((tmp_path / "states").rglob("*.states"))) == len(TEXTS)
    second.close()
    (tmp_path / "states" / ".in_use-somebody-dead").touch()
    opened(tmp_path / "states", identity="two").close()
    assert {path.name for path in (tmp_path / "states").glob(".*")} == {".lock"}


def test_workers_share_a_folder_and_its_budget(tiny_model, tmp_path):
    module = tiny_model()[0]
    shares = [opened(tmp_path / "states", worker=n, workers=2) for n in range(2)]
    hold(module, shares[0])
    expected = embed(module, TEXTS)
    hold(module, shares[1])
    assert torch.equal(embed(module, TEXTS), expected)
    assert shares[1].misses == 0
    later = [opened(tmp_path / "states", worker=n, workers=2) for n in range(2)]
    assert sum(share.used_bytes for share in later) == shares[0].used_bytes
    assert len(list((tmp_path / "states").rglob("*.states"))) == len(TEXTS)  # nothing was evicted


def test_what_a_killed_run_left_half_written_goes(tmp_path):
    child = os.fork()
    if not child:
        cache = opened(tmp_path / "states")
        (cache._scratch / "half").write_bytes(b"half")
        os._exit(9)
    os.waitpid(child, 0)
    living = opened(tmp_path / "states")
    assert [p.parent for p in (tmp_path / "states").glob(".promptembedder-*/new")] == [living._scratch.parent]
    opened(tmp_path / "states")
    assert living._scratch.is_dir()


def test_disk_that_fills_up(tiny_model, tmp_path, caplog, monkeypatch):
    module = tiny_model()[0]
    expected = embed(module, TEXTS)
    hold(module, opened(tmp_path / "states"))

    def full(self, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(embed(module, TEXTS), expected)
    assert caplog.text.count("no longer written") == 1


def test_gradients_after_states_came_from_encode(tiny_model):
    """`encode` runs in inference mode; its states must serve training all the same."""
    model = tiny_model()
    module = model[0]
    found = []
    for cached in (False, True):
        hold(module, opened() if cached else None)
        model.encode(TEXTS, prompt=INSTRUCTION)
        model.zero_grad()
        columns = [model.preprocess(t, prompt=INSTRUCTION) for t in (TEXTS, TEXTS[::-1])]
        make_loss(model, TrainingConfig())(columns, None).backward()
        found.append({n: p.grad.clone() for n, p in module.named_parameters() if p.requires_grad})
    assert module.training_state.text_cache.misses == len(TEXTS)
    for name, gradient in found[0].items():
        assert np.allclose(gradient, found[1][name], atol=1e-5), name
