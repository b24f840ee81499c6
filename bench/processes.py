# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Where processes run, what CPU time they take, and how long their threads wait for a CPU.

Standard library only: the drivers of peers run it under interpreters that have no kvxfer.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import TracebackType

# A sample in which a thread stood in the run queue for longer than this share measures the neighbours.
MAX_DELAY = 0.08


@dataclass(frozen=True)
class Sample:
    """One timed run: wall time, CPU time of all its processes, and the worst wait for a CPU."""

    seconds: float
    cpu_seconds: float = 0.0
    delay: float = 0.0  # the longest wait behind other processes, as a share of `seconds`

    @property
    def clean(self) -> bool:
        return self.delay <= MAX_DELAY


def cpu_seconds(pid: int) -> float:
    """User and system time of all threads of a process, in nanosecond steps.

    Not rusage, which no process can ask of another, and not /proc/PID/stat, which counts in ticks.
    The clock's number is CPUCLOCK_SCHED of the process, as clock_getcpuclockid() builds it.
    """
    return time.clock_gettime((~pid << 3) | 2)


def threads(pid: int) -> list[int]:
    return [int(each) for each in os.listdir(f"/proc/{pid}/task")]


def schedule_ns(pid: int) -> dict[int, tuple[int, int]]:
    """Per thread, how long it has run, and how long it has been runnable without running."""
    times = {}
    for tid in threads(pid):
        try:
            with open(f"/proc/{pid}/task/{tid}/schedstat") as file:
                ran, waited, _ = file.read().split()
        except (FileNotFoundError, ProcessLookupError):
            continue  # the thread ended between the listing and the look
        times[tid] = int(ran), int(waited)
    return times


def wait_behind_others_ns(
    before: dict[int, tuple[int, int]], after: dict[int, tuple[int, int]]
) -> int:
    """The longest wait of one thread of a process for which its own threads cannot be the cause.

    A side has one CPU: its caller and its progress thread wait for each other there, which is part
    of what is measured. So what its siblings ran is taken off a thread's wait.
    """
    spent = {}
    for tid, (ran, waited) in after.items():
        ran_before, waited_before = before.get(tid, (0, 0))
        spent[tid] = ran - ran_before, waited - waited_before
    total = sum(ran for ran, _ in spent.values())
    return max(0, *(waited - (total - ran) for ran, waited in spent.values()))


class Stopwatch:
    """Times a block of code that involves the given processes: ``with Stopwatch(pids) as watch``.

    ``wake`` runs last before the clock starts: reading the counters takes long enough for a peer
    that polls to fall asleep again.
    """

    def __init__(self, pids: Iterable[int], wake: Callable[[], object] | None = None) -> None:
        self.pids = tuple(pids)
        self.wake = wake
        self.sample = Sample(0.0)

    def __enter__(self) -> Stopwatch:
        self._before = {pid: schedule_ns(pid) for pid in self.pids}
        if self.wake is not None:
            self.wake()
        self._cpu = sum(map(cpu_seconds, self.pids))
        self._began = time.perf_counter()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        seconds = time.perf_counter() - self._began
        if exc_type is not None:
            return
        cpu = sum(map(cpu_seconds, self.pids)) - self._cpu
        worst = max(wait_behind_others_ns(self._before[pid], schedule_ns(pid)) for pid in self.pids)
        self.sample = Sample(seconds, cpu, worst / 1e9 / seconds)


def cpu_sides(per_side: int = 1) -> tuple[set[int], set[int]] | None:
    """Distinct CPUs for two processes, cores before their second threads; None where too few."""

    def place(cpu: int) -> tuple[int, int]:
        try:
            with open(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") as file:
                first = int(re.split("[,-]", file.read())[0])
        except FileNotFoundError:
            first = cpu
        return cpu != first, cpu

    cpus = sorted(os.sched_getaffinity(0), key=place)
    if len(cpus) < 2 * per_side:
        return None
    return set(cpus[:per_side]), set(cpus[per_side : 2 * per_side])


def pin(cpus: set[int] | None) -> None:
    """Every thread of this process, those that an engine has started included, onto these CPUs.

    After the engines are made: they look at the CPUs of their process once, and with a single one
    they never spin. Two processes with a CPU each are not that case.
    """
    if cpus is not None:
        for tid in threads(os.getpid()):
            os.sched_setaffinity(tid, cpus)
