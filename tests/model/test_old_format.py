"""Models of format 1: opened where retired settings changed nothing, refused by the setting's name where they did."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from conftest import INSTRUCTION, TEXTS
from promptembedder import PromptEmbedderError, load, save
from promptembedder.model.folder import describe

# Settings that format 1 had beside those of today, at values that change nothing.
NEUTRAL = {
    "lora_alpha": 8,
    "condition_on": "instruction",
    "text_pass": "same",
    "backbone_layers": None,
    "readout_layers": [],
    "deep_soft_prompt": False,
    "deep_soft_prompt_rank": None,
    "centred": False,
    "instruction_guidance": 1.0,
    "instruction_template": None,
}


@pytest.fixture
def in_format_1(tmp_path):
    """`in_format_1(model, text_pass="int8", ...)`: a folder as earlier versions wrote it."""

    def write(model, **settings):
        folder = tmp_path / "old"
        save(model, folder)
        saved = json.loads((folder / "promptembedder.json").read_text())
        del saved["centred"], saved["model"]["deep_rank"]
        saved |= {"format_version": 1, "model": {**saved["model"], **NEUTRAL, **settings}}
        (folder / "promptembedder.json").write_text(json.dumps(saved))
        listed = json.loads((folder / "modules.json").read_text())
        listed[0]["type"] = "promptembedder.module.SoftPromptTransformer"
        (folder / "modules.json").write_text(json.dumps(listed))
        return folder

    return write


def test_a_saved_model_names_its_class_and_format(tiny_model, tmp_path):
    save(tiny_model(), tmp_path / "new")
    saved = json.loads((tmp_path / "new" / "promptembedder.json").read_text())
    assert (saved["format_version"], saved["centred"]) == (2, False)
    assert not NEUTRAL.keys() & saved["model"].keys()
    (first, *_) = json.loads((tmp_path / "new" / "modules.json").read_text())
    assert first["type"] == "promptembedder.SoftPromptTransformer"


@pytest.mark.parametrize("start", ["auto", "identity", "least_squares", "random"])
def test_an_old_model_opens(tiny_model, in_format_1, tmp_path, start):
    """W is saved, so that how it once began does not matter."""
    model = tiny_model(alignment_start="random")
    folder = in_format_1(model, alignment_start=start)
    opened = load(folder, device="cpu")
    assert np.allclose(opened.encode(TEXTS, prompt=INSTRUCTION), model.encode(TEXTS, prompt=INSTRUCTION), atol=1e-5)
    assert describe(folder)["format_version"] == 1
    # Saved again, it is of today's format.
    save(opened, tmp_path / "again")
    assert describe(tmp_path / "again")["format_version"] == 2
    assert np.allclose(load(tmp_path / "again").encode(TEXTS), model.encode(TEXTS), atol=1e-5)


def test_the_library_opens_an_old_model_by_the_path_that_it_names(tiny_model, in_format_1):
    model = tiny_model()
    opened = SentenceTransformer(str(in_format_1(model)), device="cpu", trust_remote_code=True)
    assert np.allclose(opened.encode(TEXTS, prompt=INSTRUCTION), model.encode(TEXTS, prompt=INSTRUCTION), atol=1e-5)


def test_deep_soft_prompts_of_low_rank_become_deep_rank(tiny_model, in_format_1):
    model = tiny_model(deep_rank=3)
    with torch.no_grad():
        model[0].alignment.deep_out.normal_(std=0.1)
    folder = in_format_1(model, deep_soft_prompt=True, deep_soft_prompt_rank=3)
    assert describe(folder)["deep_rank"] == 3
    opened = load(folder, device="cpu")
    assert opened[0].settings.deep_rank == 3
    assert np.allclose(opened.encode(TEXTS, prompt=INSTRUCTION), model.encode(TEXTS, prompt=INSTRUCTION), atol=1e-5)


def test_a_centre_is_the_models_state(tiny_model, in_format_1):
    model = tiny_model()
    model[0].subtract(torch.linspace(0.0, 0.1, 32))
    opened = load(in_format_1(model, centred=True), device="cpu")
    assert opened[0].centred
    assert torch.equal(opened[0].centre_E, model[0].centre_E)
    assert np.allclose(opened.encode(TEXTS, prompt=INSTRUCTION), model.encode(TEXTS, prompt=INSTRUCTION), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lora_alpha", 16),  # rank 4
        ("condition_on", "instruction_and_text"),
        ("text_pass", "int8"),
        ("backbone_layers", 1),
        ("readout_layers", [1]),
        ("deep_soft_prompt", True),  # of whole matrices
        ("instruction_guidance", 1.5),
        ("instruction_template", "\n{instruction}\nThis"),
    ],
)
def test_a_retired_setting_that_changed_something_is_refused_by_name(tiny_model, in_format_1, name, value):
    folder = in_format_1(tiny_model(), **{name: value})
    for read in (load, describe):
        with pytest.raises(PromptEmbedderError) as caught:
            read(folder)
        message = str(caught.value)
        assert f"{name} = {value!r} is no longer a setting; " in message
        assert "promptembedder.json" in message
        assert "\n" not in message
