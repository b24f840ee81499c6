# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""An error says who, over what, which span, how far, why, and what to do; stats and explain agree."""

from __future__ import annotations

import numpy as np
import pytest
from transfer_peers import TIMEOUT_S, PeerProcess, wait_for

from kvxfer.errors import (
    KvxferError,
    LeaseError,
    PeerDisconnectedError,
    RemoteAccessError,
    TransferCancelledError,
    TransferTimeoutError,
)
from kvxfer.transfer import Transfer, TransferEngine


def offsets(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def check_parts(
    error: KvxferError, xfer: Transfer, peer: PeerProcess, transport: str, *parts: str
) -> None:
    """Of a write of one span to 'kv' as a whole, which names none: what every error of it says."""
    assert (error.peer, error.transport, error.span) == ("victim", transport, None)
    nbytes = error.nbytes_done
    assert nbytes is not None
    message = str(error)
    for part in (
        "write of 1 span(s), ",
        " bytes, to region 'kv'",
        f"of peer 'victim' ({peer.address}, incarnation {peer.incarnation[:8]})",
        f"over {transport}: ",
        f"; {nbytes} bytes are known to have landed",
        *parts,
    ):
        assert part in message, (part, message)
    assert ("may or may not have taken it" in message) == (not xfer.agreed)
    assert (
        nbytes == 0 or not xfer.agreed
    )  # whoever is agreed on to have refused it has taken nothing


def test_refusal_names_span_peer_transport_and_what_to_do(
    engine: TransferEngine, own_peer: PeerProcess, transport: str
) -> None:
    own_peer.call("add_region", "kv", 4096, "allocated")
    _, token = own_peer.call("grant", "kv", offsets(0, 100), 10, ttl_s=60)
    local = engine.allocate(4096, "kv")
    peer = engine.connect(own_peer.address)
    xfer = engine.write(
        local, peer.regions["kv"], offsets(0, 50, 90), offsets(0, 100, 105), 5, lease=token
    )
    xfer.wait(TIMEOUT_S)
    xfer = engine.write(
        local, peer.regions["kv"], offsets(0, 50, 90), offsets(0, 100, 108), 5, lease=token
    )
    with pytest.raises(LeaseError) as info:
        xfer.wait(TIMEOUT_S)
    error = info.value
    assert (error.span, error.peer, error.transport) == (2, "victim", transport)
    assert error.nbytes_done == 0
    assert xfer.agreed
    for part in (
        "write of 3 span(s), 15 bytes, to region 'kv'",
        f"'victim' ({own_peer.address}, incarnation {own_peer.incarnation[:8]})",
        f"over {transport}",
        "span 2",
        "0 bytes are known to have landed",
        "ask the owner for a new lease",
    ):
        assert part in str(error)


def test_unknown_lease_is_counted_by_reason(engine: TransferEngine, own_peer: PeerProcess) -> None:
    own_peer.call("add_region", "kv", 4096, "allocated")
    index, token = own_peer.call("grant", "kv", 0, 10, ttl_s=60)
    own_peer.call("revoke", index)
    local = engine.allocate(4096, "kv")
    remote = engine.connect(own_peer.address).regions["kv"]
    with pytest.raises(LeaseError, match="revoked"):
        engine.write(local, remote, 0, 0, 10, lease=token).wait(TIMEOUT_S)
    assert own_peer.call("stats")["refused"] == {"lease": 1}


def test_timeout_says_whether_the_other_side_agrees(
    engine: TransferEngine, own_peer: PeerProcess, transport: str
) -> None:
    own_peer.call("add_region", "kv", 8 << 20, "allocated")
    local = engine.allocate(8 << 20, "kv")
    remote = engine.connect(own_peer.address).regions["kv"]
    own_peer.stop()
    xfer = engine.write(local, remote, 0, 0, 8 << 20, deadline_s=0.1)
    with pytest.raises(TransferTimeoutError) as info:
        xfer.wait(TIMEOUT_S)
    assert isinstance(info.value, TimeoutError)
    hint = "a longer deadline_s=" if xfer.agreed else "the target's arrival counts and lease decide"
    stopped = f"its process {own_peer.pid} is stopped (state T)"
    check_parts(info.value, xfer, own_peer, transport, "the deadline passed", stopped, hint)
    wait_for(engine, lambda: xfer.quiesced)
    assert engine.stats()["quarantine"]["nbytes"] == 0
    assert engine.stats()["transfers"]["timed_out"] == 1


def test_death_carries_peer_and_bytes(
    engine: TransferEngine, own_peer: PeerProcess, transport: str
) -> None:
    own_peer.call("add_region", "kv", 8 << 20, "allocated")
    local = engine.allocate(8 << 20, "kv")
    remote = engine.connect(own_peer.address).regions["kv"]
    own_peer.stop()
    xfer = engine.write(local, remote, 0, 0, 8 << 20)
    own_peer.kill()
    with pytest.raises(PeerDisconnectedError, match="connect") as info:
        xfer.wait(TIMEOUT_S)
    assert isinstance(info.value, ConnectionError)
    hint = "connect() again: a restarted peer is a new incarnation"
    check_parts(info.value, xfer, own_peer, transport, hint)
    assert info.value.nbytes_done is not None
    assert 0 <= info.value.nbytes_done <= 8 << 20


def test_a_region_that_is_gone_is_refused_as_such(
    engine: TransferEngine, own_peer: PeerProcess, transport: str
) -> None:
    own_peer.call("add_region", "kv", 4096, "allocated")
    local = engine.allocate(4096, "kv")
    remote = engine.connect(own_peer.address).regions["kv"]
    own_peer.call("drop_region", "kv")
    xfer = engine.write(local, remote, 0, 0, 4096)
    with pytest.raises(RemoteAccessError, match="unknown region: deregistered") as info:
        xfer.wait(TIMEOUT_S)
    assert type(info.value) is RemoteAccessError
    assert (info.value.nbytes_done, xfer.agreed) == (0, True)
    check_parts(info.value, xfer, own_peer, transport, "look at peer.regions again")


def test_cancelled_says_so(engine: TransferEngine, own_peer: PeerProcess, transport: str) -> None:
    own_peer.call("add_region", "kv", 1 << 20, "allocated")
    local = engine.allocate(1 << 20, "kv")
    remote = engine.connect(own_peer.address).regions["kv"]
    own_peer.stop()
    xfer = engine.write(local, remote, 0, 0, 1 << 20)
    xfer.cancel()
    with pytest.raises(TransferCancelledError) as info:
        xfer.wait(TIMEOUT_S)
    check_parts(info.value, xfer, own_peer, transport, ": cancelled")
    assert info.value.nbytes_done == 0


def test_explain_names_the_path_of_each_kind_of_request(
    engine: TransferEngine, shared_peer: PeerProcess, transport: str
) -> None:
    text = engine.explain(engine.connect(shared_peer.address))
    for what in ("write from", "read into"):
        for kind in ("allocated", "registered"):
            assert f"{what} {kind} memory: {transport}" in text
    assert f"notification: {transport}" in text
    assert "death is seen by" in text
