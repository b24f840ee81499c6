# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Workers over the fake engine, with owners that act like a scheduler and check everything they are told.

Freed blocks are poisoned at once, so that a byte that lands late, or a source that is read late, shows.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field

import numpy as np
from fake_engine import FakeEngine, InlineExecutor, Net

from kvxfer.connector import (
    Accepted,
    Declined,
    Endpoint,
    Event,
    Failed,
    Granted,
    HandoffConfig,
    Offered,
    Quiet,
)
from kvxfer.layout import KVLayout

NUM_LAYERS = 2
SHAPE = {"num_layers": NUM_LAYERS, "num_kv_heads": 2, "head_dim": 2, "dtype": "float32"}
# Different block sizes and orders on the two sides: chunks are ranges of tokens, not of blocks.
PREFILL_LAYOUT = KVLayout.nhd(num_blocks=6, block_size=4, **SHAPE)
DECODE_LAYOUT = KVLayout.hnd(num_blocks=9, block_size=2, **SHAPE)
CONFIG = HandoffConfig(write_deadline_s=8.0, lost_after_s=10.0)


def kv_of(handoff: str, layer: int, part: int, token: int) -> np.ndarray:
    """The KV [heads, dim] that a handoff's prompt has there; no two are alike."""
    seed = zlib.crc32(f"{handoff}/{layer}/{part}/{token}".encode()) >> 12
    return (np.arange(4, dtype=np.float32) + 4 * seed).reshape(2, 2)


@dataclass
class Leg:
    handoff: str
    num_tokens: int
    blocks: list[int] = field(default_factory=list)
    token_begin: int = 0
    token_end: int = 0
    computed: int = 0
    cached: int = 0
    chunk_index: int = 0
    started: bool = False
    given: bool = False  # blocks are in the connector's hands
    declined: bool = False
    committed: bool = False
    aborted: bool = False
    log: list[Event] = field(default_factory=list)

    def has(self, kind: type) -> bool:
        return any(isinstance(event, kind) for event in self.log)

    @property
    def ended(self) -> bool:
        """No event may follow."""
        if self.declined or self.has(Accepted) or self.has(Declined) or self.has(Quiet):
            return True
        return self.has(Failed) and not self.given


