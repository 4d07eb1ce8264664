"""Models as a user holds them: `load` and `save` one."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Module
from sentence_transformers.util import import_from_string

from promptembedder import atomic
from promptembedder.digest import sha256_of
from promptembedder.errors import PromptEmbedderError
from promptembedder.model.folder import (
    CONFIG_FILE,
    PROMPTER_FOLDER,
    PROMPTER_WEIGHTS,
    SHARED_PROMPTER,
    folder_of,
    library_settings,
    own_files,
    prompter_owner,
    read_json,
)
from promptembedder.model.instructions import instruction_for
from promptembedder.model.known import KnownInstructions
from promptembedder.model.module import SoftPromptTransformer, soft_prompt_module
from promptembedder.model.prompter import trained_state
from promptembedder.paths import check_readable, closed_file, expanded


def load(
    path: str | Path,
    *,
    device: str | None = None,
    dtype: str | None = None,
    prompter: str | None = None,
    backbone: str | None = None,
    revision: str | None = None,
) -> SentenceTransformer:
    """Open a saved model with its path alone; no remote code, no pickle.

    Args:
        path: folder written by `save` or `SentenceTransformer.save_pretrained`; the name of a model that comes with
            the package, such as `smollm2-135m`; the hub id of one that `model.push_to_hub` put there.
        device: where it runs; unset: the accelerator, if there is one.
        dtype: `bfloat16` or `float32` to run the LLMs in another precision than saved.
        prompter: where the Prompting LLM is now, if it is no longer where it was: a folder, GGUF file or hub id. Its
            weights must be the same. Where one LLM is both, `backbone` is enough.
        backbone: where the Embedding LLM is now, likewise.
        revision: branch, tag or commit of a model from the hub; unset: its main branch.

    Raises:
        PromptEmbedderError: a file is missing or damaged, the format is newer than this version reads, or a base
            LLM is not the one the model was trained with.
    """
    folder = folder_of(path, revision)
    saved = library_settings(folder)
    first, *later = _listed_modules(folder)
    after = _library_modules(folder, later)  # before the LLMs, which take longer to open
    module = SoftPromptTransformer.load(
        str(folder), subfolder=first[1], device=device, dtype=dtype, prompter=prompter, backbone=backbone
    )
    with _whole(folder):
        return SentenceTransformer(
            modules=[module, *after],
            device=device,
            prompts=saved.get("prompts"),
            default_prompt_name=saved.get("default_prompt_name"),
            similarity_fn_name=saved.get("similarity_fn_name"),
            truncate_dim=saved.get("truncate_dim"),
        )


def restore(model: SentenceTransformer, path: str | Path) -> None:
    """Put the trained weights of a saved model into an open one of the same structure; no LLM is opened.

    Args:
        model: made by `build` or `load`; its LLMs are left alone.
        path: folder written by `save` or by a trainer as a checkpoint.

    Raises:
        PromptEmbedderError: a file is missing or damaged, or weights have other shapes.
    """
    folder = expanded(path)
    soft_prompt_module(model).restore(folder)
    later = _library_modules(folder, _listed_modules(folder)[1:])
    with _whole(folder, RuntimeError):
        for module, saved in zip(list(model)[1:], later, strict=True):
            module.load_state_dict(saved.state_dict())


def save(
    model: SentenceTransformer,
    path: str | Path,
    *,
    card: str | None = None,
    share_prompter: str | Path | None = None,
) -> None:
    """Write a model to a folder; whenever the process is killed, the folder holds the former model or the new one.

    Args:
        model: made by `build` or `load`.
        path: the folder. An older model there is replaced; files in it that no model has, such as `.git`, stay.
        card: Markdown for its README; unset: a short one.
        share_prompter: folder of a saved model with the same trained prompter. Its weights are then not written again;
            the new folder points to them by relative path and sha256, and opens only while they are there.

    Raises:
        PromptEmbedderError: the folder cannot be written, or holds something that is not a model; the prompter to share
            is another one.
    """
    target = expanded(path)
    refuse_foreign(target)
    target = Path(os.path.realpath(target))
    lender = None if share_prompter is None else lender_of(model, share_prompter, target)
    owned = own_files(target)
    try:
        with atomic.replacing_folder(target, lambda file: file in owned) as scratch:
            model.save_pretrained(str(scratch), create_model_card=False)
            (scratch / "README.md").write_text(card or card_of(model), encoding="utf-8")
            if lender is not None:
                _share_prompter(scratch, lender, target)
    except (OSError, SafetensorError) as error:  # the second where weights do not fit on the disk
        reason = getattr(error, "strerror", None) or error
        raise PromptEmbedderError(f"cannot write a model to {target}: {reason}") from error


def lender_of(model: SentenceTransformer, share_prompter: str | Path, target: Path) -> Path:
    """The folder whose prompter weights a model may share when it is saved to `target`.

    Raises:
        PromptEmbedderError: there are no weights to share, they are `target`'s own, or another prompter's.
    """
    lender = prompter_owner(share_prompter)
    if lender == target.resolve():
        raise PromptEmbedderError(f"{target} cannot share its prompter with itself")
    # By value: the lender may keep its weights in half precision.
    check_readable(_weights_in(lender))
    own, theirs = trained_state(soft_prompt_module(model).prompter), load_file(_weights_in(lender))
    if own.keys() != theirs.keys() or not all(torch.equal(own[n].float(), theirs[n].float()) for n in own):
        raise PromptEmbedderError(f"the prompter of {lender} is another one than the model's; it cannot be shared")
    return lender


def _weights_in(folder: Path) -> Path:
    return folder / PROMPTER_FOLDER / PROMPTER_WEIGHTS


def _share_prompter(written: Path, lender: Path, target: Path) -> None:
    """Replace the prompter weights just written by a pointer to another model's."""
    digest = sha256_of([_weights_in(lender)])
    shutil.rmtree(written / PROMPTER_FOLDER)
    saved = read_json(written / CONFIG_FILE)
    saved[SHARED_PROMPTER] = {"folder": os.path.relpath(lender, target), "sha256": digest}
    (written / CONFIG_FILE).write_text(json.dumps(saved, indent=2) + "\n", encoding="utf-8")


