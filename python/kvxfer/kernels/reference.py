# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""The specification of every kernel, in NumPy and float32: what the other backends are compared with.

Written to be read, not to be fast. Inputs are normalised by the public functions (see ``_dispatch``).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kvxfer.errors import InvalidArgumentError
from kvxfer.kernels._copy_job import ITEMSIZE, CopyJob, PartCopy

__all__ = [
    "append_kv",
    "copy_blocks",
    "merge_states",
    "paged_decode",
    "paged_prefill",
    "unavailable",
]

TAKES_NUMPY = True

F32 = npt.NDArray[np.float32]
NpArray = npt.NDArray[Any]


def unavailable(op: str, device: str) -> str | None:
    return None if device == "cpu" else f"the reference works on host memory, not on {device}"


def describe() -> str:
    return "NumPy, float32"


def to_float32(array: NpArray) -> F32:
    """Widen exactly; ``uint16`` is bfloat16, the upper half of a float32."""
    if array.dtype == np.uint16:
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32)


def from_float32(values: F32, dtype: np.dtype[Any]) -> NpArray:
    """Narrow, rounding to nearest even; a NaN stays one."""
    if dtype != np.uint16:
        with np.errstate(over="ignore"):  # float16 overflows to infinity, as in every other backend
            return values.astype(dtype)
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16
    quiet = (bits >> 16) | np.uint32(0x40)
    narrow: NpArray = np.where(np.isnan(values), quiet, rounded).astype(np.uint16)
    return narrow


def append_kv(
    key: NpArray,
    value: NpArray,
    k_cache: NpArray,
    v_cache: NpArray,
    slot_mapping: NpArray,
    *,
    k_scale: float,
    v_scale: float,
) -> None:
    num_blocks, block_size = k_cache.shape[:2]
    wrong = (slot_mapping < -1) | (slot_mapping >= num_blocks * block_size)
    if wrong.any():
        index = int(wrong.argmax())
        raise InvalidArgumentError(
            f"slot_mapping[{index}]: expected -1 or a slot from 0 to {num_blocks * block_size - 1} "
            f"({num_blocks} blocks of {block_size}), given {int(slot_mapping[index])}"
        )
    tokens = np.flatnonzero(slot_mapping >= 0)
    blocks, slots = np.divmod(slot_mapping[tokens], block_size)
    for rows, cache, scale in ((key, k_cache, k_scale), (value, v_cache, v_scale)):
        if scale == 1.0 and rows.dtype == cache.dtype:
            cache[blocks, slots] = rows[tokens]
        else:
            scaled = to_float32(rows[tokens]) / np.float32(scale)
            cache[blocks, slots] = from_float32(scaled, cache.dtype)


def paged_decode(
    q: NpArray,
    k_cache: NpArray,
    v_cache: NpArray,
    block_table: NpArray,
    seq_lens: NpArray,
    out: NpArray,
    lse: F32 | None,
    *,
    split_size: int | None = None,
    **options: Any,
) -> None:
    """A prefill of one row per sequence; ``split_size`` is how others sum, not what."""
    if (seq_lens < 0).any():
        index = int((seq_lens < 0).argmax())
        raise InvalidArgumentError(
            f"seq_lens[{index}]: expected >= 0, given {int(seq_lens[index])}"
        )
    rows = np.minimum(seq_lens, 1)
    starts = np.concatenate([[0], np.cumsum(rows)])
    have = np.flatnonzero(rows)
    packed_out = np.empty((len(have), *out.shape[1:]), out.dtype)
    packed_lse = np.empty(packed_out.shape[:2], np.float32)
    paged_prefill(
        q[have], k_cache, v_cache, starts, block_table, seq_lens, packed_out, packed_lse,
        causal=True, **options,
    )  # fmt: skip
    out[...] = 0
    out[have] = packed_out
    if lse is not None:
        sinks = options["sinks"]
        lse[...] = -np.inf if sinks is None else sinks
        lse[have] = packed_lse


