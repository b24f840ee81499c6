# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""What a caller may get wrong is refused by name and value, and never prints a secret."""

from __future__ import annotations

import asyncio
import mmap
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from transfer_peers import SECRET, TIMEOUT_S

from kvxfer.errors import InvalidArgumentError, LeaseError, TransferTimeoutError
from kvxfer.transfer import BlockView, Peer, Signal, TransferEngine

Pair = tuple[TransferEngine, TransferEngine]


@pytest.fixture
def peer(pair: Pair) -> Peer:
    a, b = pair
    b.allocate(4096, "there")
    return a.connect(b.address)


@pytest.mark.parametrize(
    "call",
    [
        lambda a, p: a.explain(p),
        lambda a, p: a.notify(p, b"x"),
        lambda a, p: a.arrivals(1, p),
        lambda a, p: a.wait_arrivals(1, p, 1, 0),
    ],
    ids=["explain", "notify", "arrivals", "wait_arrivals"],
)
def test_what_is_no_peer_of_this_engine_is_refused(
    pair: Pair, peer: Peer, call: Callable[[TransferEngine, Any], object]
) -> None:
    a, b = pair
    with pytest.raises(InvalidArgumentError, match=r"must be a Peer.* not NoneType"):
        call(a, None)
    with pytest.raises(InvalidArgumentError, match="not a peer of this engine"):
        call(b, peer)


def test_a_lease_for_oneself_is_refused(pair: Pair, peer: Peer) -> None:
    b = pair[1]
    with pytest.raises(InvalidArgumentError, match="this engine itself"):
        b.grant(b.allocate(64), 0, 64, ttl_s=5, peer=peer)


@pytest.mark.parametrize(
    ("call", "shown"),
    [
        (lambda a, s, r: a.allocate(-1), "nbytes=-1"),
        (lambda a, s, r: a.allocate(64, name=5), "name=5"),
        (lambda a, s, r: a.connect(123), "address=123"),
        (lambda a, s, r: a.write(s, r, 0, 0, 8, arrival=-1), "arrival=-1"),
        (lambda a, s, r: a.read(s, r, 0, 0, 8, arrival=2**64), f"arrival={2**64}"),
        (lambda a, s, r: a.write_blocks(s, r, None, None, [0], [0]), "local_view=None"),
        (lambda a, s, r: a.grant(s, 0, 8, ttl_s="x"), "ttl_s must be a number of seconds, not"),
        (
            lambda a, s, r: a.write(s, r, 0, 0, 8, notify="text"),
            "notify must be bytes, not str",
        ),
        (lambda a, s, r: a.notify(r.peer, 5), "payload must be bytes, not int"),
        (lambda a, s, r: a.arrivals("tag", r.peer), "tag must be an int from 0 to 2^64 - 1, not"),
    ],
)
def test_an_argument_of_another_type_is_refused_with_its_value(
    pair: Pair, peer: Peer, call: Callable[..., object], shown: str
) -> None:
    a = pair[0]
    region = a.allocate(64)
    with pytest.raises(InvalidArgumentError) as refused:
        call(a, region, peer.regions["there"])
    assert shown in str(refused.value)
    assert "incompatible function" not in str(refused.value)


def test_a_refusal_names_the_argument_alone(pair: Pair, peer: Peer) -> None:
    a = pair[0]
    with pytest.raises(InvalidArgumentError) as refused:
        a.write(a.allocate(64), peer.regions["there"], 0, 0, 8, arrival=-1)
    assert (
        str(refused.value)
        == "write(): arrival must be an int from 0 to 2^64 - 1, or None, not arrival=-1"
    )


def test_names_that_nobody_gave_avoid_those_that_somebody_did(pair: Pair) -> None:
    a = pair[0]
    a.allocate(64, "region-1")
    a.allocate(64, "region-2")
    names = [a.allocate(64).name for _ in range(3)]
    assert len(set(names) | {"region-1", "region-2"}) == 5


def test_a_region_that_a_peer_does_not_have_is_a_key_error_that_says_why(
    pair: Pair, peer: Peer
) -> None:
    with pytest.raises(KeyError, match="no region 'their': peer 'b' has 'there'"):
        peer.regions["their"]
    assert isinstance(peer.regions, dict)
    assert peer.regions.get("their") is None
    pair[1].close()
    deadline = time.monotonic() + TIMEOUT_S
    while peer.alive and time.monotonic() < deadline:
        time.sleep(0.01)
    with pytest.raises(KeyError, match=r"peer 'b' is lost \(.+\), its regions with it"):
        peer.regions["there"]


