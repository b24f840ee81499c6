# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""The GPU kernels against bounds and peers of the same run; writes bench/results/gpu-NAME.json.

Bounds: a large copy, a large sum (reads), a large matrix product. Peers: torch, and FlashInfer where it is
installed. Ways take turns; every ratio is the median of the rounds' ratios (timing.py). Rows are written as they
come, and no row is begun after --budget-s.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kernels_only  # noqa: F401 - before anything of kvxfer
import torch
import triton
from cases import (
    DECODE,
    PREFILL,
    DecodeCase,
    attention_error,
    blocks_of,
    decode_case,
    make_pool,
    prefill_case,
)  # fmt: skip
from memory_rows import append_row, checksum_row, copy_row, pack_row
from timing import Call, graph_of, measure, median, speed_ratio

from kvxfer import kernels
from kvxfer.layout import KVLayout

Row = dict[str, Any]
Ways = dict[str, Callable[[], list[Call]]]
KV_DTYPES = {"bfloat16": torch.bfloat16, "float8_e4m3": torch.float8_e4m3fn}
PEERS = ("flashinfer", "torch")
ROOT = Path(__file__).resolve().parents[2]


class Bench:
    def __init__(self, path: Path, facts: Row, budget_s: float, quick: bool) -> None:
        self._path, self._facts, self.quick = path, facts, quick
        self._until = time.monotonic() + budget_s
        self._rows: list[Row] = []
        self._skipped: list[str] = []
        self.peers: Any = None
        self.bounds: dict[str, float] = {}

    def row(self, op: str, case: str, make: Callable[[], Row]) -> None:
        if time.monotonic() > self._until:
            self._skipped.append(f"{op}, {case}: out of time")
            return
        try:
            row = {"op": op, "case": case, **make()}
        except Exception as error:  # noqa: BLE001 - one row failing must not end the run, and is in the results
            row = {"op": op, "case": case, "error": f"{type(error).__name__}: {error}"[:400]}
        self._rows.append(row)
        numbers = [f"{key} {value:.4g}" for key, value in row.items() if isinstance(value, float)]
        print(f"  {op:14} {case:52} " + "  ".join(numbers) + row.get("error", ""), flush=True)
        torch.cuda.empty_cache()
        self.write()

    def write(self) -> None:
        summary = summarise(self._rows)
        content = {"facts": self._facts, "bounds": self.bounds, "summary": summary, "skipped": self._skipped, "rows": self._rows}  # fmt: skip
        self._path.write_text(json.dumps(content, indent=1) + "\n")

    @property
    def failed(self) -> bool:
        return any("error" in row for row in self._rows)

    def ceilings(self) -> None:
        nbytes = 1 << (30 if self.quick else 32)
        a = torch.empty(nbytes, dtype=torch.uint8, device="cuda").random_()
        b = torch.empty_like(a)
        flat = a.view(torch.float32).normal_()
        total = torch.empty((), device="cuda")
        x, y = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        z = torch.empty_like(x)
        times = measure(
            {
                "copy": [lambda: b.copy_(a)],
                "read": [lambda: torch.sum(flat, dim=0, out=total)],
                "matmul": [lambda: torch.mm(x, y, out=z)],
            }
        )
        self.bounds = {
            "copy_gb_per_s": 2 * nbytes / median(times, "copy") / 1e3,
            "read_gb_per_s": nbytes / median(times, "read") / 1e3,
            "matmul_tflop_per_s": 2 * 8192**3 / median(times, "matmul") / 1e6,
        }
        print("  bounds: " + "  ".join(f"{k} {v:.4g}" for k, v in self.bounds.items()), flush=True)

    def decode(self) -> None:
        cases = DECODE[::4] if self.quick else DECODE
        most = max(blocks_of(lengths) for _, lengths in cases)
        for dtype_name, dtype in KV_DTYPES.items():
            pool = make_pool(dtype, max(most, 1 << 16))
            for name, lengths in cases:
                case = decode_case(name, pool, lengths)
                self.row(
                    "paged_decode", f"{dtype_name}, {name}", lambda case=case: self._decode(case)
                )  # type: ignore[misc]
            del pool, case
            torch.cuda.empty_cache()

    def _decode(self, case: DecodeCase) -> Row:
        plan = kernels.plan_decode(
            case.lengths, num_q_heads=case.num_q_heads, num_kv_heads=case.num_kv_heads,
            head_dim=case.head_dim, block_size=case.block_size, balanced=True, device="cuda",
        )  # fmt: skip

        def ours(backend: str, plan: Any = None) -> list[Call]:
            return [
                lambda pages=pages, out=out: kernels.paged_decode(  # type: ignore[misc]
                    case.q,
                    case.k,
                    case.v,
                    pages.table,
                    case.lens,
                    out=out,
                    plan=plan,
                    backend=backend,
                )
                for pages, out in zip(case.sets, case.outs, strict=True)
            ]

        ways: Ways = {
            "planned": lambda: ours("cuda", plan),
            "unplanned": lambda: ours("cuda"),
            "triton": lambda: ours("triton"),
        }
        if self.peers is not None:
            ways |= self.peers.decode(case)
        row, times, errors = run_ways(ways, case, 1)
        row["gb_per_s"] = case.kv_nbytes / median(times, "planned") / 1e3
        row["of_read"] = row["gb_per_s"] / self.bounds["read_gb_per_s"]
        return finish(row, times, errors, "planned")

    def prefill(self) -> None:
        cases = PREFILL[:2] if self.quick else PREFILL
        for dtype_name, dtype in KV_DTYPES.items():
            pool = make_pool(dtype, max(blocks_of(lengths) for _, _, lengths in cases))
            for name, new, lengths in cases:
                case = prefill_case(name, pool, new, lengths)
                self.row(
                    "paged_prefill", f"{dtype_name}, {name}", lambda case=case: self._prefill(case)
                )  # type: ignore[misc]
            del pool, case
            torch.cuda.empty_cache()

    def _prefill(self, case: Any) -> Row:
        def ours() -> list[Call]:
            return [
                lambda: kernels.paged_prefill(
                    case.q, case.k, case.v, case.cu_seqlens_q, case.sets[0].table, case.lens,
                    out=case.outs[0], backend="triton",
                )
            ]  # fmt: skip

        ways: Ways = {"triton": ours}
        if self.peers is not None:
            ways |= self.peers.prefill(case)
        row, times, errors = run_ways(ways, case, min(case.new[-1], 256))
        row["tflop_per_s"] = case.flops / median(times, "triton") / 1e6
        row["of_matmul"] = row["tflop_per_s"] / self.bounds["matmul_tflop_per_s"]
        return finish(row, times, errors, "triton")

    def copies(self) -> None:
        shape: Row = {"num_kv_heads": 8, "head_dim": 128, "num_layers": 32}
        pairs = [
            (f"{a} to {b}", a, b, "bfloat16", "bfloat16")
            for a, b in (
                ("LKBNHC", "LKBNHC"), ("LKBNHC", "LKBHNC"), ("LKBHNC", "LKBNHC"), ("LKBHNC", "LKBHNC"),
                ("LBHNKC", "BLKHNC"), ("BLHNKC", "LKBNHC"),
            )
        ]  # fmt: skip
        pairs += [
            ("LKBNHC, quantised", "LKBNHC", "LKBNHC", "bfloat16", "float8_e4m3"),
            ("LKBNHC to LKBHNC, dequantised", "LKBNHC", "LKBHNC", "float8_e4m3", "bfloat16"),
        ]
        for blocks in (32,) if self.quick else (32, 512):
            for name, a, b, src_dtype, dst_dtype in pairs:
                src = KVLayout.from_order(
                    a, num_blocks=blocks, block_size=16, dtype=src_dtype, **shape
                )
                dst = KVLayout.from_order(
                    b, num_blocks=blocks, block_size=16, dtype=dst_dtype, **shape
                )
                self.row(
                    "copy_blocks",
                    f"{name}, {src.nbytes >> 20} MiB",
                    lambda s=src, d=dst: copy_row(s, d),
                )  # type: ignore[misc]
            cache = KVLayout.from_order(
                "LKBNHC", num_blocks=blocks, block_size=16, dtype="bfloat16", **shape
            )
            for op in ("pack_blocks", "unpack_blocks"):
                self.row(
                    op, f"LKBNHC, {cache.nbytes >> 20} MiB", lambda c=cache, op=op: pack_row(c, op)
                )  # type: ignore[misc]

    def small(self) -> None:
        for tokens in (8, 256, 8192):
            for dtype_name, dtype in KV_DTYPES.items():
                self.row(
                    "append_kv",
                    f"{dtype_name}, {tokens} tokens",
                    lambda n=tokens, d=dtype: append_row(n, d),
                )  # type: ignore[misc]
        self.row("checksum_blocks", "LKBNHC, 4 GiB", lambda: checksum_row(self.bounds["read_gb_per_s"]))  # fmt: skip


