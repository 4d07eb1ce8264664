"""The queue is bounded, fair and loses nothing; new instructions hold up nobody else."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest

from conftest import MANY, TEXTS
from promptembedder.serving import batcher as batcher_module
from promptembedder.serving import soft_prompts as soft_prompts_module
from promptembedder.serving.app import create_app, gated
from promptembedder.serving.batcher import Batcher, Job
from promptembedder.serving.compute import write
from promptembedder.serving.errors import RequestError
from promptembedder.serving.soft_prompts import SoftPrompts

URL = "/v1/embeddings"


def fake(name="model"):
    """What a job asks of a model: its name, and two soft tokens."""
    settings = SimpleNamespace(num_soft_tokens=2)
    return SimpleNamespace(name=name, model=name, module=SimpleNamespace(settings=settings))


class Device:
    """Embeds a text to its first token, when it is open; notes the batches."""

    def __init__(self):
        self.batches, self.open, self.begun = [], threading.Event(), threading.Event()

    @property
    def embedded(self):
        return [number for batch in self.batches for number in batch]

    def __call__(self, model, rows):
        self.begun.set()
        assert self.open.wait(20)
        self.batches.append([row.ids[0] for row in rows])
        return [np.full((1, 1), row.ids[0], np.float32) for row in rows]


class Waits:
    """Notes for how long a condition is waited for."""

    def __init__(self, wait):
        self.limits, self._wait = [], wait

    def __call__(self, timeout=None):
        self.limits.append(timeout)
        return self._wait(timeout)


@pytest.fixture
def device():
    return Device()


@pytest.fixture
def batcher(device):
    """`batcher(batch_tokens, queue_tokens)` over the device, which is busy with one text until it is opened."""
    made = []

    def make(batch_tokens=80, queue_tokens=10_000):
        made.append(Batcher(batch_tokens, queue_tokens, device))
        first = job([0])
        made[0].admit(first)
        made[0].put(first, ())
        assert device.begun.wait(20)
        return made[0]

    yield make
    device.open.set()
    made[0].close()


def job(numbers, length=8, model=None):
    return Job(model or MODEL, [[number] * length for number in numbers], 1)


MODEL = fake()
COST = 10  # eight tokens and two soft ones


def put(batcher, *jobs):
    for one in jobs:
        batcher.admit(one)
        batcher.put(one, ())


def numbers(job):
    return [int(one[0, 0]) for one in job.answer.result(20)]


def test_a_small_request_does_not_wait_for_a_large_one(device, batcher):
    queue, large, small = batcher(), job(range(100, 130)), job([7])
    put(queue, large, small)
    device.open.set()
    assert numbers(small) == [7]
    assert numbers(large) == list(range(100, 130))
    assert 7 in device.batches[1]
    assert all(len(batch) <= 8 for batch in device.batches)
    assert sorted(device.embedded) == [0, 7, *range(100, 130)]


def test_a_full_queue_refuses_and_takes_again(device, batcher):
    queue = batcher(queue_tokens=10 * COST)
    first = job(range(9))
    put(queue, first)
    assert queue.tokens == 10 * COST
    with pytest.raises(RequestError) as refused:
        queue.admit(job([1]))
    assert (refused.value.status, refused.value.code) == (429, "queue_full")
    assert int(refused.value.headers["Retry-After"]) >= 1
    assert queue.tokens == 10 * COST
    device.open.set()
    numbers(first)
    assert queue.tokens == 0
    second = job([1])
    put(queue, second)
    assert numbers(second) == [1]


def test_what_the_queue_never_holds_is_too_large(device, batcher):
    queue = batcher(queue_tokens=10 * COST)
    with pytest.raises(RequestError, match="send fewer texts or instructions") as refused:
        queue.admit(job(range(11)))
    assert (refused.value.status, refused.value.code, refused.value.param) == (413, "too_many_tokens", "input")
    assert "Retry-After" not in refused.value.headers
    assert queue.tokens == COST


def test_a_batch_waits_for_clients_that_ask_again(device, monkeypatch):
    """Else two halves of the clients would take turns for ever."""
    monkeypatch.setattr(batcher_module, "_SETTLE_SECONDS", (2.0, 2.0))
    queue, first, waiting, later = Batcher(80, 10_000, device), job([0]), job([1]), job([2])
    put(queue, first)
    assert device.begun.wait(20)
    put(queue, waiting)
    device.open.set()
    numbers(first)
    time.sleep(0.05)  # its client reads the answer
    put(queue, later)
    assert numbers(waiting) + numbers(later) == [1, 2]
    assert device.batches == [[0], [1, 2]]
    queue.close()


def test_nobody_waits_for_clients_of_long_ago(device, monkeypatch):
    monkeypatch.setattr(batcher_module, "_SETTLE_SECONDS", (0.3, 0.3))
    queue, first, later = Batcher(80, 10_000, device), job([0, 1, 2]), job([3])
    device.open.set()
    put(queue, first)
    numbers(first)
    time.sleep(0.5)
    monkeypatch.setattr(queue._changed, "wait", waits := Waits(queue._changed.wait))
    put(queue, later)
    assert numbers(later) == [3]
    assert waits.limits in ([], [None])
    queue.close()


def test_work_of_clients_that_are_gone_is_dropped(device, batcher):
    queue, stays, goes = batcher(), job([1, 2]), job(range(50, 60))
    put(queue, stays, goes)
    unborn = job([70])
    queue.admit(unborn)
    for one in (goes, goes, unborn):
        queue.drop(one)
    assert queue.tokens == 3 * COST
    device.open.set()
    assert numbers(stays) == [1, 2]
    queue.drop(stays)  # answered: nothing is left to drop
    assert queue.tokens == 0
    assert sorted(device.embedded) == [0, 1, 2]


def test_dropped_while_on_the_device(device, batcher):
    queue = batcher(batch_tokens=2 * COST)
    goes = job([1, 2, 3, 4])
    put(queue, goes)
    device.open.set()
    while queue.tokens > 3 * COST:
        time.sleep(0.001)
    queue.drop(goes)
    last = job([9])
    put(queue, last)
    assert numbers(last) == [9]
    assert queue.tokens == 0


def test_models_have_batches_of_their_own(device, batcher):
    queue, one, other = batcher(), job(range(20, 40)), job([5, 6], model=fake("other"))
    put(queue, one, other)
    device.open.set()
    assert numbers(other) == [5, 6]
    assert numbers(one) == list(range(20, 40))
    assert [5, 6] in device.batches[:3]


def test_a_text_longer_than_a_batch_is_embedded(device, batcher):
    queue, long = batcher(batch_tokens=20), job([3], length=100)
    put(queue, long)
    device.open.set()
    assert numbers(long) == [3]


def test_too_little_memory_halves_a_batch(device, batcher):
    class OutOfMemoryError(Exception):
        pass

    queue = batcher(batch_tokens=1000)
    before, queue._embed = queue._embed, lambda model, rows: little(model, rows)

    def little(model, rows):
        if len(rows) > 2:
            raise OutOfMemoryError
        return before(model, rows)

    whole = job([1, 2, 3, 4, 5])
    put(queue, whole)
    device.open.set()
    assert numbers(whole) == [1, 2, 3, 4, 5]
    assert sorted(map(len, device.batches[1:])) == [1, 2, 2]


def test_what_is_queued_is_answered_before_the_end(device, batcher):
    queue, jobs = batcher(), [job([n]) for n in range(1, 60)]
    put(queue, *jobs)
    device.open.set()
    queue.close()
    assert [one.answer.done() for one in jobs] == [True] * 59


# -- new instructions ---------------------------------------------------------------------------------------------


@pytest.fixture
def prompter(monkeypatch):
    """Instructions that begin with `Slow` are written only when `prompter.open` is set; `prompter.read` notes all."""
    state = SimpleNamespace(open=threading.Event(), read=[])

    def slow(module, instruction):
        state.read.append(instruction)
        if instruction.startswith("Slow"):
            assert state.open.wait(20)
        return write(module, instruction)

    monkeypatch.setattr(soft_prompts_module, "write", slow)
    yield state
    state.open.set()


def test_known_instructions_do_not_wait_for_new_ones(client, prompter):
    server = client("plain")
    body = {"model": "plain", "input": TEXTS}
    with ThreadPoolExecutor(1) as threads:
        new = threads.submit(server.post, URL, json=body | {"instruction": "Slow one."})
        while "Slow one." not in prompter.read:
            time.sleep(0.001)
        for _ in range(5):
            assert server.post(URL, json=body).status_code == 200
        assert not new.done()
        prompter.open.set()
        assert new.result(20).status_code == 200
    assert server.post(URL, json=body | {"instruction": "Slow one."}).status_code == 200
    assert prompter.read.count("Slow one.") == 1


def test_a_client_has_a_share_of_new_instructions(served_models, prompter):
    prompts, model = SoftPrompts(4, 2), served_models["plain"]
    try:
        one, two = (prompts.ask(model, f"Slow {n}.", "anna") for n in (1, 2))
        assert prompts.ask(model, "Slow 1.", "anna") is one  # no new one
        with pytest.raises(RequestError, match="of this client") as refused:
            prompts.ask(model, "Slow 3.", "anna")
        assert (refused.value.status, refused.value.code) == (429, "too_many_new_instructions")
        assert prompts.ask(model, "Slow 1.", "bert") is one
        for n in (4, 5):
            prompts.ask(model, f"Slow {n}.", "bert")
        with pytest.raises(RequestError, match="of all clients"):
            prompts.ask(model, "Slow 6.", "carl")
        prompter.open.set()
        assert two.result(20).instruction == "Slow 2."
        assert prompts.find(model, "Slow 2.") is two.result()
    finally:
        prompter.open.set()
        prompts.close()


def test_an_instruction_that_nobody_waits_for_is_not_written(served_models, prompter):
    prompts, model = SoftPrompts(9, 9), served_models["plain"]
    try:
        prompts.ask(model, "Slow 1.", "anna")
        while "Slow 1." not in prompter.read:
            time.sleep(0.001)
        shared = prompts.ask(model, "Shared.", "anna")
        prompts.ask(model, "Shared.", "bert")
        prompts.ask(model, "Dropped.", "anna")
        for instruction in ("Dropped.", "Shared.", "Slow 1."):
            prompts.leave(model, instruction)
        prompter.open.set()
        assert shared.result(20).instruction == "Shared."
        assert prompter.read == ["Slow 1.", "Shared."]
        assert prompts.find(model, "Slow 1.") is not None  # it was begun
    finally:
        prompts.close()


def test_a_client_pushes_out_its_own_instructions(served_models, monkeypatch):
    model = served_models["plain"]
    size = write(model.module, "Any.").soft_1RD.nbytes
    monkeypatch.setattr(soft_prompts_module, "_CLIENT_BYTES", 3 * size)
    monkeypatch.setattr(soft_prompts_module, "_REMEMBERED_BYTES", 5 * size)
    prompts = SoftPrompts(99, 99)
    try:
        kept = prompts.keep(model, "Kept.").result(20)
        prompts.ask(model, "Anna's.", "anna").result(20)
        for n in range(20):
            prompts.ask(model, f"Bert's {n}.", "bert").result(20)
        prompts.run(lambda: None).result(20)
        assert prompts.find(model, "Kept.") is kept
        assert prompts.find(model, "Anna's.") is not None
        assert [n for n in range(20) if prompts.find(model, f"Bert's {n}.")] == [17, 18, 19]
        for n in range(3):
            prompts.ask(model, f"Carl's {n}.", "carl").result(20)
        prompts.run(lambda: None).result(20)
        assert len(prompts) == 6
    finally:
        prompts.close()


# -- requests that do not come, or whose clients go ------------------------------------------------------------------


def exchange(app, receive, path=URL, headers=()):
    """What an ASGI app sends for a request."""
    sent = []

    async def send(message):
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(b"content-type", b"application/json"), *headers],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
        "scheme": "http",
    }
    asyncio.run(app(scope, receive, send))
    return sent


def test_a_half_sent_body_is_refused_in_time(client):
    server, parts = client("plain", body_seconds=0.1), [{"type": "http.request", "body": b"{", "more_body": True}]

    async def receive():
        if parts:
            return parts.pop()
        await asyncio.sleep(60)

    sent = exchange(server.app, receive)
    assert sent[0]["status"] == 408
    assert json.loads(sent[1]["body"])["error"]["code"] == "timeout"
    assert server.app.open_requests == 0


def test_a_body_that_grows_too_large_is_refused(client):
    async def receive():
        return {"type": "http.request", "body": b"a" * 2**20, "more_body": True}

    assert exchange(client("plain").app, receive)[0]["status"] == 413
    server = client("plain")
    assert exchange(server.app, receive)[0]["status"] == 413
    assert server.app.held_bytes == 0
    server.app.held_bytes = 250 * 2**20  # of others
    assert exchange(server.app, receive)[0]["status"] == 429
    assert server.app.held_bytes == 250 * 2**20
    headers = [(b"content-length", b"9" * 5000)]
    assert exchange(client("plain").app, None, headers=headers)[0]["status"] == 413


def test_a_client_that_leaves_before_its_body_is_there(client):
    async def receive():
        return {"type": "http.disconnect"}

    assert exchange(client("plain").app, receive) == []


@pytest.mark.parametrize("instruction", [None, "Slow one."])
def test_a_client_that_leaves_is_forgotten(client, prompter, monkeypatch, instruction):
    """While its texts wait for the device, or its instruction for the prompter."""
    service = client("plain").service
    opened, begun = threading.Event(), threading.Event()
    before = service.batcher._embed

    def slow(model, rows):
        begun.set()
        assert opened.wait(20)
        return before(model, rows)

    monkeypatch.setattr(service.batcher, "_embed", slow)
    body = {"model": "plain", "input": MANY} | ({} if instruction is None else {"instruction": instruction})
    parts = [{"type": "http.request", "body": json.dumps(body).encode()}]

    async def receive():
        if parts:
            return parts.pop()
        while not (begun.is_set() if instruction is None else instruction in prompter.read):
            await asyncio.sleep(0.001)
        assert service.batcher.tokens > 0
        return {"type": "http.disconnect"}

    sent = exchange(gated(create_app(service), service), receive)
    assert sent[0]["status"] == 499
    assert "promptembedder_dropped_requests_total 1.0" in service.metrics.page().decode()
    opened.set()
    prompter.open.set()
    until = time.monotonic() + 20
    while service.batcher.tokens:
        assert time.monotonic() < until
        time.sleep(0.001)
    assert service.soft_prompts.waiting == 0 or instruction
