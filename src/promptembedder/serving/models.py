"""The models of a server: opened, named, and known by digests."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from promptembedder.errors import PromptEmbedderError
from promptembedder.export.compiled import DOCUMENT, compile_model
from promptembedder.model.instructions import instruction_for
from promptembedder.model.known import KnownInstructions
from promptembedder.model.module import SoftPromptTransformer, soft_prompt_module
from promptembedder.model.named import check_named
from promptembedder.paths import expanded
from promptembedder.serving.errors import RequestError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

# Names that are listed where a model is unknown.
_LISTED = 20
_QUERY = ""


@dataclass(eq=False)
class Served:
    """A model that is served.

    Attributes:
        name: that clients call it by.
        model: that is served.
        own: its instructions by name; `document` is there, and the default one under the empty name.
        digests: of its embeddings under each of these; unset where the model cannot be compiled.
        created: seconds since 1970.
    """

    name: str
    model: SentenceTransformer
    own: Mapping[str, str]
    digests: Mapping[str, str | None]
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def module(self) -> SoftPromptTransformer:
        """The model's first module."""
        return soft_prompt_module(self.model)

    @property
    def width(self) -> int:
        """Of an embedding."""
        return self.model.get_embedding_dimension() or self.module.get_embedding_dimension()


def served(name: str, model: SentenceTransformer, named: Mapping[str, str]) -> Served:
    """A model under some instructions.

    Args:
        name: that clients call it by.
        model: made by `build` or `load`.
        named: instructions by name; an export's own are added.

    Raises:
        PromptEmbedderError: a name or an instruction cannot be used, or is not held by an export.
    """
    check_named(named)
    module, default = soft_prompt_module(model), instruction_for(model)
    held: Mapping[str, str] = module.prompter.named if isinstance(module.prompter, KnownInstructions) else {}
    own = {**held, **named, DOCUMENT: instruction_for(model, None, document=True)}
    if named.get(DOCUMENT, own[DOCUMENT]) != own[DOCUMENT]:
        raise PromptEmbedderError(f"the name {DOCUMENT!r} stands for the model's document instruction")
    for instruction in (default, *own.values()):
        module.check_instruction(instruction)
    model.eval()
    return Served(name, model, {_QUERY: default, **own}, _digests(model, {_QUERY: default, **own}))


def _digests(model: SentenceTransformer, own: Mapping[str, str]) -> dict[str, str | None]:
    try:
        compiled = compile_model(model, {name or "query": text for name, text in own.items()})
    except PromptEmbedderError:  # such as a module that no export can hold
        return dict.fromkeys(own)
    return {name: compiled.digest(name or "query") for name in own}


def open_models(
    paths: Sequence[str | Path],
    named: Mapping[str, str],
    *,
    device: str | None = None,
    dtype: str | None = None,
) -> list[Served]:
    """Models of folders, names or hub ids; weights that several of them have are held once.

    Args:
        paths: as for `load`. A folder is named by its last part.
        named: instructions by name, for all models.
        device: where they run; unset: the accelerator, if there is one.
        dtype: as in `load`.

    Raises:
        PromptEmbedderError: as in `load` and `served`; two models of one name.
    """
    from promptembedder.model.store import load

    check_named(named)
    places: dict[str, str | Path] = {}
    for path in paths:
        name = expanded(Path(path)).resolve().name if expanded(Path(path)).exists() else str(path)
        if name in places:
            raise PromptEmbedderError(f"two models are named {name!r}: {places[name]} and {path}; rename a folder")
        places[name] = path
    found: list[Served] = []
    for name, path in places.items():
        model = load(path, device=device, dtype=dtype)
        share_weights([one.model for one in found], model)
        found.append(served(name, model, named))
    return found


def share_weights(others: Iterable[torch.nn.Module], model: torch.nn.Module) -> int:
    """Let a model hold frozen weights in the memory of other models where these have the same; bytes saved."""
    held = {_key(tensor): tensor for other in others for tensor in other.parameters() if not tensor.requires_grad}
    saved = 0
    for parameter in model.parameters():
        other = held.get(_key(parameter)) if held and not parameter.requires_grad else None
        if other is not None and other.data_ptr() != parameter.data_ptr() and torch.equal(other, parameter):
            saved += parameter.nbytes
            parameter.data = other.data
    return saved


def _key(tensor: torch.Tensor) -> tuple[object, ...]:
    values = tensor.detach().reshape(-1)
    few = values[:: max(1, values.numel() // 8)][:8].float().tolist()
    return (tuple(tensor.shape), tensor.dtype, tensor.device, *few)


class Catalogue:
    """Names that clients use, and what they stand for.

    Args:
        models: at least one.
    """

    def __init__(self, models: Sequence[Served]) -> None:
        self.models = models
        self.names = {f"{one.name}:{alias}" if alias else one.name: (one, alias) for one in models for alias in one.own}

    def find(self, name: str) -> tuple[Served, str]:
        """Model and short name of the instruction, empty for the default.

        Raises:
            RequestError: there is no such name.
        """
        if name not in self.names:
            valid = ", ".join(list(self.names)[:_LISTED])
            raise RequestError(
                404, f"model {name[:100]!r} is unknown, expected one of: {valid}", "model_not_found", "model"
            )
        return self.names[name]

    def resolve(
        self, name: str, instruction: str | Sequence[str] | None, input_type: str | None
    ) -> tuple[Served, list[str]]:
        """The model, and the instructions to embed under.

        Raises:
            RequestError: an unknown name, or fields that contradict each other.
        """
        model, alias = self.find(name)
        if instruction is not None:
            if alias:
                raise RequestError(
                    400, f"model {name!r} has an instruction of its own; use {model.name!r}", "conflict", "instruction"
                )
            if input_type == "document":
                raise RequestError(
                    400,
                    "input_type 'document' stands for an instruction; leave one of the two out",
                    "conflict",
                    "input_type",
                )
            return model, [instruction] if isinstance(instruction, str) else list(instruction)
        if alias and input_type is not None and input_type != alias:
            raise RequestError(
                400, f"model {name!r} has an instruction of its own; leave input_type out", "conflict", "input_type"
            )
        return model, [model.own[DOCUMENT if input_type == "document" else alias]]

    def describe(self, name: str) -> dict[str, object]:
        """What /v1/models says of a name; errors as in `find`."""
        model, alias = self.find(name)
        return {
            "id": name,
            "object": "model",
            "created": model.created,
            "owned_by": "promptembedder",
            "instruction": model.own[alias],
            "digest": model.digests[alias],
            "dimensions": model.width,
            "max_text_tokens": model.module.settings.max_text_tokens,
        }
