# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Requests of block ids, and requests that wait for something else first."""

from __future__ import annotations

import ctypes
import threading
from typing import Any

import numpy as np
import pytest
from transfer_peers import SECRET, TIMEOUT_S, PeerProcess, wait_for

from kvxfer import BlockView, Signal
from kvxfer.errors import (
    InvalidArgumentError,
    TransferCancelledError,
    TransferTimeoutError,
    UnavailableError,
)
from kvxfer.transfer import TransferEngine

Pair = tuple[TransferEngine, TransferEngine]

LAYERS, BLOCKS, NBYTES = 3, 64, 256
# Here all blocks of a layer, there all layers of a block.
BY_LAYER = BlockView(0, NBYTES, NBYTES, LAYERS, BLOCKS * NBYTES)
BY_BLOCK = BlockView(0, LAYERS * NBYTES, NBYTES, LAYERS, NBYTES)
TOTAL = LAYERS * BLOCKS * NBYTES


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_blocks_land_where_the_views_say(
    engine: TransferEngine, shared_peer: PeerProcess, kind: str, dtype: Any
) -> None:
    shared_peer.call("add_region", "pool", TOTAL, kind)
    data = np.random.default_rng(3).integers(0, 256, TOTAL, dtype=np.uint8)
    if kind == "allocated":
        local = engine.allocate(TOTAL, "mine")
        local.array[:] = data
    else:
        local = engine.register(data.copy(), "mine")
    remote = engine.connect(shared_peer.address).regions["pool"]
    here, there = np.array([5, 6, 7, 0, 63], dtype), np.array([1, 2, 3, 60, 9], np.int64)
    xfer = engine.write_blocks(local, remote, BY_LAYER, BY_BLOCK, here, there)
    xfer.wait(TIMEOUT_S)
    expected = np.zeros((BLOCKS, LAYERS, NBYTES), np.uint8)
    expected[there] = data.reshape(LAYERS, BLOCKS, NBYTES)[:, here].swapaxes(0, 1)
    assert shared_peer.call("bytes_of", "pool") == expected.tobytes()
    assert xfer.nbytes_done == LAYERS * 5 * NBYTES

    local.array[:] = 0
    engine.read_blocks(local, remote, BY_LAYER, BY_BLOCK, here, there).wait(TIMEOUT_S)
    back = np.zeros((LAYERS, BLOCKS, NBYTES), np.uint8)
    back[:, here] = expected[there].swapaxes(0, 1)
    assert local.array.tobytes() == back.tobytes()
    shared_peer.call("drop_region", "pool")


def test_neighbours_become_one_span(pair: Pair) -> None:
    a, b = pair
    local, _ = a.allocate(TOTAL, "kv"), b.allocate(TOTAL, "kv")
    remote = a.connect(b.address).regions["kv"]
    ids = np.arange(10, 20, dtype=np.int32)
    a.write_blocks(local, remote, BY_BLOCK, BY_BLOCK, ids, ids).wait(TIMEOUT_S)
    assert a.stats()["spans"] == {"given": 10 * LAYERS, "posted": 1}


