# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""The CPU kernels against bounds and against torch, measured in the same run.

    python bench/bench_kernels.py [--threads N] [--only decode,prefill,pack,append] [--quick] [--budget-s S] [--json PATH]

Kernel, bounds and peers take turns round by round, and ratios are medians of per-round ratios, since
neighbours on a shared machine disturb all of them alike. With one thread the thread's own CPU time is
taken, so that a neighbour's turn on the core does not count. Copies are measured on one thread. Rows are
printed, and written with --json, as they come; what the budget leaves no time for is named.

Bounds: decode, the fastest of three reads of contiguous memory of the same size (torch's sum and dot, and ours, which
asks for lines ahead), and beside it that read of the same blocks in the block table's order, which every kernel has
to follow; prefill, a matrix product (torch.mm); copies, the
faster of a memcpy block by block and one of all bytes at once, which the C library does around the caches where
they are too small. Peers: torch's gather and attention (scaled_dot_product_attention, FlexAttention), index_select
and indexing.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from common import interleave, machine_facts, write_json
from kvxfer import _kernels_cpu, _transfer, kernels
from kvxfer.layout import KVLayout

Timed = dict[str, Callable[[], Any]]
Row = dict[str, Any]
MIN_ROUNDS = 3


@dataclass
class Run:
    """What all benches share: how to measure, until when, and where the rows go."""

    threads: int
    rounds: int
    deadline: float
    json: str | None
    facts: dict[str, Any]
    flex: Callable[..., Any] | str  # FlexAttention compiled, or why it is not
    rows: list[Row] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    def add(self, op: str, case: str, make: Callable[[], Row]) -> None:
        if self.seconds_left <= 0:
            self.skipped[f"{op} {case}"] = "the budget was spent (--budget-s)"
            return
        row = {"op": op, "case": case, **make()}
        print_row(row)
        self.rows.append(row)
        self.save()

    def save(self) -> None:
        report = {"schema": 2, "facts": self.facts, "rows": self.rows, "skipped": self.skipped}
        write_json(self.json, report)


def measure(timed: Timed, run: Run, *, threads: int | None = None) -> dict[str, list[float]]:
    """Seconds per call and round; each call repeated until a round lasts some milliseconds."""
    clock = time.thread_time if (threads or run.threads) == 1 else time.perf_counter

    def case(call: Callable[[], Any]) -> Callable[[], float]:
        call()
        start = time.perf_counter()
        call()
        repeats = max(1, min(200, int(0.004 / max(1e-7, time.perf_counter() - start))))

        def sample() -> float:
            start = clock()
            for _ in range(repeats):
                call()
            return (clock() - start) / repeats

        return sample

    cases = {name: case(call) for name, call in timed.items()}
    found: dict[str, list[float]] = {name: [] for name in cases}
    for index in range(run.rounds):
        if index >= MIN_ROUNDS and run.seconds_left <= 0:
            break
        for name, seconds in interleave(cases, 1, seed=index).items():
            found[name] += seconds
    return found


def ratio(seconds: dict[str, list[float]], ours: str, other: str, scale: float = 1.0) -> float:
    """How many times faster `ours` is than `other`, per round; `scale`: work of ours over work of other."""
    pairs = zip(seconds[ours], seconds[other], strict=True)
    return statistics.median(scale * theirs / mine for mine, theirs in pairs)


def of_best(seconds: dict[str, list[float]], ours: str, *bounds: str) -> float:
    """The ratio to the fastest of the bounds."""
    best = min(bounds, key=lambda name: statistics.median(seconds[name]))
    return ratio(seconds, ours, best)


