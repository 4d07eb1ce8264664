"""The model a user holds: encode, save, load, describe, explain."""

from __future__ import annotations

import copy
import json
import math
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.base import model as library_model

import promptembedder
from conftest import ARCHITECTURES, INSTRUCTION, TEXTS, assert_same_embeddings, assert_same_model
from promptembedder import PromptEmbedderError
from promptembedder.llms import locate as locate_module
from promptembedder.model import folder as shipped
from promptembedder.model import module as module_module
from promptembedder.model.explain import explain
from promptembedder.model.folder import describe


def test_encode_is_plain_sentence_transformers(tiny_model):
    model = tiny_model()
    by_prompt = model.encode(TEXTS, prompt=INSTRUCTION)
    assert by_prompt.shape == (len(TEXTS), 32)
    assert np.allclose(np.linalg.norm(by_prompt, axis=1), 1, atol=1e-5)
    model.prompts["same"] = INSTRUCTION
    assert np.array_equal(by_prompt, model.encode(TEXTS, prompt_name="same"))
    assert not np.allclose(by_prompt, model.encode(TEXTS, prompt="Find the topic."), atol=1e-3)
    # Order is kept although batches are sorted by length, and batch size does not matter.
    assert np.allclose(by_prompt, model.encode(TEXTS, prompt=INSTRUCTION, batch_size=2), atol=1e-5)
    assert np.allclose(by_prompt[::-1], model.encode(TEXTS[::-1], prompt=INSTRUCTION), atol=1e-5)


def test_encode_truncated_and_quantised(tiny_model):
    model = tiny_model()
    whole = model.encode(TEXTS, prompt=INSTRUCTION)
    assert np.array_equal(model.encode(TEXTS, prompt=INSTRUCTION, truncate_dim=8), whole[:, :8])
    small = model.encode(TEXTS, prompt=INSTRUCTION, precision="int8")
    assert small.dtype == np.int8
    assert small.shape == whole.shape


def test_defaults_for_queries_and_documents(tiny_model):
    model = tiny_model(default_instruction="Find answers.", document_instruction="Be found.")
    assert np.array_equal(model.encode(TEXTS), model.encode(TEXTS, prompt="Find answers."))
    assert np.array_equal(model.encode_query(TEXTS), model.encode(TEXTS, prompt="Find answers."))
    assert np.array_equal(model.encode_document(TEXTS), model.encode(TEXTS, prompt="Be found."))
    # Programs that wrap the library know prompts by these two names.
    assert np.array_equal(model.encode(TEXTS, prompt_name="document"), model.encode(TEXTS, prompt="Be found."))
    assert np.array_equal(model.encode(TEXTS, prompt_name="query"), model.encode(TEXTS, prompt="Find answers."))
    # So they do in a plain SentenceTransformer of the saved modules, even where no prompts were saved.
    plain = SentenceTransformer(modules=list(model), prompts={"query": "", "document": ""}, device="cpu")
    assert np.array_equal(plain.encode(TEXTS, prompt_name="document"), model.encode_document(TEXTS))
    given = model.encode_document(TEXTS, prompt=INSTRUCTION)
    assert np.array_equal(given, model.encode(TEXTS, prompt=INSTRUCTION))


@pytest.mark.parametrize("layout", ["prefix", "suffix"])
@pytest.mark.parametrize("condition_on", ["instruction", "instruction_and_text"])
def test_several_instructions_at_once(tiny_model, layout, condition_on):
    model = tiny_model(layout=layout, condition_on=condition_on)
    instructions = [INSTRUCTION, "Find the topic."]
    several = promptembedder.encode(model, TEXTS, instructions, batch_size=2)
    assert several.shape == (2, len(TEXTS), 32)
    for n, instruction in enumerate(instructions):
        assert np.allclose(several[n], model.encode(TEXTS, prompt=instruction), atol=1e-5)
    assert np.allclose(promptembedder.encode(model, TEXTS, INSTRUCTION), several[0], atol=1e-5)


def test_empty_list_keeps_the_width(tiny_model):
    model = tiny_model()
    assert promptembedder.encode(model, []).shape == (0, 32)
    assert promptembedder.encode(model, [], [INSTRUCTION, "x"]).shape == (2, 0, 32)


