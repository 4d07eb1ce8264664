"""Engines in environments of their own, `.venv-engines-<name>`, which `make test-engines` makes."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

import promptembedder
from conftest import INSTRUCTION, TEXTS
from promptembedder import ModelConfig
from promptembedder.export.compiled import compile_model, embed_compiled
from promptembedder.export.plain_folder import write

ROOT = Path(os.environ.get("PROMPTEMBEDDER_ENGINES") or Path(__file__).parents[2])
SMALL = "smollm2-135m-instruct"
SPECIAL = "one <|im_end|> two"
# What engines split, strip, normalise or truncate in their own ways.
HARD = [
    *TEXTS,
    "  blanks around  ",
    "\ta tab",
    "line\nbreak\n",
    "The bank.\n\n",
    'emoji 😀 "quoted"',
    "שלום עולם",
    "日本語のテキスト。",
    "Cafe\u0301 nai\u0308ve \ufb01",
    "caf\u00e9",
    "x",
    '"',
    "!!!",
    "100% of 3,141.59",
    "def f(x):\n    return x",
    "https://example.org/?q=1&r=2",
    'tail "\nThe',
    SPECIAL,
    "word and " * 400,
]


def environment(engine: str) -> Path:
    """The folder of an engine's environment; the test is skipped where there is none."""
    place = ROOT / f".venv-engines-{engine}"
    if not (place / ".ready").exists():
        pytest.skip(f"{engine} is not installed: {place} is missing")
    return place


@cache
def plain() -> tuple[Path, dict[str, np.ndarray]]:
    """Plain folders of a model on the real SmolLM2, and the model's embeddings of HARD by name of the instruction."""
    settings = ModelConfig(prompter=SMALL, backbone=SMALL, dtype="float32", linear_head=True)
    model = promptembedder.build(settings, device="cpu")
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        model[1].linear.weight.add_(torch.randn(576, 576, generator=noise) * 0.01)
    model[0].subtract(torch.randn(576, generator=noise) * 0.1)
    compiled = compile_model(model, {"topic": "Find the topic.", "same": INSTRUCTION})
    folder = Path(tempfile.mkdtemp(prefix="promptembedder-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    write(compiled, model, folder)
    return folder, {name: embed_compiled(model, compiled, name, HARD).numpy() for name in compiled.prompts}


@contextmanager
def serving(command: list[str], folder: Path, **environment: str) -> Iterator[Callable[..., np.ndarray]]:
    """Start a server of the OpenAI kind, and stop it at the end; gives a function from inputs to embeddings."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = folder / "server.log"
    with log.open("w") as sink:
        server = subprocess.Popen(
            [*command, "--port", str(port)],
            cwd=folder,
            stdout=sink,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            start_new_session=True,
        )
    address = f"http://127.0.0.1:{port}"

    def embed(path: str, inputs: list, **more: object) -> np.ndarray:
        body = json.dumps({"input": inputs, **more}).encode()
        request = urllib.request.Request(address + path, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=300) as answer:
            return np.array([one["embedding"] for one in json.load(answer)["data"]])

    try:
        until = time.monotonic() + 400
        while True:
            assert server.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < until, log.read_text()[-3000:]
            try:
                with urllib.request.urlopen(f"{address}/health", timeout=5):
                    break
            except OSError:
                time.sleep(1)
        yield embed
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGTERM)
            try:
                server.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(server.pid, signal.SIGKILL)


def smallest_cosine(found_NE: np.ndarray, expected_NE: np.ndarray) -> float:
    assert found_NE.shape == expected_NE.shape
    return float((found_NE * expected_NE).sum(1).min())
