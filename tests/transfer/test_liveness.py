# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""A stopped peer, an idle one and an unreachable one are three things; tcp tells them apart."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
from transfer_peers import SECRET, TIMEOUT_S, PeerProcess, wait_for

from kvxfer.errors import PeerDisconnectedError, TransferTimeoutError
from kvxfer.transfer import TransferEngine

NBYTES = 8 << 20


@pytest.fixture
def victim() -> Iterator[PeerProcess]:
    peer = PeerProcess("victim", ("tcp",), SECRET)
    yield peer
    peer.close()


@pytest.fixture
def driver() -> Iterator[TransferEngine]:
    with TransferEngine("driver", transports=("tcp",), secret=SECRET) as engine:
        yield engine


def test_stopped_peer_is_said_to_be_alive_and_stopped(
    driver: TransferEngine, victim: PeerProcess
) -> None:
    victim.call("add_region", "kv", NBYTES, "allocated")
    local = driver.allocate(NBYTES, "kv")
    peer = driver.connect(victim.address)
    victim.stop()
    xfers = [
        driver.notify(peer, b"x", deadline_s=3.5),
        driver.write(local, peer.regions["kv"], 0, 0, NBYTES, deadline_s=3.5),
    ]
    for xfer in xfers:
        with pytest.raises(TransferTimeoutError, match="host alive, engine not running") as info:
            xfer.wait(TIMEOUT_S)
        assert f"its process {victim.pid} is stopped (state T)" in str(info.value)
    assert peer.alive  # silence alone never ends a connection
    victim.resume()
    driver.write(local, peer.regions["kv"], 0, 0, NBYTES).wait(TIMEOUT_S)


NETNS_ADDRESSES = "10.123.45.1", "10.123.45.2"
NETNS_CHILD = """
import sys, numpy as np
from kvxfer.transfer import TransferEngine
with TransferEngine("far", listen=sys.argv[1] + ":0", transports=("tcp",),
                    secret=b"a secret for tests") as engine:
    engine.allocate(1 << 20, "kv")
    print(engine.address, flush=True)
    sys.stdin.read()
"""


def ip(*args: str) -> None:
    subprocess.run(["ip", *args], check=True, capture_output=True, text=True)


@pytest.fixture
def far_host() -> Iterator[tuple[str, str]]:
    """A network namespace behind a virtual cable: its name, and our end of the cable."""
    name = f"kvxfer{os.getpid()}"
    try:
        ip("netns", "add", name)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no network namespaces here: {getattr(error, 'stderr', None) or error}")
    ours, theirs = f"kx{os.getpid() % 100000}a", f"kx{os.getpid() % 100000}b"
    try:
        try:
            ip("link", "add", ours, "type", "veth", "peer", "name", theirs, "netns", name)
            ip("addr", "add", f"{NETNS_ADDRESSES[0]}/24", "dev", ours)
            ip("link", "set", ours, "up")
            ip("-n", name, "addr", "add", f"{NETNS_ADDRESSES[1]}/24", "dev", theirs)
            ip("-n", name, "link", "set", theirs, "up")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no virtual cables here: {error.stderr}")
        yield name, theirs
    finally:
        subprocess.run(["ip", "netns", "del", name], check=False)


def test_unreachable_host_is_disconnected(far_host: tuple[str, str]) -> None:
    name, cable = far_host
    child = subprocess.Popen(
        ["ip", "netns", "exec", name, sys.executable, "-c", NETNS_CHILD, NETNS_ADDRESSES[1]],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert child.stdout is not None
        address = child.stdout.readline().strip()
        assert address
        with TransferEngine(
            "near", listen=f"{NETNS_ADDRESSES[0]}:0", transports=("tcp",), secret=SECRET
        ) as engine:
            local = engine.allocate(1 << 20, "kv")
            peer = engine.connect(address)
            engine.write(local, peer.regions["kv"], 0, 0, 1 << 20).wait(TIMEOUT_S)
            ip("-n", name, "link", "set", cable, "down")
            xfer = engine.write(local, peer.regions["kv"], 0, 0, 1 << 20, deadline_s=60)
            with pytest.raises(PeerDisconnectedError, match="unreachable"):
                xfer.wait(TIMEOUT_S)
            wait_for(engine, lambda: not peer.alive)
    finally:
        child.kill()
        child.wait(TIMEOUT_S)
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.close()
        child.stdout.close()
