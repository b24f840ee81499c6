# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""A peer in a process of its own, driven over a pipe; its exit code is asserted."""

from __future__ import annotations

import multiprocessing
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from kvxfer.errors import KvxferError
from kvxfer.testing import fake_verbs
from kvxfer.testing.faults import Way
from kvxfer.transfer import TransferEngine

SECRET = b"a secret for tests"
# More than 1 where the tests run emulated (tests/rdma_vm).
PATIENCE = float(os.environ.get("KVXFER_TEST_PATIENCE", "1"))
TIMEOUT_S = 30.0 * PATIENCE  # of anything that must happen; machines that run tests are shared


def wait_for(engine: TransferEngine, look: Callable[[], Any], timeout_s: float = TIMEOUT_S) -> Any:
    """The first true value of ``look``, asked after each wake-up of the engine."""
    deadline = time.monotonic() + timeout_s
    while True:
        engine.clear_wakeup()
        value = look()
        if value:
            return value
        left = deadline - time.monotonic()
        assert left > 0, f"nothing true within {timeout_s} s"
        select.select([engine.fileno()], [], [], left)


def until(true: Callable[[], bool], what: Callable[[], object]) -> None:
    """Polls, for what wakes nobody; ``what`` is shown if it never comes true."""
    deadline = time.monotonic() + TIMEOUT_S
    while not true():
        assert time.monotonic() < deadline, what()
        time.sleep(0.01)


def run_with_fake_verbs(code: str, **environment: str) -> str:
    """The output of a process of its own, which sees other devices."""
    path, _ = fake_verbs.library()
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "KVXFER_LIBIBVERBS": str(path), **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def take_notifications(
    engine: TransferEngine, n: int, timeout_s: float = TIMEOUT_S
) -> list[tuple[str, bytes]]:
    got: list[tuple[str, bytes]] = []

    def look() -> bool:
        got.extend((each.peer.name, each.payload) for each in engine.notifications())
        return len(got) >= n

    wait_for(engine, look, timeout_s)
    return got


