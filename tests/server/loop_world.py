# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Workers' engine loops over the fake model and the connector's adversarial in-memory engine, in one thread."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
from fake_engine import FakeEngine, InlineExecutor, Net
from fake_model import SHAPE, FakeRunner, answer, fake_sampler, request_of

from kvxfer.connector import Endpoint, HandoffConfig
from kvxfer.layout import KVLayout
from kvxfer.server.engine.blocks import BlockPool
from kvxfer.server.engine.loop import EngineLoop
from kvxfer.server.engine.requests import Delivery
from kvxfer.server.engine.scheduler import Scheduler
from kvxfer.server.engine.sequence import Event, Limits, Request
from kvxfer.server.metrics import Metrics
from kvxfer.server.wire import (
    ErrorEvent,
    Finish,
    KVTransferParams,
    PeerRef,
    PrefillReply,
    TokenRequest,
    Tokens,
    Usage,
)

SIZE = 4
CONFIG = HandoffConfig(write_deadline_s=8.0, lost_after_s=10.0)


class Leg:
    """One submitted leg and what its sink heard."""

    def __init__(self, worker: Worker, spec: TokenRequest, role: Any) -> None:
        self.worker, self.spec = worker, spec
        self.events: list[Event] = []
        self.request: Request = worker.loop.submit(spec, role, self.events.append)

    @property
    def last(self) -> Event | None:
        ends = (Usage, ErrorEvent, PrefillReply)
        return self.events[-1] if self.events and isinstance(self.events[-1], ends) else None

    @property
    def ids(self) -> list[list[int]]:
        found: dict[int, list[int]] = {}
        for event in self.events:
            if isinstance(event, Tokens):
                ids = found.setdefault(event.i, [])
                assert event.pos == len(ids), "a token was lost or doubled"
                ids.extend(event.ids)
        return [found[i] for i in sorted(found)]

    @property
    def reasons(self) -> list[str]:
        return [event.reason for event in self.events if isinstance(event, Finish)]

    def check_end(self) -> None:
        ends = [e for e in self.events if isinstance(e, (Usage, ErrorEvent, PrefillReply))]
        assert len(ends) == 1, f"{self.spec.request_id} ended {len(ends)} times: {self.events}"
        assert self.events[-1] is ends[0], "an event came after the end"

    def cancel(self) -> None:
        self.worker.loop.cancel(self.request, "the client left")


class Worker:
    def __init__(
        self,
        net: Net,
        name: str,
        layout: KVLayout,
        make_runner: Callable[[Any], Any],
        limits: Limits,
        **options: Any,
    ) -> None:
        """``make_runner`` takes the cache's views; ``options`` are the loop's."""
        self.net, self.name, self.layout = net, name, layout
        self.engine = FakeEngine(net, name, layout.nbytes)
        self.engine.region.array.view(np.float32)[:] = np.nan  # whatever is not written shows
        owner = np.zeros(layout.nbytes, np.uint8)
        for parts in layout.views(owner):
            for part in parts:
                part[:] = np.arange(layout.num_blocks, dtype=np.float32).reshape(-1, 1, 1, 1)
        self.block_of = np.repeat(owner.view(np.float32).astype(int), 4)  # of each byte
        self.endpoint = Endpoint(
            self.engine,
            self.engine.region,
            layout,
            model_id="model",
            config=CONFIG,
            clock=net.clock,
            executor=InlineExecutor(),
        )
        self.runner = make_runner(layout.views(self.engine.region.array))
        self.pool = BlockPool(layout.num_blocks, layout.block_size)
        self.scheduler = Scheduler(
            self.pool,
            limits,
            eos_ids=options.get("eos_ids", ()),
            copy_block=self.runner.copy_block,
        )
        self.metrics = Metrics()
        self.loop = EngineLoop(
            self.scheduler,
            self.runner,
            self.endpoint,
            self.engine.fileno(),
            self.metrics,
            deliver=self._deliver,
            clock=net.clock,
            **options,
        )
        self.metrics.read_from(lambda: self.loop.snapshot, dict)

    def _deliver(self, batch: list[Delivery]) -> None:
        for sink, event in batch:
            sink(event)

    def step(self) -> bool:
        if not self.engine.alive:
            return False
        worked = self.loop.step()
        self.scheduler.check()
        self.check_pins()
        return worked

    def check_pins(self) -> None:
        """What a peer may still write into, and what is still being read, is leased in the pool."""
        busy = set()
        for lease in self.engine.leases.values():
            if not lease.quiet:
                busy |= set(self.block_of[lease.allowed].tolist())
        for transfer in self.engine.transfers:
            if not transfer.quiesced:
                for at, _, nbytes in transfer.spans:
                    busy |= set(self.block_of[at : at + nbytes].tolist())
        leased = {block for block, pins in enumerate(self.pool._pins) if pins}
        assert busy <= leased, f"{self.name}: blocks {busy - leased} are in use and not leased"

    def whole(self) -> bool:
        """Idle, and every block is back."""
        counts = self.pool.counts()
        return self.loop.idle and counts.active == counts.leased == 0


