# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""mla_decode: one latent row per token for all heads, whose front is key and value, so each byte is loaded once.

64 heads are the rows of a dot, because from 64 on Triton emits wgmma; fewer heads are padded. With fewer rows it would
be mma.sync, which spills here. A latent wider than 256 comes in two halves, or converting an 8-bit one would spill too.
Splits have a fixed length and are merged in their order, as in paged_decode.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kvxfer.errors import InvalidArgumentError
from kvxfer.kernels.triton._common import (
    LOG2E,
    check_block_table,
    ids_are_checked,
    need_tensors,
    on_device_of,
    softmax_step,
)
from kvxfer.kernels.triton._numbers import as_operand, narrow, operand_dtype, widen
from kvxfer.kernels.triton.attention_decode import DEFAULT_SPLIT_SIZE, merge_splits, partial_sums

__all__ = ["mla_decode"]

MAX_LATENT_DIM = 512


@triton.jit  # type: ignore[untyped-decorator]
def mla_kernel(  # type: ignore[no-untyped-def]
    q_latent,  # [batch, num_q_heads, latent_dim]
    q_rope,  # [batch, num_q_heads, rope_dim]
    latent_cache,  # [num_blocks, block_size, latent_dim + rope_dim] by strides
    block_table,  # int32 [batch, max_blocks]
    seq_lens,  # int32 [batch]
    partial,  # float32 [batch, num_q_heads, num_splits, latent_dim]
    partial_lse,  # float32 [batch, num_q_heads, num_splits], base 2
    sm_scale,
    split_size,
    num_splits,
    num_q_heads,
    stride_ql_batch,
    stride_ql_head,
    stride_qr_batch,
    stride_qr_head,
    stride_block,
    stride_token,
    stride_table,
    stride_table_block,
    stride_len,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    LATENT: tl.constexpr,
    ROPE: tl.constexpr,
    BLOCK_L: tl.constexpr,  # LATENT, or at least half of it
    BLOCK_R: tl.constexpr,  # ROPE padded to what a dot takes
    FOLD: tl.constexpr,  # sm_scale > 0: see softmax_step
    OPERAND: tl.constexpr,
):
    batch = tl.program_id(0).to(tl.int64)
    split = tl.program_id(2)
    length = tl.load(seq_lens + batch * stride_len)
    begin = split * split_size
    end = tl.minimum(begin + split_size, length)
    # Splits behind the length write nothing: the merge knows which they are.
    if begin < end:
        row = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
        here = row < num_q_heads
        head = row.to(tl.int64)
        dl, dr = tl.arange(0, BLOCK_L), tl.arange(0, BLOCK_R)
        latent_at = q_latent + (batch * stride_ql_batch + head * stride_ql_head)[:, None]
        left_query = tl.load(
            latent_at + dl[None, :], mask=here[:, None] & (dl < LATENT)[None, :], other=0.0
        )
        left_query = as_operand(left_query, OPERAND)
        if BLOCK_L < LATENT:
            right_query = tl.load(
                latent_at + BLOCK_L + dl[None, :],
                mask=here[:, None] & (BLOCK_L + dl < LATENT)[None, :],
                other=0.0,
            )
            right_query = as_operand(right_query, OPERAND)
        rope_query = tl.load(
            q_rope + (batch * stride_qr_batch + head * stride_qr_head)[:, None] + dr[None, :],
            mask=here[:, None] & (dr < ROPE)[None, :],
            other=0.0,
        )
        rope_query = as_operand(rope_query, OPERAND)
        table = block_table + batch * stride_table
        sm_scale = sm_scale * LOG2E
        # Finite, because exp2(-inf - -inf) is NaN; far below every logit.
        highest = tl.full([BLOCK_H], -1e30, tl.float32)
        total = tl.zeros([BLOCK_H], tl.float32)
        left_sums = tl.zeros([BLOCK_H, BLOCK_L], tl.float32)
        right_sums = tl.zeros([BLOCK_H, BLOCK_L], tl.float32)
        for start in range(begin, end, BLOCK_N):
            at = start + tl.arange(0, BLOCK_N)
            seen = at < end
            # Rows out of range must be zeros, not what memory holds: 0 * NaN is NaN.
            block = tl.load(table + (at // BLOCK_SIZE) * stride_table_block, mask=seen, other=0)
            slot = (at % BLOCK_SIZE).to(tl.int64)
            rows = (latent_cache + block.to(tl.int64) * stride_block + slot * stride_token)[:, None]
            rope = tl.load(
                rows + LATENT + dr[None, :], mask=seen[:, None] & (dr < ROPE)[None, :], other=0.0
            )
            logits = tl.dot(rope_query, tl.trans(widen(rope, OPERAND)), input_precision="ieee")
            left = tl.load(
                rows + dl[None, :], mask=seen[:, None] & (dl < LATENT)[None, :], other=0.0
            )
            left = widen(left, OPERAND)
            logits = tl.dot(left_query, tl.trans(left), logits, input_precision="ieee")
            if BLOCK_L < LATENT:
                right = tl.load(
                    rows + BLOCK_L + dl[None, :],
                    mask=seen[:, None] & (BLOCK_L + dl < LATENT)[None, :],
                    other=0.0,
                )
                right = widen(right, OPERAND)
                logits = tl.dot(right_query, tl.trans(right), logits, input_precision="ieee")
            if not FOLD:
                logits = logits * sm_scale
            logits = tl.where(seen[None, :], logits, float("-inf"))
            weights, fade, total, highest = softmax_step(logits, highest, total, sm_scale, FOLD)
            weights = narrow(weights, OPERAND)
            left_sums = tl.dot(weights, left, left_sums * fade[:, None], input_precision="ieee")
            if BLOCK_L < LATENT:
                right_sums = tl.dot(
                    weights, right, right_sums * fade[:, None], input_precision="ieee"
                )
        place = (batch * num_q_heads + head) * num_splits + split
        target = partial + place[:, None] * LATENT + dl[None, :]
        inside = here[:, None] & (dl < LATENT)[None, :]
        tl.store(target, left_sums / total[:, None], mask=inside)
        if BLOCK_L < LATENT:
            inside = here[:, None] & (BLOCK_L + dl < LATENT)[None, :]
            tl.store(target + BLOCK_L, right_sums / total[:, None], mask=inside)
        tl.store(partial_lse + place, highest + tl.log2(total), mask=here)


def mla_decode(
    q_latent: torch.Tensor,
    q_rope: torch.Tensor,
    latent_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    *,
    sm_scale: float,
    kv_scale: float,
    split_size: int | None,
) -> None:
    """See :func:`kvxfer.kernels.mla_decode`."""
    need_tensors("q_latent", q_latent)
    batch, num_q_heads, latent_dim = q_latent.shape
    num_blocks, block_size, width = latent_cache.shape
    if latent_dim > MAX_LATENT_DIM:
        raise InvalidArgumentError(
            f"q_latent: the Triton kernel takes at most {MAX_LATENT_DIM} channels, given {latent_dim}"
        )
    if ids_are_checked(block_table):
        first = torch.zeros_like(seq_lens)
        check_block_table(block_table, first, seq_lens, num_blocks, block_size)
    if not batch:
        return
    split = DEFAULT_SPLIT_SIZE if split_size is None else split_size
    operand = operand_dtype(q_latent, latent_cache)
    # float32 has no tensor cores of its precision, and 64 rows of it do not fit the registers.
    block_h, block_n = (16, 16) if operand == tl.float32 else (64, 32)
    partial, partial_lse = partial_sums(q_latent, latent_dim, block_table, block_size, split)
    num_splits = partial.shape[2]
    with on_device_of(q_latent):
        mla_kernel[(batch, triton.cdiv(num_q_heads, block_h), num_splits)](
            q_latent, q_rope, latent_cache, block_table, seq_lens, partial, partial_lse,
            sm_scale * kv_scale, split, num_splits, num_q_heads,
            *q_latent.stride()[:2], *q_rope.stride()[:2], *latent_cache.stride()[:2],
            *block_table.stride(), seq_lens.stride(0),
            BLOCK_H=block_h, BLOCK_N=block_n, BLOCK_SIZE=block_size,
            LATENT=latent_dim, ROPE=width - latent_dim,
            BLOCK_L=min(MAX_LATENT_DIM // 2, max(16, triton.next_power_of_2(latent_dim))),
            BLOCK_R=max(16, triton.next_power_of_2(width - latent_dim)),
            FOLD=sm_scale * kv_scale > 0, OPERAND=operand,
            num_warps=8, num_stages=3,
        )  # fmt: skip
        merge_splits(
            partial, partial_lse, seq_lens, out, lse,
            v_scale=kv_scale, window_left=-1, sinks=None, split_size=split,
        )  # fmt: skip
