# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""One and two rails between two processes: on the first NICs that there are, else on software ones."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from transfer_peers import SECRET, TIMEOUT_S, PeerProcess, until

from kvxfer.errors import KvxferError
from kvxfer.testing import fake_verbs
from kvxfer.testing.faults import Way, ways
from kvxfer.transfer import Peer, TransferEngine

_VERBS = next((way for way in ways() if way.name == "verbs"), None)
pytestmark = pytest.mark.skipif(
    _VERBS is None or _VERBS.reason is not None,
    reason=f"{_VERBS.reason if _VERBS else 'verbs is not compiled in'}",
)
NBYTES = 1 << 20


def on_devices(count: int, *, push: bool = False, crossed: bool = True) -> Way:
    """Verbs on that many NICs on each side, in one network from one to another; or each to itself."""
    assert _VERBS is not None
    real = fake_verbs.real_devices()
    if real and len(real) < count:
        pytest.skip(f"needs {count} RDMA devices, there is {real}")
    ours, theirs = real[:count], real[:count][:: -1 if crossed else 1]
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


def until_both_serve(engine: TransferEngine, peer: Peer) -> None:
    def both() -> bool:
        text = engine.explain(peer)
        return text.count("; in use") == 2 and "could not carry messages" not in text

    until(both, lambda: engine.explain(peer))


def set_link(nic: int, *, up: bool) -> None:
    """The nth NIC's link goes or comes: its interface in the guest (tests/rdma_vm), else a software one's port."""
    if fake_verbs.real_devices():
        state = "up" if up else "down"
        subprocess.run(["ip", "link", "set", f"rdma{nic}", state], check=True)
    else:
        fake_verbs.set_port(f"fake{nic}", 1, up=up)


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
    until_both_serve(engine, peer)
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
    sent, transfers = 0, []
    for lost in (0, 1, 0, 1):
        until_both_serve(engine, peer)
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
    until(lambda: len(target.call("drain")) >= sent, lambda: target.call("drain"))
    assert target.call("drain") == list(range(sent))


@pytest.mark.parametrize("push", [False, True])
def test_writes_and_reads_go_on_when_a_rail_fails_under_them(push: bool) -> None:
    """In the guest each rail leads from a device to itself, so that one interface is all of it."""
    if fake_verbs.real_devices() and "KVXFER_RDMA_DEVICES" not in os.environ:
        pytest.skip("links of NICs that belong to somebody stay up")
    way = on_devices(2, push=push, crossed=False)
    way = replace(way, nic=f"{way.nic} soft_roce=1")  # as in the guest
    size = 4 * NBYTES
    rng = np.random.default_rng(10)
    target = PeerProcess("target", way)
    try:
        with way.engine("driver", SECRET) as engine:
            target.call("add_region", "kv", size, "registered")
            local, back = engine.allocate(size, "kv"), engine.allocate(size, "back")
            peer = engine.connect(target.address)
            remote = peer.regions["kv"]
            _, token = target.call("grant", "kv", 0, size, ttl_s=600)
            lease = token if push else None
            for lost in (0, 1, 0):
                until_both_serve(engine, peer)
                local.array[:] = rng.integers(0, 256, size, np.uint8)
                # Under way when it goes, and when it has gone.
                writes = [engine.write(local, remote, 0, 0, size, lease=lease) for _ in range(4)]
                set_link(lost, up=False)
                writes += [engine.write(local, remote, 0, 0, size, lease=lease) for _ in range(4)]
                for each in writes:
                    each.wait(TIMEOUT_S)
                assert target.call("bytes_of", "kv") == local.array.tobytes()
                engine.read(back, remote, 0, 0, size).wait(TIMEOUT_S)
                assert back.array.tobytes() == local.array.tobytes()
                until(
                    lambda: engine.explain(peer).count("; in use") == 1,
                    lambda: engine.explain(peer),
                )
                assert f"messages over rail {1 - lost}" in engine.explain(peer)
                set_link(lost, up=True)
            until_both_serve(engine, peer)
    finally:
        for nic in (0, 1):
            set_link(nic, up=True)
        target.close()
        forget_plan()


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
            writes = 0

            def pushed() -> list[int]:
                return [int(n) for n in re.findall(r"(\d+) bytes pushed", engine.explain(peer))]

            def one_more_goes_over_all() -> bool:
                nonlocal writes
                xfer = engine.write(local, peer.regions["kv"], 0, 0, size, lease=token, arrival=0)
                xfer.wait(TIMEOUT_S)
                writes += 1
                return min(pushed()) >= NBYTES

            until(one_more_goes_over_all, lambda: engine.explain(peer))
            target.call("wait_arrived", number, 0)
            assert target.call("bytes_of", "kv") == local.array.tobytes()
            assert len(pushed()) == devices
            assert sum(pushed()) == writes * size
            assert "our writes are pushed where they have a lease" in engine.explain(peer)
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
