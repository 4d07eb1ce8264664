"""mteb's task classes over rows from a folder, and one task of our own: instruction triplets.

Layout of the folder: one subfolder per kind of task (`KINDS`), gzip JSONL in it; see `docs/guide.md`.
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mteb
import numpy as np
from datasets import Dataset, DatasetDict
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

from promptembedder.data.readers import parse_json, read_jsonl, read_lines
from promptembedder.errors import PromptEmbedderError

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
# Rows per label that the quick suite's classifiers draw their training samples (8 per label, ten draws) from.
_QUICK_TRAIN_PER_LABEL = 10
_SEED = 13
# What the dataset paths of a folder's tasks begin with.
LOCAL = "local/"
_SPLIT = "test"


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
    found: dict[str, tuple[str, Path]] = {}
    for kind in KINDS:
        for path in sorted((folder / kind).iterdir()) if (folder / kind).is_dir() else []:
            if not (path.is_dir() if kind == "retrieval" else path.name.endswith(".jsonl.gz")):
                continue
            name = path.name.removesuffix(".jsonl.gz").removesuffix(".train").removesuffix(".test")
            if name.endswith(".dev"):
                continue
            if name in found and found[name][0] != kind:
                first = folder / found[name][0]
                raise PromptEmbedderError(f"two tasks are named {name}: in {first} and in {path.parent}")
            found[name] = (kind, path if kind == "retrieval" else path.parent)
    if not found:
        raise PromptEmbedderError(f"no tasks in {folder}: expected folders such as {', '.join(list(KINDS)[:3])}")
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
    sampled = f", at most {at_most} rows sampled with seed {_SEED}" if at_most else ""
    metadata = TaskMetadata(
        name=name,
        description=f"{kind.mteb_type} task from a local folder{sampled}.",
        dataset={"path": f"{LOCAL}{name}", "revision": _revision(path, at_most)},
        type=kind.mteb_type,
        category="t2t",
        modalities=["text"],
        eval_splits=[_SPLIT],
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


# What a field of a row holds: how to tell, and in words.
_Check = tuple[Callable[[Any], bool], str]
TEXT: _Check = (lambda value: isinstance(value, str), "a text")
NUMBER: _Check = (
    lambda value: isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value),
    "a number",
)
WHOLE: _Check = (lambda value: NUMBER[0](value) and value == int(value), "a whole number")
YES_OR_NO: _Check = (lambda value: NUMBER[0](value) and value in (0, 1), "0 or 1")
LABEL: _Check = (lambda value: isinstance(value, str | int), "a text or a whole number")
NAME: _Check = (lambda value: isinstance(value, str | int), "a text or a whole number")
TEXTS: _Check = (lambda value: _is_list(value, str), "a list of texts")
ANY_TEXTS: _Check = (lambda value: value == [] or _is_list(value, str), "a list of texts, perhaps empty")
NUMBERS: _Check = (lambda value: _is_list(value, int | float), "a list of numbers")


def _is_list(value: Any, of: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(entry, of) for entry in value)


def _rows(path: Path, fields: Mapping[str, _Check], at_most: int | None = None) -> list[dict[str, Any]]:
    file = path.with_name(f"{path.name}.jsonl.gz")
    rows: list[dict[str, Any]] = []
    for where, record in read_jsonl(file):
        missing = [field for field in fields if not isinstance(record, dict) or record.get(field) is None]
        if missing:
            raise PromptEmbedderError(f"{where}: {missing[0]!r} is missing; a row of this task has {', '.join(fields)}")
        for field, (fits, wanted) in fields.items():
            if not fits(record[field]):
                raise PromptEmbedderError(f"{where}: {field!r} is {str(record[field])[:40]!r}, expected {wanted}")
            if rows and type(record[field]) is not type(rows[0][field]) and fields[field] is LABEL:
                raise PromptEmbedderError(
                    f"{where}: {field!r} is {record[field]!r}, of another kind than in the first row"
                )
        rows.append(record)
    if not rows:
        raise PromptEmbedderError(f"{file} holds no rows")
    return _sample(rows, at_most)


def _sample(rows: list[Any], at_most: int | None) -> list[Any]:
    if at_most is None or len(rows) <= at_most:
        return rows
    return [rows[n] for n in sorted(random.Random(_SEED).sample(range(len(rows)), at_most))]


def _columns(rows: list[dict[str, Any]], fields: Iterable[str]) -> Dataset:
    return Dataset.from_dict({field: [row[field] for row in rows] for field in fields})


def _scored_pairs(path: Path, at_most: int | None) -> Any:
    fields = {"sentence1": TEXT, "sentence2": TEXT, "score": NUMBER}
    rows = _rows(path, fields, at_most)
    if len(rows) < 2:
        raise PromptEmbedderError(f"{path}.jsonl.gz holds one row; a rank correlation needs two")
    return DatasetDict({_SPLIT: _columns(rows, fields)})


def _labelled_pairs(path: Path, at_most: int | None) -> Any:
    rows = _rows(path, {"sentence1": TEXT, "sentence2": TEXT, "label": YES_OR_NO}, at_most)
    return DatasetDict(
        {_SPLIT: _columns([{**row, "labels": row["label"]} for row in rows], ("sentence1", "sentence2", "labels"))}
    )


def _classes(path: Path, at_most: int | None) -> Any:
    fields = {"text": TEXT, "label": LABEL}
    parts = {
        split: _rows(path.with_name(f"{path.name}.{split}"), fields, at_most if split == _SPLIT else None)
        for split in ("train", _SPLIT)
    }
    labels = sorted({row["label"] for row in parts["train"]})
    if len(labels) < 2:
        raise PromptEmbedderError(f"{path}.train.jsonl.gz holds one label only, {labels[0]!r}; expected at least two")
    if len(labels) == 2 and isinstance(labels[0], str):
        # With two labels mteb also takes precision and recall of the label 1.
        numbers = {label: n for n, label in enumerate(labels)}
        for row in itertools.chain(*parts.values()):
            row["label"] = numbers.setdefault(row["label"], len(numbers))
    if at_most is not None:
        by_label: dict[Any, list[dict[str, Any]]] = {}
        for row in parts["train"]:
            by_label.setdefault(row["label"], []).append(row)
        parts["train"] = [row for rows in by_label.values() for row in _sample(rows, _QUICK_TRAIN_PER_LABEL)]
    return DatasetDict({split: _columns(rows, fields) for split, rows in parts.items()})


def _clusters(path: Path, at_most: int | None) -> Any:
    given = _rows(path, {"text": TEXT, "label": LABEL}, at_most)
    rows = [{"sentences": row["text"], "labels": row["label"]} for row in given]
    return DatasetDict({_SPLIT: _columns(rows, ("sentences", "labels"))})


def _reranked(path: Path, at_most: int | None) -> Any:
    queries, corpus, relevant, ranked = [], [], {}, {}
    for n, row in enumerate(_rows(path, {"query": TEXT, "positive": TEXTS, "negative": ANY_TEXTS}, at_most)):
        query = f"q{n}"
        queries.append({"id": query, "text": row["query"]})
        texts = [(text, 1) for text in row["positive"]] + [(text, 0) for text in row["negative"]]
        names = [f"{query}-{m}" for m in range(len(texts))]
        corpus += [{"id": name, "title": "", "text": text} for name, (text, _) in zip(names, texts, strict=True)]
        relevant[query] = {name: grade for name, (_, grade) in zip(names, texts, strict=True)}
        ranked[query] = names
    return _retrieval_data(queries, corpus, relevant, ranked)


def _searched(path: Path, at_most: int | None) -> Any:
    queries = _named(path / "queries")
    corpus = _named(path / "corpus")
    relevant: dict[str, dict[str, int]] = {}
    for row in _rows(path / "qrels", {"query-id": NAME, "corpus-id": NAME, "score": WHOLE}):
        judged_of, name = relevant.setdefault(str(row["query-id"]), {}), str(row["corpus-id"])
        if judged_of.setdefault(name, int(row["score"])) != row["score"]:
            raise PromptEmbedderError(f"{path / 'qrels'}.jsonl.gz judges {name!r} for {row['query-id']!r} in two ways")
    queries = [row for row in queries if str(row["_id"]) in relevant]
    texts, asked = ({str(row["_id"]) for row in rows} for rows in (corpus, queries))
    for query, judgements in relevant.items():
        if unknown := [query] if query not in asked else [name for name in judgements if name not in texts]:
            raise PromptEmbedderError(f"{path / 'qrels'}.jsonl.gz judges {unknown[0]!r}, which is nowhere in the task")
    if at_most is not None:
        # Judged documents stay, so that every query can be answered; the others are thinned out.
        queries = _sample(queries, at_most // 8)
        relevant = {str(row["_id"]): relevant[str(row["_id"])] for row in queries}
        judged = {name for names in relevant.values() for name in names}
        others = _sample([row for row in corpus if str(row["_id"]) not in judged], max(0, at_most - len(judged)))
        corpus = [row for row in corpus if str(row["_id"]) in judged] + others
    return _retrieval_data(
        [{"id": str(row["_id"]), "text": row["text"]} for row in queries],
        [{"id": str(row["_id"]), "title": row.get("title") or "", "text": row["text"]} for row in corpus],
        relevant,
        None,
    )


def _named(path: Path) -> list[dict[str, Any]]:
    """Texts of a retrieval task, each with an id of its own."""
    rows = _rows(path, {"_id": NAME, "text": TEXT})
    seen: set[str] = set()
    for row in rows:
        if str(row["_id"]) in seen:
            raise PromptEmbedderError(f"{path}.jsonl.gz: id {row['_id']!r} is used twice")
        seen.add(str(row["_id"]))
    return rows


def _retrieval_data(
    queries: list[dict[str, str]],
    corpus: list[dict[str, str]],
    relevant: dict[str, dict[str, int]],
    ranked: dict[str, list[str]] | None,
) -> Any:
    split = {
        "queries": Dataset.from_list(queries),
        "corpus": Dataset.from_list(corpus),
        "relevant_docs": relevant,
        "top_ranked": ranked,
    }
    return {"default": {_SPLIT: split}}


def _summaries(path: Path, at_most: int | None) -> Any:
    fields = {"human_summaries": TEXTS, "machine_summaries": TEXTS, "relevance": NUMBERS}
    rows = [{**row, "text": row["human_summaries"][0]} for row in _rows(path, fields, at_most)]
    return DatasetDict({_SPLIT: _columns(rows, ("text", *fields))})


def _triplets(path: Path, at_most: int | None) -> Any:
    fields = dict.fromkeys(("instruction", "anchor", "positive", "negative"), TEXT)
    rows = _rows(path, fields)
    if at_most is not None:  # whole swapped pairs
        pairs = [rows[n : n + 2] for n in range(0, len(rows), 2)]
        rows = [row for pair in _sample(pairs, at_most // 2) for row in pair]
    return DatasetDict({_SPLIT: _columns([{**row, "number": n} for n, row in enumerate(rows)], ("number", *fields))})


KINDS: dict[str, Kind] = {
    "sts": Kind("STS", AbsTaskSTS, "cosine_spearman", _scored_pairs, {}),
    "classification": Kind("Classification", AbsTaskClassification, "accuracy", _classes, {}),
    "clustering": Kind(
        "Clustering",
        AbsTaskClustering,
        "v_measure",
        _clusters,
        {"max_fraction_of_documents_to_embed": None, "max_document_to_embed": 2048},
    ),
    "pair_classification": Kind("PairClassification", AbsTaskPairClassification, "max_ap", _labelled_pairs, {}),
    "reranking": Kind("Reranking", AbsTaskRetrieval, "map_at_1000", _reranked, {}),
    "retrieval": Kind("Retrieval", AbsTaskRetrieval, "ndcg_at_10", _searched, {}),
    "summarization": Kind(
        "Summarization", AbsTaskSummarization, "cosine_spearman", _summaries, {"min_score": 1, "max_score": 5}
    ),
    "instruction_triplets": Kind("InstructionRetrieval", InstructionTriplets, "accuracy", _triplets, {}),
}


def _revision(path: Path, at_most: int | None) -> str:
    """Digest of the files and of the sampling, so that results of other rows are never taken for these."""
    digest = hashlib.sha256(repr((at_most, at_most and _QUICK_TRAIN_PER_LABEL)).encode())
    files = sorted(path.glob("*.gz")) if path.is_dir() else sorted(path.parent.glob(f"{path.name}.*gz"))
    for file in files:
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
    if not path.is_file():
        raise PromptEmbedderError(f"no instructions at {path}")
    found = parse_json("".join(read_lines(path)), str(path))
    if not isinstance(found, dict) or not all(isinstance(value, str) and value.strip() for value in found.values()):
        raise PromptEmbedderError(f"{path} must map task names to instructions")
    return found
