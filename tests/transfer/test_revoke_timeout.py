# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""revoke() that times out: the owner's copier hangs in a page of the peer's that does not come (cma alone can)."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import select
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from system_calls import NEEDS_CMA, number_of
from transfer_peers import SECRET, TIMEOUT_S, Agent, PeerProcess, wait_for

from kvxfer.errors import InvalidArgumentError, TransferTimeoutError
from kvxfer.transfer import EngineConfig, TransferEngine

pytestmark = NEEDS_CMA

PAGE = mmap.PAGESIZE
NBYTES = 2 * PAGE


class Withholding(Agent):
    """Its source has a page that is missing until it lets it come (userfaultfd)."""

    _API, _REGISTER, _ZEROPAGE = 0xC018AA3F, 0xC020AA00, 0xC020AA04

    def withhold(self) -> str:
        """The reason why a call of another process cannot be made to wait here; or empty."""
        libc = ctypes.CDLL(None, use_errno=True)
        fd = libc.syscall(number_of("userfaultfd"), os.O_CLOEXEC | os.O_NONBLOCK)
        if fd < 0:
            return os.strerror(ctypes.get_errno())
        self.faults = fd
        fcntl.ioctl(fd, self._API, struct.pack("QQQ", 0xAA, 0, 0))
        buffer = np.frombuffer(mmap.mmap(-1, NBYTES, mmap.MAP_PRIVATE), np.uint8)
        buffer[:PAGE] = 7
        self.missing = buffer.ctypes.data + PAGE
        fcntl.ioctl(fd, self._REGISTER, struct.pack("QQQQ", self.missing, PAGE, 1, 0))
        self.regions["source"] = self.engine.register(buffer, "source")
        return ""

    def write(self, remote: str, lease: bytes) -> None:
        self.xfer = self.engine.write(
            self.regions["source"], self._peer().regions[remote], 0, 0, NBYTES, lease=lease
        )

    def wait_inside(self) -> int:
        """Until somebody wants the page; where."""
        select.select([self.faults], [], [], TIMEOUT_S)
        message = os.read(self.faults, 32)
        return int(struct.unpack_from("Q", message, 16)[0]) - self.missing

    def let_go(self) -> None:
        fcntl.ioctl(self.faults, self._ZEROPAGE, struct.pack("QQQq", self.missing, PAGE, 0, 0))

    def end(self) -> str:
        try:
            self.xfer.wait(TIMEOUT_S)
        except Exception as error:  # noqa: BLE001 - the test looks at it
            return f"{type(error).__name__}: {error}"
        return "done"


@pytest.fixture
def peer() -> Iterator[PeerProcess]:
    process = PeerProcess("withholding", ("cma",), agent_type=Withholding)
    if reason := process.call("withhold"):
        process.close()
        pytest.skip(f"userfaultfd is forbidden here: {reason}")
    yield process
    process.close()


@contextmanager
def killed_on_failure(peer: PeerProcess) -> Iterator[None]:
    """Else closing the engine would wait for the copier, and so for the page, for ever."""
    try:
        yield
    except BaseException:
        peer.process.kill()
        raise


@pytest.mark.parametrize("copy_threads", [0, 2])
@pytest.mark.parametrize("ends", ["the page comes", "the peer dies"])
def test_revoke_times_out_while_a_copier_hangs_and_completes_after_it(
    peer: PeerProcess, copy_threads: int, ends: str
) -> None:
    config = EngineConfig(copy_threads=copy_threads)
    with (
        TransferEngine("owner", transports=("cma",), secret=SECRET, config=config) as engine,
        killed_on_failure(peer),
    ):
        target = engine.register(np.zeros(NBYTES, np.uint8), "kv", require_lease=True)
        lease = engine.grant(target, 0, NBYTES, ttl_s=600, num_arrivals=1)
        engine.connect(peer.address)
        peer.call("write", "kv", lease.token)
        assert 0 <= peer.call("wait_inside") < PAGE
        for timeout_s in (0.0, 0.05):
            with pytest.raises(TransferTimeoutError) as info:
                lease.revoke(timeout_s)
            error = info.value
            assert isinstance(error, TimeoutError)
            for part in (
                f"the lease on region 'kv' is not quiet after {timeout_s:g} s",
                "what had begun under it may still land",
                "its spans stay quarantined until lease.quiet is true",
            ):
                assert part in str(error)
        assert (lease.closed, lease.quiet, lease.expired) == (True, False, False)
        assert engine.stats()["quarantine"]["nbytes"] == NBYTES
        with pytest.raises(InvalidArgumentError, match="quarantined"):
            engine.grant(target, PAGE, 1, ttl_s=600)

        if ends == "the page comes":
            peer.call("let_go")
            assert peer.call("end").startswith("LeaseError: ")
        else:
            peer.kill()
        lease.revoke(TIMEOUT_S)
        assert lease.quiet
        lease.revoke(0.0)  # once quiet, always quiet
        assert lease.arrived.tolist() == []
        wait_for(engine, lambda: engine.stats()["quarantine"]["nbytes"] == 0)
        target.array[:] = 9  # the owner's alone
        engine.grant(target, 0, NBYTES, ttl_s=600).revoke(TIMEOUT_S)
        assert (target.array == 9).all()
