"""What `SentenceTransformer(folder, ...)` hands to a module's `load`: taken, or refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from promptembedder.errors import PromptEmbedderError

_DTYPES = ("bfloat16", "float32")
_ADVICE = {
    "processor_kwargs": "model.max_seq_length sets how much of a text is read",
    "config_kwargs": "the settings of a model are saved with it",
}


def dtype_name(dtype: Any) -> str | None:
    """Name of a precision given by its name or as torch's; None where the saved one is to stay.

    Raises:
        PromptEmbedderError: none that the LLMs run in.
    """
    if dtype is None:
        return None
    name = str(dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise PromptEmbedderError(f"dtype {name!r} is unknown, expected 'bfloat16' or 'float32'")
    return name


def taken_dtype(handed: Mapping[str, Any]) -> str | None:
    """The precision among the arguments that sentence-transformers hands over; all others must be at their defaults.

    Args:
        handed: `backend`, `model_kwargs`, `processor_kwargs`, `config_kwargs`, `trust_remote_code`. The last one
            changes nothing: no code of a model is run.

    Raises:
        PromptEmbedderError: an argument that has no effect here, or one that is unknown.
    """
    backend = handed.get("backend", "torch")
    if backend != "torch":
        raise PromptEmbedderError(f"backend {backend!r} is not supported, expected 'torch'")
    for name, advice in _ADVICE.items():
        if given := handed.get(name):
            raise PromptEmbedderError(f"{name} are not taken, found {sorted(map(str, given))}; {advice}")
    known = {"backend", "model_kwargs", "trust_remote_code", *_ADVICE}
    if unknown := sorted(handed.keys() - known):
        raise PromptEmbedderError(f"unknown arguments {unknown}; valid: {', '.join(sorted(known))}")
    options = dict(handed.get("model_kwargs") or {})
    # "auto" is the checkpoint's own.
    dtypes = {dtype_name(None if given == "auto" else given) for given in _popped(options, "dtype", "torch_dtype")}
    if options:
        raise PromptEmbedderError(f"model_kwargs {sorted(map(str, options))} are not taken; valid: dtype, torch_dtype")
    if len(dtypes) > 1:
        raise PromptEmbedderError("model_kwargs hold two different dtypes; leave torch_dtype out")
    return dtypes.pop() if dtypes else None


def _popped(options: dict[str, Any], *names: str) -> list[Any]:
    return [options.pop(name) for name in names if name in options]
