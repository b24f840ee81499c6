# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""The specification of every kernel, in NumPy and float32: what the other backends are compared with.

Written to be read, not to be fast. Inputs are normalised by the public functions (see ``_dispatch``).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from kvxfer.errors import InvalidArgumentError
from kvxfer.kernels._arrays import CACHE_DTYPES
from kvxfer.kernels._checksum_job import ChecksumJob, hash_keys, splitmix64
from kvxfer.kernels._copy_job import CopyJob
from kvxfer.kernels._copy_route import PartCopy
from kvxfer.kernels._float8 import LARGEST, float8_values, to_float8
from kvxfer.kernels._mla import mla_by_decode
from kvxfer.kernels._sides import ITEMSIZE
from kvxfer.layout.dtypes import DTYPES

__all__ = [
    "CACHE_DTYPES",
    "append_kv",
    "checksum_blocks",
    "copy_blocks",
    "merge_states",
    "mla_decode",
    "paged_decode",
    "paged_prefill",
    "unavailable",
]

TAKES_NUMPY = True
SCALES = True

F32 = npt.NDArray[np.float32]
NpArray = npt.NDArray[Any]


def unavailable(op: str, device: str) -> str | None:
    return None if device == "cpu" else f"the reference works on host memory, not on {device}"


def describe() -> str:
    return "NumPy, float32"


def to_float32(array: NpArray, dtype: str = "") -> F32:
    """Widen exactly; ``uint16`` is bfloat16, the upper half of a float32, ``uint8`` what ``dtype`` says."""
    if array.dtype == np.uint16:
        return (array.astype(np.uint32) << 16).view(np.float32)
    if array.dtype == np.uint8:
        return float8_values(dtype)[array]
    return array.astype(np.float32)