def ids(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


BAD_BLOCKS: list[tuple[str, dict[str, Any], str]] = [
    ("negative", {"remote_blocks": ids(0, -1)}, r"remote_blocks\[1\] = -1 is negative"),
    ("too far", {"local_blocks": ids(0, 64)}, r"local_blocks\[1\] = 64.*largest.* 63"),
    ("twice", {"remote_blocks": ids(7, 7)}, r"\[0\] and remote_blocks\[1\] are both block 7"),
    ("lengths", {"remote_blocks": ids(1, 2, 3)}, "3 entries, but local_blocks has 2"),
    ("views", {"remote_view": BlockView(0, NBYTES, NBYTES)}, "num_layers 1.*num_layers 3"),
    ("view past the end", {"local_view": BlockView(TOTAL, 1, NBYTES, 3)}, "past the end"),
    ("dtype", {"local_blocks": np.array([0, 1], np.uint32)}, "int32 or int64.*dtype uint32"),
    ("list", {"local_blocks": [0, 1]}, "not list"),
    ("int", {"local_blocks": 0}, "not int"),
    ("matrix", {"local_blocks": np.zeros((2, 1), np.int64)}, "one-dimensional"),
    ("strided", {"local_blocks": np.zeros(4, np.int32)[::2]}, "strided"),
    ("after", {"after": 5}, "Transfer or a kvxfer.Signal, not int"),
]


@pytest.mark.parametrize(
    ("change", "message"), [c[1:] for c in BAD_BLOCKS], ids=[c[0] for c in BAD_BLOCKS]
)
def test_bad_block_requests_are_refused_at_the_call(
    pair: Pair, change: dict[str, Any], message: str
) -> None:
    a, b = pair
    local, _ = a.allocate(TOTAL, "kv"), b.allocate(TOTAL, "kv")
    remote = a.connect(b.address).regions["kv"]
    arguments: dict[str, Any] = {
        "local_view": BY_LAYER,
        "remote_view": BY_BLOCK,
        "local_blocks": ids(0, 1),
        "remote_blocks": ids(2, 3),
    }
    a.write_blocks(local, remote, **arguments).wait(TIMEOUT_S)
    with pytest.raises(InvalidArgumentError, match=message):
        a.write_blocks(local, remote, **(arguments | change))
    assert a.stats()["transfers"]["done"] == 1
    assert a.stats()["transfers"]["in_flight"] == 0


def test_views_are_frozen_values() -> None:
    view = BlockView(1, 2, 3, num_layers=4, layer_stride=5)
    assert view == BlockView(base=1, block_stride=2, nbytes=3, num_layers=4, layer_stride=5)
    assert hash(view) == hash(BlockView(1, 2, 3, 4, 5))
    assert view != BlockView(1, 2, 3)
    assert view != "view"
    assert "layer_stride=5" in repr(view)
    with pytest.raises(AttributeError):
        view.base = 7  # type: ignore[misc]
    for bad in ((-1, 2, 3), (0, -2, 3), (0, 2, 0), (0, 2, 3, 0), (0, 2, 3, 1, -1), (1 << 62, 0, 1)):
        with pytest.raises(InvalidArgumentError, match="BlockView"):
            BlockView(*bad)


# ---------------------------------------------------------------------- after=


def held_write(pair: Pair, after: Any, **how: Any) -> tuple[Any, np.ndarray, np.ndarray]:
    a, b = pair
    source = np.zeros(4096, np.uint8)
    local, target = a.register(source, "kv"), b.allocate(4096, "kv")
    remote = a.connect(b.address).regions["kv"]
    return a.write(local, remote, 0, 0, 4096, after=after, **how), source, target.array


def test_source_is_not_read_before_the_signal(pair: Pair) -> None:
    signal = Signal()
    xfer, source, target = held_write(pair, signal)
    assert xfer.state == "held"
    assert not xfer.done
    # Others pass it.
    a, _ = pair
    a.notify(xfer.peer, b"passes").wait(TIMEOUT_S)
    assert xfer.state == "held"
    assert not target.any()
    source[:] = 7  # what it must see
    assert not signal.is_set
    threading.Thread(target=signal.set).start()
    xfer.wait(TIMEOUT_S)
    assert (target == 7).all()
    assert signal.is_set
    signal.set()
    a.notify(xfer.peer, b"x", after=signal).wait(TIMEOUT_S)  # set already: at once


def test_a_c_callback_sets_the_signal(pair: Pair) -> None:
    signal = Signal()
    xfer, source, target = held_write(pair, signal)
    function, context = signal.host_callback()
    del signal  # the pair keeps it
    source[:] = 9
    ctypes.CFUNCTYPE(None, ctypes.c_void_p)(function)(context)
    xfer.wait(TIMEOUT_S)
    assert (target == 9).all()


def test_transfers_follow_each_other(pair: Pair) -> None:
    a, b = pair
    size = 1 << 20
    local, _ = a.allocate(size, "chain"), b.allocate(size, "chain")
    remote = a.connect(b.address).regions["chain"]
    xfers = [a.write(local, remote, 0, 0, size)]
    for _ in range(5):
        xfers.append(a.write(local, remote, 0, 0, size, after=xfers[-1]))
    xfers[-1].wait(TIMEOUT_S)
    assert [x.state for x in xfers] == ["done"] * 6
    a.read(local, remote, 0, 0, size, after=xfers[0]).wait(TIMEOUT_S)  # ended long ago


def test_deadline_ends_what_is_held(pair: Pair) -> None:
    signal = Signal()
    xfer, _, target = held_write(pair, signal, deadline_s=0.05)
    with pytest.raises(TransferTimeoutError, match="deadline"):
        xfer.wait(TIMEOUT_S)
    assert (xfer.state, xfer.agreed, xfer.quiesced) == ("timed_out", True, True)
    signal.set()
    pair[0].notify(xfer.peer, b"x", after=signal).wait(TIMEOUT_S)
    assert not target.any()


def test_cancel_ends_what_is_held_and_its_followers(pair: Pair) -> None:
    a, _ = pair
    signal = Signal()
    xfer, _, target = held_write(pair, signal)
    follower = a.notify(xfer.peer, b"follower", after=xfer)
    last = a.notify(xfer.peer, b"last", after=follower)
    xfer.cancel()
    assert xfer.state == "cancelled"
    for each in (follower, last):
        with pytest.raises(TransferCancelledError, match="what it waited for failed"):
            each.wait(TIMEOUT_S)
    with pytest.raises(TransferCancelledError, match="failed"):
        a.notify(xfer.peer, b"late", after=xfer).wait(TIMEOUT_S)
    signal.set()
    assert not target.any()
    assert a.stats()["transfers"]["in_flight"] == 0


def test_close_ends_what_is_held(pair: Pair) -> None:
    signal = Signal()
    xfer, _, _ = held_write(pair, signal)
    pair[0].close()
    assert xfer.state == "cancelled"
    signal.set()


def test_peer_death_ends_what_is_held(engine: TransferEngine, own_peer: PeerProcess) -> None:
    signal = Signal()
    xfer = engine.notify(engine.connect(own_peer.address), b"x", after=signal)
    own_peer.kill()
    wait_for(engine, lambda: xfer.done)
    assert xfer.state == "failed"
    signal.set()


def test_cuda_events_are_refused_with_the_way_to_do_it(pair: Pair) -> None:
    class FakeEvent:
        cuda_event = 1

    with pytest.raises(UnavailableError, match="host_callback"):
        held_write(pair, FakeEvent())


def test_signals_set_while_transfers_are_submitted_lose_none() -> None:
    with (
        TransferEngine("a", transports=("tcp",), secret=SECRET) as a,
        TransferEngine("b", transports=("tcp",), secret=SECRET) as b,
    ):
        peer = a.connect(b.address)
        for _ in range(200):
            signal = Signal()
            thread = threading.Thread(target=signal.set)
            thread.start()
            xfers = [a.notify(peer, b"x", after=signal) for _ in range(3)]
            thread.join(TIMEOUT_S)
            for xfer in xfers:
                xfer.wait(TIMEOUT_S)
            b.notifications()
