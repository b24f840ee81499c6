# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Two processes with Mooncake's transfer engine over host memory and tcp, driven by bench_transfer.

    python -m venv V && V/bin/pip install numpy mooncake-transfer-engine-non-cuda

It links against libibverbs.so.1, also where only tcp is used (Debian: libibverbs1).
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import lines

from bounds import plain_pages
from processes import Stopwatch

HOST = "127.0.0.1"


class Side:
    def __init__(self) -> None:
        os.environ.setdefault("GLOG_minloglevel", "3")
        os.environ.setdefault("MC_LOG_LEVEL", "ERROR")
        from mooncake.engine import TransferEngine  # type: ignore[import-not-found]

        self.engine: Any = TransferEngine()
        if code := self.engine.initialize(HOST, "P2PHANDSHAKE", "tcp", ""):
            raise SystemExit(f"Mooncake's initialize returned {code}")
        self.address = 0

    def open(self, block: int, num_slots: int, seed: int) -> None:
        if self.address:
            self.engine.unregister_memory(self.address)
        self.block = block
        self.pool = plain_pages(block * num_slots)
        lines.fill(self.pool, seed)
        self.address = self.pool.ctypes.data
        if code := self.engine.register_memory(self.address, self.pool.nbytes):
            raise SystemExit(f"Mooncake's register_memory returned {code}")


def target() -> None:
    up = lines.standard()
    side = Side()
    up.send(session=f"{HOST}:{side.engine.get_rpc_port()}")
    while True:
        try:
            told = up.receive()
        except EOFError:
            os._exit(0)  # its threads do not always let a process end
        if told["do"] == "open":
            side.open(told["block"], told["num_slots"], 1)
            up.send(address=side.address)
        elif told["do"] == "clear":
            for slot in told["slots"]:
                side.pool[slot * side.block : (slot + 1) * side.block] = 0
            up.send()
        elif told["do"] == "digest":
            up.send(digest=lines.digest(side.pool, told["slots"], side.block))


class Driver(Side):
    def __init__(self) -> None:
        self.up = lines.standard()
        self.child, self.down = lines.start_target([])
        super().__init__()
        self.session = self.down.receive()["session"]

    def case(self, block: int, num_slots: int, src: list[int], dst: list[int]) -> bool:
        self.open(block, num_slots, 0)
        base = self.down.ask(do="open", block=block, num_slots=num_slots)["address"]
        self.local = [self.address + slot * block for slot in src]
        self.remote = [base + slot * block for slot in dst]
        self.sizes = [block] * len(src)
        self.down.ask(do="clear", slots=dst)
        self.once()
        got = self.down.ask(do="digest", slots=dst)["digest"]
        return bool(got == lines.digest(self.pool, src, block))

    def once(self) -> None:
        if code := self.engine.batch_transfer_sync_write(
            self.session, self.local, self.remote, self.sizes
        ):
            raise RuntimeError(f"Mooncake's batch_transfer_sync_write returned {code}")

    def sample(self) -> dict[str, float]:
        self.once()
        with Stopwatch([os.getpid(), self.child.pid]) as watch:
            self.once()
        return vars(watch.sample)


def drive() -> None:
    driver = Driver()
    driver.up.send(ready=True, pids=[os.getpid(), driver.child.pid])
    while True:
        try:
            told = driver.up.receive()
        except EOFError:
            break
        if told["do"] == "case":
            driver.up.send(
                verified=driver.case(told["block"], told["num_slots"], told["src"], told["dst"])
            )
        else:
            driver.up.send(**driver.sample())
    assert driver.child.stdin is not None
    driver.child.stdin.close()
    driver.child.wait(10)
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--role", choices=("driver", "target"), default="driver")
    if parser.parse_args().role == "target":
        target()
    else:
        drive()


if __name__ == "__main__":
    main()