def test_without_an_instruction_the_models_default_prompt_counts(tiny_model):
    model = tiny_model(default_instruction="Find answers.")
    assert np.allclose(promptembedder.encode(model, TEXTS), model.encode(TEXTS, prompt="Find answers."), atol=1e-5)
    model.prompts["mine"], model.default_prompt_name = INSTRUCTION, "mine"
    assert np.allclose(promptembedder.encode(model, TEXTS), model.encode(TEXTS), atol=1e-5)
    assert np.allclose(promptembedder.encode(model, TEXTS), model.encode(TEXTS, prompt=INSTRUCTION), atol=1e-5)


@pytest.mark.parametrize(
    ("texts", "message"),
    [([""], "text 0 is empty"), ([" \n"], "text 0 is empty"), ([3], "text 0 is int, expected a string")],
)
def test_bad_texts(tiny_model, texts, message):
    with pytest.raises(PromptEmbedderError, match=message):
        promptembedder.encode(tiny_model(), texts)


def test_a_bad_text_is_told_by_its_place_before_any_is_read(tiny_model, monkeypatch):
    model = tiny_model()
    monkeypatch.setattr(type(model[0].backbone), "read_text", lambda *a: pytest.fail("read"))
    with pytest.raises(PromptEmbedderError, match="text 7 is empty"):
        promptembedder.encode(model, [*TEXTS[:1] * 7, "", *TEXTS], batch_size=2)
    with pytest.raises(PromptEmbedderError, match="takes a list of texts"):
        promptembedder.encode(model, "a text")
    with pytest.raises(PromptEmbedderError, match="batches of at least one"):
        promptembedder.encode(model, TEXTS, batch_size=0)


def test_unknown_argument_is_refused(tiny_model):
    with pytest.raises(ValueError, match="instructon"):
        tiny_model().encode(TEXTS, instructon="misspelt")
    with pytest.raises(PromptEmbedderError, match=r"processing_kwargs are not taken; model.max_seq_length"):
        tiny_model().encode(TEXTS, processing_kwargs={"text": {"max_length": 3}})


def test_long_text_is_cut_and_said_once(tiny_model, caplog):
    model = tiny_model(max_text_tokens=6, text_template="{text}")
    long = "one two three four five six seven eight nine ten eleven twelve"
    first = model.encode([long])
    again = model.encode([long + " thirteen"])
    assert np.allclose(first, again, atol=1e-6)
    assert len([r for r in caplog.records if "is read up to max_text_tokens = 6" in r.message]) == 1


def test_a_model_opens_by_its_hub_id(tiny_model, hub, monkeypatch, tmp_path):
    place, asked = hub
    model = tiny_model()
    promptembedder.save(model, place / "me" / "mine")
    monkeypatch.chdir(tmp_path)
    assert_same_embeddings(promptembedder.load("me/mine", device="cpu").encode(TEXTS), model.encode(TEXTS))
    assert describe("me/mine") == describe(place / "me" / "mine")
    assert asked
    assert all(hub_id == "me/mine" and not {"*", "*.py", "*.bin"} & set(patterns) for hub_id, patterns in asked)
    # As the library opens a model's modules.
    opened = SentenceTransformer(modules=[type(model[0]).load("me/mine"), *list(model)[1:]], device="cpu")
    assert_same_embeddings(opened.encode(TEXTS), model.encode(TEXTS))
    # A folder of that name goes first.
    asked.clear()
    promptembedder.save(model, tmp_path / "me" / "mine")
    promptembedder.load("me/mine", device="cpu")
    assert not asked


def test_a_folder_of_the_owners_name_does_not_hide_the_hub(tiny_model, hub, monkeypatch, tmp_path):
    place, _ = hub
    promptembedder.save(tiny_model(), place / "me" / "mine")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "me" / "something").mkdir(parents=True)
    assert describe("me/mine") == describe(place / "me" / "mine")


