"""A teacher: another embedding model, whose similarities of plain texts this model learns, without labels.

Shapes: N texts, F width of the teacher.
"""

from __future__ import annotations

import hashlib
import logging
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import DatasetDict
from huggingface_hub import hf_hub_download
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import pairwise_cos_sim

from promptembedder import atomic
from promptembedder.data.readers import data_path
from promptembedder.data.rows import Neighbourhoods, TrainingData
from promptembedder.data.settings import DataConfig
from promptembedder.data.texts import read_texts
from promptembedder.errors import PromptEmbedderError
from promptembedder.llms.device import resolve_dtype
from promptembedder.llms.hub import quiet_hub
from promptembedder.llms.identity import digest
from promptembedder.llms.quiet import quiet_transformers
from promptembedder.model.encode import encode
from promptembedder.model.folder import CONFIG_FILE, may_be_hub_id, saved_model, shipped_folder
from promptembedder.model.module import SoftPromptTransformer, soft_prompt_module
from promptembedder.model.store import load
from promptembedder.paths import expanded
from promptembedder.progress import say
from promptembedder.training import workers
from promptembedder.training.distillation import texts_with_embeddings
from promptembedder.training.run_folder import refuse_other
from promptembedder.training.settings import TrainingConfig

logger = logging.getLogger(__name__)

TEACHER_FILE = "teacher.safetensors"
# The field's name for what such a teacher speaks for.
_ASPECT = "meaning"
# A neighbourhood fills a batch or two, so that the texts of a batch have something in common.
_BATCHES_A_NEIGHBOURHOOD = 2
# Similarities of different texts that spread less than this carry next to nothing.
_FLAT = 0.02
# Kept embeddings are a teacher's if it gives this many of the first and of the longest again, but for the precision.
_ASKED_AGAIN = 8
_SAME_EMBEDDING = 0.995
# Devices on which a teacher's own float32 weights can compute in bfloat16.
_AUTOCAST = ("cpu", "cuda")


def open_teacher(name: str, device: str | None = None) -> SentenceTransformer:
    """Open a teacher: a saved model of this package, or a sentence-transformers folder or hub id.

    Raises:
        PromptEmbedderError: it is no embedding model, or cannot be opened without code of its own.
    """
    place = expanded(name)
    if place.is_dir() and not (place / "modules.json").is_file():
        raise PromptEmbedderError(f"training.teacher {name} is no embedding model: the folder has no modules.json")
    if not place.is_dir() and (place.is_absolute() or name.count("/") > 1 or name[:1] in (".", "~")):
        raise PromptEmbedderError(f"training.teacher {name} cannot be opened: no such folder")
    fetched = saved_model(name) if may_be_hub_id(name) else None
    if fetched is not None or (shipped_folder(place) / CONFIG_FILE).is_file():
        return load(fetched or place, device=device)
    try:
        with quiet_transformers(), quiet_hub():
            if not place.is_dir():  # without network the library tries each file many times, for minutes
                hf_hub_download(name if "/" in name else f"sentence-transformers/{name}", "modules.json")
            return SentenceTransformer(str(place if place.is_dir() else name), device=device)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise PromptEmbedderError(f"training.teacher {name} cannot be opened: {reason}") from error


def teacher_instructions(settings: TrainingConfig, data: TrainingData, default: str) -> list[str]:
    """Instructions that the teacher speaks for: those of the settings, else those about meaning, else the default."""
    about_meaning = sorted(text for text, aspect in data.aspects.items() if aspect == _ASPECT)
    return list(settings.teacher_instructions) or about_meaning or [default]


def plain_texts(config: DataConfig) -> list[str]:
    """The texts of `data.texts`.

    Raises:
        PromptEmbedderError: a file cannot be read, or holds an empty text.
    """
    files = [str(data_path(source, config.root)) for source in config.texts]
    return [text for file in files for _, text in read_texts(file, None, ids=False)]


def texts_to_learn_from(plain: Sequence[str], data: TrainingData, most: int, seed: int) -> list[str]:
    """Plain texts and those of the rows, all different; at most `most`, plain ones first."""
    named = {name: [c for c in rows.column_names if not c.startswith("other_")] for name, rows in data.datasets.items()}
    labelled = [
        text
        for name, columns in named.items()
        if data.aspects.get(data.prompts[name]["anchor"]) == _ASPECT
        for column in columns
        for text in data.datasets[name][column]
    ]
    draw = random.Random(f"{seed} teacher")
    found: list[str] = []
    for texts in (plain, labelled):
        distinct = sorted(set(texts) - set(found))
        found += draw.sample(distinct, min(len(distinct), most - len(found)))
    return found


