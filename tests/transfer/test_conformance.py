# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""What every transport must keep, with a real process on the other side."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
from transfer_peers import TIMEOUT_S, PeerProcess, take_notifications, wait_for

from kvxfer.errors import InvalidArgumentError, LeaseError, RemoteAccessError
from kvxfer.transfer import MAX_NOTIFICATION_NBYTES, Peer, Region, RemoteRegion, TransferEngine

NBYTES = 1 << 20
_names = itertools.count()


@dataclass
class World:
    engine: TransferEngine
    process: PeerProcess
    peer: Peer
    local: Region
    remote: RemoteRegion
    name: str

    @property
    def theirs(self) -> np.ndarray:
        return np.frombuffer(self.process.call("bytes_of", self.name), np.uint8)


@contextlib.contextmanager
def make_world(
    engine: TransferEngine, process: PeerProcess, kind: str, **options: bool
) -> Iterator[World]:
    name = f"kv{next(_names)}"
    process.call("add_region", name, NBYTES, kind, **options)
    if kind == "allocated":
        local = engine.allocate(NBYTES, "kv")
    else:
        local = engine.register(np.zeros(NBYTES, np.uint8), "kv")
    local.array[:] = np.random.default_rng(5).integers(0, 256, NBYTES, dtype=np.uint8)
    peer = engine.connect(process.address, timeout_s=TIMEOUT_S)
    yield World(engine, process, peer, local, peer.regions[name], name)
    engine.deregister(local)
    process.call("drop_region", name)


@pytest.fixture
def world(engine: TransferEngine, shared_peer: PeerProcess, kind: str) -> Iterator[World]:
    with make_world(engine, shared_peer, kind) as world:
        yield world


def test_transport_is_the_one_asked_for(world: World, transport: str) -> None:
    xfer = world.engine.write(world.local, world.remote, 0, 0, 4096)
    xfer.wait(TIMEOUT_S)
    assert xfer.transport == transport
    assert transport in world.engine.explain(world.peer)
    stats = world.engine.stats()["peers"][world.peer.incarnation]["transport"]
    assert stats[transport]["bytes_written"] == 4096


def test_done_transfer_is_agreed_and_quiesced(world: World) -> None:
    xfer = world.engine.write(world.local, world.remote, 0, 0, NBYTES)
    xfer.wait(TIMEOUT_S)
    assert (xfer.state, xfer.done, xfer.error) == ("done", True, None)
    assert (xfer.agreed, xfer.quiesced, xfer.nbytes_done) == (True, True, NBYTES)
    np.testing.assert_array_equal(world.theirs, world.local.array)


