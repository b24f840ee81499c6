# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Does disaggregation pay here? The same load on 1 prefill + 1 decode and on 2 monolithic workers.

    python bench/bench_serving.py [MODEL_DIR] [--rounds N] [--json PATH]

Two loads, each on both servers in turn: *quiet*, one short request at a time; *burst*, steady short answers while one
long prompt arrives. Reported are time to first token and the gaps between tokens of the short answers, as ratios
disaggregated / monolithic of medians over the rounds: below 1 it paid.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any

from common import machine_facts, percentile, write_json
from kvxfer.testing.cluster import Cluster

SHORT = {"max_tokens": 48, "temperature": 0, "ignore_eos": True}
SERVERS = {
    "disaggregated": ("--prefill", "1", "--decode", "1"),
    "monolithic": ("--role", "both", "--num-workers", "2"),
}


def measure(cluster: Cluster, prompt: list[int], max_tokens: int) -> tuple[float, list[float]]:
    """Seconds to the first token, and each gap after it."""
    start = time.perf_counter()
    body = {**SHORT, "prompt": prompt, "max_tokens": max_tokens}
    times = [
        time.perf_counter() for line in cluster.stream_lines(body) if line.startswith("data: {")
    ]
    return times[0] - start, [b - a for a, b in itertools.pairwise(times)]


def quiet(cluster: Cluster, seed: int) -> dict[str, float]:
    samples = [
        measure(cluster, [(seed * 31 + i * 7 + j) % 1500 + 300 for j in range(64)], 32)
        for i in range(6)
    ]
    gaps = [gap for _, each in samples for gap in each]
    return {
        "ttft_s": statistics.median(first for first, _ in samples),
        "gap_p50_s": statistics.median(gaps),
    }


def burst(cluster: Cluster, seed: int) -> dict[str, float]:
    """Two short answers run on; when both speak, a prompt of 6,000 tokens arrives."""
    gaps: list[list[float]] = [[], []]
    speaking = threading.Barrier(3)

    def short(index: int) -> None:
        body = {**SHORT, "prompt": [400 + seed + index] * 16, "max_tokens": 400}
        last = 0.0
        for line in cluster.stream_lines(body):
            if not line.startswith("data: {"):
                continue
            now = time.perf_counter()
            if last:
                gaps[index].append(now - last)
            else:
                speaking.wait(60)
            last = now

    threads = [threading.Thread(target=short, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    speaking.wait(60)
    first, _ = measure(cluster, [(seed * 13 + j * 11) % 1500 + 300 for j in range(6000)], 2)
    for thread in threads:
        thread.join()
    whole = [gap for each in gaps for gap in each]
    return {
        "long_ttft_s": first,
        "gap_p50_s": statistics.median(whole),
        "gap_p99_s": percentile(whole, 0.99),
        "gap_max_s": max(whole),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="kvxfer bench serve",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("model_dir", type=Path, nargs="?")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="writes the result with hardware and command")
    args = parser.parse_args()
    found: dict[str, dict[str, list[dict[str, float]]]] = {
        load: {name: [] for name in SERVERS} for load in ("quiet", "burst")
    }
    clusters = {name: Cluster(args.model_dir, *flags) for name, flags in SERVERS.items()}
    try:
        for seed in range(args.rounds + 1):
            for name, cluster in clusters.items():
                for load, run in (("quiet", quiet), ("burst", burst)):
                    result = run(cluster, seed)
                    if seed:  # the first round warms up
                        found[load][name].append(result)
    finally:
        for cluster in clusters.values():
            cluster.close()
    ratios: dict[str, dict[str, float]] = {}
    for load, servers in found.items():
        ratios[load] = {}
        for figure in servers["monolithic"][0]:
            ours, base = (
                statistics.median(each[figure] for each in servers[name]) for name in SERVERS
            )
            ratios[load][figure] = ours / base
            print(
                f"{load:6} {figure:12} disaggregated {ours * 1e3:8.1f} ms | monolithic x 2 "
                f"{base * 1e3:8.1f} ms | ratio {ours / base:.2f}"
            )
    report: dict[str, Any] = {
        "facts": machine_facts("torch"),
        "rounds": args.rounds,
        "ratios_disaggregated_to_monolithic": ratios,
        "samples": found,
    }
    write_json(args.json, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
