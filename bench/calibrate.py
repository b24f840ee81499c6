# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""The constants of plan_transfer's cost model for this machine: `kvxfer bench transfer --calibrate`.

A span of n bytes costs max(span_s, n / bytes_per_s), and packing adds pack_s_per_byte at each side. So, per path and
by the real engine: bytes_per_s from requests of large blocks, span_s from requests of tiny ones; pack_s_per_byte from
the copy kernel on rows of 256 bytes, what turning a token-major cache to a head-major one takes; fixed_s from one
span behind a tiny copy. All in turns, round by round; the median over undisturbed samples.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np

from common import interleave, kept
from kvxfer import kernels
from kvxfer.layout import CostModel, KVLayout
from processes import Sample, Stopwatch
from transfer_world import Path, World

# By the path's name in the cost model: the way of bench_transfer that measures it.
PATHS = {"shm": "shm mapped", "cma": "cma", "tcp": "tcp"}
TINY, LARGE = 64, 65536
# The cache that is packed: runs of 256 bytes on one side.
ROWS: dict[str, Any] = {"block_size": 16, "num_kv_heads": 8, "head_dim": 128, "dtype": "bfloat16"}


class Packing:
    """A token-major cache packed head-major: every row is a run of its own."""

    def __init__(self, nbytes: int) -> None:
        block = 2 * 16 * 8 * 128 * 2
        blocks = max(2, nbytes // block)
        self.layout = KVLayout.nhd(num_blocks=blocks, num_layers=1, **ROWS)
        self.cache = np.zeros(self.layout.nbytes, np.uint8)
        self.ids = np.random.default_rng(0).permutation(blocks)
        self.packed = np.zeros(self.layout.nbytes, np.uint8)

    def pack(self, num_tokens: int | None = None) -> None:
        ids = self.ids if num_tokens is None else self.ids[:1]
        kernels.pack_blocks(self.layout, self.cache, ids, self.packed, num_tokens=num_tokens)

    @property
    def nbytes(self) -> int:
        return self.layout.nbytes


def calibrate(world: World, *, num_spans: int, rounds: int) -> dict[str, CostModel]:
    """Measure every path of :data:`PATHS` that works here."""
    paths = {path.name: path for path in world.paths()}
    here = {name: paths[way] for name, way in PATHS.items() if way in paths}
    packing = Packing(num_spans * LARGE // 4)
    cases: dict[str, Callable[[], Sample]] = {"pack": lambda: _timed(packing.pack)}
    for name, path in here.items():
        for block in (TINY, LARGE):
            cases[f"{name} {block}"] = _scattered(world, path, num_spans, block)
        cases[f"{name} fixed"] = lambda path=path: _after_packing(world, path, packing)
    samples = interleave(cases, rounds)
    seconds = {
        name: statistics.median(each.seconds for each in kept(found)[0])
        for name, found in samples.items()
    }
    return {
        name: CostModel(
            path=name,
            bytes_per_s=_rounded(num_spans * LARGE / seconds[f"{name} {LARGE}"]),
            span_s=_rounded(seconds[f"{name} {TINY}"] / num_spans),
            pack_s_per_byte=_rounded(seconds["pack"] / packing.nbytes),
            fixed_s=_rounded(seconds[f"{name} fixed"]),
        )
        for name in here
    }


def _scattered(world: World, path: Path, num_spans: int, block: int) -> Callable[[], Sample]:
    rng = np.random.default_rng(block)
    src, dst = (
        rng.permutation(2 * num_spans)[:num_spans].astype(np.int64) * block for _ in range(2)
    )
    return lambda: world.timed(path, src, dst, block)


def _timed(call: Callable[[], object]) -> Sample:
    call()
    with Stopwatch([os.getpid()]) as watch:
        call()
    return watch.sample


def _after_packing(world: World, path: Path, packing: Packing) -> Sample:
    """One row packed, one span sent: what a packed transfer costs whatever its size."""
    packing.pack(1)
    with Stopwatch(world.pids, wake=lambda: world.move(path, 0, 0, 1)) as watch:
        packing.pack(1)
        world.move(path, 0, 0, TINY)
    return watch.sample


def _rounded(value: float) -> float:
    """Three digits: more would claim a repeatability that there is not."""
    return float(f"{value:.3g}")


def as_python(models: dict[str, CostModel]) -> str:
    """The models as an expression to paste: ``plan_transfer(..., cost=COSTS["tcp"])``."""
    lines = ["from kvxfer.layout import CostModel", "", "COSTS = {"]
    for name, model in models.items():
        fields = ", ".join(f"{key}={value!r}" for key, value in asdict(model).items())
        lines.append(f"    {name!r}: CostModel({fields}),")
    return "\n".join([*lines, "}"])


def run(world: World, *, num_spans: int, rounds: int) -> dict[str, Any]:
    """Measure, print, and return what the report says."""
    began = time.perf_counter()
    models = calibrate(world, num_spans=num_spans, rounds=rounds)
    print(as_python(models), flush=True)
    return {
        "case": "calibrate",
        "num_spans": num_spans,
        "rounds": rounds,
        "seconds": time.perf_counter() - began,
        "models": {name: asdict(model) for name, model in models.items()},
    }
