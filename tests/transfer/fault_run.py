# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""A random run of two actors, one of them in a process that is stopped and killed; by a seed.

Both grant, write, read, cancel, retry and revoke; the director decides what happens next and keeps
the books from which the end is judged: what an initiator calls done has arrived whole, what both
sides agree did not happen has left no trace, everything else is the owner's to say.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from fault_actor import ACTORS, UNITS, Outcome, stamp
from transfer_peers import SECRET, PeerProcess, wait_for

from kvxfer.testing.faults import Way

MAX_ATTEMPTS = 4


def _queued_s() -> float:
    """How long our threads have been ready to run and did not: what a busy machine adds."""
    waits = 0
    for stat in Path("/proc/self/task").glob("*/schedstat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it ended meanwhile
            waits += int(stat.read_text().split()[1])
    return waits * 1e-9


@dataclass
class Book:
    """What a writer may still write under one lease."""

    token: bytes
    units: list[int]
    attempts: dict[int, int] = field(default_factory=dict)
    shut: set[int] = field(default_factory=set)  # on its way, arrived, or not known


class Run:
    def __init__(self, way: Way, seed: int, kind: str) -> None:
        """``kind``: of both sides' memory, "allocated" or "registered"."""
        self.way, self.seed, self.rng = way, seed, np.random.default_rng(seed)
        self.trail: list[str] = []  # for the message when it fails
        self.lateness: list[float] = []
        self.faults = 0
        self._epoch = 0
        self._waiting: list[tuple[Any, ...]] | None = None  # posts that the rival has yet to report
        self.stopped = False
        self.actor = ACTORS[kind]
        self.driver = self.actor("driver", way, SECRET)
        self._start_rival()
        # By direction: the writer's books, what has arrived of settled epochs.
        self.books: dict[str, dict[int, Book]] = {"driver": {}, "rival": {}}
        self.arrived: dict[int, dict[int, int]] = {}

    # ------------------------------------------------------------------ the two of them

    def _start_rival(self) -> None:
        self.rival = PeerProcess("rival", self.way, agent_type=self.actor)
        self.address = self.rival.address
        self._connect()

    def _connect(self) -> None:
        self.driver.connect(self.address)
        self.rival.call("connect", self.driver.engine.address)

    def _on(self, who: str, method: str, *args: Any) -> Any:
        if who == "rival":
            return self.rival.call(method, *args)
        return getattr(self.driver, method)(*args)

    def _wait_lost(self) -> None:
        peer = self.driver.peer
        wait_for(self.driver.engine, lambda: not peer.alive)

    # ------------------------------------------------------------------ what may happen

    def grant(self, owner: str) -> None:
        writer = "driver" if owner == "rival" else "rival"
        if len(self.books[writer]) >= 2:
            return
        taken = {unit for book in self.books[writer].values() for unit in book.units}
        left = [unit for unit in range(UNITS) if unit not in taken]
        units = sorted(map(int, self.rng.choice(left, size=min(len(left), 12), replace=False)))
        self._epoch += 1
        ttl_s = 0.05 if self.rng.random() < 0.1 else 600.0
        token = self._on(owner, "grant_units", units, self._epoch, ttl_s)
        self.books[writer][self._epoch] = Book(token, units)

    def _posts(self, writer: str) -> list[tuple[Any, ...]]:
        posts: list[tuple[Any, ...]] = []
        for epoch, book in self.books[writer].items():
            for unit in self.rng.permutation(book.units)[:8]:
                attempt = book.attempts.get(int(unit), 0)
                if int(unit) in book.shut or attempt >= MAX_ATTEMPTS:
                    continue
                deadline_s = float(self.rng.choice([0.01, 0.05, 10.0, 10.0]))
                posts.append(("write", book.token, epoch, int(unit), attempt, deadline_s))
        for unit in self.rng.integers(0, UNITS, 3):
            posts.append(("read", int(unit), 10.0))
        self.rng.shuffle(posts)  # type: ignore[arg-type]
        return posts

    def _mark(self, writer: str, posts: list[tuple[Any, ...]], posted: list[int]) -> None:
        for number in posted:
            if posts[number][0] == "write" and posts[number][2] in self.books[writer]:
                _, _, epoch, unit, attempt, _ = posts[number]
                self.books[writer][epoch].attempts[unit] = attempt + 1
                self.books[writer][epoch].shut.add(unit)

    def burst(self, fault: str | None) -> None:
        """Both write and read at once; then, in the midst of it, the fault."""
        theirs, ours = self._posts("rival"), self._posts("driver")
        if not self.stopped:
            self.rival.send("drive", theirs)
            self._waiting = theirs
        self._mark("driver", ours, self.driver.drive(ours))
        if fault is not None:
            for _ in range(int(self.rng.integers(0, 20_000))):
                pass
            getattr(self, fault)()
        elif not self.stopped:
            self._hear()

    def _hear(self) -> None:
        if self._waiting is not None:
            self._mark("rival", self._waiting, self.rival.receive())
            self._waiting = None

    def retry(self, writer: str) -> None:
        """What both sides agree was not accepted may be written again, over the same connection."""
        self._on(writer, "reap")
        for each in self._on(writer, "take_outcomes"):
            book = self.books[writer].get(each.epoch)
            if book is not None and each.state != "done" and each.agreed:
                book.shut.discard(each.unit)

    def cancel(self, writer: str) -> None:
        self._on(writer, "cancel_some", int(self.rng.integers(1 << 30)))

    def settle(self, owner: str) -> None:
        writer = "driver" if owner == "rival" else "rival"
        if self.books[writer]:
            epoch = int(self.rng.choice(list(self.books[writer])))
            del self.books[writer][epoch]
            self.arrived[epoch] = self._on(owner, "settle", epoch)

    def check(self, who: str) -> None:
        self._on(who, "reap")
        self._on(who, "check")

    # ------------------------------------------------------------------ faults

    def stop(self) -> None:
        if self.stopped:
            return
        self.faults += 1
        self.rival.stop()
        self.stopped = True
        began, queued_s = time.monotonic(), _queued_s()
        if self.driver.read_unit(20, 0.05):
            xfer = self.driver.posted[-1].xfer
            wait_for(self.driver.engine, lambda: xfer.done)
            if xfer.state == "timed_out":
                queued_s = _queued_s() - queued_s
                self.lateness.append(time.monotonic() - began - 0.05 - queued_s)

    def resume(self) -> None:
        if self.stopped:
            self.rival.resume()
            self.stopped = False
            self._hear()

    def kill(self) -> None:
        self.faults += 1
        self.rival.kill()
        self.rival.close()
        self.stopped, self._waiting = False, None
        self._wait_lost()
        self.driver.finish()  # the dead cannot keep anything open
        self.books["driver"].clear()
        self._settle_all("driver")
        self._start_rival()

    def close_rival(self) -> None:
        self.resume()
        address = self.rival.call("reopen", self._kind())
        self._wait_lost()
        self.driver.finish()
        self.books["driver"].clear()
        self._settle_all("driver")
        self.address = address
        self._connect()

    def close_driver(self) -> None:
        self.resume()
        self.driver.reopen(self._kind())
        self.books["rival"].clear()
        # What went over the old connection must not be written again over a new one, also what was
        # agreed to be cancelled: another connection's copier may be inside it still.
        self.driver.take_outcomes()
        for book in self.books["driver"].values():
            book.shut |= set(book.attempts)
        self.rival.call("finish")
        self._connect()

    def _kind(self) -> str:
        return str(self.rng.choice(["allocated", "registered"]))

    def _settle_all(self, owner: str) -> None:
        writer = "driver" if owner == "rival" else "rival"
        for epoch in list(self.books[writer]):
            del self.books[writer][epoch]
            self.arrived[epoch] = self._on(owner, "settle", epoch)

    # ------------------------------------------------------------------ the whole

    def step(self, what: str) -> None:
        """One event, by the name that the trail shows."""
        name, _, who = what.partition(" ")
        self.trail.append(what)
        if name == "burst":
            self.burst(who or None)
        elif who:
            if who == "rival" and self.stopped:
                return
            getattr(self, name)(who)
        else:
            getattr(self, name)()

    def end(self) -> None:
        """Everything ends, and both sides' books agree."""
        self.resume()
        self._hear()
        outcomes: list[Outcome] = [*self.driver.finish(), *self.rival.call("finish")]
        self._settle_all("driver")
        self._settle_all("rival")
        self.check("driver")
        self.check("rival")
        for each in outcomes:
            if each.epoch not in self.arrived:
                continue  # its owner is gone
            seen = self.arrived[each.epoch].get(each.unit)
            mine = stamp(each.epoch, each.unit, each.attempt)
            if each.state == "done":
                assert each.agreed
                assert seen == mine, f"{each} is done, but the owner has {seen}, not {mine}"
            elif each.agreed:
                assert seen != mine, f"{each} was agreed not to be, but the owner has it"

    def close(self) -> None:
        self.driver.engine.close()
        self.rival.close()
