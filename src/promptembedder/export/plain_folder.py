"""Format `sentence-transformers`: a plain model folder for each instruction, which engines open without this package.

Soft tokens are words of the backbone's vocabulary, and the tokenizer puts them behind every text. The weights hold
the soft tokens of all instructions: folders differ in their tokenizers alone and share one file of weights.

Shapes: N texts, K soft tokens, D backbone width, E embedding width.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer

from promptembedder.errors import PromptEmbedderError
from promptembedder.export.compiled import Compiled
from promptembedder.export.grown_tokenizer import TEXT, grow
from promptembedder.export.grown_weights import Precision, write_weights
from promptembedder.export.plain_readme import readme
from promptembedder.model.module import soft_prompt_module

PRECISION = "float32"
PRECISIONS = get_args(Precision)
# The older paths of the classes: sentence-transformers 6 opens these too, and other engines know no others.
_CLASSES = "sentence_transformers.models"
_POOLING_MODES = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
# A folder whose clients name the instruction with every text.
ANY_INSTRUCTION = "any-instruction"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def refuse(compiled: Compiled) -> None:
    """Refuse what plain folders cannot hold.

    Raises:
        PromptEmbedderError: a deep soft prompt, read-out `mean`, or a name that is no name of a folder.
    """
    if compiled.is_deep:
        raise PromptEmbedderError(
            "a deep soft prompt is more than words of a vocabulary: fold it (`--texts FILE`), "
            "or export in format soft-prompt"
        )
    if compiled.readout != "last":
        raise PromptEmbedderError(
            f"read-out {compiled.readout!r} cannot be exported as a plain folder: engines pool the last token or all; "
            "export in format soft-prompt"
        )
    for name in compiled.prompts:
        if name == ANY_INSTRUCTION or not _NAME.fullmatch(name):
            raise PromptEmbedderError(
                f"instruction name {name!r} becomes a folder, expected letters, digits, '.', '_' and '-', "
                f"and not {ANY_INSTRUCTION!r}"
            )


def write(
    compiled: Compiled,
    model: SentenceTransformer,
    folder: Path,
    *,
    precision: Precision = "float32",
    copy: bool = False,
) -> None:
    """Write a folder for each instruction, `folder/<name>`, and a README.

    Args:
        compiled: instructions that the model's prompter has read.
        model: has the backbone and its tokenizer.
        folder: exists, and is empty.
        precision: dtype of the weights.
        copy: give each folder weights of its own; by default folders share one file by hard links.

    Raises:
        PromptEmbedderError: as in `refuse`; an unknown precision, one that a weight does not fit into, or a tokenizer
            that cannot grow.
    """
    refuse(compiled)
    if precision not in PRECISIONS:
        raise PromptEmbedderError(f"precision {precision!r} is unknown, expected one of {', '.join(PRECISIONS)}")
    module = soft_prompt_module(model)
    lm = module.backbone.lm
    tokenizer = grow(module.tokenizer, compiled)
    sequences = {name: compiled.sequence(name, [TEXT], tokenizer.soft_ids[name]) for name in compiled.prompts}
    limits = {name: compiled.max_text_tokens + len(sequence) - 1 for name, sequence in sequences.items()}
    if compiled.layout == "suffix":  # clients can add at the end only: words that begin a text are split differently
        sequences[ANY_INSTRUCTION] = [*compiled.head_ids, TEXT]
        limits[ANY_INSTRUCTION] = max(limits.values())
    first: Path | None = None
    for name, sequence in sequences.items():
        place = folder / name
        place.mkdir()
        if first is None:
            write_weights(lm, compiled, tokenizer, place, precision)
            first = place
        else:
            _share(first, place, copy)
        tokenizer.write(place, sequence, limits[name], _padding_side(lm.config))
        _write_modules(compiled, place, limits[name])
    if ANY_INSTRUCTION in sequences:
        spelled = {name: tokenizer.spelled(name) for name in compiled.prompts}
        _write_json(folder / ANY_INSTRUCTION / "instructions.json", spelled)
    (folder / "README.md").write_text(readme(compiled, precision, limits, copy), encoding="utf-8")


def _padding_side(config: Any) -> str:
    """Left, so that the last place is the last token; right where an LLM has a learnt embedding for each place."""
    return "left" if getattr(config.get_text_config(decoder=True), "rope_parameters", None) else "right"


def _share(first: Path, place: Path, copy: bool) -> None:
    """Put the backbone that was written first into another folder."""
    for file in (first / "config.json", *first.glob("*.safetensors*")):
        if copy or file.suffix == ".json":
            shutil.copy(file, place)
            continue
        try:
            os.link(file, place / file.name)
        except OSError:  # a file system without hard links
            shutil.copy(file, place)


def _write_modules(compiled: Compiled, place: Path, limit: int) -> None:
    """Pooling of the last token, a linear head where the model has one or a centre, and length 1."""
    D = next(iter(compiled.prompts.values())).soft_KD.shape[1]
    dense = _dense(compiled, D)
    pooling = {"word_embedding_dimension": D, "include_prompt": True}
    pooling |= {f"pooling_mode_{mode}": mode == "lasttoken" for mode in _POOLING_MODES}
    kinds = ["Transformer", "Pooling", *(["Dense"] if dense else []), "Normalize"]
    paths = ["", *(f"{n}_{kind}" for n, kind in enumerate(kinds) if n)]
    listed = [
        {"idx": n, "name": str(n), "path": path, "type": f"{_CLASSES}.{kind}"}
        for n, (kind, path) in enumerate(zip(kinds, paths, strict=True))
    ]
    for path in paths[1:]:
        (place / path).mkdir()
    _write_json(place / "modules.json", listed)
    _write_json(place / "sentence_bert_config.json", {"max_seq_length": limit, "do_lower_case": False})
    settings: dict[str, Any] = {"prompts": {}, "default_prompt_name": None, "similarity_fn_name": "cosine"}
    _write_json(place / "config_sentence_transformers.json", settings)
    _write_json(place / "1_Pooling" / "config.json", pooling)
    if dense:
        E = dense["linear.weight"].shape[0]
        activation = "torch.nn.modules.linear.Identity"
        sizes = {"in_features": D, "out_features": E, "bias": True, "activation_function": activation}
        _write_json(place / "2_Dense" / "config.json", sizes)
        save_file(dense, place / "2_Dense" / "model.safetensors")
        (place / "2_Dense" / "model.safetensors").chmod(0o644)


def _dense(compiled: Compiled, D: int) -> dict[str, torch.Tensor]:
    """Weight (E, D) and bias (E,) that subtract the centre and apply the head; empty where there is neither.

    (x - c) W^T = x W^T - c W^T.
    """
    centre_D, head_ED = compiled.centre_D, compiled.head_ED
    if centre_D is None and head_ED is None:
        return {}
    weight_ED = torch.eye(D) if head_ED is None else head_ED
    bias_E = torch.zeros(len(weight_ED)) if centre_D is None else -(weight_ED.double() @ centre_D.double()).float()
    return {"linear.weight": weight_ED.contiguous(), "linear.bias": bias_E.contiguous()}


def _write_json(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def reader(folder: Path, name: str, *, device: str = "cpu") -> Callable[[Sequence[str]], NDArray[np.float32]]:
    """Open a written folder with plain sentence-transformers.

    Args:
        folder: as in `write`.
        name: of the instruction.
        device: where the model is to run.

    Returns:
        Texts to embeddings (N, E).
    """
    plain = SentenceTransformer(str(folder / name), device=device, local_files_only=True, trust_remote_code=False)

    def embed(texts: Sequence[str]) -> NDArray[np.float32]:
        found = plain.encode(list(texts), show_progress_bar=False, convert_to_tensor=True)
        return found.float().cpu().numpy()  # type: ignore[no-any-return]

    return embed
