"""The routes, and the application made of them."""

import asyncio
import base64
import hashlib
import logging
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from ..api import Runtime
from ..errors import VitrailError
from . import schemas
from .answers import images_of
from .chat import chat_completions, read_messages
from .completions import completions
from .embeddings import embeddings
from .errors import ApiError, as_api_error
from .exchange import JsonResponse, flight_of, read_body, watch_client
from .gate import Gate
from .logs import log
from .metrics import CONTENT_TYPE, Metrics
from .schemas import TokenizeBody, urls_of
from .service import Service, State
from .settings import Settings

Handler = Callable[[Service, Request], Awaitable[Response]]

_PAGE = Path(__file__).parent / "page.html"


def create_app(runtime: Runtime | Callable[[], Runtime], settings: Settings) -> FastAPI:
    """The ASGI application. `runtime` is a Runtime, or what loads one once the application has started.

    The application closes the Runtime when it ends. Its `state.service` is the `Service`.
    """
    metrics = Metrics()
    service = Service(settings, runtime if callable(runtime) else lambda: runtime, metrics)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await service.start()
        try:
            yield
        finally:
            await service.stop()

    # The pages that show the schema would load scripts from other hosts.
    app = FastAPI(title="vitrail", version=package_version("vitrail"), lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.service = service
    _add_routes(app, service)
    app.openapi = partial(_openapi, app, type(app).openapi)  # type: ignore[method-assign]
    app.add_exception_handler(ApiError, _tell_error)
    app.add_exception_handler(VitrailError, _tell_error)
    app.add_exception_handler(HTTPException, _tell_http_error)
    app.add_middleware(Gate, settings=settings, metrics=metrics)
    return app


def _add_routes(app: FastAPI, service: Service) -> None:
    def add(
        method: str,
        path: str,
        handler: Handler,
        answer: type[BaseModel] | None,
        *errors: int,
        body: type[BaseModel] | None = None,
        kinds: tuple[str, ...] = (),
    ) -> None:
        """A route, with what its schema says: the body, the answer, other kinds of it, and the errors."""

        async def endpoint(request: Request) -> Response:
            return await handler(service, request)

        described: dict[int | str, dict[str, Any]] = {
            200: {"model": answer} if answer else {},
            **{status: {"model": schemas.ErrorBody} for status in (*errors, 401, 403)},
        }
        if kinds:
            described[200]["content"] = {kind: {"schema": _KINDS[kind]} for kind in kinds}
        extra = None
        if body is not None:
            reference = {"$ref": f"#/components/schemas/{body.__name__}"}
            extra = {"requestBody": {"required": True, "content": {"application/json": {"schema": reference}}}}
        app.add_api_route(
            path,
            endpoint,
            methods=[method],
            response_model=None,
            response_class=JsonResponse if answer else Response,
            responses=described,
            openapi_extra=extra,
            name=handler.__name__,
            summary=(handler.__doc__ or "").partition("\n")[0],
        )

    refusals = (400, 404, 408, 413, 415, 429, 500, 503, 504)
    stream = ("text/event-stream",)
    chat, text = (schemas.ChatCompletion, schemas.ChatBody), (schemas.TextCompletion, schemas.CompletionBody)
    add("POST", "/v1/chat/completions", chat_completions, chat[0], *refusals, body=chat[1], kinds=stream)
    add("POST", "/v1/completions", completions, text[0], *refusals, body=text[1], kinds=stream)
    add("POST", "/v1/embeddings", embeddings, schemas.EmbeddingList, *refusals, body=schemas.EmbeddingBody)
    add("POST", "/tokenize", tokenize, schemas.Tokens, *refusals, body=TokenizeBody)
    add("GET", "/v1/models", models, schemas.ModelList, 500, 503)
    add("GET", "/health", health, schemas.Status, 500)
    add("GET", "/ready", ready, schemas.Status, 500, 503)
    add("GET", "/metrics", prometheus, None, kinds=("text/plain",))
    add("GET", "/version", version, schemas.Version)
    add("GET", "/", page, None, kinds=("text/html",))


async def health(service: Service, _: Request) -> Response:
    """Whether the server is alive: 200 also while it loads or drains, 500 when its engine has died."""
    if service.state is State.DEAD:
        raise ApiError(500, "the engine of the server failed", code="engine_dead")
    return JsonResponse({"status": service.state})


async def ready(service: Service, _: Request) -> Response:
    """Whether requests are taken."""
    service.check_ready()
    return JsonResponse({"status": service.state})


async def version(_service: Service, _: Request) -> Response:
    """The version of vitrail."""
    return JsonResponse({"version": package_version("vitrail")})


async def models(service: Service, _: Request) -> Response:
    """The model that is served."""
    runtime = service.runtime
    card = {
        "id": service.settings.name,
        "object": "model",
        "created": int(_STARTED),
        "owned_by": "vitrail",
        "max_model_len": runtime.max_model_len if service.chats else None,
        "kind": "chat" if service.chats else "contrastive",
    }
    return JsonResponse({"object": "list", "data": [card]})


async def prometheus(service: Service, _: Request) -> Response:
    """Prometheus metrics: requests, and every stage of the engine."""
    return Response(await asyncio.to_thread(service.metrics.expose), media_type=CONTENT_TYPE)


async def tokenize(service: Service, request: Request) -> Response:
    """Count the tokens and tiles of a prompt, from the headers of its images alone."""
    async with flight_of(service, request) as flight:
        body = await read_body(request, TokenizeBody)
        watch_client(request, flight)
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "give prompt or messages, and not both", param="prompt")
        if body.messages is None:
            service.require_model(body.model)
        else:
            service.require_chat(body.model)
        urls = urls_of(body.messages or [])
        return JsonResponse(await service.run_reading(flight, urls, partial(_tokens, service, body)))


