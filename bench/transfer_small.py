# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""What is not throughput: round trips, submitting, connecting, and doing nothing."""

from __future__ import annotations

import mmap
import os
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

import transfer_target
from budget import Budget
from common import interleave, kept, percentile, speed_ratio
from kvxfer import BlockView, _transfer
from processes import Sample, Stopwatch, cpu_seconds
from targets import submit_us
from transfer_death import deaths
from transfer_world import PATHS, World

NOTIFICATION_NBYTES = 64
SUBMIT_SIZES = (1, 64, 1024, 16384)
SPAN, STRIDE = 64, 128  # of the submit cases: gaps, so that nothing is coalesced
BURST = 10  # requests of one size in a row, as a server submits them; the first wakes the target
TIMEOUT_S = 60.0
WARM = 5  # round trips at the start of a batch, while the other side is still on its way

Row = dict[str, Any]
# Of the time, in the order of run(); a block size has 1.
SHARES = (0.4, 0.3, 0.2, 0.2, 0.1)


def run(world: World, rounds: int, budget: Budget, *, quick: bool) -> Iterator[list[Row]]:
    rounds = 3 if quick else rounds
    yield round_trips(world, rounds, 20 if quick else 300, budget.next_deadline())
    yield submit_cost(world, rounds, budget.next_deadline())
    yield connect_time(world, rounds, budget.next_deadline())
    budget.next_deadline()
    yield deaths(world, 1 if quick else 7)
    left = budget.next_deadline() - time.monotonic()
    yield [idle(world, 0.2 if quick else min(5.0, max(0.5, left)))]
    print(flush=True)


# ---------------------------------------------------------------------- round trips


class RoundTrips:
    """Batches of round trips of one kind; a sample is the median of a batch."""

    def __init__(self, world: World, per_batch: int) -> None:
        self.world, self.per_batch = world, per_batch + WARM
        fd = os.memfd_create("kvxfer-bench")
        os.ftruncate(fd, mmap.PAGESIZE)
        self.page = mmap.mmap(fd, mmap.PAGESIZE)
        self.page_path = f"/proc/{os.getpid()}/fd/{fd}"
        self.all: dict[str, list[float]] = {}

    def batch(self, name: str, here: Callable[[], list[float]], *there: Any) -> Sample:
        self.world.tell(*there)
        with Stopwatch(self.world.pids) as watch:
            seconds = here()
        self.world.answer()
        seconds = seconds[WARM:]
        self.all.setdefault(name, []).extend(seconds)
        median = statistics.median(seconds)
        return Sample(median, watch.sample.cpu_seconds, watch.sample.delay)

    def memory(self, name: str) -> Sample:
        rounds = 20 * self.per_batch  # they are that much shorter
        self.page[:] = bytes(mmap.PAGESIZE)
        shared = np.frombuffer(self.page, np.uint8)
        return self.batch(
            name,
            lambda: _transfer.memory_round_trips(
                shared, first=True, rounds=rounds, timeout_s=TIMEOUT_S
            ),
            *("memory_echo", self.page_path, rounds),
        )

    def socket(self, name: str, polling: bool) -> Sample:
        return self.batch(
            name,
            lambda: _transfer.socket_round_trips(
                self.world.raw.fileno(),
                NOTIFICATION_NBYTES,
                first=True,
                rounds=self.per_batch,
                polling=polling,
                timeout_s=TIMEOUT_S,
            ),
            *("socket_echo", NOTIFICATION_NBYTES, self.per_batch, polling),
        )

    def notify(self, name: str, pair: str, polling: bool) -> Sample:
        engine = self.world.engines[pair]
        return self.batch(
            name,
            lambda: _transfer.notify_round_trips(
                engine._core,
                self.world.peers[pair],
                NOTIFICATION_NBYTES,
                first=True,
                rounds=self.per_batch,
                polling=polling,
                timeout_s=TIMEOUT_S,
            ),
            *("notify_echo", pair, engine.incarnation, self.per_batch, polling),
        )


