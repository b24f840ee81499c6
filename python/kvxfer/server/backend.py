# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""A worker's engine loop as a `wire.Backend`: admits legs, passes their events on, tells the worker's state.

Runs on the asyncio thread and touches nothing of the engine's but its inbox and its last snapshot.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
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

__all__ = ["EngineBackend", "Leg", "deliver_to"]

BEAT_S = 1.0
_TOMBSTONE_S = 60.0  # the connector's: until then an id of an ended handoff is refused


def deliver_to(aio: asyncio.AbstractEventLoop) -> Callable[[list[Delivery]], None]:
    """Carries the engine thread's events to the asyncio thread, one call for all of a step."""

    def run(batch: list[Delivery]) -> None:
        for sink, event in batch:
            sink(event)

    def deliver(batch: list[Delivery]) -> None:
        if not aio.is_closed():
            aio.call_soon_threadsafe(run, batch)

    return deliver


@dataclass(eq=False)
class Leg:
    """One admitted leg and its events."""

    spec: TokenRequest
    request: sequence.Request | None = None
    events: asyncio.Queue[sequence.Event] = field(default_factory=asyncio.Queue)


class EngineBackend:
    """`wire.Backend` over this worker's own engine loop."""

    def __init__(self, loop: EngineLoop, identity: Identity, metrics: Metrics) -> None:
        self.identity = identity
        self.draining = False
        self._loop = loop
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
