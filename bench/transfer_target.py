# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""The other process of bench_transfer: owns the destinations, and is the far end of every bound."""

from __future__ import annotations

import hashlib
import mmap
import os
import socket
import traceback
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

import bounds
from kvxfer import _transfer
from kvxfer.transfer import EngineConfig, Peer, TransferEngine
from processes import Sample, Stopwatch, pin

SECRET = b"bench"
# What an engine pair may use, and what it changes of the configuration.
PAIRS: dict[str, tuple[tuple[str, ...] | None, dict[str, Any]]] = {
    "default": (None, {}),
    "shm": (("shm",), {}),
    "cma": (("cma",), {"allow_ptrace": True}),
    "tcp 1 lane": (("tcp",), {"num_lanes": 1}),
    "tcp": (("tcp",), {}),
}


def make_engine(name: str, pair: str, spin_us: float) -> TransferEngine:
    transports, changes = PAIRS[pair]
    config = EngineConfig(spin_us=spin_us, **changes)
    return TransferEngine(name, transports=transports, secret=SECRET, config=config)


class Memory:
    """A process's pools: `pool` is allocated (peers map it), `heap` is ordinary registered memory.

    Both in ordinary pages. `spare` is a second segment like `pool`: what the memcpy bound copies from.
    """

    def __init__(self, engines: dict[str, TransferEngine], nbytes: int) -> None:
        owner = engines["shm"] if "shm" in engines else next(iter(engines.values()))
        self.regions: dict[tuple[str, str], Any] = {}
        segment = owner.allocate(nbytes, "pool")
        self.pool: np.ndarray = segment.array
        self.spare: np.ndarray = owner.allocate(nbytes, "spare").array
        self.heap = bounds.plain_pages(nbytes)
        self.spare[:: mmap.PAGESIZE] = 1
        for name, engine in engines.items():
            self.regions[name, "heap"] = engine.register(self.heap, "heap")
            if engine is owner:
                self.regions[name, "pool"] = segment
            elif name == "default":
                self.regions[name, "pool"] = engine.allocate(mmap.PAGESIZE, "pool")
        for region in self.regions.values():
            region.wait_registered()  # where a NIC has to pin it

    def array(self, name: str) -> np.ndarray:
        return self.pool if name == "pool" else self.heap

    def memcpy(self, into: np.ndarray, out: np.ndarray, block: int) -> Sample:
        """The same scattered copy within this process, by this thread."""
        _transfer.scattered_copy(self.pool, self.spare, into, out, block)
        with Stopwatch([os.getpid()]) as watch:
            _transfer.scattered_copy(self.pool, self.spare, into, out, block)
        return watch.sample


def digest(array: np.ndarray, offsets: np.ndarray, block: int) -> bytes:
    """Of the blocks in the order of the offsets, whatever lies between them."""
    found = hashlib.blake2b(digest_size=16)
    for offset in offsets:
        found.update(array[offset : offset + block])
    return found.digest()


class Target:
    def __init__(
        self, pairs: list[str], nbytes: int, cpus: set[int] | None, spin_us: float
    ) -> None:
        self.engines = {name: make_engine(f"target of {name}", name, spin_us) for name in pairs}
        self.memory = Memory(self.engines, nbytes)
        self.server = socket.create_server(("127.0.0.1", 0))
        self.bare = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.raw: socket.socket | None = None
        self.peers: dict[str, Peer] = {}
        pin(cpus)

    def hello(self) -> dict[str, Any]:
        return {
            "addresses": {name: engine.address for name, engine in self.engines.items()},
            "port": self.server.getsockname()[1],
            "bare": self.bare.getsockname()[1],
            "pid": os.getpid(),
            "heap": self.memory.heap.ctypes.data,
        }

    def accept(self) -> None:
        self.raw, _ = self.server.accept()
        self.raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def fill(self, seed: int) -> None:
        fill(self.memory, seed)

    def clear(self, name: str, offsets: np.ndarray, block: int) -> None:
        clear(self.memory.array(name), offsets, block)

    def digest(self, name: str, offsets: np.ndarray, block: int) -> bytes:
        return digest(self.memory.array(name), offsets, block)

    def memcpy(self, into: np.ndarray, out: np.ndarray, block: int) -> Sample:
        return self.memory.memcpy(into, out, block)

    def readv(
        self, pid: int, base: int, into: np.ndarray, out: np.ndarray, block: int
    ) -> Sample | str:
        """One vectored read out of the other process; or why it is forbidden here."""
        return vectored(
            bounds.VectoredCall(pid, False, self.memory.heap, into, base, out, block), pid
        )

    def take_bare(self, times: int) -> None:
        """Connections that the kernel has accepted on its own so far."""
        for _ in range(times):
            self.bare.accept()[0].close()

    def receive(self, sizes: list[int]) -> None:
        assert self.raw is not None
        for nbytes in sizes:
            bounds.receive_all(self.raw, memoryview(self.memory.heap)[:nbytes])

    # ------------------------------------------------------------------ round trips, second side

    def memory_echo(self, path: str, rounds: int) -> None:
        with open(path, "r+b") as file:  # the page lives as long as its last view
            shared = np.frombuffer(mmap.mmap(file.fileno(), mmap.PAGESIZE), np.uint8)
        _transfer.memory_round_trips(shared, first=False, rounds=rounds, timeout_s=60)

    def socket_echo(self, nbytes: int, rounds: int, polling: bool) -> None:
        assert self.raw is not None
        _transfer.socket_round_trips(
            self.raw.fileno(), nbytes, first=False, rounds=rounds, polling=polling, timeout_s=60
        )

    def notify_echo(self, pair: str, incarnation: str, rounds: int, polling: bool) -> None:
        engine = self.engines[pair]
        self.peers |= {each.peer.incarnation: each.peer for each in engine.peer_events()}
        _transfer.notify_round_trips(
            engine._core,
            self.peers[incarnation],
            64,
            first=False,
            rounds=rounds,
            polling=polling,
            timeout_s=60,
        )


def vectored(call: bounds.VectoredCall, other: int) -> Sample | str:
    try:
        call()
    except OSError as error:
        return str(error)
    with Stopwatch([os.getpid(), other]) as watch:
        call()
    return watch.sample


def fill(memory: Memory, seed: int) -> None:
    """Random bytes that differ between the two processes, so that a wrong block is seen."""
    rng = np.random.default_rng(seed)
    memory.pool[:] = rng.integers(0, 256, len(memory.pool), np.uint8)
    memory.heap[:] = memory.pool


def clear(array: np.ndarray, offsets: np.ndarray, block: int) -> None:
    for offset in offsets:
        array[offset : offset + block] = 0


def serve(
    pipe: Connection, pairs: list[str], nbytes: int, cpus: set[int] | None, spin_us: float
) -> None:
    """Answers calls by name until it is told to leave; an exception is an answer too."""
    target = Target(pairs, nbytes, cpus, spin_us)
    try:
        while (message := pipe.recv()) is not None:
            name, *args = message
            try:
                pipe.send((True, getattr(target, name)(*args)))
            except Exception:  # noqa: BLE001  it is raised again where the call was made
                pipe.send((False, traceback.format_exc()))
    finally:
        for engine in target.engines.values():
            engine.close()
