"""What every export goes through: names, parity, all or nothing, additions."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

import numpy as np
import pytest

import promptembedder
from conftest import INSTRUCTION, SECOND, TEXTS
from promptembedder import PromptEmbedderError
from promptembedder.errors import MissingExtraError
from promptembedder.export import soft_prompt
from promptembedder.export.compiled import embed_compiled
from promptembedder.export.export import add, check_named, export
from promptembedder.export.export_folder import FACTS_FILE, read_facts
from promptembedder.export.parity import parity_texts

exporting = importlib.import_module("promptembedder.export.export")  # the package's name of it is the function


class Double:
    """A format for tests: its engine is the model itself, with an error of the test's choice."""

    PRECISIONS = ("float32", "float16")

    def __init__(self, off=0.0, missing=False, failure=None):
        self.off, self.missing, self.failure = off, missing, failure

    def refuse(self, compiled):
        if compiled.readout == "mean":
            raise PromptEmbedderError("no mean here")

    def write(self, compiled, model, folder, precision="float32"):
        assert list(folder.iterdir()) == []
        (folder / "weights.bin").write_bytes(b"0" * 1000)
        if self.failure is not None:
            raise self.failure
        self.compiled, self.model = compiled, model

    def reader(self, folder, name):
        if self.missing:
            raise MissingExtraError("export to double needs engine, which is not installed")

        def read(texts):
            found = embed_compiled(self.model, self.compiled, name, texts).numpy()
            return found + self.off * np.sign(found)

        return read


@pytest.fixture
def double(monkeypatch):
    def install(**changes):
        form = Double(**changes)
        plain = exporting.format_module
        monkeypatch.setattr(exporting, "format_module", lambda name: form if name == "gguf" else plain(name))
        return form

    return install


def test_facts_say_what_was_exported(tiny_model, tmp_path, double):
    double()
    model = tiny_model()
    done = export(model, {"query": INSTRUCTION}, tmp_path / "out", to="gguf", name="mine", precision="float16")
    facts = read_facts(tmp_path / "out")
    assert facts == done.facts
    assert (facts["format"], facts["model"], facts["precision"], facts["fold"]) == ("gguf", "mine", "float16", None)
    assert [entry["name"] for entry in facts["instructions"]] == ["query", "document"]
    assert all(re.fullmatch("[0-9a-f]{16}", entry["digest"]) for entry in facts["instructions"])
    assert facts["parity"]["checked"]
    assert facts["parity"]["smallest_cosine"] > 0.999999
    assert facts["backbone"]["fingerprint"] == model[0].base_models.backbone_fingerprint
    notice = (tmp_path / "out" / "NOTICE-promptembedder.txt").read_text()
    assert "rows of soft tokens were added" in notice


def test_the_licence_of_the_backbone_goes_along(tiny_model, tiny_lm, tmp_path, double):
    double()
    licence = tiny_lm("qwen2", 32, 7) / "LICENSE.txt"
    licence.write_text("Do what you like.")
    model = tiny_model(backbone=str(licence.parent))
    export(model, {"query": INSTRUCTION}, tmp_path / "out", to="gguf")
    assert (tmp_path / "out" / "LICENSE.txt").read_text() == "Do what you like."
    assert "LICENSE.txt" in (tmp_path / "out" / "NOTICE-promptembedder.txt").read_text()


@pytest.mark.parametrize("off", [0.05, float("nan")])
def test_an_export_that_embeds_otherwise_is_not_kept(tiny_model, tmp_path, double, off):
    double(off=off)
    with pytest.raises(PromptEmbedderError, match="does not embed as the model: cosine"):
        export(tiny_model(), {"query": INSTRUCTION}, tmp_path / "out", to="gguf")
    assert list(tmp_path.iterdir()) == []


def test_the_bound_follows_the_precision(tiny_model, tmp_path, double):
    double(off=0.002)
    with pytest.raises(PromptEmbedderError, match=r"at least 0\.99999 is expected"):
        export(tiny_model(), {"query": INSTRUCTION}, tmp_path / "out", to="gguf")
    done = export(tiny_model(), {"query": INSTRUCTION}, tmp_path / "out", to="gguf", precision="float16")
    assert 0.9999 < done.parity.smallest_cosine < 0.99999


