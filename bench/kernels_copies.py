# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""The cases of bench_kernels that move rows: copy_blocks, pack_blocks, unpack_blocks and append_kv."""

from __future__ import annotations

import ctypes
import statistics
from typing import Any

import numpy as np
import torch

from kernels_run import Row, Run, Timed, measure, of_best, ratio
from kvxfer import _transfer, kernels
from kvxfer.layout import KVLayout


def bench_pack(run: Run, quick: bool) -> None:
    whole = ["LKBHNC", "BLKHNC", "LKBNHC"]
    for mib in (1,) if quick else (1, 16, 64):
        for order in whole[:2] if quick else whole:
            name = f"{order}, bfloat16, {mib} MiB in whole blocks"
            run.add("copy_blocks", name, lambda order=order, mib=mib: pack_case(run, order, order, mib))  # fmt: skip
    for mib in (1,) if quick else (1, 64):
        name = f"LKBNHC to LKBHNC, bfloat16, {mib} MiB in rows of 256 bytes"
        run.add("copy_blocks", name, lambda mib=mib: pack_case(run, "LKBNHC", "LKBHNC", mib))


def pack_case(run: Run, src_order: str, dst_order: str, mib: int) -> Row:
    """Half of a cache's blocks, in no order, to other blocks, into a packed buffer and back."""
    rng = np.random.default_rng(0)
    blocks = mib * 16  # of 64 KiB, keys and values, all layers: half of them hold so many MiB
    shape: dict[str, Any] = {"block_size": 16, "num_kv_heads": 4, "head_dim": 128}
    src, dst = (
        KVLayout.from_order(order, num_layers=2, num_blocks=2 * blocks, dtype="bfloat16", **shape)
        for order in (src_order, dst_order)
    )
    a, b = (torch.randint(0, 255, (layout.nbytes,), dtype=torch.uint8) for layout in (src, dst))
    chosen = rng.permutation(2 * blocks)[:blocks]
    other = chosen[::-1].copy()
    half = src.nbytes // 2
    packed = torch.zeros(half, dtype=torch.uint8)
    runs = 65536 if "BLK" in src_order else 16384  # bytes that lie together
    scale = np.arange(65536 // runs) * (runs if runs == 65536 else 2 * blocks * runs)
    offsets = [(ids[:, None] * runs + scale[None]).reshape(-1) for ids in (chosen, other)]
    pages = a[:half].view(torch.int64).reshape(-1, runs // 8)
    picked = torch.from_numpy(rng.permutation(len(pages)))
    into = packed.view(torch.int64).reshape(-1, runs // 8)
    timed: Timed = {
        "copy": lambda: kernels.copy_blocks(src, a, dst, b, chosen, other),
        "memcpy of blocks": lambda: _transfer.scattered_copy(
            b.numpy(), a.numpy(), offsets[1], offsets[0], runs
        ),
        "around the caches": lambda: _transfer.scattered_copy(
            b.numpy(), a.numpy(), offsets[1], offsets[0], runs, non_temporal=True
        ),
        "memcpy of all": lambda: ctypes.memmove(packed.data_ptr(), a.data_ptr(), half),
        "index_select": lambda: torch.index_select(pages, 0, picked, out=into),
    }
    if src_order == dst_order:
        timed["pack"] = lambda: kernels.pack_blocks(src, a, chosen, out=packed)
        timed["unpack"] = lambda: kernels.unpack_blocks(packed, src, a, chosen)
    held = kernels.get_num_threads(), torch.get_num_threads()
    kernels.set_num_threads(1)
    torch.set_num_threads(1)
    try:
        seconds = measure(timed, run, threads=1)
    finally:
        kernels.set_num_threads(held[0])
        torch.set_num_threads(held[1])
    row = {"us": statistics.median(seconds["copy"]) * 1e6}
    for ours in ("copy", "pack", "unpack"):
        if ours in timed:
            row[f"{ours}_of_memcpy"] = of_best(
                seconds, ours, "memcpy of blocks", "around the caches"
            )
            row[f"{ours}_of_memcpy_of_all"] = ratio(seconds, ours, "memcpy of all")
    return row | {"times_index_select": ratio(seconds, "copy", "index_select")}


def bench_append(run: Run, quick: bool) -> None:
    small, large = (2, 64, torch.float32), (8, 128, torch.bfloat16)  # KV heads, head_dim
    cases = [(1, *small), (16, *small), (512, *small), (1, *large), (64, *large), (512, *large)]
    for tokens, heads, dim, dtype in cases[:1] if quick else cases:
        for order in ("HND",) if quick else ("HND", "NHD"):
            name = f"{order} {str(dtype)[6:]} {tokens} tokens {heads}kv d{dim}"
            sized = (order, tokens, heads, dim, dtype)
            run.add("append_kv", name, lambda sized=sized: append_case(run, *sized))


def append_case(run: Run, order: str, tokens: int, heads: int, dim: int, dtype: torch.dtype) -> Row:
    generator = torch.Generator().manual_seed(0)
    shape = (2048, heads, 16, dim) if order == "HND" else (2048, 16, heads, dim)
    k, v = torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)
    key, value = (torch.randn(tokens, heads, dim).to(dtype) for _ in "kv")
    slots = torch.randperm(2048 * 16, generator=generator)[:tokens]

    def by_torch() -> None:
        block, offset = slots // 16, slots % 16
        if order == "HND":
            k[block, :, offset] = key
            v[block, :, offset] = value
        else:
            k[block, offset] = key
            v[block, offset] = value

    # The bound: the same rows copied one after the other, their addresses known.
    row = dim * dtype.itemsize * (heads if order == "NHD" else 1)
    at = slots.numpy()[:, None]
    if order == "NHD":
        into = at * row
    else:
        into = ((at // 16 * heads + np.arange(heads)[None]) * 16 + at % 16) * row
    into = np.ascontiguousarray(into.reshape(-1))
    out = np.arange(len(into)) * row
    arrays = [x.view(torch.uint8).reshape(-1).numpy() for x in (k, v, key, value)]

    def by_memcpy() -> None:
        _transfer.scattered_copy(arrays[0], arrays[2], into, out, row)
        _transfer.scattered_copy(arrays[1], arrays[3], into, out, row)

    timed: Timed = {
        "ours": lambda: kernels.append_kv(key, value, k, v, slots, kv_layout=order),
        "torch": by_torch,
        "memcpy of rows": by_memcpy,
    }
    if order == "NHD":  # indexing at its best: one axis of slots
        flat_k, flat_v = (x.view(-1, heads, dim) for x in (k, v))
        timed["index_copy"] = lambda: (
            flat_k.index_copy_(0, slots, key),
            flat_v.index_copy_(0, slots, value),
        )
    seconds = measure(timed, run)
    found = {
        "us": statistics.median(seconds["ours"]) * 1e6,
        "times_torch_indexing": ratio(seconds, "ours", "torch"),
        "of_memcpy_of_rows": ratio(seconds, "ours", "memcpy of rows"),
    }
    if "index_copy" in timed:
        found["times_index_copy"] = ratio(seconds, "ours", "index_copy")
    return found
