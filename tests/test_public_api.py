"""What users may rely on: public names, their parameters, and how many settings there are."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from dataclasses import fields

import pytest

import promptembedder

NAMES = [
    "DataConfig",
    "DataFile",
    "EvaluationConfig",
    "ModelConfig",
    "PromptEmbedderError",
    "RunConfig",
    "SoftPromptTransformer",
    "TrainingConfig",
    "TransferConfig",
    "WarmStartConfig",
    "build",
    "encode",
    "explain",
    "load",
    "save",
]
PARAMETERS = {
    "promptembedder:build": "config *device *seed",
    "promptembedder:encode": "model texts instructions *batch_size *show_progress_bar",
    "promptembedder:explain": "model instruction top",
    "promptembedder:load": "path *device *dtype *prompter *backbone *revision",
    "promptembedder:save": "model path *card *share_prompter",
    "promptembedder.training:train": "config *resume *start *changed *callbacks",
    "promptembedder.training:fit": (
        "model data settings *output *loss *evaluator *every_steps *max_text_tokens *checkpoint *cache *spent "
        "*callbacks"
    ),
    "promptembedder.transfer:transfer": "model config *share_prompter *resume",
    "promptembedder.export:export": "model instructions folder *to *name *precision *folding",
    "promptembedder.export:add": "model instructions folder *folding",
    "promptembedder.bulk:encode_file": (
        "model texts output *instruction *document *kind *text_field *id_field *batch_size *max_text_tokens "
        "*truncate_dim *precision *bridge *device"
    ),
    "promptembedder.bulk:encode_corpus": "job sources output *kind *text_field *id_field *limit *strict *runner",
    "promptembedder.bulk:encoder": "model instructions *text_field *batch_tokens *device",
    "promptembedder.bulk:Job": (
        "model instructions precision max_text_tokens truncate_dim chunk_tokens overlap batch_tokens device keep"
    ),
    "promptembedder.serving:serve": "models settings *named *instructions *device *dtype",
    "promptembedder.bulk.bridge:Bridge": "weight_DF facts probe_D",
    "promptembedder.bulk.bridge:fit": "new_ND old_NF *probe_D *seed",
    "promptembedder.bulk.bridge:load": "path",
}
SETTINGS = (
    "DataConfig",
    "DataFile",
    "EvaluationConfig",
    "ModelConfig",
    "TrainingConfig",
    "TransferConfig",
    "WarmStartConfig",
)
# 76, and five of a teacher.
MOST_SETTINGS = 80


def test_public_names():
    assert promptembedder.__all__ == NAMES
    assert [name for name in NAMES if getattr(promptembedder, name, None) is None] == []
    assert set(NAMES) <= set(dir(promptembedder))
    with pytest.raises(AttributeError, match="has no attribute 'laod'"):
        promptembedder.laod  # noqa: B018


@pytest.mark.parametrize("place", PARAMETERS)
def test_parameters(place):
    """`*` before a name: by keyword only."""
    module, name = place.split(":")
    parameters = inspect.signature(getattr(importlib.import_module(module), name)).parameters.values()
    found = " ".join("*" * (p.kind is p.KEYWORD_ONLY) + p.name for p in parameters)
    assert found == PARAMETERS[place]


def test_settings_are_few():
    assert sum(len(fields(getattr(promptembedder, name))) for name in SETTINGS) <= MOST_SETTINGS
    assert [field.name for field in fields(promptembedder.RunConfig)] == ["model", "data", "training", "evaluation"]


def test_the_class_is_named_by_a_path_that_survives_moves():
    """Saved models name it; models of format 1 name the older path."""
    of_old = importlib.import_module("promptembedder.module").SoftPromptTransformer
    assert of_old is promptembedder.SoftPromptTransformer
    assert promptembedder.SoftPromptTransformer.__module__ == "promptembedder"


def test_the_package_opens_without_its_libraries():
    """`promptembedder --help` need not wait for them."""
    script = "import promptembedder, sys; print([n for n in ('torch', 'transformers', 'numpy') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr
