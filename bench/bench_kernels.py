# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""The CPU kernels against bounds and against torch, measured in the same run.

    python bench/bench_kernels.py [--threads N] [--only decode,prefill,pack,append] [--quick] [--json PATH]

Kernel, bound and peer take turns round by round, and ratios are medians of per-round ratios, since
neighbours on a shared machine disturb all of them alike. With one thread the thread's own CPU time is
taken, so that a neighbour's turn on the core does not count. Bounds: prefill, a matrix product
(torch.mm); decode, a sum over contiguous memory of the same size and, as blocks lie scattered, a gather
of the same blocks in the same order; copy and pack, a contiguous copy of as many bytes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from common import interleave, machine_facts, write_json
from kvxfer import kernels
from kvxfer.layout import KVLayout

Timed = dict[str, Callable[[], Any]]


def measure(timed: Timed, *, threads: int, rounds: int) -> dict[str, list[float]]:
    """Seconds per call and round; each call repeated until a round lasts some milliseconds."""
    clock = time.thread_time if threads == 1 else time.perf_counter

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

    return interleave({name: case(call) for name, call in timed.items()}, rounds)


def ratio(seconds: dict[str, list[float]], ours: str, other: str, scale: float = 1.0) -> float:
    """How many times faster `ours` is than `other`, per round; `scale`: work of ours over work of other."""
    pairs = zip(seconds[ours], seconds[other], strict=True)
    return statistics.median(scale * theirs / mine for mine, theirs in pairs)


