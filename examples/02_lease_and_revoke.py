# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Memory is lent, not given: a write under a lease lands, and after revoke() none does any more."""

from __future__ import annotations

import numpy as np

import kvxfer

BLOCK = 1024

with kvxfer.TransferEngine("prefill") as prefill, kvxfer.TransferEngine("decode") as decode:
    pool = decode.allocate(32 * BLOCK, name="kv")
    offsets = np.array([4, 9, 11], dtype=np.int64) * BLOCK
    lease = decode.grant(pool, offsets, BLOCK, ttl_s=10, num_arrivals=3)

    mine = prefill.register(np.full(3 * BLOCK, 7, dtype=np.uint8), name="mine")
    remote = prefill.connect(decode.address).regions["kv"]
    for index in range(2):  # as a prefill worker does, layer by layer
        prefill.write(
            mine,
            remote,
            index * BLOCK,
            int(offsets[index]),
            BLOCK,
            lease=lease.token,
            arrival=index,
        ).wait(5)
    lease.wait_arrived([0, 1], timeout_s=5)
    print("arrived:", lease.arrived.tolist())

    lease.revoke(timeout_s=5)  # returns when nothing under it can land any more
    late = prefill.write(mine, remote, 0, int(offsets[2]), BLOCK, lease=lease.token, arrival=2)
    try:
        late.wait(5)
    except kvxfer.LeaseError as error:
        print("refused:", error)
    else:
        raise SystemExit("a write landed under a revoked lease")
    assert not pool.array[offsets[2] : offsets[2] + BLOCK].any()
