# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""wait, await, the eventfd, and what happens when nothing comes."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from transfer_peers import TIMEOUT_S, PeerProcess, wait_for

from kvxfer.errors import KvxferError, LeaseError, PeerDisconnectedError, TransferTimeoutError
from kvxfer.transfer import Transfer, TransferEngine

Pair = tuple[TransferEngine, TransferEngine]


def test_await_gives_the_end_or_raises_it(pair: Pair) -> None:
    a, b = pair
    local, _ = a.allocate(1 << 20, "kv"), b.allocate(1 << 20, "kv")
    peer = a.connect(b.address)
    remote = peer.regions["kv"]

    async def main() -> None:
        await a.write(local, remote, 0, 0, 1 << 20)
        many = [a.write(local, remote, i * 1000, i * 1000, 1000) for i in range(500)]
        await asyncio.gather(*(_await(xfer) for xfer in many))
        assert all(xfer.state == "done" for xfer in many)
        lease = b.grant(b_region, 0, 10, ttl_s=60)
        lease.revoke(TIMEOUT_S)
        with pytest.raises(LeaseError):
            await a.write(local, remote, 0, 0, 10, lease=lease.token)

    b_region = b.allocate(100, "leased")
    remote_leased = wait_for(a, lambda: peer.regions.get("leased") or a.notify(peer, b"").wait(5))
    assert remote_leased.nbytes == 100
    asyncio.run(main())
    asyncio.run(asyncio.wait_for(_await(a.notify(peer, b"second loop")), TIMEOUT_S))


async def _await(xfer: object) -> None:
    await xfer  # type: ignore[misc]


def test_await_can_be_given_up(pair: Pair) -> None:
    a, b = pair
    peer = a.connect(b.address)
    for _ in range(256):  # use up the window of notifications: the next one waits
        a.notify(peer, b"").wait(TIMEOUT_S)

    async def main() -> None:
        xfer = a.notify(peer, b"waits")
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(_await(xfer), 0.05)
        assert not xfer.done
        b.notifications()
        await xfer

    asyncio.run(main())


def test_wait_times_out_without_ending_the_transfer(pair: Pair) -> None:
    a, b = pair
    peer = a.connect(b.address)
    for _ in range(256):
        a.notify(peer, b"").wait(TIMEOUT_S)
    xfer = a.notify(peer, b"waits")
    with pytest.raises(TransferTimeoutError, match="still queued"):
        xfer.wait(0.02)
    assert not xfer.done
    b.notifications()
    xfer.wait(TIMEOUT_S)


def test_eventfd_wakes_for_each_kind_of_news(pair: Pair) -> None:
    a, b = pair
    region = b.allocate(100, "kv")
    local = a.allocate(100, "kv")
    peer = a.connect(b.address)
    assert wait_for(b, b.peer_events)[0].kind == "connected"
    a.notify(peer, b"x")
    assert wait_for(b, b.notifications)[0].payload == b"x"
    lease = b.grant(region, 0, 100, ttl_s=60, num_arrivals=1)
    xfer = a.write(local, peer.regions["kv"], 0, 0, 100, lease=lease.token, arrival=0)
    wait_for(b, lambda: lease.num_arrived == 1)
    wait_for(a, lambda: xfer.done)
    lease.begin_revoke()
    wait_for(b, lambda: lease.quiet)
    a.close()
    assert wait_for(b, b.peer_events)[0].kind == "lost"


def test_waiting_for_arrivals_ends_with_the_peer_or_the_lease(pair: Pair) -> None:
    a, b = pair
    region = b.allocate(100, "kv")
    a.connect(b.address)
    peer = wait_for(b, b.peer_events)[0].peer
    with pytest.raises(TransferTimeoutError, match="0 of 1"):
        b.wait_arrivals(3, peer, 1, 0.02)
    lease = b.grant(region, 0, 100, ttl_s=60, num_arrivals=5)
    with pytest.raises(TransferTimeoutError, match=r"2 of 2.*first is 1"):
        lease.wait_arrived(np.array([1, 4], np.int64), 0.02)
    seen: list[type[BaseException]] = []

    def wait(call: object, *args: object) -> None:
        try:
            call(*args)  # type: ignore[operator]
        except KvxferError as error:
            seen.append(type(error))

    threads = [
        threading.Thread(target=wait, args=(b.wait_arrivals, 3, peer, 1, TIMEOUT_S)),
        threading.Thread(target=wait, args=(lease.wait_arrived, 1, TIMEOUT_S)),
    ]
    for thread in threads:
        thread.start()
    lease.revoke(TIMEOUT_S)
    a.close()
    for thread in threads:
        thread.join(TIMEOUT_S)
    assert sorted(seen, key=str) == [LeaseError, PeerDisconnectedError]


def test_extended_lease_outlives_its_first_ttl(pair: Pair) -> None:
    _, b = pair
    region = b.allocate(100, "kv")
    short, long = b.grant(region, 0, 10, ttl_s=0.1), b.grant(region, 0, 10, ttl_s=0.1)
    long.extend(60)
    wait_for(b, lambda: short.quiet)
    assert short.expired
    assert not long.closed
    with pytest.raises(LeaseError, match="expired"):
        short.extend(1)


