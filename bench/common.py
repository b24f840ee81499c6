# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Shared by the benchmarks: interleaving, percentiles and ratios, facts about the machine, tables, JSON."""

from __future__ import annotations

import json
import math
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import kvxfer
from processes import Sample

T = TypeVar("T")
MIN_CLEAN = 5  # fewer undisturbed samples than this say nothing


def interleave(
    cases: Mapping[str, Callable[[], T]],
    rounds: int,
    *,
    seed: int = 0,
    deadline: float = math.inf,
    into: dict[str, list[T]] | None = None,
) -> dict[str, list[T]]:
    """One sample of every case per round, in an order that is shuffled anew each round.

    So neighbours, clock rates and what the case before left in the caches disturb all alike.
    No round begins that would likely end after ``deadline`` (``time.monotonic()``), but one is
    always taken. ``into`` gets whole rounds only, also when a sample raises.
    """
    shuffler = random.Random(seed)
    out = {} if into is None else into
    out |= {name: [] for name in cases}
    order = list(cases)
    longest = 0.0
    for done in range(rounds):
        began = time.monotonic()
        if done > 0 and began + longest > deadline:
            break
        shuffler.shuffle(order)
        taken = {name: cases[name]() for name in order}
        for name, sample in taken.items():
            out[name].append(sample)
        longest = max(longest, time.monotonic() - began)
    return out


def percentile(values: Iterable[float], share: float) -> float:
    """The smallest value that at least this share of all does not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def kept(samples: Sequence[Sample]) -> tuple[list[Sample], bool]:
    """Those that no run queue disturbed; where hardly any is left, all of them, and True."""
    clean = [each for each in samples if each.clean]
    if len(clean) >= max(min(MIN_CLEAN, len(samples)), len(samples) // 10):
        return clean, False
    return list(samples), True


def summary(samples: Sequence[Sample], nbytes: int) -> dict[str, Any]:
    """What a row of the report says about one case that moves ``nbytes`` per sample."""
    used, noisy = kept(samples)
    p50 = statistics.median(each.seconds for each in used)
    return {
        "p50_us": p50 * 1e6,
        "p99_us": percentile((each.seconds for each in used), 0.99) * 1e6,
        "best_us": min(each.seconds for each in used) * 1e6,
        "gb_per_s": nbytes / p50 / 1e9,
        "cpu_s_per_gb": statistics.median(each.cpu_seconds for each in used) / (nbytes / 1e9),
        "samples": len(samples),
        "dropped": sum(not each.clean for each in samples),
        "noisy": noisy,
    }


def speed_ratio(ours: Sequence[Sample], other: Sequence[Sample]) -> dict[str, Any]:
    """How many times as fast ours is: the median over rounds in which neither was disturbed."""
    pairs = list(zip(ours, other, strict=True))
    clean = [(a, b) for a, b in pairs if a.clean and b.clean]
    noisy = len(clean) < max(min(MIN_CLEAN, len(pairs)), len(pairs) // 10)
    used = pairs if noisy else clean
    return {
        "ratio": statistics.median(b.seconds / a.seconds for a, b in used),
        "rounds": len(used),
        "noisy": noisy,
    }


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except FileNotFoundError:
        return platform.processor()
    return next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), "")


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def machine_facts(*packages: str) -> dict[str, Any]:
    """Hardware, system and versions: what one needs beside a number before comparing it."""
    transparent = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return {
        "command": " ".join([Path(sys.executable).name, *sys.argv]),
        "cpu": cpu_model(),
        "cpus_usable": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "page_nbytes": os.sysconf("SC_PAGE_SIZE"),
        "transparent_huge_pages": transparent.read_text().strip() if transparent.exists() else None,
        "load_average": os.getloadavg()[0],
        "platform": platform.platform(),
        "python": platform.python_version(),
        "kvxfer": kvxfer.__version__,
        **{name: version(name) for name in ("numpy", *packages)},
    }


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Columns as wide as they must be; numbers to the right."""
    cells = [list(map(str, header)), *(list(map(str, row)) for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            text.ljust(width) if i == 0 else text.rjust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    )


def kib(nbytes: int) -> str:
    return f"{nbytes // 1024} KiB" if nbytes >= 1024 else f"{nbytes} B"


def write_json(path: Path | str | None, report: Mapping[str, Any]) -> None:
    if path is None:
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # In one step: a run that is killed just then leaves the one before.
    new = path.with_name(path.name + ".new")
    new.write_text(json.dumps(report, indent=1) + "\n")
    new.replace(path)
