# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""An in-memory transfer engine with the real one's contract and the worst behaviour it allows.

Everything that would happen on another thread is an ``Action`` in ``Net.pending`` that a test runs in any
order: messages are lost, doubled, late; a write reads its source at its own time until it is quiesced, also
after cancel; lands in two steps around the lease's gate; and its acknowledgement may be lost.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np

from kvxfer.errors import (
    KvxferError,
    LeaseError,
    PeerDisconnectedError,
    TransferCancelledError,
    TransferTimeoutError,
    TransportError,
)


class InlineExecutor(Executor):
    """Runs at once, so that a test has one thread."""

    def submit(self, fn: Callable, /, *args: object, **kwargs: object) -> Future:
        future: Future = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except KvxferError as error:
            future.set_exception(error)
        return future


@dataclass(eq=False)
class Action:
    kind: str  # message | read | begin | finish | ack | quiet
    run: Callable[[], None]
    owner: FakeEngine  # dies with it
    deliver: tuple[FakeEngine, FakeEngine, bytes] | None = None


class Net:
    def __init__(self) -> None:
        self.now = 0.0
        self.pending: list[Action] = []
        self.engines: dict[str, FakeEngine] = {}
        self._count = 0
        self.broken = False

    def clock(self) -> float:
        return self.now

    def fresh(self) -> int:
        self._count += 1
        return self._count

    def run(self, index: int) -> None:
        action = self.pending.pop(index % len(self.pending))
        if action.owner.alive:
            action.run()

    def run_all(self) -> None:
        while self.pending:
            self.run(0)

    def advance(self, seconds: float) -> None:
        self.now += seconds
        for engine in self.engines.values():
            engine.time_passed()


@dataclass(eq=False)
class FakeRegion:
    name: str
    array: np.ndarray

    @property
    def nbytes(self) -> int:
        return self.array.nbytes


@dataclass(eq=False)
class FakePeer:
    local: FakeEngine
    remote: FakeEngine
    alive: bool = True

    name = property(lambda self: self.remote.name)
    address = property(lambda self: self.remote.address)
    incarnation = property(lambda self: self.remote.incarnation)

    @property
    def regions(self) -> dict[str, SimpleNamespace]:
        return {
            name: SimpleNamespace(name=name, nbytes=region.nbytes, peer=self)
            for name, region in self.remote.regions.items()
        }


@dataclass(eq=False)
class FakeLease:
    net: Net
    region: FakeRegion
    allowed: np.ndarray  # bool of each byte
    peer: str
    num_bits: int
    until: float
    token: bytes
    bits: set[int] = field(default_factory=set)
    gate_open: bool = True
    copiers: int = 0
    slow_quiet: bool = False  # a copier that leaves late

    @property
    def arrived(self) -> np.ndarray:
        return np.array(sorted(self.bits), np.int64)

    @property
    def num_arrived(self) -> int:
        return len(self.bits)

    @property
    def expired(self) -> bool:
        return self.net.now >= self.until

    @property
    def takes(self) -> bool:
        return self.gate_open and not self.expired

    @property
    def quiet(self) -> bool:
        return not self.gate_open and not self.copiers

    def extend(self, ttl_s: float) -> None:
        if not self.takes:
            raise LeaseError("ended")
        self.until = self.net.now + ttl_s

    def begin_revoke(self) -> None:
        self.gate_open = False


@dataclass(eq=False)
class FakeTransfer:
    engine: FakeEngine
    peer: FakePeer
    region: FakeRegion
    spans: list[tuple[int, int, int]]
    lease: FakeLease | None
    arrival: int
    deadline: float
    state: str = "posted"
    error: KvxferError | None = None
    source_read: bool = False
    data: list[np.ndarray] = field(default_factory=list)
    transport: str = "fake"

    @property
    def done(self) -> bool:
        return self.state != "posted"

    @property
    def quiesced(self) -> bool:
        return self.done and self.source_read

    @property
    def nbytes_done(self) -> int:
        return sum(nbytes for _, _, nbytes in self.spans) if self.state == "done" else 0

    def end(self, state: str, error: KvxferError | None) -> None:
        if not self.done:
            self.state, self.error = state, error

    def cancel(self) -> None:
        # As tcp in the midst of sendmsg: the state is final, the source is not free yet.
        self.end("cancelled", TransferCancelledError("cancelled"))

    # The steps; each is an action.
    def read(self) -> None:
        self.source_read = True
        if self.peer.remote.alive:
            self.data = [self.region.array[at : at + n].copy() for at, _, n in self.spans]
            self.peer.remote.later("begin", self.begin)

    def begin(self) -> None:
        target = self.peer.remote
        if self.lease is None or not self.lease.takes or self.lease.peer != self.engine.incarnation:
            target.late_writes_refused += 1
            self.engine.later("ack", lambda: self.end("failed", LeaseError("the lease is over")))
            return
        self.lease.copiers += 1
        target.later("finish", self.finish)

    def finish(self) -> None:
        assert self.lease is not None
        for (_, at, n), data in zip(self.spans, self.data, strict=True):
            if not self.lease.allowed[at : at + n].all():
                raise AssertionError(f"a write outside the lease: {at}, {n} bytes")
            self.lease.region.array[at : at + n] = data
        self.lease.copiers -= 1
        if self.lease.takes:
            assert 0 <= self.arrival < self.lease.num_bits
            assert self.arrival not in self.lease.bits, "posted twice"
            self.lease.bits.add(self.arrival)
            self.engine.later("ack", lambda: self.end("done", None))
        else:
            self.engine.later("ack", lambda: self.end("failed", LeaseError("revoked meanwhile")))


