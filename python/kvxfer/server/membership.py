# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""The router's routes for its members: who is there, one more, one less. All behind the cluster's secret."""

from __future__ import annotations

import hmac

import msgspec
from fastapi import FastAPI, Request, Response

from kvxfer.errors import InvalidArgumentError
from kvxfer.server.pool import Pool, WorkerView
from kvxfer.server.wire import RequestRefusedError

__all__ = ["add_worker_routes"]


def add_worker_routes(app: FastAPI, pool: Pool, secret: str) -> None:
    def authorize(request: Request) -> None:
        given = request.headers.get("authorization", "").encode()
        if not hmac.compare_digest(given, f"Bearer {secret}".encode()):
            raise RequestRefusedError(
                401, "/workers needs the cluster's secret as a bearer token", code="unauthorized"
            )

    @app.get("/workers")
    async def list_workers(request: Request) -> Response:
        authorize(request)
        return _json([_describe(view) for view in pool.views])

    @app.post("/workers")
    async def add_worker(request: Request) -> Response:
        authorize(request)
        try:
            body = msgspec.json.decode(await request.body(), type=dict[str, str])
            view = await pool.add(body["url"])
        except (msgspec.DecodeError, KeyError, InvalidArgumentError) as error:
            raise RequestRefusedError(
                400,
                f'expected {{"url": "http://host:port"}}: {error}',
                code="bad_body",
                param="url",
            ) from error
        return _json(_describe(view))

    @app.delete("/workers/{worker_id}")
    async def drop_worker(request: Request, worker_id: str) -> Response:
        authorize(request)
        view = pool.remove(worker_id)
        if view is None:
            raise RequestRefusedError(404, f"no worker {worker_id}", code="not_found")
        return _json(_describe(view))


def _describe(view: WorkerView) -> dict[str, object]:
    return {
        "id": view.id,
        "url": view.url,
        "role": view.role,
        "up": view.up,
        "condition": "leaving" if view.leaving else view.condition,
        "in_flight": view.in_flight,
        "state": view.state,
    }


def _json(content: object) -> Response:
    return Response(msgspec.json.encode(content), media_type="application/json")
