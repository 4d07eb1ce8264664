"""The server on Ray: answers of the library, and no request lost where a replica is killed."""

from __future__ import annotations

import os
import signal
import threading
import time

import httpx
import numpy as np
import psutil
import pytest
import ray
from ray import serve

from promptembedder import build, encode, load, save
from promptembedder.serving.ray_app import application

URL = "http://127.0.0.1:8765/v1/embeddings"
TEXTS = ["Rain.", "A man is playing a guitar.", "The bank raised its rates again."]
INSTRUCTION = "Find the topic."


@pytest.fixture
def served(tmp_path, tiny_settings):
    folder = tmp_path / "tiny"
    save(build(tiny_settings(), device="cpu"), folder)
    ray.init("local", num_cpus=4, include_dashboard=False, object_store_memory=200 << 20)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": 8765})
        serve.run(application([folder], device="cpu", num_replicas=2, ray_actor_options={"num_cpus": 1}))
        yield folder
    finally:
        serve.shutdown()
        ray.shutdown()


def replicas() -> list[int]:
    """Processes of this test that hold a model."""
    found = []
    for process in psutil.Process().children(recursive=True):
        line = " ".join(process.cmdline()) if process.is_running() else ""
        found += [process.pid] * ("ServeReplica:default:models" in line)
    return found


def test_a_killed_replica_under_load(served):
    expected = encode(load(served, device="cpu"), TEXTS, INSTRUCTION)
    body = {"model": "tiny", "input": TEXTS, "instruction": INSTRUCTION}
    found = [one["embedding"] for one in httpx.post(URL, json=body, timeout=60).json()["data"]]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert httpx.post(URL, json={"model": "none", "input": "x"}, timeout=60).status_code == 404
    assert httpx.get(URL.replace("v1/embeddings", "health"), timeout=60).json() == {"status": "ok"}
    statuses: list[int] = []
    until = time.monotonic() + 20

    def ask() -> None:
        with httpx.Client(timeout=60) as client:
            while time.monotonic() < until:
                statuses.append(client.post(URL, json=body).status_code)

    clients = [threading.Thread(target=ask) for _ in range(6)]
    for one in clients:
        one.start()
    time.sleep(4)
    before = replicas()
    assert len(before) == 2
    os.kill(before[0], signal.SIGKILL)
    for one in clients:
        one.join()
    assert len(statuses) > 20
    assert set(statuses) == {200}