def test_a_mistyped_folder_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *a, **k: pytest.fail("asked the hub"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mine" / "model").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "model" / "promptembedder.json").write_text("{}")
    with pytest.raises(PromptEmbedderError, match="no model at runs/mistyped; models by name: smollm2-135m"):
        promptembedder.load("runs/mistyped")


def test_a_revision_of_a_model_on_the_hub(tiny_model, hub):
    place, asked = hub
    old, new = tiny_model(), tiny_model()
    with torch.no_grad():
        new[0].alignment.weight.mul_(-1)
    promptembedder.save(new, place / "me" / "mine")
    promptembedder.save(old, place / "me" / "mine@v1")
    for revision, model in ((None, new), ("v1", old)):
        opened = promptembedder.load("me/mine", device="cpu", revision=revision)
        assert_same_embeddings(opened.encode(TEXTS), model.encode(TEXTS))
    assert {hub_id for hub_id, _ in asked} == {"me/mine", "me/mine@v1"}
    assert not np.allclose(old.encode(TEXTS), new.encode(TEXTS), atol=1e-3)


def test_a_pushed_model_opens_by_its_hub_id(tiny_model, hub, monkeypatch):
    """The library's own `push_to_hub`, its network calls replaced."""
    place, _ = hub
    api = SimpleNamespace(
        create_repo=lambda repo_id, **_: SimpleNamespace(repo_id=repo_id),
        upload_folder=lambda repo_id, folder_path, **_: SimpleNamespace(
            commit_url=shutil.copytree(folder_path, place / repo_id)
        ),
    )
    monkeypatch.setattr(library_model, "HfApi", lambda token: api)
    monkeypatch.setattr(library_model, "load_file_path", lambda *a, **k: None)
    model = tiny_model()
    model.push_to_hub("me/mine")
    assert_same_embeddings(promptembedder.load("me/mine", device="cpu").encode(TEXTS), model.encode(TEXTS))


def test_what_the_hubs_client_raises_is_one_line(tiny_model, hub, monkeypatch):
    """It need not be an error of the operating system, nor the hub's own."""
    place, _ = hub
    promptembedder.save(tiny_model(), place / "me" / "mine")

    def broken(*args, **kwargs):
        raise RuntimeError("proxy")

    monkeypatch.setattr("huggingface_hub.snapshot_download", broken)
    with pytest.raises(PromptEmbedderError, match=r"model me/mine could not be fetched from the hub .RuntimeError."):
        promptembedder.load("me/mine")
    with pytest.raises(PromptEmbedderError, match=r"base model me/lm could not be fetched from the hub .RuntimeError."):
        locate_module.locate("me/lm")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", broken)
    with pytest.raises(PromptEmbedderError, match="no model at me/mine"):
        promptembedder.load("me/mine")


@pytest.mark.parametrize("name", ["else/theirs", "me/nothing"])
def test_a_hub_id_without_a_model_of_ours_is_refused(hub, name):
    _, asked = hub
    with pytest.raises(PromptEmbedderError, match=f"no model at {name}: no such folder, and the hub has none of ours"):
        promptembedder.load(name)
    assert not asked


def test_the_text_limit_may_be_set(tiny_model, tmp_path):
    model = tiny_model()
    (whole,) = model.encode([" ".join(TEXTS)], prompt=INSTRUCTION)
    model.max_seq_length = 4
    assert model.max_seq_length == 4
    (cut,) = model.encode([" ".join(TEXTS)], prompt=INSTRUCTION)
    assert not np.allclose(cut, whole, atol=1e-3)
    promptembedder.save(model, tmp_path / "short")
    assert promptembedder.load(tmp_path / "short", device="cpu").max_seq_length == 4
    with pytest.raises(PromptEmbedderError, match="must be a positive number of tokens, found 0"):
        model.max_seq_length = 0


@pytest.mark.parametrize("options", [{}, {"layout": "prefix", "max_instruction_tokens": 20}])
def test_no_more_is_read_than_the_llm_has_positions_for(tiny_model, options):
    """Of 1,024, all that stands beside a text counts: counted here in what the backbone is given."""
    model = tiny_model(num_soft_tokens=3, **options)
    (text,) = model[0].preprocess(["x"])["input_ids"]
    instruction = 20 if options else 0
    opening = len(model[0].instruction_ids("")) - len(model[0].tokenizer("\n", add_special_tokens=False)["input_ids"])
    room = 1024 - (len(text) - 1) - 3 - instruction - (opening if options else 0)
    model.max_seq_length = room
    with pytest.raises(PromptEmbedderError, match=rf"texts of {room + 1} tokens, with \d+ beside them, .* reads 1024"):
        model.max_seq_length = room + 1
    tiny_model(num_soft_tokens=3, max_text_tokens=room, **options)
    with pytest.raises(PromptEmbedderError, match=rf"texts of {room + 1} tokens"):
        tiny_model(num_soft_tokens=3, max_text_tokens=room + 1, **options)


@pytest.mark.parametrize("cast", ["half", "bfloat16"])
def test_a_model_may_be_cast_as_a_whole(tiny_model, cast):
    model = tiny_model(linear_head=True, deep_soft_prompt=True)
    expected = promptembedder.encode(model, TEXTS, INSTRUCTION)
    getattr(model, cast)()
    for found in (promptembedder.encode(model, TEXTS, INSTRUCTION), model.encode(TEXTS, prompt=INSTRUCTION)):
        assert ((found.astype(np.float32) * expected).sum(-1) > 0.99).all()


def test_threads_do_not_hear_each_other(tiny_model):
    """A deep soft prompt and the layers that are read hang on layers that all threads share."""
    model = tiny_model(deep_soft_prompt=True, readout_layers=(1,))
    asked = ["One thing.", "Quite another thing, in more words."]
    expected = [promptembedder.encode(model, TEXTS, instruction) for instruction in asked]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda n: promptembedder.encode(model, TEXTS, asked[n % 2]), range(40)))
    finally:
        sys.setswitchinterval(before)
    for n, embeddings in enumerate(found):
        assert np.allclose(embeddings, expected[n % 2], atol=1e-6)