class FakeEngine:
    def __init__(self, net: Net, name: str, nbytes: int) -> None:
        self.net, self.name = net, name
        self.incarnation = f"{net.fresh():032x}"
        self.address = f"fake:{net.fresh()}"
        self.alive = True
        self.region = FakeRegion("kv", np.zeros(nbytes, np.uint8))
        self.regions = {"kv": self.region}
        self.peers: dict[str, FakePeer] = {}
        self.leases: dict[bytes, FakeLease] = {}
        self.transfers: list[FakeTransfer] = []
        self.inbox: list[SimpleNamespace] = []
        self.happened: list[SimpleNamespace] = []
        self.late_writes_refused = 0
        self.wakeup = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        net.engines[self.incarnation] = self

    def later(self, kind: str, run: Callable[[], None]) -> None:
        self.net.pending.append(Action(kind, run, self))

    def fileno(self) -> int:
        return self.wakeup

    def clear_wakeup(self) -> None:
        try:
            os.eventfd_read(self.wakeup)
        except BlockingIOError:
            return

    def connect(self, address: str, *, timeout_s: float) -> FakePeer:
        for other in self.net.engines.values():
            if other.address == address and other.alive:
                return self.join(other)
        raise TransportError(f"nobody listens at {address}")

    def join(self, other: FakeEngine) -> FakePeer:
        if other.incarnation not in self.peers:
            for here, there in ((self, other), (other, self)):
                peer = here.peers[there.incarnation] = FakePeer(here, there)
                here.happened.append(SimpleNamespace(kind="connected", peer=peer, cause=""))
        return self.peers[other.incarnation]

    def notify(self, peer: FakePeer, payload: bytes) -> None:
        if not peer.alive:
            raise PeerDisconnectedError("gone")
        self.send(peer.remote, payload)

    def send(self, target: FakeEngine, payload: bytes) -> None:
        def deliver() -> None:
            peer = target.peers.get(self.incarnation)
            if peer is not None:
                target.inbox.append(SimpleNamespace(peer=peer, payload=payload))

        self.net.pending.append(Action("message", deliver, target, (self, target, payload)))

    def notifications(self) -> list[SimpleNamespace]:
        taken, self.inbox = self.inbox, []
        return taken

    def peer_events(self) -> list[SimpleNamespace]:
        taken, self.happened = self.happened, []
        return taken

    def write(
        self,
        region: FakeRegion,
        remote: SimpleNamespace,
        local_offsets: np.ndarray,
        remote_offsets: np.ndarray,
        nbytes: np.ndarray,
        *,
        bases: np.ndarray | None,
        arrival: int,
        lease: bytes,
        deadline_s: float,
    ) -> FakeTransfer:
        if not remote.peer.alive:
            raise PeerDisconnectedError("gone")
        rows = np.zeros((1, 2), np.int64) if bases is None else bases
        spans = [
            (int(a + base[0]), int(b + base[1]), int(n))
            for base in rows
            for a, b, n in zip(local_offsets, remote_offsets, nbytes, strict=True)
        ]
        assert spans, "an empty write"
        transfer = FakeTransfer(
            self,
            remote.peer,
            region,
            spans,
            remote.peer.remote.leases.get(lease),
            arrival,
            self.net.now + deadline_s,
        )
        self.transfers.append(transfer)
        self.later("read", transfer.read)
        return transfer

    def grant(
        self,
        region: FakeRegion,
        offsets: np.ndarray,
        nbytes: np.ndarray,
        *,
        ttl_s: float,
        peer: str,
        num_arrivals: int,
    ) -> FakeLease:
        allowed = np.zeros(region.nbytes, bool)
        for at, n in zip(offsets, nbytes, strict=True):
            allowed[at : at + n] = True
        token = f"lease-{self.net.fresh()}".encode()
        lease = FakeLease(
            self.net, region, allowed, peer, num_arrivals, self.net.now + ttl_s, token
        )
        self.leases[token] = lease
        return lease

    def time_passed(self) -> None:
        for transfer in self.transfers:
            if self.net.now >= transfer.deadline:
                transfer.end("timed_out", TransferTimeoutError("no acknowledgement"))
        self.transfers = [t for t in self.transfers if not t.quiesced]

    def cut(self, other: FakeEngine) -> None:
        """The connection to ``other`` ends, on our side."""
        peer = self.peers.pop(other.incarnation, None)
        if peer is None or not self.alive:
            return
        peer.alive = False
        for transfer in self.transfers:
            if transfer.peer is peer:
                transfer.end("failed", PeerDisconnectedError("gone"))
        self.happened.append(SimpleNamespace(kind="lost", peer=peer, cause="connection closed"))

    def die(self) -> None:
        self.alive = False
        for other in list(self.net.engines.values()):
            other.cut(self)

    def close(self) -> None:
        os.close(self.wakeup)
