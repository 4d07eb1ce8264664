"""The model a user holds: encode, save, load, describe, explain."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch

import promptembedder
from conftest import ARCHITECTURES, INSTRUCTION, TEXTS
from promptembedder import PromptEmbedderError
from promptembedder.model.generation import mixture


def test_the_text_limit_may_be_set(tiny_model, tmp_path):
    model = tiny_model()
    (whole,) = model.encode([" ".join(TEXTS)], prompt=INSTRUCTION)
    model.max_seq_length = 4
    assert model.max_seq_length == 4
    (cut,) = model.encode([" ".join(TEXTS)], prompt=INSTRUCTION)
    assert not np.allclose(cut, whole, atol=1e-3)
    promptembedder.save(model, tmp_path / "short")
    assert promptembedder.load(tmp_path / "short", device="cpu").max_seq_length == 4
    model.max_seq_length = np.int64(5)
    assert type(model.max_seq_length) is int
    promptembedder.save(model, tmp_path / "short")
    assert promptembedder.load(tmp_path / "short", device="cpu").max_seq_length == 5
    for wrong in (0, None, True, 4.0, "4"):
        with pytest.raises(PromptEmbedderError, match=f"must be a positive number of tokens, found {wrong!r}"):
            model.max_seq_length = wrong


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


def test_prompter_and_backbone_share_weights_until_trained(tiny_model):
    module = tiny_model()[0]
    backbone = {p.data_ptr() for p in module.backbone.parameters()}
    frozen = {p.data_ptr() for n, p in module.prompter.named_parameters() if "lora_" not in n}
    assert frozen <= backbone | {module.prompter.lm.get_output_embeddings().weight.data_ptr()}
    assert not any("lora_" in n for n, _ in module.backbone.named_parameters())


def test_soft_prompt_is_remembered_until_a_weight_changes(tiny_model, monkeypatch):
    model = tiny_model()
    module, calls = model[0], []
    module.prompter.register_forward_hook(lambda *_: calls.append(1))
    before = model.encode(TEXTS, prompt=INSTRUCTION)
    model.encode(TEXTS, prompt=INSTRUCTION)
    assert len(calls) == 1
    lora = next(p for n, p in module.named_parameters() if "lora_B" in n)
    with torch.no_grad():
        lora.add_(0.5)
    after = model.encode(TEXTS, prompt=INSTRUCTION)
    assert len(calls) == 2
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
    module._memory._version = module._memory._version.to("meta")
    model.encode(TEXTS, prompt=INSTRUCTION)
    assert len(calls) == 5
    # Weights that nobody trains any more may change, too.
    model.requires_grad_(False)
    model.encode(TEXTS, prompt=INSTRUCTION)
    module.alignment.weight.mul_(2)
    model.encode(TEXTS, prompt=INSTRUCTION)
    assert len(calls) == 6
    # Pools of processes get a copy without what it remembers, which may lie on an accelerator.
    assert len(module._memory) == 1
    assert len(copy.deepcopy(module)._memory) == len(pickle.loads(pickle.dumps(module._memory))) == 0  # noqa: S301


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
    model = tiny_model(deep_rank=3)
    with torch.no_grad():
        size = model[0].soft_prompt(INSTRUCTION).nbytes
    monkeypatch.setattr("promptembedder.model.memory._REMEMBERED_BYTES", int(room * size))
    module, made = copy.deepcopy(model[0]), []
    module.prompter.register_forward_hook(lambda *_: made.append(1))
    with torch.no_grad():
        for instruction in ("One.", "One.", "Two.", "One.", "Three."):
            module.soft_prompt(instruction)
    assert len(made) == calls


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_new_instructions_are_written_together_and_as_alone(tiny_model, architecture):
    """In one pass of the prompter, after another one behind the states of the chat template's opening."""
    model = tiny_model(architecture)
    instructions = [INSTRUCTION, "Short.", "Find the topic of each of the texts."]
    module, passes = copy.deepcopy(model[0]), []
    with torch.no_grad():
        alone = [copy.deepcopy(model[0]).soft_prompt(instruction) for instruction in instructions]
        module.prompter.register_forward_hook(lambda _, inputs, __: passes.append(inputs[2]))
        together = module.soft_prompts([instructions[0], *instructions])
        assert len(passes) == 1
        for expected, found in zip(alone, together[1:], strict=True):
            assert torch.allclose(expected, found, atol=1e-5)
        module.soft_prompts([f"Number {n}." for n in range(20)])
        assert all(len(opening.ids_P) for opening in passes)
        for n in (0, 19):
            expected = model[0].soft_prompt(f"Number {n}.")
            assert torch.allclose(module.soft_prompt(f"Number {n}."), expected, atol=1e-5)
    assert len(passes) == 3


@pytest.mark.parametrize("peaked", [True, False])
def test_a_mixture_leaves_out_words_of_no_weight(peaked):
    generator = torch.Generator().manual_seed(2)
    logits_NV = torch.randn(3, 400, generator=generator) * (40 if peaked else 1)
    weights_NV, words_VP = logits_NV.softmax(-1), torch.randn(400, 8, generator=generator)
    few = int((weights_NV > 1e-13).any(0).sum())
    assert (few < 50) == peaked
    with torch.no_grad():
        assert torch.allclose(mixture(weights_NV, words_VP), weights_NV @ words_VP, atol=1e-6)