def test_multi_process_encoding(tiny_model):
    model = tiny_model()
    pool = model.start_multi_process_pool(["cpu", "cpu"])
    try:
        spread = model.encode(TEXTS * 4, prompt=INSTRUCTION, pool=pool, chunk_size=5)
    finally:
        model.stop_multi_process_pool(pool)
    assert np.allclose(spread, model.encode(TEXTS * 4, prompt=INSTRUCTION), atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("changes", [{}, {"prompter_training": "full"}, {"layout": "prefix", "readout": "mean"}])
def test_saved_and_loaded_is_identical(tiny_model, tmp_path, architecture, changes):
    model = tiny_model(architecture, **changes)
    model[0].alignment.weight.data.add_(0.01)
    model.prompts["same"] = INSTRUCTION
    promptembedder.save(model, tmp_path / "saved")
    loaded = promptembedder.load(tmp_path / "saved", device="cpu")
    assert_same_model(model, loaded)
    assert_same_embeddings(model.encode(TEXTS, prompt=INSTRUCTION), loaded.encode(TEXTS, prompt_name="same"))
    assert loaded[0].settings == model[0].settings
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, p in loaded.named_parameters() if p.requires_grad}
    assert not list(tmp_path.glob(".saved*"))
    assert {p.suffix for p in (tmp_path / "saved").rglob("*") if p.is_file()} <= {".json", ".safetensors", ".md"}


def test_different_prompter_and_backbone(tiny_model, tiny_lm, tmp_path):
    model = tiny_model("llama", backbone=str(tiny_lm("gemma3", 48)))
    embeddings = model.encode(TEXTS, prompt=INSTRUCTION)
    assert embeddings.shape == (len(TEXTS), 48)
    promptembedder.save(model, tmp_path / "saved")
    loaded = promptembedder.load(tmp_path / "saved", device="cpu")
    assert_same_model(model, loaded)
    assert_same_embeddings(embeddings, loaded.encode(TEXTS, prompt=INSTRUCTION))


def test_prompter_and_backbone_share_weights_until_trained(tiny_model):
    module = tiny_model()[0]
    backbone = {p.data_ptr() for p in module.backbone.parameters()}
    frozen = {p.data_ptr() for n, p in module.prompter.named_parameters() if "lora_" not in n}
    assert frozen <= backbone | {module.prompter.lm.get_output_embeddings().weight.data_ptr()}
    assert not any("lora_" in n for n, _ in module.backbone.named_parameters())