class Agent:
    """What the child does when told; every argument and result is picklable."""

    def __init__(self, name: str, way: Way, secret: bytes) -> None:
        self.engine = way.engine(name, secret)
        self.regions: dict[str, Any] = {}
        self.leases: list[Any] = []
        self.peers: list[Any] = []
        self.numbers: list[int] = []

    def address(self) -> tuple[str, str]:
        return self.engine.address, self.engine.incarnation

    def add_region(self, name: str, nbytes: int, kind: str, require_lease: bool = False) -> None:
        if kind == "allocated":
            region = self.engine.allocate(nbytes, name, require_lease=require_lease)
        else:
            buffer = np.zeros(nbytes, np.uint8)
            region = self.engine.register(
                buffer,
                name,
                require_lease=require_lease,
                share="never" if kind == "private" else "auto",
            )
        self.regions[name] = region

    def drop_region(self, name: str) -> None:
        self.engine.deregister(self.regions.pop(name))

    def fill(self, name: str, value: int | bytes) -> None:
        if isinstance(value, int):
            self.regions[name].array[:] = value
        else:
            self.regions[name].array[:] = np.frombuffer(value, np.uint8)

    def bytes_of(self, name: str) -> bytes:
        return self.regions[name].array.tobytes()

    def grant(self, name: str, offsets: Any, nbytes: Any, **how: Any) -> tuple[int, bytes]:
        self.leases.append(self.engine.grant(self.regions[name], offsets, nbytes, **how))
        return len(self.leases) - 1, self.leases[-1].token

    def lease_state(self, lease: int) -> tuple[list[int], bool, bool, bool]:
        each = self.leases[lease]
        return each.arrived.tolist(), each.closed, each.quiet, each.expired

    def wait_arrived(self, lease: int, indices: Any) -> None:
        self.leases[lease].wait_arrived(indices, TIMEOUT_S)

    def bytes_once_arrived(self, lease: int, index: int, name: str, at: int, nbytes: int) -> bytes:
        """What is there the moment that the index is seen to have arrived."""
        self.leases[lease].wait_arrived(index, TIMEOUT_S)
        return bytes(self.regions[name].array[at : at + nbytes].tobytes())

    def bytes_once_counted(self, tag: int, n: int, name: str, at: int, nbytes: int) -> bytes:
        """What is there the moment that the count is seen."""
        self.engine.wait_arrivals(tag, self._peer(), n, TIMEOUT_S)
        return bytes(self.regions[name].array[at : at + nbytes].tobytes())

    def revoke(self, lease: int) -> bool:
        self.leases[lease].revoke(TIMEOUT_S)
        return self.leases[lease].quiet

    def extend(self, lease: int, ttl_s: float) -> None:
        self.leases[lease].extend(ttl_s)

    def wait_quiet(self, lease: int) -> None:
        wait_for(self.engine, lambda: self.leases[lease].quiet)

    def notifications(self, n: int) -> list[tuple[str, bytes]]:
        return take_notifications(self.engine, n)

    def drain(self) -> list[int]:
        """All notifications so far, as the numbers that they spell."""
        self.numbers += [int(each.payload) for each in self.engine.notifications()]
        return self.numbers

    def arrivals(self, tag: int, n: int) -> int:
        peer = self._peer()
        self.engine.wait_arrivals(tag, peer, n, TIMEOUT_S)
        return self.engine.arrivals(tag, peer)

    def _peer(self) -> Any:
        """The newest peer that is alive: the engine of the test that is running."""

        def look() -> Any:
            self.peers += [e.peer for e in self.engine.peer_events() if e.kind == "connected"]
            self.peers = [peer for peer in self.peers if peer.alive]
            return self.peers

        return wait_for(self.engine, look)[-1]

    def await_region(self, remote: str) -> None:
        """Regions are announced over tcp: a notification over another transport can be faster."""
        deadline = time.monotonic() + TIMEOUT_S
        while remote not in self._peer().regions:
            assert time.monotonic() < deadline, f"{remote} was not announced"
            self.engine.notify(self._peer(), b"a round trip").wait(TIMEOUT_S)

    def write_back(self, name: str, remote: str, offset: int, nbytes: int, **how: Any) -> str:
        xfer = self.engine.write(
            self.regions[name], self._peer().regions[remote], offset, offset, nbytes, **how
        )
        xfer.wait(TIMEOUT_S)
        return str(xfer.state)

    def start_endless_writes(self, name: str, remote: str, lease: bytes) -> None:
        """Keeps the pipe to the peer full without the driver's help, until a write fails; none does because it is slow."""
        peer = self._peer()
        region, target = self.regions[name], peer.regions[remote]

        def run() -> None:
            while True:
                xfer = self.engine.write(
                    region,
                    target,
                    0,
                    0,
                    region.nbytes,
                    lease=lease,
                    arrival=0,
                    deadline_s=TIMEOUT_S,
                )
                try:
                    xfer.wait(2 * TIMEOUT_S)
                except KvxferError as error:
                    self.write_error = type(error).__name__
                    return

        self.write_error = ""
        self.writing = threading.Thread(target=run, daemon=True)
        self.writing.start()

    def end_of_writes(self) -> str:
        self.writing.join(TIMEOUT_S)
        return self.write_error

    def region_names(self) -> list[str]:
        return list(self.regions)

    def start_endless_reads(
        self, name: str, remote: str, lease: bytes | None, forbidden: int
    ) -> None:
        """Reads all of a region again and again until one fails; counts those that are done, and
        those of them that show a byte they must not."""
        region, source = self.regions[name], self._peer().regions[remote]
        self.num_reads, self.num_dirty, self.read_error = 0, 0, ""
        self.one_more_read = threading.Condition()

        def run() -> None:
            while True:
                try:
                    self.engine.read(region, source, 0, 0, region.nbytes, lease=lease).wait(
                        TIMEOUT_S
                    )
                except KvxferError as error:
                    self.read_error = type(error).__name__
                    return
                dirty = bool((region.array == forbidden).any())
                with self.one_more_read:
                    self.num_reads += 1
                    self.num_dirty += dirty
                    self.one_more_read.notify_all()

        self.reading = threading.Thread(target=run, daemon=True)
        self.reading.start()

    def wait_reads(self, n: int) -> None:
        with self.one_more_read:
            assert self.one_more_read.wait_for(lambda: self.num_reads >= n, TIMEOUT_S)

    def end_of_reads(self) -> tuple[int, int, str]:
        self.reading.join(TIMEOUT_S)
        return self.num_reads, self.num_dirty, self.read_error

    def stats(self) -> dict[str, Any]:
        return self.engine.stats()


