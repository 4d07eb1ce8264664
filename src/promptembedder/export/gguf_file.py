"""Format `gguf`: one file for llama.cpp and what is built on it, with the soft tokens of all instructions as words.

A client writes an instruction's prefix and suffix around a text. They hold special tokens alone: the template's words
would grow together with the text, so each has a copy that is a special token.

Shapes: N texts, W words of the grown vocabulary, D backbone width.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer

from promptembedder.errors import PromptEmbedderError, needs_extra
from promptembedder.export.compiled import Compiled
from promptembedder.export.gguf_readme import readme
from promptembedder.export.gguf_words import Words, grown_words
from promptembedder.model.module import soft_prompt_module
from promptembedder.text import composed

Precision = Literal["float32", "float16", "bfloat16", "q8_0"]
PRECISION = "float16"
PRECISIONS = get_args(Precision)
MODEL_FILE = "model.gguf"
WORDS_FILE = "instructions.json"
_KINDS = {"float32": Kind.F32, "float16": Kind.F16, "bfloat16": Kind.BF16, "q8_0": Kind.Q8_0}
_FILE_TYPES = {
    "float32": gguf.LlamaFileType.ALL_F32,
    "float16": gguf.LlamaFileType.MOSTLY_F16,
    "bfloat16": gguf.LlamaFileType.MOSTLY_BF16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
}
_ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
}
# Matrices that q8_0 leaves in float16: with them in eight bits, embeddings fall below the bound of the check.
_SENSITIVE = ("attn_k", "attn_v", "attn_output", "ffn_down")
# What llama.cpp turns by freq_factors; it has those of llama alone.
_STATIC_ROPES = {"llama": ("default", "linear", "llama3"), "qwen2": ("default",), "gemma3_text": ("default",)}
# What llama.cpp takes for granted in Gemma 3: one layer in six sees all tokens, the others turn by this base.
_GEMMA_FULL_EVERY, _GEMMA_LOCAL_BASE = 6, 10_000.0
HOLDS_HEAD = False
_OTHERS = "export in format sentence-transformers or soft-prompt"


def refuse(compiled: Compiled) -> None:
    """Refuse what llama.cpp does not do.

    Raises:
        PromptEmbedderError: a deep soft prompt, read-out `mean`, a centre or a linear head.
    """
    if compiled.is_deep:
        raise PromptEmbedderError(
            "a deep soft prompt is more than words of a vocabulary: fold it (`--texts FILE`), "
            "or export in format soft-prompt"
        )
    if compiled.readout != "last":
        raise PromptEmbedderError(
            f"read-out {compiled.readout!r} cannot be exported as GGUF: llama.cpp pools the last token or all; "
            "export in format soft-prompt"
        )
    for held, what in ((compiled.centre_D, "a centre"), (compiled.head_ED, "a linear head")):
        if held is not None:
            raise PromptEmbedderError(
                f"{what} cannot be exported as GGUF: llama.cpp has none; fold it into the soft tokens "
                f"(`--texts FILE`), or {_OTHERS}"
            )


def check_backbone(compiled: Compiled, model: SentenceTransformer) -> None:
    """Refuse backbones and tokenizers that are not known here, before a fold.

    Raises:
        PromptEmbedderError: the backbone or its tokenizer is one.
    """
    _check_architecture(_decoder(model).config)
    grown_words(model.tokenizer, compiled)


def write(compiled: Compiled, model: SentenceTransformer, folder: Path, *, precision: Precision = "float16") -> None:
    """Write `model.gguf`, `instructions.json` with what goes around a text, and a README.

    Args:
        compiled: instructions that the model's prompter has read.
        model: has the backbone and its tokenizer.
        folder: exists, and is empty.
        precision: of the weights; word embeddings stay in float16 where it is a smaller one.

    Raises:
        PromptEmbedderError: as in `refuse`; an unknown precision, one that a weight does not fit into, or a backbone
            or tokenizer that is not known here.
    """
    refuse(compiled)
    if precision not in PRECISIONS:
        raise PromptEmbedderError(f"precision {precision!r} is unknown, expected one of: {', '.join(PRECISIONS)}")
    decoder = _decoder(model)
    config = decoder.config
    _check_architecture(config)
    words = grown_words(model.tokenizer, compiled)
    writer = gguf.GGUFWriter(folder / MODEL_FILE, gguf.MODEL_ARCH_NAMES[_ARCHITECTURES[config.model_type]])
    _add_shape(writer, config, precision)
    words.add_to(writer)
    tensors = list(_tensors(decoder, compiled, words, precision))
    for name, shape, kind, _ in tensors:
        size = gguf.quant_shape_to_byte_shape(shape, kind)
        writer.add_tensor_info(name, size, np.dtype(np.uint8), int(np.prod(size)), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, _, kind, weight in tensors:
        writer.write_tensor_data(_encoded(name, weight(), kind))
    writer.close()
    around = {
        name: {"instruction": prompt.instruction, "prefix": words.prefixes[name], "suffix": words.suffixes[name]}
        for name, prompt in compiled.prompts.items()
    }
    facts = {"max_text_tokens": compiled.max_text_tokens, "instructions": around}
    (folder / WORDS_FILE).write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(readme(compiled, precision, words.around), encoding="utf-8")


def _decoder(model: SentenceTransformer) -> Any:
    lm: Any = soft_prompt_module(model).backbone.lm
    return lm.get_decoder() if hasattr(lm, "get_decoder") else lm


def _check_architecture(config: Any) -> None:
    kind = config.model_type
    if kind not in _ARCHITECTURES:
        raise PromptEmbedderError(
            f"a backbone of architecture {kind!r} cannot be exported as GGUF, expected {' or '.join(_ARCHITECTURES)}; "
            f"{_OTHERS}"
        )
    rope = _rope(config).get("rope_type", "default")
    if rope not in _STATIC_ROPES[kind]:
        raise PromptEmbedderError(f"rotary embeddings of type {rope!r} in {kind} cannot be exported as GGUF; {_OTHERS}")
    if getattr(config, "use_sliding_window", False):
        raise PromptEmbedderError(f"sliding windows in {kind} cannot be exported as GGUF; {_OTHERS}")
    if kind == "gemma3_text" and not _is_plain_gemma(config):
        raise PromptEmbedderError(
            f"a backbone of architecture {kind!r} with other windows, attention or rotary embeddings than those of "
            f"Gemma 3 cannot be exported as GGUF; {_OTHERS}"
        )


def _is_plain_gemma(config: Any) -> bool:
    """Whether llama.cpp, which knows Gemma 3 by name, would run a backbone as its settings say."""
    layers = config.num_hidden_layers
    full = [n for n, kind in enumerate(config.layer_types) if kind == "full_attention"]
    local = config.rope_parameters["sliding_attention"]
    return (
        full == list(range(_GEMMA_FULL_EVERY - 1, layers, _GEMMA_FULL_EVERY))
        and (local["rope_type"], local["rope_theta"]) == ("default", _GEMMA_LOCAL_BASE)
        and config.query_pre_attn_scalar == _head_width(config)
        and not config.use_bidirectional_attention
        and config.attn_logit_softcapping is None
    )


def _rope(config: Any) -> dict[str, Any]:
    """Rotary embeddings, of Gemma those of the layers that see all tokens."""
    rope = dict(config.rope_parameters or {})
    return dict(rope.get("full_attention", rope))


def _head_width(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _add_shape(writer: gguf.GGUFWriter, config: Any, precision: Precision) -> None:
    writer.add_file_type(_FILE_TYPES[precision])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(_head_width(config))
    writer.add_value_length(_head_width(config))
    writer.add_rope_dimension_count(_head_width(config))
    writer.add_rope_freq_base(_rope(config)["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if config.model_type == "gemma3_text":
        writer.add_sliding_window(config.sliding_window)
    writer.add_pooling_type(gguf.PoolingType.LAST)


def _tensors(
    decoder: Any, compiled: Compiled, words: Words, precision: Precision
) -> Iterator[tuple[str, tuple[int, ...], Kind, Callable[[], NDArray[np.float32]]]]:
    """Name, shape and kind of each tensor, and what makes it: one at a time is held as float32."""
    config = decoder.config
    names = gguf.get_tensor_name_map(_ARCHITECTURES[config.model_type], config.num_hidden_layers)
    table = decoder.get_input_embeddings().weight
    for name, weight in decoder.state_dict().items():
        found = names.get_name(f"model.{name}", try_suffixes=(".weight", ".bias"))
        if found is None:
            raise PromptEmbedderError(f"weight {name} of the backbone has no place in a GGUF file; {_OTHERS}")
        if weight.data_ptr() == table.data_ptr():
            kind = Kind.F32 if precision == "float32" else Kind.F16
            yield found, (words.count, table.shape[1]), kind, lambda: words.rows(table, compiled)
            continue
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        turned = heads if config.model_type == "llama" else None
        # transformers multiplies by one more than Gemma's norms hold, llama.cpp by what the file holds.
        added = float(config.model_type == "gemma3_text" and name.endswith("norm.weight"))
        yield found, tuple(weight.shape), _kind(found, weight, precision), _maker(weight, turned, added)
    factors = _rope_factors(decoder)
    if factors is not None:
        yield "rope_freqs.weight", factors.shape, Kind.F32, lambda: factors


def _kind(name: str, weight: torch.Tensor, precision: Precision) -> Kind:
    if weight.dim() == 1:
        return Kind.F32  # llama.cpp has norms and biases in nothing else
    if precision == "q8_0":
        uneven = weight.shape[-1] % gguf.GGML_QUANT_SIZES[Kind.Q8_0][0]
        return Kind.F16 if uneven or any(f".{part}." in name for part in _SENSITIVE) else Kind.Q8_0
    return _KINDS[precision]


def _maker(weight: torch.Tensor, heads: int | None, added: float) -> Callable[[], NDArray[np.float32]]:
    def make() -> NDArray[np.float32]:
        array: NDArray[np.float32] = weight.detach().float().cpu().numpy()
        if added:
            array = array + np.float32(added)
        if heads is not None:
            # llama.cpp turns neighbours in a head of llama, transformers turns halves.
            parts = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
            array = parts.swapaxes(1, 2).reshape(array.shape)
        return np.ascontiguousarray(array)

    return make


def _rope_factors(decoder: Any) -> NDArray[np.float32] | None:
    """What rotary frequencies are divided by, where they are scaled."""
    rope = _rope(decoder.config)
    if rope.get("rope_type", "default") == "default":
        return None
    width = _head_width(decoder.config)
    plain = rope["rope_theta"] ** -(np.arange(0, width, 2, dtype=np.float64) / width)
    factors: NDArray[np.float32] = (plain / decoder.rotary_emb.inv_freq.double().cpu().numpy()).astype(np.float32)
    return factors


def _encoded(name: str, array: NDArray[np.float32], kind: Kind) -> NDArray[Any]:
    if kind == Kind.F16 and np.abs(array).max() > np.finfo(np.float16).max:
        raise PromptEmbedderError(f"weight {name} is too large for float16; export in float32")
    encoded: NDArray[Any] = gguf.quants.quantize(array, kind)
    return encoded


def reader(folder: Path, name: str) -> Callable[[Sequence[str]], NDArray[np.float32]]:
    """Open a written file with llama.cpp.

    Args:
        folder: as in `write`.
        name: of the instruction.

    Returns:
        Texts, each within the limit, to embeddings (N, E).

    Raises:
        MissingExtraError: xllamacpp is not installed.
    """
    with needs_extra("gguf", "comparing a GGUF file with the model"):
        import xllamacpp
    facts = json.loads((folder / WORDS_FILE).read_text(encoding="utf-8"))
    around = facts["instructions"][name]
    prefix, suffix = around["prefix"], around["suffix"]

    def embed(texts: Sequence[str]) -> NDArray[np.float32]:
        plain = [composed(text) for text in texts]
        # Room for these texts: that for the longest possible takes gigabytes. No token is less than a byte.
        longest = min(facts["max_text_tokens"], max((len(text.encode()) for text in plain), default=0))
        # A word in `prefix` and `suffix` is a token.
        tokens = longest + (prefix + suffix).count("<|pe:")
        server = xllamacpp.Server(_parameters(xllamacpp, folder / MODEL_FILE, tokens))
        found = []
        for text in plain:
            answer = server.handle_embeddings({"input": prefix + text + suffix})
            if "data" not in answer:
                raise PromptEmbedderError(f"llama.cpp: {answer}")
            found.append(answer["data"][0]["embedding"])
        return np.array(found, dtype=np.float32)

    return embed


def _parameters(xllamacpp: Any, file: Path, tokens: int) -> Any:
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(file)
    parameters.embedding = True
    parameters.n_parallel = 1
    parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = -(-tokens // 256) * 256
    parameters.n_gpu_layers = 0
    # Its threads wait for each other actively: more than the user allows are slower by far.
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = torch.get_num_threads()
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    parameters.cache_prompt, parameters.cache_ram_mib = False, 0  # no text continues another
    parameters.warmup = False
    parameters.verbosity = -1
    return parameters
