"""A job on a Ray cluster: tasks read files into blocks, actors hold the model and write parts.

Ray Data moves blocks from tasks to actors, holds tasks back while actors are busy, and starts again what has died. A
block is one row of its data, because a row is never split. What is done is known by the parts alone, so that it does
not matter who dies when.
"""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
from numpy.typing import NDArray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from promptembedder.bulk.blocks import Block
from promptembedder.bulk.encode_block import BlockEncoder, Digests, Done, Failed
from promptembedder.bulk.job import Job, model_identity
from promptembedder.bulk.output import MANIFEST, Output
from promptembedder.bulk.plan import Plan, Reader
from promptembedder.bulk.reuse import Known
from promptembedder.bulk.sources import SourceFile
from promptembedder.errors import PromptEmbedderError
from promptembedder.model.folder import CONFIG_FILE, folder_of, read_saved
from promptembedder.paths import expanded

if TYPE_CHECKING:
    from promptembedder.bulk.text_embedder import Ranges

_PROBE_SECONDS = 5.0
_CHECK_SECONDS = 300.0
# Groups of files that are read one after the other.
_MOST_READS = 1000
# Actors that may die one after the other while they start.
_DEATHS = 20


class RayRunner:
    """Runs a job on a cluster.

    Args:
        address: of the cluster; `auto`: the one that runs here; `local`: start one.
        workers: actors that hold the model.
        devices: GPUs of each, or a part of one; where the cluster has none, or with 0, CPU cores of each.
            Unset: one GPU, or an equal share of the cores.
    """

    def __init__(self, address: str = "auto", workers: int = 1, devices: float | None = None) -> None:
        self._address, self._workers, self._devices = address, workers, devices

    def open(self, plan: Plan) -> None:
        """Connect, and see whether the nodes can do the job."""
        _connect(self._address, self._workers)
        folder = expanded(plan.job.model)
        named = (folder / CONFIG_FILE).is_file()
        self._job = replace(plan.job, model=str(folder.absolute())) if named else plan.job
        self._output = plan.output
        resources = ray.cluster_resources()
        kind = "GPU" if resources.get("GPU") and self._devices != 0 else "CPU"
        each = self._devices or (1.0 if kind == "GPU" else float(_share_of_cores(self._workers)))
        # Reading needs no CPU of its own, so that actors may have all of them. Ray gives each as many threads as cores.
        self._needs: dict[str, float] = {"num_gpus" if kind == "GPU" else "num_cpus": each}
        if each * self._workers > resources.get(kind, 0):
            raise PromptEmbedderError(
                f"{self._workers} workers need {each * self._workers:g} {kind}s, the cluster has "
                f"{resources.get(kind, 0):g}; give fewer --workers or another --devices-per-worker"
            )
        _check_nodes(self._job, kind)

    def sample(self, texts: Sequence[str]) -> dict[str, NDArray[np.float32]]:
        """Embeddings of a few texts under each instruction."""
        with _as_one_line():
            return dict(ray.get(ray.remote(_embed_sample).options(**self._needs).remote(self._job, list(texts))))

    def run(
        self, files: Sequence[SourceFile], reader: Reader, known: Known | None, ranges: Ranges, limit: int | None
    ) -> Generator[Done | Failed | Digests, None, None]:
        """Read files and write the parts that are missing."""
        size = -(-len(files) // _MOST_READS)
        # The first rows of a corpus are known to one who reads it in order.
        groups = [list(files)] if limit is not None else [list(files[n : n + size]) for n in range(0, len(files), size)]
        items = [{"files": json.dumps([asdict(file) for file in group])} for group in groups]
        lent = None
        if known is not None:  # by reference: every node has it once
            lent = (known.output, known.names, [ray.put(np.asarray(a)) for a in (known.keys_N, known.places_N)])
        with _as_one_line(), _settings():
            blocks = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
                _read,
                batch_size=1,
                batch_format="pyarrow",
                fn_kwargs={"reader": reader, "limit": limit},
                compute=ray.data.TaskPoolStrategy(size=min(self._workers + 1, len(items))),
                num_cpus=0,
            )
            done = blocks.map_batches(
                _BlockActor,
                batch_size=1,
                batch_format="pyarrow",
                fn_constructor_args=(self._job, self._output, lent, dict(ranges)),
                compute=ray.data.ActorPoolStrategy(size=self._workers),  # which starts again whatever dies
                **self._needs,
            )
            for row in done.iter_rows():
                yield from _results(row)


def _results(row: Mapping[str, Any]) -> Iterator[Done | Failed | Digests]:
    found = json.loads(row["message"])
    if "error" in found:
        raise PromptEmbedderError(found["error"])
    if found.get("digests"):
        yield Digests(found["digests"])
    yield Failed(**found["failed"]) if "failed" in found else Done(**found["done"])


def _read(batch: pa.Table, *, reader: Reader, limit: int | None) -> Iterator[pa.Table]:
    """Blocks of a group of files."""
    files = [SourceFile(**one) for one in json.loads(batch["files"][0].as_py())]
    try:
        for found in reader.read(files, limit):
            if isinstance(found, tuple):
                block, digest = found
                facts, table = block.packed()
                yield _row({"digest": digest, "block": facts}, table)
            else:
                yield _row({"done" if isinstance(found, Done) else "failed": asdict(found)})
    except PromptEmbedderError as error:  # as data: Ray would put its own words around it
        yield _row({"error": str(error)})


