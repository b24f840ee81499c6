# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""The routes that routers call on a worker. A leg whose connection closes is aborted at once, whether or not
anything was being sent.
"""

from __future__ import annotations

import hmac
from collections.abc import AsyncGenerator
from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response
from starlette.types import Receive, Scope, Send

from kvxfer.server.backend import EngineBackend, Leg
from kvxfer.server.sse import EventStream
from kvxfer.server.wire import RequestRefusedError, TokenRequest, encode_event

__all__ = ["add_internal_routes"]

_MAX_BODY_NBYTES = 16 << 20


class _LegStream(EventStream):
    """NDJSON of one leg. Closes the leg whatever happens, even if not one line was ever asked for."""

    media_type = "application/x-ndjson"

    def __init__(
        self, backend: EngineBackend, leg: Leg, lines: AsyncGenerator[bytes, None]
    ) -> None:
        super().__init__(lines)
        self._backend = backend
        self._leg = leg

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._backend.close(self._leg)


def add_internal_routes(app: FastAPI, backend: EngineBackend, secret: str) -> None:
    """What routers ask of a worker. ``secret`` guards every route."""
    expected = f"Bearer {secret}".encode()

    def authorize(request: Request) -> None:
        given = request.headers.get("authorization", "").encode()
        if not hmac.compare_digest(given, expected):
            message = "/internal needs the cluster's secret as a bearer token"
            raise RequestRefusedError(401, message, code="unauthorized")
        wanted = request.headers.get("x-kvxfer-incarnation", backend.identity.incarnation)
        if wanted != backend.identity.incarnation:
            message = (
                f"this is incarnation {backend.identity.incarnation}, not {wanted}: it restarted"
            )
            raise RequestRefusedError(410, message, code="incarnation")

    async def read(request: Request, kind: Any) -> Any:
        authorize(request)
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > _MAX_BODY_NBYTES:
                message = f"the body has more than {_MAX_BODY_NBYTES} bytes"
                raise RequestRefusedError(413, message, code="body_too_large")
        try:
            return msgspec.json.decode(body, type=kind)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise RequestRefusedError(400, f"bad body: {error}", code="bad_body") from error

    @app.post("/internal/generate")
    async def generate(request: Request) -> Response:
        spec: TokenRequest = await read(request, TokenRequest)
        params = spec.kv_transfer_params
        if params is not None and params.role != "decode":
            raise RequestRefusedError(
                400, "a prefill leg belongs to /internal/prefill", code="role"
            )
        leg = backend.open(spec, "decode" if params else "local")

        async def lines() -> AsyncGenerator[bytes, None]:
            async for event in backend.events(leg):
                yield encode_event(event)

        return _LegStream(backend, leg, lines())

    @app.post("/internal/prefill")
    async def prefill(request: Request) -> Response:
        spec: TokenRequest = await read(request, TokenRequest)
        params = spec.kv_transfer_params
        if params is None or params.role != "prefill":
            raise RequestRefusedError(400, "a prefill leg names its decode peer", code="role")
        leg = backend.open(spec, "prefill")

        async def line() -> AsyncGenerator[bytes, None]:
            yield msgspec.json.encode(await backend.reply(leg)) + b"\n"

        return _LegStream(backend, leg, line())

    @app.post("/internal/abort")
    async def abort(request: Request) -> Response:
        body: dict[str, Any] = await read(request, dict[str, Any])
        handoff = body.get("handoff")
        if not isinstance(handoff, str):
            raise RequestRefusedError(400, "name the handoff to abort", code="bad_body")
        return _json({"aborted": backend.abort(handoff)})

    @app.get("/internal/state")
    async def state(request: Request) -> Response:
        authorize(request)
        return _json(backend.state())


def _json(content: object) -> Response:
    return Response(msgspec.json.encode(content), media_type="application/json")
