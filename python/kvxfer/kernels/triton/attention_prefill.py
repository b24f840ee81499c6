# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""paged_prefill: runs of new tokens over paged keys; one program per tile of rows and query head.

Keys come in three stretches: tiles that the window cuts, tiles that every row sees whole (no mask at all),
tiles that the diagonal or the length cuts. Plain tile loads; Triton emits wgmma from 64 rows on. Where sequences
bring fewer rows than a tile has, the heads of a GQA group share a tile, as rows of it. 8-bit caches become float16
after the load (``_numbers.operand_dtype``). Within a masked tile a weight of 0 meets whatever V holds, and 0 * NaN is
NaN: to leave such keys out row by row would take a second product, or V's tile in registers. Tiles come from ``_tiles``, which can also be told to measure.
"""

from __future__ import annotations

from typing import Any

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
)
from kvxfer.kernels.triton._numbers import as_operand, narrow, operand_dtype
from kvxfer.kernels.triton._prefill_loop import attend
from kvxfer.kernels.triton._tiles import (
    EDGE_N,
    INVARIANT_ROWS,
    PrefillShape,
    PrefillTile,
    prefill_tile,
)

__all__ = ["is_plain", "paged_prefill", "prefill_shape", "run_prefill"]


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
    k_scales,  # float32 [num_blocks, block_size, num_kv_heads] by strides; used if SCALED
    v_scales,
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
    stride_ks_block,
    stride_ks_token,
    stride_ks_head,
    stride_vs_block,
    stride_vs_token,
    stride_vs_head,
    stride_table,
    stride_table_block,
    stride_out_token,
    stride_out_head,
    GROUP: tl.constexpr,
    PACK: tl.constexpr,  # heads that share a tile: GROUP, or 1
    BLOCK_B: tl.constexpr,  # batch padded to a power of two
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # keys per tile that every row sees whole
    EDGE_N: tl.constexpr,  # keys per tile that is masked; divides BLOCK_N
    BLOCK_SIZE: tl.constexpr,
    WIDTH_K: tl.constexpr,
    WIDTH_V: tl.constexpr,
    BLOCK_DK: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    FOLD: tl.constexpr,  # sm_scale > 0 and no cap: see softmax_step
    SCALED: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_LSE: tl.constexpr,
    OPERAND: tl.constexpr,
    OFFSET: tl.constexpr,  # integers that hold every offset into the caches, in elements
    SAME_STRIDES: tl.constexpr,  # blocks of K and of V are equally far apart
):
    # Which sequence and which of its tiles: every program looks at all lengths, so that the grid needs
    # only the number of tokens and no length ever travels to the host.
    tile = tl.program_id(0)
    index = tl.arange(0, BLOCK_B)
    starts = tl.load(cu_seqlens_q + index, mask=index < batch, other=0)
    ends = tl.load(cu_seqlens_q + index + 1, mask=index < batch, other=0)
    tiles = tl.cdiv((ends - starts) * PACK, BLOCK_M)
    tiles_until = tl.cumsum(tiles, 0)
    sequence = tl.sum((tiles_until <= tile).to(tl.int32), 0)
    if sequence < batch:
        start = tl.load(cu_seqlens_q + sequence)
        num_rows = tl.load(cu_seqlens_q + sequence + 1) - start
        length = tl.load(seq_lens + sequence)
        # Longest tiles first, so that no long one starts when all others are done.
        tile_in_sequence = tl.sum(tl.where(index == sequence, tiles_until, 0), 0) - 1 - tile
        first = tile_in_sequence * BLOCK_M
        at = first + tl.arange(0, BLOCK_M)
        inside = at < num_rows * PACK
        row = at // PACK
        position = length - num_rows + row
        head = tl.program_id(1) * PACK + at % PACK
        token = (start + row).to(tl.int64)
        dk, dv = tl.arange(0, BLOCK_DK), tl.arange(0, BLOCK_DV)
        query = tl.load(
            q + (token * stride_q_token + head.to(tl.int64) * stride_q_head)[:, None] + dk[None, :],
            mask=inside[:, None] & (dk < WIDTH_K)[None, :],
            other=0.0,
        )
        query = as_operand(query, OPERAND)
        kv_head = (tl.program_id(1) * PACK // GROUP).to(tl.int64)
        k_base = k_cache + kv_head * stride_k_head
        v_base = v_cache + kv_head * stride_v_head
        if SCALED:
            k_scales += kv_head * stride_ks_head
            v_scales += kv_head * stride_vs_head
        table = block_table + sequence.to(tl.int64) * stride_table
        if not SOFT_CAP:
            sm_scale = sm_scale * LOG2E
        lowest = length - num_rows + first // PACK
        uppermost = length - num_rows + (tl.minimum(first + BLOCK_M, num_rows * PACK) - 1) // PACK
        # Keys of [whole_begin, whole_end) are seen by every row; its ends are multiples of BLOCK_N if it has any.
        end = tl.cdiv(length, EDGE_N) * EDGE_N
        whole_end = length // BLOCK_N * BLOCK_N
        if CAUSAL:
            end = tl.minimum(end, (uppermost // EDGE_N + 1) * EDGE_N)
            whole_end = tl.minimum(whole_end, (lowest + 1) // BLOCK_N * BLOCK_N)
        begin = end * 0
        whole_begin = begin
        if WINDOW:
            begin = tl.maximum(lowest - window_left, 0) // EDGE_N * EDGE_N
            whole_begin = tl.cdiv(tl.maximum(uppermost - window_left, 0), BLOCK_N) * BLOCK_N
            whole_begin = tl.minimum(whole_begin, end)
        whole_end = tl.maximum(whole_end, whole_begin)
        highest = tl.full([BLOCK_M], -1e30, tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        sums = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
        peak = tl.full([], 1e-30, tl.float32)
        if WINDOW:
            sums, total, highest, peak = attend(
                sums, total, highest, peak, query, position, begin, whole_begin, length,
                k_base, v_base, k_scales, v_scales, table, sm_scale, cap, window_left,
                stride_k_block, stride_k_token, stride_v_block, stride_v_token,
                stride_ks_block, stride_ks_token, stride_vs_block, stride_vs_token, stride_table_block,
                True, CAUSAL, WINDOW, SOFT_CAP, FOLD, SCALED, OPERAND, OFFSET, SAME_STRIDES, EDGE_N, BLOCK_SIZE,
                WIDTH_K, WIDTH_V, BLOCK_DK, BLOCK_DV,
            )  # fmt: skip
        sums, total, highest, peak = attend(
            sums, total, highest, peak, query, position, whole_begin, whole_end, length,
            k_base, v_base, k_scales, v_scales, table, sm_scale, cap, window_left,
            stride_k_block, stride_k_token, stride_v_block, stride_v_token,
            stride_ks_block, stride_ks_token, stride_vs_block, stride_vs_token, stride_table_block,
            False, CAUSAL, WINDOW, SOFT_CAP, FOLD, SCALED, OPERAND, OFFSET, SAME_STRIDES, BLOCK_N, BLOCK_SIZE,
            WIDTH_K, WIDTH_V, BLOCK_DK, BLOCK_DV,
        )  # fmt: skip
        sums, total, highest, peak = attend(
            sums, total, highest, peak, query, position, whole_end, end, length,
            k_base, v_base, k_scales, v_scales, table, sm_scale, cap, window_left,
            stride_k_block, stride_k_token, stride_v_block, stride_v_token,
            stride_ks_block, stride_ks_token, stride_vs_block, stride_vs_token, stride_table_block,
            True, CAUSAL, WINDOW, SOFT_CAP, FOLD, SCALED, OPERAND, OFFSET, SAME_STRIDES, EDGE_N, BLOCK_SIZE,
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
        if SCALED:
            v_scale = v_scale * peak
        values = sums / safe[:, None] * v_scale
        target = out + token * stride_out_token + head.to(tl.int64) * stride_out_head
        tl.store(
            target[:, None] + dv[None, :],
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
    k_scale_cache: torch.Tensor | None = None,
    v_scale_cache: torch.Tensor | None = None,
    batch_invariant: bool,
) -> None:
    """See :func:`kvxfer.kernels.paged_prefill`."""
    need_tensors("q", q)
    num_blocks, block_size = k_cache.shape[:2]
    if not q.shape[0] or not seq_lens.shape[0]:
        return
    cu_seqlens_q, seq_lens = cu_seqlens_q.contiguous(), seq_lens.contiguous()
    if ids_are_checked(block_table):
        rows = cu_seqlens_q[1:] - cu_seqlens_q[:-1]
        first = seq_lens - rows - window_left if window_left >= 0 else torch.zeros_like(seq_lens)
        # A sequence without new rows reads nothing, so its row of the table may hold anything.
        lengths = torch.where(rows > 0, seq_lens, 0)
        check_block_table(block_table, first, lengths, num_blocks, block_size)
    plain = is_plain(window_left, logits_soft_cap, k_scale_cache)
    batch = None if batch_invariant else seq_lens.shape[0]
    tile = prefill_tile(prefill_shape(q, k_cache, v_cache, batch, plain=plain))
    run_prefill(
        tile, q, k_cache, v_cache, cu_seqlens_q, block_table, seq_lens, out, lse,
        causal=causal, sm_scale=sm_scale, v_scale=v_scale, window_left=window_left,
        logits_soft_cap=logits_soft_cap, sinks=sinks,
        k_scale_cache=k_scale_cache, v_scale_cache=v_scale_cache,
    )  # fmt: skip


def is_plain(
    window_left: int = -1,
    logits_soft_cap: float = 0.0,
    k_scale_cache: torch.Tensor | None = None,
    **_others: Any,
) -> bool:
    """Whether these options of a call leave registers for the largest tile."""
    return window_left < 0 and logits_soft_cap == 0 and k_scale_cache is None


def prefill_shape(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: int | None,
    *,
    plain: bool = True,
) -> PrefillShape:
    """What the choice of a tile looks at. Lengths are on the device, so rows count by their mean; ``batch``
    None: by the same number in whatever batch.
    """
    return PrefillShape(
        head_dim=max(
            padded_width("q", q.shape[2]),
            padded_width("v_cache", v_cache.shape[3]),
        ),
        rows=INVARIANT_ROWS if batch is None else q.shape[0] // batch,
        group=q.shape[1] // k_cache.shape[2],
        block_size=k_cache.shape[1],
        cache_bits=8 * k_cache.element_size(),
        wide=operand_dtype(q, k_cache) == tl.float32,
        plain=plain,
    )


def _reach(cache: torch.Tensor) -> int:
    """The largest offset of an element, in elements."""
    return sum(
        (size - 1) * stride for size, stride in zip(cache.shape, cache.stride(), strict=True)
    )


def run_prefill(
    tile: PrefillTile,
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
    k_scale_cache: torch.Tensor | None = None,
    v_scale_cache: torch.Tensor | None = None,
) -> None:
    """One launch with this tile."""
    num_tokens, num_q_heads, width_k = q.shape
    _, block_size, num_kv_heads, width_v = v_cache.shape
    batch = seq_lens.shape[0]
    group = num_q_heads // num_kv_heads
    pack = group if tile.packs_heads else 1
    scales = scale_arguments(k_scale_cache, v_scale_cache, q)
    # Each sequence rounds its tiles up, by less than one.
    num_tiles = num_tokens * pack // tile.block_m + batch
    with on_device_of(q):
        prefill_kernel[(num_tiles, num_q_heads // pack)](
            q, k_cache, v_cache, cu_seqlens_q, block_table, seq_lens,
            q if sinks is None else sinks, out, q if lse is None else lse,
            *scales[:2],
            sm_scale, v_scale, logits_soft_cap, window_left, batch, num_q_heads,
            *q.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3], *scales[2:],
            *block_table.stride(), *out.stride()[:2],
            GROUP=group, PACK=pack, BLOCK_B=triton.next_power_of_2(batch),
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, EDGE_N=min(tile.block_n, EDGE_N), BLOCK_SIZE=block_size,
            WIDTH_K=width_k, WIDTH_V=width_v,
            BLOCK_DK=padded_width("q", width_k), BLOCK_DV=padded_width("v_cache", width_v),
            CAUSAL=causal, WINDOW=window_left >= 0, SOFT_CAP=logits_soft_cap > 0,
            FOLD=sm_scale > 0 and logits_soft_cap == 0, SCALED=k_scale_cache is not None,
            HAS_SINKS=sinks is not None, HAS_LSE=lse is not None,
            OPERAND=operand_dtype(q, k_cache),
            OFFSET=tl.int32 if max(_reach(k_cache), _reach(v_cache)) < 2**31 else tl.int64,
            SAME_STRIDES=k_cache.stride(0) == v_cache.stride(0),
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
