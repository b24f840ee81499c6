# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Workers that speak the router's protocol on loopback without a model, with faults to order.

They run in the test's own event loop, so that a test waits on their events instead of on the clock.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import msgspec
import uvicorn
from fastapi import FastAPI, Request, Response
from front_fakes import answer_ids
from starlette.responses import StreamingResponse

from kvxfer.server.wire import (
    Beat,
    ErrorEvent,
    Finish,
    PrefillReply,
    Queued,
    Reserved,
    TokenRequest,
    Tokens,
    Usage,
    WorkerState,
    encode_event,
)

SECRET = "s3cret"


class Dies(Exception):
    """Raised in mid-stream: the connection ends without an end of its body."""


class FakeWorker:
    """``faults`` of its legs, in order, each used once: ``refuse``, ``die``, ``silent``, ``error``, ``hang``."""

    def __init__(
        self, role: str, *faults: str, after: int = 2, engine: str = "127.0.0.1:1"
    ) -> None:
        self.role = role
        self.faults = list(faults)
        self.after = after  # tokens before a fault in mid-stream
        self.gate: asyncio.Event | None = None  # if set, streams wait for it after ``after`` tokens
        self.incarnation = f"{id(self):032x}"
        self.draining = False
        self.state_gate = asyncio.Event()  # cleared: the process is stopped
        self.state_gate.set()
        self.load = 0
        self.refusal = (503, {"error": {"message": "full", "code": "overloaded"}})
        self.error = ErrorEvent(code="internal", message="broken", retryable=True)
        self.requests: list[TokenRequest] = []
        self.hanging = asyncio.Event()  # a leg says nothing any more
        self.closed = asyncio.Event()  # ... and was closed then
        self.aborted: list[dict[str, Any]] = []
        self.abort_came = asyncio.Event()
        self.reply = PrefillReply(status="handed_off", cached_tokens=3)
        self.metrics = 'kvxfer:kv_transfer_bytes_total{transport="shm",direction="sent"} 5\n'
        self.url = ""
        self._server: uvicorn.Server | None = None

    async def start(self, port: int = 0) -> FakeWorker:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("127.0.0.1", port))
        config = uvicorn.Config(self._app(), log_level="critical", ws="none", lifespan="off")
        config.load()
        self._server = uvicorn.Server(config)
        self._server.lifespan = config.lifespan_class(config)
        await self._server.startup(sockets=[sock])
        self.url = "http://{}:{}".format(*sock.getsockname())
        return self

    async def kill(self) -> None:
        """As kill -9 would: connections reset, nobody listens."""
        if self._server is None:
            return
        for server in self._server.servers:
            server.close()
        for connection in list(self._server.server_state.connections):
            connection.transport.abort()
        tasks = list(self._server.server_state.tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._server = None

    @property
    def id(self) -> str:
        return self.url.removeprefix("http://")

    def state(self) -> WorkerState:
        return WorkerState(
            role=self.role,  # type: ignore[arg-type]
            incarnation=self.incarnation,
            engine=f"engine-of-{self.id}",
            signature="sig",
            model="model",
            served_model_name="tiny",
            max_model_len=64,
            free=10,
            cached=0,
            active=0,
            leased=0,
            total=10,
            running=self.load,
            waiting=0,
            draining=self.draining,
        )

    def _app(self) -> FastAPI:
        app = FastAPI()

        async def read(request: Request) -> TokenRequest:
            assert request.headers["authorization"] == f"Bearer {SECRET}"
            assert request.headers["x-kvxfer-incarnation"] == self.incarnation
            leg = msgspec.json.decode(await request.body(), type=TokenRequest)
            self.requests.append(leg)
            return leg

        def fault(*kinds: str) -> str:
            return self.faults.pop(0) if self.faults and self.faults[0] in kinds else ""

        @app.get("/internal/state")
        async def state() -> Response:
            await self.state_gate.wait()
            return Response(msgspec.json.encode(self.state()))

        @app.post("/internal/generate")
        async def generate(request: Request) -> Response:
            leg = await read(request)
            if fault("refuse"):
                return self._refuse()
            return StreamingResponse(self._tokens(leg, fault("die", "silent", "error", "hang")))

        @app.post("/internal/prefill")
        async def prefill(request: Request) -> Response:
            await read(request)
            what = fault("refuse", "die", "hang", "fail")
            if what == "refuse":
                return self._refuse()

            async def line() -> AsyncIterator[bytes]:
                if what == "die":
                    raise Dies
                if what == "hang":
                    await self._hang()
                reply = self.reply
                if what == "fail":
                    reply = PrefillReply(
                        status="failed", code="internal", message="x", retryable=True
                    )
                yield msgspec.json.encode(reply)

            return StreamingResponse(line())

        @app.post("/internal/abort")
        async def abort(request: Request) -> Response:
            self.aborted.append(await request.json())
            self.abort_came.set()
            return Response(b"{}")

        @app.get("/metrics")
        async def metrics() -> Response:
            return Response(self.metrics)

        return app

    def _refuse(self) -> Response:
        status, body = self.refusal
        return Response(msgspec.json.encode(body), status, headers={"Retry-After": "7"})

    async def _hang(self) -> None:
        self.hanging.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.closed.set()

    async def _tokens(self, leg: TokenRequest, what: str) -> AsyncIterator[bytes]:
        n, count = leg.sampling.n, leg.sampling.max_tokens
        ids = [answer_ids(leg, i) for i in range(n)]
        yield encode_event(Queued())
        if what == "silent":
            await self._hang()
        yield encode_event(Beat()) + encode_event(Reserved(cached_tokens=3))
        for position in range(count):
            if position == self.after:
                if what == "die":
                    raise Dies
                if what == "error":
                    yield encode_event(self.error)
                    return
                if what == "hang":
                    await self._hang()
                if self.gate is not None:
                    await self.gate.wait()
            for i in range(n):
                line = encode_event(Tokens(i=i, ids=(ids[i][position],), pos=position))
                yield line[:5]  # lines are cut anywhere on their way
                yield line[5:]
        for i in range(n):
            yield encode_event(Finish(i=i, reason="length"))
        yield encode_event(
            Usage(prompt_tokens=len(leg.prompt), completion_tokens=n * count, cached_tokens=4)
        )


@contextlib.asynccontextmanager
async def running(*workers: FakeWorker) -> AsyncIterator[None]:
    for worker in workers:
        await worker.start()
    try:
        yield
    finally:
        for worker in workers:
            await worker.kill()


async def until(condition: Callable[[], bool], what: str, timeout_s: float = 5.0) -> None:
    """For conditions that nobody signals: gives way to other tasks until true."""

    async def look() -> None:
        while not condition():
            await asyncio.sleep(0.005)

    try:
        await asyncio.wait_for(look(), timeout_s)
    except asyncio.TimeoutError:
        raise AssertionError(f"after {timeout_s} s still waiting for {what}") from None


def in_loop(main: Callable[[], Awaitable[None]], timeout_s: float = 30.0) -> None:
    """Runs a test's coroutine, bounded."""

    async def bounded() -> None:
        await asyncio.wait_for(main(), timeout_s)  # type: ignore[arg-type]

    asyncio.run(bounded())