def run_ways(
    ways: Ways, case: Any, checked_rows: int
) -> tuple[Row, dict[str, list[float]], dict[str, str]]:
    """Those that run; what does not is in the errors. Each way's result is compared with float32."""
    calls: dict[str, list[Call]] = {}
    errors: dict[str, str] = {}
    wrong: dict[str, float] = {}
    for name, make in ways.items():
        try:
            made = make()
            case.outs[0].fill_(float("nan"))
            made[0]()
            wrong[name] = attention_error(case, checked_rows, case.outs[0])
            graph_of(made[:1])
            calls[name] = made
        except Exception as error:
            if not name.startswith(PEERS):
                raise
            errors[name] = f"{type(error).__name__}: {error}"[:200]
    for name, error in wrong.items():
        # A peer may multiply in fp8: that is its choice, and its error stands beside its time.
        if not error < 0.02 and not name.startswith(PEERS):
            raise AssertionError(f"{name} differs from float32 by {error}")
    times = measure(calls)
    row: Row = {
        "us": {name: median(times, name) for name in times},
        "relative_error": wrong,
        "not_run": errors,
    }
    return row, times, errors


def finish(row: Row, times: dict[str, list[float]], errors: dict[str, str], ours: str) -> Row:
    peers = [name for name in times if name.startswith("flashinfer")]
    if peers:
        best = min(peers, key=lambda name: median(times, name))
        row["best_peer"] = best
        row["times_best_peer"] = speed_ratio(times, ours, best)
        if "unplanned" in times:
            row["unplanned_times_best_peer"] = speed_ratio(times, "unplanned", best)
    if "triton" in times and ours != "triton":
        row["times_triton"] = speed_ratio(times, ours, "triton")
    return row


