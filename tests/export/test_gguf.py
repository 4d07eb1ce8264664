"""GGUF files: metadata, weights and words, read back without an engine."""

from __future__ import annotations

import builtins
import json
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFReader, TokenType, dequantize
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers

from conftest import INSTRUCTION, TEXTS
from promptembedder.errors import MissingExtraError, PromptEmbedderError
from promptembedder.export.compiled import compile_model
from promptembedder.export.gguf_file import reader, refuse, write
from promptembedder.export.gguf_words import grown_words
from promptembedder.llms.tokens import plain_ids


@pytest.fixture
def exported(tmp_path):
    """`exported(model, **options)`: what was compiled, and the folder written."""

    def export(model, **options):
        compiled = compile_model(model, {"topic": "Find the topic.", "same": INSTRUCTION})
        folder = tmp_path / "export"
        folder.mkdir()
        write(compiled, model, folder, **options)
        return compiled, folder

    return export


def opened(folder):
    """Metadata and tensors of a file."""
    found = GGUFReader(folder / "model.gguf")
    return {key: field.contents() for key, field in found.fields.items()}, {t.name: t for t in found.tensors}


def around(folder, name):
    return json.loads((folder / "instructions.json").read_text())["instructions"][name]


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize("layout", ["suffix", "prefix"])
def test_prefix_text_and_suffix_are_the_sequence_of_the_model(tiny_model, exported, architecture, layout):
    """The rows that an engine looks up are those that the backbone reads."""
    model = tiny_model(architecture, layout=layout)
    compiled, folder = exported(model, precision="float32")
    facts, tensors = opened(folder)
    rows_WD = dequantize(tensors["token_embd.weight"].data, tensors["token_embd.weight"].tensor_type)
    known = {word: i for i, word in enumerate(facts["tokenizer.ggml.tokens"])}
    assert len(known) == len(rows_WD) == facts[f"{architecture}.vocab_size"]
    table_VD = model[0].backbone.lm.get_input_embeddings().weight.detach().numpy()
    for name, prompt in compiled.prompts.items():
        words = around(folder, name)
        assert words["instruction"] == prompt.instruction
        text = plain_ids(model.tokenizer, TEXTS[0])
        ids = [known[word] for word in re.findall(r"<\|pe:.*?\|>", words["prefix"])]
        ids += [*text, *(known[word] for word in re.findall(r"<\|pe:.*?\|>", words["suffix"]))]
        soft = [-1] * len(prompt.soft_KD)
        expected = compiled.sequence(name, text, soft)
        own = [table_VD[i] if i != -1 else None for i in expected]
        left = iter(compiled.vocabulary_rows(name).numpy())
        np.testing.assert_array_equal(rows_WD[ids], np.stack([next(left) if row is None else row for row in own]))
        added = [i for i in ids if i not in text]
        assert {facts["tokenizer.ggml.token_type"][i] for i in added} == {TokenType.CONTROL}


def test_says_how_it_is_read(tiny_model, exported):
    model = tiny_model("qwen2")
    _, folder = exported(model)
    facts, tensors = opened(folder)
    assert facts["general.architecture"] == "qwen2"
    assert facts["qwen2.pooling_type"] == 3  # LAST
    assert facts["tokenizer.ggml.add_bos_token"] is False
    assert facts["tokenizer.ggml.add_eos_token"] is False
    assert (facts["tokenizer.ggml.model"], facts["tokenizer.ggml.pre"]) == ("gpt2", "qwen2")
    assert "output.weight" not in tensors
    assert tensors["blk.0.attn_q.bias"].tensor_type == Kind.F32