def test_soft_prompt_is_remembered_until_a_weight_changes(tiny_model, monkeypatch):
    model = tiny_model()
    module, calls = model[0], []
    original = module.soft_tokens
    monkeypatch.setattr(module, "soft_tokens", lambda instruction: calls.append(instruction) or original(instruction))
    before = model.encode(TEXTS, prompt=INSTRUCTION)
    model.encode(TEXTS, prompt=INSTRUCTION)
    assert calls == [INSTRUCTION]
    lora = next(p for n, p in module.named_parameters() if "lora_B" in n)
    with torch.no_grad():
        lora.add_(0.5)
    after = model.encode(TEXTS, prompt=INSTRUCTION)
    assert calls == [INSTRUCTION] * 2
    assert not np.allclose(before, after, atol=1e-4)
    # The fused optimizer that trainers use changes values without raising tensor versions.
    optimizer = torch.optim.AdamW([lora], fused=True)
    lora.grad = torch.ones_like(lora)
    optimizer.step()
    model.encode(TEXTS, prompt=INSTRUCTION)
    assert len(calls) == 3
    model.load_state_dict({k: 2 * v for k, v in model.state_dict().items()})
    model.encode(TEXTS, prompt=INSTRUCTION)
    assert len(calls) == 4
    # What was remembered on another device stays behind when the model moves.
    module._remembered_for = module._remembered_for.to("meta")
    model.encode(TEXTS, prompt=INSTRUCTION)
    assert len(calls) == 5
    # Weights that nobody trains any more may change, too.
    model.requires_grad_(False)
    model.encode(TEXTS, prompt=INSTRUCTION)
    module.alignment.weight.mul_(2)
    model.encode(TEXTS, prompt=INSTRUCTION)
    assert len(calls) == 6
    # Pools of processes get a copy without what it remembers, which may lie on an accelerator.
    assert module._remembered
    assert not copy.deepcopy(module)._remembered


@pytest.mark.parametrize("how", ["lora", "full"])
def test_the_llms_stay_in_eval_mode(tiny_model, how):
    model = tiny_model(prompter_training=how, linear_head=True)
    llms = [module for llm in (model[0].prompter.lm, model[0].backbone.lm) for module in llm.modules()]
    for mode in (True, False):
        model.train(mode)
        assert not any(module.training for module in llms)
        assert [module.training for module in (model[0], model[0].prompter, model[0].backbone, model[1])] == [mode] * 4
    model[0].prompter.lm.train()
    model[0].backbone.lm.train()
    model.train()
    assert not any(module.training for module in llms)


@pytest.mark.parametrize("how", ["lora", "full"])
def test_trained_parameters_are_those_that_are_there_now(tiny_model, how):
    prompter = tiny_model(prompter_training=how)[0].prompter

    def named(of):
        return {id(p) for name, p in of.named_parameters() if of.is_trained(name)}

    assert {id(p) for p in prompter.trained_parameters()} == named(prompter)
    state = {name: value.clone() for name, value in prompter.state_dict().items()}
    prompter.load_state_dict(state, assign=True)  # other tensors in their places
    assert {id(p) for p in prompter.trained_parameters()} == named(prompter)
    copied = copy.deepcopy(prompter)
    assert {id(p) for p in copied.trained_parameters()} == named(copied)
    assert not named(copied) & named(prompter)


@pytest.mark.parametrize(("room", "calls"), [(2, 3), (1, 4), (0.9, 5)])
def test_soft_prompts_are_remembered_as_long_as_there_is_room(tiny_model, monkeypatch, room, calls):
    model = tiny_model(deep_soft_prompt=True)
    original = type(model[0]).soft_tokens
    with torch.no_grad():
        size = model[0].soft_prompt(INSTRUCTION).nbytes
    monkeypatch.setattr(module_module, "_REMEMBERED_BYTES", int(room * size))
    module, made = copy.deepcopy(model[0]), []
    monkeypatch.setattr(type(module), "soft_tokens", lambda self, text: made.append(text) or original(self, text))
    with torch.no_grad():
        for instruction in ("One.", "One.", "Two.", "One.", "Three."):
            module.soft_prompt(instruction)
    assert len(made) == calls


