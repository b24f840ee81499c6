# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""How bench_kernels measures: turns, per-round ratios, rows that are printed and written as they come."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from common import interleave, write_json

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

    @cached_property
    def cold(self) -> torch.Tensor:
        """Twice as much as the last cache holds: to read it leaves nothing else there."""
        return torch.zeros(2 * last_cache_nbytes() // 4)

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


def last_cache_nbytes() -> int:
    """Of the CPU's outermost cache, as Linux has it; 128 MiB where it does not say."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    kib = [int(path.read_text().strip().removesuffix("K")) for path in sizes]
    return max(kib, default=128 << 10) << 10


def measure(
    timed: Timed, run: Run, *, threads: int | None = None, small: Timed | None = None
) -> dict[str, list[float]]:
    """Seconds per call and round, each call repeated until a round lasts some milliseconds.

    With `small` one call from memory: what the caches hold is replaced before it, then the call of the same name in
    `small` brings the code back, and some of it only: 0.3 ms of a cold interpreter are no kernel's time.
    """
    clock = time.thread_time if (threads or run.threads) == 1 else time.perf_counter

    def case(name: str, call: Callable[[], Any]) -> Callable[[], float]:
        call()
        start = time.perf_counter()
        call()
        some = max(1, min(200, int(0.004 / max(1e-7, time.perf_counter() - start))))
        repeats = 1 if small else some

        def sample() -> float:
            if small:
                run.cold.sum()
                small[name]()
            start = clock()
            for _ in range(repeats):
                call()
            return (clock() - start) / repeats

        return sample

    cases = {name: case(name, call) for name, call in timed.items()}
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


def print_row(row: dict[str, Any]) -> None:
    numbers = " | ".join(
        f"{name} {value:.2f}" for name, value in row.items() if name not in ("op", "case", "us")
    )
    print(f"{row['op']:<13} {row['case']:<58} {row['us']:>10.0f} us | {numbers}", flush=True)
