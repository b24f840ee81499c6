# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""A peer of another user, or on what says that it is another machine, is reached by tcp alone; explain() says why."""

from __future__ import annotations

import ctypes
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
from transfer_peers import SECRET, TIMEOUT_S, Agent, PeerProcess

from kvxfer.errors import KvxferError, UnavailableError
from kvxfer.testing.faults import Way
from kvxfer.transfer import TransferEngine, probe_transports

SAME_HOST = [name for name, why in probe_transports() if why is None and name in ("shm", "cma")]
NOBODY = 65534
NBYTES = 4096


class Estranged(Agent):
    """It becomes somebody else before it makes an engine; ``why_not`` when it cannot."""

    def __init__(self, name: str, way: Way, secret: bytes) -> None:
        self.why_not = self.become_another()
        super().__init__(name, way, secret)
        self.engine.close()
        self.engine = TransferEngine(name, transports=(*SAME_HOST, "tcp"), secret=secret)

    def become_another(self) -> str:
        raise NotImplementedError

    def excuse(self) -> str:
        return self.why_not

    def explanation_of(self, address: str) -> str:
        return self.engine.explain(self.engine.connect(address))

    def connect_by(self, transport: str, address: str) -> str:
        with TransferEngine("strict", transports=(transport,), secret=SECRET) as engine:
            try:
                engine.connect(address)
            except KvxferError as error:
                return f"{type(error).__name__}: {error}"
        return ""


class AnotherUser(Estranged):
    def become_another(self) -> str:
        try:
            os.setgid(NOBODY)
            os.setuid(NOBODY)
        except OSError as error:
            return f"this user cannot become another: {error}"
        return ""


class AnotherBoot(Estranged):
    """In a mount namespace of its own, where the boot id is another file's."""

    def become_another(self) -> str:
        libc = ctypes.CDLL(None, use_errno=True)
        new_namespace, new_user, bind, private = 0x20000, 0x10000000, 0x1000, 0x4C000
        with tempfile.NamedTemporaryFile("w") as file:
            file.write("00000000-0000-4000-8000-000000000000\n")
            file.flush()
            there = b"/proc/sys/kernel/random/boot_id"
            for done in (
                libc.unshare(new_namespace) == 0 or libc.unshare(new_namespace | new_user) == 0,
                libc.mount(b"none", b"/", None, ctypes.c_ulong(private), None) == 0,
                libc.mount(file.name.encode(), there, None, ctypes.c_ulong(bind), None) == 0,
            ):
                if not done:
                    return f"no mount namespace here: {os.strerror(ctypes.get_errno())}"
        return ""


@pytest.mark.skipif(not SAME_HOST, reason="no transport of one host works here")
@pytest.mark.parametrize("agent", [AnotherUser, AnotherBoot])
def test_who_is_not_of_this_user_and_machine_is_reached_by_tcp(agent: type[Estranged]) -> None:
    process = PeerProcess("stranger", ("tcp",), agent_type=agent)
    try:
        if excuse := process.call("excuse"):
            pytest.skip(excuse)
        process.call("add_region", "kv", NBYTES, "allocated")
        ours, theirs = (
            (
                f"its user id is {NOBODY}, ours is {os.getuid()}",
                f"its user id is {os.getuid()}, ours is {NOBODY}",
            )
            if agent is AnotherUser
            else ("the peer runs on another machine (other boot id)",) * 2
        )
        with TransferEngine("a", transports=(*SAME_HOST, "tcp"), secret=SECRET) as engine:
            peer = engine.connect(process.address)
            explained = engine.explain(peer)
            assert "uses tcp" in explained
            for transport in SAME_HOST:
                assert f"not {transport}: {ours}" in explained
            local = engine.register(np.ones(NBYTES, np.uint8), "ones")
            xfer = engine.write(local, peer.regions["kv"], 0, 0, NBYTES)
            xfer.wait(TIMEOUT_S)
            assert xfer.transport == "tcp"
            assert all(process.call("bytes_of", "kv"))
        with TransferEngine("b", transports=(*SAME_HOST, "tcp"), secret=SECRET) as engine:
            explained = process.call("explanation_of", engine.address)  # in the other role
            for transport in SAME_HOST:
                assert f"not {transport}: {theirs}" in explained
        for transport in SAME_HOST:  # asked for alone it is not replaced
            with TransferEngine("c", transports=(transport,), secret=SECRET) as engine:
                with pytest.raises(
                    UnavailableError, match="none of the transports asked for"
                ) as info:
                    engine.connect(process.address)
                assert ours in str(info.value)
                error = process.call("connect_by", transport, engine.address)
                assert error.startswith("UnavailableError: ")
                assert theirs in error
    finally:
        process.close()
    assert (
        Path("/proc/sys/kernel/random/boot_id").read_text()[:8] != "00000000"
    )  # ours is as it was