def round_trips(world: World, rounds: int, per_batch: int, deadline: float) -> list[Row]:
    trips = RoundTrips(world, per_batch)
    bounds = {"shm, polling": "memory, polling", "shm, asleep": "socket, asleep"}
    bounds |= {"tcp, polling": "socket, polling", "tcp, asleep": "socket, asleep"}
    cases: dict[str, Callable[[], Sample]] = {
        "memory, polling": lambda: trips.memory("memory, polling"),
        "socket, polling": lambda: trips.socket("socket, polling", True),
        "socket, asleep": lambda: trips.socket("socket, asleep", False),
    }
    for pair in ("shm", "tcp"):
        for way in ("polling", "asleep"):
            name = f"{pair}, {way}"
            if pair in world.pairs:
                cases[name] = lambda name=name, pair=pair, way=way: trips.notify(
                    name, pair, way == "polling"
                )
    samples = interleave(cases, rounds, deadline=deadline)
    medians = {
        name: statistics.median(each.seconds for each in kept(taken)[0])
        for name, taken in samples.items()
    }
    rows = []
    for name, taken in samples.items():
        bound = bounds.get(name)
        row: Row = {
            "case": "round_trip",
            "kind": "path" if bound else "bound",
            "name": name,
            "nbytes": 8 if name.startswith("memory") else NOTIFICATION_NBYTES,
            "p50_us": medians[name] * 1e6,
            "p99_us": percentile(trips.all[name], 0.99) * 1e6,
            "samples": len(taken),
            "dropped": sum(not each.clean for each in taken),
            "noisy": kept(taken)[1],
        }
        text = f"round trip  {name:16} p50 {row['p50_us']:8.2f} us  p99 {row['p99_us']:8.2f} us"
        if bound:
            row["bound"] = bound
            row["times_bound"] = 1 / speed_ratio(taken, samples[bound])["ratio"]
            row["us_over_bound"] = (medians[name] - medians[bound]) * 1e6
            text += f"  {row['times_bound']:.2f} x {bound} ({row['us_over_bound']:+.2f} us)"
        print(text + ("  NOISY" if row["noisy"] else ""), flush=True)
        rows.append(row)
    return rows


# ---------------------------------------------------------------------- submitting


def cpu_of_burst(call: Callable[[], Any]) -> tuple[float, float, list[Any]]:
    """Seconds of the calling thread in the first of ``BURST`` calls, and in each of the others.

    Not by wall time: the wake-up of another thread may put that on the caller's CPU first. The clock
    itself is a system call of about a microsecond, so the others are measured together.
    """
    began = time.thread_time()
    out = [call()]
    first = time.thread_time()
    out += [call() for _ in range(BURST - 1)]
    return first - began, (time.thread_time() - first) / (BURST - 1), out


def bare_send(world: World, rounds: int) -> Row:
    """Sending as many bytes as the head of a request on a raw socket: the least that tcp can cost."""
    payload = bytes(NOTIFICATION_NBYTES)
    taken = []
    for _ in range(rounds):
        world.tell("receive", [NOTIFICATION_NBYTES] * BURST)
        taken.append(cpu_of_burst(lambda: world.raw.sendall(payload))[:2])
        world.answer()
    first, each = (statistics.median(column) * 1e6 for column in zip(*taken, strict=True))
    print(f"submit      {'a bare send()':16} {each:.1f} us ({first:.0f} asleep)", flush=True)
    return {
        "case": "submit",
        "kind": "bound",
        "name": "send",
        "nbytes": NOTIFICATION_NBYTES,
        "p50_us": each,
        "asleep_us": first,
    }


