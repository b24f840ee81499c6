# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""One worker's end of its handoffs: brings engine events and time to the two state machines.

One thread calls everything here (the server's engine thread). It sleeps on ``engine.fileno()`` until
``next_deadline()``, then polls; nothing here blocks.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Executor
from typing import TYPE_CHECKING, Any

from kvxfer.connector.context import Context
from kvxfer.connector.events import Event, HandoffConfig
from kvxfer.connector.links import Links
from kvxfer.connector.protocol import (
    MAX_LAYOUT_NBYTES,
    MAX_RENEWED,
    Abort,
    Accept,
    Commit,
    Decline,
    Grant,
    Message,
    Offer,
    ProtocolError,
    Renew,
    decode,
)
from kvxfer.connector.receiver import Receiver
from kvxfer.connector.sender import Sender
from kvxfer.errors import InvalidArgumentError
from kvxfer.layout import KVLayout

if TYPE_CHECKING:
    from kvxfer.transfer import Notification, Region, TransferEngine

__all__ = ["Endpoint"]


class Endpoint:
    def __init__(
        self,
        engine: TransferEngine,
        region: Region,
        layout: KVLayout,
        *,
        model_id: str,
        config: HandoffConfig | None = None,
        clock: Callable[[], float] = time.monotonic,
        executor: Executor | None = None,
    ) -> None:
        """Takes the engine's notifications for itself; owns neither engine, region nor blocks.

        Args:
            region: holds the cache that ``layout`` describes; peers find it by its name.
            model_id: identity of weights and config; two that differ refuse each other.
            clock: of all timers, in seconds.
            executor: for connecting; by default a small thread pool of our own.
        """
        if layout.nbytes > region.nbytes:
            raise InvalidArgumentError(
                f"the layout reaches {layout.nbytes} bytes, region {region.name!r} has {region.nbytes}"
            )
        wire_nbytes = len(json.dumps(layout.to_wire()))
        if wire_nbytes > MAX_LAYOUT_NBYTES:
            raise InvalidArgumentError(
                f"the layout takes {wire_nbytes} bytes in a message, {MAX_LAYOUT_NBYTES} fit; use evenly "
                "spaced layer bases"
            )
        if not 0 < len(model_id) <= 256:
            raise InvalidArgumentError(
                f"model_id of {len(model_id)} characters; 1 to 256 fit a message"
            )
        config = config or HandoffConfig()
        counters: Counter[str] = Counter()
        links = Links(engine, config, clock, counters, executor)
        self._context = Context(
            engine,
            region,
            layout,
            model_id,
            config,
            clock,
            counters,
            links,
            beat=self._renew_if_due,
        )
        self._engine, self._links, self._config, self._clock = engine, links, config, clock
        self._counters = counters
        self.sender = Sender(self._context)
        self.receiver = Receiver(self._context)
        self._polled_at = clock()
        self._next_beat = self._next_judged = clock() + config.beat_s
        self._closed = False

    def poll(self) -> list[Event]:
        """What happened since the last call. Never blocks."""
        self._engine.clear_wakeup()
        now = self._clock()
        if now - self._polled_at > self._config.lost_after_s / 2:
            self._links.forgive(now)
        self._polled_at = now
        # Looked at first, applied last: what a peer sent before its end is taken first, and may complete
        # the set that its end would fail.
        peer_events = self._engine.peer_events()
        for event in peer_events:
            if event.kind == "connected":
                self._links.add(event.peer)
        for address, peer, problem in self._links.connected():
            self.sender.on_connected(address, peer, problem)
        for notification in self._engine.notifications():
            self._take(notification, now)
        self.sender.advance(now)
        self.receiver.advance(now)
        for event in peer_events:
            if event.kind == "lost":
                self._lost(event.peer.incarnation, f"peer {event.peer.name} is gone: {event.cause}")
        if now >= self._next_judged:
            self._next_judged = now + self._config.beat_s
            self._judge(now)
            self.sender.repeat(now)
            self.receiver.repeat(now)
        self._renew_if_due()
        events, self._context.events = self._context.events, []
        return events

    def next_deadline(self) -> float | None:
        """When ``poll`` has something to do of its own, on the endpoint's clock; None: only when woken."""
        now = self._clock()
        if self._context.events:
            return now
        deadlines = self.sender.next_deadline(), self.receiver.next_deadline()
        times = [deadline for deadline in deadlines if deadline is not None]
        owed = any(link.owed_until > now for _, link in self._links.all())
        if owed or self.sender.open_handoffs() or self.receiver.open_handoffs():
            times.append(min(self._next_beat, self._next_judged))
        return min(times, default=None)

    def stats(self) -> dict[str, Any]:
        """Counters since the start, and what is open now."""
        counters = self._counters

        def named(prefix: str) -> dict[str, int]:
            return {
                key.removeprefix(prefix): n for key, n in counters.items() if key.startswith(prefix)
            }

        return {
            "bytes_sent": named("bytes_sent_"),  # by transport
            "bytes_received": named("bytes_received_"),
            "handoffs": {"sender": named("sender_"), "receiver": named("receiver_")},  # by end
            "messages_sent": named("sent_"),
            "messages_received": named("received_"),
            "messages_dropped": named("dropped_"),
            "messages_unsent": counters["messages_unsent"],
            "layers_after_end": counters["layers_after_end"],
            "open": {
                "sender": len(self.sender.open_handoffs()),
                "receiver": len(self.receiver.open_handoffs()),
            },
            "closing": {"sender": self.sender.num_closing, "receiver": self.receiver.num_closing},
        }

    def close(self) -> None:
        """Aborts what is open and begins its revokes; the engine, closed next, ends what is under way."""
        if self._closed:
            return
        self._closed = True
        self.sender.shut_down("the worker shuts down")
        self.receiver.shut_down("the worker shuts down")
        self._links.close()

    # -- inner ---------------------------------------------------------------------------------------------

    def _take(self, notification: Notification, now: float) -> None:
        peer = notification.peer.incarnation
        try:
            message = decode(notification.payload)
        except ProtocolError:
            self._context.drop("malformed")
            return
        if message.source != peer or message.target != self._engine.incarnation:
            self._context.drop("stale")  # of another incarnation, theirs or ours
            return
        if not notification.peer.alive and self._links.get(peer) is None:
            self._context.drop("late")  # its end was taken already
            return
        self._counters[f"received_{message.kind}"] += 1
        link = self._links.add(notification.peer)
        link.last_heard = now
        if not isinstance(message, Renew) or message.sending or message.receiving:
            link.owed_until = now + self._config.lost_after_s
        self._dispatch(peer, message)

    def _dispatch(self, peer: str, message: Message) -> None:
        if isinstance(message, Offer):
            self.receiver.on_offer(peer, message)
        elif isinstance(message, Grant):
            self.sender.on_grant(peer, message)
        elif isinstance(message, Decline):
            self.sender.on_decline(peer, message)
        elif isinstance(message, Commit):
            self.receiver.on_commit(peer, message)
        elif isinstance(message, Accept):
            self.sender.on_accept(peer, message)
        elif isinstance(message, Abort):
            (self.sender if message.to == "sender" else self.receiver).on_abort(peer, message)
        elif isinstance(message, Renew):
            self.receiver.on_renew(peer, message.sending)
            self.sender.on_renew(peer, message.receiving)

    def _lost(self, peer: str, cause: str) -> None:
        link = self._links.get(peer)
        if link is not None and not link.peer.alive:  # else it is back over a new connection
            self._links.remove(peer)
        self.sender.on_lost(peer, cause)
        self.receiver.on_lost(peer, cause)

    def _judge(self, now: float) -> None:
        """Fails the handoffs with peers that were silent for too long. Only after their messages were taken."""
        for peer, link in self._links.all():
            if not self.sender.held(peer) and not self.receiver.held(peer):
                link.watched_since = now  # nothing is owed to us
                continue
            silent_s = now - max(link.last_heard, link.watched_since)
            if silent_s >= self._config.lost_after_s:
                # The connection stands and may come back to life: the peer stays known, and is told.
                cause = f"peer {peer} was not heard for {silent_s:.1f} s; stopped, or cut off"
                self.sender.on_lost(peer, cause)
                self.receiver.on_lost(peer, cause)

    def _renew_if_due(self) -> None:
        now = self._clock()
        if now < self._next_beat:
            return
        self._next_beat = now + self._config.beat_s
        for peer, link in self._links.all():
            sending, receiving = self.sender.held(peer), self.receiver.held(peer)
            count = max(len(sending), len(receiving), 1 if link.owed_until > now else 0)
            for at in range(0, count, MAX_RENEWED):
                part = slice(at, at + MAX_RENEWED)
                self._links.send(
                    peer, Renew, sending=tuple(sending[part]), receiving=tuple(receiving[part])
                )
