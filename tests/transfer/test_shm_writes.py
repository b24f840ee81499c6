# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Writes over shm that need more than one record of spans, with and without a copy pool."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from transfer_peers import SECRET, TIMEOUT_S, PeerProcess

from kvxfer.errors import KvxferError, LeaseError
from kvxfer.testing.faults import Way
from kvxfer.transfer import TransferEngine, probe_transports

pytestmark = pytest.mark.skipif(
    dict(probe_transports())["shm"] is not None, reason="shm does not work here"
)

NUM_SPANS = 5000  # several records of 1024
SLOT = 512


@pytest.fixture(scope="module", params=[0, 4], ids=["progress", "pool"])
def way(request: pytest.FixtureRequest) -> Way:
    return Way("shm", "shm", copy_threads=request.param)


@pytest.fixture(scope="module")
def peer(way: Way) -> Iterator[PeerProcess]:
    peer = PeerProcess("peer", way)
    peer.call("add_region", "kv", NUM_SPANS * SLOT, "allocated")
    yield peer
    peer.close()


@pytest.fixture
def engine(way: Way) -> Iterator[TransferEngine]:
    with way.engine("driver", SECRET) as engine:
        yield engine


def _source(
    engine: TransferEngine, kind: str, nbytes: int, seed: int = 0
) -> tuple[object, np.ndarray]:
    data = np.random.default_rng(seed).integers(1, 256, nbytes, np.uint8)
    if kind == "registered":
        return engine.register(data, "source"), data
    region = engine.allocate(nbytes, "source")
    region.array[:] = data
    return region, data


@pytest.mark.parametrize("num_spans", [1, 1024, 1025, 2048, NUM_SPANS])
def test_spans_of_any_number_and_length_land_where_they_belong(
    engine: TransferEngine, peer: PeerProcess, kind: str, num_spans: int
) -> None:
    rng = np.random.default_rng(num_spans)
    region, data = _source(engine, kind, NUM_SPANS * SLOT)
    remote = engine.connect(peer.address).regions["kv"]
    peer.call("fill", "kv", 0)
    into = rng.permutation(NUM_SPANS)[:num_spans].astype(np.int64) * SLOT
    out = rng.permutation(NUM_SPANS)[:num_spans].astype(np.int64) * SLOT
    nbytes = rng.integers(1, SLOT, num_spans)
    engine.write(region, remote, out, into, nbytes).wait(TIMEOUT_S)
    expected = np.zeros(NUM_SPANS * SLOT, np.uint8)
    for a, b, n in zip(out, into, nbytes, strict=True):
        expected[b : b + n] = data[a : a + n]
    assert peer.call("bytes_of", "kv") == expected.tobytes()


@pytest.mark.parametrize("num_spans", [2, 1024, NUM_SPANS])
def test_one_bad_span_at_the_end_and_nothing_of_the_request_lands(
    engine: TransferEngine, peer: PeerProcess, kind: str, num_spans: int
) -> None:
    region, _ = _source(engine, kind, NUM_SPANS * SLOT)
    remote = engine.connect(peer.address).regions["kv"]
    peer.call("fill", "kv", 7)
    slots = np.arange(NUM_SPANS - num_spans, NUM_SPANS, dtype=np.int64)
    rng = np.random.default_rng(0)
    offsets = np.concatenate([rng.permutation(slots[:-1]), slots[-1:]]) * SLOT
    nbytes = SLOT - 8  # neighbours do not become one span
    # The lease leaves out the last byte of the last span: only the owner can know.
    _, token = peer.call("grant", "kv", 0, int(offsets[-1]) + nbytes - 1, ttl_s=60, num_arrivals=1)
    xfer = engine.write(region, remote, offsets, offsets, nbytes, lease=token, arrival=0)
    with pytest.raises(LeaseError, match=f"span {num_spans - 1}:.*not covered by the lease"):
        xfer.wait(TIMEOUT_S)
    assert xfer.nbytes_done == 0
    assert set(peer.call("bytes_of", "kv")) == {7}


def test_retries_of_cancelled_writes_are_what_stays(
    engine: TransferEngine, peer: PeerProcess, kind: str
) -> None:
    nbytes = NUM_SPANS * SLOT
    region, data = _source(engine, kind, 2 * nbytes)
    remote = engine.connect(peer.address).regions["kv"]
    for _ in range(30):
        first = engine.write(region, remote, 0, 0, nbytes)
        first.cancel()
        try:
            first.wait(TIMEOUT_S)
        except KvxferError:
            assert first.state == "cancelled"
        engine.write(region, remote, nbytes, 0, nbytes).wait(TIMEOUT_S)
    assert peer.call("bytes_of", "kv") == data[nbytes:].tobytes()
