"""Format `soft-prompt`: kilobytes that `promptembedder.load` opens over the backbone alone, deep soft prompts too.

Shapes: N instructions, R rows of a soft prompt, D backbone width, E embedding width.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize

from promptembedder import atomic
from promptembedder.errors import PromptEmbedderError
from promptembedder.export.compiled import DOCUMENT, Compiled
from promptembedder.model.encode import encode
from promptembedder.model.folder import (
    CONFIG_FILE,
    INSTRUCTIONS,
    LIBRARY_FILE,
    SOFT_PROMPTS_FILE,
    read_json,
    read_saved,
)
from promptembedder.model.known import KnownInstructions, SoftPromptTable
from promptembedder.model.module import SoftPromptTransformer, soft_prompt_module
from promptembedder.model.store import card_of, card_of_export, load

HOLDS_DEEP = True


def refuse(compiled: Compiled) -> None:
    """Nothing is refused."""


def compiled_model(compiled: Compiled, model: SentenceTransformer) -> SentenceTransformer:
    """A model that holds compiled instructions in place of its prompter; it shares the backbone with `model`."""
    module = soft_prompt_module(model)
    named = {name: prompt.instruction for name, prompt in compiled.prompts.items()}
    first = next(iter(named))
    settings = replace(
        module.settings,
        num_soft_tokens=compiled.num_soft_tokens,
        deep_rank=module.settings.deep_rank if compiled.is_deep else None,
        max_text_tokens=compiled.max_text_tokens,
        default_instruction=named[first],
        document_instruction=named[DOCUMENT],
    )
    table = SoftPromptTable(torch.stack([prompt.rows for prompt in compiled.prompts.values()]))
    inner = SoftPromptTransformer(
        KnownInstructions(named), table, compiled.backbone_in(model), model.tokenizer, settings, module.base_models
    )
    inner.subtract(compiled.centre_D)
    modules: list[torch.nn.Module] = [inner]
    if compiled.head_ED is not None:
        E, D = compiled.head_ED.shape
        modules.append(Dense(D, E, bias=False, activation_function=None, init_weight=compiled.head_ED))
    return SentenceTransformer(
        modules=[*modules, Normalize()],
        device=str(model.device),
        prompts={"query": named[first]} | named,
        default_prompt_name=first,
        similarity_fn_name=model.similarity_fn_name,
        truncate_dim=model.truncate_dim,
    )


def write(compiled: Compiled, model: SentenceTransformer, folder: Path) -> None:
    """Write an export into an empty folder: soft prompts, head and settings, and no weight of an LLM."""
    exported = compiled_model(compiled, model)
    exported.save_pretrained(str(folder), create_model_card=False)
    (folder / "README.md").write_text(card_of(exported), encoding="utf-8")


def add(compiled: Compiled, model: SentenceTransformer, folder: Path) -> None:
    """Put further instructions into an export; those it holds stay as they are.

    Args:
        compiled: the new instructions, `document` among them, which is left out.
        model: the export's.
        folder: of the export.

    Raises:
        PromptEmbedderError: soft prompts of another shape than those in the folder.
    """
    held = load_file(folder / SOFT_PROMPTS_FILE)
    new = {name: prompt for name, prompt in compiled.prompts.items() if name != DOCUMENT}
    rows_NRD = torch.stack([prompt.rows for prompt in new.values()])
    if rows_NRD.shape[1:] != held["weight"].shape[1:]:
        raise PromptEmbedderError(
            f"{folder} holds soft prompts of shape {tuple(held['weight'].shape[1:])}, the new ones have "
            f"{tuple(rows_NRD.shape[1:])}; export all instructions again"
        )
    held["weight"] = torch.cat([held["weight"], rows_NRD])
    with tempfile.TemporaryDirectory(dir=folder) as place:
        # Written beside, and not over, the file: in a scratch copy that is linked to the export it is the export's.
        save_file(held, Path(place) / SOFT_PROMPTS_FILE)
        (Path(place) / SOFT_PROMPTS_FILE).replace(folder / SOFT_PROMPTS_FILE)
    words = {name: prompt.instruction for name, prompt in new.items()}
    for file, key in ((CONFIG_FILE, INSTRUCTIONS), (LIBRARY_FILE, "prompts")):
        saved = read_json(folder / file)
        saved[key] |= words
        atomic.write_json(folder / file, saved)
    found = read_saved(folder)
    card = card_of_export(found.instructions or {}, found.base_models.backbone, found.embedding_dimension)
    atomic.write_text(folder / "README.md", card)


def reader(folder: Path, name: str, device: str | None = None) -> Callable[[Sequence[str]], NDArray[np.float32]]:
    """What embeds texts under an instruction of an export, opened from its folder: (N, E) float32 of N texts."""
    model = load(folder, device=device)
    return lambda texts: encode(model, texts, name)
