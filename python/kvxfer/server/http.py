# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""The front: an OpenAI-compatible HTTP app over any Backend, the router's pool or one worker's own engine.

The 200 of a stream is sent with the first token, so whatever fails before is an HTTP status; after it an
error is an SSE ``error`` event, and no ``[DONE]`` follows. A client that leaves, streaming or not, closes
the backend's iterator at once.
"""

from __future__ import annotations

import asyncio
import re
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvxfer import __version__
from kvxfer.server.answers import Answers
from kvxfer.server.openai import Call, Limits, error_body, parse_call
from kvxfer.server.sse import EventStream, frames_of, until_disconnected
from kvxfer.server.text import Text
from kvxfer.server.wire import Backend, RequestRefusedError

__all__ = ["add_error_handlers", "create_app", "error_response"]

MAX_BODY_NBYTES = 16 << 20
_LONG_BODY_NBYTES = 32 << 10  # longer ones are tokenized off the event loop
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


def create_app(
    backend: Backend,
    text: Text,
    served_model_names: Sequence[str],
    *,
    metrics: Callable[[], Awaitable[bytes]] | None = None,
    request_timeout_s: float = 600.0,
    max_body_nbytes: int = MAX_BODY_NBYTES,
    lifespan: Callable[[FastAPI], AbstractAsyncContextManager[None]] | None = None,
) -> FastAPI:
    """Args:
    metrics: answers ``/metrics`` in the backend's place (the router asks its workers first).
    """
    app = FastAPI(
        title="kvxfer",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        lifespan=lifespan,
    )
    add_error_handlers(app)
    app.add_middleware(_RequestId)
    models = tuple(served_model_names)

    async def answer(request: Request, *, chat: bool) -> Response:
        body = await _read_body(request, max_body_nbytes)

        def parse() -> Call:
            return parse_call(
                body,
                chat=chat,
                text=text,
                limits=Limits(models, backend.max_model_len, request_timeout_s),
                request_id=request.state.request_id,
                traceparent=request.headers.get("traceparent"),
            )

        call = await asyncio.to_thread(parse) if len(body) > _LONG_BODY_NBYTES else parse()
        answers = Answers(call, backend, text)
        if call.stream:
            chunks = answers.chunks()
            first = await until_disconnected(request.receive, anext(chunks))
            return EventStream(frames_of(first, chunks, answers, call))
        await until_disconnected(request.receive, _exhaust(answers.chunks()))
        return _json(answers.body())

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await answer(request, chat=False)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await answer(request, chat=True)

    def model_card(name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": 0,
            "owned_by": "kvxfer",
            "max_model_len": backend.max_model_len,
        }

    @app.get("/v1/models")
    async def list_models() -> Response:
        return _json({"object": "list", "data": [model_card(name) for name in models]})

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> Response:
        if name not in models:
            raise RequestRefusedError(
                404,
                f"the model {name!r} does not exist; served here: {', '.join(models)}",
                code="model_not_found",
                param="model",
            )
        return _json(model_card(name))

    @app.get("/health")
    async def health() -> Response:
        return _json({"status": "ok"})

    @app.get("/readiness")
    async def readiness() -> Response:
        ready, why = backend.ready()
        return _json({"ready": ready, "reason": why}, 200 if ready else 503)

    @app.get("/version")
    async def version() -> Response:
        return _json({"version": __version__})

    @app.get("/metrics")
    async def show_metrics() -> Response:
        content = backend.metrics() if metrics is None else await metrics()
        return Response(content, media_type=CONTENT_TYPE_LATEST)

    return app


def _json(content: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(content), status, media_type="application/json")


def error_response(error: RequestRefusedError) -> Response:
    response = _json(error_body(error), error.status)
    if error.retry_after_s is not None:
        response.headers["Retry-After"] = str(max(1, round(error.retry_after_s)))
    return response


def add_error_handlers(app: FastAPI) -> None:
    """Every error of the app leaves in OpenAI's form: refusals, unknown routes and methods, our bugs."""

    @app.exception_handler(RequestRefusedError)
    async def refused(request: Request, error: RequestRefusedError) -> Response:
        return error_response(error)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {error.detail}"
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http_error")
        response = error_response(RequestRefusedError(error.status_code, message, code=code))
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=499)  # nobody reads it; logs show it

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> Response:
        # starlette raises it again behind us, so that the trace is logged.
        request_id = request.state.request_id
        message = f"internal error, please report it with the server's log (request {request_id})"
        response = error_response(RequestRefusedError(500, message, code="internal"))
        response.headers["X-Request-Id"] = request_id  # this answer passes outside the middleware
        # uvicorn hangs up when an app has raised; a client that is not told may send the next request into that.
        response.headers["Connection"] = "close"
        return response


async def _read_body(request: Request, limit: int) -> bytes:
    """Reads all of a body that is somewhat too large, so that the client hears of it; cuts off a huge one."""
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size <= limit:
            parts.append(part)
        elif size > 4 * limit:
            break
    if size > limit:
        raise RequestRefusedError(
            413, f"the body has {size} bytes or more; the limit is {limit}", code="body_too_large"
        )
    return b"".join(parts)


async def _exhaust(chunks: AsyncGenerator[Any, None]) -> None:
    async for _ in chunks:
        pass


class _RequestId:
    """``X-Request-Id``: the client's, if it is fit for a log line, else one of ours; on every answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        await self._app(scope, receive, send_with_id)
