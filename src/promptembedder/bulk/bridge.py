"""Query an index of the old model with the new one: a linear bridge between two embedding spaces.

Vectors of two models are not comparable. A bridge maps the new model's embeddings into the old model's space, so that
an index can be searched while it is being re-encoded. It loses some of the quality; `fit` measures how much.

Shapes: N texts, D width of the new model, F of the old one.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from promptembedder import atomic
from promptembedder.errors import PromptEmbedderError
from promptembedder.model.fits import moments, ridge
from promptembedder.paths import check_readable, expanded, is_there

_PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
FEWEST_TEXTS = 100
_NEIGHBOURS = 10
# Queries compared with the whole index at once.
_BLOCK = 256
# Read by the model that a bridge is fitted for; its embedding tells that model from others.
PROBE = "The harbour office answers letters on Tuesdays, unless the ferry is late."
# Cosine of two embeddings of it; precisions and devices differ by less.
_SAME_MODEL = 0.99


@dataclass(frozen=True)
class Bridge:
    """A linear map from the new model's embeddings to the old model's space.

    Attributes:
        weight_DF: the map, float32.
        probe_D: the new model's embedding of `PROBE`, by which it is known again; unset: anyone's.
        facts: `texts` fitted on, `penalty`, and on texts held back: `cosine` between mapped and true embeddings,
            `neighbours_kept`, the share of the old model's 10 nearest texts that the mapped query finds too.
    """

    weight_DF: NDArray[np.float32]
    facts: dict[str, int | float]
    probe_D: NDArray[np.float32] | None = None

    def __call__(self, embeddings_ND: NDArray[Any]) -> NDArray[np.float32]:
        """Embeddings (N, F) of unit length in the old model's space.

        Raises:
            PromptEmbedderError: embeddings of another width than the bridge was fitted on.
        """
        D = self.weight_DF.shape[0]
        if embeddings_ND.ndim != 2 or embeddings_ND.shape[1] != D:
            raise PromptEmbedderError(
                f"the bridge takes embeddings of {D} dimensions, found shape {embeddings_ND.shape}"
            )
        return _unit(embeddings_ND.astype(np.float32) @ self.weight_DF)

    def check(self, probe_D: NDArray[Any]) -> None:
        """Compare a model's embedding of `PROBE` with that of the model it was fitted for.

        Raises:
            PromptEmbedderError: another model, or the same one under another instruction.
        """
        if self.probe_D is not None and float(_unit(probe_D) @ _unit(self.probe_D)) < _SAME_MODEL:
            raise PromptEmbedderError(
                "the bridge was fitted for another model or under another instruction; fit one for this"
            )

    def save(self, path: Path) -> None:
        """Write a safetensors file, atomically.

        Raises:
            PromptEmbedderError: the path cannot be written, or holds something else than a bridge.
        """
        refuse_others(path)
        try:
            with atomic.replacing(path) as scratch:
                arrays = {"weight": self.weight_DF} | ({} if self.probe_D is None else {"probe": self.probe_D})
                save_file(arrays, scratch, metadata={"facts": json.dumps(self.facts)})
        except (OSError, SafetensorError) as error:  # the second where weights do not fit on the disk
            reason = getattr(error, "strerror", None) or error
            raise PromptEmbedderError(f"bridge {path} cannot be written: {reason}") from error


def refuse_others(path: Path) -> None:
    """Refuse to replace anything but a bridge or an empty file.

    Raises:
        PromptEmbedderError: something else is there.
    """
    if path.is_dir():
        raise PromptEmbedderError(f"bridge {path} cannot be written: it is a folder")
    if path.is_file() and path.stat().st_size:
        try:
            load(path)
        except PromptEmbedderError as error:
            raise PromptEmbedderError(
                f"bridge {path} cannot be written: another file is there; choose another name"
            ) from error


def load(path: Path) -> Bridge:
    """Open a saved bridge.

    Raises:
        PromptEmbedderError: no such file, or not a bridge.
    """
    path = expanded(path)
    if not is_there(path):
        raise PromptEmbedderError(f"no bridge at {path}")
    check_readable(path)
    try:
        with safe_open(path, framework="np") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            facts = json.loads((file.metadata() or {})["facts"])
        weight_DF, probe_D = arrays["weight"], arrays.get("probe")
        if weight_DF.ndim != 2 or (probe_D is not None and probe_D.shape != weight_DF.shape[:1]):
            raise ValueError(f"a weight of shape {weight_DF.shape} is no map")
        if not np.isfinite(weight_DF).all():
            raise ValueError("its weights are not finite numbers")
    except (SafetensorError, KeyError, ValueError) as error:
        raise PromptEmbedderError(f"{path} is not a bridge: {error}") from error
    return Bridge(weight_DF, facts, probe_D)


def fit(new_ND: NDArray[Any], old_NF: NDArray[Any], *, probe_D: NDArray[Any] | None = None, seed: int = 13) -> Bridge:
    """Ridge regression from new to old embeddings of the same texts; its penalty is chosen on a tenth held back.

    Args:
        new_ND: embeddings by the new model.
        old_NF: embeddings of the same texts, in the same order, by the old model.
        probe_D: the new model's embedding of `PROBE`, so that the bridge is refused to others.
        seed: draws the texts held back.

    Raises:
        PromptEmbedderError: fewer than 100 texts, or not equally many; embeddings that are not finite numbers.
    """
    if len(new_ND) != len(old_NF) or len(new_ND) < FEWEST_TEXTS:
        raise PromptEmbedderError(
            f"a bridge needs at least {FEWEST_TEXTS} texts encoded by both models, "
            f"found {len(new_ND)} and {len(old_NF)}"
        )
    for name, embeddings in (("new", new_ND), ("old", old_NF)):
        if not np.isfinite(embeddings).all():
            raise PromptEmbedderError(f"embeddings by the {name} model are not finite numbers")
    new_ND, old_NF = _unit(new_ND.astype(np.float64)), _unit(old_NF.astype(np.float64))
    order = np.random.default_rng(seed).permutation(len(new_ND))
    held, rest = order[: len(order) // 10], order[len(order) // 10 :]
    scored: list[tuple[float, float]] = []
    for penalty in _PENALTIES:
        mapped = _unit(new_ND[held] @ _ridge(new_ND[rest], old_NF[rest], penalty))
        scored.append((float((mapped * old_NF[held]).sum(-1).mean()), penalty))
    cosine, penalty = max(scored)
    mapped = _unit(new_ND[held] @ _ridge(new_ND[rest], old_NF[rest], penalty))
    facts: dict[str, int | float] = {
        "texts": len(new_ND),
        "penalty": penalty,
        "cosine": round(cosine, 4),
        "neighbours_kept": round(_neighbours_kept(mapped, old_NF[held], old_NF[rest]), 4),
    }
    return Bridge(_ridge(new_ND, old_NF, penalty), facts, None if probe_D is None else probe_D.astype(np.float32))


def _ridge(new_ND: NDArray[np.float64], old_NF: NDArray[np.float64], penalty: float) -> NDArray[np.float32]:
    # Contiguous, because safetensors writes the buffer as it lies.
    both = moments(torch.from_numpy(new_ND), torch.from_numpy(old_NF))
    return np.ascontiguousarray(ridge(both, penalty).numpy())


def _neighbours_kept(mapped_NF: NDArray[Any], true_NF: NDArray[Any], index_MF: NDArray[Any]) -> float:
    shares: list[float] = []
    for start in range(0, len(mapped_NF), _BLOCK):
        near = [
            np.argpartition(-(queries[start : start + _BLOCK] @ index_MF.T), _NEIGHBOURS, axis=-1)[:, :_NEIGHBOURS]
            for queries in (mapped_NF, true_NF)
        ]
        shares += [len(set(a) & set(b)) / _NEIGHBOURS for a, b in zip(*near, strict=True)]
    return float(np.mean(shares))


def _unit(embeddings: NDArray[Any]) -> NDArray[Any]:
    scaled: NDArray[Any] = embeddings / np.maximum(np.linalg.norm(embeddings, axis=-1, keepdims=True), 1e-12)
    return scaled
