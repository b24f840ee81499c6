# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""The promises in milliseconds: deadlines and deaths. Medians, since machines that run tests are shared."""

from __future__ import annotations

import os
import select
import statistics
import threading
import time
from collections.abc import Callable

import pytest
from transfer_peers import TIMEOUT_S, PeerProcess, wait_for

from kvxfer.errors import PeerDisconnectedError, TransferTimeoutError
from kvxfer.testing.faults import Way, ways
from kvxfer.transfer import TransferEngine

NBYTES = 8 << 20
PLAIN = [way for way in ways() if way.transport != "faulty" and way.reason is None]


@pytest.fixture(scope="module", params=PLAIN, ids=lambda way: way.name)
def way(request: pytest.FixtureRequest) -> Way:
    """Without injected faults: those are late on purpose."""
    assert isinstance(request.param, Way)
    return request.param


def test_deadlines_are_kept_within_50_ms_against_a_stopped_peer(
    engine: TransferEngine, own_peer: PeerProcess, record_property: Callable[[str, object], None]
) -> None:
    own_peer.call("add_region", "kv", NBYTES, "allocated")
    local = engine.allocate(NBYTES, "kv")
    peer = engine.connect(own_peer.address)
    remote = peer.regions["kv"]
    own_peer.stop()
    submit = {
        "write": lambda s: engine.write(local, remote, 0, 0, NBYTES, deadline_s=s),
        "read": lambda s: engine.read(local, remote, 0, 0, NBYTES, deadline_s=s),
    }
    late: dict[str, list[float]] = {name: [] for name in submit}
    for round_ in range(9):
        for name, start in submit.items():
            deadline_s = 0.01 * (1 + round_ % 3)
            began = time.monotonic()
            xfer = start(deadline_s)
            with pytest.raises(TransferTimeoutError):
                xfer.wait(TIMEOUT_S)
            late[name].append(time.monotonic() - began - deadline_s)
            wait_for(engine, lambda xfer=xfer: xfer.quiesced)
    for name, seconds in late.items():
        median = statistics.median(seconds)
        record_property(f"{name}_late_ms", median * 1e3)
        assert min(seconds) >= 0, name
        assert median < 0.050, (name, seconds)


def _kill(engine: TransferEngine, way: Way, round_: int) -> float:
    """Seconds from the end of a peer's teardown to the end of a transfer to it.

    A pidfd is readable when the last thread has gone, after its memory and its descriptors; who hears
    of those has a negative number.
    """
    process = PeerProcess("victim", way)
    process.call("add_region", "kv", NBYTES, "allocated")
    peer = engine.connect(process.address)
    local = engine.allocate(NBYTES, f"kv{round_}")
    gone: list[float] = []
    watch = os.pidfd_open(process.pid)

    def observe() -> None:
        if select.select([watch], [], [], TIMEOUT_S)[0]:
            gone.append(time.monotonic())

    observer = threading.Thread(target=observe)
    observer.start()
    process.stop()  # so that the transfer is open for certain
    xfer = engine.write(local, peer.regions["kv"], 0, 0, NBYTES)
    os.kill(process.pid, 9)
    with pytest.raises(PeerDisconnectedError):
        xfer.wait(TIMEOUT_S)
    told = time.monotonic()
    observer.join(TIMEOUT_S)
    os.close(watch)
    process.kill()
    assert len(gone) == 1
    return told - gone[0]


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="needs os.pidfd_open")
def test_death_is_reported_within_100_ms_of_the_end_of_teardown(
    engine: TransferEngine, way: Way, record_property: Callable[[str, object], None]
) -> None:
    seconds = [_kill(engine, way, round_) for round_ in range(5)]
    median = statistics.median(seconds)
    record_property("death_ms", median * 1e3)
    assert median < 0.100, seconds
