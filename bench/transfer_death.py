# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""How long after a peer is gone its transfers fail: ``python transfer_death.py PAIR`` is a peer to be killed."""

from __future__ import annotations

import os
import select
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import transfer_target
from kvxfer.errors import PeerDisconnectedError
from transfer_world import World

NBYTES = 64 << 20
TIMEOUT_S = 60.0
ASKED_US = 100_000.0

Row = dict[str, Any]


def deaths(world: World, rounds: int) -> list[Row]:
    """Seconds from the end of the peer's teardown to ours. Its pidfd becomes readable when its last
    thread has gone, after its memory and its descriptors: who hears of those has a negative number."""
    rows = []
    for pair in ("shm", "tcp"):
        if pair not in world.pairs or not hasattr(os, "pidfd_open"):
            continue
        seconds = [kill_one(pair, world.spin_us) for _ in range(rounds)]
        row: Row = {
            "case": "death",
            "kind": "path",
            "name": pair,
            "p50_us": statistics.median(seconds) * 1e6,
            "max_us": max(seconds) * 1e6,
            "samples": rounds,
            "asked_us": ASKED_US,
        }
        rows.append(row)
        print(
            f"death       {pair:16} p50 {row['p50_us']:8.0f} us  worst {row['max_us']:8.0f} us  "
            f"after the end of the peer's teardown (negative: before it); asked: {ASKED_US:.0f} us",
            flush=True,
        )
    return rows


def kill_one(pair: str, spin_us: float) -> float:
    command = [sys.executable, str(Path(__file__)), pair]
    victim = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert victim.stdout is not None
    address = victim.stdout.readline().strip()
    gone: list[float] = []
    with transfer_target.make_engine("a mourner", pair, spin_us) as engine:
        peer = engine.connect(address, TIMEOUT_S)
        local = engine.allocate(NBYTES)
        watch = os.pidfd_open(victim.pid)

        def observe() -> None:
            if select.select([watch], [], [], TIMEOUT_S)[0]:
                gone.append(time.monotonic())

        observer = threading.Thread(target=observe)
        observer.start()
        victim.send_signal(signal.SIGSTOP)  # the transfer stays open
        xfer = engine.write(local, peer.regions["kv"], 0, 0, NBYTES)
        victim.kill()
        try:
            xfer.wait(TIMEOUT_S)
        except PeerDisconnectedError:
            told = time.monotonic()
        observer.join(TIMEOUT_S)
        os.close(watch)
    victim.wait(TIMEOUT_S)
    victim.stdout.close()
    return told - gone[0]


def main() -> None:
    with transfer_target.make_engine("a victim", sys.argv[1], 0.0) as engine:
        engine.allocate(NBYTES, "kv")
        print(engine.address, flush=True)
        signal.pause()


if __name__ == "__main__":
    main()