@pytest.mark.parametrize("direction", ["write", "read"])
@pytest.mark.parametrize("seed", range(4))
def test_random_scatter_equals_numpy(world: World, direction: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    world.process.call("fill", world.name, rng.integers(0, 256, NBYTES, np.uint8).tobytes())
    theirs, ours = world.theirs.copy(), world.local.array.copy()
    # Cut the space at random places on both sides: pieces of 1 byte to a few KiB.
    n = int(rng.integers(1, 2500))
    nbytes = rng.integers(1, NBYTES // n + 1, n)
    slots = np.cumsum(np.full(n, NBYTES // n)) - NBYTES // n
    local = (rng.permutation(slots) + rng.integers(0, NBYTES // n - nbytes + 1)).astype(np.int64)
    remote = (rng.permutation(slots) + rng.integers(0, NBYTES // n - nbytes + 1)).astype(np.int64)
    move = getattr(world.engine, direction)
    move(world.local, world.remote, local, remote, nbytes.astype(np.int64)).wait(TIMEOUT_S)
    for here, there, size in zip(local, remote, nbytes, strict=True):
        if direction == "write":
            theirs[there : there + size] = ours[here : here + size]
        else:
            ours[here : here + size] = theirs[there : there + size]
    np.testing.assert_array_equal(world.theirs, theirs)  # also: nothing else was touched
    np.testing.assert_array_equal(world.local.array, ours)


def test_bases_repeat_the_span_list(world: World) -> None:
    world.process.call("fill", world.name, 0)
    bases = np.array([[0, 300_000], [100_000, 0], [200_000, 600_000]], np.int64)
    local, remote = np.array([0, 50_000], np.int64), np.array([70_000, 10], np.int64)
    xfer = world.engine.write(world.local, world.remote, local, remote, 1000, bases=bases)
    xfer.wait(TIMEOUT_S)
    expected = np.zeros(NBYTES, np.uint8)
    for base_local, base_remote in bases:
        for here, there in zip(base_local + local, base_remote + remote, strict=True):
            expected[there : there + 1000] = world.local.array[here : here + 1000]
    np.testing.assert_array_equal(world.theirs, expected)
    assert xfer.nbytes == 6000


def test_notification_arrives_after_its_data(world: World) -> None:
    for round_ in range(20):
        world.local.array[:] = round_
        xfer = world.engine.write(world.local, world.remote, 0, 0, NBYTES, notify=b"%d" % round_)
        assert world.process.call("notifications", 1) == [("driver", b"%d" % round_)]
        assert (world.theirs == round_).all()
        xfer.wait(TIMEOUT_S)


@pytest.mark.parametrize("nbytes", [0, 1, 64, MAX_NOTIFICATION_NBYTES])
def test_notification_of_any_allowed_size(world: World, nbytes: int) -> None:
    payload = bytes(np.random.default_rng(nbytes).integers(0, 256, nbytes, np.uint8))
    world.engine.notify(world.peer, payload).wait(TIMEOUT_S)
    assert world.process.call("notifications", 1) == [("driver", payload)]


def test_longer_notification_is_refused_at_the_call(world: World) -> None:
    with pytest.raises(InvalidArgumentError, match=str(MAX_NOTIFICATION_NBYTES)):
        world.engine.notify(world.peer, bytes(MAX_NOTIFICATION_NBYTES + 1))


def test_thousands_of_notifications_all_arrive(world: World) -> None:
    xfers = [world.engine.notify(world.peer, b"%d" % i) for i in range(2000)]
    got = world.process.call("notifications", 2000)
    assert sorted(int(payload) for _, payload in got) == list(range(2000))
    for xfer in xfers:
        xfer.wait(TIMEOUT_S)


def test_thousands_of_mixed_transfers_in_flight(world: World) -> None:
    """Shm once took staged bytes before it had read the head that they belong to, and dropped them."""
    size, count = 512, 1500  # two thirds of the region are written, the rest is read
    other = np.random.default_rng(6).integers(0, 256, NBYTES, dtype=np.uint8)
    second = world.engine.register(
        other, "second"
    )  # beside an allocated one: mapped and staged mixed
    before = world.theirs
    expected = before.copy()
    read = []
    transfers = []
    for i in range(count):
        at = i * size
        if i % 3 == 2:
            transfers.append(world.engine.read(second, world.remote, at, at, size))
            read.append(at)
        else:
            source = world.local if i % 2 else second
            transfers.append(world.engine.write(source, world.remote, at, at, size))
            expected[at : at + size] = source.array[at : at + size]
    for transfer in transfers:
        transfer.wait(TIMEOUT_S)
    assert np.array_equal(world.theirs, expected)
    assert all(np.array_equal(other[at : at + size], before[at : at + size]) for at in read)
    world.engine.deregister(second)


def test_empty_write_still_notifies_and_counts(world: World) -> None:
    lease, token = world.process.call("grant", world.name, 0, 1, ttl_s=60, num_arrivals=3)
    none = np.array([], np.int64)
    world.engine.write(
        world.local, world.remote, none, none, 1, notify=b"x", arrival=2, lease=token
    ).wait(TIMEOUT_S)
    assert world.process.call("lease_state", lease)[0] == [2]
    assert world.process.call("notifications", 1) == [("driver", b"x")]


def test_arrivals_without_a_lease_are_counted_per_tag(world: World) -> None:
    for tag in (11, 11, 12, 11):
        world.engine.write(world.local, world.remote, 0, 0, 100, arrival=tag).wait(TIMEOUT_S)
    own = [e.peer for e in world.engine.peer_events()]
    assert own == [world.peer]
    world.process.call("write_back", world.name, "kv", 0, 10, arrival=5)
    world.engine.wait_arrivals(5, world.peer, 1, TIMEOUT_S)
    assert world.engine.arrivals(5, world.peer) == 1
    assert world.engine.arrivals(6, world.peer) == 0


def test_arrivals_under_a_lease_are_a_set(world: World) -> None:
    lease, token = world.process.call("grant", world.name, 0, NBYTES, ttl_s=60, num_arrivals=200)
    for index in (199, 3, 3, 64):
        world.engine.write(world.local, world.remote, 0, 0, 5000, lease=token, arrival=index).wait(
            TIMEOUT_S
        )
    assert world.process.call("lease_state", lease)[0] == [3, 64, 199]
    world.process.call("wait_arrived", lease, np.array([199, 3], np.int64))


def test_an_arrival_that_the_lease_has_no_place_for_is_refused_before_a_byte_lands(
    world: World,
) -> None:
    _, token = world.process.call("grant", world.name, 0, NBYTES, ttl_s=60, num_arrivals=2)
    before = world.theirs
    world.local.array[:] = 77
    xfer = world.engine.write(world.local, world.remote, 0, 0, NBYTES, lease=token, arrival=2)
    with pytest.raises(LeaseError, match="arrival=2 is not below the lease's num_arrivals=2"):
        xfer.wait(TIMEOUT_S)
    assert xfer.nbytes_done == 0
    assert np.array_equal(world.theirs, before)


def test_arrivals_are_visible_only_after_their_data(world: World) -> None:
    """While many others are on their way, and on the faulty ways in another order."""
    n, size = 24, NBYTES // 24
    lease, token = world.process.call("grant", world.name, 0, NBYTES, ttl_s=60, num_arrivals=n)
    xfers = [
        world.engine.write(
            world.local, world.remote, i * size, i * size, size, lease=token, arrival=i
        )
        for i in range(n)
    ]
    for i in reversed(range(n)):
        seen = world.process.call("bytes_once_arrived", lease, i, world.name, i * size, size)
        assert seen == world.local.array[i * size : (i + 1) * size].tobytes()
    for xfer in xfers:
        xfer.wait(TIMEOUT_S)
    tag = 1000 + next(_names)
    for round_ in range(1, 9):
        world.local.array[:] = round_
        xfer = world.engine.write(world.local, world.remote, 0, 0, NBYTES, arrival=tag)
        seen = world.process.call("bytes_once_counted", tag, round_, world.name, 0, NBYTES)
        assert seen == bytes([round_]) * NBYTES
        xfer.wait(TIMEOUT_S)
        assert world.process.call("arrivals", tag, round_) == round_, "told twice, counted once"


def test_retry_under_a_new_lease_owes_nothing_to_its_dead_predecessor(world: World) -> None:
    for round_ in range(10):
        old, old_token = world.process.call(
            "grant", world.name, 0, NBYTES, ttl_s=60, num_arrivals=1
        )
        world.local.array[:] = 100 + round_
        first = world.engine.write(
            world.local, world.remote, 0, 0, NBYTES, lease=old_token, arrival=0
        )
        first.cancel()
        world.process.call("revoke", old)
        new, new_token = world.process.call(
            "grant", world.name, 0, NBYTES, ttl_s=60, num_arrivals=1
        )
        wait_for(world.engine, lambda first=first: first.quiesced)
        assert world.process.call("lease_state", new)[0] == []
        world.local.array[:] = 200 + round_
        world.engine.write(
            world.local, world.remote, 0, 0, NBYTES, lease=new_token, arrival=0
        ).wait(TIMEOUT_S)
        assert world.process.call("lease_state", new)[0] == [0]
        assert (world.theirs == 200 + round_).all()
        arrived = world.process.call("lease_state", old)[0]
        if first.agreed:
            assert arrived == ([0] if first.state == "done" else [])


def test_both_sides_can_write_over_one_connection(world: World) -> None:
    world.process.call("fill", world.name, 7)
    assert world.process.call("write_back", world.name, "kv", 10, 1000, notify=b"back") == "done"
    assert (world.local.array[10:1010] == 7).all()
    assert take_notifications(world.engine, 1) == [("peer", b"back")]


def test_read_with_notify_tells_the_owner_afterwards(world: World) -> None:
    world.process.call("fill", world.name, 9)
    xfer = world.engine.read(world.local, world.remote, 0, 0, 1000, notify=b"taken")
    xfer.wait(TIMEOUT_S)
    assert (world.local.array[:1000] == 9).all()
    assert world.process.call("notifications", 1) == [("driver", b"taken")]


# ---------------------------------------------------------------------- leases


def test_write_outside_the_lease_names_the_span(world: World) -> None:
    world.process.call("fill", world.name, 0)
    offsets = np.array([0, 8192], np.int64)
    _, token = world.process.call("grant", world.name, offsets, 4096, ttl_s=60)
    xfer = world.engine.write(
        world.local, world.remote, offsets, np.array([0, 4096], np.int64), 4096, lease=token
    )
    with pytest.raises(LeaseError, match="span 1") as info:
        xfer.wait(TIMEOUT_S)
    assert (xfer.state, xfer.agreed) == ("failed", True)
    assert "kv" in str(info.value)
    assert not world.theirs[4096:].any()


def test_foreign_and_made_up_leases_are_refused(world: World) -> None:
    _, token = world.process.call("grant", world.name, 0, NBYTES, ttl_s=60, peer="0" * 32)
    with pytest.raises(LeaseError, match="another peer"):
        world.engine.write(world.local, world.remote, 0, 0, 10, lease=token).wait(TIMEOUT_S)
    forged = bytearray(token)
    forged[30] ^= 1
    with pytest.raises(LeaseError):
        world.engine.write(world.local, world.remote, 0, 0, 10, lease=bytes(forged)).wait(TIMEOUT_S)
    own = world.engine.grant(world.local, 0, 10, ttl_s=60)
    with pytest.raises(LeaseError, match="another engine"):
        world.engine.write(world.local, world.remote, 0, 0, 10, lease=own.token)
    with pytest.raises(InvalidArgumentError, match="token"):
        world.engine.write(world.local, world.remote, 0, 0, 10, lease=b"nonsense")


def test_revoked_lease_refuses_late_writes_and_their_messages(world: World) -> None:
    world.process.call("fill", world.name, 0)
    lease, token = world.process.call("grant", world.name, 0, NBYTES, ttl_s=60, num_arrivals=1)
    late = world.process.call("stats")["late_writes_refused"]
    assert world.process.call("revoke", lease) is True
    xfer = world.engine.write(
        world.local, world.remote, 0, 0, NBYTES, lease=token, arrival=0, notify=b"late"
    )
    with pytest.raises(LeaseError):
        xfer.wait(TIMEOUT_S)
    world.engine.notify(world.peer, b"marker").wait(TIMEOUT_S)
    assert world.process.call("notifications", 1) == [("driver", b"marker")]
    assert world.process.call("lease_state", lease)[0] == []
    assert not world.theirs.any()
    assert world.process.call("stats")["late_writes_refused"] > late


def test_expired_lease_becomes_quiet_by_itself(world: World) -> None:
    lease, token = world.process.call("grant", world.name, 0, NBYTES, ttl_s=0.05)
    world.process.call("wait_quiet", lease)
    assert world.process.call("lease_state", lease)[1:] == (True, True, True)
    with pytest.raises(LeaseError):
        world.engine.write(world.local, world.remote, 0, 0, 10, lease=token).wait(TIMEOUT_S)


def test_read_under_a_lease_sees_only_its_spans(world: World) -> None:
    _, token = world.process.call("grant", world.name, 100, 50, ttl_s=60)
    world.process.call("fill", world.name, 3)
    world.engine.read(world.local, world.remote, 0, 100, 50, lease=token).wait(TIMEOUT_S)
    assert (world.local.array[:50] == 3).all()
    with pytest.raises(LeaseError):
        world.engine.read(world.local, world.remote, 0, 100, 51, lease=token).wait(TIMEOUT_S)


def test_region_can_require_a_lease(
    engine: TransferEngine, shared_peer: PeerProcess, kind: str
) -> None:
    with make_world(engine, shared_peer, kind, require_lease=True) as world:
        with pytest.raises(LeaseError, match=r"requires a lease.*pass lease="):
            engine.write(world.local, world.remote, 0, 0, 10).wait(TIMEOUT_S)
        _, token = world.process.call("grant", world.name, 0, 10, ttl_s=60)
        engine.write(world.local, world.remote, 0, 0, 10, lease=token).wait(TIMEOUT_S)


def test_deregistered_region_is_refused_by_its_owner(world: World) -> None:
    name = f"short-lived{next(_names)}"
    world.process.call("add_region", name, 4096, "allocated")
    remote = wait_for(world.engine, lambda: _after_marker(world).get(name))
    world.engine.write(world.local, remote, 0, 0, 10).wait(TIMEOUT_S)
    world.process.call("drop_region", name)
    with pytest.raises(RemoteAccessError, match="unknown region"):
        world.engine.write(world.local, remote, 0, 0, 10).wait(TIMEOUT_S)
    wait_for(world.engine, lambda: name not in _after_marker(world))


def _after_marker(world: World) -> dict[str, RemoteRegion]:
    """The peer's regions, after a transfer of its own: it wakes who waits. Announcements come over tcp, and a
    transfer over another transport may overtake them."""
    world.process.call("write_back", world.name, "kv", 0, 1)
    return world.peer.regions


def test_cancel_ends_at_once_and_the_next_write_is_whole(world: World) -> None:
    for _ in range(20):
        world.local.array[:] = 1
        xfer = world.engine.write(world.local, world.remote, 0, 0, NBYTES)
        xfer.cancel()
        assert xfer.done
        assert xfer.state in ("cancelled", "done")
        wait_for(world.engine, lambda xfer=xfer: xfer.quiesced)
        world.local.array[:] = 2
        world.engine.write(world.local, world.remote, 0, 0, NBYTES).wait(TIMEOUT_S)
        assert (world.theirs == 2).all()
