"""Options that give the soft prompt more to work with: fewer layers, deep soft prompts, a linear head."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import ARCHITECTURES, INSTRUCTION, SECOND, TEXTS
from promptembedder import PromptEmbedderError, build, encode, load, save
from promptembedder.data.rows import load_training_data
from promptembedder.llms import widened
from promptembedder.llms.state_cache import open_text_cache
from promptembedder.model.alignment import thinned
from promptembedder.training.train import train
from promptembedder.transfer.centring import centre, sample_of_rows


def naive(module, text, instruction, layers=None):
    """One full forward of one row without a cache; a deep soft prompt is added by hand in every layer."""
    lm = module.backbone.lm
    K = module.settings.num_soft_tokens
    soft = module.soft_prompt(instruction)[0]
    text_TD = lm.get_input_embeddings()(module.preprocess([text])["input_ids"][0])
    hooks = []
    for n, layer in enumerate(lm.layers if len(soft) > K else []):

        def add(_, inputs, rows=soft[K * (n + 1) : K * (n + 2)]):
            changed = inputs[0].clone()
            changed[0, -K:] += rows
            return (changed, *inputs[1:])

        hooks.append(layer.register_forward_pre_hook(add))
    out = lm(
        inputs_embeds=torch.cat([text_TD, soft[:K]])[None], use_cache=False, output_hidden_states=layers is not None
    )
    for hook in hooks:
        hook.remove()
    return out.last_hidden_state[0, -1] if layers is None else lm.norm(out.hidden_states[layers])[0, -1]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_fewer_layers_read_what_an_inner_layer_of_the_whole_gives(tiny_model, architecture):
    whole, short = tiny_model(architecture)[0], tiny_model(architecture, backbone_layers=1)[0]
    assert len(short.backbone.lm.layers) == 1
    assert short.prompter.lm.config.num_hidden_layers == 2  # the prompter, which shares the weights, keeps its own
    assert short.base_models == whole.base_models
    with torch.no_grad():
        found = short(short.preprocess(TEXTS, prompt=INSTRUCTION))["sentence_embedding"]
        for n, text in enumerate(TEXTS):
            assert torch.allclose(found[n], naive(whole, text, INSTRUCTION, layers=1), atol=1e-5)


@pytest.mark.parametrize("layout", ["prefix", "suffix"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_reading_several_layers_averages_what_one_full_forward_gives(tiny_model, architecture, layout):
    module = tiny_model(architecture, layout=layout, readout_layers=(1,))[0]
    lm, soft_KD = module.backbone.lm, module.soft_prompt(INSTRUCTION)[0]
    hooks = [dict(layer._forward_hooks) for layer in lm.layers]
    with torch.no_grad():
        found = module(module.preprocess(TEXTS, prompt=INSTRUCTION))["sentence_embedding"]
        assert [dict(layer._forward_hooks) for layer in lm.layers] == hooks
        for n, text in enumerate(TEXTS):
            parts = [lm.get_input_embeddings()(module.preprocess([text])["input_ids"][0]), soft_KD]
            if layout == "prefix":
                parts = [lm.get_input_embeddings()(module.instruction_ids(INSTRUCTION)), *parts[::-1]]
            out = lm(inputs_embeds=torch.cat(parts)[None], use_cache=False, output_hidden_states=True)
            expected = (out.last_hidden_state[0, -1] + lm.norm(out.hidden_states[1])[0, -1]) / 2
            assert torch.allclose(found[n], expected, atol=1e-5)
            assert not torch.allclose(found[n], out.last_hidden_state[0, -1], atol=1e-2)


def test_several_layers_with_a_deep_soft_prompt(tiny_model):
    module = deepened(tiny_model, readout_layers=(1,))[0]
    with torch.no_grad():
        found = module(module.preprocess(TEXTS, prompt=INSTRUCTION))["sentence_embedding"]
        for n, text in enumerate(TEXTS):
            last, inner = (naive(module, text, INSTRUCTION, layers) for layers in (None, 1))
            assert torch.allclose(found[n], (last + inner) / 2, atol=1e-5)
            assert not torch.allclose(last, inner, atol=1e-2)


def deepened(tiny_model, architecture="llama", **changes):
    model = tiny_model(architecture, deep_soft_prompt=True, **changes)
    torch.manual_seed(2)
    with torch.no_grad():
        model[0].alignment.deep.normal_(std=0.3)
    return model


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_deep_soft_prompt_starts_as_a_plain_one_and_equals_one_full_forward(tiny_model, architecture):
    plain, deep = tiny_model(architecture), tiny_model(architecture, deep_soft_prompt=True)
    assert np.array_equal(plain.encode(TEXTS), deep.encode(TEXTS))
    module = deepened(tiny_model, architecture)[0]
    with torch.no_grad():
        found = module(module.preprocess(TEXTS, prompt=INSTRUCTION))["sentence_embedding"]
        for n, text in enumerate(TEXTS):
            expected = naive(module, text, INSTRUCTION)
            assert torch.allclose(found[n], expected, atol=1e-5)
        plain_too = naive(plain[0], TEXTS[0], INSTRUCTION)
        assert not torch.allclose(found[0], plain_too, atol=1e-2)


def test_a_deep_soft_prompt_of_low_rank_equals_whole_matrices_of_that_rank(tiny_model):
    whole, low = (tiny_model(deep_soft_prompt=True, deep_soft_prompt_rank=rank) for rank in (None, 3))
    thin = low[0].alignment
    assert np.array_equal(low.encode(TEXTS), whole.encode(TEXTS))  # both start at zero
    assert thin.deep_in.shape[-1] == thin.deep_out.shape[-2] == 3
    with torch.no_grad():
        thin.deep_out.normal_(std=0.1)
        for layer, (first, second) in enumerate(zip(thin.deep_in, thin.deep_out, strict=True)):
            whole[0].alignment.deep[layer] = first @ second
    assert np.allclose(low.encode(TEXTS, prompt=INSTRUCTION), whole.encode(TEXTS, prompt=INSTRUCTION), atol=1e-5)


def test_thinned_is_whole_matrices_of_that_rank_and_the_best_of_smaller_rank():
    torch.manual_seed(4)
    whole_JPD = torch.randn(3, 9, 4) @ torch.randn(3, 4, 7)
    first_JPR, second_JRD = thinned(whole_JPD, 4)
    assert (first_JPR.shape, second_JRD.shape) == ((3, 9, 4), (3, 4, 7))
    assert all(factor.is_contiguous() for factor in (first_JPR, second_JRD))  # as safetensors wants them
    assert torch.allclose(first_JPR @ second_JRD, whole_JPD, atol=1e-4)
    for whole_PD, first_PR, second_RD in zip(whole_JPD, *thinned(whole_JPD, 2), strict=True):
        lost = torch.linalg.svdvals(whole_PD)[2:].norm()  # no matrix of rank 2 is nearer
        assert torch.isclose((first_PR @ second_RD - whole_PD).norm(), lost, rtol=1e-4)


def test_a_deep_soft_prompt_in_bfloat16(tiny_model, monkeypatch):
    monkeypatch.setattr(widened, "cpu_has_bfloat16", lambda: False)
    exact, narrow = (deepened(tiny_model, dtype=dtype) for dtype in ("float32", "bfloat16"))
    expected, found = (model.encode(TEXTS, prompt=INSTRUCTION) for model in (exact, narrow))
    assert (expected * found).sum(-1).min() > 0.999
    with torch.no_grad():
        narrow[0].alignment.deep.zero_()
    assert (expected * narrow.encode(TEXTS, prompt=INSTRUCTION)).sum(-1).max() < 0.99


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "bfloat16 without instructions for it"])
@pytest.mark.parametrize(
    "option",
    [
        {"deep_soft_prompt": True},
        {"deep_soft_prompt": True, "deep_soft_prompt_rank": 3},
        {"linear_head": True},
        {"centred": True},
        {"backbone_layers": 1},
        {"readout_layers": (1,)},
        {"instruction_template": "\n{instruction}\nThis"},
        {"instruction_guidance": 1.5},
    ],
)
def test_trained_saved_and_opened(run_config, tmp_path, monkeypatch, option, dtype):
    dtype, _, without = dtype.partition(" ")
    monkeypatch.setattr(widened, "cpu_has_bfloat16", lambda: not without)
    option = option | {"dtype": dtype}
    config = run_config(model=option, prompter_learning_rate=1e-2, alignment_learning_rate=1e-2)
    before = build(config.model, seed=config.training.seed)
    result = train(config)
    if "deep_soft_prompt" in option:
        alignment = result.model[0].alignment
        changed = alignment.deep_out if "deep_soft_prompt_rank" in option else alignment.deep
        assert (changed != 0).any(-1).any(-1).all()  # every layer's
    if "linear_head" in option:
        head = result.model[1].linear.weight
        assert not torch.equal(head, before[1].linear.weight)
        assert torch.equal(load(result.folder)[1].linear.weight, head)  # to the last digit, whatever the LLMs run in
    assert not torch.equal(result.model[0].alignment.weight, before[0].alignment.weight)
    expected = result.model.encode(TEXTS, prompt=INSTRUCTION)
    assert np.allclose(np.linalg.norm(expected, axis=-1), 1, atol=1e-5)
    assert np.allclose(load(result.folder).encode(TEXTS, prompt=INSTRUCTION), expected, atol=1e-5)


@pytest.mark.parametrize("option", [{}, {"condition_on": "instruction_and_text"}, {"instruction_guidance": 1.5}])
def test_centred_embeddings_have_the_samples_mean_taken_away(tiny_model, option):
    module = tiny_model(linear_head=True, **option)[0]
    sample = [(text, (INSTRUCTION, SECOND)[n % 2]) for n, text in enumerate(TEXTS)]

    def one_by_one():
        with torch.no_grad():
            found = [module(module.preprocess([text], prompt=how))["sentence_embedding"][0] for text, how in sample]
        return torch.stack(found)

    before_BE = one_by_one()
    assert before_BE.mean(0).norm() > 0.1
    centre(module, sample)
    assert torch.allclose(one_by_one(), before_BE - before_BE.mean(0), atol=1e-5)
    centre(module, sample)  # of what the embeddings are without it
    assert torch.allclose(module.centre_E, before_BE.mean(0), atol=1e-5)
    module.subtract(None)
    assert torch.equal(one_by_one(), before_BE)


def test_training_centres_on_its_rows_once(run_config):
    config = run_config(model={"centred": True}, alignment_learning_rate=1e-2)
    found = train(config)
    plain = build(config.model, seed=config.training.seed)[0]
    plain.subtract(None)
    data = load_training_data(config.data, config.model.document_instruction, config.training.seed)
    texts = [
        (t, data.prompts[name][end])
        for name, rows in data.datasets.items()
        for end in ("anchor", "positive")
        for t in rows[end]
    ]
    with torch.no_grad():
        every = [plain(plain.preprocess([t], prompt=how))["sentence_embedding"][0] for t, how in texts]
    centre_E = torch.stack(every).mean(0)
    assert torch.allclose(found.model[0].centre_E, centre_E, atol=1e-5)
    # What has learnt before keeps the centre that it learnt with.
    given = train(run_config("given", model={"centred": True}), model=build(config.model, seed=config.training.seed))
    assert torch.allclose(given.model[0].centre_E, centre_E, atol=1e-5)
    again = train(run_config("again", alignment_learning_rate=1e-2), start=found.folder)
    assert torch.equal(again.model[0].centre_E, found.model[0].centre_E)
    assert not torch.equal(again.model[0].alignment.weight, found.model[0].alignment.weight)


def test_made_up_rows_are_centred_on_where_there_are_no_others(run_config):
    files = run_config().data
    both, alone = (load_training_data(replace(d, contrast_rows=60), "", 1) for d in (files, replace(files, files=())))
    real = {t for rows in load_training_data(files, "", 1).datasets.values() for t in rows["anchor"]}
    positives = {t for rows in load_training_data(files, "", 1).datasets.values() for t in rows["positive"]}
    drawn = {text for text, _ in sample_of_rows(both, 1)}
    assert drawn & real
    assert drawn & positives
    assert drawn <= real | positives
    assert len(sample_of_rows(alone, 1)) == 60  # 30 twos, both ends
    assert {how for _, how in sample_of_rows(alone, 1)} <= set(alone.instructions)


def test_all_but_the_prompter_learn_at_the_alignments_rate(run_config):
    option = {"deep_soft_prompt": True, "linear_head": True}
    config = run_config(model=option, prompter_learning_rate=1e-5, alignment_learning_rate=1e-2, max_steps=1, warmup=0)
    before = dict(build(config.model, seed=config.training.seed).named_parameters())
    after = dict(train(config).model.named_parameters())
    # The first step of Adam moves every weight by its rate, however large the gradient.
    moved = {name: float((after[name] - before[name]).detach().abs().max()) for name in after}
    rates = {name: rate for name, rate in moved.items() if rate}
    fast = {"0.alignment.weight", "0.alignment.deep", "1.linear.weight"}
    assert {name for name, rate in rates.items() if rate > 5e-3} == fast
    slow = [rate for name, rate in rates.items() if name not in fast]
    assert slow
    assert max(slow) < 2e-5


def test_the_best_checkpoint_comes_back_to_the_last_digit(run_config, tmp_path):
    model = build(run_config(model={"linear_head": True}).model)
    # A checkpoint that names another precision than the open LLMs have.
    model[0].settings = replace(model[0].settings, dtype="bfloat16")
    frozen = {name: p.clone() for name, p in model[0].backbone.named_parameters()}
    config = run_config(evaluation={"dev": "pairs.jsonl"}, alignment_learning_rate=1e-2, early_stop_patience=1)
    result = train(config, model=model)
    scores = {line["step"]: line["eval_dev_spearman_cosine"] for line in result.history if "eval_runtime" in line}
    best = max(scores, key=lambda step: scores[step])
    kept = load_file(tmp_path / "run" / f"checkpoint-{best}" / "1_Dense" / "model.safetensors")["linear.weight"]
    assert torch.equal(result.model[1].linear.weight, kept)
    assert not torch.equal(kept, kept.bfloat16().float())
    for name, parameter in result.model[0].backbone.named_parameters():
        assert torch.equal(parameter, frozen[name]), name


def test_a_best_checkpoint_that_cannot_be_read_ends_the_run(run_config, monkeypatch):
    def failing(*_):
        raise PromptEmbedderError("gone")

    monkeypatch.setattr("promptembedder.training.restore", failing)
    with pytest.raises(PromptEmbedderError, match="gone"):
        train(run_config(evaluation={"dev": "pairs.jsonl"}))


@pytest.mark.parametrize("rank", [None, 3])
def test_a_deep_soft_prompt_that_nothing_would_train_is_refused(run_config, tmp_path, rank):
    deep = {"deep_soft_prompt": True, "deep_soft_prompt_rank": rank}
    config = run_config("frozen", model=deep, train_alignment=False)
    with pytest.raises(PromptEmbedderError, match="stay at zero"):
        train(config)
    assert not (tmp_path / "frozen" / "model").exists()
    trained = train(run_config("trained", model=deep)).model
    assert train(config, model=trained).model is trained  # goes on: the prompter alone


@pytest.mark.parametrize(
    "option",
    [
        {"deep_soft_prompt": True},
        {"linear_head": True, "centred": True},
        {"instruction_guidance": 1.5},
        {"instruction_guidance": 1.5, "layout": "prefix"},
    ],
)
def test_leaf_and_plain_training_are_the_same(run_config, option):
    """The callback clips all trained weights, those after pooling too."""
    trained = [
        train(run_config(str(leaf), model=option, soft_prompt_leaf=leaf, max_grad_norm=0.05)).model
        for leaf in (True, False)
    ]
    one, other = (dict(model.named_parameters()) for model in trained)
    for name, parameter in one.items():
        assert torch.allclose(parameter, other[name], atol=1e-5), name


WORDS = "\n{instruction}\nThis sentence"


@pytest.mark.parametrize("readout", ["last", "mean"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_instruction_in_words_stands_between_text_and_soft_prompt(tiny_model, architecture, readout):
    model = tiny_model(architecture, instruction_template=WORDS, readout=readout)
    module, embed = model[0], model[0].backbone.lm.get_input_embeddings()
    with torch.no_grad():
        found = module(module.preprocess(TEXTS, prompt=INSTRUCTION))["sentence_embedding"]
        soft_KD = module.soft_prompt(INSTRUCTION)[0]
        words = module.tokenizer(f"\n{INSTRUCTION}\nThis sentence", add_special_tokens=False)["input_ids"]
        for n, text in enumerate(TEXTS):
            text_TD = embed(module.preprocess([text])["input_ids"][0])
            parts = torch.cat([text_TD, embed(torch.tensor(words)), soft_KD])[None]
            hidden = module.backbone.lm(inputs_embeds=parts, use_cache=False).last_hidden_state[0, -len(soft_KD) :]
            expected = hidden[-1] if readout == "last" else hidden.mean(0)
            assert torch.allclose(found[n], expected, atol=1e-5), text
    several = encode(model, TEXTS, [INSTRUCTION, SECOND])
    for i, instruction in enumerate((INSTRUCTION, SECOND)):
        assert np.allclose(several[i], model.encode(TEXTS, prompt=instruction), atol=1e-5)
    assert not np.allclose(several[0], several[1], atol=1e-3)


def test_an_instruction_in_words_leaves_the_states_of_texts_alone(tiny_model):
    module = tiny_model(instruction_template=WORDS)[0]
    module.backbone.text_cache = open_text_cache(2**24, identity="test")
    with torch.no_grad():
        for instruction in (INSTRUCTION, SECOND, INSTRUCTION):
            cached = module(module.preprocess(TEXTS, prompt=instruction))["sentence_embedding"]
        module.backbone.text_cache = None
        assert torch.equal(cached, module(module.preprocess(TEXTS, prompt=INSTRUCTION))["sentence_embedding"])


@pytest.mark.parametrize("layout", ["prefix", "suffix"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_guidance_moves_embeddings_away_from_those_under_the_default_instruction(tiny_model, architecture, layout):
    options = {"layout": layout, "default_instruction": INSTRUCTION}
    plain = tiny_model(architecture, **options)
    guided = tiny_model(architecture, instruction_guidance=1.5, **options)
    with torch.no_grad():
        default, other = (
            plain[0](plain[0].preprocess(TEXTS, prompt=instruction))["sentence_embedding"]
            for instruction in (INSTRUCTION, SECOND)
        )
        found = guided[0](guided[0].preprocess(TEXTS, prompt=SECOND))["sentence_embedding"]
    assert torch.allclose(found, other + 0.5 * (other - default), atol=1e-5)
    assert not torch.allclose(found, other, atol=1e-3)
    assert np.array_equal(guided.encode(TEXTS), plain.encode(TEXTS))
    # Documents stay where queries under any instruction look for them.
    assert np.array_equal(guided.encode_document(TEXTS), plain.encode_document(TEXTS))
    plain[0].instruction_guidance = 1.5
    assert np.array_equal(plain.encode(TEXTS, prompt=SECOND), guided.encode(TEXTS, prompt=SECOND))
    several = encode(guided, TEXTS, [SECOND, INSTRUCTION, SECOND])
    for i, instruction in enumerate((SECOND, INSTRUCTION, SECOND)):
        assert np.allclose(several[i], guided.encode(TEXTS, prompt=instruction), atol=1e-5)


def test_guidance_reads_texts_and_default_instruction_once(tiny_model):
    module = tiny_model(instruction_guidance=1.5)[0]
    backbone, features = module.backbone, module.preprocess(TEXTS)
    with (
        torch.no_grad(),
        mock.patch.object(backbone, "read_text", wraps=backbone.read_text) as texts,
        mock.patch.object(backbone, "read_soft_prompt", wraps=backbone.read_soft_prompt) as prompts,
    ):
        embed = backbone.embedder(features["input_ids"], features["attention_mask"])
        list(module.embeddings(embed, [INSTRUCTION, SECOND, INSTRUCTION]))
    assert (texts.call_count, prompts.call_count) == (1, 4)


def test_a_frozen_alignment_stays_as_it_starts(run_config):
    before = build(run_config().model, seed=13)
    model = train(run_config(train_alignment=False, prompter_learning_rate=1e-2)).model
    assert torch.equal(model[0].alignment.weight, before[0].alignment.weight)
    assert not np.allclose(model.encode(TEXTS), before.encode(TEXTS), atol=1e-4)
    with pytest.raises(PromptEmbedderError, match="nothing to train"):
        train(run_config("none", train_alignment=False, train_prompter=False))


def test_bad_input(tiny_model, tiny_settings, tmp_path):
    with pytest.raises(PromptEmbedderError, match=r"backbone_layers = 3, but .* has 2"):
        build(tiny_settings(backbone_layers=3), device="cpu")
    for number, read in (2, None), (1, 1):
        with pytest.raises(PromptEmbedderError, match=r"readout_layers = .* the last of which counts anyway"):
            build(tiny_settings(readout_layers=(number,), backbone_layers=read), device="cpu")
    with pytest.raises(ValueError, match=r"instruction_template must hold \{instruction\} exactly once"):
        tiny_settings(instruction_template="no place")
    with pytest.raises(ValueError, match="instruction_template needs layout 'suffix', found 'prefix'"):
        tiny_settings(instruction_template=WORDS, layout="prefix")
    with pytest.raises(ValueError, match="text_pass 'int8' needs layout 'suffix', found 'prefix'"):
        tiny_settings(text_pass="int8", layout="prefix")
    with pytest.raises(ValueError, match="deep_soft_prompt needs layout 'suffix', found 'prefix'"):
        tiny_settings(deep_soft_prompt=True, layout="prefix")
    with pytest.raises(ValueError, match="deep_soft_prompt_rank needs deep_soft_prompt"):
        tiny_settings(deep_soft_prompt_rank=4)
    with pytest.raises(ValueError, match="instruction_guidance needs condition_on 'instruction', found"):
        tiny_settings(instruction_guidance=1.5, condition_on="instruction_and_text")
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        tiny_settings(instruction_guidance=0.5)
    with pytest.raises(PromptEmbedderError, match=r"model: instruction_guidance = 0.5: .* greater than or equal to 1"):
        tiny_model()[0].instruction_guidance = 0.5
    save(deepened(tiny_model), tmp_path / "model")
    file = tmp_path / "model" / "alignment.safetensors"
    stored = load_file(file)
    save_file({"weight": stored["weight"]}, file)
    with pytest.raises(PromptEmbedderError, match=r"holds \{'weight': \(32, 32\)\}, expected \{.*'deep'"):
        load(tmp_path / "model")
    save_file({"weight": stored["weight"], "deep": stored["deep"][:1].clone()}, file)
    with pytest.raises(PromptEmbedderError, match=r"'deep': \(1, 32, 32\).*, expected .*'deep': \(2, 32, 32\)"):
        load(tmp_path / "model")
