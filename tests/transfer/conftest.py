# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Engines and peer processes over every transport that works here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from transfer_peers import SECRET, PeerProcess

from kvxfer.transfer import TransferEngine, probe_transports

_TRANSPORTS = [
    pytest.param(
        name, marks=[pytest.mark.skip(reason=f"{name}: {reason}")] if reason is not None else []
    )
    for name, reason in probe_transports()
]


@pytest.fixture(scope="module", params=_TRANSPORTS)
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["allocated", "registered"])
def kind(request: pytest.FixtureRequest) -> str:
    """How the memory of both sides came to be: another path on same-host transports."""
    return str(request.param)


@pytest.fixture
def engine(transport: str) -> Iterator[TransferEngine]:
    with TransferEngine("driver", transports=(transport,), secret=SECRET) as engine:
        yield engine


@pytest.fixture(scope="module")
def shared_peer(transport: str) -> Iterator[PeerProcess]:
    """One process for the tests that leave it as it was; regions are dropped by each test."""
    peer = PeerProcess("peer", (transport,), SECRET)
    yield peer
    peer.close()


@pytest.fixture
def own_peer(transport: str) -> Iterator[PeerProcess]:
    """A process of the test's own, to be stopped or killed."""
    peer = PeerProcess("victim", (transport,), SECRET)
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
