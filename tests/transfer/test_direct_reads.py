# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Reads against an owner who takes its memory back: no done read ever shows a later byte."""

from __future__ import annotations

import numpy as np
import pytest
from transfer_peers import SECRET, TIMEOUT_S, PeerProcess, wait_for

from kvxfer.errors import LeaseError, PeerDisconnectedError
from kvxfer.testing.faults import Way
from kvxfer.transfer import Region, TransferEngine

NBYTES = 4 << 20
OLD, NEW = 0x55, 0xEE


def make_region(engine: TransferEngine, kind: str, name: str) -> Region:
    if kind == "allocated":
        region = engine.allocate(NBYTES, name)
    else:
        region = engine.register(np.zeros(NBYTES, np.uint8), name)
    region.array[:] = OLD
    return region


def start_reader(engine: TransferEngine, reader: PeerProcess, kind: str, name: str) -> None:
    if "sink" not in reader.call("region_names"):
        reader.call("add_region", "sink", NBYTES, kind)
    engine.connect(reader.address)
    reader.call("await_region", name)


def test_no_read_shows_bytes_stored_after_revoke(
    engine: TransferEngine, own_peer: PeerProcess, kind: str
) -> None:
    for round_ in range(10):
        target = make_region(engine, kind, f"pool{round_}")
        start_reader(engine, own_peer, kind, target.name)
        lease = engine.grant(target, 0, NBYTES, ttl_s=60)
        own_peer.call("start_endless_reads", "sink", target.name, lease.token, NEW)
        own_peer.call("wait_reads", 1 + round_ % 3)
        lease.revoke(TIMEOUT_S)
        target.array[:] = NEW
        done, dirty, error = own_peer.call("end_of_reads")
        assert done > 0
        assert (dirty, error) == (0, "LeaseError")
        engine.deregister(target)


def test_no_read_shows_bytes_stored_after_deregister(
    engine: TransferEngine, own_peer: PeerProcess, kind: str
) -> None:
    target = make_region(engine, kind, "pool")
    array = target.array  # keeps the memory
    start_reader(engine, own_peer, kind, "pool")
    own_peer.call("start_endless_reads", "sink", "pool", None, NEW)
    own_peer.call("wait_reads", 3)
    engine.deregister(target)
    array[:] = NEW
    done, dirty, error = own_peer.call("end_of_reads")
    assert done > 0
    assert (dirty, error) == (0, "RemoteAccessError")


def test_revoke_is_immediate_while_the_reader_is_stopped(
    engine: TransferEngine, own_peer: PeerProcess, kind: str
) -> None:
    for round_ in range(5):
        target = make_region(engine, kind, f"pool{round_}")
        start_reader(engine, own_peer, kind, target.name)
        lease = engine.grant(target, 0, NBYTES, ttl_s=60)
        own_peer.call("start_endless_reads", "sink", target.name, lease.token, NEW)
        own_peer.call("wait_reads", 1)
        own_peer.stop()
        lease.revoke(TIMEOUT_S)
        assert lease.quiet
        target.array[:] = NEW
        own_peer.resume()
        _, dirty, error = own_peer.call("end_of_reads")
        assert (dirty, error) == (0, "LeaseError")
        engine.deregister(target)


def test_owner_killed_amid_reads_ends_them(
    engine: TransferEngine, own_peer: PeerProcess, kind: str
) -> None:
    own_peer.call("add_region", "pool", NBYTES, kind)
    own_peer.call("fill", "pool", OLD)
    local = engine.allocate(NBYTES, "sink")
    peer = engine.connect(own_peer.address)
    remote = peer.regions["pool"]
    engine.read(local, remote, 0, 0, NBYTES).wait(TIMEOUT_S)
    reads = [engine.read(local, remote, 0, 0, NBYTES) for _ in range(200)]
    reads[0].wait(TIMEOUT_S)
    own_peer.kill()
    for read in reads:
        # Done, too, though the owner is dead: what it granted is pulled from sealed memory that
        # outlives it, and judged by its words that do. So a read that is not done when we look may
        # be done when we wait; no other error is right.
        try:
            read.wait(TIMEOUT_S)
        except PeerDisconnectedError:
            assert read.state == "failed"
        else:
            assert read.state == "done"
        wait_for(engine, lambda read=read: read.quiesced)
    assert (local.array == OLD).all()  # what came, came from the region


def test_expired_lease_refuses_the_rest_of_the_reads(
    engine: TransferEngine, own_peer: PeerProcess, kind: str
) -> None:
    own_peer.call("add_region", "pool", NBYTES, kind)
    _, token = own_peer.call("grant", "pool", 0, NBYTES, ttl_s=0.2)
    local = engine.allocate(NBYTES, "sink")
    remote = engine.connect(own_peer.address).regions["pool"]

    def read_until_refused() -> None:
        while True:
            engine.read(local, remote, 0, 0, NBYTES, lease=token).wait(TIMEOUT_S)

    with pytest.raises(LeaseError):
        read_until_refused()


def test_reads_take_the_direct_way_where_there_is_one(
    engine: TransferEngine, own_peer: PeerProcess, transport: str, kind: str
) -> None:
    if transport == "faulty":
        pytest.skip("which way it goes is its wrapped transport's business")
    own_peer.call("add_region", "pool", NBYTES, kind)
    local = engine.allocate(NBYTES, "sink")
    peer = engine.connect(own_peer.address)
    engine.read(local, peer.regions["pool"], 0, 0, NBYTES).wait(TIMEOUT_S)
    engine.notify(peer, b"behind it").wait(TIMEOUT_S)  # the owner has heard of its end
    assert own_peer.call("stats")["transport"][transport]["bytes_served"] == NBYTES
    direct = transport == "cma" or (transport == "shm" and kind == "allocated")
    assert ("1 of its by us" in engine.explain(peer)) == direct


def test_memory_that_was_a_source_of_writes_is_read_like_any_other(
    way: Way, own_peer: PeerProcess, kind: str
) -> None:
    """Its words once came after it: a read granted in between took a region that is there for gone."""
    own_peer.call("add_region", "pool", NBYTES, kind)
    own_peer.call("fill", "pool", OLD)
    for _ in range(5):  # of connections: what is shown is shown once
        with way.engine("driver", SECRET) as engine:
            local = engine.allocate(NBYTES, "kv")
            peer = engine.connect(own_peer.address)
            own_peer.call("write_back", "pool", "kv", 0, 100)
            engine.read(local, peer.regions["pool"], 0, 0, NBYTES).wait(TIMEOUT_S)
            assert (local.array == OLD).all()


def test_memory_that_is_not_shared_is_read_through_its_owner(
    engine: TransferEngine, own_peer: PeerProcess, transport: str
) -> None:
    own_peer.call("add_region", "pool", NBYTES, "private")
    own_peer.call("fill", "pool", OLD)
    local = engine.register(np.zeros(NBYTES, np.uint8), "sink", share="never")
    peer = engine.connect(own_peer.address)
    engine.read(local, peer.regions["pool"], 0, 0, NBYTES).wait(TIMEOUT_S)
    assert (local.array == OLD).all()
    engine.write(local, peer.regions["pool"], 0, 0, NBYTES).wait(TIMEOUT_S)
    if transport in ("shm", "cma"):
        assert "0 of our regions by the peer, 0 of its by us" in engine.explain(peer)
