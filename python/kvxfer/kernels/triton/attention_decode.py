# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""paged_decode: one query per sequence, the GQA group packed into the rows of a dot, split-KV."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kvxfer.kernels.triton._common import (
    LOG2E,
    check_block_table,
    ids_are_checked,
    need_tensors,
    on_device_of,
    padded_width,
    scale_arguments,
    soft_cap,
    softmax_step,
)
from kvxfer.kernels.triton._numbers import as_operand, narrow, operand_dtype, widen

__all__ = ["DEFAULT_SPLIT_SIZE", "merge_splits", "paged_decode", "partial_sums"]

# Fixed, so that a sequence's result depends neither on its batch nor on the machine; 32k tokens make 64.
DEFAULT_SPLIT_SIZE = 512


@triton.jit  # type: ignore[untyped-decorator]
def decode_kernel(  # type: ignore[no-untyped-def]
    q,  # [batch, num_q_heads, head_dim]
    k_cache,  # [num_blocks, block_size, num_kv_heads, head_dim] by strides
    v_cache,
    block_table,  # int32 [batch, max_blocks]
    seq_lens,  # int32 [batch]
    partial,  # float32 [batch, num_q_heads, num_splits, head_dim_v]
    partial_lse,  # float32 [batch, num_q_heads, num_splits], base 2
    k_scales,  # float32 [num_blocks, block_size, num_kv_heads] by strides; used if SCALED
    v_scales,
    sm_scale,
    cap,
    window_left,
    split_size,
    num_splits,
    num_q_heads,
    stride_q_batch,
    stride_q_head,
    stride_k_block,
    stride_k_token,
    stride_k_head,
    stride_v_block,
    stride_v_token,
    stride_v_head,
    stride_ks_block,
    stride_ks_token,
    stride_ks_head,
    stride_vs_block,
    stride_vs_token,
    stride_vs_head,
    stride_table,
    stride_table_block,
    stride_len,
    GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr,  # GROUP padded to the rows of a dot
    BLOCK_N: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WIDTH_K: tl.constexpr,
    WIDTH_V: tl.constexpr,
    BLOCK_DK: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    FOLD: tl.constexpr,  # sm_scale > 0 and no cap: see softmax_step
    SCALED: tl.constexpr,
    WINDOW: tl.constexpr,
    OPERAND: tl.constexpr,
):
    batch = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    length = tl.load(seq_lens + batch * stride_len)
    begin = split * split_size
    end = tl.minimum(begin + split_size, length)
    if WINDOW:
        begin = tl.maximum(begin, length - 1 - window_left)
    # Splits that hold no visible key write nothing: the merge knows which they are.
    if begin < end:
        row = tl.arange(0, BLOCK_G)
        in_group = row < GROUP
        head = (kv_head * GROUP + row).to(tl.int64)
        dk, dv = tl.arange(0, BLOCK_DK), tl.arange(0, BLOCK_DV)
        query = tl.load(
            q + batch * stride_q_batch + head[:, None] * stride_q_head + dk[None, :],
            mask=in_group[:, None] & (dk < WIDTH_K)[None, :],
            other=0.0,
        )
        query = as_operand(query, OPERAND)
        if not SOFT_CAP:
            sm_scale = sm_scale * LOG2E
        if SCALED:
            k_scales += kv_head.to(tl.int64) * stride_ks_head
            v_scales += kv_head.to(tl.int64) * stride_vs_head
        peak = tl.full([], 1e-30, tl.float32)
        k_base = k_cache + kv_head.to(tl.int64) * stride_k_head
        v_base = v_cache + kv_head.to(tl.int64) * stride_v_head
        table = block_table + batch * stride_table
        # Finite, because exp2(-inf - -inf) is NaN; far below every logit.
        highest = tl.full([BLOCK_G], -1e30, tl.float32)
        total = tl.zeros([BLOCK_G], tl.float32)
        sums = tl.zeros([BLOCK_G, BLOCK_DV], tl.float32)
        # Tiles at multiples of BLOCK_N from the split's own begin, so that a window does not move them.
        for start in range(begin // BLOCK_N * BLOCK_N, end, BLOCK_N):
            at = start + tl.arange(0, BLOCK_N)
            seen = (at >= begin) & (at < end)
            # Rows out of range must be zeros, not what memory holds: 0 * NaN is NaN.
            block = tl.load(table + (at // BLOCK_SIZE) * stride_table_block, mask=seen, other=0)
            block = block.to(tl.int64)
            slot = (at % BLOCK_SIZE).to(tl.int64)
            k_rows = k_base + block * stride_k_block + slot * stride_k_token
            keys = tl.load(
                k_rows[:, None] + dk[None, :],
                mask=seen[:, None] & (dk < WIDTH_K)[None, :],
                other=0.0,
            )
            v_rows = v_base + block * stride_v_block + slot * stride_v_token
            values = tl.load(
                v_rows[:, None] + dv[None, :],
                mask=seen[:, None] & (dv < WIDTH_V)[None, :],
                other=0.0,
            )
            keys, values = widen(keys, OPERAND), widen(values, OPERAND)
            logits = tl.dot(query, tl.trans(keys), input_precision="ieee")
            if SCALED:
                scales_at = k_scales + block * stride_ks_block + slot * stride_ks_token
                logits = logits * tl.load(scales_at, mask=seen, other=0.0)[None, :]
            if not FOLD:
                logits = logits * sm_scale
            if SOFT_CAP:
                logits = soft_cap(logits, cap) * LOG2E
            logits = tl.where(seen[None, :], logits, float("-inf"))
            weights, fade, total, highest = softmax_step(logits, highest, total, sm_scale, FOLD)
            if SCALED:
                # Weights stay at most 1 whatever the scales are, since float16 ends at 65504 and at 6e-8.
                v_scale = tl.load(
                    v_scales + block * stride_vs_block + slot * stride_vs_token,
                    mask=seen,
                    other=0.0,
                )
                top = tl.maximum(peak, tl.max(tl.abs(v_scale), 0))
                weights = weights * (v_scale / top)[None, :]
                fade = fade * (peak / top)
                peak = top
            sums = sums * fade[:, None]
            sums = tl.dot(narrow(weights, OPERAND), values, sums, input_precision="ieee")
        if SCALED:
            sums = sums * peak
        place = (batch * num_q_heads + head) * num_splits + split
        tl.store(
            partial + place[:, None] * WIDTH_V + dv[None, :],
            sums / total[:, None],
            mask=in_group[:, None] & (dv < WIDTH_V)[None, :],
        )
        tl.store(partial_lse + place, highest + tl.log2(total), mask=in_group)


@triton.jit  # type: ignore[untyped-decorator]
def merge_splits_kernel(  # type: ignore[no-untyped-def]
    partial,
    partial_lse,
    seq_lens,
    sinks,  # float32 [num_q_heads]
    out,  # [batch, num_q_heads, head_dim_v]
    lse,  # float32 [batch, num_q_heads], natural logarithm
    v_scale,
    window_left,
    split_size,
    num_splits,
    num_q_heads,
    stride_len,
    stride_out_batch,
    stride_out_head,
    WIDTH_V: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_LSE: tl.constexpr,
):
    batch = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    length = tl.load(seq_lens + batch * stride_len)
    begin = length * 0
    if WINDOW:
        begin = tl.maximum(length - 1 - window_left, 0)
    dv = tl.arange(0, BLOCK_DV)
    place = (batch * num_q_heads + head) * num_splits
    highest = tl.full([], -1e30, tl.float32)
    total = tl.zeros([], tl.float32)
    sums = tl.zeros([BLOCK_DV], tl.float32)
    # In split order, whatever order the splits finished in: bitwise repeatable.
    for split in range(begin // split_size, (length + split_size - 1) // split_size):
        one = tl.load(partial_lse + place + split)
        values = tl.load(partial + (place + split) * WIDTH_V + dv, mask=dv < WIDTH_V, other=0.0)
        raised = tl.maximum(highest, one)
        fade, weight = tl.exp2(highest - raised), tl.exp2(one - raised)
        sums = sums * fade + values * weight
        total = total * fade + weight
        highest = raised
    if HAS_SINKS:
        sink = tl.load(sinks + head) * LOG2E
        raised = tl.maximum(highest, sink)
        fade = tl.exp2(highest - raised)
        sums = sums * fade
        total = total * fade + tl.exp2(sink - raised)
        highest = raised
    safe = tl.where(total == 0.0, 1.0, total)
    target = out + batch * stride_out_batch + head * stride_out_head + dv
    tl.store(target, narrow(sums / safe * v_scale, out.dtype.element_ty), mask=dv < WIDTH_V)
    if HAS_LSE:
        merged = (highest + tl.log2(safe)) * 0.6931471805599453
        tl.store(lse + batch * num_q_heads + head, tl.where(total == 0.0, float("-inf"), merged))


def partial_sums(
    q: torch.Tensor, width: int, block_table: torch.Tensor, block_size: int, split_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for one partial output and LSE per split. Their number follows from the table's width, which bounds
    all lengths, so that a CUDA graph stays right when lengths change.
    """
    num_splits = max(1, triton.cdiv(block_table.shape[1] * block_size, split_size))
    shape = (*q.shape[:2], num_splits)
    partial = torch.empty((*shape, width), dtype=torch.float32, device=q.device)
    return partial, torch.empty(shape, dtype=torch.float32, device=q.device)


def merge_splits(
    partial: torch.Tensor,
    partial_lse: torch.Tensor,
    seq_lens: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    *,
    v_scale: float,
    window_left: int,
    sinks: torch.Tensor | None,
    split_size: int,
) -> None:
    """The splits of each sequence and head into its output, in their order."""
    batch, num_q_heads, num_splits, width = partial.shape
    merge_splits_kernel[(batch, num_q_heads)](
        partial, partial_lse, seq_lens, partial_lse if sinks is None else sinks,
        out, partial_lse if lse is None else lse,
        v_scale, window_left, split_size, num_splits, num_q_heads,
        seq_lens.stride(0), *out.stride()[:2],
        WIDTH_V=width, BLOCK_DV=triton.next_power_of_2(width), WINDOW=window_left >= 0,
        HAS_SINKS=sinks is not None, HAS_LSE=lse is not None,
        num_warps=4,
    )  # fmt: skip


def paged_decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    *,
    sm_scale: float,
    v_scale: float,
    window_left: int,
    logits_soft_cap: float,
    sinks: torch.Tensor | None,
    split_size: int | None,
    k_scale_cache: torch.Tensor | None = None,
    v_scale_cache: torch.Tensor | None = None,
) -> None:
    """See :func:`kvxfer.kernels.paged_decode`."""
    need_tensors("q", q)
    batch, num_q_heads, width_k = q.shape
    num_blocks, block_size, num_kv_heads, width_v = v_cache.shape
    if ids_are_checked(block_table):
        first = (seq_lens - 1 - window_left) if window_left >= 0 else torch.zeros_like(seq_lens)
        check_block_table(block_table, first, seq_lens, num_blocks, block_size)
    if not batch:
        return
    split = DEFAULT_SPLIT_SIZE if split_size is None else split_size
    group = num_q_heads // num_kv_heads
    block_dk, block_dv = padded_width("q", width_k), padded_width("v_cache", width_v)
    wide = max(block_dk, block_dv) * q.element_size()
    partial, partial_lse = partial_sums(q, width_v, block_table, block_size, split)
    num_splits = partial.shape[2]
    scales = scale_arguments(k_scale_cache, v_scale_cache, q)
    with on_device_of(q):
        decode_kernel[(batch, num_kv_heads, num_splits)](
            q, k_cache, v_cache, block_table, seq_lens, partial, partial_lse, *scales[:2],
            sm_scale, logits_soft_cap, window_left, split, num_splits, num_q_heads,
            *q.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3], *scales[2:],
            *block_table.stride(), seq_lens.stride(0),
            GROUP=group, BLOCK_G=max(16, triton.next_power_of_2(group)),
            BLOCK_N=64 if wide <= 256 else 32, BLOCK_SIZE=block_size,
            WIDTH_K=width_k, WIDTH_V=width_v, BLOCK_DK=block_dk, BLOCK_DV=block_dv,
            SOFT_CAP=logits_soft_cap > 0, FOLD=sm_scale > 0 and logits_soft_cap == 0,
            SCALED=k_scale_cache is not None, WINDOW=window_left >= 0,
            OPERAND=operand_dtype(q, k_cache),
            num_warps=4, num_stages=3,
        )  # fmt: skip
        merge_splits(
            partial, partial_lse, seq_lens, out, lse,
            v_scale=v_scale, window_left=window_left, sinks=sinks, split_size=split,
        )  # fmt: skip