def teach(
    config: DataConfig,
    settings: TrainingConfig,
    data: TrainingData,
    default: str,
    output: Path,
    *,
    resume: bool = False,
) -> tuple[TrainingData, dict[str, str]]:
    """Add the teacher's texts to training data: per instruction a dataset of texts and the teacher's embeddings.

    Args:
        config: names files of plain texts.
        settings: names the teacher, its instructions and its share of the batches.
        data: labelled rows; none: the teacher alone.
        default: instruction that the teacher speaks for if no row's is about meaning.
        output: folder of the run, where the teacher's embeddings are kept, and found again if they are of these texts.
        resume: the run goes on, so that it needs the teacher with which it began.

    Returns:
        The data, and fingerprints of the teacher and of the plain texts.

    Raises:
        PromptEmbedderError: the teacher cannot be opened, or there are fewer texts than a batch holds.
    """
    assert settings.teacher is not None
    rows = sum(len(dataset) for dataset in data.datasets.values())
    draws = _draws(settings, rows)
    plain = plain_texts(config)
    texts = texts_to_learn_from(plain, data, draws, settings.seed)
    if len(texts) < settings.batch_size:
        raise PromptEmbedderError(
            f"{len(texts)} different texts for a teacher and batches of {settings.batch_size}; give more in "
            "data.texts, or smaller batches"
        )
    instructions = teacher_instructions(settings, data, default)
    if expanded(settings.teacher).resolve().is_relative_to(output.resolve()):
        raise PromptEmbedderError(f"training.teacher {settings.teacher} lies in training.output, which is replaced")
    model = open_teacher(settings.teacher, None)
    known = digest(dict(model.state_dict()))
    facts = {"teacher": known, "texts": hashlib.sha256("\0".join(sorted(set(plain))).encode()).hexdigest()}
    if resume:
        refuse_other(output, facts)
    embedded_INF = _kept(output, known, texts, instructions)
    if embedded_INF is not None and not _gives_again(model, texts, instructions, embedded_INF):
        if resume:
            raise PromptEmbedderError(f"{output} began with another training.teacher; give the one it had")
        embedded_INF = None
    if embedded_INF is None:
        say(f"the teacher embeds {len(texts)} texts")
        embedded_INF = embeddings(model, texts, instructions)
        if workers.number() == 0:
            _keep(output, known, texts, instructions, embedded_INF)
    if not all(np.isfinite(embedded_NF).all() for embedded_NF in embedded_INF):
        raise PromptEmbedderError(f"training.teacher {settings.teacher} gives embeddings that are not numbers")
    _warn_of_flat(embedded_INF[0], settings.teacher)
    return _joined(data, texts, instructions, embedded_INF, draws, settings), facts


def embeddings(
    teacher: SentenceTransformer, texts: Sequence[str], instructions: Sequence[str]
) -> list[NDArray[np.float32]]:
    """The teacher's embeddings (N, F) per instruction; of a model that reads no instructions always the same.

    They are computed in bfloat16 where the hardware does: twice as fast, with cosines above 0.9999 to those in float32.
    """
    if isinstance(teacher[0], SoftPromptTransformer):
        return list(encode(teacher, texts, list(instructions), show_progress_bar=True))
    device = teacher.device
    faster = device.type in _AUTOCAST and resolve_dtype("auto", device) is torch.bfloat16
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=faster):
        embedded_NF = teacher.encode(list(texts), normalize_embeddings=True, show_progress_bar=None)
    return [np.asarray(embedded_NF, dtype=np.float32)] * len(instructions)


def distillation_rows(
    teacher: SentenceTransformer, texts: Sequence[str], instructions: Sequence[str], max_text_tokens: int | None = None
) -> TrainingData:
    """Texts with the embeddings that a model of this package has of them, truncated as the student will read them."""
    with soft_prompt_module(teacher).truncating(max_text_tokens):
        return texts_with_embeddings(texts, instructions, embeddings(teacher, texts, instructions))