def test_numpy_scalars_are_ints(pair: Pair, peer: Peer) -> None:
    a, b = pair
    region, eight = a.allocate(np.int64(64)), np.int64(8)
    a.write(region, peer.regions["there"], eight, np.int64(0), eight, arrival=np.int64(3)).wait(
        TIMEOUT_S
    )
    assert b.arrivals(np.int64(3), b.connect(a.address)) == 1
    view = BlockView(np.int64(0), eight, np.int32(8))
    assert (view.block_stride, view.nbytes) == (8, 8)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ((0.0, 8, 8), "BlockView: base must be an int, not float"),
        ((0, "8", 8), "BlockView: block_stride must be an int, not str"),
        ((0, 8, True), "BlockView: nbytes must be an int, not bool"),
        ((0, 8, 2**70), f"BlockView: nbytes must be 1 to 2^61, not {2**70}"),
        ((-1, 8, 8), "BlockView: base must be 0 to 2^61, not -1"),
    ],
)
def test_a_block_view_refuses_in_words(fields: tuple[Any, ...], text: str) -> None:
    with pytest.raises(InvalidArgumentError) as refused:
        BlockView(*fields)
    assert str(refused.value).startswith(text)
    assert "incompatible" not in str(refused.value)


def test_a_signal_takes_nothing() -> None:
    with pytest.raises(TypeError, match=r"Signal\(\) takes no arguments"):
        Signal(5)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    "wrong", [{"listen": 8000}, {"transports": ("tcp", 1)}, {"name": 5}, {"config": {}}]
)
def test_no_refusal_prints_the_secret(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgumentError) as refused:
        TransferEngine(**{"name": "a", "secret": b"sesame-sesame"} | wrong)
    assert "sesame" not in str(refused.value)


def test_no_refusal_prints_a_token(pair: Pair, peer: Peer) -> None:
    a = pair[0]
    with pytest.raises(InvalidArgumentError) as refused:
        a.write(a.allocate(64), peer.regions["there"], 0, 0, 8, lease="token", arrival=-1)  # type: ignore[arg-type]
    assert "token" not in str(refused.value)


@pytest.mark.parametrize("secret", [16, True, [1, 2, 3], 1.5])
def test_a_secret_is_bytes_or_text(secret: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="secret must be bytes or text, not"):
        TransferEngine("a", secret=secret)


def test_references_to_objects_are_not_memory_for_peers(pair: Pair) -> None:
    with pytest.raises(InvalidArgumentError, match="references to Python objects"):
        pair[1].register(np.array([object()]))


def test_what_a_lease_does_not_allow_is_said_with_values(pair: Pair, peer: Peer) -> None:
    a, b = pair
    region, there = a.allocate(4096), peer.regions["there"]
    target = b.allocate(4096, "leased")
    while "leased" not in peer.regions:
        a.notify(peer, b"").wait(TIMEOUT_S)
    there = peer.regions["leased"]
    lease = b.grant(target, 0, 100, ttl_s=TIMEOUT_S, num_arrivals=2)
    with pytest.raises(LeaseError, match="bytes 50 to 150 of the region: not covered"):
        a.write(region, there, 0, 50, 100, lease=lease.token).wait(TIMEOUT_S)
    with pytest.raises(LeaseError, match="arrival=2 is not below the lease's num_arrivals=2"):
        a.write(region, there, 0, 0, 100, lease=lease.token, arrival=2).wait(TIMEOUT_S)


def test_the_window_of_notifications_is_named_when_it_was_the_cause(pair: Pair, peer: Peer) -> None:
    a = pair[0]
    for _ in range(256):
        a.notify(peer, b"unread").wait(TIMEOUT_S)
    with pytest.raises(TransferTimeoutError, match="256 notifications of ours are unread"):
        a.notify(peer, b"one too many", deadline_s=0.05).wait(TIMEOUT_S)


def test_event_loops_that_have_ended_keep_no_descriptor(pair: Pair, peer: Peer) -> None:
    a = pair[0]
    region = a.allocate(64)

    async def move() -> None:
        await a.write(region, peer.regions["there"], 0, 0, 8)

    asyncio.run(move())
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        asyncio.run(move())
    assert len(os.listdir("/proc/self/fd")) <= before + 2  # the collector may be late with one