def refuse_foreign(target: Path) -> None:
    """Refuse to write a model over anything but a model or an empty folder.

    Raises:
        PromptEmbedderError: something else is there.
    """
    if target.exists() and not (target / CONFIG_FILE).is_file() and (not target.is_dir() or any(target.iterdir())):
        raise PromptEmbedderError(f"{target} exists and is not a saved model; choose another folder")


def _listed_modules(folder: Path) -> list[tuple[str, str]]:
    """Class and subfolder of each module, ours first."""
    listed = read_json(folder / "modules.json")
    try:
        entries = [(str(entry["type"]), str(entry["path"])) for entry in listed]
    except (TypeError, KeyError):
        raise PromptEmbedderError(f"{folder / 'modules.json'} must list modules with 'type' and 'path'") from None
    if not entries or not entries[0][0].startswith("promptembedder."):
        raise PromptEmbedderError(f"{folder / 'modules.json'} must begin with a module of promptembedder")
    for kind, _ in entries[1:]:
        if not kind.startswith("sentence_transformers."):
            raise PromptEmbedderError(f"{folder / 'modules.json'}: module {kind} is not from a known library")
    return entries


def _library_modules(folder: Path, entries: Sequence[tuple[str, str]]) -> list[Module]:
    """What follows our module, opened by sentence-transformers."""
    for _, place in entries:
        for weights in (folder / place).glob("*.safetensors"):
            check_readable(weights)
    with _whole(folder, ImportError, RuntimeError):  # a class that is not there, weights of another shape
        return [import_from_string(kind).load(str(folder), subfolder=place) for kind, place in entries]


@contextmanager
def _whole(folder: Path, *more: type[Exception]) -> Iterator[None]:
    """What the library says of missing and damaged files, as one line; `more`: kinds of errors that mean the same."""
    damaged: tuple[type[Exception], ...] = (AttributeError, KeyError, OSError, SafetensorError, TypeError, ValueError)
    try:
        yield
    except damaged + more as error:
        if (closed := closed_file(folder)) is not None:
            raise PromptEmbedderError(closed) from error
        reason = " ".join(str(error).split())[:200]
        raise PromptEmbedderError(f"model folder {folder} is damaged: {type(error).__name__}: {reason}") from error


def card_of(model: SentenceTransformer) -> str:
    """Markdown that says what a model is and how to use it."""
    module = soft_prompt_module(model)
    bases, settings = module.base_models, module.settings
    if isinstance(module.prompter, KnownInstructions):
        return card_of_export(module.prompter.named, bases.backbone, module.get_embedding_dimension())
    return f"""---
library_name: sentence-transformers
tags: [sentence-transformers, promptembedder, soft-prompts]
---
# Soft-prompt embedder

This model embeds texts under an instruction.
The Prompting LLM `{bases.prompter}` reads the instruction and writes soft tokens ({settings.num_soft_tokens}).
The frozen Embedding LLM `{bases.backbone}` reads the text and the soft tokens (layout `{settings.layout}`).
Embeddings have {module.get_embedding_dimension()} dimensions.

```python
import promptembedder

model = promptembedder.load("path/of/this/folder")  # or its id on the hub
embeddings = model.encode(["a text"], prompt={json.dumps(instruction_for(model), ensure_ascii=False)})
```
"""


def card_of_export(named: Mapping[str, str], backbone: str, width: int) -> str:
    """Markdown that says what an export of soft prompts is.

    Args:
        named: its instructions by name.
        backbone: its Embedding LLM.
        width: of its embeddings.
    """
    rows = "\n".join(f"- `{name}`: {' '.join(text.split())}" for name, text in named.items())
    return f"""---
library_name: sentence-transformers
tags: [sentence-transformers, promptembedder, soft-prompts]
---
# Soft prompts of an embedder

This folder holds the soft prompts of these instructions, and no weights of an LLM:

{rows}

The frozen Embedding LLM `{backbone}` reads the text and the soft prompt.
The Prompting LLM that wrote the soft prompts is not needed.
Embeddings have {width} dimensions.

```python
import promptembedder

model = promptembedder.load("path/of/this/folder")
embeddings = model.encode(["a text"], prompt_name={json.dumps(next(iter(named)))})
documents = model.encode_document(["a document"])
```

`prompt=` takes the words of an instruction or its name.
Another instruction is refused.
"""