def test_a_missing_engine_is_said(tiny_model, tmp_path, double):
    double(missing=True)
    done = export(tiny_model(), {"query": INSTRUCTION}, tmp_path / "out", to="gguf")
    assert str(done.parity) == "not checked: export to double needs engine, which is not installed"
    assert done.facts["parity"]["checked"] is False


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_nothing_is_left_of_a_failure(tiny_model, tmp_path, double, failure):
    double()
    export(tiny_model(), {"query": INSTRUCTION}, tmp_path / "out", to="gguf")
    before = sorted(tmp_path.rglob("*"))
    double(failure=failure)
    with pytest.raises((PromptEmbedderError, KeyboardInterrupt), match=r"No space left on device|^$"):
        export(tiny_model(), {"query": SECOND}, tmp_path / "out", to="gguf")
    assert sorted(tmp_path.rglob("*")) == before
    assert read_facts(tmp_path / "out")["instructions"][0]["instruction"] == INSTRUCTION


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"Query": INSTRUCTION}, "use lower-case letters"),
        ({"two words": INSTRUCTION}, "use lower-case letters"),
        ({"": INSTRUCTION}, "use lower-case letters"),
        ({"query": "  "}, "must be a sentence"),
        ({"query": "\ud800"}, "must be a sentence of valid Unicode"),
        ({"query": INSTRUCTION, "topic": INSTRUCTION}, "'query' and 'topic' are the same"),
        ({"document": INSTRUCTION}, "stands for the model's document instruction"),
    ],
)
def test_names_and_instructions_that_cannot_be_used(tiny_model, tmp_path, named, message):
    with pytest.raises(PromptEmbedderError, match=message):
        export(tiny_model(), named, tmp_path / "out", to="soft-prompt")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_written_is_refused(tiny_model, tmp_path, double):
    double()
    asked = {"query": INSTRUCTION}
    with pytest.raises(PromptEmbedderError, match="format 'tensorrt' is unknown, expected one of: soft-prompt"):
        export(tiny_model(), asked, tmp_path / "out", to="tensorrt")
    with pytest.raises(PromptEmbedderError, match="no mean here"):
        export(tiny_model(readout="mean"), asked, tmp_path / "out", to="gguf")
    with pytest.raises(PromptEmbedderError, match=r"gguf cannot hold a deep soft prompt: give --texts"):
        export(tiny_model(deep_rank=2), asked, tmp_path / "out", to="gguf")
    with pytest.raises(PromptEmbedderError, match="precision 'q3' of format gguf: expected one of: float32, float16"):
        export(tiny_model(), asked, tmp_path / "out", to="gguf", precision="q3")
    with pytest.raises(PromptEmbedderError, match="it has none to choose from"):
        export(tiny_model(), asked, tmp_path / "out", to="soft-prompt", precision="q8")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(PromptEmbedderError, match="exists and is no export"):
        export(tiny_model(), asked, tmp_path / "mine", to="gguf")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["mine", "thesis.txt"]


