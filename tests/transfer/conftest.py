# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Engines and peer processes over every transport that works here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from transfer_peers import SECRET, PeerProcess

from kvxfer.testing.faults import Way, ways
from kvxfer.transfer import TransferEngine

_WAYS = [
    pytest.param(
        way,
        id=way.name,
        marks=[pytest.mark.skip(reason=f"{way.name}: {way.reason}")] if way.reason else [],
    )
    for way in ways()
]


@pytest.fixture(scope="module", params=_WAYS)
def way(request: pytest.FixtureRequest) -> Way:
    """Every transport that works here, and each with things going wrong that nobody may notice."""
    assert isinstance(request.param, Way)
    return request.param


@pytest.fixture(scope="module")
def transport(way: Way) -> str:
    return way.transport


@pytest.fixture(params=["allocated", "registered"])
def kind(request: pytest.FixtureRequest) -> str:
    """How the memory of both sides came to be: another path on same-host transports."""
    return str(request.param)


@pytest.fixture
def engine(way: Way) -> Iterator[TransferEngine]:
    with way.engine("driver", SECRET) as engine:
        yield engine


@pytest.fixture(scope="module")
def shared_peer(way: Way) -> Iterator[PeerProcess]:
    """One process for the tests that leave it as it was; regions are dropped by each test."""
    peer = PeerProcess("peer", way)
    yield peer
    peer.close()


@pytest.fixture
def own_peer(way: Way) -> Iterator[PeerProcess]:
    """A process of the test's own, to be stopped or killed."""
    peer = PeerProcess("victim", way)
    yield peer
    peer.close()


@pytest.fixture
def pair() -> Iterator[tuple[TransferEngine, TransferEngine]]:
    """Two engines in this process over tcp, for what does not depend on transport or process."""
    with (
        TransferEngine("a", transports=("tcp",), secret=SECRET) as a,
        TransferEngine("b", transports=("tcp",), secret=SECRET) as b,
    ):
        yield a, b
