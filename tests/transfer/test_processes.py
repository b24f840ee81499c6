# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""fork() and death: a child is no engine, and hides nobody's death; a signal may come at close()."""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Iterator

import pytest
from transfer_peers import SECRET, TIMEOUT_S, PeerProcess, wait_for

from kvxfer.transfer import TransferEngine, probe_transports

# An engine that connects to argv[1] and keeps the pipe full. Prints what its child reports.
_PARENT = """
import ctypes, os, signal, sys
import numpy as np
from kvxfer.errors import InvalidArgumentError
from kvxfer.transfer import TransferEngine

engine = TransferEngine("parent", secret=b"a secret for tests", transports=(sys.argv[2],))
size = 8 << 20
region = engine.allocate(size, "kv")
peer = engine.connect(sys.argv[1], timeout_s=60)
remote = peer.regions["kv"]
lease = engine.grant(region, 0, 10, ttl_s=60, num_arrivals=1)
xfers = [engine.write(region, remote, 0, 0, size) for _ in range(20)]
"""

_CHILD_CALLS = (
    _PARENT
    + """
pid = os.fork()
if pid == 0:
    calls = [
        lambda: engine.write(region, remote, 0, 0, 10),
        lambda: engine.allocate(10),
        lambda: engine.register(np.zeros(10)),
        lambda: engine.connect(sys.argv[1]),
        lambda: engine.notify(peer, b"x"),
        lambda: engine.grant(region, 0, 10, ttl_s=1),
        lambda: engine.deregister(region),
        lambda: engine.notifications(),
        lambda: engine.peer_events(),
        lambda: engine.explain(peer),
        lambda: engine.stats(),
        lambda: engine.fileno(),
        lambda: engine.clear_wakeup(),
        lambda: engine.arrivals(0, peer),
        lambda: engine.wait_arrivals(0, peer, 1, 1),
        lambda: peer.regions,
        lambda: xfers[-1].wait(5),
        lambda: xfers[-1].cancel(),
        lambda: lease.revoke(1),
        lambda: lease.begin_revoke(),
        lambda: lease.extend(1),
        lambda: lease.wait_arrived(0, 1),
    ]
    for i, call in enumerate(calls):
        try:
            call()
        except InvalidArgumentError as error:
            assert "forked" in str(error), (i, error)
        else:
            raise AssertionError(i)
    assert engine.closed
    engine.close()
    with TransferEngine("child", secret=b"a secret for tests", transports=(sys.argv[2],)) as own:
        mine = own.allocate(size, "kv")  # an engine of the child's own works
        own.write(mine, own.connect(sys.argv[1], timeout_s=60).regions["kv"], 0, 0, 100).wait(30)
        del engine, region, peer, remote, lease, xfers
    sys.exit(0)  # through all destructors
_, status = os.waitpid(pid, 0)
assert status == 0, status
for xfer in xfers:
    xfer.wait(30)  # the parent's own go on
engine.close()
print("done", flush=True)
"""
)

# The child sleeps on a pipe until the driver is done with it; fork by `how`.
_CHILD_LIVES = (
    _PARENT
    + """
hold, held = os.pipe()
pid = os.fork() if sys.argv[3] == "fork" else ctypes.PyDLL(None).syscall(57)  # SYS_fork, x86-64
if pid == 0:
    os.close(held)
    os.write(1, b"child\\n")
    sys.stdin.buffer.raw.read(1)  # the driver closes it
    os._exit(0)
os.close(hold)
signal.pause()
"""
)


WORKING = [name for name, reason in probe_transports() if reason is None]


@pytest.fixture(params=WORKING)
def driver(request: pytest.FixtureRequest) -> Iterator[tuple[TransferEngine, str]]:
    """An engine, and the name of the transport that the script is to use."""
    with TransferEngine("driver", transports=(request.param,), secret=SECRET) as engine:
        engine.allocate(8 << 20, "kv")
        yield engine, request.param


def run(script: str, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", script, *arguments]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_handles_are_dead_in_a_forked_child(driver: tuple[TransferEngine, str]) -> None:
    engine, transport = driver
    parent = run(_CHILD_CALLS, engine.address, transport)
    out, _ = parent.communicate(timeout=2 * TIMEOUT_S)
    assert out == "done\n"
    assert parent.returncode == 0


@pytest.mark.parametrize("how", ["fork", "syscall"])
def test_death_of_a_parent_is_seen_though_its_child_lives(
    driver: tuple[TransferEngine, str], how: str
) -> None:
    """A bare system call skips the handler that closes sockets: there the pidfd must speak."""
    if how == "syscall" and platform.machine() != "x86_64":
        pytest.skip("the number of SYS_fork is that of x86-64")
    engine, transport = driver
    parent = run(_CHILD_LIVES, engine.address, transport, how)
    assert parent.stdout is not None
    assert parent.stdout.readline() == "child\n"
    peer = next(e.peer for e in wait_for(engine, engine.peer_events) if e.kind == "connected")
    assert "pidfd" in engine.explain(peer)
    parent.kill()
    assert wait_for(engine, lambda: not peer.alive)
    assert parent.wait(TIMEOUT_S) != 0
    assert parent.poll() is not None
    parent.communicate(timeout=TIMEOUT_S)  # lets the child go


def test_killed_peer_is_lost_at_once_whoever_speaks_first(
    engine: TransferEngine, own_peer: PeerProcess
) -> None:
    peer = engine.connect(own_peer.address)
    assert "its sockets and its pidfd" in engine.explain(peer)
    own_peer.kill()  # returns when it has been reaped
    wait_for(engine, lambda: not peer.alive)
    assert peer.lost_because


_INTERRUPTED_CLOSE = """
import signal, time
from kvxfer.transfer import TransferEngine
a, b = TransferEngine("a"), TransferEngine("b")
region = a.allocate(1 << 24, "kv"); b.allocate(1 << 24, "kv")
peer = a.connect(b.address)
xfers = [a.write(region, peer.regions["kv"], 0, 0, 1 << 24) for _ in range(20)]
def on_signal(*_):
    a.close()  # in the middle of whatever the main thread does, perhaps another close()
    raise KeyboardInterrupt
signal.signal(signal.SIGALRM, on_signal)
try:
    signal.setitimer(signal.ITIMER_REAL, 0.001)
    for xfer in xfers: xfer.wait()
    while True: time.sleep(0.05)  # pause() would miss a signal that comes just before it
except KeyboardInterrupt:
    pass
a.close(); a.close(); b.close()
assert all(xfer.done for xfer in xfers)
print("closed", flush=True)
"""


def test_close_from_a_signal_handler_and_again() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _INTERRUPTED_CLOSE],
        timeout=TIMEOUT_S,
        check=False,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, "closed\n")
