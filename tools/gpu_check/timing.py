# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Device time of several ways to do one thing, in turns: medians, and ratios round by round.

A way is a list of calls, one per set of inputs; they are captured into one CUDA graph, so that neither Python nor
launches count, and the sets together exceed the L2 cache, so that each call finds its inputs in memory.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

Call = Callable[[], Any]
TARGET_MS = 50.0  # of device time per way


def graph_of(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    graph.replay()
    torch.cuda.synchronize()
    return graph


def _replay_us(graph: torch.cuda.CUDAGraph) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) * 1e3


def measure(ways: Mapping[str, Sequence[Call]], min_rounds: int = 7) -> dict[str, list[float]]:
    """Microseconds of one call, per way and round."""
    graphs = {name: graph_of(calls) for name, calls in ways.items()}
    slowest_us = max(_replay_us(graph) for graph in graphs.values())
    rounds = max(min_rounds, min(50, math.ceil(TARGET_MS * 1e3 / slowest_us)))
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, graph in graphs.items():
            times[name].append(_replay_us(graph) / len(ways[name]))
    return times


def median(times: Mapping[str, list[float]], name: str) -> float:
    return statistics.median(times[name])


def speed_ratio(times: Mapping[str, list[float]], ours: str, other: str) -> float:
    """Above 1: ours is faster."""
    return statistics.median(b / a for a, b in zip(times[ours], times[other], strict=True))


def num_sets(nbytes: int, most: int = 64) -> int:
    """How many sets of inputs of this size make four times the L2 cache."""
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    return max(1, min(most, math.ceil(4 * l2 / max(nbytes, 1))))
