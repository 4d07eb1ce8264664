"""GGUF files, de-quantised once into a folder of safetensors in the user's cache."""

from __future__ import annotations

import io
import os
import shutil
import struct
import tempfile
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from platformdirs import user_cache_dir
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.quantization_config import GgufConfig

from promptembedder import atomic
from promptembedder.digest import sha256_of
from promptembedder.errors import PromptEmbedderError
from promptembedder.llms.quiet import quiet_transformers
from promptembedder.paths import check_readable, expanded, is_there
from promptembedder.progress import say

CACHE_ENV = "PROMPTEMBEDDER_CACHE"
# Part of every cache key: raise it when a conversion changes what it writes.
CONVERSION_VERSION = 1


def cache_dir() -> Path:
    """The folder of converted models: `$PROMPTEMBEDDER_CACHE`, or the user's cache directory."""
    return expanded(os.environ.get(CACHE_ENV) or user_cache_dir("promptembedder"))


def converted(key: str, sha256: str, parts: list[Path]) -> Path:
    """The safetensors folder of a GGUF file, made on first use; atomic and safe when two processes ask at once."""
    target = cache_dir() / f"{key}-v{CONVERSION_VERSION}"
    atomic.clear_abandoned(target.parent)
    if is_there(target / "config.json"):
        return target
    for part in parts:
        check_readable(part)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=target.parent).close()
        with FileLock(f"{target}.lock"):
            if not is_there(target / "config.json"):
                say(f"converting {key.rpartition('-')[0]} from GGUF, once")
                with atomic.scratch(target.parent) as scratch, atomic.replacing_folder(target) as output:
                    _join(parts, scratch / "model.gguf", sha256)
                    _convert_gguf(scratch / "model.gguf", output, ", ".join(map(str, parts)))
    except (OSError, SafetensorError) as error:  # the second where weights do not fit on the disk
        reason = getattr(error, "strerror", None) or error
        raise PromptEmbedderError(
            f"cache folder {target.parent} cannot be written: {reason}; set {CACHE_ENV} to another"
        ) from error
    return target


def _join(parts: list[Path], output: Path, sha256: str) -> None:
    with output.open("wb") as sink:
        for part in parts:
            with part.open("rb") as source:
                shutil.copyfileobj(source, sink, 1 << 24)
    found = sha256_of([output])
    if found != sha256:
        raise PromptEmbedderError(
            f"{', '.join(p.name for p in parts)}: sha256 is {found}, expected {sha256}; reinstall"
        )


def _convert_gguf(gguf: Path, output: Path, given: str) -> None:
    """De-quantise a GGUF file into a bfloat16 safetensors folder that `from_pretrained` opens as any other.

    Errors name what the user gave (`given`), not the scratch file.
    """
    options: dict[str, Any] = {"gguf_file": gguf.name, "trust_remote_code": False}
    # The bar of the conversion goes past transformers' own switch.
    with quiet_transformers(), redirect_stderr(io.StringIO()):
        try:
            lm = AutoModelForCausalLM.from_pretrained(
                gguf.parent,
                dtype=torch.bfloat16,
                quantization_config=GgufConfig(gguf_file=gguf.name, dequantize=True),
                **options,
            )
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **options)
        except (ValueError, KeyError, OSError, RuntimeError, struct.error) as error:
            reason = str(error).replace(str(gguf), "the file").replace(gguf.name, "the file")
            raise PromptEmbedderError(f"{given} cannot be read as a GGUF language model: {reason}") from error
        # The model is dense now; with these marks left, save_pretrained takes it for a quantised one.
        for name in ("hf_quantizer", "is_quantized", "quantization_method"):
            if hasattr(lm, name):
                setattr(lm, name, None)
        if hasattr(lm.config, "quantization_config"):
            del lm.config.quantization_config
        lm.save_pretrained(output)
        tokenizer.save_pretrained(output)
