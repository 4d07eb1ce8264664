"""Training rows and scored pairs, from files or the hub, checked and sorted into one dataset per instruction."""

from __future__ import annotations

import itertools
import logging
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset, DatasetDict

from promptembedder.data.families import FAMILIES, Family
from promptembedder.data.made_up import MadeUpRow, contrast_rows
from promptembedder.data.readers import records, text_field, texts_field
from promptembedder.data.settings import DataConfig, DataFile
from promptembedder.errors import PromptEmbedderError
from promptembedder.text import composed

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Row:
    """One checked training row."""

    query: str
    pos: tuple[str, ...]
    neg: tuple[str, ...]
    instruction: str


@dataclass(frozen=True)
class Neighbourhoods:
    """Which texts of a dataset lie near each other, so that batches are drawn among neighbours.

    Attributes:
        of: number of its neighbourhood, for each row.
        draws: rows drawn in an epoch.
    """

    of: tuple[int, ...]
    draws: int


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
        neighbourhoods: datasets of texts with a teacher's embeddings, in columns `anchor` and `label`.
    """

    datasets: DatasetDict
    prompts: dict[str, dict[str, str]]
    aspects: dict[str, str] = field(default_factory=dict)
    own_negatives: frozenset[str] = frozenset()
    opposed: frozenset[str] = frozenset()
    neighbourhoods: Mapping[str, Neighbourhoods] = field(default_factory=dict)

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
        PromptEmbedderError: no sources; a file missing, damaged or with a bad row: names file, line and field; with
            `config.strict` a row that contradicts itself.
    """
    if not config.has_rows:
        raise PromptEmbedderError("data.files is empty; name at least one file of training rows, or data.contrast_rows")
    tables, doubtful = _Tables(), _DoubtfulRows(config.strict)
    for source in config.files:
        drawn = random.Random(f"{seed} {source.path}")
        for row in _weighted(list(read_rows(source, config.root, doubtful.look)), source.weight, drawn):
            known = tables.aspects.get(row.instruction, source.aspect)
            if source.aspect is not None and known != source.aspect:
                raise PromptEmbedderError(
                    f"data.files name two aspects, {known!r} and {source.aspect!r}, for the "
                    f"instruction {row.instruction!r}"
                )
            side = document_instruction if source.asymmetric else row.instruction
            tables.add(row, side, source.aspect, config.max_negatives, own_negatives=not source.in_batch_negatives)
    doubtful.report()
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


class _DoubtfulRows:
    """Counts rows that no embedder can learn from, because one text stands where two that differ should.

    Texts are compared without blanks around them, in Unicode's form NFC.
    """

    def __init__(self, strict: bool) -> None:
        self._strict = strict
        self._counts: Counter[str] = Counter()
        self._first = ""

    def look(self, row: Row, where: str, source: DataFile) -> None:
        """Count a row, or refuse it."""
        query, pos, neg = _same_form([row.query]), _same_form(row.pos), _same_form(row.neg)
        found = {
            "`pos` equal to `query`": query & pos,
            "`neg` equal to `pos`": neg & pos,
            # Of asymmetric sources the text is read under two instructions: a question does not answer itself.
            "`neg` equal to `query`": set() if source.asymmetric else neg & query,
        }
        kinds = [kind for kind, same in found.items() if same]
        if kinds and self._strict:
            raise PromptEmbedderError(f"{where}: {' and '.join(kinds)}; mend the row, or set data.strict=false")
        self._counts.update(kinds)
        self._first = self._first or (where if kinds else "")

    def report(self) -> None:
        """Warn of what was found, in one line."""
        if self._counts:
            counted = ", ".join(f"{count} with {kind}" for kind, count in self._counts.items())
            logger.warning("rows that teach nothing or the wrong thing: %s (first: %s)", counted, self._first)


def _same_form(texts: Sequence[str]) -> set[str]:
    return {composed(text).strip() for text in texts}


def read_rows(
    source: DataFile, root: str | None, look: Callable[[Row, str, DataFile], None] | None = None
) -> Iterator[Row]:
    """Read and check the rows of one source; `look` is shown each, with its place.

    Raises:
        PromptEmbedderError: as in `load_training_data`.
    """
    for where, record in itertools.islice(records(source.path, root), source.max_rows):
        row = Row(
            query=text_field(record, "query", where),
            pos=texts_field(record, "pos", where, at_least=1),
            neg=_negatives_of(record, source, where),
            instruction=source.instruction
            if record.get("instruction") is None and source.instruction is not None
            else _instruction(record, where),
        )
        if look is not None:
            look(row, where, source)
        yield row


def _negatives_of(record: dict[str, Any], source: DataFile, where: str) -> tuple[str, ...]:
    negatives = texts_field(record, "neg", where, at_least=0)
    if not negatives and not source.in_batch_negatives:
        raise PromptEmbedderError(f"{where}: field 'neg' is empty; with in_batch_negatives off every row needs one")
    return negatives


def _instruction(record: dict[str, Any], where: str) -> str:
    if record.get("instruction") is None:
        raise PromptEmbedderError(
            f"{where}: field 'instruction' is missing; give rows one, or their file (data.files: instruction)"
        )
    return text_field(record, "instruction", where)


def _weighted(rows: Sequence[Row], weight: float, drawn: random.Random) -> list[Row]:
    whole, part = divmod(weight, 1)
    return list(rows) * int(whole) + drawn.sample(list(rows), round(part * len(rows)))


def _negatives(row: Row, at_most: int) -> list[str]:
    """Exactly `at_most` negatives, a short list repeated in turn; none where the row has none."""
    return [row.neg[n % len(row.neg)] for n in range(at_most)] if row.neg else []
