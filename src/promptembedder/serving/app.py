"""The HTTP app: its addresses, and what each answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from pydantic import BaseModel, ValidationError

from promptembedder.serving import errors, metrics, page, schema
from promptembedder.serving.errors import RequestError
from promptembedder.serving.gate import Gate
from promptembedder.serving.service import Service

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)

_JSON = "application/json"
# Nobody sees it: the client has closed the connection.
_CLIENT_GONE = 499
_REFUSALS: dict[int | str, dict[str, Any]] = {"4XX": {"model": schema.ErrorBody}, "5XX": {"model": schema.ErrorBody}}
_ABOUT = """Texts to embeddings under an instruction that comes with the request.

`/v1/embeddings` takes what OpenAI's takes. `instruction` and `input_type` are beyond it."""


def create_app(service: Service) -> FastAPI:
    """An app that answers with a service; `gated` puts it behind limits."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.close)

    app = FastAPI(
        title="promptembedder",
        version=version("promptembedder"),
        description=_ABOUT,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    errors.install(app)
    _add_embeddings(app, service)
    _add_models(app, service)
    _add_state(app, service)
    page.add(app)

    return app


def _add_embeddings(app: FastAPI, service: Service) -> None:
    @app.post(
        "/v1/embeddings",
        response_model=schema.EmbeddingsResponse,
        responses=_REFUSALS,
        openapi_extra=_body(schema.EmbeddingsRequest, service),
    )
    async def embeddings(request: Request) -> Response:
        """Embed texts."""
        asked = await _parsed(request, schema.EmbeddingsRequest)
        client = request.client.host if request.client else ""
        body = await _unless_gone(request, service.embed(asked, client))
        return _gone_away(service) if body is None else Response(body, media_type=_JSON)

    @app.post(
        "/v1/explain",
        response_model=schema.Explanation,
        responses=_REFUSALS,
        openapi_extra=_body(schema.ExplainRequest, service),
    )
    async def explain(request: Request) -> Any:
        """The words that the soft tokens of an instruction mix."""
        asked = await _parsed(request, schema.ExplainRequest)
        found = await _unless_gone(request, service.explain(asked))
        return _gone_away(service) if found is None else found


def _add_models(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models", response_model=schema.ModelList, responses=_REFUSALS)
    async def models() -> Any:
        """Every name that `model` may be."""
        return {"object": "list", "data": [service.catalogue.describe(name) for name in service.catalogue.names]}

    @app.get("/v1/models/{name:path}", response_model=schema.Model, responses=_REFUSALS)
    async def model(name: str) -> Any:
        """One of them."""
        return service.catalogue.describe(name)


def _add_state(app: FastAPI, service: Service) -> None:
    @app.get("/health", response_model=schema.Status)
    async def health() -> Any:
        """The server lives."""
        return {"status": "ok"}

    @app.get("/ready", response_model=schema.Status, responses={503: {"model": schema.Status}})
    async def ready(response: Response) -> Any:
        """The server takes requests, and all instructions that it was started with are known."""
        response.status_code = 200 if service.status == "ready" else 503
        return {"status": service.status}

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def counts() -> Response:
        """For Prometheus."""
        return Response(service.metrics.page(), media_type=metrics.CONTENT_TYPE)


def _body(model: type[BaseModel], service: Service) -> dict[str, Any]:
    """A request's body as OpenAPI has it. It is not FastAPI's own, which reads JSON that is none, such as NaN."""
    described = model.model_json_schema()
    described["properties"]["model"]["enum"] = list(service.catalogue.names)
    return {"requestBody": {"required": True, "content": {_JSON: {"schema": described}}}}


async def _parsed(request: Request, model: type[M]) -> M:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != _JSON:
        raise RequestError(415, f"expected Content-Type: {_JSON}", "invalid_content_type")
    try:
        return model.model_validate_json(await request.body())
    except ValidationError as error:
        raise errors.invalid(error) from None


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T | None:
    """What the work gives; None where the client closes the connection before, which cancels the work."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        leaving.cancel()
        working.cancel()


def _gone_away(service: Service) -> Response:
    service.metrics.dropped.inc()
    return Response(status_code=_CLIENT_GONE)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def gated(app: FastAPI, service: Service, **limits: float) -> Gate:
    """The app behind its limits."""

    def answered(status: int) -> None:
        service.metrics.answers.labels(status).inc()

    return Gate(app, service.settings.api_key, lambda: service.stopping, answered, **limits)
