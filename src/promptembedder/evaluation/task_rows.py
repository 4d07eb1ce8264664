"""Rows of a folder's tasks, read, checked, sampled and put as mteb's task classes want them."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict

from promptembedder.data.readers import read_jsonl
from promptembedder.errors import PromptEmbedderError
from promptembedder.paths import ending
from promptembedder.text import is_unicode

ENDINGS = (".jsonl.gz", ".jsonl")
SPLIT = "test"
SEED = 13
# Rows per label that the quick suite's classifiers draw their training samples (8 per label, ten draws) from.
QUICK_TRAIN_PER_LABEL = 10


def stem_of(path: Path) -> str:
    """A file's name without `.jsonl` or `.jsonl.gz`."""
    return path.name[: -len(ending(path))]


def _file(place: Path) -> Path:
    """The file of rows that is meant by its path without an ending.

    Raises:
        PromptEmbedderError: both endings are there, or neither.
    """
    beside = sorted(place.parent.iterdir()) if place.parent.is_dir() else []
    found = [path for path in beside if ending(path) in ENDINGS and stem_of(path) == place.name]
    if len(found) != 1:
        what = "is missing" if not found else f"is there twice ({' and '.join(path.name for path in found)}); keep one"
        raise PromptEmbedderError(f"{place}{ENDINGS[0]} {what}")
    return found[0]


# Columns of tables hold 64 bits; a NaN is not below it either.
_TOO_LARGE = 2**63
# What a field of a row holds: how to tell, and in words.
_Check = tuple[Callable[[Any], bool], str]
TEXT: _Check = (lambda value: isinstance(value, str) and is_unicode(value), "a text")
NUMBER: _Check = (
    lambda value: isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _TOO_LARGE,
    "a number",
)
WHOLE: _Check = (lambda value: NUMBER[0](value) and value == int(value), "a whole number")
YES_OR_NO: _Check = (lambda value: NUMBER[0](value) and value in (0, 1), "0 or 1")
LABEL: _Check = (
    lambda value: TEXT[0](value) or (isinstance(value, int) and abs(value) < _TOO_LARGE),
    "a text or a whole number",
)
NAME: _Check = (lambda value: TEXT[0](value) or isinstance(value, int), "a text or a whole number")
TEXTS: _Check = (lambda value: _is_list(value, TEXT), "a list of texts")
ANY_TEXTS: _Check = (lambda value: value == [] or _is_list(value, TEXT), "a list of texts, perhaps empty")
NUMBERS: _Check = (lambda value: _is_list(value, NUMBER), "a list of numbers")


def _is_list(value: Any, of: _Check) -> bool:
    return isinstance(value, list) and bool(value) and all(of[0](entry) for entry in value)


def _rows(
    place: Path,
    fields: Mapping[str, _Check],
    at_most: int | None = None,
    *,
    optional: Mapping[str, _Check] | None = None,
    first_labels: dict[str, tuple[Any, str]] | None = None,
) -> list[dict[str, Any]]:
    """The rows of a file, or a sample of them.

    Args:
        place: path of the file without its ending.
        fields: that every row has.
        at_most: sample this many.
        optional: fields that a row may have.
        first_labels: value and place of the first label, by field; files that share labels share this.
    """
    file = _file(place)
    labels = {} if first_labels is None else first_labels
    rows: list[dict[str, Any]] = []
    for where, record in read_jsonl(file):
        if not isinstance(record, dict):
            raise PromptEmbedderError(f"{where}: found {type(record).__name__}, expected one JSON object per line")
        missing = [field for field in fields if record.get(field) is None]
        if missing:
            raise PromptEmbedderError(f"{where}: {missing[0]!r} is missing; a row of this task has {', '.join(fields)}")
        given = {field: check for field, check in (optional or {}).items() if record.get(field) is not None}
        for field, (fits, wanted) in {**fields, **given}.items():
            if not fits(record[field]):
                raise PromptEmbedderError(f"{where}: {field!r} is {str(record[field])[:40]!r}, expected {wanted}")
        for field in (field for field, check in fields.items() if check is LABEL):
            first, there = labels.setdefault(field, (record[field], where))
            if type(record[field]) is not type(first):
                raise PromptEmbedderError(
                    f"{where}: {field!r} is {record[field]!r}, of another kind than {first!r} ({there})"
                )
        rows.append(record)
    if not rows:
        raise PromptEmbedderError(f"{file} holds no rows")
    return _sample(rows, at_most)


def _sample(rows: list[Any], at_most: int | None) -> list[Any]:
    if at_most is None or len(rows) <= at_most:
        return rows
    return [rows[n] for n in sorted(random.Random(SEED).sample(range(len(rows)), at_most))]


def _columns(rows: list[dict[str, Any]], fields: Iterable[str]) -> Dataset:
    return Dataset.from_dict({field: [row[field] for row in rows] for field in fields})


def scored_pairs(path: Path, at_most: int | None) -> Any:
    """Pairs of sentences with a score (kind `sts`)."""
    fields = {"sentence1": TEXT, "sentence2": TEXT, "score": NUMBER}
    rows = _rows(path, fields, at_most)
    if len(rows) < 2:
        raise PromptEmbedderError(f"{_file(path)} holds one row; a rank correlation needs two")
    return DatasetDict({SPLIT: _columns([{**row, "score": float(row["score"])} for row in rows], fields)})


