"""Training rows and scored pairs, from files or the hub, checked and sorted into one dataset per instruction."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import random
import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset

from promptembedder.config import DataConfig, DataFile
from promptembedder.contrast import FAMILIES, Family, MadeUpRow, contrast_rows
from promptembedder.errors import PromptEmbedderError
from promptembedder.text import is_unicode

DATA_ENV = "PROMPTEMBEDDER_DATA"
_HUB_MARK = "hub:"


@dataclass(frozen=True)
class Row:
    """One checked training row."""

    query: str
    pos: tuple[str, ...]
    neg: tuple[str, ...]
    instruction: str


@dataclass(frozen=True)
class TrainingData:
    """Training datasets by name, and the instruction of each of their columns.

    Attributes:
        datasets: columns `anchor`, `positive` and, where the rows have some, `negative_1`, `negative_2`, ...
        prompts: dataset name -> column -> instruction, as sentence-transformers takes it.
        aspects: instruction -> what its rows are alike in, where the settings say.
        own_negatives: datasets whose rows do without in-batch negatives.
        opposed: datasets that hold two rows in each: beside those columns the same with `other_` before the name, the
            anchor again under an instruction about something else.
    """

    datasets: DatasetDict
    prompts: dict[str, dict[str, str]]
    aspects: dict[str, str] = field(default_factory=dict)
    own_negatives: frozenset[str] = frozenset()
    opposed: frozenset[str] = frozenset()

    @property
    def instructions(self) -> list[str]:
        """The distinct instructions, sorted."""
        return sorted({text for columns in self.prompts.values() for text in columns.values()})


def load_training_data(
    config: DataConfig, document_instruction: str, seed: int, *, families: Sequence[Family] = FAMILIES
) -> TrainingData:
    """Read all sources and make one dataset per instruction, so that batches never mix instructions.

    Args:
        config: the sources.
        document_instruction: for `pos` and `neg` of asymmetric sources.
        seed: draws the rows kept by a weight that is no whole number, and the made-up ones.
        families: of the made-up rows.

    Raises:
        PromptEmbedderError: no sources; a file missing, damaged or with a bad row: names file, line and field.
    """
    if not config.has_rows:
        raise PromptEmbedderError("data.files is empty; name at least one file of training rows, or data.contrast_rows")
    tables = _Tables()
    for source in config.files:
        drawn = random.Random(f"{seed} {source.path}")
        for row in _weighted(list(read_rows(source, config.root)), source.weight, drawn):
            known = tables.aspects.get(row.instruction, source.aspect)
            if source.aspect is not None and known != source.aspect:
                raise PromptEmbedderError(
                    f"data.files name two aspects, {known!r} and {source.aspect!r}, for the "
                    f"instruction {row.instruction!r}"
                )
            side = document_instruction if source.asymmetric else row.instruction
            tables.add(row, side, source.aspect, config.max_negatives, own_negatives=not source.in_batch_negatives)
    own = not config.contrast_in_batch_negatives
    for pair in contrast_rows(config.contrast_rows, seed, families):
        # A copy of the one negative would count as one candidate more where a row's own are all that there are.
        tables.add_opposed(pair, 1 if own else max(config.max_negatives, 1), own_negatives=own)
    if not tables.columns:
        sources = ", ".join(str(f.path) for f in config.files) or "data.contrast_rows, which counts rows in twos"
        raise PromptEmbedderError(f"no rows to train on in {sources}")
    return tables.finished()


@dataclass(frozen=True)
class _Kind:
    """What the rows of one dataset have in common: columns with their instructions, and which candidates count."""

    prompts: tuple[tuple[str, str], ...]
    own_negatives: bool
    opposed: bool = False


class _Tables:
    """Rows on their way into one dataset per kind."""

    def __init__(self) -> None:
        self.columns: dict[_Kind, dict[str, list[str]]] = {}
        self.aspects: dict[str, str] = {}

    def add(self, row: Row, side: str, aspect: str | None, max_negatives: int, *, own_negatives: bool = False) -> None:
        """A row; `side` is the instruction of its positives and negatives."""
        # A copy would count as one candidate more where a row's own are all that there are.
        negatives = list(row.neg[: max(max_negatives, 1)]) if own_negatives else _negatives(row, max_negatives)
        if aspect is not None:
            self.aspects.setdefault(row.instruction, aspect)
        prompts = {"anchor": row.instruction} | dict.fromkeys(["positive", *_negative_columns(len(negatives))], side)
        kind = _Kind(tuple(prompts.items()), own_negatives)
        for positive in row.pos:
            self._append(kind, [row.query, positive, *negatives])

    def add_opposed(self, pair: tuple[MadeUpRow, MadeUpRow], negatives: int, *, own_negatives: bool = False) -> None:
        """Two rows as one: their batches pull both ways at once, so that neither aspect wins for all instructions."""
        prompts: dict[str, str] = {}
        for mark, made in zip(("", "other_"), pair, strict=True):
            self.aspects.setdefault(made.instruction, made.aspect)
            columns = ["anchor", "positive", *_negative_columns(negatives)]
            prompts |= {f"{mark}{column}": made.instruction for column in columns}
        texts = [text for made in pair for text in (made.query, made.positive, *negatives * [made.negative])]
        self._append(_Kind(tuple(prompts.items()), own_negatives, opposed=True), texts)

    def _append(self, kind: _Kind, texts: Sequence[str]) -> None:
        table = self.columns.setdefault(kind, defaultdict(list))
        for (column, _), text in zip(kind.prompts, texts, strict=True):
            table[column].append(text)

    def finished(self) -> TrainingData:
        """The datasets of all rows."""
        # Short names: sentence-transformers prints them, and a dataset name may not hold every character.
        names = {kind: f"task_{n + 1}" for n, kind in enumerate(self.columns)}
        return TrainingData(
            DatasetDict({names[kind]: Dataset.from_dict(dict(table)) for kind, table in self.columns.items()}),
            {name: dict(kind.prompts) for kind, name in names.items()},
            self.aspects,
            frozenset(name for kind, name in names.items() if kind.own_negatives),
            frozenset(name for kind, name in names.items() if kind.opposed),
        )


def _negative_columns(count: int) -> list[str]:
    return [f"negative_{n + 1}" for n in range(count)]


def read_rows(source: DataFile, root: str | None) -> Iterator[Row]:
    """Read and check the rows of one source.

    Raises:
        PromptEmbedderError: as in `load_training_data`.
    """
    for where, record in itertools.islice(_records(source.path, root), source.max_rows):
        yield Row(
            query=_text(record, "query", where),
            pos=_texts(record, "pos", where, at_least=1),
            neg=_negatives_of(record, source, where),
            instruction=source.instruction
            if record.get("instruction") is None and source.instruction is not None
            else _instruction(record, where),
        )


def _negatives_of(record: dict[str, Any], source: DataFile, where: str) -> tuple[str, ...]:
    negatives = _texts(record, "neg", where, at_least=0)
    if not negatives and not source.in_batch_negatives:
        raise PromptEmbedderError(f"{where}: field 'neg' is empty; with in_batch_negatives off every row needs one")
    return negatives


def _instruction(record: dict[str, Any], where: str) -> str:
    if record.get("instruction") is None:
        raise PromptEmbedderError(
            f"{where}: field 'instruction' is missing; give rows one, or their file (data.files: instruction)"
        )
    return _text(record, "instruction", where)


def read_scored_pairs(path: str, root: str | None) -> tuple[list[str], list[str], list[float]]:
    """Read sentence pairs with a similarity score: fields `sentence1`, `sentence2`, `score`.

    Raises:
        PromptEmbedderError: file missing or damaged, field missing, score no finite number.
    """
    first, second, scores = [], [], []
    for where, record in _records(path, root):
        score = record.get("score")
        if isinstance(score, bool) or not isinstance(score, (int, float)) or not abs(score) < 1e300:
            raise PromptEmbedderError(f"{where}: field 'score' is {repr(score)[:40]}, expected a number")
        first.append(_text(record, "sentence1", where))
        second.append(_text(record, "sentence2", where))
        scores.append(float(score))
    if not scores:
        raise PromptEmbedderError(f"{path} holds no pairs")
    if len(set(scores)) < 2:
        raise PromptEmbedderError(
            f"{path} holds one score only ({scores[0]}); a rank correlation needs two that differ"
        )
    return first, second, scores


def data_path(path: str, root: str | None) -> Path:
    """A data file's place: absolute, or below `root`, `$PROMPTEMBEDDER_DATA` or the current folder."""
    base = root or os.environ.get(DATA_ENV) or "."
    return Path(base).expanduser() / Path(path).expanduser()