def _main(pipe: Any, agent_type: type[Agent], name: str, way: Way, secret: bytes) -> None:
    agent = agent_type(name, way, secret)
    pipe.send(agent.address())
    while True:
        try:
            message = pipe.recv()
        except EOFError:
            break
        if message is None:
            break
        method, args, kwargs = message
        try:
            pipe.send((True, getattr(agent, method)(*args, **kwargs)))
        except Exception as error:  # noqa: BLE001 - the driver raises it
            pipe.send((False, f"{type(error).__name__}: {error}"))
    agent.engine.close()


class PeerProcess:
    """``peer.call("method", ...)`` runs ``Agent.method`` over there."""

    def __init__(
        self,
        name: str,
        way: Way | tuple[str, ...],
        secret: bytes = SECRET,
        agent_type: type[Agent] = Agent,
    ) -> None:
        if not isinstance(way, Way):
            way = Way(way[0], way[0])
        # Forked from a server that has imported everything: a twentieth of a spawn. Before Python 3.12.8 the server
        # does not find modules of this folder, and says nothing, so what takes long to import is named as well.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([Way.__module__, __name__, agent_type.__module__])
        self._pipe, child = context.Pipe()
        self.process = context.Process(target=_main, args=(child, agent_type, name, way, secret))
        self.process.start()
        child.close()
        self._stopped = False
        assert self._pipe.poll(60 * PATIENCE), f"{name} did not start"
        self.address, self.incarnation = self._pipe.recv()

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def send(self, method: str, *args: Any, **kwargs: Any) -> None:
        self._pipe.send((method, args, kwargs))

    def receive(self) -> Any:
        assert self._pipe.poll(TIMEOUT_S + 15), "the peer does not answer"
        ok, value = self._pipe.recv()
        assert ok, value
        return value

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        self.send(method, *args, **kwargs)
        return self.receive()

    def stop(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)
        # Stopped is a state that the kernel reports of each thread, so it is waited for and not
        # slept for.
        deadline = time.monotonic() + TIMEOUT_S
        while any(
            stat.read_text().rpartition(")")[2].split()[0] != "T"
            for stat in Path(f"/proc/{self.pid}/task").glob("*/stat")
        ):
            assert time.monotonic() < deadline, "it does not stop"
            os.sched_yield()
        self._stopped = True

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)
        self._stopped = False

    def kill(self) -> None:
        self.process.kill()
        self.process.join(TIMEOUT_S)
        assert self.process.exitcode == -signal.SIGKILL
        self._pipe.close()

    def close(self) -> None:
        """Leaves in order: exit code 0, in bounded time."""
        if self.process.exitcode is not None:
            self.process.close()
            return
        if self._stopped:
            self.resume()
        self._pipe.send(None)
        self.process.join(TIMEOUT_S)
        if self.process.is_alive():
            self.process.kill()
            self.process.join(TIMEOUT_S)
            raise AssertionError("the peer did not leave")
        assert self.process.exitcode == 0
        self._pipe.close()
        self.process.close()
