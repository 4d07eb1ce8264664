"""mteb's task classes over rows from a folder, and one task of our own: instruction triplets.

Layout of the folder: one subfolder per kind of task (`KINDS`), JSONL in it, plain or gzip; see `docs/guide.md`.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mteb
import numpy as np
from mteb.abstasks import (
    AbsTaskClassification,
    AbsTaskClustering,
    AbsTaskPairClassification,
    AbsTaskRetrieval,
    AbsTaskSTS,
)
from mteb.abstasks.abstask import AbsTask
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.abstasks.text.summarization import AbsTaskSummarization

from promptembedder.data.readers import parse_json, read_lines
from promptembedder.errors import PromptEmbedderError
from promptembedder.evaluation.task_rows import (
    ENDINGS,
    QUICK_TRAIN_PER_LABEL,
    SEED,
    SPLIT,
    classes,
    clusters,
    labelled_pairs,
    reranked,
    scored_pairs,
    searched,
    stem_of,
    summaries,
    triplets,
)
from promptembedder.paths import ending, expanded, unreadable

# At most ten minutes for SmolLM2-135M on two cores: name and how many rows (texts, pairs, queries, documents) at most.
QUICK: dict[str, int] = {
    "STSBenchmark": 600,
    "STS15": 300,
    "Banking77": 300,
    "CLINC150": 300,
    "HWU64Intent": 300,
    "StackOverflow": 500,
    "MRPC": 300,
    "SemEvalCQADup": 25,
    "TrecQA": 25,
    "Cranfield": 200,
    "HWU64ScenarioAction": 200,
}
# Tasks beside these, where they are named.
_QUICK_OTHERS = 200
# What the dataset paths of a folder's tasks begin with.
LOCAL = "local/"


class InstructionTriplets(AbsTask):  # type: ignore[misc]
    """Share of triplets whose positive is closer to the anchor than the negative, under the triplet's instruction.

    Triplets come in swapped pairs: the same anchor under two instructions, positive and negative exchanged. A model
    that does not read the instruction gets exactly one of the two right.
    """

    abstask_prompt = "Retrieve what belongs with the text under the instruction."

    def _evaluate_subset(self, model: Any, data_split: Any, *, encode_kwargs: Any, **kwargs: Any) -> dict[str, float]:
        by_number: dict[int, bool] = {}
        for rows in _by_instruction(data_split):
            embeddings = [
                _unit(model.encode_under([row[name] for row in rows], rows[0]["instruction"], **encode_kwargs))
                for name in ("anchor", "positive", "negative")
            ]
            anchor, positive, negative = embeddings
            right = (anchor * positive).sum(-1) > (anchor * negative).sum(-1)
            by_number.update(zip([row["number"] for row in rows], right.tolist(), strict=True))
        pairs: dict[tuple[str, frozenset[str]], list[bool]] = {}
        for row in data_split:
            key = (row["anchor"], frozenset((row["positive"], row["negative"])))
            pairs.setdefault(key, []).append(by_number[row["number"]])
        swapped = [right for right in pairs.values() if len(right) == 2]
        accuracy = {"accuracy": float(np.mean(list(by_number.values())))}
        return accuracy | ({"both_orders": float(np.mean([all(right) for right in swapped]))} if swapped else {})

    def _calculate_descriptive_statistics_from_split(self, split: str, **kwargs: Any) -> Any:
        # Abstract in mteb, which asks for it when a task is described for its own catalogue.
        return {"num_samples": len(self.dataset[split])}


@dataclass(frozen=True)
class Kind:
    """A kind of task: its folder's name is the key in `KINDS`."""

    mteb_type: str
    base: type[Any]
    main_score: str
    read: Callable[[Path, int | None], Any]
    settings: dict[str, Any]


def local_tasks(
    folder: Path, names: Sequence[str] | None = None, *, instructions: dict[str, str] | None = None, quick: bool = False
) -> list[AbsTask]:
    """The tasks found in a folder.

    Args:
        folder: see the module's docstring.
        names: those wanted; unset: all that are found (with `quick`: all of `QUICK` that are found).
        instructions: one per task.
        quick: sample large tasks by a fixed seed, as `QUICK` says, others at 200 rows; the sample size goes into the
            task's description.

    Raises:
        PromptEmbedderError: no tasks in the folder, or none of the quick suite; a name that is not there (the nearest
            are named) or in two places; later, from `load_data`, a row that is not as it should be.
    """
    folder = expanded(folder)
    found: dict[str, tuple[str, Path]] = {}
    for kind in KINDS:
        for path in sorted((folder / kind).iterdir()) if (folder / kind).is_dir() else []:
            if not (path.is_dir() if kind == "retrieval" else ending(path) in ENDINGS):
                continue
            name = path.name if kind == "retrieval" else stem_of(path).removesuffix(".train").removesuffix(".test")
            if name.endswith(".dev"):
                continue
            if name in found and found[name][0] != kind:
                first = folder / found[name][0]
                raise PromptEmbedderError(f"two tasks are named {name}: in {first} and in {path.parent}")
            found[name] = (kind, path if kind == "retrieval" else path.parent)
    if not found:
        raise PromptEmbedderError(f"no tasks in {folder}: {_why_none(folder)}")
    wanted = list(names) if names else [name for name in (QUICK if quick else found) if name in found]
    if not wanted:
        raise PromptEmbedderError(f"{folder} holds none of the quick suite's tasks; take the full suite, or name tasks")
    for name in wanted:
        if name not in found:
            near = difflib.get_close_matches(name, found, n=3, cutoff=0.4) or sorted(found)
            raise PromptEmbedderError(f"unknown task {name!r} in {folder}; nearest: {', '.join(near)}")
    given = instructions or {}
    return [
        _task(name, *found[name], given.get(name), QUICK.get(name, _QUICK_OTHERS) if quick else None) for name in wanted
    ]