def labelled_pairs(path: Path, at_most: int | None) -> Any:
    """Pairs of sentences that mean the same or not (kind `pair_classification`)."""
    rows = _rows(path, {"sentence1": TEXT, "sentence2": TEXT, "label": YES_OR_NO}, at_most)
    return DatasetDict(
        {SPLIT: _columns([{**row, "labels": int(row["label"])} for row in rows], ("sentence1", "sentence2", "labels"))}
    )


def classes(path: Path, at_most: int | None) -> Any:
    """Texts with a label, in `train` and `test` (kind `classification`)."""
    fields, first_labels = {"text": TEXT, "label": LABEL}, dict[str, tuple[Any, str]]()
    places = {split: path.with_name(f"{path.name}.{split}") for split in ("train", SPLIT)}
    parts = {
        split: _rows(place, fields, at_most if split == SPLIT else None, first_labels=first_labels)
        for split, place in places.items()
    }
    labels = sorted({row["label"] for row in parts["train"]})
    if len(labels) < 2:
        file = _file(places["train"])
        raise PromptEmbedderError(f"{file} holds one label only, {labels[0]!r}; expected at least two")
    if len(labels) == 2 and isinstance(labels[0], str):
        # With two labels mteb also takes precision and recall of the label 1.
        numbers = {label: n for n, label in enumerate(labels)}
        for row in itertools.chain(*parts.values()):
            row["label"] = numbers.setdefault(row["label"], len(numbers))
    if at_most is not None:
        by_label: dict[Any, list[dict[str, Any]]] = {}
        for row in parts["train"]:
            by_label.setdefault(row["label"], []).append(row)
        parts["train"] = [row for rows in by_label.values() for row in _sample(rows, QUICK_TRAIN_PER_LABEL)]
    return DatasetDict({split: _columns(rows, fields) for split, rows in parts.items()})


def clusters(path: Path, at_most: int | None) -> Any:
    """Texts with the label of their cluster (kind `clustering`)."""
    given = _rows(path, {"text": TEXT, "label": LABEL}, at_most)
    rows = [{"sentences": row["text"], "labels": row["label"]} for row in given]
    return DatasetDict({SPLIT: _columns(rows, ("sentences", "labels"))})


def reranked(path: Path, at_most: int | None) -> Any:
    """Queries with texts to put in order (kind `reranking`)."""
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


def searched(path: Path, at_most: int | None) -> Any:
    """Queries, documents and judgements (kind `retrieval`)."""
    queries = _named(path / "queries")
    corpus = _named(path / "corpus")
    judgements_in = _file(path / "qrels")
    relevant: dict[str, dict[str, int]] = {}
    for row in _rows(path / "qrels", {"query-id": NAME, "corpus-id": NAME, "score": WHOLE}):
        judged_of, name = relevant.setdefault(str(row["query-id"]), {}), str(row["corpus-id"])
        if judged_of.setdefault(name, int(row["score"])) != row["score"]:
            raise PromptEmbedderError(f"{judgements_in} judges {name!r} for {row['query-id']!r} in two ways")
    queries = [row for row in queries if str(row["_id"]) in relevant]
    texts, asked = ({str(row["_id"]) for row in rows} for rows in (corpus, queries))
    for query, judgements in relevant.items():
        if unknown := [query] if query not in asked else [name for name in judgements if name not in texts]:
            raise PromptEmbedderError(f"{judgements_in} judges {unknown[0]!r}, which is nowhere in the task")
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
    rows = _rows(path, {"_id": NAME, "text": TEXT}, optional={"title": TEXT})
    seen: set[str] = set()
    for row in rows:
        if str(row["_id"]) in seen:
            raise PromptEmbedderError(f"{_file(path)}: id {row['_id']!r} is used twice")
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
    return {"default": {SPLIT: split}}


def summaries(path: Path, at_most: int | None) -> Any:
    """Texts with summaries by people and by machines, and grades of the latter (kind `summarization`)."""
    fields = {"human_summaries": TEXTS, "machine_summaries": TEXTS, "relevance": NUMBERS}
    given = _rows(path, fields, at_most)
    for row in given:
        if len(row["relevance"]) != len(row["machine_summaries"]):
            raise PromptEmbedderError(
                f"{_file(path)}: the row of {row['machine_summaries'][0][:40]!r} has {len(row['relevance'])} grades "
                f"in 'relevance' for {len(row['machine_summaries'])} machine summaries"
            )
    rows = [
        {**row, "text": row["human_summaries"][0], "relevance": [float(grade) for grade in row["relevance"]]}
        for row in given
    ]
    return DatasetDict({SPLIT: _columns(rows, ("text", *fields))})


def triplets(path: Path, at_most: int | None) -> Any:
    """Anchors with a positive and a negative under an instruction (kind `instruction_triplets`)."""
    fields = dict.fromkeys(("instruction", "anchor", "positive", "negative"), TEXT)
    rows = _rows(path, fields)
    if at_most is not None:  # whole swapped pairs
        pairs = [rows[n : n + 2] for n in range(0, len(rows), 2)]
        rows = [row for pair in _sample(pairs, at_most // 2) for row in pair]
    return DatasetDict({SPLIT: _columns([{**row, "number": n} for n, row in enumerate(rows)], ("number", *fields))})
