# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""One side of a random run: an engine with a pool, its shadow, and what it knows to be true.

The pool is cut into units of several blocks each. A lease covers some units; a write fills one
unit with a stamp byte made from (epoch of the lease, unit, attempt), sets the unit's bit in the
lease's arrivals and tells it by a notification. Whatever happens, then, the owner can judge every
byte: outside open leases exactly what it put there, inside what it put or what was stamped.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from transfer_peers import TIMEOUT_S, Agent, wait_for

from kvxfer.errors import KvxferError
from kvxfer.testing.faults import Way

UNITS = 24
SMALL_UNITS = 8  # their blocks go another way on most transports
BLOCKS_PER_UNIT = 4
POISON = 255  # in sources that are quiesced; must never be accepted
SLOTS = 32
_ATTEMPTS = 4


def _layout() -> tuple[list[np.ndarray], np.ndarray, int]:
    """Offsets of each unit's blocks and each unit's block size; blocks touch, units are scattered."""
    sizes = np.where(np.arange(UNITS) < SMALL_UNITS, 1001, 40_003).astype(np.int64)
    order = np.random.default_rng(11).permutation(UNITS * BLOCKS_PER_UNIT)
    offsets = np.zeros(UNITS * BLOCKS_PER_UNIT, np.int64)
    end = 0
    for block in order:
        offsets[block] = end
        end += int(sizes[block // BLOCKS_PER_UNIT])
    return [offsets[u * 4 : u * 4 + 4] for u in range(UNITS)], sizes, end


BLOCKS, SIZES, POOL_NBYTES = _layout()
SLOT_NBYTES = int(SIZES.max()) * BLOCKS_PER_UNIT


def stamp(epoch: int, unit: int, attempt: int) -> int:
    """1 to 240: neither a fresh pool's 0 nor POISON, nor a fill (241 to 254)."""
    return 1 + (epoch * 53 + unit * 7 + attempt * 60) % 240


def book_of(name: str) -> np.ndarray:
    """The constant region of an actor, for reads."""
    seed = sum(name.encode())
    return np.random.default_rng(seed).integers(0, 256, POOL_NBYTES, dtype=np.uint8)


@dataclass
class Grant:
    lease: Any
    units: list[int]
    epoch: int
    shown: list[tuple[int, int]] = field(default_factory=list)


@dataclass
class Posted:
    xfer: Any
    slot: int
    epoch: int  # -1: a read
    unit: int
    attempt: int


@dataclass(frozen=True)
class Outcome:
    """How a write ended, as its initiator knows it."""

    epoch: int
    unit: int
    attempt: int
    state: str
    agreed: bool


class Actor(Agent):
    kind = "allocated"  # memory of the first engine; what is opened again says of which

    def __init__(self, name: str, way: Way, secret: bytes) -> None:
        super().__init__(name, way, secret)
        self.name, self.way, self.secret = name, way, secret
        self.shadow = np.zeros(POOL_NBYTES, np.uint8)
        self.grants: dict[int, Grant] = {}
        self.settled: set[int] = set()
        self.posted: list[Posted] = []
        self.outcomes: list[Outcome] = []
        self.num_taken = 0
        self.sink_shadow = np.zeros((SLOTS, SLOT_NBYTES), np.uint8)
        self.open_regions(self.kind)

    # ------------------------------------------------------------------ life

    def open_regions(self, kind: str) -> None:
        def region(name: str, nbytes: int) -> Any:
            if kind == "allocated":
                return self.engine.allocate(nbytes, name)
            return self.engine.register(np.zeros(nbytes, np.uint8), name)

        self.pool, self.source = region("pool", POOL_NBYTES), region("source", SLOTS * SLOT_NBYTES)
        self.sink, self.book = region("sink", SLOTS * SLOT_NBYTES), region("book", POOL_NBYTES)
        self.pool.array[:] = self.shadow
        self.book.array[:] = book_of(self.name)
        self.source.array[:] = POISON
        self.sink_shadow[:] = 0
        self.free = list(range(SLOTS))
        self.num_posted = 0

    def reopen(self, kind: str) -> str:
        """Closes the engine and opens another: a new incarnation, with the same memory contents."""
        self.engine.close()
        assert all(each.xfer.done and each.xfer.quiesced for each in self.posted)
        self.reap()
        for epoch in list(self.grants):
            self.settle(epoch)
        self.check()
        self.engine = self.way.engine(self.name, self.secret)
        self.open_regions(kind)
        return self.engine.address

    def connect(self, address: str) -> None:
        self.peer = self.engine.connect(address, TIMEOUT_S)

    # ------------------------------------------------------------------ as an owner

    def grant_units(self, units: list[int], epoch: int, ttl_s: float) -> bytes:
        offsets = np.concatenate([BLOCKS[unit] for unit in units])
        nbytes = np.repeat(SIZES[units], BLOCKS_PER_UNIT)
        lease = self.engine.grant(self.pool, offsets, nbytes, ttl_s=ttl_s, num_arrivals=UNITS)
        self.grants[epoch] = Grant(lease, units, epoch)
        return bytes(lease.token)

    def _unit(self, unit: int) -> np.ndarray:
        return np.concatenate([self.pool.array[at : at + SIZES[unit]] for at in BLOCKS[unit]])

    def settle(self, epoch: int) -> dict[int, int]:
        """Revokes; at once judges every byte and reuses the memory. Returns {unit: its stamp}."""
        grant = self.grants[epoch]
        grant.lease.revoke(TIMEOUT_S)
        assert grant.lease.quiet
        self._listen()
        del self.grants[epoch]
        self.settled.add(epoch)
        arrived = {}
        for unit in map(int, grant.lease.arrived):
            assert unit in grant.units, f"epoch {epoch}: unit {unit} was never granted"
            arrived[unit] = self._accepted(epoch, unit)
        for unit in grant.units:
            old = self.shadow[BLOCKS[unit][0]]
            allowed = [old, POISON, *(stamp(epoch, unit, a) for a in range(_ATTEMPTS))]
            assert np.isin(self._unit(unit), allowed).all(), f"epoch {epoch}: unit {unit}: stray"
            fill = 241 + (epoch + unit) % 14
            for at in BLOCKS[unit]:
                self.pool.array[at : at + SIZES[unit]] = fill
                self.shadow[at : at + SIZES[unit]] = fill
        shown = [unit for unit, _ in grant.shown]
        if self.engine.closed:  # which drops what was not taken
            assert set(shown) <= set(arrived)
        else:
            assert sorted(shown) == sorted(arrived), f"epoch {epoch}: {shown}, arrived {arrived}"
        return arrived

    def _accepted(self, epoch: int, unit: int) -> int:
        values = np.unique(self._unit(unit))
        stamps = [stamp(epoch, unit, attempt) for attempt in range(_ATTEMPTS)]
        assert len(values) == 1, f"epoch {epoch}: accepted unit {unit} holds {values[:9]}"
        assert values[0] in stamps, f"epoch {epoch}: unit {unit} holds {values[0]}, not {stamps}"
        return int(values[0])

    def _listen(self) -> None:
        for each in self.engine.notifications():
            epoch, unit, attempt = map(int, each.payload.split())
            assert epoch not in self.settled, f"epoch {epoch} speaks after it was revoked"
            # Visible only after its data, and nothing of an earlier attempt came on top.
            assert self._accepted(epoch, unit) == stamp(epoch, unit, attempt)
            assert unit in self.grants[epoch].lease.arrived
            self.grants[epoch].shown.append((unit, attempt))

    def check(self) -> None:
        """Outside open leases nothing has changed; nor what a finished read left behind."""
        open_ = np.zeros(POOL_NBYTES, bool)
        for grant in self.grants.values():
            for unit in grant.units:
                for at in BLOCKS[unit]:
                    open_[at : at + SIZES[unit]] = True
        wrong = np.flatnonzero((self.pool.array != self.shadow) & ~open_)
        assert len(wrong) == 0, f"{len(wrong)} corrupt bytes, the first at {wrong[0]}"
        sink = self.sink.array.reshape(SLOTS, SLOT_NBYTES)
        busy = {each.slot for each in self.posted if each.epoch < 0}
        for slot in set(range(SLOTS)) - busy:
            assert (sink[slot] == self.sink_shadow[slot]).all(), f"sink {slot}: a late store"

    # ------------------------------------------------------------------ as an initiator

    def write_unit(
        self, token: bytes, epoch: int, unit: int, attempt: int, deadline_s: float
    ) -> bool:
        remote = self.peer.regions.get("pool")
        if remote is None or not self.free:
            return False
        slot, size = self.free.pop(), int(SIZES[unit])
        base = slot * SLOT_NBYTES
        self.source.array[base : base + size * BLOCKS_PER_UNIT] = stamp(epoch, unit, attempt)
        xfer = self.engine.write(
            self.source,
            remote,
            base + np.arange(BLOCKS_PER_UNIT, dtype=np.int64) * size,
            BLOCKS[unit],
            size,
            lease=token,
            arrival=unit,
            notify=b"%d %d %d" % (epoch, unit, attempt),
            deadline_s=deadline_s,
        )
        self.posted.append(Posted(xfer, slot, epoch, unit, attempt))
        self.num_posted += 1
        return True

    def read_unit(self, unit: int, deadline_s: float) -> bool:
        remote = self.peer.regions.get("book")
        if remote is None or not self.free:
            return False
        slot, size = self.free.pop(), int(SIZES[unit])
        into = slot * SLOT_NBYTES + np.arange(BLOCKS_PER_UNIT, dtype=np.int64) * size
        xfer = self.engine.read(self.sink, remote, into, BLOCKS[unit], size, deadline_s=deadline_s)
        self.posted.append(Posted(xfer, slot, -1, unit, 0))
        self.num_posted += 1
        return True

    def cancel_some(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        for each in self.posted:
            if rng.random() < 0.4:
                each.xfer.cancel()
                assert each.xfer.done, "cancel has a definite end at once"
                self._free(each)
        self.reap()

    def _free(self, each: Posted) -> None:
        """Quiesced: the memory is reused this instant."""
        if each.epoch >= 0 and each.xfer.done and each.xfer.quiesced:
            self.source.array[each.slot * SLOT_NBYTES :][:SLOT_NBYTES] = POISON

    def reap(self) -> None:
        self._listen()
        for each in [e for e in self.posted if e.xfer.done and e.xfer.quiesced]:
            self._free(each)
            self.posted.remove(each)
            if each.epoch >= 0:
                end = (each.xfer.state, each.xfer.agreed)
                self.outcomes.append(Outcome(each.epoch, each.unit, each.attempt, *end))
            else:
                self._judge_read(each)
            self.free.append(each.slot)

    def _judge_read(self, each: Posted) -> None:
        sink, size = self.sink.array.reshape(SLOTS, SLOT_NBYTES)[each.slot], int(SIZES[each.unit])
        if each.xfer.state == "done":
            book = book_of(self.peer.name)
            expected = np.concatenate([book[at : at + size] for at in BLOCKS[each.unit]])
            assert (sink[: len(expected)] == expected).all(), "a read that is done is not whole"
        sink[:] = each.slot
        self.sink_shadow[each.slot] = each.slot

    def take_outcomes(self) -> list[Outcome]:
        """Those that were not asked for yet."""
        taken, self.num_taken = self.outcomes[self.num_taken :], len(self.outcomes)
        return taken

    def finish(self) -> list[Outcome]:
        """Everything ends, by its own deadline at the latest; the engine's books agree."""

        def all_ended() -> bool:
            self.reap()
            return not self.posted

        wait_for(self.engine, all_ended)
        stats = self.engine.stats()["transfers"]
        assert (stats["in_flight"], stats["unquiesced"]) == (0, 0)
        ends = sum(stats[end] for end in ("done", "failed", "timed_out", "cancelled"))
        assert ends == self.num_posted, "one end for each transfer"
        return self.outcomes

    def drive(self, posts: list[tuple[Any, ...]]) -> list[int]:
        """A burst of posts without waiting in between; which of them were posted."""
        posted = []
        for number, (what, *how) in enumerate(posts):
            self.reap()
            try:
                if (self.write_unit if what == "write" else self.read_unit)(*how):
                    posted.append(number)
            except KvxferError as error:  # the peer went in between
                if "gone" not in str(error) and "another engine" not in str(error):
                    raise
        return posted


class RegisteredActor(Actor):
    kind = "registered"


ACTORS = {actor.kind: actor for actor in (Actor, RegisteredActor)}
