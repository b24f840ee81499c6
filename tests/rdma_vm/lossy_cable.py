# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""In the guest, with --netem: scattered writes and reads between engines on the cable's two ends, byte for byte; then
the cable is cut, and what is asked of it must end.

It ends by itself: after ``LIMIT_S`` it says where it stands and what the devices have counted.
"""

from __future__ import annotations

import faulthandler
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np

from kvxfer.errors import KvxferError
from kvxfer.transfer import EngineConfig, Peer, Region, TransferEngine

BLOCK, BLOCKS, ROUNDS = 16384, 512, 6
BEGAN = time.monotonic()
SECRET = b"a secret for tests"
LIMIT_S = 220.0  # imports included: less than that of the machine
# Of a request, and so of the retries that devices make for it: 6 of 537 ms.
DEADLINE_S = 12.0


def engine(name: str, device: str) -> TransferEngine:
    config = EngineConfig(verbs_device=device, deadline_s=DEADLINE_S)
    return TransferEngine(name, transports=("verbs",), secret=SECRET, config=config)


def counters() -> dict[str, dict[str, int]]:
    """What each device has counted, by its kernel's names, where it is not 0."""
    found: dict[str, dict[str, int]] = {}
    for device in Path("/sys/class/infiniband").iterdir():
        counted = {f.name: int(f.read_text()) for f in device.glob("ports/1/hw_counters/[!l]*")}
        found[device.name] = {name: count for name, count in counted.items() if count}
    return found


def lost_packets() -> int:
    lost = 0
    for interface in ("rdma0", "rdma1"):
        shown = subprocess.run(["tc", "-j", "-s", "qdisc", "show", "dev", interface], capture_output=True, check=True)  # fmt: skip
        lost += json.loads(shown.stdout)[0]["drops"]
    return lost


def say(what: str) -> None:
    print(f"{time.monotonic() - BEGAN:7.1f} s  {what}", file=sys.stderr, flush=True)


def give_up(engines: list[TransferEngine]) -> None:
    """Called by a timer: whatever hangs is shown, and ends."""
    say(f"stopped at its limit of {LIMIT_S} s; {lost_packets()} packets lost, {counters()}")
    subprocess.run(["rdma", "resource", "show", "qp"], stdout=sys.stderr, check=False)
    faulthandler.dump_traceback()
    for each in engines:
        print(each.name, each.stats(), file=sys.stderr, flush=True)
    os._exit(1)


def go_both_ways(ours: TransferEngine, peer: Peer, source: Region, target: Region) -> None:
    """Each block must arrive where it belongs, there and back."""
    generator = np.random.default_rng(0)
    here, there = source.array.reshape(-1, BLOCK), target.array.reshape(-1, BLOCK)
    for round_ in range(ROUNDS):
        here[:] = generator.integers(0, 256, here.shape, dtype=np.uint8)
        there[:] = 0
        local, distant = generator.permutation(BLOCKS), generator.permutation(BLOCKS)
        sides = (source, peer.regions["kv"], local * BLOCK, distant * BLOCK, BLOCK)
        transfer = ours.write(*sides, notify=bytes([round_]))
        transfer.wait(timeout_s=60)
        say(f"write {round_}: {lost_packets()} packets lost so far")
        assert transfer.transport == "verbs"
        assert np.array_equal(here[local], there[distant])
        here[:] = 0
        ours.read(*sides).wait(timeout_s=60)
        say(f"read {round_}: {lost_packets()} packets lost so far")
        assert np.array_equal(here[local], there[distant])


def cut(ours: TransferEngine, peer: Peer, source: Region) -> dict[str, str]:
    """How requests end when nothing comes through any more: by name of the error."""
    ends = {}
    for interface in ("rdma0", "rdma1"):
        subprocess.run(f"tc qdisc replace dev {interface} root netem loss 100%".split(), check=True)
    size = BLOCK * BLOCKS
    asked = {
        "write": ours.write(source, peer.regions["kv"], 0, 0, size),
        "read": ours.read(source, peer.regions["kv"], 0, 0, size),
    }
    for name, transfer in asked.items():
        began = time.monotonic()
        try:
            transfer.wait(timeout_s=60)
            ends[name] = "no error"
        except KvxferError as error:
            ends[name] = type(error).__name__
            say(f"cut: the {name} ended after {time.monotonic() - began:.1f} s more: {error}")
        while not transfer.quiesced:
            time.sleep(0.01)
    say("cut: all is quiesced")
    return ends


def main() -> None:
    with engine("a", "rxe0") as ours, engine("b", "rxe1") as theirs:
        watch = threading.Timer(LIMIT_S, give_up, [[ours, theirs]])
        watch.daemon = True
        watch.start()
        target = theirs.allocate(BLOCK * BLOCKS, "kv")
        source = ours.allocate(BLOCK * BLOCKS, "kv")
        peer = ours.connect(theirs.address, timeout_s=60)
        say(f"connected: {ours.explain(peer)}")
        go_both_ways(ours, peer, source, target)
        told = [note.payload for note in theirs.notifications()]
        assert told == [bytes([round_]) for round_ in range(ROUNDS)]
        result = {"requests": 2 * ROUNDS, "lost_packets": lost_packets()}
        result["cut"] = cut(ours, peer, source)
        say(f"closing; {counters()}")
    watch.cancel()
    say("closed")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
