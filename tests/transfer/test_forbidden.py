# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Where a container's filter forbids process_vm_readv: cma says so, and nothing stands in for it in silence."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from system_calls import NEEDS_CMA, number_of
from transfer_peers import SECRET, TIMEOUT_S, Agent, PeerProcess

from kvxfer.errors import KvxferError, TransportError, UnavailableError
from kvxfer.testing.faults import Way
from kvxfer.transfer import TransferEngine, probe_transports

pytestmark = NEEDS_CMA

NBYTES = 4096


def forbid_process_vm_readv() -> int:
    """Installs the filter on all threads of this process; an errno where that is forbidden itself."""
    libc = ctypes.CDLL(None, use_errno=True)
    set_no_new_privs, set_mode_filter, tsync = 38, 1, 1
    load_number, jump_if_equal, give_back = 0x20, 0x15, 0x06
    allow, fail_with = 0x7FFF0000, 0x00050000
    steps = [
        (load_number, 0, 0, 0),
        (jump_if_equal, 0, 1, number_of("process_vm_readv")),
        (give_back, 0, 0, fail_with | errno.EPERM),
        (give_back, 0, 0, allow),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    program = ctypes.create_string_buffer(
        struct.pack("HxxxxxxQ", len(steps), ctypes.addressof(code))
    )
    if libc.prctl(set_no_new_privs, 1, 0, 0, 0) != 0:
        return ctypes.get_errno()
    if libc.syscall(number_of("seccomp"), set_mode_filter, tsync, program) != 0:
        return ctypes.get_errno() or errno.EPERM
    return 0


class Forbidden(Agent):
    """It offers cma and tcp, until it is forbidden the one, and says what it is told then."""

    def __init__(self, name: str, way: Way, secret: bytes) -> None:
        super().__init__(name, way, secret)
        self.engine.close()
        self.engine = TransferEngine(name, transports=("cma", "tcp"), secret=secret)

    def forbid(self) -> int:
        return forbid_process_vm_readv()

    def probe(self) -> str | None:
        return dict(probe_transports())["cma"]

    def new_engine(self, transports: tuple[str, ...] | None, address: str) -> tuple[str, str, str]:
        """The reason, what explain() says, and which way a write went."""
        try:
            with TransferEngine("new", transports=transports, secret=SECRET) as engine:
                peer = engine.connect(address)
                local = engine.register(np.ones(NBYTES, np.uint8), "ones")
                xfer = engine.write(local, peer.regions["kv"], 0, 0, NBYTES)
                xfer.wait(TIMEOUT_S)
                return "", engine.explain(peer), str(xfer.transport)
        except UnavailableError as error:
            return error.reason or "", "", ""

    def connect(self, address: str, transports: tuple[str, ...]) -> tuple[str, str]:
        """By an engine that was there before the filter, and offers these."""
        engine = self.engine if transports == ("cma", "tcp") else self.strict
        try:
            return "", engine.explain(engine.connect(address))
        except KvxferError as error:
            return f"{type(error).__name__}: {error}", ""

    def prepare_strict(self) -> str:
        self.strict = TransferEngine("strict", transports=("cma",), secret=SECRET)
        return self.strict.address

    def close_strict(self) -> None:
        self.strict.close()


def forbid(peer: PeerProcess) -> None:
    if (number := peer.call("forbid")) != 0:
        pytest.skip(f"seccomp is forbidden here: {os.strerror(number)}")


@pytest.fixture
def peer() -> Iterator[PeerProcess]:
    process = PeerProcess("boxed", ("cma",), agent_type=Forbidden)
    yield process
    process.close()


def region(engine: TransferEngine) -> Any:
    return engine.register(np.zeros(NBYTES, np.uint8), "kv")


def test_an_engine_in_a_box_says_why_it_has_no_cma(peer: PeerProcess) -> None:
    forbid(peer)
    why = peer.call("probe")
    for part in (
        "process_vm_readv of pid",
        "Operation not permitted",
        "seccomp",
        "our own process",
    ):
        assert part in why
    with TransferEngine("free", secret=SECRET) as engine:
        theirs = region(engine)
        for only in (("cma",), ("cma", "tcp")):  # what is named is never left out in silence
            reason, *_ = peer.call("new_engine", only, engine.address)
            assert f"transport 'cma' was asked for, but does not work here: {why}" in reason
        assert not theirs.array.any()
        reason, explained, transport = peer.call("new_engine", None, engine.address)
        assert reason == ""
        assert f"not cma: {why}" in explained
        assert transport != "cma"
        assert theirs.array.all()


def test_a_peer_that_cannot_read_us_is_reached_another_way_or_not_at_all(peer: PeerProcess) -> None:
    """It has found out after it offered cma: the join is refused, with its reason."""
    peer.call("add_region", "kv", NBYTES, "registered")
    forbid(peer)
    why = "not cma: the peer refused the join: process_vm_readv of pid"
    with TransferEngine("free", transports=("cma", "tcp"), secret=SECRET) as engine:
        local = engine.register(np.ones(NBYTES, np.uint8), "ones")
        to_peer = engine.connect(peer.address)
        explained = engine.explain(to_peer)
        assert why in explained
        assert "Operation not permitted" in explained.partition(why)[2].partition("\n")[0]
        xfer = engine.write(local, to_peer.regions["kv"], 0, 0, NBYTES)
        xfer.wait(TIMEOUT_S)
        assert xfer.transport == "tcp"
        assert all(peer.call("bytes_of", "kv"))
    with TransferEngine("strict", transports=("cma",), secret=SECRET) as engine:
        with pytest.raises(UnavailableError, match="none of the transports asked for") as info:
            engine.connect(peer.address)
        assert why.removeprefix("not ") in str(info.value)
        assert not any(each["alive"] for each in engine.stats()["peers"].values())


def test_who_cannot_read_its_peer_goes_another_way_or_not_at_all(peer: PeerProcess) -> None:
    """The same in the other role, where the one that connects finds it out."""
    peer.call("prepare_strict")
    forbid(peer)
    with TransferEngine("free", transports=("cma", "tcp"), secret=SECRET) as engine:
        region(engine)
        error, explained = peer.call("connect", engine.address, ("cma", "tcp"))
        assert error == ""
        assert "not cma: process_vm_readv of pid" in explained
        assert "uses tcp" in explained
        error, _ = peer.call("connect", engine.address, ("cma",))
        assert error.startswith("UnavailableError: ")
        assert "cma: process_vm_readv of pid" in error
    peer.call("close_strict")


def test_a_write_that_the_owner_may_not_fetch_any_more_fails_and_says_why(
    peer: PeerProcess,
) -> None:
    peer.call("add_region", "kv", NBYTES, "registered")
    with TransferEngine("free", transports=("cma",), secret=SECRET) as engine:
        local = engine.register(np.ones(NBYTES, np.uint8), "ones")
        remote = engine.connect(peer.address).regions["kv"]
        engine.write(local, remote, 0, 0, NBYTES // 2).wait(TIMEOUT_S)
        forbid(peer)
        xfer = engine.write(local, remote, 0, NBYTES // 2, NBYTES // 2)
        with pytest.raises(TransportError, match="seccomp") as info:
            xfer.wait(TIMEOUT_S)
        error = info.value
        assert (error.transport, error.peer, error.errno) == ("cma", "boxed", errno.EPERM)
        assert (error.nbytes_done, error.span) == (0, 0)
    assert peer.call("bytes_of", "kv") == bytes([1]) * (NBYTES // 2) + bytes(NBYTES // 2)
