# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Two engines, one write: scattered blocks of one array land in another, then a notification says so."""

from __future__ import annotations

import select

import numpy as np

import kvxfer

BLOCK = 4096

with (
    kvxfer.TransferEngine("source") as source,
    kvxfer.TransferEngine("target") as target,
):
    # The target lets peers reach one region; allocate() memory can be mapped by peers on the same host.
    pool = target.allocate(64 * BLOCK, name="pool")
    data = np.random.default_rng(0).integers(0, 256, 16 * BLOCK, dtype=np.uint8)
    mine = source.register(data, name="mine")

    peer = source.connect(target.address)
    blocks = np.array([3, 60, 17, 18], dtype=np.int64)
    transfer = source.write(
        mine,
        peer.regions["pool"],
        np.arange(4, dtype=np.int64) * BLOCK,
        blocks * BLOCK,
        BLOCK,
        notify=b"four blocks",
    )
    transfer.wait(timeout_s=5)

    select.select([target.fileno()], [], [], 5)
    (message,) = target.notifications()
    assert message.payload == b"four blocks"
    assert np.array_equal(pool.array.reshape(64, BLOCK)[blocks], data.reshape(16, BLOCK)[:4])
    print(f"{transfer.nbytes_done} bytes over {transfer.transport}; {source.explain(peer)}")
