"""The model as mteb sees it, and untrained baselines."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from conftest import MANY, TEXTS, write_gzipped
from promptembedder import PromptEmbedderError, evaluation, save

pytest.importorskip("mteb", reason="mteb is not installed: pip install 'promptembedder[evaluate]'")


def test_a_baseline_is_known_by_its_weights(tiny_lm, tmp_path):
    revisions = {
        evaluation.open_model(str(lm), baseline="mean", device="cpu").mteb_model_meta.revision
        for lm in (
            tiny_lm("llama"),
            tiny_lm("llama", 48),
            shutil.copytree(tiny_lm("llama"), tmp_path / "same" / "llama"),
        )
    }
    assert len(revisions) == 2


def test_empty_texts_are_read_as_a_full_stop(task_folder, tmp_path, encoder, caplog):
    corpus = [{"_id": str(n), "title": "", "text": "" if n == 3 else text} for n, text in enumerate(MANY)]
    write_gzipped(task_folder / "retrieval" / "Find" / "corpus.jsonl.gz", corpus)
    evaluation.evaluate(encoder, evaluation.local_tasks(task_folder, ["Find"]), tmp_path / "results")
    assert "Find: 1 of 30 texts are empty and read as '.'" in caplog.text


def test_own_instructions_are_the_prompts_of_the_model(task_folder, encoder):
    encoder.model.prompts |= {"query": "Mine.", "document": "Of documents."}
    (task,) = evaluation.local_tasks(task_folder, ["Find"])
    made_with = encoder.made_with(task.metadata)
    assert (made_with["instruction"], made_with["document_instruction"]) == ("Mine.", "Of documents.")
    # Texts come as any iterable, blank ones too.
    found = encoder.encode_under((text for text in [*TEXTS, ""]), "Mine.")
    np.testing.assert_allclose(found, encoder.model.encode([*TEXTS, "."]), atol=1e-5)


def test_a_model_of_ours_from_the_hub_keeps_its_id(tiny_model, hub):
    place, _ = hub
    save(tiny_model(), place / "me" / "mine")
    encoder = evaluation.open_model("me/mine", device="cpu")
    assert encoder.mteb_model_meta.name == "me/mine"
    assert (
        encoder.mteb_model_meta.revision == evaluation.open_model(str(place / "me" / "mine")).mteb_model_meta.revision
    )


@pytest.mark.parametrize(("baseline", "place"), [("mean", None), ("last", -1), ("prompt_eol", -1)])
def test_baselines_read_texts_as_they_are(tiny_lm, baseline, place):
    """The library would put texts into the chat template, after which the last token is not the cue's."""
    folder = tiny_lm()
    model = evaluation.open_model(str(folder), baseline=baseline, device="cpu").model
    assert model.tokenizer.chat_template
    texts = [evaluation.BASELINES[baseline][1].format(text=text) for text in TEXTS]
    lm, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    for text, found in zip(texts, model.encode(texts), strict=True):
        with torch.no_grad():
            hidden_TD = lm(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        pooled = hidden_TD.mean(0) if place is None else hidden_TD[place]
        assert torch.allclose(torch.from_numpy(found), torch.nn.functional.normalize(pooled, dim=0), atol=1e-5)


@pytest.mark.parametrize("baseline", list(evaluation.BASELINES))
def test_baselines(task_folder, tmp_path, tiny_lm, baseline):
    encoder = evaluation.open_model(str(tiny_lm()), baseline=baseline, device="cpu")
    embeddings = {i: encoder.encode_under(TEXTS, i) for i in ("one thing", "another")}
    assert np.allclose(np.linalg.norm(embeddings["one thing"], axis=-1), 1, atol=1e-5)
    same = np.allclose(embeddings["one thing"], embeddings["another"])
    assert same != (baseline == "hard_instruction")
    alone = np.concatenate([encoder.encode_under([text], "one thing") for text in TEXTS])
    assert np.allclose(embeddings["one thing"], alone, atol=1e-4)


def test_weights_that_are_not_numbers(task_folder, tmp_path, encoder):
    with torch.no_grad():
        encoder.model[0].alignment.weight[0, 0] = float("nan")
    with pytest.raises(PromptEmbedderError, match="tiny/model gives embeddings that are not finite numbers"):
        evaluation.evaluate(encoder, evaluation.local_tasks(task_folder, ["Similar"]), tmp_path / "results")