def summarise(rows: list[Row]) -> Row:
    summary: Row = {}
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(f"{row['op']}, {row['case'].split(',')[0]}", []).append(row)
    for name, group in groups.items():
        for key in ("times_best_peer", "unplanned_times_best_peer", "of_copy"):
            values = [row[key] for row in group if key in row]
            if values:
                geometric = math.exp(statistics.fmean(map(math.log, values)))
                summary[f"{name}: {key}"] = {"geometric_mean": geometric, "least": min(values), "rows": len(values)}  # fmt: skip
    return summary


def suites(bench: Bench) -> Iterator[tuple[str, Callable[[], None]]]:
    yield "decode", bench.decode
    yield "copies", bench.copies
    yield "prefill", bench.prefill
    yield "small", bench.small


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--checks", type=Path, help="a folder of what checks.py wrote, to be kept with the results"
    )
    parser.add_argument(
        "--suite", action="append", choices=["decode", "copies", "prefill", "small"]
    )
    parser.add_argument("--budget-s", type=float, default=110.0, help="no row is begun later")
    parser.add_argument("--quick", action="store_true", help="few rows")
    parser.add_argument("--out", type=Path, help="default: bench/results/gpu-NAME.json")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench: torch finds no CUDA device; nothing was measured", file=sys.stderr)
        return 3
    name = torch.cuda.get_device_name()
    facts: Row = {
        "command": "make gpu-check",
        "gpu": name,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "checks": [
            row
            for file in sorted(args.checks.glob("*.json"))
            for row in json.loads(file.read_text())
        ]
        if args.checks
        else [],
    }
    slug = name.lower().removeprefix("nvidia ").replace(" ", "-")
    path = args.out or ROOT / "bench" / "results" / f"gpu-{slug}.json"
    bench = Bench(path, facts, args.budget_s, args.quick)
    try:
        from flashinfer_peers import Peers

        bench.peers = Peers()
        facts["flashinfer"] = bench.peers.version
    except ImportError as error:
        facts["flashinfer"] = f"not measured: {error}"
    print(f"  FlashInfer: {facts['flashinfer']}")
    bench.ceilings()
    torch.cuda.empty_cache()
    for suite, run in suites(bench):
        if args.suite is None or suite in args.suite:
            run()
    bench.write()
    print(f"written: {path}")
    return int(bench.failed)


if __name__ == "__main__":
    sys.exit(main())
