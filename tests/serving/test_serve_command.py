"""`promptembedder serve`: bad input before any model opens, and a server from start to SIGTERM."""

from __future__ import annotations

import asyncio
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
from contextlib import closing, suppress
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
import uvicorn

import promptembedder
from conftest import TEXTS
from promptembedder import PromptEmbedderError
from promptembedder.serving import run
from promptembedder.serving.settings import ServeSettings


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere/model"], "nowhere/model"),
        (["smollm2-135m", "--named", "topics"], "expected NAME=TEXT"),
        (["smollm2-135m", "--named", "a=b", "--named", "a=c"], "the name is given twice"),
        (["smollm2-135m", "--named", "Topics=b"], "use lower-case letters"),
        (["smollm2-135m", "smollm2-135m"], "two models are named 'smollm2-135m'"),
        (["smollm2-135m", "--request-tokens", "9", "--queue-tokens", "5"], "more than queue_tokens"),
        (["smollm2-135m", "--instructions", "nowhere.txt"], "nowhere.txt"),
        (["smollm2-135m", "--host", "192.0.2.1"], "cannot listen on 192.0.2.1"),
        ([], "Missing argument"),
    ],
)
def test_bad_input_is_one_line(command, arguments, message):
    done = command("serve", *arguments, "--port", "0")
    assert done.code == 2
    assert message in done.err
    assert done.err.count("\n") == 1


def test_an_address_that_is_taken(command):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = command("serve", "smollm2-135m", "--port", taken.getsockname()[1])
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "cannot listen on 127.0.0.1" in done.err


@pytest.mark.parametrize("change", [{"queue_tokens": 0}, {"batch_tokens": -1}, {"port": 70_000}, {"api_key": "ä"}])
def test_settings_are_checked(change):
    with pytest.raises(PromptEmbedderError):
        ServeSettings(**change)


OPTIONS = ("--named", "topics=Find the topic.", "--instructions", "known.txt")


@pytest.mark.slow
def test_serves_until_sigterm(tiny_model, tmp_path):
    """A process of its own answers what it has taken, refuses the rest, and ends with code 0."""
    model = tiny_model()
    promptembedder.save(model, tmp_path / "tiny")
    (tmp_path / "known.txt").write_text("Warm one.\nWarm two.\n")
    server = subprocess.Popen(
        [sys.executable, "-m", "promptembedder", "serve", "tiny", "--port=0", "--device=cpu", *OPTIONS],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PROMPTEMBEDDER_API_KEY": "secret"},
    )
    try:
        line = next(line for line in server.stderr if "listening" in line)
        address = re.search(r"http://\S+(?=,)", line)[0]
        with httpx.Client(base_url=address, headers={"Authorization": "Bearer secret"}, timeout=60) as client:
            body = {"model": "tiny:topics", "input": TEXTS}
            found = [one["embedding"] for one in client.post("/v1/embeddings", json=body).json()["data"]]
            np.testing.assert_allclose(found, model.encode(TEXTS, prompt="Find the topic."), atol=1e-5)
            assert httpx.get(f"{address}/v1/models").status_code == 401
            statuses = []

            def ask():
                many = {"model": "tiny", "input": TEXTS * 30}
                statuses.append(client.post("/v1/embeddings", json=many).status_code)

            askers = [threading.Thread(target=ask) for _ in range(4)]
            for asker in askers:
                asker.start()
            while "queue_tokens 0.0" in client.get("/metrics").text:
                pass
            server.stderr.close()  # whoever has started a server may be gone
            server.send_signal(signal.SIGTERM)
            for asker in askers:
                asker.join()
        assert set(statuses) <= {200, 503}
        assert 200 in statuses
        assert server.wait(30) == 0
    finally:
        server.kill()


@pytest.mark.parametrize("signals", [1, 2])
def test_clients_that_do_not_read_do_not_hold_up_the_end(signals, monkeypatch):
    """Their connections are closed some time after a signal, and at once after another."""
    monkeypatch.setattr(run, "_UNREAD_SECONDS", 0.5 if signals == 1 else 60)
    asked: queue.Queue[str] = queue.Queue()

    async def app(scope, receive, send):
        if scope["type"] == "lifespan":
            for phase in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{phase}.complete"})
            return
        asked.put(scope["path"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": bytes(50_000_000)})  # more than a system holds for a client

    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    service = SimpleNamespace(stopping=False, batcher=SimpleNamespace(tokens=0))
    stop = run._Stop(server, service, SimpleNamespace(open_requests=1))
    with closing(asyncio.new_event_loop()) as loop, socket.socket() as listening, socket.socket() as client:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        client.connect(listening.getsockname())
        client.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n" * 2)  # the second answer waits before its first byte
        serving = threading.Thread(target=loop.run_until_complete, args=[server.serve([listening])], daemon=True)
        serving.start()
        assert [asked.get(timeout=30) for _ in range(2)] == ["/", "/"]
        for _ in range(signals):
            loop.call_soon_threadsafe(stop.on_signal, signal.SIGTERM, None)
        serving.join(20)
        assert not serving.is_alive()
        for task in asyncio.all_tasks(loop):
            task.cancel()  # as the process does when it ends
            with suppress(asyncio.CancelledError):
                loop.run_until_complete(asyncio.wait_for(task, 10))
