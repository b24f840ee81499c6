# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""The CPU kernels against bounds and against torch, measured in the same run.

    python bench/bench_kernels.py [--threads N] [--only decode,prefill,pack,append,plan] [--quick] [--budget-s S] [--json PATH]

Kernel, bounds and peers take turns round by round, and ratios are medians of per-round ratios, since
neighbours on a shared machine disturb all of them alike. With one thread the thread's own CPU time is
taken, so that a neighbour's turn on the core does not count. torch's idle threads sleep (OMP_WAIT_POLICY=PASSIVE,
unless the environment says otherwise): by default they spin for milliseconds after each call of torch's, on the core
that the next case needs. Copies are measured on one thread. Rows are
printed, and written with --json, as they come; what the budget leaves no time for is named.

Bounds: decode, the fastest of three reads of contiguous memory of the same size (torch's sum and dot, and ours, which
asks for lines ahead), once from memory, the caches full of something else before each call, as in a server, where the
other layers' caches and the weights are read between two calls (`of_memory_read`), and once with what calls that
follow each other leave in the last cache (`of_read`: of a large one that is not the memory's rate); beside it that read of the same blocks in the block table's order, which every kernel has
to follow, and the same call with a table that names two blocks again and again (`of_in_cache`: what arithmetic alone
takes here); `mm_of_read` is the share of the read's rate that the arithmetic would leave at the rate of torch.mm, of
float32: below 1 it and not the memory is what bounds; prefill, a matrix product (torch.mm); copies, the
faster of a memcpy block by block and of one around the caches (non-temporal stores), and beside it one memcpy of as
many bytes that lie together, all from memory, and of 1 MiB also `again`, as much as the core's own cache holds; appends, a memcpy row by row. Peers: torch's gather and attention (scaled_dot_product_attention, FlexAttention), index_select
and indexing.
"""

from __future__ import annotations

import argparse
import os
import sys
import time

import torch

from common import machine_facts
from kernels_attention import bench_decode, bench_prefill, flex_attention
from kernels_copies import bench_append, bench_pack
from kernels_plans import bench_plan
from kernels_run import MIN_ROUNDS, Run
from kvxfer import kernels

BENCHES = {
    "decode": bench_decode,
    "prefill": bench_prefill,
    "pack": bench_pack,
    "append": bench_append,
    "plan": bench_plan,
}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="kvxfer bench kernels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
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
    for name, most in (("threads", 1024), ("rounds", None)):
        given = getattr(args, name)
        if given < 1 or (most is not None and given > most):
            expected = ">= 1" if most is None else f"1 to {most}"
            parser.error(f"--{name}: expected {expected}, given {given}")
    if "OMP_WAIT_POLICY" not in os.environ:  # libgomp reads it once, when torch loads it
        passive = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], passive)
    torch.set_num_threads(args.threads)
    kernels.set_num_threads(args.threads)
    run = Run(
        threads=args.threads,
        rounds=MIN_ROUNDS if args.quick else args.rounds,
        deadline=time.monotonic() + args.budget_s,
        json=args.json,
        facts=machine_facts("torch")
        | {
            "threads": args.threads,
            "omp_wait_policy": os.environ["OMP_WAIT_POLICY"],
            "build": kernels.build_info(),
        },
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