def paged_prefill(
    q: NpArray,
    k_cache: NpArray,
    v_cache: NpArray,
    cu_seqlens_q: NpArray,
    block_table: NpArray,
    seq_lens: NpArray,
    out: NpArray,
    lse: F32 | None,
    *,
    causal: bool,
    sm_scale: float,
    v_scale: float,
    window_left: int,
    logits_soft_cap: float,
    sinks: F32 | None,
) -> None:
    group = q.shape[1] // k_cache.shape[2]
    for sequence, length in enumerate(int(n) for n in seq_lens):
        first, end = int(cu_seqlens_q[sequence]), int(cu_seqlens_q[sequence + 1])
        if first == end:
            continue
        positions = np.arange(length - (end - first), length)
        low = 0 if window_left < 0 else max(0, int(positions[0]) - window_left)
        keys = np.arange(low, length)
        k = _gather(k_cache, block_table, sequence, keys)
        v = _gather(v_cache, block_table, sequence, keys)
        seen = np.ones((len(positions), len(keys)), bool)
        if causal:
            seen &= keys[None, :] <= positions[:, None]
        if window_left >= 0:
            seen &= keys[None, :] >= positions[:, None] - window_left
        for head in range(q.shape[1]):
            logits = to_float32(q[first:end, head]) @ k[:, head // group].T * np.float32(sm_scale)
            if logits_soft_cap > 0:
                cap = np.float32(logits_soft_cap)
                logits = cap * np.tanh(logits / cap)
            sink = None if sinks is None else sinks[head]
            weights, head_lse = _softmax(np.where(seen, logits, -np.inf), sink)
            values = weights @ v[:, head // group] * np.float32(v_scale)
            out[first:end, head] = from_float32(values, out.dtype)
            if lse is not None:
                lse[first:end, head] = head_lse


def _softmax(logits: F32, sink: np.float32 | None) -> tuple[F32, F32]:
    """Weights and LSE per row. The sink takes weight; a row that sees nothing gives zeros, not NaN."""
    highest = logits.max(axis=1, initial=-np.inf)
    if sink is not None:
        highest = np.maximum(highest, sink)
    finite = np.where(np.isneginf(highest), np.float32(0), highest)
    weights = np.exp(logits - finite[:, None])
    total = weights.sum(axis=1)
    if sink is not None:
        total = total + np.exp(sink - finite)
    with np.errstate(divide="ignore"):
        lse = np.log(total) + finite
    safe = np.where(total == 0, np.float32(1), total)
    return weights / safe[:, None], lse


def _gather(cache: NpArray, block_table: NpArray, sequence: int, keys: NpArray) -> F32:
    """Rows ``[key, head, channel]`` of a sequence; only blocks that hold a wanted key are looked up."""
    num_blocks, block_size = cache.shape[:2]
    columns = keys // block_size
    if len(keys) and columns[-1] >= block_table.shape[1]:
        raise InvalidArgumentError(
            f"block_table: expected at least {int(columns[-1]) + 1} blocks of {block_size} for the "
            f"{int(keys[-1]) + 1} tokens of sequence {sequence}, given {block_table.shape[1]}"
        )
    blocks = block_table[sequence, columns]
    wrong = (blocks < 0) | (blocks >= num_blocks)
    if wrong.any():
        index = int(wrong.argmax())
        raise InvalidArgumentError(
            f"block_table[{sequence}, {int(columns[index])}]: expected a block id from 0 to "
            f"{num_blocks - 1}, given {int(blocks[index])}"
        )
    return to_float32(cache[blocks, keys % block_size])


def merge_states(
    v_a: NpArray, lse_a: F32, v_b: NpArray, lse_b: F32, out: NpArray, lse: F32
) -> None:
    highest = np.maximum(lse_a, lse_b)
    finite = np.where(np.isneginf(highest), np.float32(0), highest)
    weight_a, weight_b = np.exp(lse_a - finite), np.exp(lse_b - finite)
    total = weight_a + weight_b
    safe = np.where(total == 0, np.float32(1), total)
    # A side of weight 0 may hold anything, also NaN: it was never written.
    a = np.where(weight_a[..., None] == 0, 0, to_float32(v_a)) * weight_a[..., None]
    b = np.where(weight_b[..., None] == 0, 0, to_float32(v_b)) * weight_b[..., None]
    out[...] = from_float32((a + b) / safe[..., None], out.dtype)
    with np.errstate(divide="ignore"):
        lse[...] = np.log(total) + finite


_NUMPY_DTYPE = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}


def copy_blocks(job: CopyJob) -> None:
    src_block, src_slot, dst_block, dst_slot = _token_indices(job.segments)
    for part in job.parts:
        for src_base, dst_base in zip(part.src_bases, part.dst_bases, strict=True):
            src = _rows(job, part, src_base, src=True)[src_block, src_slot]
            dst = _rows(job, part, dst_base, src=False)
            if part.src_dtype != part.dst_dtype:
                src = from_float32(to_float32(src), dst.dtype)
            dst[dst_block, dst_slot] = src


def _token_indices(segments: NpArray) -> tuple[NpArray, NpArray, NpArray, NpArray]:
    lengths = segments[:, 4]
    within = np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    columns = [np.repeat(segments[:, column], lengths) for column in range(4)]
    return columns[0], columns[1] + within, columns[2], columns[3] + within


def _rows(job: CopyJob, part: PartCopy, base: tuple[int, int], *, src: bool) -> NpArray:
    """View ``[block, token, head, channel]`` of one layer's part, over the copied heads."""
    pieces = job.src_pieces if src else job.dst_pieces
    extent = job.src_extent if src else job.dst_extent
    name = part.src_dtype if src else part.dst_dtype
    block, token, head = part.src_strides if src else part.dst_strides
    dtype = np.dtype(_NUMPY_DTYPE.get(name, np.uint8))
    rows: NpArray = np.ndarray(
        (*extent, job.num_heads, part.width),
        dtype,
        buffer=pieces[base[0]],
        offset=base[1],
        strides=(block, token, head, ITEMSIZE[name]),
    )
    return rows
