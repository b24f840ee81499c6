# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""One and two rails between two processes: on the first NICs that there are, else on software ones."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from transfer_peers import SECRET, TIMEOUT_S, PeerProcess

from kvxfer.errors import KvxferError
from kvxfer.testing import fake_verbs
from kvxfer.testing.faults import Way, ways
from kvxfer.transfer import TransferEngine

_VERBS = next((way for way in ways() if way.name == "verbs"), None)
pytestmark = pytest.mark.skipif(
    _VERBS is None or _VERBS.reason is not None,
    reason=f"{_VERBS.reason if _VERBS else 'verbs is not compiled in'}",
)
NBYTES = 1 << 20


def on_devices(count: int, *, push: bool = False) -> Way:
    """Verbs on that many NICs on each side."""
    assert _VERBS is not None
    real = fake_verbs.real_devices()
    if real and len(real) < count:
        pytest.skip(f"needs {count} RDMA devices, there is {real}")
    # The other way round over there: in one network, rails then lead from one NIC to another.
    ours, theirs = real[:count], real[:count][::-1]
    return replace(
        _VERBS,
        nic=f"devices={count}",
        verbs_devices=(",".join(ours), ",".join(theirs)) if real else None,
        verbs_push=push,
    )


@pytest.fixture
def two_rails() -> Iterator[tuple[TransferEngine, PeerProcess]]:
    way = on_devices(2)
    peer = PeerProcess("target", way)
    with way.engine("driver", SECRET) as engine:
        yield engine, peer
    peer.close()
    forget_plan()


def forget_plan() -> None:
    if not fake_verbs.real_devices():
        fake_verbs.set_plan("")


def test_two_processes_stripe_over_two_rails(two_rails: tuple[TransferEngine, PeerProcess]) -> None:
    engine, target = two_rails
    size = 8 * NBYTES
    target.call("add_region", "kv", size, "registered")
    local = engine.allocate(size, "kv")
    peer = engine.connect(target.address)
    data = np.random.default_rng(6).integers(0, 256, size, np.uint8)
    local.array[:] = data
    engine.write(local, peer.regions["kv"], 0, 0, size).wait(TIMEOUT_S)
    local.array[:] = 0
    deadline = time.monotonic() + TIMEOUT_S
    while engine.explain(peer).count("; in use") < 2:  # the second one is tried first
        assert time.monotonic() < deadline, engine.explain(peer)
        time.sleep(0.01)
    engine.read(local, peer.regions["kv"], 0, 0, size).wait(TIMEOUT_S)
    assert local.array.tobytes() == data.tobytes()
    pulled = [int(each) for each in re.findall(r"(\d+) bytes pulled", engine.explain(peer))]
    assert len(pulled) == 2
    assert sum(pulled) == size
    assert min(pulled) >= NBYTES


def test_messages_move_when_a_port_of_one_side_goes(
    two_rails: tuple[TransferEngine, PeerProcess],
) -> None:
    if fake_verbs.real_devices():
        pytest.skip("ports of NICs that are there stay up")
    engine, target = two_rails
    target.call("add_region", "kv", 8 * NBYTES, "registered")
    local = engine.allocate(8 * NBYTES, "kv")
    local.array[:] = np.random.default_rng(9).integers(0, 256, 8 * NBYTES, np.uint8)
    peer = engine.connect(target.address)

    def until_both_serve() -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while True:
            text = engine.explain(peer)
            if text.count("; in use") == 2 and "could not carry messages" not in text:
                return
            assert time.monotonic() < deadline, text
            time.sleep(0.01)

    sent, transfers = 0, []
    for lost in (0, 1, 0, 1):
        until_both_serve()
        # The target hears of it by a message over the other rail alone.
        transfers.append(engine.write(local, peer.regions["kv"], 0, 0, 8 * NBYTES))
        for _ in range(20):
            transfers.append(engine.notify(peer, b"%d" % sent))
            sent += 1
            if sent % 20 == 10:
                fake_verbs.set_port(f"fake{lost}", 1, up=False)
        for each in transfers:
            each.wait(TIMEOUT_S)
        fake_verbs.set_port(f"fake{lost}", 1, up=True)
        assert f"messages over rail {1 - lost}" in engine.explain(peer)
    assert "moved 4 time(s)" in engine.explain(peer)
    assert target.call("bytes_of", "kv") == local.array.tobytes()
    deadline = time.monotonic() + TIMEOUT_S
    while len(numbers := target.call("drain")) < sent:
        assert time.monotonic() < deadline, numbers
        time.sleep(0.01)
    assert numbers == list(range(sent))


@pytest.mark.parametrize("devices", [1, 2])
def test_writes_under_leases_are_pushed_where_both_sides_say_so(devices: int) -> None:
    way = on_devices(devices, push=True)
    size = 8 * NBYTES
    target = PeerProcess("target", way)
    try:
        with way.engine("driver", SECRET) as engine:
            target.call("add_region", "kv", size, "registered")
            local = engine.allocate(size, "kv")
            local.array[:] = np.random.default_rng(7).integers(0, 256, size, np.uint8)
            peer = engine.connect(target.address)
            number, token = target.call("grant", "kv", 0, size, ttl_s=600, num_arrivals=1)
            # A rail carries pushes once the owner has told its key of the window: the first rail is the first.
            pushed, writes, deadline = [0], 0, time.monotonic() + TIMEOUT_S
            while min(pushed) < NBYTES:
                assert time.monotonic() < deadline, engine.explain(peer)
                xfer = engine.write(local, peer.regions["kv"], 0, 0, size, lease=token, arrival=0)
                xfer.wait(TIMEOUT_S)
                writes += 1
                text = engine.explain(peer)
                pushed = [int(each) for each in re.findall(r"(\d+) bytes pushed", text)]
            target.call("wait_arrived", number, 0)
            assert target.call("bytes_of", "kv") == local.array.tobytes()
            assert len(pushed) == devices
            assert sum(pushed) == writes * size
            assert "our writes are pushed where they have a lease" in text
            assert target.call("revoke", number)
            with pytest.raises(KvxferError, match="lease"):
                engine.write(local, peer.regions["kv"], 0, 0, 4096, lease=token).wait(TIMEOUT_S)
    finally:
        target.close()
        forget_plan()


def test_a_region_of_many_pieces_has_keys_for_each_on_both_rails(
    two_rails: tuple[TransferEngine, PeerProcess],
) -> None:
    engine, target = two_rails
    pieces, nbytes = 300, 8192  # more than a message has rows of keys for
    size = pieces * nbytes
    target.call("add_region", "kv", size, "registered")
    rng = np.random.default_rng(8)
    arrays = [rng.integers(0, 256, nbytes, np.uint8) for _ in range(pieces)]
    local = engine.register(arrays, "kv")
    peer = engine.connect(target.address)
    order = rng.permutation(2 * pieces) * (nbytes // 2)
    engine.write(local, peer.regions["kv"], order, order, nbytes // 2).wait(TIMEOUT_S)
    data = np.concatenate(arrays)
    assert target.call("bytes_of", "kv") == data.tobytes()
    for array in arrays:
        array[:] = 0
    engine.read(local, peer.regions["kv"], order, order, nbytes // 2).wait(TIMEOUT_S)
    assert np.concatenate(arrays).tobytes() == data.tobytes()
