# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Two paged KV caches described, not guessed: the plan says which bytes go where, layer by layer."""

from __future__ import annotations

import numpy as np

import kvxfer

shape = {"num_layers": 4, "num_kv_heads": 2, "head_dim": 64, "block_size": 16, "dtype": "float32"}
prefill = kvxfer.KVLayout.hnd(num_blocks=64, **shape)
decode = kvxfer.KVLayout.hnd(num_blocks=256, **shape)
assert prefill.signature() == decode.signature()  # pool sizes are no part of it

plan = kvxfer.plan_transfer(
    prefill,
    decode,
    src_blocks=[5, 6, 7, 1],
    dst_blocks=[40, 41, 42, 99],
    num_tokens=60,
    by_layer=True,
)
print(plan.describe())

with kvxfer.TransferEngine("p") as source, kvxfer.TransferEngine("d") as target:
    kv_p = source.allocate(prefill.nbytes, name="kv")
    kv_d = target.allocate(decode.nbytes, name="kv")
    kv_p.array[:] = np.random.default_rng(0).integers(0, 256, prefill.nbytes, dtype=np.uint8)
    remote = source.connect(target.address).regions["kv"]
    for layer in range(4):
        source.write(kv_p, remote, *plan.template, bases=plan.for_layer(layer)).wait(5)
    for (k_p, v_p), (k_d, v_d) in zip(
        prefill.views(kv_p.array), decode.views(kv_d.array), strict=True
    ):
        # logical axes [block, token, head, channel]; the last block holds 12 tokens
        assert np.array_equal(k_d[[40, 41, 42]], k_p[[5, 6, 7]], equal_nan=True)
        assert np.array_equal(v_d[99, :12], v_p[1, :12], equal_nan=True)
        assert not v_d[99, 12:].any()
print("moved", int(plan.nbytes.sum()), "bytes")
