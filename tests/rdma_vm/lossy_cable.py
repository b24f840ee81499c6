# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""In the guest, with --netem: scattered writes and reads between engines on the cable's two ends, byte for byte."""

from __future__ import annotations

import faulthandler
import json
import subprocess

import numpy as np

from kvxfer.transfer import EngineConfig, TransferEngine

BLOCK, BLOCKS, ROUNDS = 16384, 512, 6
SECRET = b"a secret for tests"


def engine(name: str, device: str) -> TransferEngine:
    config = EngineConfig(verbs_device=device)
    return TransferEngine(name, transports=("verbs",), secret=SECRET, config=config)


def main() -> None:
    faulthandler.dump_traceback_later(240, exit=True)
    generator = np.random.default_rng(0)
    with engine("a", "rxe0") as ours, engine("b", "rxe1") as theirs:
        target = theirs.allocate(BLOCK * BLOCKS, "kv")
        source = ours.allocate(BLOCK * BLOCKS, "kv")
        peer = ours.connect(theirs.address, timeout_s=60)
        remote = peer.regions["kv"]
        here, there = source.array.reshape(-1, BLOCK), target.array.reshape(-1, BLOCK)
        for round_ in range(ROUNDS):
            here[:] = generator.integers(0, 256, here.shape, dtype=np.uint8)
            there[:] = 0
            local, distant = generator.permutation(BLOCKS), generator.permutation(BLOCKS)
            sides = (source, remote, local * BLOCK, distant * BLOCK, BLOCK)
            transfer = ours.write(*sides, notify=bytes([round_]))
            transfer.wait(timeout_s=60)
            assert transfer.transport == "verbs"
            assert np.array_equal(here[local], there[distant])
            here[:] = 0
            ours.read(*sides).wait(timeout_s=60)
            assert np.array_equal(here[local], there[distant])
        told = [note.payload for note in theirs.notifications()]
        assert told == [bytes([round_]) for round_ in range(ROUNDS)]
    lost = 0
    for interface in ("rdma0", "rdma1"):
        shown = subprocess.run(["tc", "-j", "-s", "qdisc", "show", "dev", interface], capture_output=True, check=True)  # fmt: skip
        lost += json.loads(shown.stdout)[0]["drops"]
    print(json.dumps({"requests": 2 * ROUNDS, "lost_packets": lost}))


if __name__ == "__main__":
    main()