def _why_none(folder: Path) -> str:
    """What to say of a folder in which no task is found."""
    if not folder.is_dir():
        return "no such folder"
    if folder.name in KINDS:
        return f"it is a folder of one kind of task; give its parent, {folder.parent}"
    return f"expected folders such as {', '.join(list(KINDS)[:3])}, with NAME.jsonl or NAME.jsonl.gz in them"


def hub_tasks(names: Sequence[str], instructions: Mapping[str, str] | None = None) -> list[AbsTask]:
    """Tasks of mteb's own by name, or a benchmark's (`MTEB(eng, v2)`); their rows come from the hub.

    Args:
        names: of tasks and benchmarks.
        instructions: by task name, in place of mteb's own.

    Raises:
        PromptEmbedderError: mteb knows no such task or benchmark; the nearest are named.
    """
    tasks: list[AbsTask] = []
    benchmarks = [benchmark.name for benchmark in mteb.get_benchmarks()]
    for name in names:
        try:
            tasks += list(mteb.get_benchmark(name).tasks) if name in benchmarks else [mteb.get_task(name)]
        except (KeyError, ValueError):
            known = [task.metadata.name for task in mteb.get_tasks()] + benchmarks
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
            raise PromptEmbedderError(
                f"mteb knows no task {name!r}" + (f"; nearest: {', '.join(near)}" if near else "")
            ) from None
    for task in tasks:
        if (given := (instructions or {}).get(task.metadata.name)) is not None:
            task.metadata = task.metadata.model_copy(update={"prompt": given})
    return tasks


def _task(name: str, kind_name: str, place: Path, instruction: str | None, at_most: int | None) -> AbsTask:
    kind = KINDS[kind_name]
    path = place if kind_name == "retrieval" else place / name
    sampled = f", at most {at_most} rows sampled with seed {SEED}" if at_most else ""
    metadata = TaskMetadata(
        name=name,
        description=f"{kind.mteb_type} task from a local folder{sampled}.",
        dataset={"path": f"{LOCAL}{name}", "revision": _revision(path, at_most)},
        type=kind.mteb_type,
        category="t2t",
        modalities=["text"],
        eval_splits=[SPLIT],
        eval_langs=["eng-Latn"],
        main_score=kind.main_score,
        prompt=instruction,
    )

    def load_data(self: Any, **kwargs: Any) -> None:
        if not self.data_loaded:
            self.dataset = kind.read(path, at_most)
            self.data_loaded = True

    made = type(name, (kind.base,), {"metadata": metadata, "load_data": load_data, **kind.settings})
    return made()


KINDS: dict[str, Kind] = {
    "sts": Kind("STS", AbsTaskSTS, "cosine_spearman", scored_pairs, {}),
    "classification": Kind("Classification", AbsTaskClassification, "accuracy", classes, {}),
    "clustering": Kind(
        "Clustering",
        AbsTaskClustering,
        "v_measure",
        clusters,
        {"max_fraction_of_documents_to_embed": None, "max_document_to_embed": 2048},
    ),
    "pair_classification": Kind("PairClassification", AbsTaskPairClassification, "max_ap", labelled_pairs, {}),
    "reranking": Kind("Reranking", AbsTaskRetrieval, "map_at_1000", reranked, {}),
    "retrieval": Kind("Retrieval", AbsTaskRetrieval, "ndcg_at_10", searched, {}),
    "summarization": Kind(
        "Summarization", AbsTaskSummarization, "cosine_spearman", summaries, {"min_score": 1, "max_score": 5}
    ),
    "instruction_triplets": Kind("InstructionRetrieval", InstructionTriplets, "accuracy", triplets, {}),
}


def _revision(path: Path, at_most: int | None) -> str:
    """Digest of the files and of the sampling, so that results of other rows are never taken for these."""
    digest = hashlib.sha256(repr((at_most, at_most and QUICK_TRAIN_PER_LABEL)).encode())
    # The second condition is for tasks in several files, such as NAME.train and NAME.test.
    for file in sorted(file for file in (path if path.is_dir() else path.parent).iterdir() if ending(file) in ENDINGS):
        if not path.is_dir() and not file.name.startswith(f"{path.name}."):
            continue
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:40]


def _by_instruction(rows: Any) -> list[list[dict[str, Any]]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["instruction"], []).append(row)
    return list(groups.values())


def _unit(embeddings: Any) -> Any:
    array = np.asarray(embeddings, dtype=np.float64)
    return array / np.linalg.norm(array, axis=-1, keepdims=True)


def read_instructions(path: Path) -> dict[str, str]:
    """Task names to instructions, from a JSON file.

    Raises:
        PromptEmbedderError: no such file, or it holds something else.
    """
    path = expanded(path)
    if (reason := unreadable(path)) is not None:
        raise PromptEmbedderError(f"instructions {path} cannot be read: {reason}")
    found = parse_json("".join(read_lines(path)), str(path))
    if not isinstance(found, dict) or not all(isinstance(value, str) and value.strip() for value in found.values()):
        raise PromptEmbedderError(f"{path} must map task names to instructions")
    return found
