# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""The requests that are alive here: their events, their deadlines, and the one end that each of them has.

Only the engine thread calls it.
"""

from __future__ import annotations

import heapq
import itertools
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import msgspec

from kvxfer.server.engine.scheduler import Scheduler
from kvxfer.server.engine.sequence import Event, Output, Request, Sink, State
from kvxfer.server.metrics import Metrics
from kvxfer.server.wire import ErrorEvent, Finish, PrefillReply, Tokens, Usage

__all__ = ["Delivery", "Requests"]


class Delivery(NamedTuple):
    sink: Sink
    event: Event


class _Handoffs(Protocol):
    def close(self, request: Request, cause: str) -> None: ...


class Requests:
    def __init__(
        self,
        scheduler: Scheduler,
        metrics: Metrics,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.handoffs: _Handoffs | None = None  # set by the loop: the two know each other
        self._scheduler = scheduler
        self._metrics = metrics
        self._clock = clock
        self._alive: set[Request] = set()
        self._outbox: list[Delivery] = []
        self._deadlines: list[tuple[float, int, Request]] = []
        self._ticket = itertools.count()  # so that equal deadlines never compare requests

    def __len__(self) -> int:
        return len(self._alive)

    def __iter__(self) -> Iterator[Request]:
        return iter(list(self._alive))

    def add(self, request: Request) -> None:
        self._alive.add(request)
        if len(self._deadlines) > 2 * len(self._alive) + 64:  # most of them ended long ago
            self._deadlines = [item for item in self._deadlines if not item[2].ended]
            heapq.heapify(self._deadlines)
        heapq.heappush(self._deadlines, (request.deadline, next(self._ticket), request))

    @property
    def next_deadline(self) -> float | None:
        return self._deadlines[0][0] if self._deadlines else None

    def expire(self) -> None:
        now = self._clock()
        while self._deadlines and self._deadlines[0][0] <= now:
            request = heapq.heappop(self._deadlines)[2]
            if not request.ended:
                message = f"the request's deadline of {request.spec.deadline_s:g} s passed"
                self.fail(request, "deadline", message, retryable=False)

    def take_events(self) -> list[Delivery]:
        batch, self._outbox = self._outbox, []
        return batch

    def emit(self, request: Request, event: Event) -> None:
        if not request.ended:
            self._outbox.append(Delivery(request.sink, event))

    def emit_outputs(self, outputs: list[Output]) -> None:
        now = self._clock()
        for sequence, token, finish in outputs:
            request = sequence.request
            self._metrics.token(request, now)
            position = sequence.num_outputs - 1
            self.emit(request, Tokens(i=sequence.choice, ids=(token,), pos=position))
            if finish is not None:
                self.emit(request, Finish(i=sequence.choice, reason=finish))
        for request in {output.sequence.request for output in outputs if output.finish}:
            if all(sequence.state is State.FINISHED for sequence in request.sequences):
                self.end(request, _usage(request))

    def end(self, request: Request, event: Event) -> None:
        """The last event; gives back what the request holds. Ending twice does nothing."""
        if request.ended:
            return
        now = self._clock()
        request.mark("end", now)
        if isinstance(event, PrefillReply):
            event = msgspec.structs.replace(
                event, cached_tokens=request.cached_tokens or 0, timeline=request.timeline
            )
        self.emit(request, event)
        request.ended = True
        self._alive.discard(request)
        for sequence in request.sequences:
            if sequence.state is not State.FINISHED:
                self._scheduler.remove(sequence)
        self._metrics.request_ended(request, now)

    def fail(self, request: Request, code: str, message: str, *, retryable: bool) -> None:
        """Ends it with an error, its handoff too."""
        self._close_handoff(request, message)
        if request.role == "prefill":
            reply = PrefillReply(status="failed", code=code, message=message, retryable=retryable)
            self.end(request, reply)
        else:
            self.end(request, ErrorEvent(code=code, message=message, retryable=retryable))

    def abort(self, request: Request, cause: str) -> None:
        """Ends it because nobody wants it any more."""
        if request.ended:
            return
        self._close_handoff(request, cause)
        if request.role == "prefill":
            self.end(request, PrefillReply(status="aborted", message=cause))
            return
        for sequence in request.sequences:
            if sequence.state is not State.FINISHED:
                self.emit(request, Finish(i=sequence.choice, reason="abort"))
        self.end(request, _usage(request))

    def bury(self, message: str) -> None:
        """Last words to everybody after an error of the engine thread; what they hold is lost with it."""
        for request in self:
            reply = PrefillReply(status="failed", code="internal", message=message, retryable=True)
            error = ErrorEvent(code="internal", message=message, retryable=True)
            self.emit(request, reply if request.role == "prefill" else error)
            request.ended = True
        self._alive.clear()

    def _close_handoff(self, request: Request, cause: str) -> None:
        if request.role != "local" and self.handoffs is not None:
            self.handoffs.close(request, cause)


def _usage(request: Request) -> Usage:
    return Usage(
        prompt_tokens=len(request.spec.prompt) - request.spec.position0,
        completion_tokens=sum(sequence.num_outputs for sequence in request.sequences),
        cached_tokens=request.cached_tokens or 0,
        timeline=request.timeline,
    )
