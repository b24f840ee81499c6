# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""The cases of bench_kernels that plan: plan_transfer between pools of Llama-3-8B's shape."""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np

from kernels_run import Row, Run, measure, ratio
from kvxfer.layout import KVLayout, plan_transfer

BLOCKS = 8192  # of 16 tokens
MOVED = 1563  # blocks without neighbours: 100,032 spans in 32 layers, keys and values
ASKED_US = 2000


def bench_plan(run: Run, quick: bool) -> None:
    for src, dst in (("LKBNHC", "LKBNHC"), ("BLKHNC", "BLKHNC"), ("LKBNHC", "LKBHNC")):
        name = f"{src} to {dst}, {MOVED} scattered blocks of 16 tokens"
        run.add("plan_transfer", name, lambda src=src, dst=dst: plan_case(run, src, dst))
        if quick:
            return


def plan_case(run: Run, src_order: str, dst_order: str) -> Row:
    shape: dict[str, Any] = {"num_layers": 32, "block_size": 16, "num_kv_heads": 8, "head_dim": 128}
    src, dst = (
        KVLayout.from_order(order, num_blocks=BLOCKS, dtype="bfloat16", **shape)
        for order in (src_order, dst_order)
    )
    rng = np.random.default_rng(0)
    ids, others = (rng.permutation(BLOCKS // 2)[:MOVED] * 2 for _ in "sd")
    plan = plan_transfer(src, dst, ids, others)
    first = np.arange(64)
    seconds = measure(
        {
            "ours": lambda: plan_transfer(src, dst, ids, others),
            "written out": lambda: plan_transfer(src, dst, ids, others).src_offsets,
            "three arrays": lambda: [np.add.outer(first, ids).ravel() for _ in range(3)],
        },
        run,
    )
    return {
        "us": statistics.median(seconds["ours"]) * 1e6,
        "us_written_out": statistics.median(seconds["written out"]) * 1e6,
        "num_spans": plan.num_spans,
        "of_writing_three_arrays": ratio(seconds, "ours", "three arrays"),
        "asked_us": ASKED_US,
    }
