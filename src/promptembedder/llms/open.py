"""Open a located LLM: check its config, freeze its weights, open its tokenizer."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from promptembedder.errors import PromptEmbedderError
from promptembedder.llms.convert import cache_dir
from promptembedder.llms.locate import LocatedModel
from promptembedder.llms.quiet import quiet_transformers
from promptembedder.llms.states import CACHE_ARGUMENT
from promptembedder.paths import check_readable, closed_file


def load_config(located: LocatedModel) -> Any:
    """Read a base LLM's config and refuse architectures that cannot be a prompter or backbone.

    Raises:
        PromptEmbedderError: not a causal decoder that takes `inputs_embeds`, `position_ids` and states
            to continue from.
    """
    with _opening(located, "config"):
        config = AutoConfig.from_pretrained(located.folder, trust_remote_code=False)
    where = f"{located.name} ({config.model_type})"
    try:
        model_class = AutoModelForCausalLM._model_mapping[type(config)]
    except KeyError:
        raise PromptEmbedderError(f"base model {where} is not a causal language model") from None
    encoder = getattr(config, "is_encoder_decoder", False) or not getattr(config, "is_decoder", True)
    if encoder or getattr(config, "use_bidirectional_attention", False):
        raise PromptEmbedderError(
            f"base model {where} is not a causal decoder; llama, qwen, gemma, mistral styles work"
        )
    taken = inspect.signature(model_class.forward).parameters
    missing = [n for n in ("inputs_embeds", "position_ids", CACHE_ARGUMENT) if n not in taken]
    if missing:
        raise PromptEmbedderError(f"base model {where} is not supported: its forward takes no {', '.join(missing)}")
    # A multimodal LLM keeps the types of its layers in its text config.
    if kinds := _other_than_attention(config) or _other_than_attention(config.get_text_config(decoder=True)):
        raise PromptEmbedderError(
            f"base model {where} is not supported: {kinds}; llama, qwen, gemma 3, mistral styles work"
        )
    return config


def _other_than_attention(config: Any) -> str:
    """Why an LLM's layers do not work with soft tokens; empty if they do."""
    if getattr(config, "hidden_size_per_layer_input", None):
        return "its layers read token ids, which soft tokens have none of"
    unknown = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if unknown or hasattr(config, "mamba_d_state"):
        return f"its layers are not all attention ({', '.join(sorted(unknown)) or 'mamba'})"
    return ""


def load_causal_lm(located: LocatedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Open a base LLM in eval mode with every parameter frozen.

    Raises:
        PromptEmbedderError: see `load_config`.
    """
    load_config(located)
    for weights in located.folder.glob("*.safetensors"):
        check_readable(weights)
    with quiet_transformers(), _opening(located, "weights"):
        lm = AutoModelForCausalLM.from_pretrained(located.folder, dtype=dtype, trust_remote_code=False)
    lm.eval()
    lm.requires_grad_(False)
    return lm  # type: ignore[no-any-return]


def load_tokenizer(located: LocatedModel) -> PreTrainedTokenizerBase:
    """Open a base LLM's tokenizer; a missing pad token becomes the end-of-text token (it is masked anyway)."""
    with quiet_transformers(), _opening(located, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(located.folder, trust_remote_code=False)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer  # type: ignore[no-any-return]


def input_embeddings(lm: PreTrainedModel) -> tuple[torch.Tensor, float]:
    """The token-embedding matrix (V, width) and the factor the model multiplies it with (gemma: sqrt(width))."""
    module = lm.get_input_embeddings()
    scale = getattr(module, "embed_scale", 1.0)
    return module.weight, float(scale)


@contextmanager
def _opening(located: LocatedModel, part: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        closed = closed_file(located.folder)
        remedy = "" if closed else _remedy(located, error)
        raise PromptEmbedderError(
            f"base model {located.name}: {part} cannot be opened: {closed or first}{remedy}"
        ) from error


def _remedy(located: LocatedModel, error: Exception) -> str:
    """What to do about a copy that this package or the hub's library made, and that may be damaged."""
    if not isinstance(error, (OSError, SafetensorError, json.JSONDecodeError)):
        return ""
    if located.folder.resolve().is_relative_to(cache_dir().resolve()):
        return f"; its converted copy may be damaged: remove {located.folder}, and it is converted again"
    if located.revision is not None:
        return f"; its copy may be damaged: remove {located.folder}, and it is fetched again"
    return ""