def test_many_engines_may_connect_at_once() -> None:
    with TransferEngine("hub", transports=("tcp",), secret=SECRET) as hub:
        engines = [TransferEngine(f"e{i}", transports=("tcp",), secret=SECRET) for i in range(48)]
        problems: list[Exception] = []

        def connect(engine: TransferEngine) -> None:
            try:
                engine.connect(hub.address, timeout_s=TIMEOUT_S)
            except Exception as error:  # noqa: BLE001 - told by the assertion
                problems.append(error)

        threads = [threading.Thread(target=connect, args=(each,)) for each in engines]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for engine in engines:
            engine.close()
        assert not problems


DAEMON = """
import threading, time
from kvxfer.transfer import TransferEngine
a, b = (TransferEngine(n, transports=("tcp",), secret=b"s" * 16) for n in "ab")
source, target = a.allocate(65536), b.allocate(65536, "t")
there = a.connect(b.address).regions["t"]
def work():
    while True:
        {work}
for _ in range(3):
    threading.Thread(target=work, daemon=True).start()
time.sleep(0.2)
"""


@pytest.mark.parametrize(
    "work", ["a.write(source, there, 0, 0, 65536).wait(1)", "a.stats()", "a.notifications()"]
)
def test_daemon_threads_inside_the_engine_do_not_abort_the_exit(work: str) -> None:
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", DAEMON.format(work=work)],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([1.9], r"indices\[0\] must be an int, not 1.9"),
        ([0, "1"], r"indices\[1\] must be an int, not '1'"),
        ([True], r"indices\[0\] must be an int, not True"),
        ([None], "must be an int, not None"),
        ([[0], 1], "must be an int"),
        ([1 << 70], "does not fit into 64 bits"),
        ([2], "arrival index 2 is not below the lease's num_arrivals=2"),
    ],
)
def test_indices_of_arrivals_are_taken_as_they_are(
    pair: Pair, peer: Peer, indices: Any, message: str
) -> None:
    a, b = pair
    target = b.allocate(64, "indexed")
    lease = b.grant(target, 0, 64, ttl_s=TIMEOUT_S, num_arrivals=2)
    while "indexed" not in peer.regions:
        a.notify(peer, b"").wait(TIMEOUT_S)
    region = a.allocate(64)
    for index in range(2):
        a.write(region, peer.regions["indexed"], 0, 0, 8, lease=lease.token, arrival=index).wait(
            TIMEOUT_S
        )
    lease.wait_arrived([0, np.int32(1)], TIMEOUT_S)
    with pytest.raises(InvalidArgumentError, match=message):
        lease.wait_arrived(indices, TIMEOUT_S)


def test_a_time_is_a_number(pair: Pair, peer: Peer) -> None:
    xfer = pair[0].notify(peer, b"x")
    for bad in ("1", b"1", [1], object()):
        with pytest.raises(InvalidArgumentError, match="number of seconds or None, not"):
            xfer.wait(bad)  # type: ignore[arg-type]
    xfer.wait(np.float32(TIMEOUT_S))


def test_buffers_of_a_region_share_no_memory(pair: Pair) -> None:
    whole = np.zeros(100, np.uint8)
    with pytest.raises(InvalidArgumentError, match="buffers 0 and 2 share memory"):
        pair[0].register([whole[50:], np.zeros(4, np.uint8), whole[:51]])
    pair[0].register([whole[50:], whole[:50]], "neighbours")


def test_a_buffer_is_free_when_its_region_is_gone(pair: Pair) -> None:
    memory = mmap.mmap(-1, 4096)
    region = pair[0].register(memory, "mapped")
    pair[0].deregister(region)
    del region
    memory.close()  # BufferError as long as anybody holds it
    memory = mmap.mmap(-1, 4096)
    with TransferEngine("closing") as engine:
        region = engine.register(memory)
    del region
    memory.close()


def test_what_was_held_when_its_engine_closed_names_no_transport(pair: Pair) -> None:
    with TransferEngine("closing", secret=SECRET) as engine:
        peer = engine.connect(pair[1].address)
        xfer = engine.notify(peer, b"x", after=Signal())
    assert (xfer.state, xfer.transport) == ("cancelled", None)
    assert "over" not in str(xfer.error)


def test_faulty_is_no_transport_to_ask_for() -> None:
    with pytest.raises(InvalidArgumentError, match=r"kvxfer\.testing\.faults\.Way"):
        TransferEngine("a", transports=("faulty",))
