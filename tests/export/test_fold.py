"""A deep soft prompt made into soft tokens, and a head that fits them."""

from __future__ import annotations

import importlib
from dataclasses import replace

import numpy as np
import pytest
import torch

import promptembedder
from conftest import INSTRUCTION, MANY, SECOND, TEXTS
from promptembedder import PromptEmbedderError
from promptembedder.export import fold as folding
from promptembedder.export.compiled import compile_model, embed_compiled
from promptembedder.export.export import FoldData, add, export
from promptembedder.export.fold import fold

exporting = importlib.import_module("promptembedder.export.export")  # the package's name of it is the function
PLAIN = [f"{text} {n}" for n in range(5) for text in MANY]


@pytest.fixture
def deep(tiny_model):
    model = tiny_model(deep_rank=2, linear_head=True)
    torch.manual_seed(3)
    with torch.no_grad():
        model[0].alignment.deep_out.normal_(std=0.05)
        model[1].linear.weight.normal_(std=0.2)
    return model


@pytest.mark.slow
def test_a_fold_comes_closer_to_the_deep_model(deep):
    compiled = compile_model(deep, {"query": INSTRUCTION})
    pairs = (TEXTS[:4], TEXTS[1:], [1.0, 2.0, 3.0, 4.0])
    found = fold(deep, compiled, PLAIN, rows=7, dev=pairs, steps=40)
    again = fold(deep, compiled, PLAIN, rows=7, steps=40)
    plain = fold(deep, compiled, PLAIN, rows=7, steps=0)
    assert not found.compiled.is_deep
    assert found.compiled.num_soft_tokens == 7
    assert compiled.is_deep  # a new one was made
    torch.testing.assert_close(again.compiled.prompts["query"].soft_KD, found.compiled.prompts["query"].soft_KD)
    for name in compiled.prompts:
        kept = found.facts["kept"][name]
        assert kept["cosine"] > plain.facts["kept"][name]["cosine"]
        assert kept["neighbours_kept"] >= plain.facts["kept"][name]["neighbours_kept"]
        assert {"spearman", "spearman_deep"} <= kept.keys()
        by_hand = embed_compiled(deep, found.compiled, name, TEXTS) * embed_compiled(deep, compiled, name, TEXTS)
        assert by_hand.sum(-1).mean() > 0.9


@pytest.fixture
def fits(monkeypatch):
    """Every fit that is made: names, rows, steps, whether the head is fitted, and what it found."""
    made, fit = [], folding._Fitting.fit

    def noted(self, names, rows, steps, *, fit_head):
        made.append((names, rows, steps, fit_head, fit(self, names, rows, steps, fit_head=fit_head)))
        return made[-1][-1]

    monkeypatch.setattr(folding._Fitting, "fit", noted)
    return made


def test_instructions_that_read_the_same_are_folded_once(deep, fits):
    compiled = compile_model(deep, {"query": INSTRUCTION, "again": INSTRUCTION})
    document = compiled.prompts["document"]
    others = {**compiled.prompts, "document": replace(document, soft_KD=document.soft_KD.flip(0))}
    found = fold(deep, compiled.with_prompts(others), PLAIN, rows=5, steps=2)
    assert fits[0][0] == ["query", "document"]
    assert torch.equal(found.compiled.prompts["again"].soft_KD, found.compiled.prompts["query"].soft_KD)
    assert not torch.equal(found.compiled.prompts["document"].soft_KD, found.compiled.prompts["query"].soft_KD)
    assert found.facts["kept"]["again"] == pytest.approx(found.facts["kept"]["query"], rel=1e-5)


def test_instructions_share_what_a_fold_adds_and_its_head(deep, fits):
    compiled = compile_model(deep, {"query": INSTRUCTION})
    document = compiled.prompts["document"]
    turned = replace(document, soft_KD=document.soft_KD.flip(0))
    both = compiled.with_prompts({**compiled.prompts, "document": turned})
    found = fold(deep, both, PLAIN, rows=5, steps=5)
    assert found.facts["rows"] == found.compiled.num_soft_tokens == 5
    assert [fit[:4] for fit in fits] == [(["query", "document"], 5, 8, True)]
    head_ED = found.compiled.head_ED
    assert not torch.equal(head_ED, compiled.head_ED)
    one = fold(deep, both, PLAIN, rows=5, steps=0)
    for name, prompt in one.compiled.prompts.items():
        assert torch.equal(prompt.soft_KD, both.prompts[name].soft_KD)
    fitting = folding._Fitting(deep, both, PLAIN, 13, False)
    soft, same_ED = fitting.fit(["query", "document"], 5, 1, fit_head=False)
    # The only step is the first instruction's: half of what it adds goes to the other one, too.
    added = {name: soft[name] - both.prompts[name].soft_KD for name in soft}
    torch.testing.assert_close(added["query"], 2 * added["document"])
    assert torch.equal(same_ED, compiled.head_ED)


def test_instructions_that_join_a_fold_keep_its_head(deep, fits):
    compiled = compile_model(deep, {"query": INSTRUCTION})
    head_ED = compiled.head_ED * 1.5 + 0.01
    found = fold(deep, compiled, PLAIN, rows=5, steps=2, head_ED=head_ED)
    assert torch.equal(found.compiled.head_ED, head_ED)
    assert not fits[0][3]


def test_a_fold_has_ten_rows_if_none_are_given(deep, fits):
    found = fold(deep, compile_model(deep, {"query": INSTRUCTION}), PLAIN, steps=2)
    assert found.facts["rows"] == found.compiled.num_soft_tokens == 10


