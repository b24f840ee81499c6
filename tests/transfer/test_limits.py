# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Counts that a peer could drive up without end have one; it is named, and below it all still works."""

from __future__ import annotations

import numpy as np
import pytest
from transfer_peers import TIMEOUT_S

from kvxfer.errors import RegistrationError, RemoteAccessError
from kvxfer.transfer import TransferEngine

MAX_REGIONS = 4096
MAX_TAGS = 65536
NONE = np.array([], np.int64)


def test_regions_of_an_engine(pair: tuple[TransferEngine, TransferEngine]) -> None:
    a, b = pair
    memory = np.zeros(MAX_REGIONS + 1, np.uint8)
    regions = [b.register(memory[i : i + 1], f"kv{i}") for i in range(MAX_REGIONS)]
    with pytest.raises(RegistrationError, match=f"{MAX_REGIONS} regions; deregister some"):
        b.register(memory[MAX_REGIONS:], "one more")
    peer = a.connect(b.address)
    assert len(peer.regions) == MAX_REGIONS
    local = a.register(np.array([7], np.uint8), "local")
    a.write(local, peer.regions[f"kv{MAX_REGIONS - 1}"], 0, 0, 1).wait(TIMEOUT_S)
    assert memory[MAX_REGIONS - 1] == 7
    b.deregister(regions[0])
    b.register(memory[MAX_REGIONS:], "one more")


def test_tags_of_a_peer(pair: tuple[TransferEngine, TransferEngine]) -> None:
    a, b = pair
    local = a.register(np.ones(1, np.uint8), "local")
    b.register(np.zeros(1, np.uint8), "kv")
    remote = a.connect(b.address).regions["kv"]

    def mark(tags: range) -> None:
        for xfer in [a.write(local, remote, NONE, NONE, 1, arrival=tag) for tag in tags]:
            xfer.wait(TIMEOUT_S)

    for first in range(0, MAX_TAGS, 4096):
        mark(range(first, first + 4096))
    with pytest.raises(RemoteAccessError, match="too many different arrival tags"):
        mark(range(MAX_TAGS, MAX_TAGS + 1))
    mark(range(1))  # one that is known
    peer = next(event.peer for event in b.peer_events())
    assert b.arrivals(0, peer) == 2
    assert b.arrivals(MAX_TAGS - 1, peer) == 1
    assert b.arrivals(MAX_TAGS, peer) == 0