def read_lines(path: Path) -> Iterator[str]:
    """Yield the lines of a text file, plain or gzip, with their ends; a byte order mark is none of the text.

    Raises:
        PromptEmbedderError: file missing, gzip damaged, not UTF-8.
    """
    opened = gzip.open if path.suffix == ".gz" else open
    read = 0
    try:
        # Lines end where they end on standard input: a lone carriage return is part of a text.
        with opened(path, "rt", encoding="utf-8-sig", newline="\n") as lines:
            for line in lines:
                read += 1
                yield line
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise PromptEmbedderError(f"{path} is a damaged gzip file: {error}") from None
    except UnicodeDecodeError as error:
        # Read ahead in blocks, so which line it is in is not known.
        raise PromptEmbedderError(f"{path} is not UTF-8 text: {error.reason} after line {read}") from None
    except OSError as error:
        raise PromptEmbedderError(f"{path} cannot be read: {error.strerror or error}") from None


def read_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (place, value) for every line of a JSONL file, plain or gzip; blank lines are skipped.

    Raises:
        PromptEmbedderError: as `read_lines`, or a line is not JSON.
    """
    for number, line in enumerate(read_lines(path), 1):
        if line.strip():
            where = f"{path}, line {number}"
            yield where, parse_json(line, where)


def parse_json(line: str, where: str) -> Any:
    """Read one JSON value.

    Raises:
        PromptEmbedderError: not JSON, or nested or numbered beyond what Python reads.
    """
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise PromptEmbedderError(f"{where}: not JSON ({error.msg} at column {error.colno})") from None
    except (ValueError, RecursionError) as error:
        raise PromptEmbedderError(f"{where}: JSON that cannot be read ({error})") from None


def _records(path: str, root: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    for where, record in _raw_records(path, root):
        if not isinstance(record, dict):
            raise PromptEmbedderError(f"{where}: expected an object with named fields, found {type(record).__name__}")
        yield where, record


def _raw_records(path: str, root: str | None) -> Iterator[tuple[str, Any]]:
    if path.startswith(_HUB_MARK):
        name = path.removeprefix(_HUB_MARK)
        if not name:
            raise PromptEmbedderError(f"data file {path!r} names no dataset, expected hub:owner/name")
        try:
            table = load_dataset(name, split="train")
        except Exception as error:  # of the library, of its HTTP client, of whatever reads the files
            reason = " ".join(str(error).split())[:300]
            raise PromptEmbedderError(f"dataset {name!r} could not be fetched from the hub: {reason}") from error
        yield from ((f"{path}, row {n + 1}", row) for n, row in enumerate(table))
        return
    file = data_path(path, root)
    if not file.is_file():
        hint = f"; set data.root or {DATA_ENV}" if not (root or os.environ.get(DATA_ENV) or file.is_absolute()) else ""
        raise PromptEmbedderError(f"data file {file} cannot be read: No such file{hint}")
    if file.suffix == ".parquet":
        yield from _parquet(file)
    elif file.name.endswith((".jsonl", ".jsonl.gz")):
        yield from read_jsonl(file)
    else:
        raise PromptEmbedderError(f"data file {file}: unknown kind, expected .jsonl, .jsonl.gz, .parquet or hub:NAME")


def _parquet(file: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(file)
    except (OSError, pyarrow.ArrowException) as error:
        raise PromptEmbedderError(
            f"data file {file} cannot be read as Parquet: {getattr(error, 'strerror', None) or error}"
        ) from error
    yield from ((f"{file}, row {n + 1}", row) for n, row in enumerate(table.to_pylist()))


def _weighted(rows: Sequence[Row], weight: float, drawn: random.Random) -> list[Row]:
    whole, part = divmod(weight, 1)
    return list(rows) * int(whole) + drawn.sample(list(rows), round(part * len(rows)))


def _negatives(row: Row, at_most: int) -> list[str]:
    """Exactly `at_most` negatives, a short list repeated in turn; none where the row has none."""
    return [row.neg[n % len(row.neg)] for n in range(at_most)] if row.neg else []


def _text(record: dict[str, Any], field: str, where: str) -> str:
    if field not in record or record[field] is None:
        raise PromptEmbedderError(f"{where}: field {field!r} is missing")
    value = record[field]
    if not isinstance(value, str) or not value.strip() or not is_unicode(value):
        raise PromptEmbedderError(f"{where}: field {field!r} is {value!r}, expected a non-empty string")
    return value


def _texts(record: dict[str, Any], field: str, where: str, at_least: int) -> tuple[str, ...]:
    values = record.get(field)
    if values is None:
        values = []
    if not isinstance(values, list) or not all(isinstance(v, str) and v.strip() and is_unicode(v) for v in values):
        raise PromptEmbedderError(f"{where}: field {field!r} must be a list of non-empty strings")
    if len(values) < at_least:
        raise PromptEmbedderError(f"{where}: field {field!r} is empty, expected at least {at_least} text")
    return tuple(values)