def test_heads_are_turned_for_llama_alone(tiny_model, exported, tmp_path):
    for architecture in ("llama", "qwen2"):
        model = tiny_model(architecture)
        (tmp_path / architecture).mkdir()
        write(compile_model(model, {"topic": "Find."}), model, tmp_path / architecture, precision="float32")
        _, tensors = opened(tmp_path / architecture)
        for letter, heads in (("q", 4), ("k", 2)):
            weight = getattr(model[0].backbone.lm.layers[0].self_attn, f"{letter}_proj").weight.detach().numpy()
            if architecture == "llama":  # rows 0 and 4 of a head of 8 become neighbours
                order = np.arange(8 * heads).reshape(heads, 2, 4).swapaxes(1, 2).ravel()
                assert list(order[:4]) == [0, 4, 1, 5]
                weight = weight[order]
            np.testing.assert_array_equal(tensors[f"blk.0.attn_{letter}.weight"].data, weight)


@pytest.mark.parametrize(
    ("precision", "kinds"),
    [
        ("float32", {Kind.F32}),
        ("float16", {Kind.F32, Kind.F16}),
        ("bfloat16", {Kind.F32, Kind.F16, Kind.BF16}),
        ("q8_0", {Kind.F32, Kind.F16, Kind.Q8_0}),
    ],
)
def test_precisions(tiny_model, exported, precision, kinds):
    """Word embeddings are never below float16: soft tokens would lose what tells them apart."""
    model = tiny_model()
    _, folder = exported(model, precision=precision)
    _, tensors = opened(folder)
    assert {tensor.tensor_type for tensor in tensors.values()} == kinds
    assert tensors["token_embd.weight"].tensor_type == (Kind.F32 if precision == "float32" else Kind.F16)
    assert tensors["output_norm.weight"].tensor_type == Kind.F32
    up = tensors["blk.1.ffn_up.weight"]
    expected = model[0].backbone.lm.layers[1].mlp.up_proj.weight.detach().numpy()
    np.testing.assert_allclose(dequantize(up.data, up.tensor_type), expected, atol=0.004)
    assert precision in (folder / "README.md").read_text()
    if precision == "q8_0":  # those that lose most keep float16
        assert {tensors[f"blk.0.{part}.weight"].tensor_type for part in ("attn_v", "ffn_down")} == {Kind.F16}


def test_scaled_rotary_embeddings(tiny_model, exported):
    model = tiny_model()
    lm = model[0].backbone.lm
    lm.config.rope_parameters = {**lm.config.rope_parameters, "rope_type": "linear", "factor": 4.0}
    lm.rotary_emb.inv_freq /= 4
    _, folder = exported(model)
    np.testing.assert_allclose(opened(folder)[1]["rope_freqs.weight"].data, 4.0, rtol=1e-5)


@pytest.mark.parametrize(
    ("architecture", "changes", "said"),
    [
        ("qwen3", {}, r"architecture 'qwen3' cannot be exported as GGUF, expected llama or qwen2 or gemma3_text"),
        ("gemma3", {}, r"other windows, attention or rotary embeddings than those of Gemma 3"),  # layers take turns
        ("llama", {"readout": "mean"}, r"read-out 'mean' .* soft-prompt"),
        (
            "llama",
            {"linear_head": True},
            r"a linear head cannot .* fold it .*--texts FILE.* sentence-transformers or soft-prompt",
        ),
        ("llama", {"deep_rank": 2}, r"a deep soft prompt .* fold it .*--texts FILE"),
    ],
)
def test_refusals(tiny_model, exported, architecture, changes, said):
    with pytest.raises(PromptEmbedderError, match=said):
        exported(tiny_model(architecture, **changes))


def test_a_centre_is_refused(tiny_model):
    model = tiny_model()
    model[0].subtract(torch.ones(32))
    with pytest.raises(PromptEmbedderError, match="a centre cannot be exported as GGUF"):
        refuse(compile_model(model, {}))


def test_a_weight_beyond_float16_is_refused(tiny_model, exported):
    model = tiny_model()
    with torch.no_grad():
        model[0].backbone.lm.layers[0].mlp.up_proj.weight[0, 0] = 1e6
    with pytest.raises(PromptEmbedderError, match=r"ffn_up.weight is too large for float16; export in float32"):
        exported(model)


