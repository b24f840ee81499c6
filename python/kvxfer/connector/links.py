# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""The peers of an endpoint: connecting off-thread, sending, and judging who is still alive.

Everything here runs on the owner's one thread but ``engine.connect`` and the wake-up after it. Sending is best effort: a message that cannot be sent counts as lost, and the protocol
repeats what must not be lost.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from kvxfer.connector.events import HandoffConfig
from kvxfer.connector.protocol import Message, encode
from kvxfer.errors import KvxferError, LayoutError
from kvxfer.layout import KVLayout

if TYPE_CHECKING:
    from kvxfer.transfer import Peer, TransferEngine

__all__ = ["Link", "Links"]


class Link:
    """What is known of one peer incarnation."""

    def __init__(self, peer: Peer, now: float) -> None:
        self.peer = peer
        self.last_heard = now
        self.watched_since = now  # from then on its silence counts
        self.owed_until = (
            now  # until then it gets beats from us even if no handoff is open on our side
        )
        self._layouts: dict[str, KVLayout] = {}

    def layout(self, wire: dict[str, Any]) -> KVLayout:
        """The peer's layout; re-validated once, since each grant carries it. Raises a KvxferError."""
        key = repr(wire)
        layout = self._layouts.get(key)
        if layout is None:
            try:
                layout = KVLayout.from_wire(wire)
                if layout.nbytes >= 1 << 62:  # or offsets would wrap when a plan adds to them
                    raise LayoutError("wire", f"{layout.nbytes} bytes are beyond any memory")
            except (ValueError, TypeError, OverflowError) as error:
                if isinstance(error, KvxferError):
                    raise
                raise LayoutError("wire", f"malformed: {error}") from error
            if (
                len(self._layouts) >= 8
            ):  # a peer has one layout a cache group; more is a mistake or malice
                self._layouts.clear()
            self._layouts[key] = layout
        return layout


class Links:
    def __init__(
        self,
        engine: TransferEngine,
        config: HandoffConfig,
        clock: Callable[[], float],
        counters: Counter[str],
        executor: Executor | None = None,
    ) -> None:
        self._engine = engine
        self._config = config
        self._clock = clock
        self._counters = counters
        self._links: dict[str, Link] = {}
        self._own_executor = executor is None
        self._executor = executor or ThreadPoolExecutor(4, thread_name_prefix="kvxfer-connect")
        self._connecting: dict[tuple[str, str], Future[Peer]] = {}
        self._lock = (
            threading.Lock()
        )  # guards the engine's descriptor against a late executor thread
        self._closed = False

    def get(self, incarnation: str) -> Link | None:
        return self._links.get(incarnation)

    def add(self, peer: Peer) -> Link:
        link = self._links.get(peer.incarnation)
        if link is None:
            link = self._links[peer.incarnation] = Link(peer, self._clock())
        else:
            link.peer = peer  # the same process over a new connection
        return link

    def remove(self, incarnation: str) -> None:
        self._links.pop(incarnation, None)

    def all(self) -> list[tuple[str, Link]]:
        return list(self._links.items())

    def forgive(self, now: float) -> None:
        """Our own thread was away: nobody could be heard, so every peer gets a full window again."""
        for link in self._links.values():
            link.last_heard = now

    def send(
        self, incarnation: str, cls: type[Message], *, handoff: str = "", **values: Any
    ) -> bool:
        """Posts one message; False when there is no connection to carry it (counted)."""
        link = self._links.get(incarnation)
        if link is None:
            self._counters["messages_unsent"] += 1
            return False
        message = cls(
            handoff=handoff, source=self._engine.incarnation, target=incarnation, **values
        )
        payload = encode(message)
        try:
            self._engine.notify(link.peer, payload)
        except KvxferError:
            # The connection just ended, and its "lost" event follows and fails what depended on it; or
            # the peer has long taken nothing, and its silence is about to.
            self._counters["messages_unsent"] += 1
            return False
        self._counters[f"sent_{cls.kind}"] += 1
        return True

    def connect(self, address: str, incarnation: str) -> None:
        """Begins connecting; ``connected()`` has the result, and the engine's descriptor becomes readable."""
        key = (address, incarnation)
        if key not in self._connecting:
            future = self._executor.submit(
                self._engine.connect, address, timeout_s=self._config.connect_timeout_s
            )
            self._connecting[key] = future
            future.add_done_callback(self._wake)

    def _wake(self, _: Future[Peer]) -> None:
        with self._lock:
            if not self._closed:
                # An eventfd: the loop that sleeps on it polls, and finds the result.
                os.write(self._engine.fileno(), (1).to_bytes(8, "little"))

    def connected(self) -> list[tuple[str, str, str]]:
        """Drained: (address, wanted incarnation, "" or why there is no connection to it)."""
        ended: list[tuple[str, str, str]] = []
        for key in [key for key, future in self._connecting.items() if future.done()]:
            address, incarnation = key
            future = self._connecting.pop(key)
            try:
                peer = future.result()
            except KvxferError as error:
                ended.append((address, incarnation, f"connecting to {address} failed: {error}"))
                continue
            if not peer.alive:  # and its "lost" event may have been taken before this result
                ended.append((address, incarnation, f"the connection to {address} ended at once"))
                continue
            self.add(peer)
            wrong = (
                f"{address} is now incarnation {peer.incarnation}, not {incarnation}: it restarted"
            )
            ended.append((address, incarnation, "" if peer.incarnation == incarnation else wrong))
        return ended

    def close(self) -> None:
        with self._lock:
            self._closed = True
        if self._own_executor:
            self._executor.shutdown(wait=False, cancel_futures=True)