def neighbourhoods(embedded_NF: NDArray[np.float32], batch_size: int, seed: int) -> tuple[int, ...]:
    """For each text the number of its neighbourhood in the teacher's space (k-means)."""
    from sklearn.cluster import MiniBatchKMeans

    clusters = max(1, len(embedded_NF) // (_BATCHES_A_NEIGHBOURHOOD * batch_size))
    means = MiniBatchKMeans(clusters, random_state=seed, n_init=1, batch_size=4096)
    return tuple(int(cluster) for cluster in means.fit_predict(embedded_NF))


def _draws(settings: TrainingConfig, rows: int) -> int:
    """Texts in an epoch: as many as give the teacher its share; without rows as many as the steps take."""
    taken = settings.max_steps * settings.batch_size * settings.gradient_accumulation
    if not rows:
        return taken
    share = settings.teacher_share
    return max(settings.batch_size, min(round(rows * share / (1 - share)), round(taken * share)))


def _joined(
    data: TrainingData,
    texts: Sequence[str],
    instructions: Sequence[str],
    embedded_INF: Sequence[NDArray[np.float32]],
    draws: int,
    settings: TrainingConfig,
) -> TrainingData:
    taught = texts_with_embeddings(texts, instructions, embedded_INF)
    each = max(settings.batch_size, draws // len(instructions))
    found: dict[int, tuple[int, ...]] = {}
    near = {}
    for name, embedded_NF in zip(taught.datasets, embedded_INF, strict=True):
        if id(embedded_NF) not in found:
            found[id(embedded_NF)] = neighbourhoods(embedded_NF, settings.batch_size, settings.seed)
        near[name] = Neighbourhoods(found[id(embedded_NF)], each)
    datasets = DatasetDict({**data.datasets, **taught.datasets})
    return replace(data, datasets=datasets, prompts={**data.prompts, **taught.prompts}, neighbourhoods=near)


def _identity(known: str, texts: Sequence[str], instructions: Sequence[str]) -> dict[str, str]:
    of_texts = hashlib.sha256("\0".join([*texts, "", *instructions]).encode()).hexdigest()
    return {"teacher": known, "texts": of_texts}


def _keep(
    output: Path, known: str, texts: Sequence[str], instructions: Sequence[str], found: list[NDArray[np.float32]]
) -> None:
    different = {id(embedded): f"embeddings_{n}" for n, embedded in reversed(list(enumerate(found)))}
    stored = {different[id(embedded)]: embedded for embedded in found}
    facts = _identity(known, texts, instructions)
    output.mkdir(parents=True, exist_ok=True)
    try:
        with atomic.replacing(output / TEACHER_FILE) as scratch:
            save_file(stored, scratch, facts)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise PromptEmbedderError(f"{output / TEACHER_FILE} cannot be written: {reason}") from error


def _gives_again(
    teacher: SentenceTransformer,
    texts: Sequence[str],
    instructions: Sequence[str],
    embedded_INF: Sequence[NDArray[np.float32]],
) -> bool:
    """Whether a teacher gives a few of the kept embeddings again: the longest texts' and the first ones'.

    The fingerprint knows its weights, and not its pooling, its prompts or where it truncates texts.
    """
    longest = sorted(range(len(texts)), key=lambda n: -len(texts[n]))[:_ASKED_AGAIN]
    asked = sorted({*longest, *range(min(len(texts), _ASKED_AGAIN))})
    again_ISF = embeddings(teacher, [texts[n] for n in asked], instructions)
    return all(
        kept_NF.shape[1] == again_SF.shape[1]
        and bool((pairwise_cos_sim(kept_NF[asked], again_SF) > _SAME_EMBEDDING).all())
        for kept_NF, again_SF in zip(embedded_INF, again_ISF, strict=True)
    )


def _kept(
    output: Path, known: str, texts: Sequence[str], instructions: Sequence[str]
) -> list[NDArray[np.float32]] | None:
    """What `_keep` wrote, if it is of this teacher and these texts."""
    path = output / TEACHER_FILE
    try:
        with safe_open(path, "numpy") as file:
            if (file.metadata() or {}) != _identity(known, texts, instructions):
                return None
            names = sorted(file.keys(), key=lambda name: int(name.rpartition("_")[2]))
            found: list[Any] = [file.get_tensor(name) for name in names]
    except (OSError, SafetensorError):
        return None
    return found * len(instructions) if len(found) == 1 else found


def _warn_of_flat(embedded_NF: NDArray[np.float32], name: str) -> None:
    some_SF = embedded_NF[: min(len(embedded_NF), 500)]
    similarity_SS = some_SF @ some_SF.T
    spread = float(similarity_SS[np.triu_indices(len(some_SF), 1)].std())
    if spread < _FLAT:
        logger.warning(
            "training.teacher %s finds all texts nearly equally alike (spread %.3f): does it read their language?",
            *(name, spread),
        )
