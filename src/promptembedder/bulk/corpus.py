"""A corpus of files to a folder of embeddings; what `promptembedder encode -o FOLDER/` does."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from promptembedder import lock
from promptembedder.bulk import settle
from promptembedder.bulk.blocks import read_blocks
from promptembedder.bulk.columns import TEXT
from promptembedder.bulk.disk_sort import DiskSort
from promptembedder.bulk.encode_block import BlockEncoder, Digests, Done, Failed
from promptembedder.bulk.job import Job
from promptembedder.bulk.output import MANIFEST, PARTS, RANGES, REJECTS, Output
from promptembedder.bulk.plan import COMPLETE, FORMAT, INCOMPLETE, RUNNING, Plan, Reader, make_plan
from promptembedder.bulk.progress_of_job import JobProgress
from promptembedder.bulk.reuse import Known, index_parts
from promptembedder.bulk.sources import SourceFile, whole_address
from promptembedder.errors import PromptEmbedderError
from promptembedder.model.folder import describe

if TYPE_CHECKING:
    from promptembedder.bulk.sources import Kind
    from promptembedder.bulk.text_embedder import Ranges

# The manifest is written so often while a job runs; what is not in it is found in the parts.
_MANIFEST_SECONDS = 30.0
# Texts that the ranges of int8 are from: most texts of a file, most files.
_RANGE_TEXTS, _RANGE_FILES = 128, 8


class Runner(Protocol):
    """Where a job runs: in this process, or on a cluster."""

    def open(self, plan: Plan) -> None:
        """Be ready to embed; errors of model and cluster come from here, before anything is written."""

    def sample(self, texts: Sequence[str]) -> dict[str, NDArray[np.float32]]:
        """Embeddings of a few texts under each instruction."""

    def run(
        self, files: Sequence[SourceFile], reader: Reader, known: Known | None, ranges: Ranges, limit: int | None
    ) -> Generator[Done | Failed | Digests, None, None]:
        """Read files and write the parts that are missing."""


class LocalRunner:
    """Runs a job in this process."""

    def open(self, plan: Plan) -> None:
        """Open the model."""
        from promptembedder.bulk.text_embedder import TextEmbedder

        self._embedder, self._output = TextEmbedder(plan.job), plan.output

    def sample(self, texts: Sequence[str]) -> dict[str, NDArray[np.float32]]:
        """Embeddings of a few texts under each instruction."""
        return self._embedder.embed(texts)

    def run(
        self, files: Sequence[SourceFile], reader: Reader, known: Known | None, ranges: Ranges, limit: int | None
    ) -> Generator[Done | Failed | Digests, None, None]:
        """Read files and write the parts that are missing."""
        yield Digests(self._embedder.digests())
        self._embedder.ranges = ranges
        encoder = BlockEncoder(self._embedder, self._output, known)
        for found in reader.read(files, limit):
            yield encoder.encode(*found) if isinstance(found, tuple) else found


@dataclass
class Outcome:
    """What a job has done.

    Attributes:
        rows: rows of the corpus that the output holds.
        written: rows of the output; more than `rows` where texts are in chunks.
        rejected: rows that were left out, in `rejects.jsonl`.
        embedded: rows of the output that this run has read by the model.
        skipped: rows of the output that an earlier run had embedded.
        complete: whether the output holds the whole corpus.
    """

    rows: int
    written: int
    rejected: int
    embedded: int
    skipped: int
    complete: bool


def encode_corpus(
    job: Job,
    sources: Sequence[str | Path],
    output: str | Path,
    *,
    kind: Kind | None = None,
    text_field: str = "text",
    id_field: str | None = None,
    limit: int | None = None,
    strict: bool = False,
    runner: Runner | None = None,
) -> Outcome:
    """Embed a corpus; a run that was stopped, or whose corpus has grown, goes on with the same arguments.

    Args:
        job: model, instructions and what else decides what is stored.
        sources: files, folders, globs and addresses of Parquet, JSONL, CSV or lines, all of one format.
        output: folder or address of one: `parts/*.parquet`, `manifest.json` and `rejects.jsonl`.
        kind: format of all files; unset: by their endings.
        text_field: column of the text.
        id_field: column of the id; unset: `id`, or ids made up of file and row where the first row has none.
        limit: stop after this number of rows.
        strict: stop at the first row that cannot be used; else it goes to `rejects.jsonl`.
        runner: where the job runs; unset: in this process.

    Raises:
        PromptEmbedderError: options contradict each other; model or corpus cannot be read; the output holds another
            job; a file cannot be read to its end, which is reported after all others are done, unless `strict`.
    """
    runner = runner or LocalRunner()
    place = Output(whole_address(str(output)))
    job.check_against(describe(job.model))
    addresses = [whole_address(str(source)) for source in sources]
    plan = make_plan(job, addresses, place, kind, text_field, id_field)
    todo = _todo(plan)
    if not todo and plan.state == COMPLETE and len(plan.recorded) == len(plan.files):
        return _nothing_new(plan, strict)
    with ExitStack() as stack:
        if todo:
            runner.open(plan)
        if place.local is not None:
            stack.enter_context(lock.held(place.local))
            # Another job may have written here while the model was opening.
            opened, plan = bool(todo), make_plan(job, addresses, place, kind, text_field, id_field)
            todo = _todo(plan)
            if todo and not opened:
                runner.open(plan)
        reread = {file.url for file in todo}
        run = _Run(plan, {file.url: plan.recorded[file.url] for file in plan.files if file.url not in reread})
        run.write_manifest(RUNNING)
        ranges = _ranges(plan, runner) if todo else {}
        known = None
        if todo and plan.parts:
            known = index_parts(place, sorted(plan.parts), stack.enter_context(DiskSort()))
        reader = Reader(plan.columns, plan.part_rows, plan.parts, strict)
        if todo:
            with closing(runner.run(todo, reader, known, ranges, limit)) as found:
                run.follow(found, todo, limit)
        return run.finish(strict)


def _todo(plan: Plan) -> list[SourceFile]:
    """Files to read."""
    new = {file.url for file in plan.files if not plan.is_done(file)}
    if not new and plan.recorded.keys() <= {file.url for file in plan.files}:
        return []
    # A row that was left out because of another one's id may be the only one now.
    less = {url for url, record in plan.recorded.items() if any(n.endswith(settle.LESS) for n in record["parts"])}
    return [file for file in plan.files if file.url in new | less]


def _nothing_new(plan: Plan, strict: bool) -> Outcome:
    counts = plan.counts
    if strict and counts["rejected"]:
        raise PromptEmbedderError(f"{counts['rejected']} rows are left out, see {plan.output}/{REJECTS}")
    return Outcome(counts["rows"], counts["written"], counts["rejected"], 0, counts["written"], True)


def _ranges(plan: Plan, runner: Runner) -> dict[str, NDArray[np.float32]]:
    """Ranges of values for int8: those that the output holds, or of a sample of the corpus."""
    if plan.job.precision != "int8":
        return {}
    held = plan.output.read_json(RANGES)
    if held is None:
        from promptembedder.bulk.text_embedder import ranges_of

        texts: list[str] = []
        step = max(1, len(plan.files) // _RANGE_FILES)
        for file in plan.files[::step]:
            try:
                block = next(read_blocks(file, plan.columns, _RANGE_TEXTS, _RANGE_TEXTS))
            except PromptEmbedderError:  # reported when its turn comes
                continue
            texts += block.table[TEXT].to_pylist()
        if not texts:
            raise PromptEmbedderError("no texts to take the ranges of int8 from")
        found = ranges_of(runner.sample(texts))
        held = {name: {"least": pair[0].tolist(), "greatest": pair[1].tolist()} for name, pair in found.items()}
        plan.output.write_json(RANGES, held)
    try:
        return {
            name: np.array([held[name]["least"], held[name]["greatest"]], np.float32) for name in plan.job.instructions
        }
    except (KeyError, TypeError, ValueError) as error:
        raise PromptEmbedderError(
            f"{plan.output}/{RANGES} holds no ranges of this job; choose an empty folder"
        ) from error


@dataclass
class _File:
    """What is known of a file while a job runs."""

    parts: dict[int, Done] = field(default_factory=dict)
    last: int | None = None

    @property
    def done(self) -> bool:
        return self.last is not None and len(self.parts) == self.last + 1

    def record(self, version: str) -> dict[str, Any]:
        blocks = [self.parts[number] for number in sorted(self.parts)]
        return {"version": version, "parts": [one.part for one in blocks]}


class _Run:
    """A job while it runs.

    Args:
        plan: what there is to do.
        records: of files that are done.
    """

    def __init__(self, plan: Plan, records: dict[str, Any]) -> None:
        self.plan, self.records = plan, records
        self.digests: Mapping[str, str | None] = {}
        self.failed: list[Failed] = []
        self.embedded = 0
        self._dropped = 0  # of these, because an earlier row has their id
        self._files: dict[str, _File] = {}
        self._versions = {file.url: file.version for file in plan.files}

    def follow(self, found: Iterable[Done | Failed | Digests], todo: Sequence[SourceFile], limit: int | None) -> None:
        """Take note of what is done, and show it."""
        written = time.monotonic()
        with JobProgress(todo, limit) as shown:
            for one in found:
                if isinstance(one, Digests):
                    self.digests = one.digests
                elif isinstance(one, Failed):
                    self.failed.append(one)
                else:
                    self._take(one)
                    shown.done(one)
                if time.monotonic() - written > _MANIFEST_SECONDS:
                    self.write_manifest(RUNNING)
                    written = time.monotonic()

    def _take(self, done: Done) -> None:
        file = self._files.setdefault(done.url, _File())
        if done.number not in file.parts:  # else a block that a cluster has done twice
            self.embedded += done.embedded
        file.parts[done.number] = done
        file.last = done.number if done.end else file.last
        if file.done:
            self.records[done.url] = file.record(self._versions[done.url])

    def write_manifest(self, state: str, totals: settle.Totals | None = None) -> None:
        """Write down what is done."""
        before = self.plan.output.read_json(MANIFEST) or {}
        job = self.plan.job
        digests = self.digests or {one["name"]: one["digest"] for one in before.get("instructions", [])}
        self.plan.output.write_json(
            MANIFEST,
            {
                "format": FORMAT,
                "state": state,
                "model": str(job.model),
                "counts": None if totals is None else vars(totals),
                "instructions": [
                    {"name": name, "instruction": text, "digest": digests.get(name)}
                    for name, text in job.instructions.items()
                ],
                "job": self.plan.identity,
                "files": self.records,
            },
        )

    def finish(self, strict: bool) -> Outcome:
        """Settle what several parts have to agree on, and say how it went."""
        output = self.plan.output
        whole = not self.failed and len(self.records) == len(self.plan.files)
        if whole:
            held = {name for record in self.records.values() for name in record["parts"]}
            for name in output.names(PARTS):
                if name not in held:
                    output.remove(f"{PARTS}/{name}")
            if self.plan.columns.id is not None:
                self._drop_repeats(strict)
        else:
            self._remove_replaced()
        parts = self._parts() if whole else output.names(PARTS)
        totals = settle.write_rejects(output, parts)
        self.write_manifest(COMPLETE if whole else INCOMPLETE, totals)
        if self.failed:
            bad, files, reason = len(self.failed), len(self.plan.files), self.failed[0].reason
            raise PromptEmbedderError(f"{bad} of {files} files cannot be read, the others are done: {reason}")
        skipped = totals.written - (self.embedded - self._dropped)
        return Outcome(totals.rows, totals.written, totals.rejected, self.embedded, max(0, skipped), whole)

    def _remove_replaced(self) -> None:
        """Remove older parts of the blocks of this run: of another content, or cut elsewhere by `--limit`."""
        made = {block.part for file in self._files.values() for block in file.parts.values()}
        blocks = {name.rpartition("-")[0] for name in made}
        for name in self.plan.output.names(PARTS):
            block = name.removesuffix(settle.LESS).removesuffix(".parquet").rpartition("-")[0]
            if name not in made and block in blocks:
                self.plan.output.remove(f"{PARTS}/{name}")

    def _parts(self) -> list[str]:
        return [name for file in self.plan.files for name in self.records[file.url]["parts"]]

    def _drop_repeats(self, strict: bool) -> None:
        renamed = settle.drop_repeats(self.plan.output, self._parts(), strict)
        new = {block.part for file in self._files.values() for block in file.parts.values() if block.embedded}
        self._dropped = sum(rows for part, (_, rows) in renamed.items() if part in new)
        for record in self.records.values():
            record["parts"] = [renamed[name][0] if name in renamed else name for name in record["parts"]]
