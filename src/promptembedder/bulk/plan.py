"""What a job has to do: its files, its settings beside those of the output, and what the output holds already."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from promptembedder.bulk.blocks import BadFileError, Block, peek_columns, read_blocks
from promptembedder.bulk.columns import Columns
from promptembedder.bulk.encode_block import Done, Failed, done_before
from promptembedder.bulk.job import Job
from promptembedder.bulk.output import MANIFEST, PARTS, Output, part_name
from promptembedder.bulk.sources import Kind, SourceFile, find_files
from promptembedder.errors import PromptEmbedderError

FORMAT = 1
RUNNING, COMPLETE, INCOMPLETE = "running", "complete", "incomplete"
# Rows of a block: at most, and at least; and blocks of a corpus, if it is not too large for that number.
_MOST_ROWS, _LEAST_ROWS, _BLOCKS = 8192, 128, 64
_SAMPLED_ROWS = 256
_LISTED = 3


@dataclass(frozen=True)
class Plan:
    """A job on a corpus.

    Attributes:
        job: its settings.
        output: where parts go.
        files: of the corpus, in order.
        columns: of all files.
        part_rows: rows of a block.
        identity: all that parts of one output have in common.
        parts: names of the parts that are there.
        recorded: by file, what an earlier run finished.
        state: of the earlier run; unset: there was none.
        counts: of rows, by an earlier run that has ended.
    """

    job: Job
    output: Output
    files: tuple[SourceFile, ...]
    columns: Columns
    part_rows: int
    identity: dict[str, Any]
    parts: frozenset[str]
    recorded: Mapping[str, Any]
    state: str | None
    counts: Mapping[str, int]

    def is_done(self, file: SourceFile) -> bool:
        """Whether an earlier run has finished a file, and neither the file nor its parts have changed since."""
        record = self.recorded.get(file.url)
        return (
            isinstance(record, dict)
            and record.get("version") == file.version
            and self.parts.issuperset(record.get("parts", [""]))
        )


def make_plan(
    job: Job, sources: Sequence[str], output: Output, kind: Kind | None, text: str, identity: str | None
) -> Plan:
    """Look at corpus and output; nothing is written.

    Raises:
        PromptEmbedderError: the corpus cannot be read, or the output holds another job or something else.
    """
    if output.local is not None and output.local.exists() and not output.local.is_dir():
        raise PromptEmbedderError(f"output {output} is a file, expected a folder")
    files = find_files(sources, kind, output.url)
    manifest = read_manifest(output)
    columns = _columns(files, text, identity, job.keep)
    rows = manifest["job"].get("part_rows") if manifest else None
    part_rows = rows or _part_rows(files, columns)
    wanted = job.identity(columns, sources, part_rows)
    if manifest is not None:
        _refuse_other(output, manifest["job"], wanted)
    return Plan(
        *(job, output, tuple(files), columns, part_rows, wanted, frozenset(output.names(PARTS))),
        *((manifest or {}).get("files", {}), (manifest or {}).get("state"), (manifest or {}).get("counts") or {}),
    )


def read_manifest(output: Output) -> dict[str, Any] | None:
    """The manifest of an output; None where there is nothing.

    Raises:
        PromptEmbedderError: there is something, and no manifest of ours.
    """
    found = output.read_json(MANIFEST)
    if found is None:
        others = [name for name in output.names() if name != PARTS or output.names(PARTS)]
        if others:  # without a manifest nobody knows what parts were made of
            raise PromptEmbedderError(f"output {output} holds {others[0]} and no {MANIFEST}; choose an empty folder")
        return None
    if not isinstance(found, dict) or found.get("format") != FORMAT or not isinstance(found.get("job"), dict):
        raise PromptEmbedderError(f"{output}/{MANIFEST} is no manifest of format {FORMAT}; choose an empty folder")
    return found


def _refuse_other(output: Output, held: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    for name, value in wanted.items():
        if held.get(name) != value:
            before, now = _difference(held.get(name), value)
            raise PromptEmbedderError(
                f"output {output} holds another job: {name} is {before} there, and {now} here; choose another folder"
            )


def _difference(one: Any, other: Any) -> tuple[Any, Any]:
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        names = [name for name in dict.fromkeys([*one, *other]) if one.get(name) != other.get(name)]
        return {n: one.get(n) for n in names[:_LISTED]}, {n: other.get(n) for n in names[:_LISTED]}
    return one, other


def _columns(files: Sequence[SourceFile], text: str, identity: str | None, keep: tuple[str, ...]) -> Columns:
    bad: BadFileError | None = None
    for file in files:
        try:
            columns = peek_columns(file, text, identity, keep)
        except BadFileError as error:
            bad = bad or error
            continue
        if columns is not None:
            return columns
    raise bad or PromptEmbedderError(f"no rows in {len(files)} files, the first is {files[0].name}")


def _part_rows(files: Sequence[SourceFile], columns: Columns) -> int:
    """Rows of a block, a power of two; few where the corpus is small, so that all workers have some."""
    sizes = 0.0
    for file in files:
        try:
            block = next(read_blocks(file, columns, _SAMPLED_ROWS))
        except BadFileError:
            continue
        rows = block.table.num_rows + len(block.rejects)
        if rows:
            # The end of what has been read is known in steps of a buffer only, so few rows can be a large share.
            data = block.table.nbytes / rows if file.kind == "parquet" or not block.end else file.size / rows
            sizes = sum(one.size for one in files) / max(1.0, data)
            break
    wanted = max(1, int(sizes) // _BLOCKS)
    return min(_MOST_ROWS, max(_LEAST_ROWS, 1 << (wanted - 1).bit_length()))


# -- the one way that blocks come to be -------------------------------------------------------------------------


@dataclass(frozen=True)
class Reader:
    """Reads files of a plan; travels to the workers of a cluster.

    Attributes:
        columns: of all files.
        part_rows: rows of a block.
        parts: names of the parts that are there.
        strict: raise where a row or a file cannot be used.
    """

    columns: Columns
    part_rows: int
    parts: frozenset[str]
    strict: bool

    def read(
        self, files: Sequence[SourceFile], limit: int | None = None
    ) -> Iterator[tuple[Block, str] | Done | Failed]:
        """Blocks that have no part, with their digests, and what has been done before or cannot be.

        Args:
            files: one after the other.
            limit: stop after this number of rows.

        Raises:
            PromptEmbedderError: with `strict`, what else would be left out.
        """
        left = limit
        for file in files:
            try:
                for block in read_blocks(file, self.columns, self.part_rows, left):
                    if self.strict and block.rejects:
                        first = block.rejects[0]
                        raise PromptEmbedderError(f"{file.url}, {place(file, first.line)}: {first.reason}")
                    digest = block.digest()
                    known = part_name(file.key, block.number, digest) in self.parts
                    yield done_before(block, digest) if known else (block, digest)
                    if left is not None:
                        left -= block.table.num_rows + len(block.rejects)
            except BadFileError as error:
                if self.strict:
                    raise
                yield Failed(file.url, str(error))
            if left is not None and left <= 0:
                return


def place(file: SourceFile, line: int) -> str:
    """A row's place in its file, for people."""
    return f"{'row' if file.kind == 'parquet' else 'line'} {line}"
