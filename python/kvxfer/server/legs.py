# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""One attempt at a request: a decode leg whose stream is the answer, a prefill leg that is only watched.

Everything that can happen arrives in one inbox, in the order in which it happened: the decode worker's
events, the end of a leg, the loss of a worker, the deadline.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator
from typing import Any

import httpx
import msgspec

from kvxfer.server.failures import AttemptFailedError, refusal_of_worker
from kvxfer.server.pool import Pair, Pool, WorkerView
from kvxfer.server.tasks import Background, end_tasks
from kvxfer.server.wire import (
    ErrorEvent,
    KVTransferParams,
    PeerRef,
    PrefillReply,
    TokenEvent,
    TokenRequest,
    Tokens,
    Usage,
    decode_event,
)

__all__ = ["Attempt"]

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 2.0
ABORT_TIMEOUT_S = 2.0
_LINGER_S = 10.0  # after a good answer, for its legs to end by themselves
_BLAMES_THE_PEER = {"peer_lost", "expired", "write_failed"}


class Attempt:
    def __init__(
        self,
        client: httpx.AsyncClient,
        pool: Pool,
        background: Background,
        request: TokenRequest,
        pair: Pair,
        *,
        beat_timeout_s: float = 3.0,
    ) -> None:
        self._client = client
        self._pool = pool
        self._background = background
        self._request = request
        self._decode = pair.decode
        self._prefill = pair.prefill
        self._beat_timeout_s = beat_timeout_s
        self._inbox: asyncio.Queue[TokenEvent | AttemptFailedError] = asyncio.Queue()
        self._silence: asyncio.TimerHandle | None = None
        self._begun = False  # a token came: prefill's work is done, and its fate no longer matters

    async def events(self) -> AsyncGenerator[TokenEvent, None]:
        """Raises AttemptFailedError. Closed before its end, it aborts both legs."""
        loop = asyncio.get_running_loop()
        late = AttemptFailedError(
            "deadline",
            "the request's deadline passed before its answer was complete",
            retryable=False,
        )
        timer = loop.call_later(self._request.deadline_s, self._inbox.put_nowait, late)
        self._expect_beat()
        self._pool.opened(self._decode, self._decode_lost)
        # Both legs in one tick, decode first: prefill's offer finds it there.
        decode_leg = asyncio.create_task(self._run_decode())
        prefill_leg = None
        if self._prefill is not None:
            self._pool.opened(self._prefill, self._prefill_lost)
            prefill_leg = asyncio.create_task(self._run_prefill(self._prefill))
        ended_well = False
        try:
            while True:
                item = await self._inbox.get()
                if isinstance(item, AttemptFailedError):
                    raise item
                if isinstance(item, Tokens) and not self._begun:
                    self._begun = True
                    self._expect_beat()
                ended_well = isinstance(item, Usage)
                yield item
                if ended_well:
                    return
        finally:
            timer.cancel()
            if self._silence is not None:
                self._silence.cancel()
            self._pool.closed(self._decode, self._decode_lost)
            if self._prefill is not None:
                self._pool.closed(self._prefill, self._prefill_lost)
            await self._close(decode_leg, prefill_leg, ended_well)

    async def _close(
        self,
        decode_leg: asyncio.Task[None],
        prefill_leg: asyncio.Task[None] | None,
        ended_well: bool,
    ) -> None:
        if ended_well:
            # Prefill may have a last word to say, and a body read to its end leaves a connection to reuse.
            for leg in (decode_leg, prefill_leg):
                if leg is not None and not leg.done():
                    self._background.start(_linger(leg))
            return
        told = [self._decode]
        if prefill_leg is not None and self._prefill is not None and not prefill_leg.done():
            told.append(self._prefill)
        for view in told:
            self._background.start(self._abort(view))
        await end_tasks(*(leg for leg in (decode_leg, prefill_leg) if leg is not None))

    async def _abort(self, view: WorkerView) -> None:
        """The closed connection says the same; this is for proxies that hide closes. Idempotent there."""
        body = {"request_id": self._request.request_id, "handoff": self._request.handoff}
        try:
            await self._client.post(
                f"{view.url}/internal/abort", json=body, timeout=ABORT_TIMEOUT_S
            )
        except httpx.TransportError as error:
            log.debug("abort of %s at %s: %r", self._request.handoff, view.id, error)

    def _expect_beat(self) -> None:
        """Beats come until the first token; later the pool's polling tells a stopped worker."""
        if self._silence is not None:
            self._silence.cancel()
        if not self._begun:
            self._silence = asyncio.get_running_loop().call_later(
                0.9 * self._beat_timeout_s, self._nearly_silent
            )

    def _nearly_silent(self) -> None:
        # In two steps: had this router's own loop been held up, what came meanwhile is read in between.
        self._silence = asyncio.get_running_loop().call_later(
            0.1 * self._beat_timeout_s,
            self._decode_lost,
            f"silent for {self._beat_timeout_s:g} s",
        )

    # -- what ends an attempt ----------------------------------------------------------------------------

    def _fail(
        self, code: str, message: str, *culprits: WorkerView, retryable: bool = True
    ) -> AttemptFailedError:
        return AttemptFailedError(code, message, retryable=retryable, culprits=culprits)

    def _decode_lost(self, why: str) -> None:
        message = f"decode worker {self._decode.id} was lost: {why}"
        self._inbox.put_nowait(self._fail("peer_lost", message, self._decode))

    def _prefill_lost(self, why: str) -> None:
        if not self._begun and self._prefill is not None:
            message = f"prefill worker {self._prefill.id} was lost: {why}"
            self._inbox.put_nowait(self._fail("peer_lost", message, self._prefill))

    # -- legs --------------------------------------------------------------------------------------------

    async def _run_decode(self) -> None:
        ended = False
        try:
            async with contextlib.aclosing(self._read_decode()) as events:
                async for event in events:
                    if isinstance(event, ErrorEvent):
                        blames_peer = event.code in _BLAMES_THE_PEER and self._prefill is not None
                        culprit = self._prefill if blames_peer else self._decode
                        assert culprit is not None
                        raise self._fail(
                            event.code, event.message, culprit, retryable=event.retryable
                        )
                    self._inbox.put_nowait(event)
                    # Read on to the end of the body, so that the connection can be used again.
                    ended = ended or isinstance(event, Usage)
            if not ended:
                message = f"decode worker {self._decode.id} ended its stream early"
                raise self._fail("peer_lost", message, self._decode)
        except AttemptFailedError as error:
            self._inbox.put_nowait(error)

    async def _read_decode(self) -> AsyncGenerator[TokenEvent, None]:
        view = self._decode
        response = await self._open(view, "generate", "decode", self._prefill)
        try:
            buffer = b""
            async for part in response.aiter_raw():
                self._expect_beat()
                *lines, buffer = (buffer + part).split(b"\n")
                for line in lines:
                    yield decode_event(line)
        except (httpx.TransportError, msgspec.DecodeError) as error:
            await self._pool.refresh(view)
            raise self._fail(
                "peer_lost", f"decode worker {view.id} failed: {error!r}", view
            ) from error
        finally:
            await response.aclose()

    async def _run_prefill(self, view: WorkerView) -> None:
        try:
            response = await self._open(view, "prefill", "prefill", self._decode)
            try:
                reply = msgspec.json.decode(await response.aread(), type=PrefillReply)
            except (httpx.TransportError, msgspec.DecodeError) as error:
                await self._pool.refresh(view)
                message = f"prefill worker {view.id} failed: {error!r}"
                raise self._fail("peer_lost", message, view) from error
            finally:
                await response.aclose()
            if reply.status in ("failed", "aborted"):
                culprit = self._decode if reply.code in _BLAMES_THE_PEER else view
                raise self._fail(
                    reply.code or "internal",
                    f"prefill worker {view.id}: {reply.message or reply.status}",
                    culprit,
                    retryable=reply.retryable or reply.status == "aborted",
                )
        except AttemptFailedError as error:
            if not self._begun:
                self._inbox.put_nowait(error)

    async def _open(
        self,
        view: WorkerView,
        route: str,
        role: Any,
        peer: WorkerView | None,
    ) -> httpx.Response:
        state = view.state
        assert state is not None, "only workers that were heard of are picked"
        body = self._request
        if peer is not None:
            assert peer.state is not None
            ref = PeerRef(
                engine=peer.state.engine,
                incarnation=peer.state.incarnation,
                signature=peer.state.signature,
                model=peer.state.model,
            )
            params = KVTransferParams(role=role, peer=ref)
            body = msgspec.structs.replace(body, kv_transfer_params=params)
        request = self._client.build_request(
            "POST",
            f"{view.url}/internal/{route}",
            content=msgspec.json.encode(body),
            headers={"X-Kvxfer-Incarnation": state.incarnation},
            timeout=httpx.Timeout(None, connect=CONNECT_TIMEOUT_S),
        )
        try:
            response = await self._client.send(request, stream=True)
            if response.status_code == 200:
                return response
            content = await response.aread()
            await response.aclose()
        except httpx.TransportError as error:
            await self._pool.refresh(view)
            message = f"{view.role} worker {view.id} does not take requests: {error!r}"
            raise self._fail("peer_lost", message, view) from error
        if response.status_code == 410:  # restarted since the last poll
            await self._pool.refresh(view)
        raise refusal_of_worker(view, response, content)


async def _linger(leg: asyncio.Task[None]) -> None:
    try:
        await asyncio.wait_for(leg, _LINGER_S)
    except asyncio.TimeoutError:
        log.warning("a leg did not end after its answer did; closed")
