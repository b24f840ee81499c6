# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""A worker's engine loop as a `wire.Backend`: admits legs, passes their events on, tells the worker's state.

Runs on the asyncio thread and touches nothing of the engine's but its inbox and its last snapshot.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

from kvxfer.server.admission import Identity, refuse_busy, refuse_foreign, refuse_unfit
from kvxfer.server.engine import sequence
from kvxfer.server.engine.loop import EngineLoop
from kvxfer.server.engine.requests import Delivery
from kvxfer.server.metrics import Metrics
from kvxfer.server.wire import (
    Beat,
    ErrorEvent,
    PrefillReply,
    Queued,
    RequestRefusedError,
    TokenEvent,
    TokenRequest,
    Usage,
    WorkerState,
)

__all__ = ["EngineBackend", "Leg", "Outlet"]

BEAT_S = 1.0
_TOMBSTONE_S = 60.0  # the connector's: until then an id of an ended handoff is refused


class Outlet:
    """Carries what the engine thread has to say to the asyncio thread: one call for all events of a step."""

    def __init__(self) -> None:
        self._aio: asyncio.AbstractEventLoop | None = None
        self._idle: asyncio.Event | None = None

    def attach(self) -> None:
        """Called on the asyncio thread, before the engine thread starts and until after it ended."""
        self._aio, self._idle = asyncio.get_running_loop(), asyncio.Event()

    def deliver(self, batch: list[Delivery]) -> None:
        assert self._aio is not None
        self._aio.call_soon_threadsafe(self._run, batch)

    def on_idle(self) -> None:
        assert self._aio is not None
        assert self._idle is not None
        self._aio.call_soon_threadsafe(self._idle.set)

    async def next_idle(self) -> None:
        assert self._idle is not None
        await self._idle.wait()
        self._idle.clear()

    @staticmethod
    def _run(batch: list[Delivery]) -> None:
        for sink, event in batch:
            sink(event)


@dataclass(eq=False)
class Leg:
    """One admitted leg and its events."""

    spec: TokenRequest
    request: sequence.Request | None = None
    events: asyncio.Queue[sequence.Event] = field(default_factory=asyncio.Queue)


class EngineBackend:
    """`wire.Backend` over this worker's own engine loop."""

    def __init__(
        self, loop: EngineLoop, outlet: Outlet, identity: Identity, metrics: Metrics
    ) -> None:
        self.identity = identity
        self.draining = False
        self._loop = loop
        self._outlet = outlet
        self._metrics = metrics
        self._legs: set[Leg] = set()
        self._handoffs: dict[str, float] = {}  # id -> when it came, oldest first

    # -- Backend -----------------------------------------------------------------------------------------

    @property
    def max_model_len(self) -> int:
        return self.identity.max_model_len

    async def generate(self, request: TokenRequest) -> AsyncGenerator[TokenEvent, None]:
        leg = self.open(request, "decode" if request.kv_transfer_params else "local")
        try:
            async for event in self.events(leg):
                yield event
        finally:
            self.close(leg)

    def ready(self) -> tuple[bool, str]:
        if not self._loop.alive:
            return False, "the engine thread has ended"
        if self.draining:
            return False, "the worker is draining"
        closing = self._loop.snapshot.num_closing_blocks
        if 4 * closing > self.identity.num_blocks:
            return (
                False,
                f"{closing} of {self.identity.num_blocks} blocks wait for a peer to be quiet",
            )
        return True, ""

    def metrics(self) -> bytes:
        return self._metrics.render()

    async def until_idle(self) -> None:
        """No request runs and no handoff is open, or the engine thread has ended."""
        while self._loop.alive and not self._loop.idle:
            await self._outlet.next_idle()

    # -- legs --------------------------------------------------------------------------------------------

    def open(self, spec: TokenRequest, role: sequence.Role) -> Leg:
        """Admits a leg; whoever opens it closes it. Raises RequestRefusedError, and nothing happened."""
        refuse_unfit(self.identity, spec, role)
        refuse_foreign(self.identity, spec, role)
        if not self._loop.alive:
            raise RequestRefusedError(503, "the engine thread has ended", code="internal")
        if self.draining:
            message = "the worker is draining"
            raise RequestRefusedError(503, message, code="draining", retry_after_s=5.0)
        refuse_busy(self.identity, spec, self._loop.snapshot, self._loop.num_in_inbox)
        if role != "local":
            self._refuse_known(spec.handoff)
        leg = Leg(spec)
        leg.request = self._loop.submit(spec, role, leg.events.put_nowait)
        self._legs.add(leg)
        return leg

    def close(self, leg: Leg) -> None:
        """Nobody listens any more: what still runs is aborted. Idempotent."""
        if leg in self._legs and leg.request is not None:
            self._legs.discard(leg)
            self._loop.cancel(leg.request, "the leg was closed")

    def abort(self, handoff: str) -> bool:
        """The twin of closing the connection, for proxies that hide closes."""
        legs = [leg for leg in self._legs if leg.spec.handoff == handoff]
        for leg in legs:
            assert leg.request is not None
            self._loop.cancel(leg.request, "the router aborted it")
        return bool(legs)

    async def events(self, leg: Leg) -> AsyncGenerator[TokenEvent, None]:
        """Of a generating leg, with a beat in each silent second."""
        yield Queued()
        while True:
            try:
                event = await asyncio.wait_for(leg.events.get(), BEAT_S)
            except asyncio.TimeoutError:
                yield Beat()
                continue
            assert not isinstance(event, PrefillReply)
            yield event
            if isinstance(event, (Usage, ErrorEvent)):
                self._legs.discard(leg)
                return

    async def reply(self, leg: Leg) -> PrefillReply:
        event = await leg.events.get()
        assert isinstance(event, PrefillReply)
        self._legs.discard(leg)
        return event

    def state(self) -> WorkerState:
        me, now = self.identity, self._loop.snapshot
        return WorkerState(
            role=me.role,
            incarnation=me.incarnation,
            engine=me.engine,
            signature=me.signature,
            model=me.model,
            served_model_name=me.served_model_name,
            max_model_len=me.max_model_len,
            **now.blocks._asdict(),
            total=me.num_blocks,
            running=now.num_running,
            waiting=now.num_waiting + self._loop.num_in_inbox,
            waiting_tokens=now.num_waiting_tokens,
            draining=self.draining,
            ready=self.ready()[0],
        )

    def _refuse_known(self, handoff: str) -> None:
        now = time.monotonic()
        while self._handoffs and next(iter(self._handoffs.values())) < now - _TOMBSTONE_S:
            del self._handoffs[next(iter(self._handoffs))]
        if handoff in self._handoffs or any(leg.spec.handoff == handoff for leg in self._legs):
            message = f"handoff {handoff} is known here; each attempt needs a fresh id"
            raise RequestRefusedError(409, message, code="handoff_known", param="handoff")
        self._handoffs[handoff] = now
