# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""The benchmark's rows that move bytes: copies, packing, appends, checksums, each beside its bound of the same rounds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import kernels_only  # noqa: F401 - before anything of kvxfer
import torch
from timing import Call, measure, median, num_sets, speed_ratio

from kvxfer import kernels
from kvxfer.layout import KVLayout

Row = dict[str, Any]


def bound_of(nbytes: int, sets: int) -> list[Call]:
    """A copy that reads and writes `nbytes` in all, in as many sets."""
    pairs = [
        (torch.empty(nbytes // 2, dtype=torch.uint8, device="cuda"),
         torch.empty(nbytes // 2, dtype=torch.uint8, device="cuda"))
        for _ in range(sets)
    ]  # fmt: skip
    return [lambda a=a, b=b: b.copy_(a) for a, b in pairs]  # type: ignore[misc]


def copy_row(src: KVLayout, dst: KVLayout) -> Row:
    ids = torch.randperm(src.num_blocks).tolist()

    def move(a: torch.Tensor, b: torch.Tensor) -> None:
        kernels.copy_blocks(src, a, dst, b, ids, ids[::-1], backend="cuda")

    return _beside_a_copy(src.nbytes, dst.nbytes, move)


def pack_row(cache: KVLayout, op: str) -> Row:
    ids = torch.randperm(cache.num_blocks).tolist()

    def move(a: torch.Tensor, b: torch.Tensor) -> None:
        if op == "pack_blocks":
            kernels.pack_blocks(cache, a, ids, b, backend="cuda")
        else:
            kernels.unpack_blocks(b, cache, a, ids, backend="cuda")

    return _beside_a_copy(cache.nbytes, cache.nbytes, move)


def _beside_a_copy(
    src_nbytes: int, dst_nbytes: int, move: Callable[[torch.Tensor, torch.Tensor], None]
) -> Row:
    """`move` between memories of these sizes, and a plain copy that reads and writes as many bytes."""
    sets = num_sets(src_nbytes + dst_nbytes, 8)
    memory = [
        (torch.randint(0, 100, (src_nbytes,), dtype=torch.uint8, device="cuda"),
         torch.empty(dst_nbytes, dtype=torch.uint8, device="cuda"))
        for _ in range(sets)
    ]  # fmt: skip
    times = measure(
        {
            "cuda": [lambda a=a, b=b: move(a, b) for a, b in memory],  # type: ignore[misc]
            "copy": bound_of(src_nbytes + dst_nbytes, sets),
        }
    )
    return _copy_result(times, src_nbytes + dst_nbytes)


def _copy_result(times: dict[str, list[float]], nbytes: int) -> Row:
    return {
        "us": {name: median(times, name) for name in times},
        "gb_per_s": nbytes / median(times, "cuda") / 1e3,
        "of_copy": speed_ratio(times, "cuda", "copy"),
    }


def append_row(tokens: int, dtype: torch.dtype) -> Row:
    cache = torch.zeros(2, 1024, 16, 8, 128, device="cuda", dtype=dtype)
    new = torch.randn(2, tokens, 8, 128, device="cuda", dtype=torch.bfloat16)
    slots = torch.randperm(1024 * 16, device="cuda")[:tokens]
    flat = cache.view(torch.uint8 if dtype != torch.bfloat16 else dtype).reshape(
        2, 1024 * 16, 8, -1
    )

    def with_torch() -> None:
        rows = new.to(dtype).view(flat.dtype)
        flat[0].index_copy_(0, slots, rows[0])
        flat[1].index_copy_(0, slots, rows[1])

    times = measure(
        {
            "cuda": [lambda: kernels.append_kv(*new, *cache, slots, backend="cuda")],
            "triton": [lambda: kernels.append_kv(*new, *cache, slots, backend="triton")],
            "torch": [with_torch],
        }
    )
    return {
        "us": {name: median(times, name) for name in times},
        "times_torch": speed_ratio(times, "cuda", "torch"),
        "times_triton": speed_ratio(times, "cuda", "triton"),
    }


def checksum_row(read_gb_per_s: float) -> Row:
    """The call waits for its result, so it is timed as a whole, tables and all: over 4 GiB."""
    cache = KVLayout.from_order(
        "LKBNHC", num_blocks=2048, block_size=16, dtype="bfloat16", num_kv_heads=8, head_dim=128, num_layers=32
    )  # fmt: skip
    memory = torch.randint(0, 100, (cache.nbytes,), dtype=torch.uint8, device="cuda")
    ids = list(range(2048))
    seconds = []
    for _ in range(9):
        torch.cuda.synchronize()
        began = time.perf_counter()
        kernels.checksum_blocks(cache, memory, ids, backend="cuda")
        seconds.append(time.perf_counter() - began)
    rate = cache.nbytes / statistics.median(seconds) / 1e9
    return {
        "us": {"cuda": statistics.median(seconds) * 1e6},
        "gb_per_s": rate,
        "of_read": rate / read_gb_per_s,
    }