def test_texts_of_the_check_fill_the_model(tiny_model):
    model = tiny_model(max_text_tokens=40)
    texts = parity_texts(model, 40)
    lengths = [len(model.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    assert max(lengths) <= 40
    assert lengths[-1] > 30


def test_further_instructions_join_an_export(tiny_model, tmp_path):
    model, folder = tiny_model(deep_rank=2), tmp_path / "out"
    before = export(model, {"query": INSTRUCTION}, folder, to="soft-prompt").digests
    done = add(model, {"topic": SECOND}, folder)
    assert (
        done.digests
        == export(model, {"query": INSTRUCTION, "topic": SECOND}, tmp_path / "all", to="soft-prompt").digests
    )
    assert done.digests.items() >= before.items()
    loaded = promptembedder.load(folder, device="cpu")
    for words in (INSTRUCTION, SECOND, model.prompts["document"]):
        np.testing.assert_allclose(loaded.encode(TEXTS, prompt=words), model.encode(TEXTS, prompt=words), atol=1e-6)
    assert "`topic`" in (folder / "README.md").read_text()
    assert not list(tmp_path.glob(".*"))


def test_additions_that_do_not_fit(tiny_model, tmp_path, double, monkeypatch):
    model, folder = tiny_model(), tmp_path / "out"
    export(model, {"query": INSTRUCTION}, folder, to="soft-prompt")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(PromptEmbedderError, match="holds instruction 'query' already"):
        add(model, {"query": SECOND}, folder)
    with pytest.raises(PromptEmbedderError, match="holds instruction 'again' already"):
        add(model, {"again": INSTRUCTION}, folder)
    other = tiny_model()
    other[0].alignment.weight.data.add_(0.01)
    with pytest.raises(PromptEmbedderError, match="made from another model"):
        add(other, {"topic": SECOND}, folder)
    monkeypatch.setattr(soft_prompt, "add", lambda *_: None)
    with pytest.raises(PromptEmbedderError, match="not held"):  # the check, of what was not added
        add(model, {"topic": SECOND}, folder)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    double()
    export(model, {"query": INSTRUCTION}, tmp_path / "other", to="gguf")
    with pytest.raises(PromptEmbedderError, match="format gguf takes no further instructions"):
        add(model, {"topic": SECOND}, tmp_path / "other")
    with pytest.raises(PromptEmbedderError, match="no export at"):
        add(model, {"topic": SECOND}, tmp_path / "none")


def test_of_two_additions_at_once_none_is_lost(tiny_model, tmp_path, monkeypatch):
    model, folder, own = tiny_model(), tmp_path / "out", soft_prompt.add
    export(model, {"query": INSTRUCTION}, folder, to="soft-prompt")

    def slow(*arguments):
        monkeypatch.setattr(soft_prompt, "add", own)
        add(model, {"topic": SECOND}, folder)
        own(*arguments)

    monkeypatch.setattr(soft_prompt, "add", slow)
    with pytest.raises(PromptEmbedderError, match="has changed meanwhile; run the command again"):
        add(model, {"tone": "Find the tone."}, folder)
    add(model, {"tone": "Find the tone."}, folder)
    assert [entry["name"] for entry in read_facts(folder)["instructions"]] == ["query", "document", "topic", "tone"]


# -- the command ------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tiny_model, tmp_path):
    promptembedder.save(tiny_model(), tmp_path / "model")
    return tmp_path / "model"


def test_the_command_exports_adds_and_lists(command, saved, tmp_path):
    out = tmp_path / "out"
    done = command("export", saved, "-i", INSTRUCTION, "-o", out, "--to", "soft-prompt")
    assert done.code == 0, done.err
    assert "smallest cosine to the model 1.0000000" in done.err
    printed = json.loads(done.out)
    assert list(printed["digests"]) == ["query", "document"]
    done = command("export", saved, "--named", "topic=Find texts where a = b.", "-o", out, "--add")
    assert done.code == 0, done.err
    listed = command("export", saved, "-o", out, "--list").out
    assert "Find texts where a = b." in listed
    assert printed["digests"]["query"] in listed
    done = command("export", saved, "-o", tmp_path / "default")
    assert json.loads((tmp_path / "default" / FACTS_FILE).read_text())["instructions"][0]["instruction"] == (
        promptembedder.ModelConfig().default_instruction
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "tflite"], "format 'tflite' is unknown"),
        (["-i", " "], "--instruction must be a sentence"),
        (["-i", "Find a.", "-i", "Find b."], "--instruction is given 2 times"),
        (["--named", "topic"], "expected NAME=TEXT"),
        (["--named", "Topic=a"], "use lower-case letters"),
        (["--named", "a=b", "--named", "a=c"], "the name is given twice"),
        (["--named", "a=b", "--named", "c=b"], "'a' and 'c' are the same"),
        (["--add"], "--add needs a further instruction"),
        (["--add", "--named", "a=b"], "no export at"),
        (["--list"], "no export at"),
        (["--rows", "5"], "--rows is for a fold"),
        (["--dev", "pairs.jsonl"], "--dev is for a fold"),
        (["--texts", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_bad_input_is_one_line(command, saved, tmp_path, arguments, message):
    done = command("export", saved, "-o", tmp_path / "out", *arguments)
    assert done.code == 2
    assert message in done.err
    assert done.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_too_few_texts_to_fold(command, saved, tmp_path):
    texts = Path(tmp_path / "few.txt")
    texts.write_text("one\ntwo\n")
    done = command("export", saved, "-o", tmp_path / "out", "--texts", texts)
    assert (done.code, "at least 100 different texts" in done.err) == (2, True)


def test_files_of_the_user_stay_in_an_export(tiny_model, tmp_path):
    model, folder = tiny_model(), tmp_path / "out"
    export(model, {"query": INSTRUCTION}, folder, to="soft-prompt")
    (folder / "notes.txt").write_text("mine")
    (folder / "index").mkdir()
    (folder / "index" / "a.bin").write_text("mine")
    (folder / "link").symlink_to(tmp_path)
    export(model, {"query": INSTRUCTION}, folder, to="soft-prompt")
    add(model, {"topic": SECOND}, folder)
    assert (folder / "notes.txt").read_text() == (folder / "index" / "a.bin").read_text() == "mine"
    assert (folder / "link").is_symlink()


@pytest.mark.parametrize("content", ["", "{}", '{"format": 1}'])
def test_a_damaged_file_of_facts_is_refused(tiny_model, tmp_path, content):
    folder = tmp_path / "out"
    done = export(tiny_model(), {"query": INSTRUCTION}, folder, to="soft-prompt")
    (folder / "promptembedder_export.json").write_text(content)
    with pytest.raises(PromptEmbedderError, match=r"promptembedder_export\.json"):
        export(tiny_model(), {"query": INSTRUCTION}, folder, to="soft-prompt")
    for broken in ({"instructions": [1]}, {"backbone": {}}, {"instructions": [{"name": "x", "instruction": 3}]}):
        (folder / "promptembedder_export.json").write_text(json.dumps(done.facts | broken))
        with pytest.raises(PromptEmbedderError, match="is not what an export writes"):
            read_facts(folder)


@pytest.mark.parametrize(
    ("instructions", "message"),
    [
        (["a"], "must be a mapping"),
        ({1: "Find A."}, "name 1 of an instruction"),
        ({"a" * 65: "Find A."}, "at most 64"),
        ({"a": None}, "must be a sentence"),
        ({"topic": "tone", "tone": "Find X."}, "'tone' is the name of an instruction and the words of"),
    ],
)
def test_instructions_of_other_types(instructions, message):
    with pytest.raises(PromptEmbedderError, match=message):
        check_named(instructions)


def test_outputs_that_cannot_be(tiny_model, tmp_path):
    (tmp_path / "file").write_text("x")
    for place, message in ((tmp_path / "file" / "x", "which is a file"), ("a\0b", "UTF-8"), ("a\udcff", "UTF-8")):
        with pytest.raises(PromptEmbedderError, match=message):
            export(tiny_model(), {"query": INSTRUCTION}, place, to="soft-prompt")


def test_of_two_exports_at_once_the_later_one_is_refused(tiny_model, tmp_path, monkeypatch):
    model, place, write = tiny_model("llama"), tmp_path / "out", soft_prompt.write

    def write_late(compiled, lm, folder):
        monkeypatch.setattr(soft_prompt, "write", write)
        export(model, {"query": SECOND}, place, to="soft-prompt")
        write(compiled, lm, folder)

    monkeypatch.setattr(soft_prompt, "write", write_late)
    with pytest.raises(PromptEmbedderError, match="has changed meanwhile"):
        export(model, {"query": INSTRUCTION}, place, to="soft-prompt")
    assert read_facts(place)["instructions"][0]["instruction"] == SECOND


@pytest.mark.parametrize(("name", "folder"), [("weights.bin", False), ("weights.bin", True), ("README.md", False)])
def test_a_file_of_the_user_is_not_replaced(tiny_model, tmp_path, double, name, folder):
    model, place = tiny_model("llama"), tmp_path / "out"
    double()
    export(model, {"query": INSTRUCTION}, place, to="soft-prompt")
    own = place / name
    if name == "README.md":  # of the export: it may go
        export(model, {"query": SECOND}, place, to="gguf")
        assert not own.exists()
        return
    own.mkdir() if folder else own.write_text("mine")
    with pytest.raises(PromptEmbedderError, match=r"weights\.bin is no file of an export"):
        export(model, {"query": SECOND}, place, to="gguf")
    assert own.is_dir() if folder else own.read_text() == "mine"
    assert read_facts(place)["format"] == "soft-prompt"


@pytest.mark.parametrize("named", [{"foo": "query"}, {"extra": "document"}])
def test_words_that_are_a_name_are_refused(tiny_model, tmp_path, named):
    model, place = tiny_model("llama"), tmp_path / "out"
    if "extra" in named:
        with pytest.raises(PromptEmbedderError, match="name of an instruction and the words of"):
            export(model, named, tmp_path / "other", to="soft-prompt")
    export(model, {"query": INSTRUCTION}, place, to="soft-prompt")
    with pytest.raises(PromptEmbedderError, match="name of an instruction and the words of"):
        add(model, named, place)
    assert [entry["name"] for entry in read_facts(place)["instructions"]] == ["query", "document"]


@pytest.mark.parametrize("file", ["promptembedder.json", "config_sentence_transformers.json"])
@pytest.mark.parametrize("content", ["{}", "[]"])
def test_an_addition_to_a_damaged_export_is_refused(tiny_model, tmp_path, file, content):
    model, place = tiny_model("llama"), tmp_path / "out"
    export(model, {"query": INSTRUCTION}, place, to="soft-prompt")
    (place / file).write_text(content)
    with pytest.raises(PromptEmbedderError):
        add(model, {"more": SECOND}, place)
    assert (place / file).read_text() == content


def test_the_current_folder_and_loops_are_refused_at_once(tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(exporting, "compile_model", lambda *a, **k: pytest.fail("the work has begun"))
    (tmp_path / "loop").symlink_to("loop")
    for place in (".", "loop"):
        with pytest.raises(PromptEmbedderError, match="cannot write an export"):
            export(tiny_model("llama"), {"query": INSTRUCTION}, place, to="soft-prompt")


def test_files_outside_an_export_are_not_its_own(tiny_model, tmp_path):
    place = tmp_path / "out"
    export(tiny_model("llama"), {"query": INSTRUCTION}, place, to="soft-prompt")
    facts = json.loads((place / FACTS_FILE).read_text())
    for file in ("../other", "/tmp/other"):
        (place / FACTS_FILE).write_text(json.dumps({**facts, "files": [file]}))
        with pytest.raises(PromptEmbedderError, match="is not what an export writes"):
            read_facts(place)
