# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""paged_prefill: runs of new tokens over paged keys; one program per tile of rows and query head.

Keys come in three stretches: tiles that the window cuts, tiles that every row sees whole (no mask at all),
tiles that the diagonal or the length cuts. Plain tile loads; Triton emits wgmma from 64 rows on.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kvxfer.kernels.triton._common import (
    LOG2E,
    check_block_table,
    dot_in_float32,
    narrow,
    need_tensors,
    on_device_of,
    padded_width,
    soft_cap,
)

__all__ = ["PrefillConfig", "paged_prefill", "prefill_config"]


@dataclass(frozen=True)
class PrefillConfig:
    """Tile of one program, and how Triton shall compile it."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def prefill_config(head_dim: int, rows_per_sequence: int, *, wide: bool) -> PrefillConfig:
    """Tiles that fit Hopper's registers without spilling (compiled for sm_90 and looked at; see the tests).

    Three stages, because the block ids are an indirection that the pipeliner counts as one: with two they
    would be plain loads in the critical path.
    """
    if wide:  # float32 dots have no tensor core path that keeps float32's precision
        return PrefillConfig(32, 32, 4, 2)
    short = rows_per_sequence <= 64
    if head_dim > 128:
        return PrefillConfig(64, 32, 8, 3) if short else PrefillConfig(128, 32, 8, 3)
    if short:
        return PrefillConfig(64, 64, 4, 3)
    return PrefillConfig(128, 64, 8, 3) if head_dim > 64 else PrefillConfig(128, 128, 8, 3)


@triton.jit  # type: ignore[untyped-decorator]
def _attend(  # type: ignore[no-untyped-def]
    sums,
    total,
    highest,
    query,
    position,
    begin,
    end,
    length,
    k_base,
    v_base,
    table,
    sm_scale,
    cap,
    window_left,
    stride_k_block,
    stride_k_token,
    stride_v_block,
    stride_v_token,
    stride_table_block,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    WIDEN: tl.constexpr,
    SCALAR_BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WIDTH_K: tl.constexpr,
    WIDTH_V: tl.constexpr,
    BLOCK_DK: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Online softmax over the tiles of keys ``[begin, end)``, both multiples of BLOCK_N."""
    dk, dv = tl.arange(0, BLOCK_DK), tl.arange(0, BLOCK_DV)
    for start in range(begin, end, BLOCK_N):
        start = tl.multiple_of(start, BLOCK_N)
        key = start + tl.arange(0, BLOCK_N)
        valid = key < length
        if WINDOW:
            # Blocks in front of every row's window may be holes of the table.
            valid = valid & (key >= tl.min(position, 0) - window_left)
        if SCALAR_BLOCK:
            # A tile lies in one block: one id, and rows at a constant distance.
            block = tl.load(table + (start // BLOCK_SIZE) * stride_table_block).to(tl.int64)
            slot = (start % BLOCK_SIZE + tl.arange(0, BLOCK_N)).to(tl.int64)
            k_rows = k_base + block * stride_k_block + slot * stride_k_token
            v_rows = v_base + block * stride_v_block + slot * stride_v_token
        else:
            ids = table + (key // BLOCK_SIZE) * stride_table_block
            if MASKED:
                blocks = tl.load(ids, mask=valid, other=0).to(tl.int64)
            else:
                blocks = tl.load(ids).to(tl.int64)
            slot = (key % BLOCK_SIZE).to(tl.int64)
            k_rows = k_base + blocks * stride_k_block + slot * stride_k_token
            v_rows = v_base + blocks * stride_v_block + slot * stride_v_token
        k_at = k_rows[:, None] + dk[None, :]
        v_at = v_rows[:, None] + dv[None, :]
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
        if WIDEN:
            keys, values = keys.to(tl.float32), values.to(tl.float32)
        logits = tl.dot(query, tl.trans(keys), input_precision="ieee") * sm_scale
        if SOFT_CAP:
            logits = soft_cap(logits, cap)
        logits = logits * LOG2E
        if MASKED:
            seen = valid[None, :]
            if CAUSAL:
                seen = seen & (key[None, :] <= position[:, None])
            if WINDOW:
                seen = seen & (key[None, :] >= position[:, None] - window_left)
            logits = tl.where(seen, logits, float("-inf"))
        raised = tl.maximum(highest, tl.max(logits, 1))
        weights = tl.exp2(logits - raised[:, None])
        fade = tl.exp2(highest - raised)
        total = total * fade + tl.sum(weights, 1)
        sums = sums * fade[:, None]
        sums = tl.dot(weights.to(values.dtype), values, sums, input_precision="ieee")
        highest = raised
    return sums, total, highest


@triton.jit  # type: ignore[untyped-decorator]
def prefill_kernel(  # type: ignore[no-untyped-def]
    q,  # [num_tokens, num_q_heads, head_dim]
    k_cache,  # [num_blocks, block_size, num_kv_heads, head_dim] by strides
    v_cache,
    cu_seqlens_q,  # int32 [batch + 1], contiguous
    block_table,  # int32 [batch, max_blocks]
    seq_lens,  # int32 [batch], contiguous
    sinks,  # float32 [num_q_heads]
    out,  # [num_tokens, num_q_heads, head_dim_v]
    lse,  # float32 [num_tokens, num_q_heads], natural logarithm
    sm_scale,
    v_scale,
    cap,
    window_left,
    batch,
    num_q_heads,
    stride_q_token,
    stride_q_head,
    stride_k_block,
    stride_k_token,
    stride_k_head,
    stride_v_block,
    stride_v_token,
    stride_v_head,
    stride_table,
    stride_table_block,
    stride_out_token,
    stride_out_head,
    GROUP: tl.constexpr,
    BLOCK_B: tl.constexpr,  # batch padded to a power of two
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WIDTH_K: tl.constexpr,
    WIDTH_V: tl.constexpr,
    BLOCK_DK: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_LSE: tl.constexpr,
    WIDEN: tl.constexpr,
    SCALAR_BLOCK: tl.constexpr,
):
    # Which sequence and which of its tiles: every program looks at all lengths, so that the grid needs
    # only the number of tokens and no length ever travels to the host.
    sequences = tl.arange(0, BLOCK_B)
    first_rows = tl.load(cu_seqlens_q + sequences, mask=sequences < batch, other=0)
    end_rows = tl.load(cu_seqlens_q + sequences + 1, mask=sequences < batch, other=0)
    tiles = (end_rows - first_rows + BLOCK_M - 1) // BLOCK_M
    tile_ends = tl.cumsum(tiles, 0)
    tile = tl.program_id(0)
    sequence = tl.sum((tile_ends <= tile).to(tl.int32), 0)
    if sequence < batch:
        sequence_end = tl.sum(tl.where(sequences == sequence, tile_ends, 0), 0)
        first_row = tl.load(cu_seqlens_q + sequence)
        num_rows = tl.load(cu_seqlens_q + sequence + 1) - first_row
        length = tl.load(seq_lens + sequence)
        # The last tiles have the most keys: they start first.
        first = (sequence_end - 1 - tile) * BLOCK_M
        row = first + tl.arange(0, BLOCK_M)
        inside = row < num_rows
        position = length - num_rows + row
        head = tl.program_id(1)
        dk, dv = tl.arange(0, BLOCK_DK), tl.arange(0, BLOCK_DV)
        token = (first_row + row).to(tl.int64)
        query = tl.load(
            q + token[:, None] * stride_q_token + head.to(tl.int64) * stride_q_head + dk[None, :],
            mask=inside[:, None] & (dk < WIDTH_K)[None, :],
            other=0.0,
        )
        if WIDEN:
            query = query.to(tl.float32)
        kv_head = (head // GROUP).to(tl.int64)
        k_base = k_cache + kv_head * stride_k_head
        v_base = v_cache + kv_head * stride_v_head
        table = block_table + sequence.to(tl.int64) * stride_table
        lowest = length - num_rows + first
        uppermost = length - num_rows + tl.minimum(first + BLOCK_M, num_rows) - 1
        # Keys of [whole_begin, whole_end) are seen by every row; both ends and all between are tile ends.
        end = tl.cdiv(length, BLOCK_N) * BLOCK_N
        whole_end = length // BLOCK_N * BLOCK_N
        if CAUSAL:
            end = tl.minimum(end, (uppermost // BLOCK_N + 1) * BLOCK_N)
            whole_end = tl.minimum(whole_end, (lowest + 1) // BLOCK_N * BLOCK_N)
        begin = end * 0
        whole_begin = begin
        if WINDOW:
            begin = tl.maximum(lowest - window_left, 0) // BLOCK_N * BLOCK_N
            whole_begin = tl.cdiv(tl.maximum(uppermost - window_left, 0), BLOCK_N) * BLOCK_N
            whole_begin = tl.minimum(whole_begin, end)
        whole_end = tl.maximum(whole_end, whole_begin)
        highest = tl.full([BLOCK_M], -1e30, tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        sums = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
        if WINDOW:
            sums, total, highest = _attend(
                sums, total, highest, query, position, begin, whole_begin, length, k_base, v_base, table,
                sm_scale, cap, window_left, stride_k_block, stride_k_token, stride_v_block, stride_v_token,
                stride_table_block, True, CAUSAL, WINDOW, SOFT_CAP, WIDEN, SCALAR_BLOCK, BLOCK_N, BLOCK_SIZE,
                WIDTH_K, WIDTH_V, BLOCK_DK, BLOCK_DV,
            )  # fmt: skip
        sums, total, highest = _attend(
            sums, total, highest, query, position, whole_begin, whole_end, length, k_base, v_base, table,
            sm_scale, cap, window_left, stride_k_block, stride_k_token, stride_v_block, stride_v_token,
            stride_table_block, False, CAUSAL, WINDOW, SOFT_CAP, WIDEN, SCALAR_BLOCK, BLOCK_N, BLOCK_SIZE,
            WIDTH_K, WIDTH_V, BLOCK_DK, BLOCK_DV,
        )  # fmt: skip
        sums, total, highest = _attend(
            sums, total, highest, query, position, whole_end, end, length, k_base, v_base, table,
            sm_scale, cap, window_left, stride_k_block, stride_k_token, stride_v_block, stride_v_token,
            stride_table_block, True, CAUSAL, WINDOW, SOFT_CAP, WIDEN, SCALAR_BLOCK, BLOCK_N, BLOCK_SIZE,
            WIDTH_K, WIDTH_V, BLOCK_DK, BLOCK_DV,
        )  # fmt: skip
        if HAS_SINKS:
            sink = tl.load(sinks + head) * LOG2E
            raised = tl.maximum(highest, sink)
            fade = tl.exp2(highest - raised)
            sums = sums * fade[:, None]
            total = total * fade + tl.exp2(sink - raised)
            highest = raised
        safe = tl.where(total == 0.0, 1.0, total)
        values = sums / safe[:, None] * v_scale
        target = out + token[:, None] * stride_out_token + head.to(tl.int64) * stride_out_head
        tl.store(
            target + dv[None, :],
            narrow(values, out.dtype.element_ty),
            mask=inside[:, None] & (dv < WIDTH_V)[None, :],
        )
        if HAS_LSE:
            merged = (highest + tl.log2(safe)) * 0.6931471805599453
            merged = tl.where(total == 0.0, float("-inf"), merged)
            tl.store(lse + token * num_q_heads + head, merged, mask=inside)


def paged_prefill(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    *,
    causal: bool,
    sm_scale: float,
    v_scale: float,
    window_left: int,
    logits_soft_cap: float,
    sinks: torch.Tensor | None,
) -> None:
    """See :func:`kvxfer.kernels.paged_prefill`."""
    need_tensors("q", q)
    num_tokens, num_q_heads, width_k = q.shape
    num_blocks, block_size, num_kv_heads, width_v = v_cache.shape
    batch = seq_lens.shape[0]
    if not num_tokens or not batch:
        return
    cu_seqlens_q, seq_lens = cu_seqlens_q.contiguous(), seq_lens.contiguous()
    rows = cu_seqlens_q[1:] - cu_seqlens_q[:-1]
    first_keys = (seq_lens - rows - window_left) if window_left >= 0 else torch.zeros_like(seq_lens)
    # A sequence without new rows reads nothing, so its row of the table may hold anything.
    check_block_table(
        block_table, first_keys, torch.where(rows > 0, seq_lens, 0), num_blocks, block_size
    )
    block_dk, block_dv = padded_width("q", width_k), padded_width("v_cache", width_v)
    wide = dot_in_float32(q, k_cache)
    config = prefill_config(max(block_dk, block_dv), num_tokens // batch, wide=wide)
    # Each sequence rounds its tiles up, by less than one.
    num_tiles = num_tokens // config.block_m + batch
    with on_device_of(q):
        prefill_kernel[(num_tiles, num_q_heads)](
            q, k_cache, v_cache, cu_seqlens_q, block_table, seq_lens,
            q if sinks is None else sinks, out, q if lse is None else lse,
            sm_scale, v_scale, logits_soft_cap, window_left, batch, num_q_heads,
            *q.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3],
            *block_table.stride(), *out.stride()[:2],
            GROUP=num_q_heads // num_kv_heads, BLOCK_B=triton.next_power_of_2(batch),
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_SIZE=block_size,
            WIDTH_K=width_k, WIDTH_V=width_v, BLOCK_DK=block_dk, BLOCK_DV=block_dv,
            CAUSAL=causal, WINDOW=window_left >= 0, SOFT_CAP=logits_soft_cap > 0,
            HAS_SINKS=sinks is not None, HAS_LSE=lse is not None, WIDEN=wide,
            SCALAR_BLOCK=block_size % config.block_n == 0,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
