# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""The initiator's side of bench_transfer: two processes, their memory, and what is timed between them."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np

import bounds
import transfer_target
from kvxfer.transfer import BlockView, Transfer, probe_transports
from processes import Sample, Stopwatch, pin

TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Path:
    """One way of ours from memory to memory."""

    name: str
    pair: str
    op: str  # "write" or "read"
    memory: str  # "pool": the source is mapped; "heap": it is only registered
    bounds: tuple[str, ...]


PATHS = (
    Path("shm mapped", "shm", "write", "pool", ("memcpy",)),
    Path("shm staged", "shm", "write", "heap", ("memcpy", "process_vm_readv", "process_vm_writev")),
    Path("cma", "cma", "write", "heap", ("process_vm_readv", "process_vm_writev")),
    Path("tcp 1 lane", "tcp 1 lane", "write", "heap", ("raw socket",)),
    Path("tcp", "tcp", "write", "heap", ("raw socket",)),
    Path("shm mapped, read", "shm", "read", "pool", ("memcpy, reader",)),
    Path("shm staged, read", "shm", "read", "heap", ("memcpy, reader",)),
    Path("cma, read", "cma", "read", "heap", ("process_vm_readv, reader",)),
    Path("tcp, read", "tcp", "read", "heap", ("raw socket",)),
)


