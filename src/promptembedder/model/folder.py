"""What a saved model's folder holds, read without opening an LLM."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from promptembedder.config import parse
from promptembedder.digest import sha256_of
from promptembedder.errors import PromptEmbedderError, shown
from promptembedder.llms.hub import AS_CONFIGURED, HubAccess, fetched, quiet_hub
from promptembedder.model.prompts import own_instruction
from promptembedder.model.settings import ModelConfig
from promptembedder.paths import expanded, is_there, unreadable
from promptembedder.text import is_blank

FORMAT_VERSION = 2
# Of a folder with soft prompts in place of prompter and alignment, which older versions do not read.
KNOWN_VERSION = 3
# What a run or transfer began with, in its folder.
BEGUN_FILE = "begun.yaml"
CONFIG_FILE = "promptembedder.json"
# What sentence-transformers keeps of a model.
LIBRARY_FILE = "config_sentence_transformers.json"
ALIGNMENT_FILE = "alignment.safetensors"
SOFT_PROMPTS_FILE = "soft_prompts.safetensors"
# Beside the alignment's matrices: what is subtracted from embeddings.
CENTRE = "centre"
PROMPTER_FOLDER = "prompter"
PROMPTER_WEIGHTS = "adapter_model.safetensors"
# In the settings file: another saved model that holds the prompter's weights.
SHARED_PROMPTER = "shared_prompter"
_OWN_FILES = (
    *(CONFIG_FILE, ALIGNMENT_FILE, "modules.json", "config_sentence_transformers.json", "README.md"),
    *("config.yaml", "training.json"),  # of the run that made the model
)
_OWN_FILES_OF_A_MODULE = ("config.json", "model.safetensors", "adapter_config.json", PROMPTER_WEIGHTS)
# In the settings file of an export: its instructions by name, in the order of their soft prompts.
INSTRUCTIONS = "instructions"
# In the settings file: tokens near the first soft tokens of most instructions.
DRAFT = "draft"


@dataclass(frozen=True)
class BaseModels:
    """Identity of the two LLMs under a model: what to open, and what it must turn out to be."""

    prompter: str
    prompter_revision: str | None
    prompter_fingerprint: str
    backbone: str
    backbone_revision: str | None
    backbone_fingerprint: str


PLACE = Path(__file__).parents[1] / "models"


def shipped_names() -> list[str]:
    """Names that `load` and the commands take in place of a folder."""
    return sorted(settings.parent.name for settings in PLACE.glob(f"*/{CONFIG_FILE}"))


def shipped_folder(model: str | Path) -> Path:
    """The folder of a saved model, given as that folder or as the name of one that comes with the package.

    A saved model in a folder of that name goes first. What is neither is given back as it is.
    """
    folder = expanded(model)
    return PLACE / folder if str(folder) in shipped_names() and not (folder / CONFIG_FILE).is_file() else folder


def shipped_hint() -> str:
    """What to add to an error about a model that is not there."""
    return f"; models by name: {', '.join(shipped_names())}" if shipped_names() else ""


def not_a_model(place: Path) -> str | None:
    """What to say of a path given as a saved model which is none, such as the folder of a run; None: it is one."""
    if not os.path.exists(place):
        return f"no model at {place}{shipped_hint()}"
    if not place.is_dir():
        return f"{place} is a file; give the folder of a saved model"
    if (place / CONFIG_FILE).is_file():
        return None
    if inside := models_inside(place):
        return f"{place} is not a saved model, but holds {'one' if len(inside) == 1 else 'some'}: give {inside[0]}"
    if (place / BEGUN_FILE).is_file():
        return f"{place} is the folder of a run that has saved no model yet"
    return f"{place} is not a saved model: it has no {CONFIG_FILE}"


def models_inside(folder: Path) -> list[Path]:
    """Saved models in the folder of a run, or of several runs; the one that a run ends with comes first."""
    signs = (f"model/{CONFIG_FILE}", f"*/model/{CONFIG_FILE}", f"*/{CONFIG_FILE}")
    return list(dict.fromkeys(found.parent for sign in signs for found in sorted(folder.glob(sign))))


def saved_model(hub_id: str, revision: str | None = None, access: HubAccess = AS_CONFIGURED) -> Path | None:
    """A saved model's folder, fetched from the hub: settings and safetensors, no code and no pickle.

    Args:
        hub_id: `owner/name`.
        revision: branch, tag or commit; unset: the main branch.
        access: how the hub is asked.

    Returns:
        None where there is no such model, or it is not one of ours.

    Raises:
        PromptEmbedderError: it is one of ours, and not all of it can be fetched.
    """
    from huggingface_hub import hf_hub_download

    try:
        with quiet_hub():
            hf_hub_download(hub_id, CONFIG_FILE, revision=revision, **access.arguments)
    except Exception:  # as above; whatever it is, there is no model to open
        return None
    return fetched(hub_id, ["*.json", "*.safetensors", "*.md"], revision, access=access)[0]


def folder_of(model: str | Path, revision: str | None = None, access: HubAccess = AS_CONFIGURED) -> Path:
    """The folder of a saved model, given as that, as the name of one of the package, or as a hub id.

    Args:
        model: which.
        revision: of a hub id: branch, tag or commit.
        access: how the hub is asked.

    Raises:
        PromptEmbedderError: it has to come from the hub, and does not.
    """
    folder = shipped_folder(model)
    if not may_be_hub_id(model):
        return folder
    fetched = saved_model(str(model), revision, access)
    if fetched is None:
        raise PromptEmbedderError(
            f"no model at {model}: no such folder, and the hub has none of ours by that id; check the id, your network "
            f"and HF_TOKEN{shipped_hint()}"
        )
    return fetched


def may_be_hub_id(model: str | Path) -> bool:
    """Whether a model's name is one that the hub could know: `owner/name`, which is no folder here, nor beside ours."""
    folder, name = shipped_folder(model), str(model)
    if folder.exists() or folder.is_absolute() or name.count("/") != 1 or name[0] in ".~":
        return False
    signs = (CONFIG_FILE, f"model/{CONFIG_FILE}", BEGUN_FILE)
    return not any(any(folder.parent.glob(f"*/{sign}")) for sign in signs)  # else `runs/mistyped`