def submit_cost(world: World, rounds: int, deadline: float) -> list[Row]:
    """The call alone, from Python, by the calling thread's CPU time; awaited outside the clock.

    The first request of a burst finds everybody asleep and its caches cold: it is a number of its own.
    """
    rng = np.random.default_rng(1)
    rows = [bare_send(world, rounds)]
    paths = [
        each
        for each in PATHS
        if each.name in ("shm mapped", "shm staged", "tcp") and each.pair in world.pairs
    ]
    ways = [(path, False) for path in paths]
    ways += [(path, True) for path in paths if path.name == "shm mapped"]
    budget = Budget(deadline - time.monotonic(), [1.0] * len(ways))
    for path, by_ids in ways:
        name = f"{path.name}, write_blocks" if by_ids else path.name
        cases: dict[str, Callable[[], tuple[float, float]]] = {}
        for n in SUBMIT_SIZES:
            src, dst = (rng.permutation(SUBMIT_SIZES[-1])[:n].astype(np.int64) for _ in "sd")
            call = (
                partial(world.submit_blocks, path, BlockView(0, STRIDE, SPAN), src, dst)
                if by_ids
                else partial(world.submit, path, src * STRIDE, dst * STRIDE, SPAN)
            )

            def take(call: Callable[[], Any] = call) -> tuple[float, float]:
                first, each, xfers = cpu_of_burst(call)
                for xfer in xfers:
                    xfer.wait(TIMEOUT_S)
                return first, each

            cases[str(n)] = take
        taken = {
            int(n): each
            for n, each in interleave(cases, rounds, deadline=budget.next_deadline()).items()
        }
        first_us = {
            n: statistics.median(each[0] for each in all_) * 1e6 for n, all_ in taken.items()
        }
        us = {n: statistics.median(each[1] for each in all_) * 1e6 for n, all_ in taken.items()}
        first, last = SUBMIT_SIZES[0], SUBMIT_SIZES[-1]
        slope = (us[last] - us[first]) / (last - first) * 1e3
        rows += [
            {
                "case": "submit",
                "kind": "path",
                "name": name,
                "num_blocks": n,
                "p50_us": us[n],
                "p10_us": percentile((each[1] for each in taken[n]), 0.1) * 1e6,
                "asleep_us": first_us[n],
                "asked_us": submit_us(n),
                "ns_per_block": slope,
            }
            for n in us
        ]
        each = "  ".join(f"{n}: {us[n]:.1f} us ({first_us[n]:.0f} asleep)" for n in us)
        print(f"submit      {name:16} {each}  | {slope:.1f} ns a block", flush=True)
    return rows


# ---------------------------------------------------------------------- connecting


def connect_time(world: World, rounds: int, deadline: float) -> list[Row]:
    """Until regions and transports of the peer are known; a bare connect of the kernel's beside it."""

    def ours(pair: str) -> float:
        engine = transfer_target.make_engine("a newcomer", pair, world.spin_us)
        try:
            began = time.perf_counter()
            engine.connect(world.hello["addresses"][pair], TIMEOUT_S)
            return time.perf_counter() - began
        finally:
            engine.close()

    def bare() -> float:
        began = time.perf_counter()
        connection = socket.create_connection(("127.0.0.1", world.hello["bare"]))
        seconds = time.perf_counter() - began
        world.ask("take_bare", 1)
        connection.close()
        return seconds

    cases: dict[str, Callable[[], float]] = {"bare tcp": bare}
    for pair in ("shm", "tcp"):
        if pair in world.pairs:
            cases[pair] = lambda pair=pair: ours(pair)
    taken = interleave(cases, rounds, deadline=deadline)
    bound = statistics.median(taken["bare tcp"])
    rows = []
    for name, seconds in taken.items():
        p50 = statistics.median(seconds)
        row: Row = {
            "case": "connect",
            "kind": "bound" if name == "bare tcp" else "path",
            "name": name,
            "p50_us": p50 * 1e6,
            "p99_us": percentile(seconds, 0.99) * 1e6,
            "samples": len(seconds),
        }
        if name != "bare tcp":
            row |= {"bound": "bare tcp", "times_bound": p50 / bound}
        rows.append(row)
        print(f"connect     {name:16} p50 {row['p50_us']:8.0f} us  p99 {row['p99_us']:8.0f} us")
    return rows


# ---------------------------------------------------------------------- doing nothing


def idle(world: World, seconds: float) -> Row:
    """CPU time of both processes, all engines connected, while nobody asks for anything."""
    before = [cpu_seconds(pid) for pid in world.pids]
    time.sleep(seconds)
    used = [cpu_seconds(pid) - was for pid, was in zip(world.pids, before, strict=True)]
    share = max(used) / seconds
    print(f"idle        {len(world.engines)} connected engines: {share * 100:.4f} % of one CPU")
    return {
        "case": "idle",
        "kind": "path",
        "name": "connected engines",
        "num_engines": len(world.engines),
        "seconds": seconds,
        "cpu_share": share,
    }
