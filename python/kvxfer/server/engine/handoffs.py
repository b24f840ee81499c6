# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""The server's side of its handoffs: applies the connector's events to sequences and blocks, and back.

The connector knows messages, leases and timers; this knows whose blocks they are. Blocks that a peer may
still write into or that are still being read are pinned in the pool until the connector says Quiet,
whatever has become of the request. Only the engine thread calls it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from kvxfer.connector import (
    Accepted,
    Declined,
    DuplicateHandoffError,
    Endpoint,
    Failed,
    Granted,
    Offered,
    Quiet,
)
from kvxfer.errors import KvxferError
from kvxfer.server.engine.offers import OfferQueue
from kvxfer.server.engine.requests import Requests
from kvxfer.server.engine.scheduler import Scheduler
from kvxfer.server.engine.sequence import Chunk, Request, Sequence, State
from kvxfer.server.metrics import Metrics
from kvxfer.server.wire import PrefillReply, Reserved

__all__ = ["Handoffs"]


@dataclass(slots=True, eq=False)
class _Leg:
    """One side of a handoff, from the request's arrival until the connector has nothing more to say."""

    sequence: Sequence
    blocks: list[int] = field(default_factory=list)  # pinned
    over: bool = False  # failed or aborted: only the blocks are waited for


class Handoffs:
    def __init__(
        self,
        endpoint: Endpoint,
        scheduler: Scheduler,
        requests: Requests,
        metrics: Metrics,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._endpoint = endpoint
        self._scheduler = scheduler
        self._requests = requests
        self._metrics = metrics
        self._clock = clock
        self._legs: dict[str, _Leg] = {}
        # Two steps' worth: enough that granted prompts fill each step while further grants are on their way.
        tokens_ahead = 2 * scheduler.limits.max_num_batched_tokens
        self._offers = OfferQueue(min_ahead=4, tokens_ahead=tokens_ahead)

    @property
    def num_open(self) -> int:
        return len(self._legs)

    @property
    def num_closing_blocks(self) -> int:
        """Leased blocks whose handoff is over: they wait for nothing but quiet."""
        return sum(len(leg.blocks) for leg in self._legs.values() if leg.over)

    def waiting(self) -> dict[str, list[Sequence]]:
        """Sequences that wait for something of a handoff's, by what for."""
        states = [leg.sequence for leg in self._legs.values() if not leg.over]
        expecting = [s for s in states if s.request.role == "decode" and s.state is State.WAITING]
        return {
            "queue": [*self._offers.waiting(), *expecting],
            "grant": [s for s in self._offers.ahead() if s.state is State.OFFERED],
            "kv": list(self._scheduler.reserved),
        }

    def open(self, request: Request) -> None:
        """A leg arrived: expect an offer for it, or queue it to be offered."""
        (sequence,), handoff = request.sequences, request.spec.handoff
        if handoff in self._legs:
            self._requests.fail(
                request, "refused", f"handoff {handoff} is open here", retryable=True
            )
            return
        if request.role == "decode":
            try:
                remaining = max(0.001, request.deadline - self._clock())
                self._endpoint.receiver.expect(handoff, deadline_s=remaining)
            except DuplicateHandoffError as error:
                self._requests.fail(request, "refused", str(error), retryable=True)
                return
            self._legs[handoff] = _Leg(sequence)
        else:
            self._legs[handoff] = _Leg(sequence)
            self._offers.add(sequence)
            self._offer()

    def close(self, request: Request, cause: str) -> None:
        """The request is over here; tell the peer, and keep what is leased until it is quiet."""
        leg = self._legs.get(request.spec.handoff)
        if leg is None or leg.over or leg.sequence.request is not request:
            return
        leg.over = True
        if self._offers.withdraw(leg.sequence):
            del self._legs[request.spec.handoff]  # the connector never heard of it
        elif request.role == "prefill":
            self._endpoint.sender.abort(request.spec.handoff, cause)
        else:
            self._endpoint.receiver.abort(request.spec.handoff, cause)
        self._offers.settle(leg.sequence)
        self._offer()

    def poll(self) -> bool:
        """Applies what happened; whether anything did."""
        events = self._endpoint.poll()
        for event in events:
            leg = self._legs.get(event.handoff)
            if isinstance(event, Offered):
                self._offered(event, leg)
            elif leg is None:
                continue  # ended here; a later event changes nothing of ours
            elif isinstance(event, Granted):
                self._granted(leg)
            elif isinstance(event, Declined):
                self._declined(event, leg)
            elif isinstance(event, Accepted):
                self._accepted(event, leg)
            elif isinstance(event, Failed):
                self._failed(event, leg)
            elif isinstance(event, Quiet):
                self._quiet(event, leg)
        return bool(events)

    def go_on_with_admitted(self) -> None:
        """The scheduler just found blocks for these: grant them to the peer, or start to send from them."""
        admitted, self._scheduler.admitted = self._scheduler.admitted, []
        for sequence in admitted:
            request, handoff = sequence.request, sequence.request.spec.handoff
            if sequence.state is State.RESERVED:
                leg, pool = self._legs[handoff], self._scheduler.pool
                leg.blocks = sequence.block_ids[sequence.num_computed // pool.block_size :]
                pool.pin(leg.blocks)
                request.mark("granted", self._clock())
                self._requests.emit(request, Reserved(sequence.num_computed))
                self._endpoint.receiver.grant(
                    handoff,
                    np.asarray(sequence.block_ids, dtype=np.int32),
                    token_begin=sequence.num_computed,
                    token_end=sequence.num_prompt,
                )
            elif request.role == "prefill":
                leg = self._legs[handoff]
                leg.blocks = list(sequence.block_ids)
                self._scheduler.pool.pin(leg.blocks)
                request.mark("first_chunk", self._clock())
                self._endpoint.sender.start(handoff, leg.blocks)
                self._offers.settle(sequence)
            elif "first_chunk" not in request.timeline:
                request.mark("first_chunk", self._clock())
                self._requests.emit(request, Reserved(sequence.num_computed))
        self._offer()

    def layer_hook(self, chunks: list[Chunk]) -> Callable[[int], None] | None:
        """What the runner calls after each layer: sends that layer of the prompts computed for peers."""
        sending = [chunk for chunk in chunks if chunk.sequence.request.role == "prefill"]
        if not sending:
            return None

        def layer_done(layer: int) -> None:
            for sequence, begin, end, num_samples in sending:
                request = sequence.request
                self._endpoint.sender.layer_done(
                    request.spec.handoff,
                    chunk_index=sequence.num_chunks,
                    layer=layer,
                    # What this side had cached goes with the first chunk; the grant clips what the peer has.
                    token_begin=begin if sequence.num_chunks else 0,
                    token_end=end,
                )
                if num_samples:
                    request.mark(f"layer{layer}_posted", self._clock())

        return layer_done

    def commit(self, sequence: Sequence, first_tokens: list[int]) -> None:
        request = sequence.request
        request.mark("commit", self._clock())
        self._endpoint.sender.commit(
            request.spec.handoff,
            num_chunks=sequence.num_chunks,
            first_tokens=first_tokens,
            cached_tokens=request.cached_tokens or 0,
        )

    def _offer(self) -> None:
        for sequence in self._offers.take():
            request = sequence.request
            params = request.spec.kv_transfer_params
            assert params is not None
            sequence.state = State.OFFERED
            now = self._clock()
            request.mark("offered", now)
            try:
                self._endpoint.sender.offer(
                    request.spec.handoff,
                    peer_address=params.peer.engine,
                    peer_incarnation=params.peer.incarnation,
                    num_tokens=sequence.num_prompt,
                    deadline_s=max(0.001, request.deadline - now),
                )
            except KvxferError as error:
                self._offers.settle(sequence)
                del self._legs[request.spec.handoff]
                self._metrics.handoff_ended("prefill", "refused")
                self._requests.fail(request, "refused", str(error), retryable=True)

    def _offered(self, event: Offered, leg: _Leg | None) -> None:
        if leg is None or leg.over or leg.sequence.request.role != "decode":
            self._endpoint.receiver.decline(event.handoff, "the request is gone")
            return
        sequence = leg.sequence
        if event.num_tokens != sequence.num_prompt:
            reason = f"offered {event.num_tokens} tokens for a prompt of {sequence.num_prompt}"
            self._endpoint.receiver.decline(event.handoff, reason)
            del self._legs[event.handoff]  # who declines is told nothing more
            self._metrics.handoff_ended("decode", "declined")
            self._requests.fail(sequence.request, "refused", reason, retryable=True)
        elif sequence.state is State.WAITING:
            sequence.state = State.OFFERED
            sequence.request.mark("offered", self._clock())
            self._scheduler.add(sequence)

    def _granted(self, leg: _Leg) -> None:
        if not leg.over:
            leg.sequence.state = State.GRANTED
            leg.sequence.request.mark("granted", self._clock())
            self._scheduler.add(leg.sequence)

    def _declined(self, event: Declined, leg: _Leg) -> None:
        del self._legs[event.handoff]
        self._offers.settle(leg.sequence)
        self._metrics.handoff_ended("prefill", "declined")
        if not leg.over:
            reply = PrefillReply(status="declined", message=event.reason, retryable=True)
            self._requests.end(leg.sequence.request, reply)
        self._offer()

    def _accepted(self, event: Accepted, leg: _Leg) -> None:
        self._scheduler.pool.unpin(leg.blocks)
        del self._legs[event.handoff]
        self._metrics.handoff_ended("decode", "accepted")
        sequence, request = leg.sequence, leg.sequence.request
        if leg.over or request.ended:
            return
        request.cached_tokens = event.cached_tokens
        request.mark("accept", self._clock())
        if len(event.first_tokens) != request.spec.sampling.n:
            message = f"{len(event.first_tokens)} first tokens came for n={request.spec.sampling.n}"
            self._requests.fail(request, "refused", message, retryable=True)
        else:
            outputs = self._scheduler.activate(sequence, list(event.first_tokens))
            self._requests.emit_outputs(outputs)

    def _failed(self, event: Failed, leg: _Leg) -> None:
        request = leg.sequence.request
        was_over, leg.over = leg.over, True
        self._metrics.handoff_ended(request.role, event.end)
        self._offers.settle(leg.sequence)
        if not leg.blocks:
            del self._legs[event.handoff]  # nothing was granted or started, so no Quiet follows
        if not was_over:
            self._requests.fail(request, event.end, event.cause, retryable=event.retryable)
        self._offer()

    def _quiet(self, event: Quiet, leg: _Leg) -> None:
        del self._legs[event.handoff]
        self._scheduler.pool.unpin(leg.blocks)
        request = leg.sequence.request
        if leg.over or request.role != "prefill":
            return
        self._metrics.handoff_ended("prefill", "accepted")
        since, stages = self._clock() - request.received, request.timeline
        self._metrics.kv_sent(since - stages["granted"], since - stages["commit"])
        self._requests.end(request, PrefillReply(status="handed_off"))