def prompter_owner(path: str | Path) -> Path:
    """The folder that holds the prompter weights of a saved model: its own, or the one it shares them with.

    Raises:
        PromptEmbedderError: not a saved model, or one of the package; the weights are not there or altered.
    """
    folder = shipped_folder(path).resolve()
    if folder.is_relative_to(PLACE.resolve()):
        raise PromptEmbedderError(f"{path} comes with the package, which may move; its prompter cannot be shared")
    weights = read_saved(folder).prompter_weights
    if not is_there(weights):
        raise PromptEmbedderError(f"{folder} holds no prompter weights to share")
    return weights.parent.parent


def describe(path: str | Path) -> dict[str, Any]:
    """What a saved model is made of, read from its files alone; no LLM is opened.

    Raises:
        PromptEmbedderError: not a saved model, or a file is missing.
    """
    saved = read_saved(folder_of(path))
    settings, width = saved.config, saved.embedding_dimension
    library = library_settings(saved.folder)
    truncate_dim = library.get("truncate_dim")
    prompts, default_name = library.get("prompts") or {}, library.get("default_prompt_name")
    sizes = [p.stat().st_size for p in map(saved.folder.joinpath, own_files(saved.folder)) if p.is_file()]
    lora = f", rank {settings.lora_rank}" if settings.prompter_training == "lora" else ""
    return {
        "prompter": _origin(saved.base_models, "prompter"),
        "backbone": _origin(saved.base_models, "backbone"),
        "layout": settings.layout,
        "readout": settings.readout,
        "soft_tokens": settings.num_soft_tokens,
        "dimensions": min(width, truncate_dim or width),
        "alignment": f"{saved.prompter_dimension} x {width}",
        "prompter_training": settings.prompter_training + lora,
        "deep_rank": settings.deep_rank,
        "linear_head": settings.linear_head,
        "centred": saved.centred,
        "softmax_temperature": settings.softmax_temperature,
        "text_template": settings.text_template,
        "max_text_tokens": settings.max_text_tokens,
        "default_instruction": own_instruction(settings, prompts, default_name, document=False),
        "document_instruction": own_instruction(settings, prompts, default_name, document=True),
        "dtype": settings.dtype,
        "format_version": saved.format_version,
        "size_mb": round(sum(sizes) / 1e6, 1),
    } | ({} if saved.instructions is None else {"alignment": None, "instructions": saved.instructions})


def _origin(bases: BaseModels, role: str) -> str:
    name, revision = getattr(bases, role), getattr(bases, f"{role}_revision")
    commit = f" @ {revision[:12]}" if revision else ""
    return f"{name}{commit} (fingerprint {getattr(bases, f'{role}_fingerprint')[:12]})"


