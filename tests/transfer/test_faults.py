# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Peers that die, stop or come back; nothing hangs, nothing leaks."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from transfer_peers import SECRET, TIMEOUT_S, PeerProcess, until, wait_for

from kvxfer.errors import (
    InvalidArgumentError,
    PeerDisconnectedError,
    TransferCancelledError,
    TransferTimeoutError,
)
from kvxfer.testing.faults import Way
from kvxfer.transfer import Peer, Region, TransferEngine

NBYTES = 8 << 20


def connect(engine: TransferEngine, process: PeerProcess) -> tuple[Peer, Region]:
    process.call("add_region", "kv", NBYTES, "allocated")
    local = engine.allocate(NBYTES, "kv")
    return engine.connect(process.address), local


def lost(engine: TransferEngine) -> Callable[[], bool]:
    return lambda: any(event.kind == "lost" for event in engine.peer_events())


def test_peer_death_fails_pending_transfers(engine: TransferEngine, own_peer: PeerProcess) -> None:
    peer, local = connect(engine, own_peer)
    own_peer.stop()  # so that they are pending for certain
    xfers = [engine.write(local, peer.regions["kv"], 0, 0, NBYTES) for _ in range(20)]
    xfers.append(engine.notify(peer, b"x"))
    xfers.append(engine.read(local, peer.regions["kv"], 0, 0, 100))
    own_peer.kill()
    for xfer in xfers:
        with pytest.raises(PeerDisconnectedError, match="victim") as info:
            xfer.wait(TIMEOUT_S)
        assert info.value.peer == "victim"
        assert xfer.state == "failed"
        wait_for(engine, lambda xfer=xfer: xfer.quiesced)
    wait_for(engine, lost(engine))
    assert not peer.alive
    assert peer.lost_because
    assert peer.regions == {}
    late = engine.notify(peer, b"x")
    with pytest.raises(PeerDisconnectedError, match="connect"):
        late.wait(TIMEOUT_S)


def test_stopped_peer_ends_transfers_at_their_deadline(
    engine: TransferEngine, own_peer: PeerProcess
) -> None:
    peer, local = connect(engine, own_peer)
    own_peer.stop()
    began = time.monotonic()
    xfers = [
        engine.write(local, peer.regions["kv"], 0, 0, NBYTES, deadline_s=0.2) for _ in range(5)
    ]
    xfers.append(engine.read(local, peer.regions["kv"], 0, 0, NBYTES, deadline_s=0.2))
    for xfer in xfers:
        with pytest.raises(TransferTimeoutError, match="deadline"):
            xfer.wait(TIMEOUT_S)
        assert xfer.state == "timed_out"
        wait_for(engine, lambda xfer=xfer: xfer.quiesced)
    assert 0.2 <= time.monotonic() - began < TIMEOUT_S / 2
    local.array[:] = 77  # quiesced: ours again
    own_peer.resume()
    engine.write(local, peer.regions["kv"], 0, 0, NBYTES).wait(TIMEOUT_S)
    assert own_peer.call("bytes_of", "kv") == bytes([77]) * NBYTES
    assert peer.alive


def test_revoke_is_quiet_while_the_writer_is_stopped(
    engine: TransferEngine, own_peer: PeerProcess
) -> None:
    for round_ in range(5):
        name = f"target{round_}"
        target = engine.allocate(NBYTES, name)
        if round_ == 0:
            own_peer.call("add_region", "source", NBYTES, "allocated")
            own_peer.call("fill", "source", 0x55)
            engine.connect(own_peer.address)
        # Over an emulated cable that loses packets a write takes ten seconds: the lease outlives whoever waits for it.
        lease = engine.grant(
            target, 0, NBYTES, ttl_s=2 * TIMEOUT_S, peer=own_peer.incarnation, num_arrivals=1
        )
        wait_for_region(own_peer, name)
        own_peer.call("start_endless_writes", "source", name, lease.token)
        lease.wait_arrived(0, TIMEOUT_S)  # they land, one after the other
        own_peer.stop()
        lease.revoke(TIMEOUT_S)  # nobody over there takes part
        assert lease.quiet
        target.array[:] = 0xEE  # reused at once
        own_peer.resume()
        assert own_peer.call("end_of_writes") == "LeaseError"
        engine.notify(engine.connect(own_peer.address), b"marker").wait(TIMEOUT_S)
        assert (target.array == 0xEE).all()


