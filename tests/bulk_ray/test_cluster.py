"""A corpus on a cluster of two nodes gives the rows of one process, whoever is killed.

`make test-bulk` runs this folder in an environment of its own; `make test` leaves it out.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from ray.cluster_utils import Cluster

from made_up_texts import write_corpus
from promptembedder import PromptEmbedderError, build, encode, load, save
from promptembedder.bulk import Job, encode_corpus, encoder
from promptembedder.bulk.ray_runner import RayRunner

TOPIC, TONE = "Find the topic.", "Find the tone."
TEXTS = int(os.environ.get("BULK_TEXTS", "6000"))
KILLS = int(os.environ.get("BULK_KILLS", "3"))
HEAD = {"num_cpus": 2, "object_store_memory": 200 << 20, "include_dashboard": False}
RANDOM = random.Random(int(os.environ.get("BULK_SEED", "1")))


@pytest.fixture(scope="session")
def saved(tmp_path_factory, tiny_settings):
    folder = tmp_path_factory.mktemp("bulk") / "model"
    save(build(tiny_settings(), device="cpu"), folder)
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder, TEXTS, files=3)
    return folder


def job_of(saved: Path, **changes: Any) -> Job:
    return Job(str(saved), changes.pop("instructions", {"topic": TOPIC}), device="cpu", **changes)


@pytest.fixture(scope="session")
def alone(saved, corpus, tmp_path_factory):
    """The output of one process."""
    output = tmp_path_factory.mktemp("alone") / "out"
    encode_corpus(job_of(saved), [corpus], output)
    return output


@pytest.fixture(scope="session")
def head():
    """A cluster of one node."""
    found = Cluster(initialize_head=True, head_node_args=HEAD)
    yield found
    found.shutdown()


@pytest.fixture
def cluster(head):
    """The cluster with a second node, which may be lost; two CPUs each."""
    if len(head.worker_nodes) == 0:
        head.add_node(num_cpus=2, object_store_memory=200 << 20)
    head.wait_for_nodes()
    yield head
    ray.shutdown()


def table_of(output: Path) -> pa.Table:
    return pq.read_table(output / "parts").sort_by("id")


def assert_same(output: Path, alone: Path) -> None:
    one, other = table_of(output), table_of(alone)
    assert one["id"].to_pylist() == list(range(TEXTS)) == other["id"].to_pylist()
    vectors = [np.stack(table["topic"].to_numpy()) for table in (one, other)]
    np.testing.assert_allclose(*vectors, atol=1e-5)
    assert json.loads((output / "manifest.json").read_text())["state"] == "complete"


def test_the_rows_of_one_process(cluster, saved, corpus, alone, tmp_path):
    output = tmp_path / "out"
    done = encode_corpus(job_of(saved), [corpus], output, runner=RayRunner(cluster.address, 2))
    assert (done.rows, done.embedded, done.complete) == (TEXTS, TEXTS, True)
    assert_same(output, alone)
    names = [sorted(path.name for path in (place / "parts").iterdir()) for place in (output, alone)]
    assert names[0] == names[1]
    again = encode_corpus(job_of(saved), [corpus], output, runner=RayRunner(cluster.address, 2))
    assert (again.rows, again.embedded) == (TEXTS, 0)


def test_a_grown_corpus(cluster, saved, tmp_path):
    """Embeddings that are known reach the actors."""
    write_corpus(tmp_path / "corpus", 1000, files=2)
    encode_corpus(job_of(saved), [tmp_path / "corpus"], tmp_path / "out")
    lines = (tmp_path / "corpus" / "13-000.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "corpus" / "13-000.jsonl").write_text('{"id": 5000, "text": "new", "year": 1}\n' + "".join(lines))
    runner = RayRunner(cluster.address, 2)
    done = encode_corpus(job_of(saved), [tmp_path / "corpus"], tmp_path / "out", runner=runner)
    assert (done.rows, done.embedded, done.skipped) == (1001, 1, 1000)


def test_limit_and_int8(cluster, saved, corpus, tmp_path):
    job = job_of(saved, precision="int8", instructions={"topic": TOPIC, "tone": TONE})
    for name, runner in (("one", None), ("ray", RayRunner(cluster.address, 2))):
        done = encode_corpus(job, [corpus], tmp_path / name, limit=1000, runner=runner)
        assert (done.rows, done.complete) == (1000, False)
    one, other = (table_of(tmp_path / name) for name in ("one", "ray"))
    assert one["id"].to_pylist() == other["id"].to_pylist() == list(range(1000))
    for name in ("topic", "tone"):
        differ = np.stack(one[name].to_numpy()).astype(int) - np.stack(other[name].to_numpy())
        assert np.abs(differ).max() <= 1


def killed(pids: list[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def actors() -> list[int]:
    """Processes of this test's cluster that hold the model."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            found += [process.pid] * ("_BlockActor" in " ".join(process.cmdline()))
    return found


def parts_of(output: Path) -> int:
    return len(list((output / "parts").glob("*.parquet"))) if (output / "parts").is_dir() else 0


def after_parts(output: Path, count: int, then: Any) -> threading.Thread:
    """Do something when so many parts are there."""

    def watch() -> None:
        until = time.monotonic() + 300
        while parts_of(output) < count and time.monotonic() < until:
            time.sleep(0.05)
        then()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize("number", range(KILLS))
