"""Refusals as OpenAI words them: `{"error": {message, type, param, code}}` and a status."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

_TYPES = {401: "authentication_error", 429: "rate_limit_error"}
# Tags of the kinds of input, and parts of a request; no names that a client has sent.
_UNNAMED = {"text", "texts", "ids", "id_lists", "one", "several"}
_MOST_CHARACTERS = 500


class RequestError(Exception):
    """A request that is refused.

    Args:
        status: of HTTP.
        message: what was found, and what is valid; none of the client's texts.
        code: for programs.
        param: field of the request.
        retry_after: seconds after which another try may succeed.
    """

    def __init__(
        self, status: int, message: str, code: str, param: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
        if status == 401:
            self.headers["WWW-Authenticate"] = "Bearer"
        if status == 503:
            self.headers |= {"Connection": "close", "Retry-After": "1"}

    def response(self) -> JSONResponse:
        """What the client gets."""
        return _response(self.status, self.message, self.code, self.param, self.headers)


def install(app: FastAPI) -> None:
    """Let an app answer every error in OpenAI's words."""
    app.add_exception_handler(RequestError, _refused)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _failed)


async def _refused(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestError)
    return error.response()


def invalid(error: ValidationError) -> RequestError:
    """What a schema has found first; no value is repeated, because it may be a text."""
    first: Mapping[str, Any] = error.errors(include_url=False, include_input=False)[0]
    if first["type"] == "json_invalid":
        return RequestError(400, f"the body is no valid JSON: {first['ctx']['error']}", "invalid_json")
    param = _param(first["loc"])
    if param is None:
        return RequestError(400, "the body: expected a JSON object", "invalid_body")
    message = _MESSAGES.get(first["type"], first["msg"])
    return RequestError(400, f"{param}: {message}", _CODES.get(first["type"], "invalid_value"), param)


_CODES = {"missing": "missing_field", "extra_forbidden": "unknown_field"}
_MESSAGES = {"extra_forbidden": "the field is unknown, see /docs", "string_pattern_mismatch": "expected a sentence"}


def _param(place: Sequence[int | str]) -> str | None:
    """`input[3]` for ("input", "texts", 3)."""
    found = ""
    for part in place:
        if isinstance(part, int):
            found += f"[{part}]" if found else ""
        elif part not in _UNNAMED:
            found += f".{part}" if found else part
    # A field that is unknown may have any name.
    return found.encode("utf-8", "replace").decode()[:_MOST_CHARACTERS] or None


async def _http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        return _response(404, f"{request.method} {request.url.path[:200]} is unknown, see /docs", "unknown_url")
    return _response(error.status_code, str(error.detail), "invalid_request", None, error.headers)


async def _failed(request: Request, error: Exception) -> JSONResponse:
    return _response(500, "the server has failed; its log says why", "internal_error")


def _response(
    status: int, message: str, code: str, param: str | None = None, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    message = message.encode("utf-8", "replace").decode()  # a lone surrogate has no UTF-8
    body = {"error": {"message": message[:_MOST_CHARACTERS], "type": kind, "param": param, "code": code}}
    return JSONResponse(body, status, headers=headers)