class World:
    """Both processes. `sides`: the CPUs of each, or None where there are not enough to tell them apart."""

    def __init__(
        self, pool_nbytes: int, sides: tuple[set[int], set[int]] | None, spin_us: float
    ) -> None:
        self.spin_us = spin_us
        self._paths = PATHS
        self.refused = {name: reason for name, reason in probe_transports() if reason is not None}
        self.pairs = [
            name
            for name, (transports, _) in transfer_target.PAIRS.items()
            if not set(transports or ()) & set(self.refused)
            and set(transports or ()) <= {name for name, _ in probe_transports()}
        ]
        context = multiprocessing.get_context("spawn")
        self._pipe, child = context.Pipe()
        self.process = context.Process(
            target=transfer_target.serve,
            args=(child, self.pairs, pool_nbytes, sides and sides[1], spin_us),
        )
        self.process.start()
        child.close()
        self.engines = {
            name: transfer_target.make_engine(f"initiator of {name}", name, spin_us)
            for name in self.pairs
        }
        self.memory = transfer_target.Memory(self.engines, pool_nbytes)
        transfer_target.fill(self.memory, 0)
        self.hello: dict[str, Any] = self.ask("hello")
        self.ask("fill", 1)
        self.peers = {
            name: engine.connect(self.hello["addresses"][name], TIMEOUT_S)
            for name, engine in self.engines.items()
        }
        self.raw = socket.create_connection(("127.0.0.1", self.hello["port"]))
        self.raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.ask("accept")
        self.pids = (os.getpid(), self.hello["pid"])
        pin(sides and sides[0])

    # ------------------------------------------------------------------ the other process

    def tell(self, name: str, *args: Any) -> None:
        self._pipe.send((name, *args))

    def answer(self) -> Any:
        ok, value = self._pipe.recv()
        if not ok:
            raise RuntimeError(f"in the target:\n{value}")
        return value

    def ask(self, name: str, *args: Any) -> Any:
        self.tell(name, *args)
        return self.answer()

    def close(self) -> None:
        self._pipe.send(None)
        self.process.join(TIMEOUT_S)
        self.raw.close()
        for engine in self.engines.values():
            engine.close()
        if self.process.exitcode != 0:
            raise RuntimeError(f"the target ended with exit code {self.process.exitcode}")

    def __enter__(self) -> World:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if exc_type is None:
            self.close()
        else:
            self.process.kill()
            self.process.join()

    # ------------------------------------------------------------------ one request

    def keep(self, parts: list[str]) -> None:
        """Only the paths with one of these in their names; none: all."""
        self._paths = tuple(p for p in PATHS if not parts or any(part in p.name for part in parts))
        if not self._paths:
            raise SystemExit(
                f"--paths {','.join(parts)}: no such path among {[p.name for p in PATHS]}"
            )

    def paths(self) -> list[Path]:
        return [path for path in self._paths if path.pair in self.pairs]

    def submit(self, path: Path, src: Any, dst: Any, nbytes: int) -> Transfer:
        region = self.memory.regions[path.pair, path.memory]
        remote = self.peers[path.pair].regions[path.memory]
        engine = self.engines[path.pair]
        if path.op == "write":
            return engine.write(region, remote, src, dst, nbytes)
        return engine.read(region, remote, dst, src, nbytes)

    def submit_blocks(self, path: Path, view: BlockView, src: Any, dst: Any) -> Transfer:
        """The same by block ids, of pools that ``view`` describes on both sides; a write."""
        region = self.memory.regions[path.pair, path.memory]
        remote = self.peers[path.pair].regions[path.memory]
        return self.engines[path.pair].write_blocks(region, remote, view, view, src, dst)

    def move(self, path: Path, src: Any, dst: Any, nbytes: int) -> Transfer:
        xfer = self.submit(path, src, dst, nbytes)
        xfer.wait(TIMEOUT_S)
        return xfer

    def timed(self, path: Path, src: np.ndarray, dst: np.ndarray, block: int) -> Sample:
        """The whole request twice, since caches and the peer should be warm; the second is the sample."""
        self.move(path, src, dst, block)
        with Stopwatch(self.pids, wake=lambda: self.move(path, 0, 0, 1)) as watch:
            self.move(path, src, dst, block)
        return watch.sample

    def verify(self, path: Path, src: np.ndarray, dst: np.ndarray, block: int) -> None:
        """Clears the destination, moves, and compares; leaves only when every byte is right."""
        here, there = self.memory.array(path.memory), path.memory
        if path.op == "write":
            self.ask("clear", there, dst, block)
        else:
            transfer_target.clear(here, dst, block)
        xfer = self.move(path, src, dst, block)
        if path.op == "write":
            got, want = (
                self.ask("digest", there, dst, block),
                transfer_target.digest(here, src, block),
            )
        else:
            got, want = (
                transfer_target.digest(here, dst, block),
                self.ask("digest", there, src, block),
            )
        if got != want:
            raise RuntimeError(f"{path.name}: wrong bytes at blocks of {block}")
        if path.pair != "default" and xfer.transport != path.pair.split()[0]:
            raise RuntimeError(f"{path.name}: went over {xfer.transport}")

    # ------------------------------------------------------------------ bounds

    def bound(
        self, name: str, src: np.ndarray, dst: np.ndarray, block: int
    ) -> Callable[[], Sample] | str:
        """How to take one sample of it, or why that is not possible here."""
        if name == "memcpy":
            return lambda: self.ask("memcpy", dst, src, block)
        if name == "memcpy, reader":
            return lambda: self.memory.memcpy(dst, src, block)
        if name == "raw socket":
            return lambda: self._raw(len(src) * block)
        take = {
            "process_vm_readv": self._remote_readv,
            "process_vm_readv, reader": lambda *a: self._vectored(False, *a),
            "process_vm_writev": lambda *a: self._vectored(True, *a),
        }[name]
        first = take(src, dst, block)
        return first if isinstance(first, str) else lambda: take(src, dst, block)

    def _raw(self, nbytes: int) -> Sample:
        data = memoryview(self.memory.heap)
        self.tell("receive", [nbytes, 1, nbytes])
        bounds.send_all(self.raw, data[:nbytes])
        with Stopwatch(self.pids, wake=lambda: bounds.send_all(self.raw, data[:1])) as watch:
            bounds.send_all(self.raw, data[:nbytes])
        self.answer()
        return watch.sample

    def _remote_readv(self, src: np.ndarray, dst: np.ndarray, block: int) -> Sample | str:
        return self.ask("readv", os.getpid(), self.memory.heap.ctypes.data, dst, src, block)

    def _vectored(self, write: bool, src: np.ndarray, dst: np.ndarray, block: int) -> Sample | str:
        here, there = (src, dst) if write else (dst, src)
        pid = self.hello["pid"]
        call = bounds.VectoredCall(
            pid, write, self.memory.heap, here, self.hello["heap"], there, block
        )
        return transfer_target.vectored(call, pid)
