# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Time and leases, over every way: a renewed one goes on, one that was not ends by itself."""

from __future__ import annotations

import numpy as np
import pytest
from transfer_peers import TIMEOUT_S, PeerProcess, wait_for

from kvxfer.errors import LeaseError
from kvxfer.transfer import TransferEngine

NBYTES = 1 << 16


def test_renewed_lease_goes_on_after_its_first_ttl(
    engine: TransferEngine, own_peer: PeerProcess
) -> None:
    own_peer.call("add_region", "kv", NBYTES, "allocated", require_lease=True)
    local = engine.register(np.arange(NBYTES, dtype=np.uint32).view(np.uint8)[:NBYTES], "kv")
    remote = engine.connect(own_peer.address).regions["kv"]
    half = NBYTES // 2
    renewed, renewed_token = own_peer.call("grant", "kv", 0, half, ttl_s=0.2, num_arrivals=2)
    own_peer.call("extend", renewed, 600.0)
    short, short_token = own_peer.call("grant", "kv", half, half, ttl_s=0.2, num_arrivals=2)
    write = lambda at, token, n: engine.write(  # noqa: E731
        local, remote, at, at, half, lease=token, arrival=n
    ).wait(TIMEOUT_S)
    write(0, renewed_token, 0)
    own_peer.call("wait_quiet", short)  # the first TTL of both has passed
    write(0, renewed_token, 1)
    with pytest.raises(LeaseError):
        write(half, short_token, 1)
    assert own_peer.call("lease_state", renewed) == ([0, 1], False, False, False)
    assert own_peer.call("lease_state", short)[1:] == (True, True, True)
    theirs = own_peer.call("bytes_of", "kv")
    assert theirs[:half] == local.array[:half].tobytes()
    assert not any(theirs[half:])


def test_renewed_lease_can_be_shortened_and_revoked(
    engine: TransferEngine, own_peer: PeerProcess
) -> None:
    target = engine.allocate(NBYTES, "kv")
    engine.connect(own_peer.address)
    lease = engine.grant(target, 0, NBYTES, ttl_s=600)
    lease.extend(0.05)  # from now on
    wait_for(engine, lambda: lease.quiet)
    assert lease.expired
    other = engine.grant(target, 0, NBYTES, ttl_s=0.05)
    other.extend(600)
    other.revoke(TIMEOUT_S)
    assert (other.quiet, other.expired) == (True, False)
    with pytest.raises(LeaseError, match="revoked"):
        other.extend(1)