def test_a_model_of_layout_prefix_is_not_folded(tiny_model, tmp_path):
    model = tiny_model("llama", layout="prefix", linear_head=True)
    with pytest.raises(PromptEmbedderError, match="layout suffix, and the model's is prefix"):
        export(model, {"query": INSTRUCTION}, tmp_path / "out", to="gguf", folding=FoldData(PLAIN))
    assert not (tmp_path / "out").exists()


def test_few_texts_and_odd_rows_are_refused(deep):
    compiled = compile_model(deep, {})
    with pytest.raises(PromptEmbedderError, match="at least 100 different texts, found 5"):
        fold(deep, compiled, TEXTS * 30)
    with pytest.raises(PromptEmbedderError, match="1 to 512 rows, found 0"):
        fold(deep, compiled, PLAIN, rows=0)


@pytest.mark.slow
def test_a_folded_graph_is_added_to(deep, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install 'promptembedder[onnx]'")
    monkeypatch.setattr(folding, "STEPS", 4)
    done = export(deep, {"query": INSTRUCTION}, tmp_path / "out", to="onnx", folding=FoldData(PLAIN, rows=6))
    added = add(deep, {"topic": SECOND}, tmp_path / "out", folding=FoldData(PLAIN))
    assert added.parity.smallest_cosine > 0.99999
    assert torch.equal(added.compiled.head_ED, done.compiled.head_ED)
    assert not torch.equal(done.compiled.head_ED, compile_model(deep, {"query": INSTRUCTION}).head_ED)


@pytest.mark.slow
def test_a_fold_is_exported_and_added_to(deep, tmp_path, monkeypatch):
    monkeypatch.setattr(folding, "STEPS", 10)
    done = export(deep, {"query": INSTRUCTION}, tmp_path / "out", to="soft-prompt", folding=FoldData(PLAIN, rows=6))
    assert done.facts["fold"]["rows"] == 6
    assert done.digests != export(deep, {"query": INSTRUCTION}, tmp_path / "deep", to="soft-prompt").digests
    with pytest.raises(PromptEmbedderError, match="adding to it needs --texts"):
        add(deep, {"topic": SECOND}, tmp_path / "out")
    with pytest.raises(PromptEmbedderError, match="a fold of 6 rows, found 5"):
        add(deep, {"topic": SECOND}, tmp_path / "out", folding=FoldData(PLAIN, rows=5))
    before = promptembedder.load(tmp_path / "out", device="cpu").encode(TEXTS, prompt="query")
    readme = tmp_path / "out" / "README.md"
    assert f"fitted on {len(PLAIN)} texts" in readme.read_text()
    added = add(deep, {"topic": SECOND}, tmp_path / "out", folding=FoldData(PLAIN))
    assert readme.read_text().count("## This export is a fold") == 1
    assert SECOND in readme.read_text()
    assert set(added.facts["fold"]["kept"]) == {"query", "topic", "document"}
    loaded = promptembedder.load(tmp_path / "out", device="cpu")
    assert (loaded[0].settings.num_soft_tokens, loaded[0].settings.deep_rank) == (6, None)
    np.testing.assert_allclose(loaded.encode(TEXTS, prompt="query"), before, atol=1e-6)
    near = (loaded.encode(TEXTS, prompt="topic") * deep.encode(TEXTS, prompt=SECOND)).sum(-1)
    assert np.mean(near) > 0.8


def test_a_shallow_model_has_nothing_to_fold(tiny_model, tmp_path):
    with pytest.raises(PromptEmbedderError, match="nothing to fold"):
        export(tiny_model(), {"query": INSTRUCTION}, tmp_path / "out", to="soft-prompt", folding=FoldData(PLAIN))


def test_what_a_format_lacks_needs_texts(deep, tiny_model, tmp_path):
    with pytest.raises(PromptEmbedderError, match=r"gguf cannot hold a deep soft prompt: give --texts FILE"):
        export(deep, {"query": INSTRUCTION}, tmp_path / "out", to="gguf")
    with pytest.raises(PromptEmbedderError, match=r"a linear head cannot be exported as GGUF.*--texts FILE"):
        export(tiny_model(linear_head=True), {"query": INSTRUCTION}, tmp_path / "out", to="gguf")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("centred", [False, True])
def test_similarities_are_folded_where_there_is_no_head(deep, centred):
    if centred:
        deep[0].subtract(torch.ones(32))
    compiled = compile_model(deep, {"query": INSTRUCTION})
    found = fold(deep, compiled, PLAIN, rows=7, headless=True, steps=40)
    plain = fold(deep, compiled, PLAIN, rows=7, headless=True, steps=0)
    assert found.facts["headless"]
    assert found.compiled.head_ED is found.compiled.centre_D is None
    for name in compiled.prompts:
        assert found.facts["kept"][name]["similarity"] > plain.facts["kept"][name]["similarity"]
    one, other = (embed_compiled(deep, c, "query", TEXTS) for c in (found.compiled, compiled))
    places = np.triu_indices(len(TEXTS), 1)
    assert np.corrcoef((one @ one.T)[places], (other @ other.T)[places])[0, 1] > 0.8


def test_a_folded_head_is_exported(deep, tmp_path, monkeypatch):
    monkeypatch.setattr(folding, "STEPS", 5)
    done = export(deep, {"query": INSTRUCTION}, tmp_path / "out", to="gguf", folding=FoldData(PLAIN, rows=6))
    assert done.facts["fold"]["headless"]
    assert (tmp_path / "out" / "model.gguf").is_file()


def test_a_backbone_is_refused_before_the_fold(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "fold", lambda *_, **__: pytest.fail("folded"))
    with pytest.raises(PromptEmbedderError, match="than those of Gemma 3 cannot be exported"):
        export(tiny_model("gemma3", deep_rank=2), {}, tmp_path / "out", to="gguf", folding=FoldData(PLAIN))