def fake_worker(net: Net, name: str, *, num_blocks: int = 24, tokens: int = 16) -> Worker:
    """One with the fake model."""
    layout = KVLayout.hnd(num_blocks=num_blocks, block_size=SIZE, **SHAPE)
    limits = Limits(max_num_seqs=6, max_num_batched_tokens=tokens, max_model_len=10_000)
    options = {"eos_ids": (0,), "sampler": fake_sampler}
    return Worker(net, name, layout, lambda cache: FakeRunner(cache, SIZE), limits, **options)


class World:
    def __init__(self, make_worker: Callable[..., Worker] = fake_worker, **options: Any) -> None:
        self.net = Net()
        self.prefill = make_worker(self.net, "prefill", **options)
        self.decode = make_worker(self.net, "decode", **options)
        self.legs: list[Leg] = []
        self._names = itertools.count()
        for worker in (
            self.prefill,
            self.decode,
        ):  # their descriptors; hypothesis makes many worlds
            weakref.finalize(self, worker.engine.close)
            weakref.finalize(self, worker.loop.close)

    @property
    def workers(self) -> list[Worker]:
        return [worker for worker in (self.prefill, self.decode) if worker.engine.alive]

    def ask(self, prompt: list[int], max_tokens: int = 6, **fields: Any) -> tuple[Leg, Leg]:
        """Both legs of one request, decode's first."""
        spec = request_of(prompt, max_tokens, name=f"r{next(self._names)}", **fields)
        return self.open(spec, "decode"), self.open(spec, "prefill")

    def open(self, spec: TokenRequest, role: Any) -> Leg:
        worker, other = self.prefill, self.decode
        if role == "decode":
            worker, other = other, worker
        peer = PeerRef(
            engine=other.engine.address,
            incarnation=other.engine.incarnation,
            signature="s",
            model="model",
        )
        params = None if role == "local" else KVTransferParams(role=role, peer=peer)
        fields = {name: getattr(spec, name) for name in spec.__struct_fields__}
        leg = Leg(worker, TokenRequest(**{**fields, "kv_transfer_params": params}), role)
        self.legs.append(leg)
        return leg

    def settle(self, *, seconds: float = 0.0) -> None:
        """Runs everything that can run; time passes only as far as told."""
        end = self.net.now + seconds
        for _ in range(20_000):
            # No short cut: each of them has to be stepped.
            worked = [worker.step() for worker in self.workers]
            if self.net.pending:
                self.net.run_all()
            elif not any(worked) and not any(w.endpoint._context.events for w in self.workers):
                if self.net.now >= end:
                    return
                self.net.advance(1.0)
        raise AssertionError("the workers never come to rest")

    def check_all(self) -> None:
        """Each leg ended once; good answers are those of a lone run, others a prefix of it."""
        for leg in self.legs:
            if not leg.worker.engine.alive:
                continue
            leg.check_end()
            if leg.request.role == "prefill":
                continue
            expected = answer(leg.spec, (0,))
            if isinstance(leg.last, Usage) and "abort" not in leg.reasons:
                assert leg.ids == expected
            for ids, good in zip(leg.ids, expected, strict=False):
                assert ids == good[: len(ids)]
        for worker in self.workers:
            assert worker.whole(), f"{worker.name}: {worker.pool.counts()}"
            worker.loop._check_accounts()
