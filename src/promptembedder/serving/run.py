"""A server from start to end."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any
from weakref import WeakKeyDictionary

import uvicorn

from promptembedder.errors import PromptEmbedderError
from promptembedder.progress import say
from promptembedder.serving.app import create_app, gated
from promptembedder.serving.gate import Gate
from promptembedder.serving.models import open_models
from promptembedder.serving.service import Service
from promptembedder.serving.settings import ServeSettings

logger = logging.getLogger(__name__)

_LOOPBACK = ("127.", "localhost", "::1")
# After a signal to stop, new connections are still taken for this time and refused with a reason, which a client that
# has just connected can read.
_LEAST_STOP_SECONDS = 0.5
_TICK_SECONDS = 0.05
# After the queue is empty; clients that have not read their answers by then do not get them.
_UNREAD_SECONDS = 30
# Longer than that of most clients, which therefore close idle connections themselves.
_KEEP_ALIVE_SECONDS = 75
# The head of a request must be there by then; looked at now and then.
_HEAD_SECONDS = 30
_LOOK_SECONDS = 5
_TOO_SLOW = (
    b"HTTP/1.1 408 Request Timeout\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n"
    b'{"error":{"message":"the request did not come in time","type":"invalid_request_error","param":null,'
    b'"code":"timeout"}}'
)


def serve(
    models: Sequence[str | Path],
    settings: ServeSettings,
    *,
    named: Mapping[str, str] | None = None,
    instructions: Sequence[str] = (),
    device: str | None = None,
    dtype: str | None = None,
) -> None:
    """Answer requests until SIGTERM or SIGINT; what is queued by then is still answered.

    Args:
        models: folders, names or hub ids, as for `load`.
        settings: address and limits.
        named: instructions by name, which clients call as `MODEL:NAME`.
        instructions: whose soft prompts are written at once.
        device: where the models run; unset: the accelerator, if there is one.
        dtype: as in `load`.

    Raises:
        PromptEmbedderError: a model cannot be opened or a name not be used; the address is taken.
    """
    listening = _listen(settings)  # before the models open, which takes longer
    with listening:
        service = Service(open_models(models, named or {}, device=device, dtype=dtype), settings, instructions)
        gate = gated(create_app(service), service)
        config = uvicorn.Config(
            gate,
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            lifespan="on",
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            timeout_notify=_LOOK_SECONDS,
            callback_notify=lambda: slow.close(),
        )
        server = uvicorn.Server(config)
        slow = _SlowClients(server)
        stop = _Stop(server, service, gate)
        # uvicorn's own would close connections at once, and end the process by the signal.
        server.handle_exit = stop.on_signal  # type: ignore[assignment, method-assign]
        if not settings.host.startswith(_LOOPBACK) and settings.api_key is None:
            logger.warning("listening on %s without an API key: anybody who reaches it may use it", settings.host)
        listening.listen(config.backlog)  # so that nobody who reads the next line is turned away
        host, port = listening.getsockname()[:2]
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        say(f"listening on http://{address}, models: {', '.join(service.catalogue.names)}")
        server.run([listening])


def _listen(settings: ServeSettings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((settings.host, settings.port))
    except OSError as error:
        listening.close()
        raise PromptEmbedderError(
            f"cannot listen on {settings.host}:{settings.port}: {error.strerror or error}"
        ) from error
    return listening


class _SlowClients:
    """Connections on which no request has come in whole; uvicorn waits for them for ever."""

    def __init__(self, server: uvicorn.Server) -> None:
        self._server = server
        self._since: WeakKeyDictionary[Any, float] = WeakKeyDictionary()

    async def close(self) -> None:
        """Close those that are too old."""
        now = time.monotonic()
        for connection in list[Any](self._server.server_state.connections):
            request = connection.cycle
            if request is not None and not request.response_complete:
                self._since.pop(connection, None)
                continue
            limit = _HEAD_SECONDS if request is None else _KEEP_ALIVE_SECONDS + _LOOK_SECONDS
            if now - self._since.setdefault(connection, now) >= limit:
                connection.transport.write(_TOO_SLOW)
                connection.transport.close()


class _Stop:
    """How a server ends: no new work, the rest is answered. A second signal ends it at once."""

    def __init__(self, server: uvicorn.Server, service: Service, gate: Gate) -> None:
        self._server, self._service, self._gate = server, service, gate
        self._task: asyncio.Task[None] | None = None

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Begin to stop."""
        again, self._service.stopping = self._service.stopping, True
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:  # not begun yet
            self._server.should_exit = True
            return
        if again:
            self._server.force_exit = self._server.should_exit = True
            loop.call_soon_threadsafe(self._abandon)
        else:
            loop.call_soon_threadsafe(self._begin, loop, signal.Signals(number).name)

    def _begin(self, loop: asyncio.AbstractEventLoop, name: str) -> None:
        self._task = loop.create_task(self._drain())
        with suppress(OSError):  # whoever has started the server may be gone
            say(f"stopping on {name}: {self._gate.open_requests} requests are still answered")

    async def _drain(self) -> None:
        least = time.monotonic() + _LEAST_STOP_SECONDS
        busy = time.monotonic()
        while self._gate.open_requests or time.monotonic() < least:
            if self._service.batcher.tokens:
                busy = time.monotonic()
            elif time.monotonic() - busy > _UNREAD_SECONDS:  # all is computed: these clients do not read
                logger.warning("%d requests are given up: their clients do not read", self._gate.open_requests)
                self._abandon()
                self._server.force_exit = True
                break
            await asyncio.sleep(_TICK_SECONDS)
        self._server.should_exit = True

    def _abandon(self) -> None:
        """Close connections and send nothing more; nothing else ends a task that waits for its client to read."""
        for connection in list[Any](self._server.server_state.connections):
            connection.transport.abort()