def wait_for_region(process: PeerProcess, name: str) -> None:
    process.call("await_region", name)


def test_expired_lease_of_a_stopped_writer_is_quiet(
    engine: TransferEngine, own_peer: PeerProcess
) -> None:
    target = engine.allocate(NBYTES, "target")
    engine.connect(own_peer.address)
    own_peer.stop()
    lease = engine.grant(target, 0, NBYTES, ttl_s=0.05, num_arrivals=1)
    wait_for(engine, lambda: lease.quiet)
    assert lease.expired
    with pytest.raises(Exception, match="expired"):
        lease.wait_arrived(0, TIMEOUT_S)


def test_restarted_peer_is_a_new_incarnation(engine: TransferEngine, way: Way) -> None:
    first = PeerProcess("decode", way)
    peer, local = connect(engine, first)
    old = peer.regions["kv"]
    _, token = first.call("grant", "kv", 0, 100, ttl_s=60)
    first.kill()
    wait_for(engine, lost(engine))
    second = PeerProcess("decode", way)
    second.call("add_region", "kv", NBYTES, "allocated")
    again = engine.connect(second.address)
    assert again.incarnation != peer.incarnation
    assert again is not peer
    with pytest.raises(PeerDisconnectedError):
        engine.write(local, old, 0, 0, 10).wait(TIMEOUT_S)
    with pytest.raises(Exception, match="restarted"):
        engine.write(local, again.regions["kv"], 0, 0, 10, lease=token)
    engine.write(local, again.regions["kv"], 0, 0, 10).wait(TIMEOUT_S)
    second.close()


def test_counts_of_arrivals_begin_anew_with_each_incarnation(
    engine: TransferEngine, way: Way
) -> None:
    engine.allocate(100, "kv")
    seen = []
    for n in (3, 1):
        process = PeerProcess("prefill", way)
        process.call("add_region", "source", 100, "allocated")
        seen.append(engine.connect(process.address))
        for _ in range(n):
            process.call("write_back", "source", "kv", 0, 10, arrival=7)
        engine.wait_arrivals(7, seen[-1], n, TIMEOUT_S)
        process.kill()
        wait_for(engine, lost(engine))
    assert [engine.arrivals(7, peer) for peer in seen] == [3, 1]


def test_one_engine_serves_twenty_peers_and_loses_them_one_by_one(
    engine: TransferEngine, way: Way
) -> None:
    local = engine.allocate(20 * 4096, "kv")
    local.array[:] = np.random.default_rng(3).integers(0, 256, 20 * 4096, np.uint8)
    others = [way.engine(f"peer{i}", SECRET) for i in range(20)]
    targets = [other.allocate(4096, "kv") for other in others]
    peers = [engine.connect(other.address, TIMEOUT_S) for other in others]
    for _ in range(3):
        xfers = [
            engine.write(local, peer.regions["kv"], i * 4096, 0, 4096, notify=b"x")
            for i, peer in enumerate(peers)
        ]
        for xfer in xfers:
            xfer.wait(TIMEOUT_S)
    for i, target in enumerate(targets):
        np.testing.assert_array_equal(target.array, local.array[i * 4096 : (i + 1) * 4096])
    lost: set[str] = set()
    for i, other in enumerate(others):
        other.close()

        def look(i: int = i) -> bool:
            lost.update(e.peer.name for e in engine.peer_events() if e.kind == "lost")
            return f"peer{i}" in lost

        wait_for(engine, look)
        if i < 19:  # the others do not notice
            engine.write(local, peers[19].regions["kv"], 0, 0, 10).wait(TIMEOUT_S)
    assert len(lost) == 20
    # A new one of the same name is another incarnation.
    with way.engine("peer0", SECRET) as again:
        again.allocate(4096, "kv")
        peer = engine.connect(again.address, TIMEOUT_S)
        assert peer.incarnation != peers[0].incarnation
        engine.write(local, peer.regions["kv"], 0, 0, 4096).wait(TIMEOUT_S)


def test_peer_that_leaves_in_order_is_reported_so(engine: TransferEngine, way: Way) -> None:
    peer = PeerProcess("polite", way)
    engine.connect(peer.address)
    peer.close()
    event = wait_for(engine, lambda: [e for e in engine.peer_events() if e.kind == "lost"])[0]
    assert event.peer.name == "polite"
    assert "closed" in event.cause


