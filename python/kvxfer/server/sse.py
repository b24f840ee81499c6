# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Server-sent events, and work that ends when its client leaves."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable
from typing import Any, TypeVar

import msgspec
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from kvxfer.server.answers import Answers
from kvxfer.server.openai import Call, error_body
from kvxfer.server.tasks import end_tasks
from kvxfer.server.wire import RequestRefusedError

__all__ = ["EventStream", "frames_of", "until_disconnected"]

log = logging.getLogger(__name__)

_T = TypeVar("_T")


async def until_disconnected(receive: Receive, work: Awaitable[_T]) -> _T:
    """The work's result. Cancels it, waits for its end and raises ``ClientDisconnect`` if the client leaves."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    async def run() -> _T:
        return await work

    task, watcher = asyncio.create_task(run()), asyncio.create_task(gone())
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        await end_tasks(task, watcher)


async def frames_of(
    first: dict[str, Any],
    chunks: AsyncGenerator[dict[str, Any], None],
    answers: Answers,
    call: Call,
) -> AsyncGenerator[bytes, None]:
    """The body of a streamed answer, ended by ``[DONE]`` or by an ``error`` event, never by both."""
    try:
        yield _frame(first)
        async for chunk in chunks:
            yield _frame(chunk)
    except RequestRefusedError as error:
        yield b"event: error\n" + _frame(error_body(error))
        return
    except Exception:
        log.exception("request %s failed in mid-stream", call.id)
        bug = RequestRefusedError(500, "internal error, see the server's log", code="internal")
        yield b"event: error\n" + _frame(error_body(bug))
        return
    finally:
        await chunks.aclose()
    if call.include_usage:
        yield _frame(answers.envelope([], answers.usage()))
    yield b"data: [DONE]\n\n"


def _frame(content: object) -> bytes:
    return b"data: " + msgspec.json.encode(content) + b"\n\n"


class EventStream(Response):
    """Server-sent events. Unlike starlette's stream it notices a client that leaves between two events."""

    media_type = "text/event-stream"

    def __init__(self, frames: AsyncGenerator[bytes, None]) -> None:
        self.status_code = 200
        self.background = None
        self._stream = frames
        # Proxies that buffer would turn a stream into one late answer.
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def pump() -> None:
            async for frame in self._stream:
                await send({"type": "http.response.body", "body": frame, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        try:
            await send(
                {
                    "type": "http.response.start",
                    "status": self.status_code,
                    "headers": self.raw_headers,
                }
            )
            await until_disconnected(receive, pump())
        except ClientDisconnect:
            log.debug("client left in mid-stream")
        finally:
            await self._stream.aclose()
