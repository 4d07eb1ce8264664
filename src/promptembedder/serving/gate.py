"""What stands before an app: key, size and time limits of a request, and how many are answered at once.

A body comes in whole before the app sees the request, so that no half-sent request takes part in anything.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from promptembedder.serving.errors import RequestError
from promptembedder.serving.settings import BODY_SECONDS, MOST_BODY_BYTES, MOST_HELD_BYTES, MOST_REQUESTS

# Of no use to anybody who must not embed texts.
_OPEN = {"/", "/health", "/ready", "/docs", "/openapi.json"}
_WORK = "/v1/"


class ClientGoneError(Exception):
    """The client went while its request was read."""


class Gate:
    """An ASGI app around another one.

    Args:
        app: that answers requests.
        api_key: that clients must send; unset: none.
        stopping: whether the server takes no more work.
        answered: called with the status of every answer on /v1.
        body_seconds: after which a body must be there.
    """

    def __init__(
        self,
        app: ASGIApp,
        api_key: str | None,
        stopping: Callable[[], bool],
        answered: Callable[[int], None],
        body_seconds: float = BODY_SECONDS,
    ) -> None:
        self._app, self._stopping, self._answered, self._body_seconds = app, stopping, answered, body_seconds
        self._expected = None if api_key is None else f"Bearer {api_key}".encode()
        self.open_requests = self.held_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        counted = self._counting(send) if scope["path"].startswith(_WORK) else send
        self.open_requests += 1
        body = b""
        try:
            self._check(scope)
            body = await self._body(scope, receive)
        except RequestError as error:
            await error.response()(scope, receive, counted)
        except ClientGoneError:
            pass
        else:
            await self._app(scope, _replaying(body, receive), counted)
        finally:
            self.open_requests -= 1
            self.held_bytes -= len(body)

    def _check(self, scope: Scope) -> None:
        path: str = scope["path"]
        if self._expected is not None and path not in _OPEN and not path.startswith("/static/"):
            sent = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
            if not hmac.compare_digest(sent, self._expected):
                raise RequestError(
                    401, "expected the header 'Authorization: Bearer KEY', with the key", "invalid_api_key"
                )
        if path.startswith(_WORK) and self._stopping():
            raise RequestError(503, "the server is stopping", "stopping")
        if self.open_requests > MOST_REQUESTS and path not in _OPEN:
            raise RequestError(
                429, f"{MOST_REQUESTS} requests are being answered already", "too_many_requests", None, 1
            )

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        """The whole body.

        Raises:
            RequestError: it is too large, or does not come.
            ClientGoneError: the client is gone.
        """
        too_large = RequestError(413, f"a body may have {MOST_BODY_BYTES} bytes", "body_too_large")
        length = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if length.isdigit() and (len(length) > 12 or int(length) > MOST_BODY_BYTES):  # Python reads 4,300 digits
            raise too_large
        parts, size = [], 0
        try:
            async with asyncio.timeout(self._body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGoneError
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    self.held_bytes += len(parts[-1])
                    if size > MOST_BODY_BYTES:
                        raise too_large
                    if self.held_bytes > MOST_HELD_BYTES:
                        raise RequestError(429, "other requests are too large; try again", "too_many_bytes", None, 1)
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            self.held_bytes -= size
            raise RequestError(408, f"the body did not come within {self._body_seconds:g} s", "timeout") from None
        except (RequestError, ClientGoneError, asyncio.CancelledError):
            self.held_bytes -= size
            raise

    def _counting(self, send: Send) -> Send:
        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._answered(message["status"])
            await send(message)

        return counted


def _replaying(body: bytes, receive: Receive) -> Receive:
    sent = False

    async def replay() -> Message:
        nonlocal sent
        if sent:
            return await receive()  # waits until the client is gone
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