@pytest.fixture
def gemma(tiny_model):
    """A tiny model whose windows are where llama.cpp has them: two layers of the five before a full one."""
    model = tiny_model("gemma3")
    model[0].backbone.lm.config.layer_types = ["sliding_attention"] * 2
    return model


def test_gemma(gemma, exported):
    """Norms hold what is multiplied by, words have scores in the order of merges, and every byte is a word."""
    compiled, folder = exported(gemma, precision="float32")
    facts, tensors = opened(folder)
    assert (facts["general.architecture"], facts["tokenizer.ggml.model"]) == ("gemma3", "llama")
    assert facts["gemma3.attention.sliding_window"] == 12
    assert facts["tokenizer.ggml.add_space_prefix"] is False
    layer = gemma[0].backbone.lm.layers[0]
    for name, norm in (("attn_norm", layer.input_layernorm), ("attn_q_norm", layer.self_attn.q_norm)):
        np.testing.assert_array_equal(tensors[f"blk.0.{name}.weight"].data, 1 + norm.weight.detach().numpy())
    words, scores = facts["tokenizer.ggml.tokens"], facts["tokenizer.ggml.scores"]
    learnt = json.loads(gemma.tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    places = [words.index("".join(merge)) for merge in learnt]
    assert len(set(places)) > 100
    assert [scores[place] for place in places] == sorted((scores[place] for place in places), reverse=True)
    kinds = dict(zip(words, facts["tokenizer.ggml.token_type"], strict=True))
    assert {kinds[f"<0x{n:02X}>"] for n in range(256)} == {TokenType.BYTE}
    assert (kinds["<unk>"], kinds["<bos>"]) == (TokenType.UNKNOWN, TokenType.CONTROL)
    rows_WD = tensors["token_embd.weight"].data
    first = words.index(re.findall(r"<\|pe:topic.*?\|>", around(folder, "topic")["suffix"])[0])
    scale = gemma[0].backbone.lm.config.hidden_size ** 0.5
    np.testing.assert_allclose(rows_WD[first] * scale, compiled.prompts["topic"].soft_KD[0], rtol=1e-5)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("query_pre_attn_scalar", 16),
        ("use_bidirectional_attention", True),
        ("attn_logit_softcapping", 30.0),
        ("rope_parameters", {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}),
    ],
)
def test_another_gemma_is_refused(gemma, exported, setting, value):
    config = gemma[0].backbone.lm.config
    if setting == "rope_parameters":
        value = {**value, "sliding_attention": {"rope_type": "default", "rope_theta": 5e4}}
    setattr(config, setting, value)
    with pytest.raises(PromptEmbedderError, match="than those of Gemma 3 cannot be exported"):
        exported(gemma)


def test_a_tokenizer_of_another_kind_is_refused(gemma):
    """As Llama 2 has it: a space is put before a text."""
    backend = gemma.tokenizer.backend_tokenizer
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    with pytest.raises(PromptEmbedderError, match="neither a byte-level BPE nor one of SentencePiece's"):
        grown_words(gemma.tokenizer, compile_model(gemma, {}))


def test_the_engine_is_named_where_it_is_missing(tiny_model, exported, monkeypatch):
    _, folder = exported(tiny_model())
    before = builtins.__import__

    def without(name, *more, **named):
        if name == "xllamacpp":
            raise ModuleNotFoundError(name=name)
        return before(name, *more, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtraError, match=r"needs xllamacpp.*promptembedder\[gguf\]"):
        reader(folder, "topic")


def _parted(*steps):
    return pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _split(digits):
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|"
        r"\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    return _parted(pre_tokenizers.Split(Regex(pattern), "isolated"))


_DIGITS = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
)


