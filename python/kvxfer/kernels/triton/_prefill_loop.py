# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""The loop of paged_prefill over tiles of keys."""

from __future__ import annotations

import triton
import triton.language as tl

from kvxfer.kernels.triton._common import LOG2E, soft_cap, softmax_step
from kvxfer.kernels.triton._numbers import narrow, widen

__all__ = ["attend"]


@triton.jit  # type: ignore[untyped-decorator]
def attend(  # type: ignore[no-untyped-def]
    sums,
    total,
    highest,
    peak,
    query,
    position,
    begin,
    end,
    length,
    k_base,
    v_base,
    k_scales,
    v_scales,
    table,
    sm_scale,
    cap,
    window_left,
    stride_k_block,
    stride_k_token,
    stride_v_block,
    stride_v_token,
    stride_ks_block,
    stride_ks_token,
    stride_vs_block,
    stride_vs_token,
    stride_table_block,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    FOLD: tl.constexpr,
    SCALED: tl.constexpr,
    OPERAND: tl.constexpr,
    OFFSET: tl.constexpr,
    SAME_STRIDES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WIDTH_K: tl.constexpr,
    WIDTH_V: tl.constexpr,
    BLOCK_DK: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Online softmax over the tiles of keys ``[begin, end)``, both multiples of BLOCK_N."""
    # Addresses are the larger part of what is left to save: all that no tile changes is added up before the loop.
    dk, dv, within = tl.arange(0, BLOCK_DK), tl.arange(0, BLOCK_DV), tl.arange(0, BLOCK_N)
    WHOLE_BLOCKS: tl.constexpr = BLOCK_SIZE < BLOCK_N and BLOCK_N % BLOCK_SIZE == 0
    SCALAR_BLOCK: tl.constexpr = BLOCK_SIZE % BLOCK_N == 0
    if WHOLE_BLOCKS:
        slot = (within % BLOCK_SIZE).to(tl.int64)
        k_rows = (k_base + slot * stride_k_token)[:, None] + dk[None, :]
        v_rows = (v_base + slot * stride_v_token)[:, None] + dv[None, :]
    for start in range(begin, end, BLOCK_N):
        start = tl.multiple_of(start, BLOCK_N)
        key = start + within
        valid = key < length
        if WINDOW:
            # Blocks in front of every row's window may be holes of the table.
            valid = valid & (key >= tl.min(position, 0) - window_left)
        if SCALAR_BLOCK:
            # A tile lies in one block: one id, and rows at a constant distance.
            block = tl.load(table + (start // BLOCK_SIZE) * stride_table_block).to(tl.int64)
            slot = (start % BLOCK_SIZE + within).to(tl.int64)
        else:
            if WHOLE_BLOCKS:
                ids = table + (start // BLOCK_SIZE + within // BLOCK_SIZE) * stride_table_block
            else:
                ids = table + (key // BLOCK_SIZE) * stride_table_block
                slot = (key % BLOCK_SIZE).to(tl.int64)
            if MASKED:
                block = tl.load(ids, mask=valid, other=0).to(OFFSET)
            else:
                block = tl.load(ids).to(OFFSET)
        k_block = block * stride_k_block
        v_block = k_block if SAME_STRIDES else block * stride_v_block
        if WHOLE_BLOCKS:
            k_at, v_at = k_rows + k_block[:, None], v_rows + v_block[:, None]
        else:
            k_at = (k_base + k_block + slot * stride_k_token)[:, None] + dk[None, :]
            v_at = (v_base + v_block + slot * stride_v_token)[:, None] + dv[None, :]
        # Rows past the length must be zeros, not what memory holds: 0 * NaN is NaN.
        if MASKED:
            keys = tl.load(k_at, mask=valid[:, None] & (dk < WIDTH_K)[None, :], other=0.0)
            values = tl.load(v_at, mask=valid[:, None] & (dv < WIDTH_V)[None, :], other=0.0)
        else:
            if WIDTH_K == BLOCK_DK:
                keys = tl.load(k_at)
            else:
                keys = tl.load(k_at, mask=(dk < WIDTH_K)[None, :], other=0.0)
            if WIDTH_V == BLOCK_DV:
                values = tl.load(v_at)
            else:
                values = tl.load(v_at, mask=(dv < WIDTH_V)[None, :], other=0.0)
        keys, values = widen(keys, OPERAND), widen(values, OPERAND)
        logits = tl.dot(query, tl.trans(keys), input_precision="ieee")
        if SCALED:
            scales_at = k_scales + block.to(tl.int64) * stride_ks_block + slot * stride_ks_token
            logits = logits * tl.load(scales_at, mask=valid, other=0.0)[None, :]
        if not FOLD:
            logits = logits * sm_scale
        if SOFT_CAP:
            logits = soft_cap(logits, cap) * LOG2E
        if MASKED:
            # No row of the sequence stands past its length, and what other rows hold is not stored.
            seen = key[None, :] <= position[:, None] if CAUSAL else valid[None, :]
            if WINDOW:
                seen = seen & (key[None, :] >= position[:, None] - window_left)
            logits = tl.where(seen, logits, float("-inf"))
        weights, fade, total, highest = softmax_step(logits, highest, total, sm_scale, FOLD)
        if SCALED:
            # Weights stay at most 1 whatever the scales are, since float16 ends at 65504 and at 6e-8.
            v_scale = tl.load(
                v_scales + block.to(tl.int64) * stride_vs_block + slot * stride_vs_token,
                mask=valid,
                other=0.0,
            )
            top = tl.maximum(peak, tl.max(tl.abs(v_scale), 0))
            weights = weights * (v_scale / top)[None, :]
            fade = fade * (peak / top)
            peak = top
        sums = sums * fade[:, None]
        sums = tl.dot(narrow(weights, OPERAND), values, sums, input_precision="ieee")
    return sums, total, highest, peak
