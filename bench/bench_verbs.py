# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""The verbs transport on Soft-RoCE, beside `ib_write_bw` and `ib_read_bw` in the same virtual machine.

`python bench/bench_verbs.py --json bench/results/verbs-rxe.json` boots tests/rdma_vm and runs itself there. Everything
is emulated: only the ratios mean something, and they say what our engine adds to the queue pairs, not what a NIC does.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from kvxfer.transfer import EngineConfig, TransferEngine

ROOT = Path(__file__).resolve().parents[1]
SECRET = b"bench"
CASES = ((4096, 1024), (65536, 1024), (262144, 256))  # block size, blocks
BOUNDS = ("ib_write_bw", "ib_read_bw")
PORT = 18515


def serve(pipe: Connection, nbytes: int, push: bool) -> None:
    config = EngineConfig(verbs_push=push)
    with TransferEngine("target", transports=("verbs",), secret=SECRET, config=config) as engine:
        region = engine.allocate(nbytes, "kv")
        region.wait_registered()
        lease = engine.grant(region, 0, nbytes, ttl_s=3600)
        pipe.send((engine.address, lease.token))
        while (offset := pipe.recv()) is not None:
            pipe.send(region.array[offset : offset + 8].tobytes())


class Ours:
    """Two processes with an engine each; one request of scattered blocks a sample. Writes are under a lease, and pulled
    by the target, or pushed."""

    def __init__(self, nbytes: int, push: bool) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, child = context.Pipe()
        self._process = context.Process(target=serve, args=(child, nbytes, push))
        self._process.start()
        config = EngineConfig(verbs_push=push)
        self._engine = TransferEngine("initiator", transports=("verbs",), secret=SECRET, config=config)  # fmt: skip
        self._push = push
        self._region = self._engine.allocate(nbytes, "kv")
        self._region.wait_registered()
        generator = np.random.default_rng(0)
        self._region.array[:] = generator.integers(0, 256, nbytes, dtype=np.uint8)
        address, self._lease = self._pipe.recv()
        self._peer = self._engine.connect(address, timeout_s=60)
        self._remote = self._peer.regions["kv"]
        self._generator = generator

    def seconds(self, op: str, block: int, blocks: int) -> float:
        source, target = (self._generator.permutation(blocks) * block for _ in range(2))
        lengths = np.full(blocks, block)
        sides = (self._region, self._remote, source, target, lengths)
        began = time.perf_counter()
        if op == "write":
            self._engine.write(*sides, lease=self._lease).wait(timeout_s=120)
        else:
            self._engine.read(*sides).wait(timeout_s=120)
        took = time.perf_counter() - began
        if op == "write":
            self._pipe.send(int(target[-1]))
            sent = self._region.array[source[-1] : source[-1] + 8].tobytes()
            if self._pipe.recv() != sent:
                raise RuntimeError("the last block did not arrive")
        return took

    def check(self) -> None:
        """That writes have gone the way that they are reported for."""
        text = self._engine.explain(self._peer)
        pushed = sum(int(each) for each in re.findall(r"(\d+) bytes pushed", text))
        if (pushed > 0) != self._push:
            raise RuntimeError(f"{pushed} bytes were pushed: {text}")

    def close(self) -> None:
        self._pipe.send(None)
        self._engine.close()
        self._process.join(60)
        if self._process.exitcode != 0:
            raise RuntimeError(f"the target ended with exit code {self._process.exitcode}")