def _tokens(service: Service, body: TokenizeBody) -> dict[str, Any]:
    runtime = service.runtime
    try:
        if body.messages is None:
            assert body.prompt is not None and runtime.tokenizer is not None
            ids, image_tokens, images = runtime.tokenizer.encode(body.prompt), 0, []
        else:
            conversation = read_messages(service, body.messages)
            caps = {"max_tiles": body.max_tiles, "total_max_tiles": body.total_max_tiles}
            prepared = runtime.processor.count(conversation, **caps)
            ids, image_tokens, images = prepared.token_ids, prepared.image_tokens, images_of(prepared)
    except Exception as error:
        raise as_api_error(error, param="prompt" if body.messages is None else "messages") from error
    return {
        "count": len(ids),
        "max_model_len": runtime.max_model_len if service.chats else None,
        "tokens": ids,
        "image_tokens": image_tokens,
        "image_tiles": sum(image["tiles"] for image in images),
        "images": images,
    }


async def page(_service: Service, _: Request) -> Response:
    """A page to try the model at."""
    return Response(_PAGE.read_bytes(), media_type="text/html", headers=_page_headers())


def _page_headers() -> dict[str, str]:
    """What the page may do: run the script and the style that stand in it, and talk to this server."""
    text = _PAGE.read_text(encoding="utf-8")
    hashes = {}
    for tag in ("script", "style"):
        blocks = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digests = [base64.b64encode(hashlib.sha256(block.encode()).digest()).decode() for block in blocks]
        hashes[tag] = " ".join(f"'sha256-{digest}'" for digest in digests)
    policy = (
        f"default-src 'none'; script-src {hashes['script']}; style-src {hashes['style']}; "
        "img-src 'self' data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return {
        "content-security-policy": policy,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }


_STARTED = time.time()
# Of events the schema is that of one: `data` is a chunk as JSON, and [DONE] the last of them.
_EVENT = {"type": "object", "required": ["data"], "properties": {"data": {"type": "string"}}}
_KINDS: dict[str, dict[str, Any]] = {
    "text/event-stream": _EVENT,
    "text/plain": {"type": "string"},
    "text/html": {"type": "string"},
}


async def _tell_error(request: Request, error: Exception) -> Response:
    told = as_api_error(error)
    if told.status == 500 and error.__cause__ is not None and isinstance(error, ApiError):
        log("request failed", logging.ERROR, request_id=request.state.request_id, exc_info=error.__cause__)
    return JsonResponse(told.body, told.status, headers=told.headers)


async def _tell_http_error(_: Request, error: Exception) -> Response:
    """No such route, or not by this method."""
    assert isinstance(error, HTTPException)
    told = ApiError(error.status_code, str(error.detail))
    return JsonResponse(told.body, told.status, headers=error.headers)


def _openapi(app: FastAPI, original: Callable[[FastAPI], dict[str, Any]]) -> dict[str, Any]:
    """The schema with the bodies, which the routes read themselves."""
    if app.openapi_schema is None:
        schema = original(app)
        bodies = (schemas.ChatBody, schemas.CompletionBody, schemas.EmbeddingBody, TokenizeBody)
        _, definitions = models_json_schema(
            [(body, "validation") for body in bodies], ref_template="#/components/schemas/{model}"
        )
        schema["components"]["schemas"] |= definitions["$defs"]
        schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        schema["security"] = [{"key": []}, {}]
        app.openapi_schema = schema
    return app.openapi_schema