def test_a_killed_actor(cluster, saved, corpus, alone, tmp_path, number):
    output = tmp_path / "out"
    at = RANDOM.randint(1, max(1, parts_of(alone) // 2))
    hits: list[int] = []
    watching = after_parts(output, at, lambda: (hits.extend(actors()[:1]), killed(hits)))
    done = encode_corpus(job_of(saved), [corpus], output, runner=RayRunner(cluster.address, 2))
    watching.join(10)
    assert hits
    assert (done.rows, done.complete) == (TEXTS, True)
    assert_same(output, alone)


@pytest.mark.parametrize("number", range(KILLS))
def test_a_killed_node(cluster, saved, corpus, alone, tmp_path, number):
    output = tmp_path / "out"
    at = RANDOM.randint(1, max(1, parts_of(alone) // 2))
    gone: list[bool] = []

    def lose() -> None:
        cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)
        gone.append(True)

    watching = after_parts(output, at, lose)
    done = encode_corpus(job_of(saved), [corpus], output, runner=RayRunner(cluster.address, 2))
    watching.join(30)
    assert gone
    assert (done.rows, done.complete) == (TEXTS, True)
    assert_same(output, alone)


@pytest.mark.parametrize("number", range(KILLS))
def test_a_killed_driver(cluster, saved, corpus, alone, tmp_path, number):
    output = tmp_path / "out"
    command = [sys.executable, "-m", "promptembedder", "encode", str(saved), str(corpus), "-o", f"{output}/"]
    command += [f"--named=topic={TOPIC}", "--device=cpu", "--ray", cluster.address, "--workers=2"]
    at = RANDOM.randint(1, max(1, parts_of(alone) - 2))
    driver = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    watching = after_parts(output, at, lambda: killed([driver.pid]))
    _, err = driver.communicate()
    watching.join(10)
    assert driver.returncode == -signal.SIGKILL, err
    before = parts_of(output)
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"holds {TEXTS} rows" in done.stderr
    assert parts_of(output) >= before >= at
    assert_same(output, alone)


def test_a_killed_process_without_a_cluster(saved, corpus, alone, tmp_path):
    output = tmp_path / "out"
    command = [sys.executable, "-m", "promptembedder", "encode", str(saved), str(corpus), "-o", f"{output}/"]
    command += [f"--named=topic={TOPIC}", "--device=cpu"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    after_parts(output, 3, lambda: killed([process.pid])).join()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=True)
    assert f"holds {TEXTS} rows" in done.stderr
    assert_same(output, alone)


def test_rejects_and_strict(cluster, saved, tmp_path):
    rows = [{"id": n, "text": f"text {n}"} for n in range(300)]
    rows[7]["text"] = " "
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    runner = RayRunner(cluster.address, 1)
    done = encode_corpus(job_of(saved), [tmp_path / "a.jsonl"], tmp_path / "out", runner=runner)
    assert (done.rows, done.rejected) == (299, 1)
    assert '"line": 8, "reason": "text is empty"' in (tmp_path / "out" / "rejects.jsonl").read_text()
    with pytest.raises(PromptEmbedderError, match=r"^file:///\S*a.jsonl, line 8: text is empty$"):
        encode_corpus(job_of(saved), [tmp_path / "a.jsonl"], tmp_path / "strict", strict=True, runner=runner)


def test_clusters_and_workers_that_cannot(cluster, saved, corpus, tmp_path, monkeypatch, tiny_lm):
    with pytest.raises(PromptEmbedderError, match=r"9 workers need 9 CPUs, the cluster has 4; give fewer --workers"):
        encode_corpus(job_of(saved), [corpus], tmp_path / "out", runner=RayRunner(cluster.address, 9))
    monkeypatch.setattr("promptembedder.bulk.ray_runner.version", lambda name: "9.9")
    with pytest.raises(PromptEmbedderError, match=r"worker node \S+ cannot do the job: it has promptembedder .*, exp"):
        encode_corpus(job_of(saved), [corpus], tmp_path / "out", runner=RayRunner(cluster.address, 1))
    monkeypatch.undo()
    llm = tiny_lm()
    llm.rename(llm.with_name("elsewhere"))
    try:
        with pytest.raises(PromptEmbedderError, match=r"worker node \S+ cannot do the job: .*base model"):
            encode_corpus(job_of(saved), [corpus], tmp_path / "out", runner=RayRunner(cluster.address, 1))
    finally:
        llm.with_name("elsewhere").rename(llm)
    assert not (tmp_path / "out").exists()
    ray.shutdown()
    with pytest.raises(PromptEmbedderError, match=r"^no Ray cluster at 127.0.0.1:1: Connection refused$"):
        encode_corpus(job_of(saved), [corpus], tmp_path / "out", runner=RayRunner("127.0.0.1:1", 1))
    assert not (tmp_path / "out").exists()


def test_the_actor_class_in_a_pipeline_of_ones_own(cluster, saved):
    ray.init(cluster.address)
    texts = [f"text {n}" for n in range(100)]
    dataset = ray.data.from_items([{"text": text, "n": n} for n, text in enumerate(texts)])
    found = dataset.map_batches(
        encoder(saved, {"topic": TOPIC, "tone": TONE}, device="cpu"),
        batch_size=32,
        compute=ray.data.ActorPoolStrategy(size=1),
    ).take_all()
    found.sort(key=lambda row: row["n"])
    expected = encode(load(saved, device="cpu"), texts, [TOPIC, TONE])
    for name, wanted in zip(("topic", "tone"), expected, strict=True):
        np.testing.assert_allclose(np.stack([row[name] for row in found]), wanted, atol=1e-5)
