# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Random sequences of everything that an application and its peer can do, and be done to.

A failure names its seed; KVXFER_TEST_SEED=N runs that one alone, the same events in the same order.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fault_run import Run
from transfer_peers import SECRET

from kvxfer.testing.faults import Way, ways

_WAYS = [way for way in ways() if way.reason is None]
_KINDS = ("allocated", "registered")
_CALM = [
    *(f"grant {who}" for who in ("driver", "rival")),
    *(f"retry {who}" for who in ("driver", "rival")),
    *(f"cancel {who}" for who in ("driver", "rival")),
    *(f"settle {who}" for who in ("driver", "rival")),
    *(f"check {who}" for who in ("driver", "rival")),
    "burst",
    "burst",
    "burst",
]
_HARSH = ["burst stop", "stop", "resume", "resume", "burst kill", "close_rival", "close_driver"]
_HARSH_WEIGHT = 0.25
# Without the time in the run queue, which machines that run tests have: twenty times the 50 ms of
# the contract, whose medians test_promptness.py holds.
_LATENESS_SLACK_S = 1.0


def _seeds(first: int, n: int) -> list[int]:
    only = os.environ.get("KVXFER_TEST_SEED")
    return [int(only)] if only else list(range(first, first + n))


def _carry_out(run: Run, events: Iterator[str]) -> None:
    try:
        for event in events:
            run.step(event)
        run.end()
    except BaseException as error:
        error.add_note(f"seed {run.seed}, way {run.way.name}; events: {', '.join(run.trail)}")
        raise
    finally:
        run.close()
    worst = max(run.lateness, default=0.0)
    assert worst < _LATENESS_SLACK_S, f"seed {run.seed}, way {run.way.name}: {worst:.3f} s late"


def _any_events(seed: int, n: int) -> Iterator[str]:
    rng = np.random.default_rng([seed, 1])
    yield from ("grant driver", "grant rival", "burst")
    for _ in range(n):
        yield str(rng.choice(_HARSH if rng.random() < _HARSH_WEIGHT else _CALM))


def _one_fault(seed: int, fault: int) -> Iterator[str]:
    """Mixed traffic, then one fault in the midst of it, then whatever must still work."""
    rng = np.random.default_rng([seed, 2])
    yield from ("grant driver", "grant rival")
    for _ in range(int(rng.integers(1, 4))):
        yield "burst"
        yield str(rng.choice(_CALM))
    yield "burst kill" if fault == 0 else "burst stop"
    if fault != 0:  # stopped: the owner revokes, reuses and grants again all the same
        yield from ("settle driver", "check driver", "grant driver", "burst", "cancel driver")
        yield "kill" if fault == 1 else "resume"
    yield from ("grant driver", "grant rival", "burst", "retry driver", "retry rival", "burst")


def _resources() -> tuple[int, int, int]:
    gc.collect()
    maps = Path("/proc/self/maps").read_text().count("kvxfer")
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")), maps


def _rss_nbytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


@pytest.mark.parametrize("seed", _seeds(0, 2))
@pytest.mark.parametrize("way", _WAYS, ids=lambda way: way.name)
def test_any_sequence_keeps_the_contract(way: Way, seed: int) -> None:
    _carry_out(Run(way, seed, _KINDS[seed % 2]), _any_events(seed, 25))


@pytest.mark.slow
@pytest.mark.parametrize("seed", _seeds(1000, 30))
@pytest.mark.parametrize("way", _WAYS, ids=lambda way: way.name)
def test_any_long_sequence_keeps_the_contract(way: Way, seed: int) -> None:
    _carry_out(Run(way, seed, _KINDS[seed % 2]), _any_events(seed, 60))


def _kill_and_stop(seeds: list[int]) -> None:
    lateness: list[float] = []
    for way in _WAYS:  # what a library makes once for its process stays
        with way.engine("first", SECRET) as first, way.engine("second", SECRET) as second:
            first.connect(second.address)
    before = None
    rss: list[int] = []
    for seed in seeds:
        # As many seeds as six times the ways try each with each fault, in memory of both kinds.
        turn, index = divmod(seed, len(_WAYS))
        way = _WAYS[index]
        run = Run(way, seed, _KINDS[(turn + index) % 2])
        _carry_out(run, _one_fault(seed, turn % 3))
        assert run.faults >= 1
        lateness += run.lateness
        del run
        now = _resources()
        before = before or now  # the first run makes what stays, multiprocessing's helper
        assert all(n <= b for n, b in zip(now, before, strict=True)), (
            f"seed {seed}, way {way.name}: descriptors, threads, mappings {now}, were {before}"
        )
        rss.append(_rss_nbytes())
    if len(rss) >= 20:  # the first tenth grows into its size
        assert rss[-1] - rss[len(rss) // 10] < 64 << 20
    if lateness:
        print(
            f"{len(seeds)} rounds, {len(lateness)} deadlines against a stopped peer, without the time in the run "
            f"queue: median {np.median(lateness) * 1e3:.1f} ms late, worst {max(lateness) * 1e3:.1f} ms; "
            f"resident memory {(rss[-1] - rss[0]) / 1e6:+.1f} MB"
        )


@pytest.mark.timeout(600)
def test_peer_killed_or_stopped_in_the_midst_of_traffic() -> None:
    _kill_and_stop(_seeds(0, max(30, 3 * len(_WAYS))))  # each way is killed, stopped, and both


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
@pytest.mark.parametrize("part", range(10))  # so that several can run side by side
def test_peer_killed_or_stopped_in_the_midst_of_traffic_500_times(part: int) -> None:
    _kill_and_stop(_seeds(10_000 + 50 * part, 50))