def from_float32(values: F32, dtype: np.dtype[Any], name: str = "") -> NpArray:
    """Narrow, rounding to nearest even; a NaN stays one, and 8-bit types saturate (int8: a NaN gives the lowest)."""
    if dtype == np.uint8:
        return to_float8(values, name)
    if dtype == np.int8:
        whole = np.rint(np.clip(np.where(np.isnan(values), -128, values), -128, 127))
        codes: NpArray = whole.astype(np.int8)
        return codes
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
    cache_dtype: str,
    k_scale_cache: NpArray | None = None,
    v_scale_cache: NpArray | None = None,
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
    for rows, cache, scale, scale_cache in (
        (key, k_cache, k_scale, k_scale_cache),
        (value, v_cache, v_scale, v_scale_cache),
    ):
        if scale_cache is None and scale == 1.0 and rows.dtype == cache.dtype:
            cache[blocks, slots] = rows[tokens]
            continue
        wide = to_float32(rows[tokens])
        divisor: Any = np.float32(scale)
        if scale_cache is not None:
            top = np.fmax.reduce(np.abs(wide), axis=2, initial=np.float32(0))  # a NaN counts as 0
            divisor = np.where(top > 0, top / np.float32(LARGEST[cache_dtype]), np.float32(1))
            scale_cache[blocks, slots] = divisor
            divisor = divisor[:, :, None]
        with np.errstate(invalid="ignore"):  # a row with an infinity: its scale is infinite too
            cache[blocks, slots] = from_float32(wide / divisor, cache.dtype, cache_dtype)


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
    cache_dtype: str,
    k_scale_cache: F32 | None = None,
    v_scale_cache: F32 | None = None,
) -> None:
    group = q.shape[1] // k_cache.shape[2]
    for sequence, length in enumerate(int(n) for n in seq_lens):
        first, end = int(cu_seqlens_q[sequence]), int(cu_seqlens_q[sequence + 1])
        if first == end:
            continue
        _check_columns(sequence, length, block_table.shape[1], k_cache.shape[1])
        positions = np.arange(length - (end - first), length)
        low = 0 if window_left < 0 else max(0, int(positions[0]) - window_left)
        keys = np.arange(low, length)
        k = _gather(k_cache, k_scale_cache, cache_dtype, block_table, sequence, keys)
        v = _gather(v_cache, v_scale_cache, cache_dtype, block_table, sequence, keys)
        seen = np.ones((len(positions), len(keys)), bool)
        if causal:
            seen &= keys[None, :] <= positions[:, None]
        if window_left >= 0:
            seen &= keys[None, :] >= positions[:, None] - window_left
        for head in range(q.shape[1]):
            # Of infinities come NaN, which go where they are seen and are masked where they are not.
            with np.errstate(invalid="ignore"):
                logits = to_float32(q[first:end, head]) @ k[:, head // group].T
                logits *= np.float32(sm_scale)
                if logits_soft_cap > 0:
                    cap = np.float32(logits_soft_cap)
                    logits = cap * np.tanh(logits / cap)
                sink = None if sinks is None else sinks[head]
                weights, head_lse = _softmax(np.where(seen, logits, -np.inf), sink)
                values = _sum_of_seen(weights, seen, v[:, head // group]) * np.float32(v_scale)
            out[first:end, head] = from_float32(values, out.dtype)
            if lse is not None:
                lse[first:end, head] = head_lse


mla_decode = partial(mla_by_decode, paged_decode)


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


def _sum_of_seen(weights: F32, seen: npt.NDArray[np.bool_], v: F32) -> F32:
    """``weights @ v``, but that a key adds nothing to a row that may not see it, whatever lies there: 0 * NaN is NaN."""
    strange = np.count_nonzero(~np.isfinite(v), axis=1) > 0
    total: F32 = weights @ np.where(strange[:, None], np.float32(0), v)
    for key in np.flatnonzero(strange):
        rows = seen[:, key]
        total[rows] += weights[rows, key, None] * v[key]
    return total


def _check_columns(sequence: int, length: int, columns: int, block_size: int) -> None:
    """Before anything as long as the sequence is allocated."""
    wanted = -(-length // block_size)
    if wanted > columns:
        raise InvalidArgumentError(
            f"block_table: expected at least {wanted} blocks of {block_size} for the "
            f"{length} tokens of sequence {sequence}, given {columns}"
        )


def _gather(
    cache: NpArray,
    scales: F32 | None,
    dtype: str,
    block_table: NpArray,
    sequence: int,
    keys: NpArray,
) -> F32:
    """Rows ``[key, head, channel]`` of a sequence; only blocks that hold a wanted key are looked up."""
    num_blocks, block_size = cache.shape[:2]
    columns = keys // block_size
    blocks = block_table[sequence, columns]
    wrong = (blocks < 0) | (blocks >= num_blocks)
    if wrong.any():
        index = int(wrong.argmax())
        raise InvalidArgumentError(
            f"block_table[{sequence}, {int(columns[index])}]: expected a block id from 0 to "
            f"{num_blocks - 1}, given {int(blocks[index])}"
        )
    rows = to_float32(cache[blocks, keys % block_size], dtype)
    return rows if scales is None else rows * scales[blocks, keys % block_size][:, :, None]


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


def copy_blocks(job: CopyJob) -> None:
    if job.is_empty:
        return
    src_block, src_slot, dst_block, dst_slot = _token_indices(job.segments)
    for part in job.route.parts:
        for layer, (src_base, dst_base) in enumerate(
            zip(part.src_bases, part.dst_bases, strict=True)
        ):
            src = _rows(job, part, src_base, src=True)[src_block, src_slot]
            dst = _rows(job, part, dst_base, src=False)
            if part.converts:
                wide = to_float32(src, part.src_dtype)
                if part.factors is not None:
                    wide = wide * part.factors[layer, :, :1] / part.factors[layer, :, 1:]
                src = from_float32(wide, dst.dtype, part.dst_dtype)
            dst[dst_block, dst_slot] = src


def checksum_blocks(job: ChecksumJob) -> npt.NDArray[np.uint64]:
    """Per row NH over its 32-bit words, mixed with the row's place; summed per layer mod 2^64."""
    tokens = np.arange(job.first_token, job.num_tokens)
    blocks, slots = job.block_ids[tokens // job.block_size], tokens % job.block_size
    heads = np.arange(job.first_head, job.first_head + job.num_heads, dtype=np.uint64)
    sums = np.zeros(len(job.layers), np.uint64)
    with np.errstate(over="ignore"):
        for part in job.parts:
            for index, (layer, base) in enumerate(zip(job.layers, part.bases, strict=True)):
                rows: NpArray = np.ndarray(
                    (job.num_blocks, job.block_size, job.num_heads, part.row_bytes),
                    np.uint8,
                    buffer=job.pieces[base[0]],
                    offset=base[1],
                    strides=(*part.strides, 1),
                )
                hashes = _nh(rows[blocks, slots])
                place = (part.part_id << 60) | (layer << 48)
                places = (
                    np.uint64(place) | (heads << np.uint64(32)) | tokens[:, None].astype(np.uint64)
                )
                sums[index] += splitmix64(hashes ^ splitmix64(places)).sum(dtype=np.uint64)
    return sums


def _nh(rows: NpArray) -> npt.NDArray[np.uint64]:
    """``[tokens, heads, bytes]`` to ``[tokens, heads]``; rows are filled up with zeros to pairs of words."""
    missing = -rows.shape[2] % 8
    padded = np.pad(rows, ((0, 0), (0, 0), (0, missing)))
    words = np.ascontiguousarray(padded).view(np.uint32)
    keyed = (words + hash_keys()[: words.shape[2]]).astype(np.uint64)
    hashes: npt.NDArray[np.uint64] = (keyed[..., 0::2] * keyed[..., 1::2]).sum(
        axis=2, dtype=np.uint64
    )
    return hashes


def _token_indices(segments: NpArray) -> tuple[NpArray, NpArray, NpArray, NpArray]:
    lengths = segments[:, 4]
    within = np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    columns = [np.repeat(segments[:, column], lengths) for column in range(4)]
    return columns[0], columns[1] + within, columns[2], columns[3] + within


def _rows(job: CopyJob, part: PartCopy, base: tuple[int, int], *, src: bool) -> NpArray:
    """View ``[block, token, head, channel]`` of one layer's part, over the copied heads."""
    pieces = job.src.pieces if src else job.dst.pieces
    extent = job.route.src_extent if src else job.route.dst_extent
    name = part.src_dtype if src else part.dst_dtype
    block, token, head = part.src_strides if src else part.dst_strides
    rows: NpArray = np.ndarray(
        (*extent, job.route.num_heads, part.width),
        DTYPES[name],
        buffer=pieces[base[0]],
        offset=base[1],
        strides=(block, token, head, ITEMSIZE[name]),
    )
    return rows