def perftest(tool: str, nbytes: int, count: int) -> float:
    """Seconds that ``count`` messages take by the tool's average bandwidth, one queue pair."""
    command = [tool, "-d", "rxe0", "-x", "1", "-s", str(nbytes), "-n", str(count), "-F"]
    command += ["-p", str(PORT)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as server:
        _await_listener(server)
        client = subprocess.run([*command, "127.0.0.1"], capture_output=True, text=True, timeout=120, check=False)  # fmt: skip
        if client.returncode != 0 or server.wait(timeout=60) != 0:
            raise RuntimeError(f"{' '.join(command)} failed: {client.stdout} {client.stderr}")
    row = re.search(rf"^ {nbytes} +{count} +\S+ +(\S+)", client.stdout, re.MULTILINE)
    if row is None:
        raise RuntimeError(f"{tool} printed no row for {nbytes} bytes: {client.stdout}")
    return nbytes * count / (float(row[1]) * 2**20)  # its "MB/sec" are MiB


def _await_listener(server: subprocess.Popen[bytes]) -> None:
    port = f"0100007F:{PORT:04X}"
    everywhere = (f"00000000:{PORT:04X}", f"{'0' * 32}:{PORT:04X}", port)
    end = time.monotonic() + 60
    while time.monotonic() < end:
        listening = Path("/proc/net/tcp").read_text() + Path("/proc/net/tcp6").read_text()
        if any(f" {where} " in listening for where in everywhere):
            return
        if server.poll() is not None:
            break
        time.sleep(0.02)
    raise RuntimeError(f"{server.args} does not listen on port {PORT}")


def measure(rounds: int) -> dict[str, Any]:
    """In the guest: every case, our ways and the bounds interleaved."""
    nbytes = max(block * blocks for block, blocks in CASES)
    pulling, pushing = Ours(nbytes, push=False), Ours(nbytes, push=True)
    ways = {"write": (pulling, "write"), "push": (pushing, "write"), "read": (pulling, "read")}
    out: dict[str, Any] = {}
    try:
        for block, blocks in CASES:
            samples: dict[str, list[float]] = {name: [] for name in (*ways, *BOUNDS)}
            for ours, op in ways.values():
                ours.seconds(op, block, blocks)
            for _ in range(rounds):
                for name in samples:
                    if name in BOUNDS:
                        samples[name].append(perftest(name, block, blocks))
                    else:
                        ours, op = ways[name]
                        samples[name].append(ours.seconds(op, block, blocks))
                print(block, {name: f"{values[-1]:.3f}" for name, values in samples.items()}, file=sys.stderr)  # fmt: skip
            out[str(block)] = {"blocks": blocks, "seconds": samples, **ratios(samples)}
        pulling.check()
        pushing.check()
    finally:
        pulling.close()
        pushing.close()
    return out


def ratios(samples: dict[str, list[float]]) -> dict[str, float]:
    """Ours to each bound, and pushed to pulled writes, in speed: the median over rounds of the ratio within a round."""
    return {
        f"{op}_to_{bound}": statistics.median(
            theirs / mine for mine, theirs in zip(samples[op], samples[bound], strict=True)
        )
        for op, bound in (
            ("write", "ib_write_bw"),
            ("push", "ib_write_bw"),
            ("write", "ib_read_bw"),
            ("read", "ib_read_bw"),
            ("push", "write"),
        )
    }


def doorbells(program: str, rounds: int) -> dict[str, Any]:
    """In the guest: 1024 writes by how often the doorbell rings, and how many times as fast chains are."""
    out: dict[str, Any] = {}
    for nbytes in (64, 4096):
        done = subprocess.run([program, "rxe0", str(nbytes), str(rounds)], capture_output=True, text=True, check=True)  # fmt: skip
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        chains = [line["chains of 64"] for line in lines]
        out[str(nbytes)] = {
            name: {
                "median_s": statistics.median(line[name] for line in lines),
                "chains_are_faster_by": statistics.median(
                    line[name] / chain for line, chain in zip(lines, chains, strict=True)
                ),
            }
            for name in lines[0]
        }
    return out


def on_host(rounds: int, json_path: Path | None) -> int:
    sys.path.append(str(ROOT / "tests/rdma_vm"))
    import vm_facts
    import vm_guest

    with tempfile.TemporaryDirectory() as folder:
        sources = [vm_facts.HERE / "doorbells.cpp"]
        program = vm_facts.build("doorbells", sources, Path(folder))
        inside = [sys.executable, __file__, "--rounds", str(rounds), "--doorbells", program]
        command = [vm_guest.RUN, "--timeout", "1200", "--", *map(str, inside)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode != 0:
            print(f"the run in the guest ended with exit code {done.returncode}", file=sys.stderr)
            return done.returncode
    result = {
        "command": " ".join(["python", *sys.argv]),
        "emulated": True,
        **json.loads(done.stdout),
    }
    print(json.dumps(result, indent=1))
    if json_path is not None:
        json_path.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--doorbells", help="in the guest: the built tests/rdma_vm/doorbells.cpp")
    options = parser.parse_args()
    if "KVXFER_RDMA_DEVICES" not in os.environ:
        return on_host(options.rounds, options.json)
    result = {
        "kernel": os.uname().release,
        "doorbells_1024_writes": doorbells(options.doorbells, options.rounds),
        "requests": measure(options.rounds),
    }
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
