# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Two processes with NIXL's UCX backend over host memory, driven by bench_transfer.

    python -m venv V && V/bin/pip install numpy && V/bin/pip install --no-deps nixl-cu13

is enough on a machine without CUDA. UCX rules its shared-memory transports out while endpoint error
handling is on (`--errors peer`, NIXL's default), so those run without failure detection.
"""

from __future__ import annotations

import argparse
import base64
import os
import time
from typing import Any

import lines
import numpy as np

from bounds import plain_pages
from processes import Stopwatch


def make_agent(args: argparse.Namespace, name: str) -> Any:
    os.environ["UCX_TLS"] = args.tls
    os.environ.setdefault("NIXL_LOG_LEVEL", "ERROR")
    os.environ.setdefault("UCX_NET_DEVICES", "lo")
    for module in ("nixl_cu13", "nixl_cu12", "nixl"):
        try:
            nixl = __import__(module)
            break
        except ImportError:
            continue
    else:
        raise SystemExit("no NIXL wheel: pip install --no-deps nixl-cu13")
    agent = nixl.nixl_agent(
        name,
        nixl.nixl_agent_config(
            enable_prog_thread=args.threads, enable_listen_thread=False, backends=[]
        ),
    )
    agent.create_backend("UCX", {"ucx_error_handling_mode": args.errors})
    return agent


class Side:
    """What both processes do: a registered pool, and the other agent loaded."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.agent = make_agent(args, args.role)
        self.registered: Any = None
        self.peer: str | None = None

    def open(self, block: int, num_slots: int, seed: int) -> dict[str, Any]:
        self.close()
        self.block = block
        self.pool = plain_pages(block * num_slots)
        lines.fill(self.pool, seed)
        address = self.pool.ctypes.data
        self.registered = self.agent.register_memory([(address, self.pool.nbytes, 0, "")], "DRAM")
        metadata = base64.b64encode(self.agent.get_agent_metadata()).decode()
        return {"metadata": metadata, "address": address, "num_slots": num_slots}

    def load(self, metadata: str) -> None:
        name = self.agent.add_remote_agent(base64.b64decode(metadata))
        self.peer = name.decode() if isinstance(name, bytes) else name

    def close(self) -> None:
        if self.peer is not None:
            self.agent.remove_remote_agent(self.peer)
        if self.registered is not None:
            self.agent.deregister_memory(self.registered)
        self.peer = self.registered = None

    def descriptors(self, address: int, num_slots: int) -> np.ndarray:
        out = np.zeros((num_slots, 3), np.uint64)
        out[:, 0] = address + np.arange(num_slots) * self.block
        out[:, 1] = self.block
        return out


def target(args: argparse.Namespace) -> None:
    up = lines.standard()
    side = Side(args)
    up.send(ready=True)
    while True:
        try:
            told = up.receive()
        except EOFError:
            return
        if told["do"] == "open":
            answer = side.open(told["block"], told["num_slots"], 1)
            side.load(told["metadata"])
            up.send(**answer)
        elif told["do"] == "poll":  # what a process does that waits for its blocks
            up.send()
            while not args.threads and not up.ready():
                for _ in range(64):
                    side.agent.get_new_notifs()
        elif told["do"] == "rest":
            up.send()
        elif told["do"] == "clear":
            for slot in told["slots"]:
                side.pool[slot * side.block : (slot + 1) * side.block] = 0
            up.send()
        elif told["do"] == "digest":
            up.send(digest=lines.digest(side.pool, told["slots"], side.block))
        elif told["do"] == "close":
            side.close()
            up.send()


class Driver(Side):
    def __init__(self, args: argparse.Namespace, forward: list[str]) -> None:
        self.up = lines.standard()
        self.child, self.down = lines.start_target(forward)
        super().__init__(args)
        self.down.receive()

    def case(self, block: int, num_slots: int, src: list[int], dst: list[int]) -> None:
        if self.registered is not None:
            self.local.release()
            self.remote.release()
            self.down.ask(do="close")
        mine = self.open(block, num_slots, 0)
        other = self.down.ask(
            do="open", block=block, num_slots=num_slots, metadata=mine["metadata"]
        )
        self.load(other["metadata"])
        self.src, self.dst = np.array(src, np.int32), np.array(dst, np.int32)
        self.down.ask(do="poll")
        self.agent.make_connection(self.peer)
        self.local = self.agent.prep_xfer_dlist(
            "NIXL_INIT_AGENT", self.descriptors(mine["address"], num_slots), "DRAM"
        )
        self.remote = self.agent.prep_xfer_dlist(
            self.peer, self.descriptors(other["address"], num_slots), "DRAM"
        )
        self.once()
        self.down.ask(do="rest")

    def once(self) -> None:
        """A request of its own each time, as an engine's blocks differ each time."""
        handle = self.agent.make_prepped_xfer("WRITE", self.local, self.src, self.remote, self.dst)
        state = self.agent.transfer(handle)
        while state == "PROC":
            if self.args.threads:  # two spinning threads on one CPU would only disturb each other
                time.sleep(50e-6)
            state = self.agent.check_xfer_state(handle)
        if state != "DONE":
            raise RuntimeError(f"NIXL transfer ended as {state}")
        handle.release()

    def sample(self) -> dict[str, float]:
        self.down.ask(do="poll")
        self.once()
        with Stopwatch([os.getpid(), self.child.pid]) as watch:
            self.once()
        self.down.ask(do="rest")
        return vars(watch.sample)

    def verify(self) -> bool:
        slots = self.dst.tolist()
        self.down.ask(do="clear", slots=slots)
        self.down.ask(do="poll")
        self.once()
        self.down.ask(do="rest")
        got = self.down.ask(do="digest", slots=slots)["digest"]
        return bool(got == lines.digest(self.pool, self.src.tolist(), self.block))


def drive(args: argparse.Namespace, forward: list[str]) -> None:
    driver = Driver(args, forward)
    driver.up.send(ready=True, pids=[os.getpid(), driver.child.pid])
    while True:
        try:
            told = driver.up.receive()
        except EOFError:
            break
        if told["do"] == "case":
            driver.case(told["block"], told["num_slots"], told["src"], told["dst"])
            driver.up.send(verified=driver.verify())
        else:
            driver.up.send(**driver.sample())
    assert driver.child.stdin is not None
    driver.child.stdin.close()
    driver.child.wait(10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--role", choices=("driver", "target"), default="driver")
    parser.add_argument("--tls", default="all", help="UCX_TLS")
    parser.add_argument("--errors", choices=("peer", "none"), default="peer")
    parser.add_argument("--threads", action="store_true", help="NIXL's progress threads")
    parser.add_argument("--cpus", type=int, nargs=2, help="of the driver and of the target")
    args = parser.parse_args()
    if args.cpus:
        os.sched_setaffinity(0, {args.cpus[args.role == "target"]})
    forward = ["--tls", args.tls, "--errors", args.errors]
    forward += ["--threads"] if args.threads else []
    forward += ["--cpus", *map(str, args.cpus)] if args.cpus else []
    if args.role == "target":
        target(args)
    else:
        drive(args, forward)


if __name__ == "__main__":
    main()
