"""How a server holds up: load beyond its capacity, a stop under load, new instructions, and its throughput.

    python benchmarks/serving.py smollm2-135m same overload stop new throughput --minutes 10

Every part starts a server of its own and prints one JSON object.

- `same`: 1,000 mixed requests from 16 clients; the largest difference to `promptembedder.encode` of every text alone.
- `overload`: 8 clients send at twice the rate that was measured just before; the queue holds one second of work. Each
  answer is 200 or 429; requests without an answer are `lost`. The queue is looked at 20 times a second.
- `stop`: SIGTERM while 16 clients wait; requests that the server has taken (its metrics say so) and not answered.
- `new`: seconds of requests with a known instruction from 4 clients, without and with a new instruction a second.
- `throughput`: 32 clients of one text each, beside `model.encode` of the same texts in one batch; in turn, `--rounds`
  times; texts a second and the median ratio. With `--infinity PROGRAM` beside infinity, too, which serves the same
  backbone and reads the instruction in words before each text.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import httpx
import numpy as np

import infinity_server
import promptembedder

WORDS = [
    *("the", "river", "town", "bank", "guitar", "rain", "bridge", "children", "rates"),
    *("bread", "water", "light", "slow", "old", "two", "walk", "play", "meaning"),
]
INSTRUCTIONS = [f"Group the texts by {aspect}." for aspect in ("topic", "feeling", "length", "style", "place")]
URL = "/v1/embeddings"


def texts(count: int, words: int, seed: int) -> list[str]:
    """Texts of random words, up to so many."""
    drawn = random.Random(seed)
    return [" ".join(drawn.choices(WORDS, k=drawn.randint(max(1, words // 4), words))) for _ in range(count)]


@dataclass
class Server:
    """A server in a process of its own."""

    process: subprocess.Popen[str]
    address: str
    said: list[str] = field(default_factory=list)

    def metric(self, name: str) -> float:
        """A figure of /metrics; labels of a name are added up."""
        page = httpx.get(f"{self.address}/metrics", timeout=60).text
        found = re.findall(rf"^promptembedder_{name}(?:{{[^}}]*}})? (\S+)$", page, re.M)
        return sum(map(float, found))


@contextmanager
def serving(model: str, *options: str) -> Iterator[Server]:
    """Start a server, and stop it at the end."""
    command = [sys.executable, "-m", "promptembedder", "serve", model, "--port=0", "--dtype=float32", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        line = next(line for line in process.stderr if "listening" in line)
        found = re.search(r"http://[^ ,]+", line)
        assert found
        server = Server(process, found[0])
        threading.Thread(target=lambda: server.said.extend(process.stderr or ()), daemon=True).start()
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(120)


async def posted(client: httpx.AsyncClient, body: dict[str, Any]) -> tuple[int, float, Any]:
    """Status, seconds and content of an answer; status 0: none."""
    started = time.monotonic()
    try:
        answer = await client.post(URL, json=body)
    except httpx.HTTPError as error:
        return 0, time.monotonic() - started, repr(error)
    return answer.status_code, time.monotonic() - started, answer.json()


def quantiles(seconds: Sequence[float]) -> dict[str, float]:
    found = np.quantile(seconds, [0.5, 0.99]) if len(seconds) else (float("nan"),) * 2
    return {"p50_ms": round(1000 * float(found[0]), 1), "p99_ms": round(1000 * float(found[1]), 1)}


async def closed_loop(
    address: str, count: int, seconds: float, ask: Callable[[httpx.AsyncClient, int], Awaitable[Any]]
) -> int:
    """Clients that ask again when they are answered, until the time is over; how many requests."""
    until, asked = time.monotonic() + seconds, 0

    async def one(number: int) -> None:
        nonlocal asked
        async with httpx.AsyncClient(base_url=address, timeout=600) as client:
            while time.monotonic() < until:
                await ask(client, number)
                asked += 1

    await asyncio.gather(*(one(n) for n in range(count)))
    return asked


def same(arguments: argparse.Namespace) -> dict[str, Any]:
    """Answers beside the library, one text at a time."""
    drawn, requests = random.Random(0), []
    for n in range(arguments.requests):
        picked = drawn.sample(INSTRUCTIONS, drawn.choice([1, 1, 1, 2, 3]))
        requests.append((texts(drawn.choice([1, 1, 2, 5]), drawn.choice([4, 16, 60]), n), picked))
    answers: list[Any] = [None] * len(requests)

    async def run(server: Server) -> None:
        waiting = iter(range(len(requests)))

        async def one() -> None:
            async with httpx.AsyncClient(base_url=server.address, timeout=600) as client:
                for n in waiting:
                    given, picked = requests[n]
                    body = {"model": arguments.name, "input": given, "instruction": picked}
                    answers[n] = await posted(client, body)

        await asyncio.gather(*(one() for _ in range(16)))

    with serving(arguments.model) as server:
        asyncio.run(run(server))
        batches, all_texts = server.metric("batch_texts_count"), server.metric("texts_total")
    model = promptembedder.load(arguments.model, dtype="float32")
    worst, smallest = 0.0, 1.0
    for (given, picked), (status, _, content) in zip(requests, answers, strict=True):
        assert status == 200, content
        found = np.array([one["embedding"] for one in content["data"]]).reshape(len(picked), len(given), -1)
        alone = np.stack([promptembedder.encode(model, [text], picked) for text in given], axis=1)[:, :, 0]
        worst = max(worst, float(np.abs(found - alone).max()))
        smallest = min(smallest, float((found * alone).sum(-1).min()))
    return {
        "requests": len(requests),
        "texts_per_batch": round(all_texts / batches, 1),
        "largest_difference": worst,
        "smallest_cosine": round(smallest, 7),
    }


def overload(arguments: argparse.Namespace) -> dict[str, Any]:
    """Twice the capacity, open loop."""
    given = texts(64, 24, 1)

    def body(n: int) -> dict[str, Any]:
        return {"model": arguments.name, "input": [given[(4 * n + i) % 64] for i in range(4)]}

    with serving(arguments.model) as server:
        before, started = server.metric("tokens_total"), time.monotonic()
        asyncio.run(closed_loop(server.address, 8, 15, lambda client, n: posted(client, body(n))))
        seconds = time.monotonic() - started
        tokens_per_second = (server.metric("tokens_total") - before) / seconds
        requests_per_second = server.metric("answers_total") / seconds
    bound = int(tokens_per_second)
    statuses: Counter[int] = Counter()
    taken: list[float] = []
    deepest = 0.0

    async def run(server: Server) -> None:
        until = time.monotonic() + 60 * arguments.minutes
        gap = 8 / (2 * requests_per_second)

        async def ask(client: httpx.AsyncClient, n: int) -> None:
            status, spent, _ = await posted(client, body(n))
            statuses[status] += 1
            if status == 200:
                taken.append(spent)

        async def one(number: int) -> None:
            async with httpx.AsyncClient(base_url=server.address, timeout=600) as client:
                due, tasks, n = time.monotonic() + gap * number / 8, set(), number
                while due < until:
                    await asyncio.sleep(max(0.0, due - time.monotonic()))
                    task = asyncio.create_task(ask(client, n))
                    tasks.add(task)
                    task.add_done_callback(tasks.discard)
                    due, n = due + gap, n + 8
                await asyncio.gather(*tasks)

        async def look() -> None:
            nonlocal deepest
            async with httpx.AsyncClient(base_url=server.address, timeout=600) as client:
                while True:
                    page = (await client.get("/metrics")).text
                    found = re.search(r"^promptembedder_queue_tokens (\S+)", page, re.M)
                    deepest = max(deepest, float(found[1]) if found else 0.0)
                    await asyncio.sleep(0.05)

        looking = asyncio.create_task(look())
        await asyncio.gather(*(one(n) for n in range(8)))
        looking.cancel()

    with serving(arguments.model, f"--queue-tokens={bound}", f"--request-tokens={bound}") as server:
        asyncio.run(run(server))
        left = server.metric("queue_tokens")
    return {
        "minutes": arguments.minutes,
        "capacity_requests_per_second": round(requests_per_second, 1),
        "sent": statuses.total(),
        "answered": statuses[200],
        "refused_429": statuses[429],
        "lost": statuses.total() - statuses[200] - statuses[429],
        "queue_bound": bound,
        "deepest_queue": deepest,
        "left_in_queue": left,
        **quantiles(taken),
    }


def stop(arguments: argparse.Namespace) -> dict[str, Any]:
    """SIGTERM while clients wait."""
    given, statuses = texts(64, 24, 2), Counter[int]()

    async def run(server: Server) -> None:
        async def ask(client: httpx.AsyncClient, n: int) -> None:
            status, _, _ = await posted(client, {"model": arguments.name, "input": given[n : n + 4]})
            statuses[status] += 1
            if status != 200:
                await asyncio.sleep(0.05)

        async def end() -> None:
            await asyncio.sleep(6)
            server.process.send_signal(signal.SIGTERM)

        await asyncio.gather(closed_loop(server.address, 16, 6.3, ask), end())

    with serving(arguments.model) as server:
        asyncio.run(run(server))
        code = server.process.wait(120)
    return {
        "answered": statuses[200],
        "refused_while_stopping": statuses[503],
        "unanswered": statuses[0],
        "others": statuses.total() - statuses[200] - statuses[503] - statuses[0],
        "exit_code": code,
        "said": [line.strip() for line in server.said if "stopping" in line],
    }


def new(arguments: argparse.Namespace) -> dict[str, Any]:
    """Known instructions beside new ones."""
    given = texts(64, 24, 3)

    async def run(server: Server, fresh: str | None) -> tuple[list[float], list[float]]:
        known: list[float] = []
        written: list[float] = []

        async def ask(client: httpx.AsyncClient, n: int) -> None:
            known.append((await posted(client, {"model": arguments.name, "input": given[n]}))[1])

        async def ask_new() -> None:
            async with httpx.AsyncClient(base_url=server.address, timeout=600) as client:
                tasks = []
                for n in range(int(arguments.seconds)):
                    body = {"model": arguments.name, "input": given[n % 64], "instruction": f"{fresh}, part {n}."}
                    tasks.append(asyncio.create_task(posted(client, body)))
                    await asyncio.sleep(1)
                written.extend([spent for _, spent, _ in await asyncio.gather(*tasks)])

        loop = closed_loop(server.address, 4, arguments.seconds, ask)
        await (asyncio.gather(loop, ask_new()) if fresh else loop)
        return known, written

    with serving(arguments.model) as server:
        asyncio.run(run(server, None))
        alone, _ = asyncio.run(run(server, None))
        beside, written = asyncio.run(run(server, "Find what the text is about"))
    found = {"alone": quantiles(alone), "beside_new": quantiles(beside), "new": quantiles(written)}
    return found | {"p99_ratio": round(found["beside_new"]["p99_ms"] / found["alone"]["p99_ms"], 2)}


async def light_clients(address: str, bodies: Sequence[dict[str, Any]], seconds: float) -> int:
    """A client per body that asks again when it is answered; how many requests.

    They share the cores with the server that is measured, so they use aiohttp, whose parser is in C.
    """
    until, asked = time.monotonic() + seconds, 0
    async with aiohttp.ClientSession(address, connector=aiohttp.TCPConnector(limit=0)) as client:

        async def one(body: dict[str, Any]) -> None:
            nonlocal asked
            while time.monotonic() < until:
                async with client.post(URL, json=body) as answer:
                    assert answer.status == 200, await answer.text()
                    await answer.read()
                asked += 1

        await asyncio.gather(*map(one, bodies))
    return asked


def throughput(arguments: argparse.Namespace) -> dict[str, Any]:
    """Clients of one text beside one batch."""
    given = texts(32, 24, 4)
    model = promptembedder.load(arguments.model, dtype="float32")
    model.encode(given, batch_size=32)
    instruction = model.prompts["query"]
    rates: dict[str, list[float]] = {"server": [], "encode": [], "infinity": []}
    with ExitStack() as stack:
        server = stack.enter_context(serving(arguments.model))
        bodies = {"server": [{"model": arguments.name, "input": text, "encoding_format": "base64"} for text in given]}
        addresses = {"server": server.address}
        if arguments.infinity:
            addresses["infinity"] = stack.enter_context(infinity_server.infinity(arguments.infinity, model))
            bodies["infinity"] = [
                {
                    "model": infinity_server.NAME,
                    "input": f"Instruct: {instruction}\nQuery: {text}",
                    "encoding_format": "base64",
                }
                for text in given
            ]

        for name, address in addresses.items():
            asyncio.run(light_clients(address, bodies[name], 5))
        for _ in range(arguments.rounds):
            for name, address in addresses.items():
                started = time.monotonic()
                asked = asyncio.run(light_clients(address, bodies[name], arguments.seconds))
                rates[name].append(asked / (time.monotonic() - started))
            started, done = time.monotonic(), 0
            while time.monotonic() < started + arguments.seconds:
                model.encode(given, batch_size=32)
                done += 32
            rates["encode"].append(done / (time.monotonic() - started))
            print({name: round(of[-1], 1) for name, of in rates.items() if of}, file=sys.stderr, flush=True)
        per_batch = server.metric("texts_total") / server.metric("batch_texts_count")
    found = {f"{name}_texts_per_second": round(statistics.median(of), 1) for name, of in rates.items() if of}
    for name in ("encode", *addresses):
        if name != "server":
            ratios = [ours / theirs for ours, theirs in zip(rates["server"], rates[name], strict=True)]
            found[f"ratio_to_{name}"] = round(statistics.median(ratios), 3)
    return found | {"texts_per_batch": round(per_batch, 1)}


PARTS = {"same": same, "overload": overload, "stop": stop, "new": new, "throughput": throughput}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("parts", nargs="+", choices=PARTS)
    parser.add_argument("--minutes", type=float, default=10, help="of overload")
    parser.add_argument("--seconds", type=float, default=30, help="of one measurement of the last two")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--infinity", metavar="PROGRAM", help="infinity_emb of an environment that has it")
    parser.add_argument("--requests", type=int, default=1000)
    arguments = parser.parse_args()
    arguments.name = os.path.basename(os.path.normpath(arguments.model))
    for part in arguments.parts:
        print(json.dumps({part: PARTS[part](arguments)}), flush=True)


if __name__ == "__main__":
    main()
