"""The server's app on a Ray cluster: replicas that hold the models, and a front that asks another one where one dies.

An embedding depends on nothing but its request, so that a request may be answered twice.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ray import serve
from ray.exceptions import ActorUnavailableError, RayActorError
from ray.serve.handle import DeploymentHandle
from starlette.types import Message, Receive, Scope, Send

from promptembedder.serving.settings import MOST_BODY_BYTES, MOST_REQUESTS, ServeSettings

# A replica that has died is replaced while others answer; a request waits for it where there is no other.
_TRIES, _PAUSE_SECONDS = 60, 0.5
_TOO_LONG = b'{"error":{"message":"body too long","type":"invalid_request_error","param":null,"code":"too_long"}}'
_NOBODY = b'{"error":{"message":"no replica answers","type":"server_error","param":null,"code":"unavailable"}}'
_JSON = [(b"content-type", b"application/json")]
Answer = tuple[int, list[tuple[bytes, bytes]], bytes]


def application(
    models: Sequence[str | Path],
    settings: ServeSettings | None = None,
    *,
    named: Mapping[str, str] | None = None,
    instructions: Sequence[str] = (),
    device: str | None = None,
    dtype: str | None = None,
    **options: Any,
) -> serve.Application:
    """What `ray.serve.run` takes; its addresses and answers are those of `promptembedder serve`.

    Args:
        models: folders, names or hub ids, as for `load`; every replica opens them.
        settings: limits of a replica; its address is Ray's affair.
        named: instructions by name, which clients call as `MODEL:NAME`.
        instructions: whose soft prompts are written at once.
        device: where the models run; unset: the accelerator, if there is one.
        dtype: as in `load`.
        **options: of `ray.serve.deployment`, such as `num_replicas`, `autoscaling_config` and `ray_actor_options`.

    Example:
        >>> from ray import serve
        >>> serve.run(application(["smollm2-135m"], num_replicas=2))  # doctest: +SKIP
    """
    replica = serve.deployment(**{"max_ongoing_requests": MOST_REQUESTS, "name": "models", **options})(_Replica)
    bound = replica.bind([str(path) for path in models], settings, dict(named or {}), list(instructions), device, dtype)
    front = serve.deployment(name="front", max_ongoing_requests=MOST_REQUESTS)(serve.ingress()(_Front))
    return front.bind(bound)  # type: ignore[no-any-return]


class _Replica:
    """Holds the models; answers requests that have come in whole."""

    def __init__(
        self,
        models: list[str],
        settings: ServeSettings | None,
        named: dict[str, str],
        instructions: list[str],
        device: str | None,
        dtype: str | None,
    ) -> None:
        from promptembedder.serving.app import create_app, gated
        from promptembedder.serving.models import open_models
        from promptembedder.serving.service import Service

        opened = open_models(models, named, device=device, dtype=dtype)
        self._service = Service(opened, settings or ServeSettings(), instructions)
        self._app = gated(create_app(self._service), self._service)

    async def answer(self, scope: dict[str, Any], body: bytes) -> Answer:
        """Status, headers and body of an answer."""
        sent: list[Message] = []
        waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Message:
            if not waiting:
                await asyncio.Event().wait()  # where the client goes, Ray cancels the call
            return waiting.pop()

        async def send(message: Message) -> None:
            sent.append(message)

        await self._app({**scope, "app": None}, receive, send)
        start = next(one for one in sent if one["type"] == "http.response.start")
        content = b"".join(one.get("body", b"") for one in sent if one["type"] == "http.response.body")
        return start["status"], list(start.get("headers", [])), content

    def check_health(self) -> None:
        """Called by Ray."""

    def __del__(self) -> None:
        if hasattr(self, "_service"):
            self._service.close()


class _Front:
    """Hands requests over to replicas."""

    def __init__(self, models: DeploymentHandle) -> None:
        self._models = models

    def __serve_build_asgi_app__(self) -> Any:
        """Called by Ray."""

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await self._app(scope, receive, send)

        return app  # a function: uvicorn takes a bound method for an application of ASGI 2

    async def _app(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            while (await receive())["type"] != "lifespan.shutdown":
                await send({"type": "lifespan.startup.complete"})
            await send({"type": "lifespan.shutdown.complete"})
            return
        body = await _whole_body(receive)
        plain = {name: scope.get(name) for name in _KEPT}
        answer = (413, _JSON, _TOO_LONG) if body is None else await _asked(self._models, plain, body)
        status, headers, content = answer
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": content})


# What of a request's scope a replica needs, and what can travel.
_KEPT = (
    *("type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path"),
    *("headers", "client", "server"),
)


async def _whole_body(receive: Receive) -> bytes | None:
    found: bytes = b""
    while True:
        message = await receive()
        found += message.get("body", b"")
        if len(found) > MOST_BODY_BYTES:
            return None
        if not message.get("more_body", False):
            return found


async def _asked(models: DeploymentHandle, scope: dict[str, Any], body: bytes) -> Answer:
    for _ in range(_TRIES):
        try:
            return await models.answer.remote(scope, body)  # type: ignore[no-any-return]
        except (RayActorError, ActorUnavailableError):
            await asyncio.sleep(_PAUSE_SECONDS)
    return 503, _JSON, _NOBODY
