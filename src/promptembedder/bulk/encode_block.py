"""A block of a corpus to a part of the output: what one process and every actor of a cluster do alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from promptembedder.bulk.blocks import Block, Reject
from promptembedder.bulk.columns import TEXT
from promptembedder.bulk.output import Output, part_name
from promptembedder.bulk.reuse import Known, Reuse, digest_of

if TYPE_CHECKING:
    from promptembedder.bulk.text_embedder import Chunk, TextEmbedder


@dataclass(frozen=True)
class Done:
    """A block whose part is there.

    Attributes:
        url: of its file.
        number: of the block in its file.
        part: name of its part.
        rows: rows of the corpus in it.
        rejected: rows that were left out.
        embedded: rows whose text was read by the model.
        end: no block of the file comes after it.
        share: of the file that has been read by its end.
    """

    url: str
    number: int
    part: str
    rows: int
    rejected: int
    embedded: int
    end: bool
    share: float


@dataclass(frozen=True)
class Failed:
    """A file that could not be read to its end."""

    url: str
    reason: str


@dataclass(frozen=True)
class Digests:
    """Identity of the embeddings under each instruction, from whoever has opened the model."""

    digests: dict[str, str | None]


def done_before(block: Block, digest: str) -> Done:
    """What there is to say of a block whose part is there already."""
    part = part_name(block.file.key, block.number, digest)
    rows, rejected = block.table.num_rows, len(block.rejects)
    return Done(block.file.url, block.number, part, rows, rejected, 0, block.end, block.share)


class BlockEncoder:
    """Writes parts.

    Args:
        embedder: an open model.
        output: where parts go.
        known: embeddings that the output holds already.
    """

    def __init__(self, embedder: TextEmbedder, output: Output, known: Known | None = None) -> None:
        self._embedder, self._output = embedder, output
        self._reuse = Reuse(known, list(embedder.job.instructions))

    def encode(self, block: Block, digest: str) -> Done:
        """Write the part of a block whose digest is known."""
        block = self._without_unreadable(block)
        texts, chunks, rows = self._texts(block.table[TEXT].to_pylist())
        digests = [digest_of(text) for text in texts]
        values, embedded = self._values(texts, digests)
        table = block.table.drop_columns([TEXT])
        table = table if chunks is None else table.take(rows)
        columns: dict[str, Any] = {"id": table["id"]}
        if chunks is not None:
            columns |= {
                "chunk": pa.array([one.number for one in chunks], pa.int32()),
                "start": pa.array([one.start for one in chunks], pa.int32()),
                "end": pa.array([one.end for one in chunks], pa.int32()),
            }
        columns |= {name: table[name] for name in self._embedder.job.keep}
        columns |= {name: _lists(column) for name, column in values.items()}
        columns["digest"] = pa.array(digests, pa.binary(16))
        part = part_name(block.file.key, block.number, digest)
        facts = {
            "source": block.file.url,
            "block": block.number,
            "rows": block.table.num_rows,
            "lines": _runs(block.lines),
            "rejects": [asdict(one) for one in block.rejects],
        }
        self._output.write_part(part, pa.table(columns), facts)
        rows_of_corpus, rejected = block.table.num_rows, len(block.rejects)
        return Done(block.file.url, block.number, part, rows_of_corpus, rejected, embedded, block.end, block.share)

    def _without_unreadable(self, block: Block) -> Block:
        texts = block.table[TEXT].to_pylist()
        wrong = {n: reason for n, text in enumerate(texts) if (reason := self._embedder.readable(text)) is not None}
        if not wrong:
            return block
        good = [n for n in range(len(texts)) if n not in wrong]
        rejects = [*block.rejects, *(Reject(block.lines[n], reason) for n, reason in wrong.items())]
        return Block(
            *(block.file, block.number, block.table.take(good), [block.lines[n] for n in good]),
            *(sorted(rejects, key=lambda one: one.line), block.end, block.share),
        )

    def _texts(self, texts: list[str]) -> tuple[list[str], list[Chunk] | None, list[int]]:
        """What is embedded, the spans of that in its texts, and which text each is of."""
        if self._embedder.job.chunk_tokens is None:
            return texts, None, list(range(len(texts)))
        spans = [(row, one) for row, text in enumerate(texts) for one in self._embedder.chunks(text)]
        chunks = [one for _, one in spans]
        return [texts[row][one.start : one.end] for row, one in spans], chunks, [row for row, _ in spans]

    def _values(self, texts: Sequence[str], digests: Sequence[bytes]) -> tuple[dict[str, NDArray[Any]], int]:
        """Stored values of texts, and how many the model has read."""
        found = self._reuse.find(digests)
        first: dict[bytes, int] = {}  # a text that stands there twice is read once
        for n, digest in enumerate(digests):
            if n not in found:
                first.setdefault(digest, n)
        new = list(first.values())
        fresh = self._embedder.stored(self._embedder.embed([texts[n] for n in new]))
        place = {digest: k for k, digest in enumerate(first)}
        fresh_rows = [n for n in range(len(texts)) if n not in found]
        values = {}
        for name, column in fresh.items():
            whole = np.empty((len(texts), column.shape[1]), column.dtype)
            if fresh_rows:
                whole[fresh_rows] = column[[place[digests[n]] for n in fresh_rows]]
            for n, stored in found.items():
                whole[n] = stored[name]
            values[name] = whole
        return values, len(fresh_rows)


def _lists(values_NS: NDArray[Any]) -> pa.Array:
    flat = pa.array(np.ascontiguousarray(values_NS).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, values_NS.shape[1])


def _runs(lines: list[int]) -> list[list[int]]:
    """Numbers that follow one another as (first, how many)."""
    found: list[list[int]] = []
    for line in lines:
        if found and line == found[-1][0] + found[-1][1]:
            found[-1][1] += 1
        else:
            found.append([line, 1])
    return found