_INTERRUPTED = """
import os, signal, sys, threading
from kvxfer.transfer import Transfer, TransferEngine
a, b = TransferEngine("a"), TransferEngine("b")
peer = a.connect(b.address)
for _ in range(256):
    a.notify(peer, b"").wait(20)
try:
    print("waiting", flush=True)
    a.notify(peer, b"").wait()
except KeyboardInterrupt:
    print("interrupted", flush=True)
a.close()
"""


def test_a_signal_that_another_thread_took_is_handled_during_a_wait(pair: Pair) -> None:
    """It wakes nobody here, just as one that comes right before the system call: Ctrl-C was lost until the deadline."""

    class Heard(Exception):
        pass

    def handler(*_: object) -> None:
        raise Heard

    a, _ = pair
    lease = a.grant(a.allocate(100, "kv"), 0, 100, ttl_s=60, num_arrivals=1)
    before = signal.signal(signal.SIGUSR1, handler)
    taker = threading.Timer(0.3, lambda: signal.pthread_kill(threading.get_ident(), signal.SIGUSR1))
    try:
        taker.start()
        began = time.monotonic()
        with pytest.raises(Heard):
            lease.wait_arrived([0], timeout_s=TIMEOUT_S)
        assert time.monotonic() - began < TIMEOUT_S / 2
    finally:
        taker.join()
        signal.signal(signal.SIGUSR1, before)


def test_ctrl_c_interrupts_a_wait() -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", _INTERRUPTED], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "waiting\n"
    child.send_signal(signal.SIGINT)
    out, _ = child.communicate(timeout=TIMEOUT_S)
    assert out == "interrupted\n"
    assert child.returncode == 0


_NEVER_CLOSED = """
from kvxfer.transfer import Transfer, TransferEngine
a, b = TransferEngine("a"), TransferEngine("b")
region = a.allocate(1 << 24, "kv"); b.allocate(1 << 24, "kv")
peer = a.connect(b.address)
xfers = [a.write(region, peer.regions["kv"], 0, 0, 1 << 24) for _ in range(5)]
"""


def test_interpreter_exit_with_open_engines_returns() -> None:
    done = subprocess.run([sys.executable, "-c", _NEVER_CLOSED], timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0


def test_many_threads_share_one_engine(pair: Pair) -> None:
    a, b = pair
    local, _ = a.allocate(1 << 20, "kv"), b.allocate(1 << 20, "kv")
    remote = a.connect(b.address).regions["kv"]
    failures: list[BaseException] = []

    def run(index: int) -> None:
        try:
            for k in range(50):
                offset = (index * 50 + k) * 1024
                a.write(local, remote, offset, offset, 1024, notify=b"x").wait(TIMEOUT_S)
                b.notifications()
        except KvxferError as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S)
        assert not thread.is_alive()
    assert failures == []
    assert a.stats()["transfers"] == {
        "done": 400,
        "failed": 0,
        "timed_out": 0,
        "cancelled": 0,
        "in_flight": 0,
        "unquiesced": 0,
    }


def test_many_threads_submit_more_than_may_be_in_flight(
    engine: TransferEngine, shared_peer: PeerProcess
) -> None:
    """4,000 at once, half with a message: 1,024 requests and 256 messages may be under way."""
    num_threads, each, size = 8, 500, 256
    shared_peer.call("add_region", "crowded", num_threads * each * size, "allocated")
    local = engine.allocate(num_threads * each * size, "kv")
    local.array[:] = np.random.default_rng(2).integers(0, 256, local.nbytes, np.uint8)
    remote = engine.connect(shared_peer.address).regions["crowded"]
    xfers: list[Transfer] = []

    def run(index: int) -> None:
        for k in range(index * each, (index + 1) * each):
            notify = b"%d" % k if k % 2 else None
            xfers.append(engine.write(local, remote, k * size, k * size, size, notify=notify))

    threads = [threading.Thread(target=run, args=(i,)) for i in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S)
        assert not thread.is_alive()  # nobody waited for room
    assert not all(xfer.done for xfer in xfers)  # the messages' window is full: nobody drains yet
    got = shared_peer.call("notifications", num_threads * each // 2)
    for xfer in xfers:
        xfer.wait(TIMEOUT_S)
    assert sorted(int(payload) for _, payload in got) == list(range(1, num_threads * each, 2))
    assert shared_peer.call("bytes_of", "crowded") == local.array.tobytes()
    shared_peer.call("drop_region", "crowded")


def test_deadline_is_kept_although_the_pipe_is_full(own_tcp_peer: PeerProcess) -> None:
    with TransferEngine("a", transports=("tcp",), secret=b"a secret for tests") as a:
        own_tcp_peer.call("add_region", "kv", 1 << 20, "allocated")
        local = a.allocate(1 << 20, "kv")
        peer = a.connect(own_tcp_peer.address)
        own_tcp_peer.stop()
        slow = [a.write(local, peer.regions["kv"], 0, 0, 1 << 20, deadline_s=60) for _ in range(50)]
        quick = a.write(local, peer.regions["kv"], 0, 0, 10, deadline_s=0.1)
        with pytest.raises(TransferTimeoutError):
            quick.wait(TIMEOUT_S)
        own_tcp_peer.resume()
        for xfer in slow:
            xfer.wait(TIMEOUT_S)


@pytest.fixture
def own_tcp_peer() -> object:
    peer = PeerProcess("victim", ("tcp",), b"a secret for tests")
    yield peer
    peer.close()