def _row(message: Mapping[str, Any], table: bytes = b"") -> pa.Table:
    return pa.table({"message": [json.dumps(message)], "table": pa.array([table], pa.large_binary())})


class _BlockActor:
    """Holds the model and writes parts."""

    def __init__(
        self,
        job: Job,
        output: Output,
        lent: tuple[Output, tuple[str, ...], list[Any]] | None,
        ranges: Ranges,
    ) -> None:
        from promptembedder.bulk.text_embedder import TextEmbedder

        self._error: str | None = None
        self._digests: dict[str, str | None] = {}
        try:
            if output.read(MANIFEST) is None:
                raise PromptEmbedderError(f"does not see {output}; use a folder that all nodes share, or an address")
            embedder = TextEmbedder(job, ranges)
            self._digests = embedder.digests()
            known = None if lent is None else Known(lent[0], lent[1], *ray.get(lent[2]))
            self._encoder = BlockEncoder(embedder, output, known)
        except PromptEmbedderError as error:  # reported by the first call, because Ray would start such an actor again
            self._error = f"worker on {socket.gethostname()}: {error}"

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Write the part of a block."""
        message = json.loads(batch["message"][0].as_py())
        if self._error is not None and "block" in message:
            message = {"error": self._error}
        elif "block" in message:
            try:
                block = Block.unpacked(message["block"], batch["table"][0].as_py())
                message = {"done": asdict(self._encoder.encode(block, message["digest"])), "digests": self._digests}
            except PromptEmbedderError as error:
                message = {"error": str(error)}
        return pa.table({"message": [json.dumps(message)]})


# -- the cluster ------------------------------------------------------------------------------------------------


def _connect(address: str, workers: int) -> None:
    if ray.is_initialized():
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():  # Ray itself would try for minutes
        try:
            socket.create_connection((host, int(port)), _PROBE_SECONDS).close()
        except OSError as error:
            raise PromptEmbedderError(f"no Ray cluster at {address}: {error.strerror or error}") from error
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address == "local":
        options |= {"num_cpus": max(workers, os.cpu_count() or 1), "include_dashboard": False}
    try:
        ray.init(address, **options)
    except Exception as error:  # Ray raises bare ones where a node of its own does not start in time
        raise PromptEmbedderError(f"no Ray cluster at {address}: {' '.join(str(error).split())[:300]}") from error


def _share_of_cores(workers: int) -> int:
    """The most cores that each worker can have while all workers find a place; at least 1."""
    cores = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    return next((each for each in range(max(cores), 1, -1) if sum(n // each for n in cores) >= workers), 1)


def _check_nodes(job: Job, kind: str) -> None:
    """See whether every node that may get an actor has this version and the model with its LLMs."""
    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get(kind)]
    check = ray.remote(_fault_of_worker)
    asked = {
        node["NodeManagerAddress"]: check.options(
            num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote(job.model, version("promptembedder"), model_identity(job.model))
        for node in nodes
    }
    for name, answer in asked.items():
        try:
            fault = ray.get(answer, timeout=_CHECK_SECONDS)
        except Exception as error:  # whatever keeps a worker from starting, such as a package that is missing
            reason = " ".join(str(error).split())
            missing = "No module named" in reason
            fault = "it has no promptembedder, or not all it needs" if missing else reason[-300:]
        if fault is not None:
            raise PromptEmbedderError(f"worker node {name} cannot do the job: {fault}")


def _fault_of_worker(model: str, wanted: str, identity: Mapping[str, str]) -> str | None:
    """Why a worker cannot do the job; None where it can. Opens no LLM."""
    from promptembedder.llms.locate import locate

    if version("promptembedder") != wanted:
        return f"it has promptembedder {version('promptembedder')}, expected {wanted}"
    try:
        if model_identity(model) != identity:
            return f"it has another model at {model}"
        saved = read_saved(folder_of(model))
        bases = saved.base_models
        locate(bases.backbone, bases.backbone_revision)
        if saved.instructions is None:
            locate(bases.prompter, bases.prompter_revision)
    except PromptEmbedderError as error:
        return str(error)
    return None


def _embed_sample(job: Job, texts: list[str]) -> dict[str, NDArray[np.float32]]:
    from promptembedder.bulk.text_embedder import TextEmbedder

    return TextEmbedder(job).embed(texts)


@contextmanager
def _settings() -> Iterator[None]:
    """While inside, what Ray Data has to be set to; afterwards what it was, since the process may use it otherwise."""
    context, logger = ray.data.DataContext.get_current(), logging.getLogger("ray.data")
    wanted = {
        "enable_progress_bars": False,
        "print_on_execution_start": False,
        "target_max_block_size": 1,  # bytes: a row each
        "max_consecutive_actor_init_deaths": _DEATHS,
    }
    before, level = {name: getattr(context, name) for name in wanted}, logger.level
    logger.setLevel(logging.ERROR)
    try:
        for name, value in wanted.items():
            setattr(context, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(context, name, value)
        logger.setLevel(level)


@contextmanager
def _as_one_line() -> Iterator[None]:
    try:
        yield
    except PromptEmbedderError:
        raise
    except (ray.exceptions.RayError, ConnectionError) as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, PromptEmbedderError):
            raise PromptEmbedderError(str(cause)) from error
        lines = [line for line in str(error).splitlines() if line.strip()]
        reason = lines[-1].strip() if lines else type(error).__name__
        raise PromptEmbedderError(f"the cluster failed: {reason}; the same command goes on") from error
