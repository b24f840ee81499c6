# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Scattered writes of 1024 blocks in one request, against a bound measured in the same run.

    python bench/bench_transfer.py [--transports tcp,shm] [--json PATH]

Two processes; slots are random on both sides. The bound of ``tcp`` is one raw socket with 1 MiB
writes between the same two processes; of ``shm`` it is the same scattered copy inside one process.
Bound and transport take turns round by round, and the ratio is of medians: neighbours disturb both.
The bytes of every case are verified once.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import socket
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from kvxfer import _transfer
from kvxfer.transfer import TransferEngine, probe_transports

NUM_BLOCKS = 1024
CHUNK = 1 << 20
SECRET = b"bench"


def _slots(rng: np.random.Generator, block: int) -> np.ndarray:
    return (rng.permutation(2 * NUM_BLOCKS)[:NUM_BLOCKS] * block).astype(np.int64)


def _target(pipe: Any, transport: str, pool: int) -> None:
    """The other process: owns the destination, and is the far end of the raw socket."""
    with (
        TransferEngine("target", transports=(transport,), secret=SECRET) as engine,
        socket.create_server(("127.0.0.1", 0)) as server,
    ):
        region = engine.allocate(pool, "pool")
        pipe.send((engine.address, server.getsockname()[1]))
        raw, _ = server.accept()
        view = memoryview(region.array)
        source: np.ndarray | None = None
        while (message := pipe.recv()) is not None:
            kind, *args = message
            if kind == "raw":  # nbytes through one socket, in 1 MiB reads into place
                left = args[0]
                while left > 0:
                    left -= raw.recv_into(view[: min(left, CHUNK)])
                raw.sendall(b"!")
            elif kind == "memcpy":  # the bound runs in the process that copies
                if source is None:
                    source = np.ones_like(region.array)
                pipe.send(_memcpy(region.array, source, *args))
            elif kind == "drain":
                pipe.send(len(engine.notifications()))
            elif kind == "clear":
                region.array[:] = 0
                pipe.send(None)
            elif kind == "gather":
                offsets, block = args
                pipe.send(region.array.reshape(-1, block)[offsets // block].tobytes())


def _memcpy(
    pool: np.ndarray, source: np.ndarray, src: np.ndarray, dst: np.ndarray, block: int
) -> float:
    _transfer.scattered_copy(pool, source, dst, src, block)  # warm
    began = time.perf_counter()
    _transfer.scattered_copy(pool, source, dst, src, block)
    return time.perf_counter() - began


def _raw_round(pipe: Any, raw: socket.socket, data: memoryview, nbytes: int) -> float:
    pipe.send(("raw", nbytes))
    began = time.perf_counter()
    sent = 0
    while sent < nbytes:
        sent += raw.send(data[sent : min(sent + CHUNK, nbytes)])
    raw.recv(1)
    return time.perf_counter() - began


def run(transport: str, blocks: list[int], rounds: int) -> list[dict[str, Any]]:
    pool = 2 * NUM_BLOCKS * max(blocks)
    context = multiprocessing.get_context("spawn")
    pipe, child = context.Pipe()
    process = context.Process(target=_target, args=(child, transport, pool))
    process.start()
    child.close()
    results = []
    rng = np.random.default_rng(0)
    with TransferEngine("source", transports=(transport,), secret=SECRET) as engine:
        address, port = pipe.recv()
        region = engine.allocate(pool, "pool")
        region.array[:] = rng.integers(0, 256, pool, np.uint8)
        peer = engine.connect(address)
        remote = peer.regions["pool"]
        raw = socket.create_connection(("127.0.0.1", port))
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        data = memoryview(region.array)
        for block in blocks:
            nbytes = NUM_BLOCKS * block
            src, dst = _slots(rng, block), _slots(rng, block)
            pipe.send(("clear",))
            pipe.recv()
            engine.write(region, remote, src, dst, block).wait(60)
            pipe.send(("gather", dst, block))
            expected = region.array.reshape(-1, block)[src // block].tobytes()
            if pipe.recv() != expected:
                raise SystemExit(f"{transport}: wrong bytes at {block}")
            ours, bound, submit = [], [], []
            for _ in range(rounds):
                if transport == "tcp":
                    bound.append(_raw_round(pipe, raw, data, nbytes))
                else:
                    pipe.send(("memcpy", src, dst, block))
                    bound.append(pipe.recv())
                engine.write(region, remote, 0, 0, 1).wait(60)  # the target is awake in both
                began = time.perf_counter()
                xfer = engine.write(region, remote, src, dst, block)
                submit.append(time.perf_counter() - began)
                xfer.wait(60)
                ours.append(time.perf_counter() - began)
            p50, p99 = statistics.median(ours), sorted(ours)[int(len(ours) * 0.99)]
            limit = statistics.median(bound)
            row = {
                "case": "write_blocks",
                "transport": transport,
                "num_blocks": NUM_BLOCKS,
                "block_nbytes": block,
                "rounds": rounds,
                "p50_us": p50 * 1e6,
                "p99_us": p99 * 1e6,
                "submit_us": statistics.median(submit) * 1e6,
                "gb_per_s": nbytes / p50 / 1e9,
                "bound": "raw socket" if transport == "tcp" else "memcpy",
                "bound_gb_per_s": nbytes / limit / 1e9,
                "ratio": limit / p50,
            }
            results.append(row)
            print(
                f"write_blocks  {transport}  {NUM_BLOCKS} x {block // 1024} KiB | "
                f"p50 {row['p50_us']:.0f} us  p99 {row['p99_us']:.0f} us | "
                f"{row['gb_per_s']:.2f} GB/s | {row['ratio']:.2f} of {row['bound']} "
                f"({row['bound_gb_per_s']:.2f} GB/s)",
                flush=True,
            )
        ours, bound = [], []
        for i in range(50 * rounds):
            if i % 100 == 0:  # the window of undrained messages is 256
                pipe.send(("drain",))
                pipe.recv()
            began = time.perf_counter()
            engine.notify(peer, bytes(64)).wait(60)
            ours.append(time.perf_counter() - began)
        p50 = statistics.median(ours)
        print(f"notify 64 B until accepted  {transport} | p50 {p50 * 1e6:.0f} us", flush=True)
        results.append({"case": "notify_64", "transport": transport, "p50_us": p50 * 1e6})
        raw.close()
    pipe.send(None)
    process.join(60)
    if process.exitcode != 0:
        raise SystemExit(f"the target ended with {process.exitcode}")
    return results


def main() -> int:
    available = [name for name, reason in probe_transports() if reason is None]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--transports", default=",".join(available))
    parser.add_argument("--blocks", default="4,16,64,256", help="KiB, comma-separated")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    blocks = [int(each) * 1024 for each in args.blocks.split(",")]
    results = [row for each in args.transports.split(",") for row in run(each, blocks, args.rounds)]
    if args.json is not None:
        machine = {
            "platform": platform.platform(),
            "num_cpus": os.cpu_count(),
            "python": sys.version.split()[0],
            "numpy": np.__version__,
        }
        args.json.write_text(
            json.dumps({"machine": machine, "argv": sys.argv, "results": results}, indent=1) + "\n"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
