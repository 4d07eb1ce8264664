"""What is said of paths that are given as a saved model and are none, and of files that cannot be read."""

from __future__ import annotations

import shutil

import pytest

import promptembedder
from promptembedder import PromptEmbedderError
from promptembedder.model.folder import BEGUN_FILE, describe


@pytest.fixture(scope="module")
def run(tiny_settings, tmp_path_factory):
    """The folder of a run, with its model."""
    folder = tmp_path_factory.mktemp("run")
    promptembedder.save(promptembedder.build(tiny_settings(linear_head=True), device="cpu"), folder / "model")
    (folder / BEGUN_FILE).write_text("data: {}\n")
    return folder


def refusals(path):
    """What `load` and `describe` say, which must be the same."""
    said = []
    for use in (promptembedder.load, describe):
        with pytest.raises(PromptEmbedderError) as caught:
            use(path)
        said.append(str(caught.value))
    assert said[0] == said[1]
    assert "\n" not in said[0]
    return said[0]


def test_the_folder_of_a_run(run):
    assert refusals(run) == f"{run} is not a saved model, but holds one: give {run / 'model'}"
    assert refusals(run.parent).startswith(f"{run.parent} is not a saved model, but holds ")


def test_the_folder_of_an_interrupted_run(run, tmp_path):
    (tmp_path / BEGUN_FILE).write_text("data: {}\n")
    assert refusals(tmp_path) == f"{tmp_path} is the folder of a run that has saved no model yet"
    for step in (20, 5):
        shutil.copytree(run / "model", tmp_path / f"checkpoint-{step}")
    assert f"{tmp_path} is not a saved model, but holds some: give {tmp_path}/checkpoint-" in refusals(tmp_path)


def test_other_folders_and_files(run, tiny_lm, tmp_path):
    file = run / "model" / "promptembedder.json"
    assert refusals(file) == f"{file} is a file; give the folder of a saved model"
    assert refusals(tiny_lm()) == f"{tiny_lm()} is not a saved model: it has no promptembedder.json"
    assert refusals(tmp_path) == f"{tmp_path} is not a saved model: it has no promptembedder.json"


def test_evaluation_says_the_same(run):
    evaluation = pytest.importorskip("promptembedder.evaluation")
    for path in (run, run / "model" / "promptembedder.json"):
        with pytest.raises(PromptEmbedderError) as caught:
            evaluation.open_model(str(path))
        assert str(caught.value) == refusals(path)


@pytest.mark.parametrize(
    "name",
    [
        "promptembedder.json",
        "modules.json",
        "config_sentence_transformers.json",
        "alignment.safetensors",
        "prompter/adapter_model.safetensors",
    ],
)
def test_a_file_that_may_not_be_read_is_not_called_missing(run, closed, name):
    closed(run / "model" / name)
    with pytest.raises(PromptEmbedderError, match=rf"{run}/model/{name} cannot be read: Permission denied$"):
        promptembedder.load(run / "model")


def test_nor_one_that_a_library_opens(run, closed, monkeypatch):
    """safetensors says of a closed file that there is none."""

    def missing(*arguments, **named):
        raise FileNotFoundError("No such file or directory: model.safetensors")

    head = run / "model" / "1_Dense" / "model.safetensors"
    monkeypatch.setattr("sentence_transformers.sentence_transformer.modules.Dense.load", missing)
    with pytest.raises(PromptEmbedderError, match="is damaged: FileNotFoundError"):
        promptembedder.load(run / "model")
    closed(head)
    with pytest.raises(PromptEmbedderError, match=f"^{head} cannot be read: Permission denied$"):
        promptembedder.load(run / "model")


def test_the_home_folder(run, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(run))
    model = promptembedder.load("~/model")
    assert describe("~/model") == describe(run / "model")
    monkeypatch.setenv("HOME", str(tmp_path))
    promptembedder.save(model, "~/saved")
    assert (tmp_path / "saved" / "promptembedder.json").is_file()