def test_save_refuses_a_folder_that_is_no_model_and_replaces_one_that_is(tiny_model, tmp_path):
    model = tiny_model()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(PromptEmbedderError, match="exists and is not a saved model"):
        promptembedder.save(model, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"
    promptembedder.save(model, tmp_path / "saved")
    promptembedder.save(model, tmp_path / "saved")
    (tmp_path / "file").write_text("")
    with pytest.raises(PromptEmbedderError, match="cannot write a model"):
        promptembedder.save(model, tmp_path / "file" / "below")
    (tmp_path / "link").symlink_to(tmp_path / "saved")
    promptembedder.save(tiny_model(layout="prefix"), tmp_path / "link")
    assert promptembedder.load(tmp_path / "saved", device="cpu")[0].settings.layout == "prefix"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link", "mine", "saved"]


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), OSError(28, "No space left on device"), SafetensorError("full")]
)
def test_a_save_that_fails_leaves_the_former_model(tiny_model, tmp_path, monkeypatch, error):
    promptembedder.save(tiny_model(), tmp_path / "saved")
    rename = Path.rename

    def fails_at_last(path, target):
        if not path.name.endswith("-former") and target == tmp_path / "saved":
            raise error
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fails_at_last)
    with pytest.raises((PromptEmbedderError, KeyboardInterrupt)):
        promptembedder.save(tiny_model(layout="prefix"), tmp_path / "saved")
    assert promptembedder.load(tmp_path / "saved", device="cpu")[0].settings.layout == "suffix"
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


