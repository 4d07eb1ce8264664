"""Thousands of requests that schemathesis makes of the OpenAPI document, and connections that are no good."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest

import promptembedder
from conftest import write_tiny_lm
from promptembedder import ModelConfig

REQUESTS = int(os.environ.get("PROMPTEMBEDDER_FUZZ_REQUESTS", "10000"))
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
TOOL = Path(sys.executable).parent / "schemathesis"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Address and process of a server of a tiny model."""
    folder = tmp_path_factory.mktemp("tiny")
    lm = str(write_tiny_lm(folder / "lm", "llama"))
    settings = ModelConfig(prompter=lm, backbone=lm, dtype="float32", lora_rank=4, max_text_tokens=64)
    promptembedder.save(promptembedder.build(settings, device="cpu"), folder / "tiny")
    process = subprocess.Popen(
        [sys.executable, "-m", "promptembedder", "serve", str(folder / "tiny"), "--port=0", "--device=cpu"],
        stderr=subprocess.PIPE,
        text=True,
    )
    line = next(line for line in process.stderr if "listening" in line)
    yield re.search(r"http://[^ ,]+", line)[0], process
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0


def answers(address: str) -> dict[str, int]:
    page = httpx.get(f"{address}/metrics", timeout=60).text
    found = re.findall(r'^promptembedder_answers_total{status="(\d+)"} (\S+)', page, re.M)
    return {status: int(float(count)) for status, count in found}


@pytest.mark.timeout(5400)
def test_no_request_makes_the_server_fail(server, tmp_path):
    address, process = server
    memory, seed = [], 0
    while sum(answers(address).values()) < REQUESTS:
        seed += 1
        command = [TOOL, "run", f"{address}/openapi.json", f"--checks={CHECKS}", f"--seed={seed}", "--max-examples=400"]
        done = subprocess.run(
            [*command, "--no-color", "--workers=4", "--request-timeout=120"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout[-4000:]
        memory.append((sum(answers(address).values()), psutil.Process(process.pid).memory_info().rss))
        print(memory[-1], answers(address), flush=True)
    assert process.poll() is None
    assert not [status for status in answers(address) if status.startswith("5")]
    assert answers(address).get("200", 0) > 100
    half = next(size for count, size in memory if count >= REQUESTS / 2)
    assert memory[-1][1] <= 1.05 * half


def exchange(address: str, *parts: bytes, wait: float = 60) -> bytes:
    """What a server answers to bytes that come in parts."""
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=wait) as connection:
        for part in parts:
            connection.sendall(part)
            time.sleep(0.05)
        return connection.recv(65536)


HEAD = b"POST /v1/embeddings HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize(
    ("parts", "status"),
    [
        ((HEAD,), b"408"),
        ((HEAD + b"Content-Length: 100\r\n\r\n", b'{"model"'), b"408"),
        ((HEAD + b"Content-Length: -1\r\n\r\n",), b"400"),
        ((HEAD + b"Content-Length: 1, 2\r\n\r\n",), b"400"),
        ((HEAD + b"Content-Length: 99999999999\r\n\r\n",), b"413"),
        ((HEAD + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n",), b"400"),
        ((b"\x00\xff\x00\xff\r\n\r\n",), b"400"),
        ((b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n",), b"4"),
    ],
)
def test_broken_requests_are_refused(server, parts, status):
    address, _ = server
    assert exchange(address, *parts).startswith(b"HTTP/1.1 " + status)
    assert httpx.get(f"{address}/health", timeout=60).status_code == 200