def table_of(blocks: int, batch: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randperm(blocks, generator=generator).to(torch.int32).reshape(batch, -1)


def bench_decode(run: Run, quick: bool) -> None:
    cases = [  # batch, context, query heads, KV heads, head_dim
        (1, 16384, 4, 2, 64),
        (1, 16384, 32, 8, 128),
        (8, 2048, 32, 8, 128),
        (1, 16384, 64, 8, 128),
        (4, 4096, 4, 2, 64),
    ]
    kinds = [("NHD", torch.float32), ("HND", torch.bfloat16), ("HND", torch.float32)]
    kinds += [("NHD", torch.bfloat16), ("NHD", torch.float16)]
    for shape in cases[:1] if quick else cases:
        for order, dtype in kinds[:2] if quick else kinds:
            batch, context, q_heads, kv_heads, dim = shape
            # As much KV for each dtype: from 64 MiB up is what is asked for.
            context = context // 2 if dtype == torch.float32 and dim == 128 else context
            nbytes = 2 * batch * context * kv_heads * dim * dtype.itemsize
            name = f"{order} {str(dtype)[6:]} b{batch} ctx{context} {q_heads}q/{kv_heads}kv d{dim}"
            sized = (batch, context, *shape[2:])
            run.add(
                "paged_decode",
                f"{name}, {nbytes >> 20} MiB",
                lambda sized=sized, order=order, dtype=dtype: decode_case(run, *sized, order, dtype),
            )  # fmt: skip


def decode_case(
    run: Run,
    batch: int,
    context: int,
    q_heads: int,
    kv_heads: int,
    dim: int,
    order: str,
    dtype: torch.dtype,
) -> Row:
    generator = torch.Generator().manual_seed(0)
    blocks = batch * context // 16
    shape = (blocks, kv_heads, 16, dim) if order == "HND" else (blocks, 16, kv_heads, dim)
    k, v = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    table = table_of(blocks, batch, generator)
    lens = torch.full((batch,), context, dtype=torch.int32)
    q = torch.randn(batch, q_heads, dim, generator=generator).to(dtype)
    flat = torch.ones((k.nbytes + v.nbytes) // 4)
    memory = [x.view(torch.uint8).numpy() for x in (k, v)]
    nbytes = k.nbytes // blocks
    listed = table.numpy().reshape(-1).astype(np.int64) * nbytes

    def gather() -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = k[table.long()], v[table.long()]
        if order == "HND":
            keys, values = (x.transpose(1, 2) for x in (keys, values))
            return tuple(x.reshape(batch, kv_heads, context, dim) for x in (keys, values))
        return tuple(
            x.reshape(batch, context, kv_heads, dim).transpose(1, 2) for x in (keys, values)
        )

    def gather_and_sdpa() -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            q[:, :, None], *gather(), enable_gqa=True
        )

    timed: Timed = {
        "ours": lambda: kernels.paged_decode(q, k, v, table, lens, kv_layout=order),
        "sum": flat.sum,
        "dot": lambda: torch.dot(flat, flat),
        "read": lambda: _kernels_cpu.read_blocks(memory, np.sort(listed), nbytes),
        "read of blocks": lambda: _kernels_cpu.read_blocks(memory, listed, nbytes),
        "sdpa": gather_and_sdpa,
    }
    why = run.flex if isinstance(run.flex, str) else None
    if why is None:
        flex = run.flex
        timed["flex"] = lambda: flex(q[:, :, None], *gather(), enable_gqa=True)
        why = works(timed["flex"])
    if why is not None:
        timed.pop("flex", None)
        run.skipped["FlexAttention"] = why
    seconds = measure(timed, run)
    row = {
        "us": statistics.median(seconds["ours"]) * 1e6,
        "gb_per_s": (k.nbytes + v.nbytes) / statistics.median(seconds["ours"]) / 1e9,
        "of_read": of_best(seconds, "ours", "sum", "dot", "read"),
        "of_read_of_blocks": ratio(seconds, "ours", "read of blocks"),
        "times_gather_and_sdpa": ratio(seconds, "ours", "sdpa"),
    }
    if "flex" in timed:
        row["times_gather_and_flex"] = ratio(seconds, "ours", "flex")
    return row


def works(call: Callable[[], Any]) -> str | None:
    """Why a peer cannot run here; the compiler's reasons are of any type."""
    try:
        call()
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
    return None


def flex_attention(enabled: bool) -> Callable[..., Any] | str:
    if not enabled:
        return "not asked for (--flex compiles it, which takes minutes)"
    from torch.nn.attention.flex_attention import flex_attention as eager

    return torch.compile(eager)


def bench_prefill(run: Run, quick: bool) -> None:
    cases = [
        (512, 2048, 4, 2, 64),
        (512, 16384, 4, 2, 64),
        (512, 4096, 4, 2, 128),
        (128, 128, 4, 2, 64),
    ]
    for shape in cases[:1] if quick else cases:
        for dtype in (torch.float32,) if quick else (torch.float32, torch.bfloat16):
            new, context, q_heads, kv_heads, dim = shape
            name = f"HND {str(dtype)[6:]} {new} new, ctx{context} {q_heads}q/{kv_heads}kv d{dim}"
            run.add(
                "paged_prefill",
                name,
                lambda shape=shape, dtype=dtype: prefill_case(run, *shape, dtype),
            )


def prefill_case(
    run: Run,
    new: int,
    context: int,
    q_heads: int,
    kv_heads: int,
    dim: int,
    dtype: torch.dtype,
) -> Row:
    generator = torch.Generator().manual_seed(0)
    square = torch.randn(512, 512)
    blocks = context // 16
    k, v = (torch.randn(blocks, kv_heads, 16, dim, generator=generator).to(dtype) for _ in range(2))
    table = table_of(blocks, 1, generator)
    q = torch.randn(new, q_heads, dim, generator=generator).to(dtype)
    lens, starts = (
        torch.tensor([context], dtype=torch.int32),
        torch.tensor([0, new], dtype=torch.int32),
    )
    keys, values = (
        x[table[0].long()].transpose(0, 1).reshape(1, kv_heads, context, dim).contiguous()
        for x in (k, v)
    )
    wide_k, wide_v = (x.repeat_interleave(q_heads // kv_heads, 1) for x in (keys, values))
    queries = q.transpose(0, 1)[None].contiguous()
    mask = torch.ones(new, context, dtype=torch.bool).tril(context - new)
    attend = torch.nn.functional.scaled_dot_product_attention
    seconds = measure(
        {
            "ours": lambda: kernels.paged_prefill(q, k, v, starts, table, lens, kv_layout="HND"),
            "mm": lambda: torch.mm(square, square),
            "torch_mask": lambda: attend(queries, wide_k, wide_v, attn_mask=mask),
            "torch_no_mask": lambda: attend(queries, wide_k, wide_v),
        },
        run,
    )
    flops = 4 * q_heads * dim * (new * context - new * (new - 1) // 2)
    return {
        "us": statistics.median(seconds["ours"]) * 1e6,
        "of_mm_float32": ratio(seconds, "ours", "mm", flops / (2 * 512**3)),
        "times_torch_gathered_mask": ratio(seconds, "ours", "torch_mask"),
        "times_torch_gathered_no_mask": ratio(seconds, "ours", "torch_no_mask"),
    }


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
            row[f"{ours}_of_memcpy"] = of_best(seconds, ours, "memcpy of blocks", "memcpy of all")
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


def print_row(row: dict[str, Any]) -> None:
    numbers = " | ".join(
        f"{name} {value:.2f}" for name, value in row.items() if name not in ("op", "case", "us")
    )
    print(f"{row['op']:<13} {row['case']:<58} {row['us']:>10.0f} us | {numbers}", flush=True)


BENCHES = {
    "decode": bench_decode,
    "prefill": bench_prefill,
    "pack": bench_pack,
    "append": bench_append,
}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="kvxfer bench kernels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    usable = len(os.sched_getaffinity(0))
    parser.add_argument("--threads", type=int, default=min(2, usable))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--only", default=",".join(BENCHES), help="comma-separated: " + ", ".join(BENCHES)
    )
    parser.add_argument("--quick", action="store_true", help="the first cases only, three rounds")
    parser.add_argument("--flex", action="store_true", help="compile FlexAttention as a peer")
    parser.add_argument(
        "--budget-s", type=float, default=300, help="begin no case after so many seconds"
    )
    parser.add_argument("--json", metavar="PATH")
    args = parser.parse_args()
    unknown = set(args.only.split(",")) - set(BENCHES)
    if unknown:
        parser.error(
            f"--only: expected some of {', '.join(BENCHES)}, given {', '.join(sorted(unknown))}"
        )
    torch.set_num_threads(args.threads)
    kernels.set_num_threads(args.threads)
    run = Run(
        threads=args.threads,
        rounds=MIN_ROUNDS if args.quick else args.rounds,
        deadline=time.monotonic() + args.budget_s,
        json=args.json,
        facts=machine_facts("torch") | {"threads": args.threads, "build": kernels.build_info()},
        flex=flex_attention(args.flex),
    )
    for name in args.only.split(","):
        BENCHES[name](run, args.quick)
    for name, reason in run.skipped.items():
        print(f"not measured: {name}: {reason}")
    run.save()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