@dataclass(frozen=True)
class SavedModel:
    """The settings file of a saved model, checked.

    Attributes:
        folder: where the model is.
        format_version: of the file as it lies there.
        config: the model's settings.
        base_models: the two LLMs.
        embedding_dimension: E.
        prompter_dimension: P.
        centred: whether a mean is subtracted from embeddings.
        shared_prompter: `folder` and `sha256` of the prompter weights in another saved model; unset: in this folder.
        instructions: by name, of an export that holds soft prompts in place of a prompter; unset: a whole model.
        draft: token ids from which the prompter begins; unset: it has none.
    """

    folder: Path
    format_version: int
    config: ModelConfig
    base_models: BaseModels
    embedding_dimension: int
    prompter_dimension: int
    centred: bool
    shared_prompter: Any = None
    instructions: dict[str, str] | None = None
    draft: list[int] | None = None

    @property
    def weights_file(self) -> Path:
        """Where the alignment is, or the soft prompts are."""
        return self.folder / (ALIGNMENT_FILE if self.instructions is None else SOFT_PROMPTS_FILE)

    @property
    def prompter_weights(self) -> Path:
        """Where the prompter's trained weights are.

        Raises:
            PromptEmbedderError: they are another model's, which is not there or has been altered.
        """
        pointer = self.shared_prompter
        if pointer is None:
            return self.folder / PROMPTER_FOLDER / PROMPTER_WEIGHTS
        if not isinstance(pointer, dict) or not all(isinstance(pointer.get(key), str) for key in ("folder", "sha256")):
            raise PromptEmbedderError(
                f"{self.folder / CONFIG_FILE}: {SHARED_PROMPTER!r} must hold 'folder' and 'sha256'"
            )
        weights: Path = (self.folder / pointer["folder"]).resolve() / PROMPTER_FOLDER / PROMPTER_WEIGHTS
        if not is_there(weights):
            raise PromptEmbedderError(
                f"{self.folder} shares the prompter of {weights.parent.parent}, which is not there"
            )
        if sha256_of([weights]) != pointer["sha256"]:
            raise PromptEmbedderError(
                f"{self.folder} shares the prompter of {weights.parent.parent}, which has been altered since "
                f"(sha256 is not {pointer['sha256'][:12]})"
            )
        return weights


def read_saved(folder: Path) -> SavedModel:
    """The settings of a saved model, of this format or an older one.

    Raises:
        PromptEmbedderError: not a saved model, of a newer format, or with a setting that this version no longer has.
    """
    where = folder / CONFIG_FILE
    saved = read_json(where)
    if not isinstance(saved, dict):
        raise PromptEmbedderError(f"{where} is not a settings file: expected an object")
    version = saved.get("format_version")
    if not isinstance(version, int) or version > KNOWN_VERSION:
        raise PromptEmbedderError(
            f"{folder}: format version {version!r}, this promptembedder reads up to {KNOWN_VERSION}; upgrade it"
        )
    for name in ("model", "base_models", "embedding_dimension", "prompter_dimension"):
        if not isinstance(saved.get(name), int if name.endswith("dimension") else dict):
            raise PromptEmbedderError(f"{where}: {name!r} is missing or not what it should be")
    instructions = saved.get(INSTRUCTIONS)
    if (version == KNOWN_VERSION) != _are_named(instructions):
        raise PromptEmbedderError(f"{where}: {INSTRUCTIONS!r} is missing or not what it should be")
    draft = saved.get(DRAFT)
    if draft is not None and not (isinstance(draft, list) and all(type(n) is int and n >= 0 for n in draft)):
        raise PromptEmbedderError(f"{where}: {DRAFT!r} must be a list of token ids, found {shown(draft)}")
    model, centred = dict(saved["model"]), saved.get("centred", False)
    if version == 1:
        centred = model.pop("centred", False)
        # Said where W once began; W itself is saved.
        model["alignment_start"] = "random" if model.get("alignment_start") == "random" else "auto"
    return SavedModel(
        folder,
        version,
        parse(ModelConfig, model, where=f"{where}: model"),
        parse(BaseModels, saved["base_models"], where=f"{where}: base_models"),
        saved["embedding_dimension"],
        saved["prompter_dimension"],
        bool(centred),
        saved.get(SHARED_PROMPTER),
        instructions,
        draft,
    )


def _are_named(instructions: Any) -> bool:
    """Whether this is an object of instructions by name."""
    if not isinstance(instructions, dict) or not instructions:
        return False
    return all(isinstance(text, str) and not is_blank(text) for text in instructions.values())


def library_settings(folder: Path) -> dict[str, Any]:
    """What sentence-transformers keeps of a saved model."""
    path = folder / LIBRARY_FILE
    saved = read_json(path)
    if not isinstance(saved, dict):
        raise PromptEmbedderError(f"{path} must hold an object")
    return saved


def own_files(folder: Path) -> set[Path]:
    """Files and folders of a saved model, relative to its folder; whatever else lies there is the user's.

    The name of a file decides, so some of these need not be there.
    """
    own = {Path(name) for name in _OWN_FILES}
    places = [PROMPTER_FOLDER]
    with suppress(OSError, ValueError, TypeError, KeyError):  # a folder without a model, or with a damaged one
        places += [entry["path"] for entry in json.loads((folder / "modules.json").read_text(encoding="utf-8"))]
    for place in map(Path, filter(None, places)):
        own |= {place, *(place / name for name in _OWN_FILES_OF_A_MODULE)}
    return own


def read_json(path: Path) -> Any:
    """Content of a JSON file of a model's folder.

    Raises:
        PromptEmbedderError: the file or the folder is not there or cannot be read, or it is not JSON.
    """
    if (reason := unreadable(path)) is not None:
        if (wrong := not_a_model(path.parent)) is not None:
            raise PromptEmbedderError(wrong)
        if path.exists():
            raise PromptEmbedderError(f"{path} cannot be read: {reason}")
        raise PromptEmbedderError(f"model folder {path.parent} has no {path.name}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise PromptEmbedderError(f"{path} is not JSON: {error}") from error
