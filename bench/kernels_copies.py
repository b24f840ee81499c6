# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""The cases of bench_kernels that move rows: copy_blocks, pack_blocks, unpack_blocks and append_kv."""

from __future__ import annotations

import ctypes
import statistics
from functools import partial
from typing import Any

import numpy as np
import torch

from kernels_run import Row, Run, Timed, measure, of_best, ratio
from kvxfer import _transfer, kernels
from kvxfer.layout import KVLayout

HEADS, LAYERS_AND_PARTS = 4, 4  # two layers of keys and values
SLAB = 16 * 256  # bytes of one head's tokens in a block
BLOCK = SLAB * HEADS * LAYERS_AND_PARTS
BOUNDS = {"memcpy of": False, "around the caches": True}  # non-temporal?


def bench_pack(run: Run, quick: bool) -> None:
    whole = ["LKBHNC", "BLKHNC", "LKBNHC"]
    orders = [(order, order) for order in whole[: 2 if quick else 3]] + [("LKBNHC", "LKBHNC")]
    # As much as the core's own cache holds, again and again; and from memory.
    for mib, cold in [(1, False)] if quick else [(1, False), (1, True), (16, True), (64, True)]:
        for src, dst in orders:
            what = f"{src}, bfloat16, {mib} MiB in whole blocks"
            if src != dst:
                what = f"{src} to {dst}, bfloat16, {mib} MiB in rows of 256 bytes"
            run.add(
                "copy_blocks",
                what + ("" if cold else ", again"),
                lambda src=src, dst=dst, mib=mib, cold=cold: pack_case(run, src, dst, mib, cold),
            )


def offsets_of(order: str, ids: np.ndarray, num_blocks: int) -> np.ndarray:
    """[blocks, layers and parts]: where a block's keys or values of a layer begin, in bytes."""
    part = SLAB * HEADS if "BLK" in order else num_blocks * SLAB * HEADS
    block = BLOCK if "BLK" in order else SLAB * HEADS
    return ids[:, None] * block + np.arange(LAYERS_AND_PARTS) * part


def pack_case(run: Run, src_order: str, dst_order: str, mib: int, cold: bool) -> Row:
    """Half of a cache's blocks, in no order, to other blocks, into a packed buffer and back.

    Each kernel beside its own bounds: the same bytes between the same memory, in runs of what lies together on both
    sides; heads that are not apart in the cache are copied together in the bound of a transpose.
    """
    rng = np.random.default_rng(0)
    blocks = mib * (1 << 20) // BLOCK  # half of them hold so many MiB
    shape: dict[str, Any] = {"block_size": 16, "num_kv_heads": HEADS, "head_dim": 128}
    src, dst = (
        KVLayout.from_order(order, num_layers=2, num_blocks=2 * blocks, dtype="bfloat16", **shape)
        for order in (src_order, dst_order)
    )
    a, b = (torch.randint(0, 255, (layout.nbytes,), dtype=torch.uint8) for layout in (src, dst))
    chosen = rng.permutation(2 * blocks)[:blocks]
    other = chosen[::-1].copy()
    packed = torch.zeros(src.nbytes // 2, dtype=torch.uint8)
    runs = BLOCK if "BLK" in src_order else SLAB * HEADS  # whole blocks
    pages = a[: len(packed)].view(torch.int64).reshape(-1, runs // 8)
    picked = torch.from_numpy(rng.permutation(len(pages)))
    into = packed.view(torch.int64).reshape(-1, runs // 8)

    out, to = (
        offsets_of(src_order, ids, 2 * blocks)[:, :: runs // (SLAB * HEADS)]
        for ids in (chosen, other)
    )
    ways = {"copy": (b, to, a, out, runs)}
    if src_order == dst_order:
        # A packed buffer has the tokens of a head together: layer, part, head, token.
        heads = HEADS if "HN" in src_order else 1
        piece = SLAB * HEADS // heads
        out = offsets_of(src_order, chosen, 2 * blocks)[:, :, None] + np.arange(heads) * piece
        to = np.arange(LAYERS_AND_PARTS)[:, None] * heads + np.arange(heads)
        to = (to * blocks + np.arange(blocks)[:, None, None]) * piece
        ways |= {"pack": (packed, to, a, out, piece), "unpack": (a, out, packed, to, piece)}

    def of_first(n: int) -> Timed:
        """The calls for the first n blocks."""
        end = n * BLOCK
        ids, others, buffer = chosen[:n], other[:n], packed[:end]
        timed: Timed = {
            "copy": lambda: kernels.copy_blocks(src, a, dst, b, ids, others),
            "pack": lambda: kernels.pack_blocks(src, a, ids, out=buffer),
            "unpack": lambda: kernels.unpack_blocks(buffer, src, a, ids),
        }
        timed = {name: timed[name] for name in ways}
        for name, (dst_memory, at, src_memory, of, nbytes) in ways.items():
            memory = dst_memory.numpy(), src_memory.numpy()
            offsets = at[:n].flatten(), of[:n].flatten()
            for bound, around in BOUNDS.items():
                copy = partial(_transfer.scattered_copy, *memory, *offsets, nbytes)
                timed[f"{bound} {name}"] = partial(copy, non_temporal=around)
        part = slice(end // runs)
        timed["memcpy of all"] = partial(ctypes.memmove, packed.data_ptr(), a.data_ptr(), end)
        timed["index_select"] = partial(torch.index_select, pages, 0, picked[part], out=into[part])
        return timed

    held = kernels.get_num_threads(), torch.get_num_threads()
    kernels.set_num_threads(1)
    torch.set_num_threads(1)
    try:
        seconds = measure(of_first(blocks), run, threads=1, small=of_first(1) if cold else None)
    finally:
        kernels.set_num_threads(held[0])
        torch.set_num_threads(held[1])
    row: Row = {"us": statistics.median(seconds["copy"]) * 1e6}
    for ours in ways:
        row[f"{ours}_of_memcpy"] = of_best(seconds, ours, *(f"{bound} {ours}" for bound in BOUNDS))
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

    known = slots // 16, slots % 16

    def by_torch_where_known() -> None:  # as of a second layer, for whoever keeps them
        block, offset = known
        at = (block, slice(None), offset) if order == "HND" else (block, offset)
        k[at] = key
        v[at] = value

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
        "torch where known": by_torch_where_known,
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
        "times_torch_where_known": ratio(seconds, "ours", "torch where known"),
        "of_memcpy_of_rows": ratio(seconds, "ours", "memcpy of rows"),
    }
    if "index_copy" in timed:
        found["times_index_copy"] = ratio(seconds, "ours", "index_copy")
    return found