def test_close_cancels_what_is_open(engine: TransferEngine, own_peer: PeerProcess) -> None:
    peer, local = connect(engine, own_peer)
    remote = peer.regions["kv"]
    own_peer.stop()
    xfers = [engine.write(local, remote, 0, 0, NBYTES) for _ in range(3)]
    waiter_saw: list[BaseException] = []

    def wait() -> None:
        try:
            xfers[0].wait(TIMEOUT_S)
        except TransferCancelledError as error:
            waiter_saw.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    engine.close()
    engine.close()
    thread.join(TIMEOUT_S)
    assert len(waiter_saw) == 1
    assert [xfer.state for xfer in xfers] == ["cancelled"] * 3
    assert all(xfer.quiesced for xfer in xfers)
    local.array[:] = 1  # the memory outlives the engine
    with pytest.raises(InvalidArgumentError, match="closed"):
        engine.write(local, remote, 0, 0, 10)
    own_peer.resume()


def test_dropping_an_engine_with_open_transfers_returns(own_peer: PeerProcess, way: Way) -> None:
    engine = way.engine("dropped", SECRET)
    peer, local = connect(engine, own_peer)
    own_peer.stop()
    xfer = engine.write(local, peer.regions["kv"], 0, 0, NBYTES)
    del engine
    with pytest.raises(TransferCancelledError):
        xfer.wait(TIMEOUT_S)


def _resources() -> tuple[int, int]:
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


def _mappings() -> int:
    return Path("/proc/self/maps").read_text().count("kvxfer:")


def test_no_descriptor_thread_or_mapping_leaks(shared_peer: PeerProcess, way: Way) -> None:
    shared_peer.call("add_region", "leaks", 4096, "allocated")

    def round_trip() -> None:
        with way.engine("leaky", SECRET) as engine:
            local = engine.allocate(1 << 16, "kv")
            peer = engine.connect(shared_peer.address)
            engine.write(local, peer.regions["leaks"], 0, 0, 4096, notify=b"x").wait(TIMEOUT_S)
            engine.register(np.zeros(100, np.uint8), "other")
            engine.grant(local, 0, 10, ttl_s=60)
        shared_peer.call("notifications", 1)

    round_trip()
    gc.collect()  # engines of earlier tests, kept by the cycles of their exceptions
    before, mappings = _resources(), _mappings()
    for _ in range(10):
        round_trip()
    # No more, and soon: a software NIC hangs up on others a moment after its last engine has closed.
    until(
        lambda: all(now <= then for now, then in zip(_resources(), before, strict=True)),
        lambda: (_resources(), before),
    )
    assert _mappings() == mappings
    shared_peer.call("drop_region", "leaks")


def test_idle_engine_uses_no_cpu(engine: TransferEngine, shared_peer: PeerProcess) -> None:
    peer = engine.connect(shared_peer.address)
    engine.notify(peer, b"warm").wait(TIMEOUT_S)
    shared_peer.call("notifications", 1)

    def a_second() -> tuple[float, int, int]:
        """CPU seconds, and wake-ups here and over there."""
        ours, theirs = engine.stats()["wakeups"], shared_peer.call("stats")["wakeups"]
        began = time.process_time()
        threading.Event().wait(1.0)
        spent = time.process_time() - began
        return (
            spent,
            engine.stats()["wakeups"] - ours,
            shared_peer.call("stats")["wakeups"] - theirs,
        )

    # On a busy machine what came before may end in the first of them: what is not idle never is.
    seconds = []
    for _ in range(4):
        seconds.append(a_second())
        if all(found <= most for found, most in zip(seconds[-1], (0.05, 2, 2), strict=True)):
            return
    raise AssertionError(f"CPU seconds and wake-ups here and there, each second: {seconds}")


def test_an_engine_that_was_polled_is_idle_when_nobody_polls_any_more(
    engine: TransferEngine, shared_peer: PeerProcess
) -> None:
    peer = engine.connect(shared_peer.address)
    for _ in range(50):  # long enough to be lent the progress thread's work
        xfer = engine.notify(peer, b"polled")
        end = time.monotonic() + TIMEOUT_S
        while not xfer.done and time.monotonic() < end:
            pass
        assert xfer.done
    shared_peer.call("notifications", 50)
    end = time.monotonic() + 0.01
    while time.monotonic() < end:
        assert engine.notifications() == []
    threading.Event().wait(0.1)  # neither waits for the other: the watch ends by itself
    began = time.process_time()
    threading.Event().wait(1.0)
    assert time.process_time() - began < 0.05
