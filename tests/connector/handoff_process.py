# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""One worker over the real engine: in this process, or as a child that takes JSON commands and tells its events.

Run as a script: ``handoff_process.py ROLE TRANSPORT``. Every wait is on an event, with a bound.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np

from kvxfer.connector import Endpoint, Event, Granted, HandoffConfig, Offered
from kvxfer.layout import KVLayout
from kvxfer.transfer import TransferEngine

NUM_LAYERS, NUM_HEADS, HEAD_DIM = 4, 2, 16
SHAPE = {
    "num_layers": NUM_LAYERS,
    "num_kv_heads": NUM_HEADS,
    "head_dim": HEAD_DIM,
    "dtype": "float32",
}
LAYOUTS = {
    "prefill": KVLayout.nhd(num_blocks=40, block_size=16, **SHAPE),
    "decode": KVLayout.hnd(num_blocks=60, block_size=8, **SHAPE),
}
BOUND_S = 20.0


def kv_of(seed: int, layer: int, part: int, num_tokens: int) -> np.ndarray:
    shape = (num_tokens, NUM_HEADS, HEAD_DIM)
    return np.random.default_rng([seed, layer, part]).standard_normal(shape, np.float32)


class Worker:
    def __init__(self, role: str, transport: str) -> None:
        self.layout = LAYOUTS[role]
        self.engine = TransferEngine(role, transports=(transport,))
        region = self.engine.allocate(self.layout.nbytes, name="kv", require_lease=True)
        self.array = region.array
        self.views = self.layout.views(region.array)
        self.endpoint = Endpoint(
            self.engine, region, self.layout, model_id="model", config=HandoffConfig(beat_s=0.25)
        )
        self.log: list[Event] = []

    def wait_for(self, condition: Callable[[], object], bound_s: float = BOUND_S) -> None:
        until = time.monotonic() + bound_s
        while not condition():
            left = until - time.monotonic()
            assert left > 0, f"nothing within {bound_s} s; so far {self.log}"
            self.step(left)

    def wait_event(self, kind: type, bound_s: float = BOUND_S) -> Event:
        self.wait_for(lambda: any(isinstance(event, kind) for event in self.log), bound_s)
        return next(event for event in self.log if isinstance(event, kind))

    def step(self, longest_s: float) -> None:
        """Sleeps until something happens, then polls."""
        self.sleep(longest_s)
        self.log.extend(self.endpoint.poll())

    def sleep(self, longest_s: float, *more: int) -> list[int]:
        """Until something happens. Returns which of ``more`` are readable."""
        deadline = self.endpoint.next_deadline()
        sleep_s = longest_s if deadline is None else min(longest_s, deadline - time.monotonic())
        ready, _, _ = select.select([self.engine.fileno(), *more], [], [], max(0.0, sleep_s))
        return [fd for fd in ready if fd in more]

    def token_view(self, layer: int, part: int, blocks: list[int], token: int) -> np.ndarray:
        size = self.layout.block_size
        return self.views[layer][part][blocks[token // size], token % size]

    def close(self) -> None:
        self.endpoint.close()
        self.engine.close()


class Prefill:
    """Sends one prompt: the chunks as told, as many layers as told."""

    def __init__(self, worker: Worker, handoff: str, seed: int, ends: list[int]) -> None:
        self.worker, self.handoff, self.seed, self.ends = worker, handoff, seed, ends
        num_blocks = -(-ends[-1] // worker.layout.block_size)
        self.blocks = list(range(num_blocks))[::-1]
        self.posted = 0

    def offer(self, address: str, incarnation: str) -> None:
        self.worker.endpoint.sender.offer(
            self.handoff,
            peer_address=address,
            peer_incarnation=incarnation,
            num_tokens=self.ends[-1],
            deadline_s=60.0,
        )

    def start(self) -> None:
        self.worker.endpoint.sender.start(self.handoff, self.blocks)

    def post(self, until: int) -> None:
        """Layers up to the ``until``-th of all chunks; commits after the last."""
        while self.posted < min(until, len(self.ends) * NUM_LAYERS):
            chunk, layer = divmod(self.posted, NUM_LAYERS)
            begin, end = ([0, *self.ends])[chunk], self.ends[chunk]
            for part in range(2):
                kv = kv_of(self.seed, layer, part, self.ends[-1])
                for token in range(begin, end):
                    self.worker.token_view(layer, part, self.blocks, token)[:] = kv[token]
            self.worker.endpoint.sender.layer_done(
                self.handoff, chunk_index=chunk, layer=layer, token_begin=begin, token_end=end
            )
            self.posted += 1
        if self.posted == len(self.ends) * NUM_LAYERS:
            self.worker.endpoint.sender.commit(
                self.handoff, num_chunks=len(self.ends), first_tokens=[5], cached_tokens=0
            )


def main(role: str, transport: str) -> None:
    worker = Worker(role, transport)
    prefill: Prefill | None = None
    blocks: list[int] = []
    layers = 0
    commands = sys.stdin.buffer.raw  # unbuffered: what select() says must be true

    def tell(**values: object) -> None:
        print(json.dumps(values), flush=True)

    tell(event="ready", address=worker.engine.address, incarnation=worker.engine.incarnation)
    while True:
        # A command comes before news from the peer, as a forward pass comes before a poll.
        if worker.sleep(60.0, 0):
            line = commands.readline()
            if not line:
                break
            command = json.loads(line)
            if command["op"] == "offer":
                layers = command["layers"]
                prefill = Prefill(worker, command["handoff"], command["seed"], command["ends"])
                prefill.offer(command["address"], command["incarnation"])
            elif command["op"] == "post" and prefill is not None:
                prefill.post(command["layers"])
                tell(event="posted", layers=prefill.posted)
            elif command["op"] == "abort":
                worker.endpoint.sender.abort(command["handoff"], "told to")
            elif command["op"] == "expect":
                blocks = command["blocks"]
                worker.endpoint.receiver.expect(command["handoff"], deadline_s=60.0)
        for event in worker.endpoint.poll():
            if isinstance(event, Granted) and prefill is not None:
                prefill.start()
                prefill.post(layers)
                tell(event="posted", layers=prefill.posted)
            elif isinstance(event, Offered):
                worker.endpoint.receiver.grant(
                    event.handoff, blocks, token_begin=0, token_end=event.num_tokens
                )
            tell(event=type(event).__name__, **asdict(event))
    worker.close()


class Child:
    """A worker in a process of its own."""

    def __init__(self, role: str, transport: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), role, transport],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )
        self._lines = b""
        ready = self.wait("ready")
        self.address, self.incarnation = str(ready["address"]), str(ready["incarnation"])

    def tell(self, op: str, **values: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"op": op, **values}).encode() + b"\n")
        self.process.stdin.flush()

    def wait(self, event: str, bound_s: float = BOUND_S) -> dict[str, object]:
        """The next such event; others before it are passed over."""
        assert self.process.stdout is not None
        until = time.monotonic() + bound_s
        while True:
            while b"\n" in self._lines:
                line, _, self._lines = self._lines.partition(b"\n")
                message: dict[str, object] = json.loads(line)
                if message["event"] == event:
                    return message
            fd = self.process.stdout.fileno()
            ready, _, _ = select.select([fd], [], [], max(0.0, until - time.monotonic()))
            assert ready, f"no {event!r} within {bound_s} s"
            data = os.read(fd, 65536)
            assert data, f"the child ended, status {self.process.wait(BOUND_S)}"
            self._lines += data

    def close(self) -> int:
        """Ends it kindly; returns its status."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        try:
            return self.process.wait(BOUND_S)
        finally:
            self.process.kill()
            self.process.wait(BOUND_S)
            self.process.stdout.close()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
