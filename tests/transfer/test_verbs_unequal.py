# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Two sides whose NICs are not alike: each keeps to what the other one can do, and says so."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from transfer_peers import SECRET, TIMEOUT_S, PeerProcess

from kvxfer.testing import fake_verbs
from kvxfer.testing.faults import ways

_VERBS = next((way for way in ways() if way.name == "verbs"), None)
pytestmark = pytest.mark.skipif(
    _VERBS is None or _VERBS.reason is not None or bool(fake_verbs.real_devices()),
    reason=f"needs software NICs: {_VERBS.reason if _VERBS else 'verbs is not compiled in'}",
)
BLOCK, BLOCKS = 2048, 512
NBYTES = BLOCK * BLOCKS
LITTLE = "mtu=512 max_qp_wr=100 max_rd_atomic=1 max_sge=2 max_inline=0"


@pytest.mark.parametrize(
    ("ours", "theirs", "said"),
    [
        ("mtu=512", "", "MTU 512"),
        ("max_qp_wr=100", "", ""),
        ("max_rd_atomic=2", "max_rd_atomic=3", "2 READs in flight"),
        ("max_sge=1", "max_sge=4", ""),
        ("max_inline=0", "", ""),
        ("devices=2", "devices=1", "in no rail: 1 port(s) of ours, 0 of the peer's"),
        (LITTLE, "", "1 READs in flight"),
        ("", LITTLE, "1 READs in flight"),
    ],
)
def test_writes_and_reads_go_both_ways_between_sides_that_differ(
    ours: str, theirs: str, said: str
) -> None:
    assert _VERBS is not None
    way = replace(_VERBS, verbs_push=True)
    target = PeerProcess("target", replace(way, nic=theirs))
    rng = np.random.default_rng(11)
    try:
        with replace(way, nic=ours).engine("driver", SECRET) as engine:
            target.call("add_region", "kv", NBYTES, "registered")
            local = engine.allocate(NBYTES, "kv")
            peer = engine.connect(target.address)
            remote = peer.regions["kv"]
            _, token = target.call("grant", "kv", 0, NBYTES, ttl_s=600)
            blocks = local.array.reshape(-1, BLOCK)
            # Neighbours over there, which are gathered, and blocks that have none.
            from_, into = rng.permutation(BLOCKS), np.arange(BLOCKS)
            into[BLOCKS // 2 :] = rng.permutation(into[BLOCKS // 2 :])
            for lease in (None, token):  # pulled by the target, pushed by us
                blocks[:] = rng.integers(0, 256, blocks.shape, np.uint8)
                engine.write(local, remote, from_ * BLOCK, into * BLOCK, BLOCK, lease=lease).wait(
                    TIMEOUT_S
                )
                there = np.frombuffer(target.call("bytes_of", "kv"), np.uint8).reshape(-1, BLOCK)
                assert np.array_equal(there[into], blocks[from_])
                blocks[:] = 0
                engine.read(local, remote, from_ * BLOCK, into * BLOCK, BLOCK).wait(TIMEOUT_S)
                assert np.array_equal(there[into], blocks[from_])
            # The other way: what the target asks for, pulled by us.
            target.call("fill", "kv", 7)
            target.call("await_region", "kv")
            assert "done" in target.call("write_back", "kv", "kv", 0, NBYTES)
            assert (local.array == 7).all()
            text = engine.explain(peer)
            assert said in text
            assert "our writes are pushed where they have a lease" in text
    finally:
        target.close()
        fake_verbs.set_plan("")
