# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Counts that could be driven up without end have one; it is named, and below it all still works."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from transfer_peers import SECRET, TIMEOUT_S, PeerProcess, wait_for

from kvxfer.errors import BackPressureError, RegistrationError, RemoteAccessError
from kvxfer.testing.faults import Way
from kvxfer.transfer import EngineConfig, Signal, TransferEngine

MAX_PENDING = 40
MAX_REGIONS = 4096
MAX_SPANS = 1000
MAX_TAGS = 65536
NONE = np.array([], np.int64)


def test_regions_of_an_engine(pair: tuple[TransferEngine, TransferEngine]) -> None:
    a, b = pair
    memory = np.zeros(MAX_REGIONS + 1, np.uint8)
    regions = [b.register(memory[i : i + 1], f"kv{i}") for i in range(MAX_REGIONS)]
    with pytest.raises(RegistrationError, match=f"{MAX_REGIONS} regions; deregister some"):
        b.register(memory[MAX_REGIONS:], "one more")
    peer = a.connect(b.address)
    assert len(peer.regions) == MAX_REGIONS
    local = a.register(np.array([7], np.uint8), "local")
    a.write(local, peer.regions[f"kv{MAX_REGIONS - 1}"], 0, 0, 1).wait(TIMEOUT_S)
    assert memory[MAX_REGIONS - 1] == 7
    b.deregister(regions[0])
    b.register(memory[MAX_REGIONS:], "one more")


def test_tags_of_a_peer(pair: tuple[TransferEngine, TransferEngine]) -> None:
    a, b = pair
    local = a.register(np.ones(1, np.uint8), "local")
    b.register(np.zeros(1, np.uint8), "kv")
    remote = a.connect(b.address).regions["kv"]

    def mark(tags: range) -> None:
        for xfer in [a.write(local, remote, NONE, NONE, 1, arrival=tag) for tag in tags]:
            xfer.wait(TIMEOUT_S)

    for first in range(0, MAX_TAGS, 4096):
        mark(range(first, first + 4096))
    with pytest.raises(RemoteAccessError, match="too many different arrival tags"):
        mark(range(MAX_TAGS, MAX_TAGS + 1))
    mark(range(1))  # one that is known
    peer = next(event.peer for event in b.peer_events())
    assert b.arrivals(0, peer) == 2
    assert b.arrivals(MAX_TAGS - 1, peer) == 1
    assert b.arrivals(MAX_TAGS, peer) == 0


def few_pending(name: str) -> TransferEngine:
    config = EngineConfig(max_pending=MAX_PENDING, max_pending_spans=MAX_SPANS)
    return TransferEngine(name, transports=("tcp",), secret=SECRET, config=config)


def test_transfers_that_wait_for_something(pair: tuple[TransferEngine, TransferEngine]) -> None:
    _, b = pair
    b.register(np.zeros(8, np.uint8), "kv")
    with few_pending("few") as a:
        local = a.register(np.ones(8, np.uint8), "local")
        peer = a.connect(b.address)
        remote = peer.regions["kv"]
        go = Signal()
        held = [a.write(local, remote, 0, 0, 8, after=go) for _ in range(MAX_PENDING - 1)]
        held.append(a.notify(peer, b"x", after=go))
        for one_more in (
            lambda: a.write(local, remote, 0, 0, 8),
            lambda: a.read(local, remote, 0, 0, 8, notify=b"y"),
            lambda: a.notify(peer, b"y"),
        ):
            with pytest.raises(BackPressureError, match=f"'b' has {MAX_PENDING} transfers") as info:
                one_more()
            assert info.value.peer == "b"
        held[0].cancel()
        a.read(local, remote, 0, 0, 8, notify=b"z").wait(TIMEOUT_S)  # two inside, one of them ours
        a.write(local, remote, 0, 0, 8, after=go)
        with pytest.raises(BackPressureError, match="wait for some of them"):
            a.write(local, remote, 0, 0, 8)
        go.set()
        for xfer in held[1:]:
            xfer.wait(TIMEOUT_S)
        for _ in range(3 * MAX_PENDING):
            a.write(local, remote, 0, 0, 8).wait(TIMEOUT_S)
        a.deregister(local)  # a refused one left no use of it behind


def test_spans_of_transfers_that_wait_for_something(
    pair: tuple[TransferEngine, TransferEngine],
) -> None:
    _, b = pair
    b.register(np.zeros(1, np.uint8), "kv")
    with few_pending("few") as a:
        local = a.register(np.zeros(4 * MAX_SPANS, np.uint8), "local")
        remote = a.connect(b.address).regions["kv"]
        apart = np.arange(0, 4 * MAX_SPANS, 2, dtype=np.int64)
        alone = a.read(local, remote, apart, 0, 1)  # more than all together may have
        alone.wait(TIMEOUT_S)
        go = Signal()
        held = [a.read(local, remote, apart[: MAX_SPANS // 2], 0, 1, after=go) for _ in range(2)]
        with pytest.raises(BackPressureError, match=f"2 transfers of ours, with {MAX_SPANS} spans"):
            a.read(local, remote, 0, 0, 1)
        a.notify(remote.peer, b"none").wait(TIMEOUT_S)
        held[0].cancel()
        a.read(local, remote, 0, 0, 1).wait(TIMEOUT_S)
        go.set()
        held[1].wait(TIMEOUT_S)


def test_threads_that_submit_at_once_do_not_pass_a_limit_together(
    pair: tuple[TransferEngine, TransferEngine],
) -> None:
    _, b = pair
    with few_pending("few") as a:
        peer = a.connect(b.address)
        go = Signal()
        barrier = threading.Barrier(8)
        refused = []

        def submit() -> int:
            barrier.wait(TIMEOUT_S)
            taken = 0
            for _ in range(MAX_PENDING):
                try:
                    a.notify(peer, b"x", after=go)
                    taken += 1
                except BackPressureError as error:
                    refused.append(error)
            return taken

        with ThreadPoolExecutor(8) as pool:
            each = list(pool.map(lambda _: submit(), range(8)))
        assert sum(each) == MAX_PENDING
        assert len(refused) == 7 * MAX_PENDING


def test_what_a_stopped_peer_does_not_take(own_peer: PeerProcess, way: Way) -> None:
    with way.engine("driver", SECRET, max_pending=MAX_PENDING) as engine:
        own_peer.call("add_region", "kv", 1 << 20, "allocated")
        local = engine.allocate(1 << 20, "kv")
        remote = engine.connect(own_peer.address).regions["kv"]
        own_peer.stop()
        xfers = [engine.write(local, remote, 0, 0, 1 << 20) for _ in range(MAX_PENDING)]
        with pytest.raises(BackPressureError, match=f"'victim' has {MAX_PENDING} transfers"):
            engine.write(local, remote, 0, 0, 1)
        for xfer in xfers:
            xfer.cancel()
        own_peer.resume()
        for xfer in xfers:
            wait_for(engine, lambda xfer=xfer: xfer.quiesced)
        engine.write(local, remote, 0, 0, 1 << 20).wait(TIMEOUT_S)
