# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Things go wrong on purpose: each transfer still ends once, with the truth, and gives back what it held."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from transfer_peers import SECRET, TIMEOUT_S, PeerProcess, wait_for

from kvxfer import errors
from kvxfer.doctor import examine
from kvxfer.errors import InvalidArgumentError, KvxferError, TransferTimeoutError
from kvxfer.testing.faults import Way, ways
from kvxfer.transfer import Peer, Region, RemoteRegion, TransferEngine, probe_transports

NBYTES = 1 << 20
BLOCK = 4096
_BELOW = [way for way in ways() if way.name == way.transport and way.reason is None]


@pytest.fixture(params=_BELOW, ids=lambda way: way.name)
def below(request: pytest.FixtureRequest) -> Way:
    assert isinstance(request.param, Way)
    return request.param


class Pair:
    """An engine on which things go wrong, and a target on which nothing does."""

    def __init__(self, a: TransferEngine, b: TransferEngine) -> None:
        self.a, self.b = a, b
        self.local: Region = a.allocate(NBYTES, "kv")
        self.target: Region = b.allocate(NBYTES, "kv")
        self.local.array[:] = np.random.default_rng(1).integers(1, 256, NBYTES, np.uint8)
        self.peer: Peer = a.connect(b.address)
        self.remote: RemoteRegion = self.peer.regions["kv"]

    def counts(self) -> dict[str, int]:
        return dict(self.a.stats()["transfers"])

    def assert_clean(self) -> None:
        """Nothing is in flight, and all memory is free to be released."""
        assert self.counts()["in_flight"] == 0
        wait_for(self.a, lambda: self.counts()["unquiesced"] == 0)
        self.a.deregister(self.local)