class Worker:
    def __init__(self, net: Net, name: str, layout: KVLayout) -> None:
        self.net, self.layout = net, layout
        self.engine = FakeEngine(net, name, layout.nbytes)
        self.endpoint = Endpoint(
            self.engine,
            self.engine.region,
            layout,
            model_id="model",
            config=CONFIG,
            clock=net.clock,
            executor=InlineExecutor(),
        )
        self.views = layout.views(self.engine.region.array)
        self.free = list(range(layout.num_blocks))
        self.legs: dict[str, Leg] = {}
        for block in self.free:
            self.poison(block)

    @property
    def alive(self) -> bool:
        return self.engine.alive

    def poison(self, block: int) -> None:
        for layer in self.views:
            for part in layer:
                part[block] = -1.0 - block

    def take_blocks(self, num_tokens: int) -> list[int] | None:
        count = -(-num_tokens // self.layout.block_size)
        if count > len(self.free):
            return None
        taken, self.free = self.free[-count:][::-1], self.free[:-count]
        return taken

    def give_back(self, leg: Leg) -> None:
        for block in leg.blocks:
            self.poison(block)
        self.free.extend(leg.blocks)
        leg.blocks = []

    def cell(self, leg: Leg, layer: int, part: int, token: int) -> np.ndarray:
        block = leg.blocks[token // self.layout.block_size]
        return self.views[layer][part][block, token % self.layout.block_size]

    def check_free_blocks(self) -> None:
        free = np.array(self.free, np.int64)
        wanted = (-1.0 - free)[:, None, None, None]
        for layer in self.views:
            for part in layer:
                wrong = free[(part[free] != wanted).any(axis=(1, 2, 3))]
                assert not len(wrong), f"free block {wrong[0]} was written"

    def poll(self) -> None:
        if not self.alive:
            return
        self.net.broken = True  # until the checks below have passed
        for event in self.endpoint.poll():
            leg = self.legs[event.handoff]
            assert not leg.ended, f"{event} after the end: {leg.log}"
            assert not (leg.has(Failed) and isinstance(event, Failed)), f"failed twice: {leg.log}"
            leg.log.append(event)
            self.on_event(event, leg)
        self.check_free_blocks()
        self.net.broken = False

    def on_event(self, event: Event, leg: Leg) -> None:
        raise NotImplementedError


class Decode(Worker):
    def expect(self, handoff: str, num_tokens: int, deadline_s: float) -> None:
        self.legs[handoff] = Leg(handoff, num_tokens)
        self.endpoint.receiver.expect(handoff, deadline_s=deadline_s)

    def on_event(self, event: Event, leg: Leg) -> None:
        if isinstance(event, Accepted):
            for layer in range(NUM_LAYERS):
                for part in range(2):
                    for token in range(leg.token_begin, leg.token_end):
                        wanted = kv_of(leg.handoff, layer, part, token)
                        got = self.cell(leg, layer, part, token)
                        assert (got == wanted).all(), (
                            f"wrong bytes: layer {layer}, token {token} of {leg}"
                        )
            assert event.first_tokens == (7, 8), event
            nbytes = (leg.token_end - leg.token_begin) * 16 * 2 * NUM_LAYERS
            assert event.nbytes == nbytes, event
            self.give_back(leg)
        elif isinstance(event, Quiet):
            assert leg.has(Failed), f"quiet unasked: {leg}"
            self.give_back(leg)
        else:
            assert isinstance(event, (Offered, Failed)), event

    def waiting(self) -> list[Leg]:
        return [
            leg
            for leg in self.legs.values()
            if leg.has(Offered) and not (leg.given or leg.declined or leg.has(Failed))
        ]

    def grant(self, leg: Leg, cached: int) -> bool:
        blocks = self.take_blocks(leg.num_tokens)
        if blocks is None:
            return False
        leg.blocks, leg.given = blocks, True
        leg.token_begin, leg.token_end = min(cached, leg.num_tokens - 1), leg.num_tokens
        self.endpoint.receiver.grant(
            leg.handoff,
            np.array(blocks, np.int32),
            token_begin=leg.token_begin,
            token_end=leg.token_end,
        )
        return True

    def decline(self, leg: Leg) -> None:
        leg.declined = True
        self.endpoint.receiver.decline(leg.handoff, "cached here")

    def abort(self, leg: Leg) -> None:
        leg.aborted = True
        self.endpoint.receiver.abort(leg.handoff, "client gone")


class Prefill(Worker):
    def offer(self, handoff: str, num_tokens: int, peer: Worker, deadline_s: float) -> None:
        self.legs[handoff] = Leg(handoff, num_tokens)
        self.endpoint.sender.offer(
            handoff,
            peer_address=peer.engine.address,
            peer_incarnation=peer.engine.incarnation,
            num_tokens=num_tokens,
            deadline_s=deadline_s,
        )

    def on_event(self, event: Event, leg: Leg) -> None:
        if isinstance(event, Quiet):
            assert leg.committed or leg.has(Failed), f"quiet unasked: {leg}"
            self.give_back(leg)
        else:
            assert isinstance(event, (Granted, Declined, Failed)), event

    def waiting(self) -> list[Leg]:
        return [
            leg
            for leg in self.legs.values()
            if leg.has(Granted) and not leg.started and not leg.has(Failed)
        ]

    def running(self) -> list[Leg]:
        return [
            leg for leg in self.legs.values() if leg.started and leg.blocks and not leg.committed
        ]

    def start(self, leg: Leg, cached: int) -> bool:
        blocks = self.take_blocks(leg.num_tokens)
        if blocks is None:
            return False
        leg.blocks, leg.started, leg.given = blocks, True, True
        leg.cached = leg.computed = min(cached, leg.num_tokens - 1)
        for layer in range(NUM_LAYERS):
            self._fill(leg, layer, 0, leg.cached)
        self.endpoint.sender.start(leg.handoff, blocks)
        return True

    def compute_chunk(self, leg: Leg, size: int) -> None:
        begin, end = leg.computed, min(leg.computed + size, leg.num_tokens)
        for layer in range(NUM_LAYERS):
            self._fill(leg, layer, begin, end)
            self.endpoint.sender.layer_done(
                leg.handoff,
                chunk_index=leg.chunk_index,
                layer=layer,
                token_begin=begin,
                token_end=end,
            )
        leg.computed = end
        leg.chunk_index += 1
        if end == leg.num_tokens:
            leg.committed = True
            self.endpoint.sender.commit(
                leg.handoff,
                num_chunks=leg.chunk_index,
                first_tokens=(7, 8),
                cached_tokens=leg.cached,
            )

    def abort(self, leg: Leg) -> None:
        leg.aborted = True
        self.endpoint.sender.abort(leg.handoff, "client gone")

    def _fill(self, leg: Leg, layer: int, begin: int, end: int) -> None:
        for part in range(2):
            for token in range(begin, end):
                self.cell(leg, layer, part, token)[:] = kv_of(leg.handoff, layer, part, token)


class World:
    """Two prefill workers and one decode worker."""

    def __init__(self) -> None:
        self.net = Net()
        self.prefill = [Prefill(self.net, f"p{i}", PREFILL_LAYOUT) for i in range(2)]
        self.decode = Decode(self.net, "d", DECODE_LAYOUT)
        self.dead: list[Worker] = []

    @property
    def workers(self) -> list[Worker]:
        return [*self.prefill, self.decode]

    def kill(self, worker: Worker) -> None:
        """And restart it: the same place, a new incarnation."""
        worker.engine.die()
        worker.endpoint.close()
        self.dead.append(worker)
        fresh = type(worker)(self.net, worker.engine.name, worker.layout)
        if worker is self.decode:
            self.decode = fresh  # type: ignore[assignment]
        else:
            self.prefill[self.prefill.index(worker)] = fresh  # type: ignore[arg-type]

    def go_on(self, *, chunk: int = 4) -> None:
        """Everybody does what a scheduler would."""
        for leg in self.decode.waiting():
            self.decode.grant(leg, 0)
        for worker in self.prefill:
            for leg in worker.waiting():
                worker.start(leg, 0)
            for leg in worker.running():
                worker.compute_chunk(leg, chunk)

    def finish(self, *, within_s: float) -> None:
        """Runs everything to its end, in bounded fake time."""
        if self.net.broken:
            return  # after a failed check; what follows from it would only hide it
        until = self.net.now + within_s
        while True:
            self.net.run_all()
            for worker in self.workers:
                worker.poll()
            self.go_on()
            if all(leg.ended for worker in self.workers for leg in worker.legs.values()):
                break
            open_legs = [leg for w in self.workers for leg in w.legs.values() if not leg.ended]
            assert self.net.now < until, f"no end: {open_legs}"
            self.net.advance(2.0)
        self.net.run_all()
        for worker in self.workers:
            worker.poll()
            everything = list(range(worker.layout.num_blocks))
            assert sorted(worker.free) == everything, f"leaked: {worker.free} are free"

    def close(self) -> None:
        for worker in [*self.workers, *self.dead]:
            worker.endpoint.close()
            worker.engine.close()
