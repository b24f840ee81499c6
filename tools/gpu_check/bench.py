# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""The GPU kernels against bounds measured in the same run; writes bench/results/gpu-NAME.json.

Every call is captured in a CUDA graph, and replays of ours, of the bound and of torch take turns; ratios are
medians of per-round ratios. Between calls other memory is touched, so that the L2 cache is cold. The bounds:
a device copy of as many bytes (copies, append), a sum over as many bytes (decode).
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kernels_only  # noqa: F401 - before anything of kvxfer
import torch

from kvxfer import kernels
from kvxfer.layout import KVLayout

Call = Callable[[], Any]
ROUNDS = 15


def graph_of(call: Call) -> torch.cuda.CUDAGraph:
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def measure(calls: dict[str, Call]) -> dict[str, list[float]]:
    """Microseconds per call and round."""
    graphs = {name: graph_of(call) for name, call in calls.items()}
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, graph in graphs.items():
            flush.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times[name].append(begin.elapsed_time(end) * 1e3)
    return times


def ratio(times: dict[str, list[float]], ours: str, other: str) -> float:
    return statistics.median(b / a for a, b in zip(times[ours], times[other], strict=True))


def decode_rows() -> list[dict[str, Any]]:
    rows = []
    for dtype in (torch.bfloat16, torch.float8_e4m3fn):
        for batch, context in ((1, 1024), (1, 32768), (32, 4096), (64, 8192)):
            blocks = batch * context // 16
            k, v = (
                torch.randn(blocks, 16, 8, 128, device="cuda", dtype=torch.bfloat16).to(dtype)
                for _ in range(2)
            )
            q = torch.randn(batch, 32, 128, device="cuda", dtype=torch.bfloat16)
            table = torch.randperm(blocks, device="cuda").int().reshape(batch, -1)
            lens = torch.full((batch,), context, dtype=torch.int32, device="cuda")
            flat = torch.ones((k.nbytes + v.nbytes) // 4, device="cuda")

            def run(
                backend: str, q: Any = q, k: Any = k, v: Any = v, t: Any = table, n: Any = lens
            ) -> Any:
                return kernels.paged_decode(q, k, v, t, n, backend=backend)

            calls: dict[str, Call] = {"cuda": lambda run=run: run("cuda"), "read": flat.sum}  # type: ignore[misc]
            if dtype == torch.bfloat16:
                calls["triton"] = lambda run=run: run("triton")  # type: ignore[misc]
            times = measure(calls)
            rows.append(
                {
                    "op": "paged_decode",
                    "case": f"{str(dtype)[6:]} b{batch} ctx{context} 32q/8kv d128 block 16",
                    "us": statistics.median(times["cuda"]),
                    "gb_per_s": (k.nbytes + v.nbytes) / statistics.median(times["cuda"]) / 1e3,
                    "of_read": ratio(times, "cuda", "read"),
                    "times_triton": ratio(times, "cuda", "triton") if "triton" in times else None,
                }
            )
    return rows


def copy_rows() -> list[dict[str, Any]]:
    """Whole caches of Llama-3-8B's shape from one order to another; the job's tables are made in the call."""
    rows = []
    shape: dict[str, Any] = {
        "num_kv_heads": 8,
        "head_dim": 128,
        "dtype": "bfloat16",
        "num_layers": 8,
    }
    for a, b in (("LKBNHC", "LKBNHC"), ("LKBNHC", "LKBHNC"), ("LBHNKC", "BLKHNC")):
        src, dst = (KVLayout.from_order(o, num_blocks=512, block_size=16, **shape) for o in (a, b))
        memory = [
            torch.zeros(n, dtype=torch.uint8, device="cuda") for n in (src.nbytes, dst.nbytes)
        ]
        ids = list(range(512))
        event = [torch.cuda.Event(enable_timing=True) for _ in range(4)]
        ours, bound = [], []
        for _ in range(ROUNDS):
            event[0].record()
            kernels.copy_blocks(src, memory[0], dst, memory[1], ids, ids[::-1], backend="cuda")
            event[1].record()
            event[2].record()
            memory[1].copy_(memory[0])
            event[3].record()
            torch.cuda.synchronize()
            ours.append(event[0].elapsed_time(event[1]) * 1e3)
            bound.append(event[2].elapsed_time(event[3]) * 1e3)
        rows.append(
            {
                "op": "copy_blocks",
                "case": f"{a} to {b}, {src.nbytes >> 20} MiB",
                "us": statistics.median(ours),
                "gb_per_s": 2 * src.nbytes / statistics.median(ours) / 1e3,
                "of_copy": statistics.median(y / x for x, y in zip(ours, bound, strict=True)),
            }
        )
    return rows


def append_rows() -> list[dict[str, Any]]:
    rows = []
    for tokens in (8, 8192):
        cache = torch.zeros(2, 1024, 16, 8, 128, device="cuda", dtype=torch.bfloat16)
        new = torch.randn(2, tokens, 8, 128, device="cuda", dtype=torch.bfloat16)
        slots = torch.randperm(1024 * 16, device="cuda")[:tokens]
        target = torch.empty_like(new)
        flat = cache.reshape(2, -1, 8, 128)

        def torch_append(flat: Any = flat, slots: Any = slots, new: Any = new) -> None:
            flat[0].index_copy_(0, slots, new[0])
            flat[1].index_copy_(0, slots, new[1])

        times = measure(
            {
                "cuda": lambda c=cache, n=new, s=slots: kernels.append_kv(
                    *n, *c, s, backend="cuda"
                ),  # type: ignore[misc]
                "copy": lambda t=target, n=new: t.copy_(n),  # type: ignore[misc]
                "torch": torch_append,
            }
        )
        rows.append(
            {
                "op": "append_kv",
                "case": f"bfloat16 {tokens} tokens 8 heads d128",
                "us": statistics.median(times["cuda"]),
                "of_copy": ratio(times, "cuda", "copy"),
                "times_torch": ratio(times, "cuda", "torch"),
            }
        )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--checks", type=Path, help="the JSON of checks.py, to be kept with the results"
    )
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench: torch finds no CUDA device; nothing was measured", file=sys.stderr)
        return 3
    rows = [*decode_rows(), *copy_rows(), *append_rows()]
    for row in rows:
        numbers = [f"{key} {value:.3g}" for key, value in row.items() if isinstance(value, float)]
        print(f"  {row['op']:13} {row['case']:50} " + "  ".join(numbers))
    name = torch.cuda.get_device_name()
    facts = {
        "command": "make gpu-check",
        "gpu": name,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }
    checks = json.loads(args.checks.read_text()) if args.checks else []
    slug = name.lower().removeprefix("nvidia ").replace(" ", "-")
    path = Path(__file__).resolve().parents[2] / "bench" / "results" / f"gpu-{slug}.json"
    path.write_text(json.dumps({"facts": facts, "checks": checks, "rows": rows}, indent=1) + "\n")
    print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
