# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""paged_decode of the CUDA backend: its parameters, into how many splits a call falls, and their counters."""

from __future__ import annotations

import sys
from typing import Any

from kvxfer.errors import InvalidArgumentError
from kvxfer.kernels._arrays import Array, dtype_of
from kvxfer.kernels._cuda_base import DTYPE_TAG, byte_strides, check_ids, ids_are_checked, native
from kvxfer.kernels.plan import ENOUGH, MAX_BALANCED_SPLIT, DecodePlan

__all__ = ["check_block_table", "choose_splits", "decode_params", "paged_decode"]

# Counters of finished splits, by device and stream: zeroed once, and left zero by every launch. Two streams
# must not share them. A launch that was aborted may leave them dirty; so may nothing else.
_arrived: dict[tuple[int, int], Array] = {}

# CUDA graphs take theirs from one zeroed piece of memory per device, so that a replay has nothing to zero:
# (counters, how many are given away). Given to a (device, stream, capture), whose launches follow one another.
_spare: dict[int, tuple[Array, int]] = {}
_captured: dict[tuple[int, int, int], Array] = {}
_NUM_SPARE = 1 << 20


def paged_decode(
    q: Array,
    k_cache: Array,
    v_cache: Array,
    block_table: Array,
    seq_lens: Array,
    out: Array,
    lse: Array | None,
    *,
    sm_scale: float,
    v_scale: float,
    window_left: int,
    logits_soft_cap: float,
    sinks: Array | None,
    split_size: int | None,
    plan: DecodePlan | None = None,
) -> None:
    """See :func:`kvxfer.kernels.paged_decode`. A split_size is rounded up to whole tiles of 64 tokens.

    Without one, the number of splits follows from the batch's size and the device (:func:`choose_splits`), and
    each sequence's split size on the device from its own length. The grid follows from shapes alone (the
    table's width bounds the lengths), so that a CUDA graph of it stays right when lengths change.
    """
    torch = sys.modules["torch"]
    if ids_are_checked():
        check_block_table(block_table, seq_lens, window_left, *k_cache.shape[:2])
        if plan is not None and tuple(seq_lens.tolist()) != plan.seq_lens:
            raise InvalidArgumentError(
                f"plan: expected one for seq_lens {seq_lens.tolist()}, given one for {list(plan.seq_lens)}"
            )
    p = decode_params(q, k_cache, v_cache)
    tile = native.DECODE_TILE
    longest = int(block_table.shape[1]) * p.block_size
    units = p.batch * p.num_kv_heads * -(-(p.num_q_heads // p.num_kv_heads) // 16)
    p.out, p.lse = out.data_ptr(), 0 if lse is None else lse.data_ptr()
    p.out_batch, p.out_head = out.stride()[:2]
    p.block_table, p.seq_lens = block_table.data_ptr(), seq_lens.data_ptr()
    p.table_row, p.len_step = block_table.stride(0), seq_lens.stride(0)
    p.sinks = 0 if sinks is None else sinks.data_ptr()
    p.sm_scale, p.v_scale = sm_scale, v_scale
    p.window_left, p.soft_cap = window_left, logits_soft_cap
    with torch.cuda.device(q.device):
        if split_size is None:
            p.split_size = 0
            p.num_splits, p.min_split = choose_splits(units, _slots(q.device, p), longest)
        else:
            p.split_size = -(-split_size // tile) * tile
            p.num_splits = max(1, -(-longest // p.split_size))
        p.num_items = p.batch * p.num_splits
        if plan is not None:
            p.num_splits, p.num_items = plan.num_splits, plan.num_items
            p.items = plan.items.data_ptr()
        stream = torch.cuda.current_stream().cuda_stream
        if p.num_splits > 1:
            rows = p.batch * p.num_q_heads * p.num_splits
            partial = torch.empty(rows * (p.head_dim + 1), dtype=torch.float32, device=q.device)
            p.partial = partial.data_ptr()
            p.partial_lse = p.partial + rows * p.head_dim * 4
            p.arrived = _counters(q.device, stream, units).data_ptr()
        native.paged_decode(p, stream)


def choose_splits(units: int, slots: int, longest: int) -> tuple[int, int]:
    """Into how many splits each sequence falls, and the least tokens of one.

    Sequences are split until the device is full once; more would only add sums to merge. Where whole sequences
    use all of the memory's bandwidth, splits have 4096 tokens, but no more than four times the device's thread
    blocks are launched: those of a short sequence find nothing to do, and cost time all the same. A plan, which
    knows the lengths, does better where they differ. The rule was fitted to a sweep (docs/gpu.md).

    Args:
        units: thread blocks of an unsplit call: sequences x KV heads x tiles of 16 query heads.
        slots: thread blocks that the device holds at once.
        longest: tokens that a row of the block table can hold.
    """
    least = min(max(2048 * units // slots // 64 * 64, 64), 1024)
    if units < ENOUGH * slots:
        wanted = min(slots // units, -(-longest // least))
    else:
        wanted = min(-(-longest // MAX_BALANCED_SPLIT), -(-4 * slots // units))
    return max(1, wanted), least


# By device, cache dtype, head_dim and whether pages are multiples of 16.
_slots_by_kernel: dict[tuple[int, int, int, bool], int] = {}


def _slots(device: Any, params: Any) -> int:
    key = (int(device.index), params.kv_type, params.head_dim, params.block_size % 16 == 0)
    if key not in _slots_by_kernel:
        _slots_by_kernel[key] = int(native.decode_slots(params))
    return _slots_by_kernel[key]


def decode_params(q: Array, k_cache: Array, v_cache: Array) -> Any:
    p = native.Decode()
    p.q, p.k, p.v = q.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr()
    p.batch, p.num_q_heads, p.head_dim = q.shape
    p.block_size, p.num_kv_heads = k_cache.shape[1:3]
    p.q_batch, p.q_head = (
        int(s) if n > 1 else 0 for s, n in zip(q.stride()[:2], q.shape[:2], strict=True)
    )
    p.k_strides, p.v_strides = byte_strides(k_cache)[:3], byte_strides(v_cache)[:3]
    p.q_type, p.kv_type = DTYPE_TAG[dtype_of(q)], DTYPE_TAG[dtype_of(k_cache)]
    return p


def _counters(device: Any, stream: int, count: int) -> Array:
    torch = sys.modules["torch"]
    index = int(device.index)
    if torch.cuda.is_current_stream_capturing():
        return _counters_of_graph(index, stream, count)
    if index not in _spare:
        # Once per device, before graphs are captured: they may be replayed on any stream.
        _spare[index] = torch.zeros(_NUM_SPARE, dtype=torch.int32, device=device), 0
        torch.cuda.current_stream().synchronize()
    held = _arrived.get((index, stream))
    if held is None or held.numel() < count:
        held = torch.zeros(max(count, 1024), dtype=torch.int32, device=device)
        _arrived[index, stream] = held
    return held


def _counters_of_graph(index: int, stream: int, count: int) -> Array:
    torch = sys.modules["torch"]
    key = (index, stream, int(native.capture_id(stream)))
    held = _captured.get(key)
    if held is not None and held.numel() >= count:
        return held
    spare, given = _spare.get(index, (None, 0))
    if spare is None or given + count > spare.numel():
        # Of the graph's own memory, and zeroed in it at every replay.
        return torch.zeros(count, dtype=torch.int32, device=f"cuda:{index}")
    _spare[index] = spare, given + count
    _captured[key] = spare.narrow(0, given, count)
    return _captured[key]


def check_block_table(
    block_table: Array, seq_lens: Array, window_left: int, num_blocks: int, block_size: int
) -> None:
    torch = sys.modules["torch"]
    width = int(block_table.shape[1])
    check_ids("seq_lens", seq_lens, (seq_lens < 0) | (seq_lens > width * block_size),
               f"0 to {width * block_size} ({width} blocks of {block_size})")  # fmt: skip
    first = (seq_lens - 1 - window_left).clamp(min=0) if window_left >= 0 else seq_lens * 0
    column = torch.arange(width, device=block_table.device)[None, :]
    used = column >= (first // block_size)[:, None]
    used &= column < ((seq_lens + block_size - 1) // block_size)[:, None]
    wrong = used & ((block_table < 0) | (block_table >= num_blocks))
    check_ids("block_table", block_table, wrong, f"a block id from 0 to {num_blocks - 1}")