@pytest.mark.parametrize(
    ("parted", "whole", "name"),
    [
        (pre_tokenizers.ByteLevel(add_prefix_space=False), False, "gpt-2"),
        (_DIGITS, False, "smollm"),
        (_split(""), False, "qwen2"),
        (_split("{1,3}"), False, "smaug-bpe"),
        (_split("{1,3}"), True, "llama-bpe"),
        (_split(""), True, None),
        (_DIGITS, True, None),
        (pre_tokenizers.ByteLevel(add_prefix_space=False), True, None),
        (pre_tokenizers.ByteLevel(add_prefix_space=True), False, None),
        (_parted(pre_tokenizers.Digits()), False, None),
    ],
)
def test_how_words_are_parted_is_named_by_the_tokenizer(tiny_model, parted, whole, name):
    """Whether a word of the vocabulary is left whole, whatever the merges say, is part of the name in llama.cpp."""
    model = tiny_model()
    backend = model.tokenizer.backend_tokenizer
    backend.pre_tokenizer = parted
    backend.model.ignore_merges = whole
    compiled = compile_model(model, {})
    if name is None:
        with pytest.raises(PromptEmbedderError, match=r"parts words as llama\.cpp does not"):
            grown_words(model.tokenizer, compiled)
    else:
        assert grown_words(model.tokenizer, compiled).pre == name


def test_a_normalizer_is_refused(tiny_model):
    """The composed form is what clients make; llama.cpp has no other."""
    model = tiny_model()
    compiled = compile_model(model, {})
    model.tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    assert grown_words(model.tokenizer, compiled).pre == "gpt-2"
    model.tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(PromptEmbedderError, match=r"has a normalizer Lowercase, llama\.cpp none"):
        grown_words(model.tokenizer, compiled)


def test_the_engine_gets_the_composed_text_and_room_for_it_alone(tiny_model, exported, monkeypatch):
    """Room for the longest possible text takes gigabytes with some LLMs."""
    _, folder = exported(tiny_model())
    opened_with, read = [], []

    class Server:
        def __init__(self, parameters):
            opened_with.append(parameters)

        def handle_embeddings(self, asked):
            read.append(asked["input"])
            return {"data": [{"embedding": [len(read), 0.0]}]}

    def parameters():
        return SimpleNamespace(model=SimpleNamespace(), cpuparams=SimpleNamespace(), cpuparams_batch=SimpleNamespace())

    kinds = SimpleNamespace(GGML_TYPE_F32=0)
    engine = SimpleNamespace(Server=Server, CommonParams=parameters, ggml_type=kinds)
    monkeypatch.setitem(sys.modules, "xllamacpp", engine)
    embed = reader(folder, "topic")
    found = embed(["cafe\u0301", "Rain."])
    words = around(folder, "topic")
    assert read == [words["prefix"] + text + words["suffix"] for text in ("café", "Rain.")]
    np.testing.assert_array_equal(found, np.array([[1, 0], [2, 0]], dtype=np.float32))
    embed(["word " * 4000])
    assert opened_with[0].cpuparams_batch.n_threads == torch.get_num_threads()
    assert [one.n_ubatch for one in opened_with] == [256, 768]  # 512 tokens of text, and what is around them


def test_a_word_that_no_text_is_read_as_has_another_name(tiny_model):
    """llama.cpp takes an ordinary word `</s>` for a control token; the tokenizer parts it before it looks it up."""
    model = tiny_model()
    backend = model.tokenizer.backend_tokenizer
    state = json.loads(backend.to_str())
    added = {token["content"]: token["id"] for token in state["added_tokens"]}
    place = max(*state["model"]["vocab"].values(), *added.values()) + 1
    state["model"]["vocab"] |= {"</s>": place}
    model.tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))
    assert place not in plain_ids(model.tokenizer, "</s>")
    words = grown_words(model.tokenizer, compile_model(model, {}))
    assert "</s>" not in words.tokens
    assert words.tokens[place] == f"[UNREAD{place}]"
    assert words.kinds[place] == TokenType.UNUSED
    assert all(word in words.tokens for word in added)
