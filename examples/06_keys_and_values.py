# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""A sequence in vLLM's cache, attended over; then moved to the ranks of a decoder with other blocks, order and dtype."""

from __future__ import annotations

import numpy as np

from kvxfer import KVLayout, kernels, plan_transfer
from kvxfer.layout import transfer_pairs

MODEL = {"num_layers": 2, "num_kv_heads": 4, "head_dim": 64}
NUM_TOKENS = 40
rng = np.random.default_rng(0)

# One rank of prefill, as vLLM before 0.26 lays it out; two of decode, each with half of the heads.
prefill = KVLayout.vllm_split(**MODEL, dtype="float16", num_blocks=8, block_size=16)
decode = [
    KVLayout.hnd(**MODEL, dtype="float32", num_blocks=16, block_size=32, tp_size=2, tp_rank=rank)
    for rank in range(2)
]

# Prefill writes the new tokens of each layer into the slots of the blocks that the sequence was given.
cache = np.zeros(prefill.nbytes, np.uint8)
blocks = np.array([5, 2, 7])
slots = (blocks[:, None] * 16 + np.arange(16)).reshape(-1)[:NUM_TOKENS]
for keys, values in prefill.views(cache):
    new_k, new_v = (rng.normal(size=(NUM_TOKENS, 4, 64)).astype(np.float16) for _ in range(2))
    kernels.append_kv(new_k, new_v, keys, values, slots)

# The attention of the next token, over the blocks as they lie.
query = rng.normal(size=(1, 8, 64)).astype(np.float32)
table, lengths = blocks[None].astype(np.int32), np.array([NUM_TOKENS], np.int32)
before = [kernels.paged_decode(query, k, v, table, lengths) for k, v in prefill.views(cache)]

# For each pair of ranks that share layers and heads: which bytes go where. Values change their dtype on the way, so the
# sender packs them into a staging buffer; engine.write would carry that, by plan.bases and plan.template.
pools = [np.zeros(layout.nbytes, np.uint8) for layout in decode]
taken = np.array([3, 9])
for _, rank, layers in transfer_pairs([prefill], decode):
    plan = plan_transfer(prefill, decode[rank], blocks, taken, NUM_TOKENS, layers, kind="packed")
    staging = np.zeros(plan.staging_nbytes[0], np.uint8)
    kernels.pack_plan(plan, cache, staging)
    arrived = staging.copy()  # instead of a network
    kernels.unpack_plan(plan, arrived, pools[rank])
    print(plan.describe())

# Each rank of decode attends with its own heads; together they say what prefill's cache says.
table = taken[None].astype(np.int32)
for layer in range(2):
    parts = [
        kernels.paged_decode(query[:, 4 * rank : 4 * rank + 4], *views[layer], table, lengths)
        for rank, views in enumerate(
            layout.views(pool) for layout, pool in zip(decode, pools, strict=True)
        )
    ]
    assert np.allclose(np.concatenate(parts, axis=1), before[layer], atol=1e-3)
print("the decoder's attention equals prefill's")
