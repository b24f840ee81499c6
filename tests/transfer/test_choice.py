# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Which way is gone, which is not and why; nothing is fallen back to in silence."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from transfer_peers import SECRET, TIMEOUT_S, PeerProcess

from kvxfer.errors import UnavailableError
from kvxfer.transfer import TransferEngine, probe_transports

WORKING = [name for name, reason in probe_transports() if reason is None and name != "tcp"]
NBYTES = 1 << 20


@pytest.mark.parametrize("transport", WORKING)
def test_a_transport_that_was_asked_for_alone_is_not_replaced(transport: str) -> None:
    """Tcp would be there: it carries the session."""
    with (
        TransferEngine("a", transports=(transport,), secret=SECRET) as a,
        TransferEngine("b", transports=("tcp",), secret=SECRET) as b,
    ):
        with pytest.raises(UnavailableError, match=f"{transport}: the peer does not offer it"):
            a.connect(b.address)
        with pytest.raises(UnavailableError, match="none of the transports asked for"):
            a.connect(b.address)


@pytest.mark.parametrize("transport", WORKING)
def test_each_refusal_is_explained(transport: str) -> None:
    with (
        TransferEngine("a", transports=(transport, "tcp"), secret=SECRET) as a,
        TransferEngine("b", transports=("tcp",), secret=SECRET) as b,
    ):
        local = a.register(np.ones(100, np.uint8), "kv")
        theirs = b.register(np.zeros(100, np.uint8), "kv")
        peer = a.connect(b.address)
        assert f"{transport}: the peer does not offer it" in a.explain(peer)
        xfer = a.write(local, peer.regions["kv"], 0, 0, 100)
        xfer.wait(TIMEOUT_S)
        assert xfer.transport == "tcp"
        assert theirs.array.all()


@pytest.mark.parametrize("transport", WORKING)
def test_what_a_peer_asks_over_a_transport_that_is_left_out_is_refused(transport: str) -> None:
    with (
        TransferEngine("a", transports=("tcp",), secret=SECRET) as a,
        TransferEngine("b", transports=(transport,), secret=SECRET) as b,
    ):
        local = a.register(np.ones(NBYTES, np.uint8), "kv")
        theirs = b.register(np.full(NBYTES, 2, np.uint8), "kv")
        peer = a.connect(b.address)
        for xfer in (
            a.write(local, peer.regions["kv"], 0, 0, NBYTES),
            a.read(local, peer.regions["kv"], 0, 0, NBYTES),
            a.notify(peer, b"x"),
        ):
            with pytest.raises(UnavailableError, match="takes nothing over tcp: its transports="):
                xfer.wait(TIMEOUT_S)
        assert (theirs.array == 2).all()
        assert (local.array == 1).all()
        assert b.notifications() == []
        assert b.stats()["refused"] == {"unavailable": 3}


def test_engines_listen_on_the_loopback_unless_told_otherwise() -> None:
    with TransferEngine("a") as engine:
        assert engine.address.startswith("127.0.0.1:")


@pytest.mark.skipif("shm" not in WORKING, reason="shared memory does not work here")
@pytest.mark.parametrize("share", ["auto", "never"])
def test_only_memory_that_may_be_shared_is_mapped_by_the_peer(share: str) -> None:
    """What is allocated can be mapped; what is registered with share="never" is not, on no way."""
    peer_process = PeerProcess("peer", ("shm",))
    peer_process.call("add_region", "theirs", NBYTES, "allocated")
    with TransferEngine("a", transports=("shm",), secret=SECRET) as a:
        allocated = a.allocate(NBYTES, "pool-to-share")
        allocated.array[:] = 5
        peer = a.connect(peer_process.address)
        source = allocated
        if share == "never":
            source = a.register(allocated.array, "the-same-bytes", share="never")
        a.write(source, peer.regions["theirs"], 0, 0, NBYTES).wait(TIMEOUT_S)
        maps = Path(f"/proc/{peer_process.pid}/maps").read_text()
        assert ("kvxfer:pool-to-share" in maps) == (share == "auto")
        assert peer_process.call("bytes_of", "theirs") == bytes([5]) * NBYTES
    peer_process.close()


# Says which prctl() opens the process to others, and does it.
_SPY = """
#include <stdarg.h>
#include <stdio.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>
int prctl(int option, ...) {
  va_list list;
  va_start(list, option);
  unsigned long a = va_arg(list, unsigned long), b = va_arg(list, unsigned long);
  unsigned long c = va_arg(list, unsigned long), d = va_arg(list, unsigned long);
  va_end(list);
  if (option == PR_SET_PTRACER) fprintf(stderr, "PR_SET_PTRACER %ld\\n", (long)a);
  return (int)syscall(SYS_prctl, option, a, b, c, d);
}
"""


@pytest.mark.skipif("cma" not in WORKING, reason="process_vm_readv does not work here")
@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler to build the spy with")
@pytest.mark.parametrize("allowed", [False, True])
def test_a_process_is_opened_to_others_only_when_told(tmp_path: Path, allowed: bool) -> None:
    (tmp_path / "spy.c").write_text(_SPY)
    library = tmp_path / "spy.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, tmp_path / "spy.c"], check=True)
    program = (
        "from kvxfer.transfer import EngineConfig, TransferEngine\n"
        f"TransferEngine('a', transports=('cma',), config=EngineConfig(allow_ptrace={allowed})).close()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "LD_PRELOAD": str(library)},
        stderr=subprocess.PIPE,
        text=True,
        timeout=TIMEOUT_S,
        check=True,
    )
    assert ("PR_SET_PTRACER -1" in done.stderr) == allowed