@contextmanager
def faulty_pair(below: Way, plan: str) -> Iterator[Pair]:
    # Both wrap, only one side rolls dice.
    with (
        below.with_faults(plan).engine("a", SECRET) as a,
        below.with_faults("seed=0").engine("b", SECRET) as b,
    ):
        yield Pair(a, b)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ("", "needs a plan of faults"),
        ("seed=3", "which transport to wrap"),
        ("wrap=faulty", "which transport to wrap"),
        ("wrap=carrier_pigeon", "no transport 'carrier_pigeon'"),
        ("wrap=tcp drip=0.5", "'drip=0.5': known are"),
        ("wrap=tcp drop", "'drop': expected KEY=VALUE"),
        ("wrap=tcp drop=2", "'drop=2': a probability"),
        ("wrap=tcp drop=0.1x", "'drop=0.1x': a probability"),
        ("wrap=tcp drop=nan", "a probability"),
        ("wrap=tcp drop=0.1 drop=0.2", "given twice"),
        ("wrap=tcp delay=0.1", "PROBABILITY:NUMBER"),
        ("wrap=tcp delay=0.1:5", "PROBABILITY:NUMBER"),
        ("wrap=tcp delay=0.1:5h", "PROBABILITY:NUMBER"),
        ("wrap=tcp error=0.1:oops", "no such error code"),
        ("wrap=tcp seed=-1", "whole number"),
    ],
)
def test_plan_is_parsed_strictly(plan: str, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        Way("x", "faulty", faults=plan).engine("a", SECRET)


def test_faulty_is_used_only_when_it_is_named() -> None:
    assert "faulty" not in [name for name, _ in probe_transports()]
    assert "faulty" not in str(examine())
    with TransferEngine("a", secret=SECRET) as a, TransferEngine("b", secret=SECRET) as b:
        assert "faulty" not in a.explain(a.connect(b.address))


def test_dropped_request_ends_at_its_deadline(below: Way) -> None:
    with faulty_pair(below, "drop=1") as pair:
        xfer = pair.a.write(pair.local, pair.remote, 0, 0, BLOCK, deadline_s=0.1)
        with pytest.raises(TransferTimeoutError, match="deadline"):
            xfer.wait(TIMEOUT_S)
        assert (xfer.state, xfer.agreed, xfer.quiesced) == ("timed_out", False, True)
        assert not pair.target.array.any()
        pair.assert_clean()


def test_dropped_notifications_give_their_credit_back(below: Way) -> None:
    with faulty_pair(below, "drop=0.5 seed=3") as pair:
        shown = 0
        for _ in range(600):  # more than twice the window
            xfer = pair.a.notify(pair.peer, b"x", deadline_s=TIMEOUT_S)
            xfer.cancel()
            assert xfer.done
            shown += len(pair.b.notifications())
        assert pair.counts()["timed_out"] == 0
        # Where a cancel is not agreed, some were shown all the same, perhaps just now: a window full
        # of them gives its credit back only when they are taken out.
        ends = []
        for _ in range(20):
            ends.append(xfer := pair.a.notify(pair.peer, b"x", deadline_s=0.2))
            try:
                xfer.wait(TIMEOUT_S)
            except TransferTimeoutError:
                assert not xfer.agreed
            shown += len(pair.b.notifications())
        assert any(xfer.state == "done" for xfer in ends)


def test_lost_ack_is_reported_as_unknown_although_it_landed(below: Way) -> None:
    with faulty_pair(below, "lose_ack=1") as pair:
        lease = pair.b.grant(pair.target, 0, BLOCK, ttl_s=60, num_arrivals=1)
        xfer = pair.a.write(
            pair.local, pair.remote, 0, 0, BLOCK, lease=lease.token, arrival=0, deadline_s=0.2
        )
        with pytest.raises(TransferTimeoutError, match="may or may not"):
            xfer.wait(TIMEOUT_S)
        assert (xfer.agreed, xfer.quiesced) == (False, True)
        lease.wait_arrived(0, TIMEOUT_S)  # the owner's own word is the truth
        np.testing.assert_array_equal(pair.target.array[:BLOCK], pair.local.array[:BLOCK])
        pair.assert_clean()


def test_truncated_write_is_not_accepted_and_stays_inside_its_spans(below: Way) -> None:
    with faulty_pair(below, "truncate=1") as pair:
        lease = pair.b.grant(pair.target, BLOCK, 2 * BLOCK, ttl_s=60, num_arrivals=1)
        offsets = np.array([2 * BLOCK, BLOCK], np.int64)
        xfer = pair.a.write(
            pair.local, pair.remote, offsets, offsets, BLOCK, lease=lease.token, arrival=0
        )
        with pytest.raises(KvxferError, match="broke the connection"):
            xfer.wait(TIMEOUT_S)
        assert (xfer.state, xfer.agreed, xfer.quiesced) == ("failed", False, True)
        wait_for(pair.a, lambda: any(e.kind == "lost" for e in pair.a.peer_events()))
        assert lease.num_arrived == 0
        lease.revoke(TIMEOUT_S)
        assert not pair.target.array[:BLOCK].any()
        assert not pair.target.array[3 * BLOCK :].any()
        pair.assert_clean()


_CODES = {
    "invalid_argument": errors.InvalidArgumentError,
    "unavailable": errors.UnavailableError,
    "registration": errors.RegistrationError,
    "transport": errors.TransportError,
    "peer_disconnected": errors.PeerDisconnectedError,
    "remote_access": errors.RemoteAccessError,
    "lease": errors.LeaseError,
    "timeout": errors.TransferTimeoutError,
    "cancelled": errors.TransferCancelledError,
    "internal": errors.InternalError,
}


@pytest.mark.parametrize("code", _CODES)
def test_each_error_code_is_its_own_exception(code: str) -> None:
    with faulty_pair(_BELOW[0], f"error=1:{code}") as pair:
        xfer = pair.a.write(pair.local, pair.remote, 0, 0, BLOCK)
        with pytest.raises(_CODES[code], match="injected") as info:
            xfer.wait(TIMEOUT_S)
        assert type(info.value) is _CODES[code]
        states = {"timeout": "timed_out", "cancelled": "cancelled"}
        assert (xfer.state, xfer.agreed, xfer.quiesced) == (states.get(code, "failed"), True, True)
        assert not pair.target.array.any()
        pair.assert_clean()


def test_connection_that_dies_at_a_post_ends_all_of_them_once(below: Way) -> None:
    with faulty_pair(below, "die=40 delay=0.3:2ms seed=5") as pair:
        n = 60
        xfers = [
            pair.a.write(pair.local, pair.remote, i * BLOCK, i * BLOCK, BLOCK) for i in range(n)
        ]
        for xfer in xfers:
            wait_for(pair.a, lambda xfer=xfer: xfer.done and xfer.quiesced)
        counts = pair.counts()
        assert counts["done"] + counts["failed"] == n
        assert counts["failed"] >= n - 40
        failed = [xfer for xfer in xfers if xfer.state == "failed"]
        assert any("post 40" in str(xfer.error) for xfer in failed)
        pair.assert_clean()
        wait_for(pair.a, lambda: any(e.kind == "lost" for e in pair.a.peer_events()))
        # The peer is the same incarnation, and one call brings it back.
        again = pair.a.connect(pair.b.address)
        assert again is pair.peer
        other = pair.a.allocate(BLOCK, "other")
        pair.a.write(other, again.regions["kv"], 0, 0, BLOCK).wait(TIMEOUT_S)


def test_duplicate_ends_count_once(below: Way) -> None:
    with faulty_pair(below, "duplicate=1") as pair:
        for i in range(20):
            pair.a.write(pair.local, pair.remote, 0, 0, BLOCK, arrival=7).wait(TIMEOUT_S)
            pair.a.read(pair.local, pair.remote, 0, 0, BLOCK, notify=b"%d" % i).wait(TIMEOUT_S)
        seen: list[bytes] = []

        def look() -> bool:
            seen.extend(each.payload for each in pair.b.notifications())
            return len(seen) >= 20

        wait_for(pair.b, look)
        pair.a.notify(pair.peer, b"last").wait(TIMEOUT_S)
        wait_for(pair.b, lambda: look() and len(seen) >= 21)
        assert seen == [b"%d" % i for i in range(20)] + [b"last"]
        (peer,) = [e.peer for e in pair.b.peer_events()]
        assert pair.b.arrivals(7, peer) == 20
        counts = pair.counts()
        assert (counts["done"], counts["in_flight"]) == (41, 0)
        assert pair.a.stats()["late_events"] >= 41
        pair.assert_clean()


def test_storm_of_back_pressure_loses_nothing(below: Way) -> None:
    with faulty_pair(below, "again=0.9 seed=2") as pair:
        xfers = [
            pair.a.write(pair.local, pair.remote, i * BLOCK, i * BLOCK, BLOCK) for i in range(64)
        ]
        for xfer in xfers:
            xfer.wait(TIMEOUT_S)
        np.testing.assert_array_equal(
            pair.target.array[: 64 * BLOCK], pair.local.array[: 64 * BLOCK]
        )
        pair.assert_clean()


_HARMFUL = (
    "delay=0.3:3ms delay_end=0.3:3ms reorder=0.2 duplicate=0.2 again=0.2 drop=0.05 lose_ack=0.05 "
    "error=0.05:any"
)


@pytest.mark.parametrize("seed", range(3))
def test_everything_at_once_keeps_the_books(below: Way, seed: int) -> None:
    """One end each; what was accepted is whole, what was agreed not to be accepted never shows."""
    rng = np.random.default_rng(seed)
    n = 150
    process = PeerProcess("target", below.with_faults(f"seed={seed} {_HARMFUL}"))
    try:
        with below.with_faults(f"seed={seed + 100} {_HARMFUL}").engine("driver", SECRET) as a:
            local = a.allocate(n * BLOCK, "kv")
            stamps = rng.integers(1, 256, n, dtype=np.uint8)
            local.array.reshape(n, BLOCK)[:] = stamps[:, None]
            process.call("add_region", "kv", n * BLOCK, "allocated")
            peer = a.connect(process.address)
            lease, token = process.call("grant", "kv", 0, n * BLOCK, ttl_s=60, num_arrivals=n)
            xfers = []
            for i, target in enumerate(rng.permutation(n)):
                xfers.append(
                    (
                        i,
                        int(target),
                        a.write(
                            local,
                            peer.regions["kv"],
                            i * BLOCK,
                            int(target) * BLOCK,
                            BLOCK,
                            lease=token,
                            arrival=int(target),
                            notify=b"%d" % target,
                            deadline_s=1.5,
                        ),
                    )
                )
                if rng.random() < 0.1:
                    xfers[int(rng.integers(len(xfers)))][2].cancel()
                if i % 50 == 49:  # keep the window of notifications open
                    process.call("drain")
            for _, _, xfer in xfers:
                wait_for(a, lambda xfer=xfer: xfer.done and xfer.quiesced)
            counts = a.stats()["transfers"]
            ends = ("done", "failed", "timed_out", "cancelled")
            assert sum(counts[end] for end in ends) == n
            assert (counts["in_flight"], counts["unquiesced"]) == (0, 0)
            # Whatever was still on its way is decided by the owner now.
            assert process.call("revoke", lease)
            arrived = set(process.call("lease_state", lease)[0])
            shown = process.call("drain")
            theirs = np.frombuffer(process.call("bytes_of", "kv"), np.uint8).reshape(n, BLOCK)
            assert sorted(shown) == sorted(arrived), "a message for each arrival, once"
            for i, target, xfer in xfers:
                if xfer.state == "done":
                    assert xfer.agreed
                    assert target in arrived
                elif xfer.agreed:
                    assert target not in arrived, xfer.error
                if target in arrived:
                    assert (theirs[target] == stamps[i]).all()
                else:
                    assert np.isin(theirs[target], (0, stamps[i])).all()
            a.deregister(local)
    finally:
        process.close()