@pytest.fixture
def saved(tiny_model, tmp_path):
    promptembedder.save(tiny_model(), tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize(
    "name",
    ["promptembedder.json", "alignment.safetensors", "prompter/adapter_model.safetensors", "modules.json"],
)
def test_missing_file(saved, name):
    (saved / name).unlink()
    with pytest.raises(PromptEmbedderError, match=f"has no {name}"):
        promptembedder.load(saved)


def test_missing_folder(tmp_path):
    with pytest.raises(PromptEmbedderError, match="no model at"):
        promptembedder.load(tmp_path / "nowhere")


def test_a_model_of_the_package_opens_by_name(saved, monkeypatch, tmp_path):
    expected = promptembedder.load(saved, device="cpu").encode(TEXTS)
    monkeypatch.setattr(shipped, "PLACE", saved.parent)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert shipped.shipped_names() == ["saved"]
    assert_same_embeddings(promptembedder.load("saved", device="cpu").encode(TEXTS), expected)
    assert describe("saved") == describe(saved)
    with pytest.raises(PromptEmbedderError, match="no model at saves; models by name: saved"):
        promptembedder.load("saves")
    with pytest.raises(PromptEmbedderError, match="comes with the package, which may move"):
        promptembedder.save(promptembedder.load("saved"), tmp_path / "copy", share_prompter="saved")
    (tmp_path / "elsewhere" / "saved").mkdir()  # no model, so it hides none
    assert describe("saved") == describe(saved)
    shutil.copytree(saved, tmp_path / "elsewhere" / "saved", dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "elsewhere" / "saved" / "prompter")
    with pytest.raises(PromptEmbedderError, match="model folder saved has no prompter"):
        promptembedder.load("saved")


def test_a_model_stored_in_half_precision_opens(tiny_model, tmp_path):
    model = tiny_model(linear_head=True, deep_soft_prompt=True)
    with torch.no_grad():
        for parameter in (*model[0].alignment.parameters(), model[1].linear.weight):
            parameter.add_(0.1 * torch.randn_like(parameter))
    expected = model.encode(TEXTS, prompt=INSTRUCTION)
    promptembedder.save(model, tmp_path / "saved")
    for file in (tmp_path / "saved").rglob("*.safetensors"):
        save_file({name: value.half() for name, value in load_file(file).items()}, file)
    opened = promptembedder.load(tmp_path / "saved", device="cpu")
    assert {p.dtype for p in opened.parameters() if p.requires_grad} == {torch.float32}
    assert np.allclose(opened.encode(TEXTS, prompt=INSTRUCTION), expected, atol=1e-2)


def test_a_model_comes_with_the_package():
    assert "smollm2-135m" in shipped.shipped_names()


@pytest.mark.parametrize("name", shipped.shipped_names())
def test_every_model_of_the_package_is_whole(name):
    facts = describe(name)
    assert facts["layout"] == "suffix"
    assert facts["size_mb"] < 15
    folder = shipped.shipped_folder(name)
    assert f'load("{name}")' in (folder / "README.md").read_text()
    for file in folder.rglob("*"):
        if file.suffix in (".json", ".yaml"):
            assert not re.search(r"/(root|home|tmp|work)\b", file.read_text()), file


def test_newer_format(saved):
    settings = json.loads((saved / "promptembedder.json").read_text())
    (saved / "promptembedder.json").write_text(json.dumps({**settings, "format_version": 99}))
    with pytest.raises(PromptEmbedderError, match="format version 99, this promptembedder reads up to 1"):
        promptembedder.load(saved)


def test_damaged_weights(saved):
    path = saved / "alignment.safetensors"
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(PromptEmbedderError, match="damaged safetensors"):
        promptembedder.load(saved)


def test_backbone_of_other_width_or_weights(saved, tiny_lm):
    path = saved / "promptembedder.json"
    settings = json.loads(path.read_text())

    def load_with(backbone):
        bases = {**settings["base_models"], "backbone": str(backbone)}
        path.write_text(json.dumps({**settings, "base_models": bases}))
        promptembedder.load(saved)

    with pytest.raises(PromptEmbedderError, match=r"alignment is \(32, 32\), but .* need \(32, 48\)"):
        load_with(tiny_lm("llama", 48))
    with pytest.raises(PromptEmbedderError, match="has other weights"):
        load_with(tiny_lm("llama", 32, seed=7))


def test_an_llm_that_was_moved(tiny_model, tiny_lm, tmp_path):
    before = Path(shutil.copytree(tiny_lm(), tmp_path / "before"))
    model = tiny_model(prompter=str(before), backbone=str(before))
    expected = model.encode(TEXTS, prompt=INSTRUCTION)
    promptembedder.save(model, tmp_path / "saved")
    before.rename(tmp_path / "now")
    with pytest.raises(PromptEmbedderError, match=r"prompter .*before is no longer there; .*load\(\.\.\., prompter="):
        promptembedder.load(tmp_path / "saved", device="cpu")
    opened = promptembedder.load(tmp_path / "saved", device="cpu", backbone=str(tmp_path / "now"))
    assert np.array_equal(opened.encode(TEXTS, prompt=INSTRUCTION), expected)
    assert opened[0].base_models.prompter == opened[0].base_models.backbone == str(tmp_path / "now")
    with pytest.raises(PromptEmbedderError, match="has other weights"):
        promptembedder.load(tmp_path / "saved", device="cpu", backbone=str(tiny_lm("llama", 32, seed=7)))


def test_prompter_weights_that_do_not_fit(saved, tiny_model, tmp_path):
    promptembedder.save(tiny_model(lora_rank=8), tmp_path / "other")
    name = "prompter/adapter_model.safetensors"
    shutil.copy(tmp_path / "other" / name, saved / name)
    with pytest.raises(PromptEmbedderError, match="weights do not fit the prompter"):
        promptembedder.load(saved)


def test_prompter_opens_with_peft(saved, tiny_lm):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    lm = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_lm("llama")), saved / "prompter")
    ours = promptembedder.load(saved, device="cpu")[0].prompter.lm
    theirs = {n: p for n, p in lm.named_parameters() if "lora_" in n}
    assert theirs
    for name, parameter in ours.named_parameters():
        if "lora_" in name:
            assert torch.equal(parameter, theirs[name])


def test_describe_reads_files_only(saved, monkeypatch):
    monkeypatch.setattr("promptembedder.llms.locate.locate", None)
    facts = describe(saved)
    assert facts["layout"] == "suffix"
    assert facts["alignment"] == "32 x 32"
    assert facts["dimensions"] == 32
    assert "llama" in facts["prompter"]


def test_explain_reads_the_mixture(tiny_model):
    model = tiny_model(num_soft_tokens=3)
    readings = explain(model, INSTRUCTION, top=4)
    weights = model[0].soft_tokens(INSTRUCTION).weights_NKV[0]
    assert len(readings) == 3
    for reading, row in zip(readings, weights.tolist(), strict=True):
        assert [w for _, w in reading.words] == pytest.approx(sorted(row, reverse=True)[:4])
        assert reading.entropy == pytest.approx(-sum(p * math.log(p) for p in row if p > 0), rel=1e-4)
    with pytest.raises(PromptEmbedderError, match="instruction is empty"):
        explain(model, " ")
