# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""The attention cases of bench_kernels: paged_decode and paged_prefill."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from kernels_run import Row, Run, Timed, measure, of_best, ratio, table_of
from kvxfer import _kernels_cpu, kernels

MM = 512  # of a side of the matrices whose product is the rate of arithmetic


def bench_decode(run: Run, quick: bool) -> None:
    cases = [  # batch, context, query heads, KV heads, head_dim
        (1, 16384, 4, 2, 64),
        (1, 16384, 32, 8, 128),
        (8, 2048, 32, 8, 128),
        (1, 16384, 64, 8, 128),
        (4, 4096, 4, 2, 64),
        (1, 16384, 8, 8, 128),
        (1, 65536, 32, 8, 128),
    ]
    kinds = [("NHD", torch.float32), ("HND", torch.bfloat16), ("HND", torch.float32)]
    kinds += [("NHD", torch.bfloat16), ("NHD", torch.float16)]
    eight_bits = [("HND", kind) for kind in (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)]
    for shape in cases[:1] if quick else cases:
        some = kinds[:2] if quick else kinds + (eight_bits if shape == cases[1] else [])
        for order, dtype in some:
            batch, context, q_heads, kv_heads, dim = shape
            # As much KV for each dtype: from 64 MiB up is what is asked for.
            context = context * 2 // dtype.itemsize if dim == 128 else context
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
    q = torch.randn(batch, q_heads, dim, generator=generator)
    q = q.to(torch.bfloat16 if dtype.itemsize == 1 else dtype)
    flat = torch.ones((k.nbytes + v.nbytes) // 4)
    memory = [x.view(torch.uint8).numpy() for x in (k, v)]
    nbytes = k.nbytes // blocks
    listed = table.numpy().reshape(-1).astype(np.int64) * nbytes

    held = [x.view(torch.int8) if dtype.itemsize == 1 else x for x in (k, v)]  # torch can index

    def gather() -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = (x[table.long()].view(dtype).to(q.dtype) for x in held)
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

    square = torch.randn(MM, MM)
    near = table % 2  # two blocks again and again: all that is not memory
    timed: Timed = {
        "ours": lambda: kernels.paged_decode(q, k, v, table, lens, kv_layout=order),
        "in cache": lambda: kernels.paged_decode(q, k, v, near, lens, kv_layout=order),
        "sum": flat.sum,
        "dot": lambda: torch.dot(flat, flat),
        "read": lambda: _kernels_cpu.read_blocks(memory, np.sort(listed), nbytes),
        "read of blocks": lambda: _kernels_cpu.read_blocks(memory, listed, nbytes),
        "mm": lambda: torch.mm(square, square),
        "sdpa": gather_and_sdpa,
    }
    why = run.flex if isinstance(run.flex, str) else None
    if why is None:
        torch.compiler.reset()  # beyond some shapes in one cache it silently stops compiling
        flex = run.flex
        timed["flex"] = lambda: flex(q[:, :, None], *gather(), enable_gqa=True)
        why = works(timed["flex"])
    if why is not None:
        timed.pop("flex", None)
        run.skipped["FlexAttention"] = why
    seconds = measure(timed, run)
    reads = ("sum", "dot", "read")
    one_block, one_len = torch.zeros(batch, 1, dtype=torch.int32), torch.ones_like(lens)
    small: Timed = {
        "ours": lambda: kernels.paged_decode(q, k, v, one_block, one_len, kv_layout=order),
        "sum": flat[:16].sum,
        "dot": lambda: torch.dot(flat[:16], flat[:16]),
        "read": lambda: _kernels_cpu.read_blocks(memory, listed[:1], nbytes),
    }
    cold = measure({name: timed[name] for name in small}, run, small=small)
    # A product and a sum for each number read and each query row that shares it, in float32.
    products = (k.numel() + v.numel()) * (q_heads // kv_heads) / MM**3
    row = {
        "us": statistics.median(seconds["ours"]) * 1e6,
        "gb_per_s": (k.nbytes + v.nbytes) / statistics.median(seconds["ours"]) / 1e9,
        "of_memory_read": of_best(cold, "ours", *reads),
        "of_read": of_best(seconds, "ours", *reads),
        "mm_of_read": of_best(seconds, "mm", *reads) / products,
        "of_read_of_blocks": ratio(seconds, "ours", "read of blocks"),
        "of_in_cache": ratio(seconds, "ours", "in cache"),
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
    square = torch.randn(MM, MM)
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
        "of_mm_float32": ratio(seconds, "ours", "mm", flops / (2 * MM**3)),
        "times_torch_gathered_mask": ratio(seconds, "ours", "torch_mask"),
        "times_torch_gathered_no_mask": ratio(seconds, "ours", "torch_no_mask"),
    }
