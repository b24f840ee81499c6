# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""The engine thread: takes requests from an inbox, steps the model, gives events to an outbox.

It alone touches blocks, sequences and handoffs, so none of them has a lock. Others post to the inbox and
poke an eventfd; events leave in one batch per step. Between events it sleeps: idle costs nothing.
"""

from __future__ import annotations

import itertools
import logging
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from kvxfer.connector import Endpoint
from kvxfer.errors import InternalError
from kvxfer.server.engine.handoffs import Handoffs
from kvxfer.server.engine.requests import Delivery, Requests
from kvxfer.server.engine.runner import Batch, BatchItem
from kvxfer.server.engine.sampling import SampleRequest, sample
from kvxfer.server.engine.scheduler import Scheduler
from kvxfer.server.engine.sequence import Chunk, Request, Role, Sequence, Sink
from kvxfer.server.metrics import Metrics, Snapshot
from kvxfer.server.wire import TokenRequest

__all__ = ["EngineLoop", "ModelRunner"]

logger = logging.getLogger(__name__)
_CHECK_INTERVAL_S = (
    5.0  # an idle worker proves its block accounts at most this often; it reads all of them
)


class ModelRunner(Protocol):
    def run(self, batch: Batch, on_layer: Callable[[int], None] | None = None) -> Any: ...


class EngineLoop:
    def __init__(
        self,
        scheduler: Scheduler,
        runner: ModelRunner,
        endpoint: Endpoint,
        engine_fd: int,
        metrics: Metrics,
        *,
        eos_ids: tuple[int, ...] = (),
        deliver: Callable[[list[Delivery]], None],
        on_idle: Callable[[], None] = lambda: None,
        on_death: Callable[[], None] = lambda: None,
        sampler: Callable[[Any, list[SampleRequest], list[int]], list[int]] = sample,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``engine_fd`` is readable when the endpoint has something to poll.

        The callbacks run on the engine thread and must not block.

        ``deliver`` comes at most twice a step; ``on_idle`` when no request and no handoff is open;
        ``on_death`` when the thread ended by an error, after every request has had its last event.
        """
        self._requests = Requests(scheduler, metrics, clock=clock)
        self.handoffs = Handoffs(endpoint, scheduler, self._requests, metrics, clock=clock)
        self._requests.handoffs = self.handoffs
        self.snapshot = Snapshot(scheduler.pool.counts())
        self._scheduler = scheduler
        self._runner = runner
        self._endpoint = endpoint
        self._metrics = metrics
        self._eos_ids = eos_ids
        self._deliver = deliver
        self._on_idle = on_idle
        self._on_death = on_death
        self._sampler = sampler
        self._clock = clock
        self._inbox: deque[Callable[[], None]] = deque()
        self._next_check = 0.0
        self._endpoint_stats = endpoint.stats()
        self._stopping = False
        self._closed = False
        self._poller = select.epoll()
        self._wakeup = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        for fd in (self._wakeup, engine_fd):
            self._poller.register(fd, select.EPOLLIN)
        self._thread = threading.Thread(target=self._main, name="kvxfer-engine", daemon=True)

    # -- any thread --------------------------------------------------------------------------------------

    def start(self) -> None:
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def num_in_inbox(self) -> int:
        return len(self._inbox)

    @property
    def idle(self) -> bool:
        return not (self._inbox or self._requests or self.handoffs.num_open)

    def submit(self, spec: TokenRequest, role: Role, sink: Sink) -> Request:
        """Queues one leg; its events go to ``sink`` until a Usage, an ErrorEvent or a PrefillReply."""
        request = Request(spec, role, sink, self._clock())
        request.sequences.append(Sequence(request, 0, list(spec.prompt)))
        self._post(lambda: self._take(request))
        return request

    def cancel(self, request: Request, cause: str) -> None:
        """The leg is gone, or its router said so. Idempotent; whoever still listens hears of the abort."""
        self._post(lambda: self._requests.abort(request, cause))

    def fail_all(self, code: str, message: str) -> None:
        """Ends every request with a retryable error."""

        def act() -> None:
            for request in self._requests:
                self._requests.fail(request, code, message, retryable=True)

        self._post(act)

    def close(self, timeout_s: float = 10.0) -> None:
        """Ends the thread after its step, requests and all; closes the endpoint. Call `fail_all` before."""

        def stop() -> None:
            self._stopping = True

        if self._closed:
            return
        self._post(stop)
        if self._thread.ident is None:
            self._endpoint.close()
        else:
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                raise InternalError(f"the engine thread did not end within {timeout_s} s")
        self._closed = True
        self._poller.close()
        os.close(self._wakeup)

    def _post(self, action: Callable[[], None]) -> None:
        if self._closed:
            return  # a leg that closes after its worker: nothing is left to be told
        self._inbox.append(action)
        os.eventfd_write(self._wakeup, 1)

    # -- the engine thread -----------------------------------------------------------------------------------

    def step(self) -> bool:
        """One round; False if there was nothing to compute. Called by the thread, or by a test instead of it."""
        for _ in range(len(self._inbox)):
            self._inbox.popleft()()
        self._requests.expire()
        if self.handoffs.poll():
            self._endpoint_stats = self._endpoint.stats()
        chunks = self._scheduler.schedule()
        self.handoffs.go_on_with_admitted()
        if chunks:
            self._flush()  # what is known goes out before the model takes its time
            self._compute(chunks)
        self._flush()
        return bool(chunks)

    def _main(self) -> None:
        try:
            while not self._stopping:
                if not self.step() and not self._stopping:
                    self._sleep()
        except BaseException:
            logger.critical("the engine thread ends by an error", exc_info=True)
            message = "the worker's engine thread failed; its log has the reason"
            self._requests.bury(message)
            self._deliver(self._requests.take_events())
            self._on_death()
        finally:
            self._endpoint.close()

    def _sleep(self) -> None:
        """Until a message, an engine event or a timer."""
        if self.idle:
            self._check_accounts()
            self._on_idle()
        timers = (self._endpoint.next_deadline(), self._requests.next_deadline)
        times = [timer for timer in timers if timer is not None]
        timeout = max(0.0, min(times) - self._clock()) if times else None
        for fd, _ in self._poller.poll(timeout):
            if fd == self._wakeup:
                os.eventfd_read(fd)

    def _check_accounts(self) -> None:
        now = self._clock()
        if now < self._next_check:
            return
        self._next_check = now + _CHECK_INTERVAL_S
        self._scheduler.check()
        counts = self._scheduler.pool.counts()
        if counts.active or counts.leased:
            raise InternalError(f"the worker is idle, yet its blocks are {counts}")

    def _take(self, request: Request) -> None:
        self._requests.add(request)
        if request.role == "local":
            self._scheduler.add(request.sequences[0])
        else:
            self.handoffs.open(request)

    def _compute(self, chunks: list[Chunk]) -> None:
        items = [
            BatchItem(
                c.sequence.ids[c.begin : c.end], c.begin, c.sequence.block_ids, c.num_samples > 0
            )
            for c in chunks
        ]
        logits = self._runner.run(Batch(items), self.handoffs.layer_hook(chunks))
        sampling = [chunk for chunk in chunks if chunk.num_samples]
        draws = [
            (row, self._draw(chunk.sequence, chunk.sequence.choice + offset))
            for row, chunk in enumerate(sampling)
            for offset in range(chunk.num_samples)
        ]
        ids: Iterator[int] = iter(())
        if draws:
            rows, requests = [row for row, _ in draws], [draw for _, draw in draws]
            ids = iter(self._sampler(logits, requests, rows))
        samples = [list(itertools.islice(ids, chunk.num_samples)) for chunk in sampling]
        outputs, prefilled = self._scheduler.postprocess(chunks, samples)
        for sequence, first_tokens in prefilled:
            self.handoffs.commit(sequence, first_tokens)
        self._requests.emit_outputs(outputs)

    def _draw(self, sequence: Sequence, choice: int) -> SampleRequest:
        spec = sequence.request.spec
        params, position = spec.sampling, spec.position0 + sequence.num_outputs
        # Copying a long answer for each of its tokens is quadratic: only for those who count its ids.
        counts = params.presence_penalty or params.frequency_penalty
        history = sequence.history if counts else ()
        return SampleRequest(
            params, position, choice, history, () if params.ignore_eos else self._eos_ids
        )

    def _flush(self) -> None:
        self.snapshot = self._take_snapshot()
        if batch := self._requests.take_events():
            self._deliver(batch)

    def _take_snapshot(self) -> Snapshot:
        scheduler = self._scheduler
        waiting = {**self.handoffs.waiting(), "blocks": list(scheduler.waiting)}
        return Snapshot(
            blocks=scheduler.pool.counts(),
            num_closing_blocks=self.handoffs.num_closing_blocks,
            num_running=len(scheduler.running),
            waiting={reason: len(sequences) for reason, sequences in waiting.items()},
            num_waiting_tokens=sum(len(s.ids) for group in waiting.values() for s in group),
            num_preemptions=scheduler.num_preemptions,
            prefix_queries=scheduler.prefix_queries,
            prefix_hits=scheduler.prefix_hits,
            endpoint=self._endpoint_stats,
        )
