# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Poisoned paged caches and a float64 oracle that shares no code with the kernels."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np

NpArray = np.ndarray[Any, Any]

DTYPES = ("float32", "float16", "bfloat16")
EPS = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}


def encode(values: NpArray, dtype: str) -> NpArray:
    """Values in `dtype`; bfloat16 by truncation, as uint16."""
    values = np.asarray(values, np.float32)
    if dtype == "bfloat16":
        return (values.view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(dtype)


def decode(array: NpArray) -> NpArray:
    if array.dtype == np.uint16:
        return (array.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return array.astype(np.float64)


def digest(*arrays: NpArray) -> str:
    return hashlib.sha256(b"".join(np.ascontiguousarray(a).tobytes() for a in arrays)).hexdigest()


@dataclass
class Paged:
    k: NpArray  # axes by kv_layout
    v: NpArray
    block_table: NpArray
    seq_lens: NpArray
    kv_layout: str
    dense: list[tuple[NpArray, NpArray]]  # per sequence float64 k, v [tokens, heads, channels]


def paged(
    rng: np.random.Generator,
    lengths: list[int],
    *,
    block_size: int = 16,
    num_kv_heads: int = 2,
    head_dim: int = 64,
    head_dim_v: int | None = None,
    dtype: str = "float32",
    form: str = "HND",
    first_keys: list[int] | None = None,
) -> Paged:
    """A cache where every slot that no one may read is NaN, and every table entry that none may is -1.

    Args:
        form: "NHD", "HND", "fused" (K and V in one row, as vLLM packs them) or "padded" (heads that are not ours).
        first_keys: per sequence the first key that may be read (a window lies behind it).
    """
    width_v = head_dim if head_dim_v is None else head_dim_v
    firsts = first_keys or [0] * len(lengths)
    max_blocks = max([1, *(-(-n // block_size) for n in lengths)])
    needed = sum(-(-n // block_size) for n in lengths)
    num_blocks = needed + 3
    nan = encode(np.full(1, np.nan), dtype)[0]

    def pool(width: int) -> NpArray:
        extra = 2 if form == "padded" else 0
        order = (num_blocks, num_kv_heads + extra, block_size, width)
        if form == "NHD":
            order = (num_blocks, block_size, num_kv_heads, width)
        return np.full(order, nan)

    if form == "fused":
        both = pool(head_dim + width_v)
        k, v = both[..., :head_dim], both[..., head_dim:]
    else:
        k, v = pool(head_dim), pool(width_v)
    if form == "padded":
        k, v = k[:, 1:-1], v[:, 1:-1]
    kv_layout = "NHD" if form == "NHD" else "HND"
    order = rng.permutation(num_blocks)
    table = np.full((len(lengths), max_blocks), -1, np.int32)
    dense = []
    used = 0
    for row, (length, first) in enumerate(zip(lengths, firsts, strict=True)):
        ks = encode(rng.standard_normal((length, num_kv_heads, head_dim)), dtype)
        vs = encode(rng.standard_normal((length, num_kv_heads, width_v)), dtype)
        for column in range(-(-length // block_size)):
            block = int(order[used])
            used += 1
            if (column + 1) * block_size > first:
                table[row, column] = block
            for offset in range(block_size):
                token = column * block_size + offset
                if first <= token < length:
                    at = (block, offset) if kv_layout == "NHD" else (block, slice(None), offset)
                    k[at], v[at] = ks[token], vs[token]
        dense.append((decode(ks), decode(vs)))
    return Paged(k, v, table, np.array(lengths, np.int32), kv_layout, dense)


def oracle(
    q: NpArray,
    k: NpArray,
    v: NpArray,
    *,
    causal: bool = True,
    sm_scale: float | None = None,
    window_left: int = -1,
    logits_soft_cap: float = 0.0,
    sinks: NpArray | None = None,
) -> tuple[NpArray, NpArray]:
    """Rows q [rows, heads, channels], the last ones of the context k, v; plain loops in float64."""
    rows, num_heads, head_dim = q.shape
    group = num_heads // k.shape[1]
    out = np.zeros((rows, num_heads, v.shape[2]))
    lse = np.full((rows, num_heads), -np.inf)
    for row in range(rows):
        position = len(k) - rows + row
        low = 0 if window_left < 0 else max(0, position - window_left)
        high = position + 1 if causal else len(k)
        for head in range(num_heads):
            logits = k[low:high, head // group] @ q[row, head]
            logits = logits * (head_dim**-0.5 if sm_scale is None else sm_scale)
            if logits_soft_cap:
                logits = logits_soft_cap * np.tanh(logits / logits_soft_cap)
            if sinks is not None:
                logits = np.append(logits, float(sinks[head]))
            if not len(logits):
                continue
            top = logits.max()
            weights = np.exp(logits - top)
            lse[row, head] = np.log(weights.sum()) + top
            values = v[low:high, head // group]
            out[row, head] = (weights[: len(values)] / weights.sum()) @ values
    return out, lse


def assert_close(
    given: tuple[NpArray, NpArray],
    expected: tuple[NpArray, NpArray],
    dtype: str,
    slack: float = 1e-5,
) -> None:
    """Within the rounding of the output and of float32 sums; and no bias (cosine), which a bound would miss."""
    (out, lse), (want, want_lse) = (decode(given[0]), given[1]), expected
    assert np.isfinite(out).all(), "a poisoned slot was read, or a row was left out"
    bound = slack * (1 + np.abs(want)) + EPS[dtype] * np.abs(want)
    worst = np.abs(out - want) - bound
    assert (worst <= 0).all(), f"off by {np.abs(out - want).max()} at {worst.argmax()}"
    empty = np.isneginf(want_lse)
    assert np.array_equal(np.isneginf(lse), empty)
    assert np.abs(np.where(empty, 0, lse) - np.where(empty, 0, want_lse)).max(initial=0) < 2 * slack
    product = np.linalg.norm(out) * np.linalg.norm(want)
    if product:
        assert 1 - float((out * want).sum()) / product < (slack**2 if dtype == "float32" else 2e-5)