def table_of(blocks: int, batch: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randperm(blocks, generator=generator).to(torch.int32).reshape(batch, -1)


def bench_decode(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    cases = [
        (1, 1024, 4, 2, 64),
        (1, 16384, 4, 2, 64),
        (4, 4096, 4, 2, 64),
        (16, 16384, 4, 2, 64),
        (4, 4096, 8, 2, 128),
    ]
    for case in cases[: 3 if args.quick else None]:
        for order, dtype in (
            ("HND", torch.float32),
            ("NHD", torch.float32),
            ("HND", torch.bfloat16),
        ):
            rows.append(decode_case(args, *case, order, dtype))
            print_row(rows[-1])


def decode_case(
    args: argparse.Namespace,
    batch: int,
    context: int,
    q_heads: int,
    kv_heads: int,
    dim: int,
    order: str,
    dtype: torch.dtype,
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    blocks = batch * context // 16
    shape = (blocks, kv_heads, 16, dim) if order == "HND" else (blocks, 16, kv_heads, dim)
    k, v = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    table = table_of(blocks, batch, generator)
    lens = torch.full((batch,), context, dtype=torch.int32)
    q = torch.randn(batch, q_heads, dim, generator=generator).to(dtype)
    nbytes = k.nbytes + v.nbytes
    flat = torch.randn(nbytes // 4)
    pages_k, pages_v = (x.reshape(blocks, -1).view(torch.int32) for x in (k, v))
    order_of_blocks = table.reshape(-1).long()
    scratch = torch.empty_like(pages_k[:64])

    def same_blocks(
        k: Any = pages_k, v: Any = pages_v, ids: Any = order_of_blocks, to: Any = scratch
    ) -> None:
        for pages in (k, v):
            for start in range(0, len(ids), 64):
                torch.index_select(pages, 0, ids[start : start + 64], out=to[: len(ids) - start])

    def gather_and_sdpa() -> torch.Tensor:
        keys, values = k[table.long()], v[table.long()]
        if order == "HND":
            keys, values = (
                x.transpose(1, 2).reshape(batch, kv_heads, context, dim) for x in (keys, values)
            )
        else:
            keys, values = (
                x.reshape(batch, context, kv_heads, dim).transpose(1, 2) for x in (keys, values)
            )
        return torch.nn.functional.scaled_dot_product_attention(
            q[:, :, None], keys, values, enable_gqa=True
        )

    seconds = measure(
        {
            "ours": lambda: kernels.paged_decode(q, k, v, table, lens, kv_layout=order),
            "read": flat.sum,
            "same_blocks": same_blocks,
            "torch": gather_and_sdpa,
        },
        threads=args.threads,
        rounds=args.rounds,
    )
    return {
        "op": "paged_decode",
        "case": f"{order} {str(dtype)[6:]} b{batch} ctx{context} {q_heads}q/{kv_heads}kv d{dim}",
        "us": statistics.median(seconds["ours"]) * 1e6,
        "of_read": ratio(seconds, "ours", "read"),
        "of_same_blocks_gathered": ratio(seconds, "ours", "same_blocks"),
        "times_torch": ratio(seconds, "ours", "torch"),
    }


def bench_prefill(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    cases = [
        (512, 16384, 4, 2, 64),
        (512, 2048, 4, 2, 64),
        (512, 512, 4, 2, 64),
        (512, 4096, 4, 2, 128),
        (128, 128, 4, 2, 64),
    ]
    for case in cases[: 3 if args.quick else None]:
        for dtype in (torch.float32, torch.bfloat16):
            rows.append(prefill_case(args, *case, dtype))
            print_row(rows[-1])


def prefill_case(
    args: argparse.Namespace,
    new: int,
    context: int,
    q_heads: int,
    kv_heads: int,
    dim: int,
    dtype: torch.dtype,
) -> dict[str, Any]:
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
        threads=args.threads,
        rounds=args.rounds,
    )
    flops = 4 * q_heads * dim * (new * context - new * (new - 1) // 2)
    return {
        "op": "paged_prefill",
        "case": f"HND {str(dtype)[6:]} {new} new, ctx{context} {q_heads}q/{kv_heads}kv d{dim}",
        "us": statistics.median(seconds["ours"]) * 1e6,
        "of_mm_float32": ratio(seconds, "ours", "mm", flops / (2 * 512**3)),
        "times_torch_gathered_mask": ratio(seconds, "ours", "torch_mask"),
        "times_torch_gathered_no_mask": ratio(seconds, "ours", "torch_no_mask"),
    }


def bench_pack(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    pairs = [
        ("LKBHNC", "LKBHNC"),
        ("LKBNHC", "LKBNHC"),
        ("BLKHNC", "BLKHNC"),
        ("LKBNHC", "LKBHNC"),
    ]
    for src_order, dst_order in pairs:
        rows.append(pack_case(args, src_order, dst_order))
        print_row(rows[-1])


def pack_case(args: argparse.Namespace, src_order: str, dst_order: str) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    shape: dict[str, Any] = {
        "num_blocks": 1024,
        "block_size": 16,
        "num_kv_heads": 8,
        "head_dim": 128,
        "dtype": "bfloat16",
    }
    src, dst = (
        KVLayout.from_order(order, num_layers=2, **shape) for order in (src_order, dst_order)
    )
    a, b = (torch.randint(0, 255, (layout.nbytes,), dtype=torch.uint8) for layout in (src, dst))
    chosen = rng.permutation(1024)[:512]
    half = src.nbytes // 2
    timed: Timed = {
        "ours": lambda: kernels.copy_blocks(src, a, dst, b, chosen, chosen[::-1]),
        "memcpy": lambda: b[:half].copy_(a[:half]),
    }
    if src_order == dst_order:
        timed["pack"] = lambda: kernels.pack_blocks(src, a, chosen, out=b[:half])
    seconds = measure(timed, threads=args.threads, rounds=args.rounds)
    row: dict[str, Any] = {
        "op": "copy_blocks",
        "case": f"{src_order} to {dst_order}, bfloat16, {half >> 20} MiB in 512 blocks",
        "us": statistics.median(seconds["ours"]) * 1e6,
        "of_memcpy": ratio(seconds, "ours", "memcpy"),
    }
    if "pack" in timed:
        row["pack_of_memcpy"] = ratio(seconds, "pack", "memcpy")
    return row


def bench_append(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    for tokens in (1, 16, 512):
        rows.append(append_case(args, tokens))
        print_row(rows[-1])


def append_case(args: argparse.Namespace, tokens: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    k, v = torch.zeros(2048, 2, 16, 64), torch.zeros(2048, 2, 16, 64)
    key, value = torch.randn(tokens, 2, 64), torch.randn(tokens, 2, 64)
    slots = torch.randperm(2048 * 16, generator=generator)[:tokens]

    def by_torch() -> None:
        block, offset = slots // 16, slots % 16
        k[block, :, offset] = key
        v[block, :, offset] = value

    seconds = measure(
        {
            "ours": lambda: kernels.append_kv(key, value, k, v, slots, kv_layout="HND"),
            "torch": by_torch,
        },
        threads=args.threads,
        rounds=args.rounds,
    )
    return {
        "op": "append_kv",
        "case": f"HND float32 {tokens} tokens 2kv d64",
        "us": statistics.median(seconds["ours"]) * 1e6,
        "times_torch_indexing": ratio(seconds, "ours", "torch"),
    }


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
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--only", default=",".join(BENCHES), help="comma-separated: " + ", ".join(BENCHES)
    )
    parser.add_argument("--quick", action="store_true", help="the first cases only, three rounds")
    parser.add_argument("--json", metavar="PATH")
    args = parser.parse_args()
    unknown = set(args.only.split(",")) - set(BENCHES)
    if unknown:
        parser.error(
            f"--only: expected some of {', '.join(BENCHES)}, given {', '.join(sorted(unknown))}"
        )
    if args.quick:
        args.rounds = 3
    torch.set_num_threads(args.threads)
    kernels.set_num_threads(args.threads)
    rows: list[dict[str, Any]] = []
    for name in args.only.split(","):
        BENCHES[name](args, rows)
    facts = machine_facts("torch") | {"threads": args.threads, "build": kernels.build_info()}
    write_json(args.json, {"facts": facts, "rows": rows})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
