# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""1024 scattered blocks in one request between two processes, against bounds and peers of the same run.

    python bench/bench_transfer.py [--quick] [--budget-s S] [--nixl-python PATH] [--mooncake-python PATH] [--json PATH]

Also: round trip of a 64-byte notification, cost of submitting, time to connect, CPU time per GB, and what
an idle engine costs. README.md beside this file has the method; report.py prints the result as a table.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

import calibrate
import transfer_small
from budget import Budget, Report, terminated_like_interrupted
from common import interleave, kept, kib, machine_facts, speed_ratio, summary, table
from peer_pairs import PeerError, PeerPair, start_peers
from processes import Sample, cpu_sides
from targets import ALLOCATED, REGISTERED, TARGETS
from transfer_world import Path, World

Row = dict[str, Any]
Samples = dict[str, list[Sample]]


def rounds_for(block: int, rounds: int) -> int:
    """Small requests take so little time that they can have more samples."""
    return rounds * (5 if block <= 16384 else 2 if block <= 65536 else 1)


def default_paths(world: World) -> dict[str, str]:
    """What carries a request when no transport is named, by the source's memory."""
    found = {}
    for name, memory in ((ALLOCATED, "pool"), (REGISTERED, "heap")):
        transport = world.move(Path(name, "default", "write", memory, ()), 0, 0, 64).transport
        kind = {"pool": " mapped", "heap": " staged"}[memory] if transport == "shm" else ""
        found[name] = f"{transport}{kind}"
    return found


class Throughput:
    """All cases of one block size, taken in turns."""

    def __init__(
        self, world: World, peers: Sequence[PeerPair], num_blocks: int, block: int
    ) -> None:
        self.world, self.num_blocks, self.block = world, num_blocks, block
        rng = np.random.default_rng(block)
        self.src, self.dst = (rng.permutation(2 * num_blocks)[:num_blocks] for _ in range(2))
        self.skipped: dict[str, str] = {}
        self.verified: dict[str, bool] = {}
        self.kinds: dict[str, str] = {}
        self.cases: dict[str, Callable[[], Sample | None]] = {}
        self.taken: dict[str, list[Sample | None]] = {}
        src, dst = (each.astype(np.int64) * block for each in (self.src, self.dst))
        self.offsets = src, dst
        for path in world.paths():
            self._add("path", path.name, lambda path=path: world.timed(path, src, dst, block))
            for name in path.bounds:
                if name not in self.cases and name not in self.skipped:
                    take = world.bound(name, src, dst, block)
                    if isinstance(take, str):
                        self.skipped[name] = take
                    else:
                        self._add("bound", name, take)
        for peer in peers:
            self._add_peer(peer)

    def _add(self, kind: str, name: str, take: Callable[[], Sample | None]) -> None:
        self.kinds[name], self.cases[name] = kind, take

    def _add_peer(self, peer: PeerPair) -> None:
        def take() -> Sample | None:
            if peer.name in self.skipped:
                return None
            try:
                return peer.sample()
            except PeerError as error:  # the run goes on without it
                self.skipped[peer.name] = str(error)
                return None

        try:
            slots = self.src.tolist(), self.dst.tolist()
            self.verified[peer.name] = peer.open(self.block, 2 * self.num_blocks, *slots)
        except PeerError as error:
            self.skipped[peer.name] = str(error)
        else:
            self._add("peer", peer.name, take)

    def verify(self) -> None:
        for path in self.world.paths():
            self.world.verify(path, *self.offsets, self.block)
            self.verified[path.name] = True

    def run(self, rounds: int, deadline: float) -> None:
        began = time.monotonic()
        self.verify()
        deadline -= time.monotonic() - began  # what the second one will take
        interleave(self.cases, rounds, seed=self.block, deadline=deadline, into=self.taken)
        self.verify()  # and nothing that came in between has done harm

    def samples(self) -> Samples:
        """Of the rounds that are whole so far."""
        return {
            name: [each for each in samples if each is not None]
            for name, samples in self.taken.items()
            if name not in self.skipped and samples
        }

    def rows(self) -> list[Row]:
        nbytes = self.num_blocks * self.block
        return [
            {
                "case": "blocks",
                "kind": self.kinds[name],
                "name": name,
                "num_blocks": self.num_blocks,
                "block_nbytes": self.block,
                **({"verified": self.verified[name]} if name in self.verified else {}),
                **summary(each, nbytes),
            }
            for name, each in self.samples().items()
        ]


def ratios(samples: Samples, block: int, default: dict[str, str]) -> list[Row]:
    out = []
    for target in TARGETS:
        ours = default.get(target.ours, target.ours)
        others = [name for name in target.others if name in samples]
        if ours not in samples or not others:
            continue
        best = min(others, key=lambda name: median_of(samples[name]))
        out.append(
            {
                "ours": target.ours,
                "path": ours,
                "to": target.to,
                "other": best,
                "block_nbytes": block,
                "floor": target.floor(block),
                **speed_ratio(samples[ours], samples[best]),
            }
        )
    return out


def median_of(samples: Sequence[Sample]) -> float:
    return statistics.median(each.seconds for each in kept(samples)[0])


def print_rows(block: int, rows: Sequence[Row], found: Sequence[Row]) -> None:
    head = (f"{kib(block)} blocks", "p50 us", "p99 us", "GB/s", "CPU s/GB", "kept")
    print(
        table(
            head,
            (
                (
                    row["name"],
                    f"{row['p50_us']:.0f}",
                    f"{row['p99_us']:.0f}",
                    f"{row['gb_per_s']:.2f}",
                    f"{row['cpu_s_per_gb']:.3f}",
                    f"{row['samples'] - row['dropped']}/{row['samples']}"
                    + (" NOISY: all used" if row["noisy"] else ""),
                )
                for row in rows
            ),
        )
    )
    for each in found:
        floor = f", asked {each['floor']:.2f}" if each["floor"] is not None else ""
        noisy = " (noisy)" if each["noisy"] else ""
        other = f" ({each['other']})" if each["other"] != each["to"] else ""
        print(f"  {each['ours']} = {each['ratio']:.2f} x {each['to']}{other}{floor}{noisy}")
    print(flush=True)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="kvxfer bench transfer",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--blocks", default="4,16,64,256", help="KiB, comma-separated")
    parser.add_argument("--num-blocks", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=30, help="of the largest blocks; small: more")
    parser.add_argument("--budget-s", type=float, help="about as long as that; fewer rounds")
    parser.add_argument("--paths", help="comma-separated parts of names, for example 'shm,tcp'")
    parser.add_argument("--no-small", action="store_true", help="throughput only")
    parser.add_argument(
        "--calibrate",
        action="store_true",
        help="print the constants of plan_transfer's cost model for this machine, to pass as cost=",
    )
    parser.add_argument("--quick", action="store_true", help="some seconds: does everything work?")
    parser.add_argument("--cpus-per-side", type=int, default=1, metavar="N")
    parser.add_argument("--no-pin", action="store_true", help="leave placement to the scheduler")
    parser.add_argument("--spin-us", type=float, default=20.0, help="EngineConfig.spin_us of all")
    parser.add_argument("--nixl-python", metavar="PATH", help="an interpreter that has nixl")
    parser.add_argument("--mooncake-python", metavar="PATH", help="an interpreter with mooncake")
    parser.add_argument("--json", metavar="PATH")
    args = parser.parse_args(argv)
    if args.quick:
        args.blocks, args.num_blocks, args.rounds = "4,16", 256, 2
    if args.calibrate:
        args.blocks, args.no_small = str(calibrate.LARGE // 1024), True
    return args


def measure(
    args: argparse.Namespace,
    world: World,
    peers: Sequence[PeerPair],
    budget: Budget,
    report: Report,
) -> None:
    found = report.found
    found["facts"]["default_paths"] = default = default_paths(world)
    if args.calibrate:
        report.add([calibrate.run(world, num_spans=args.num_blocks, rounds=args.rounds)])
        return
    for block in (int(each) * 1024 for each in args.blocks.split(",")):
        deadline = budget.next_deadline()
        run = Throughput(world, peers, args.num_blocks, block)
        try:
            run.run(rounds_for(block, args.rounds), deadline)
        finally:  # an interrupted run has what it has
            rows, compared = run.rows(), ratios(run.samples(), block, default)
            print_rows(block, rows, compared)
            found["skipped"] |= run.skipped
            report.add(rows, compared)
    if not args.no_small:
        for rows in transfer_small.run(world, args.rounds, budget, quick=args.quick):
            report.add(rows)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    blocks = [int(each) * 1024 for each in args.blocks.split(",")]
    sides = None if args.no_pin else cpu_sides(args.cpus_per_side)
    facts = machine_facts()
    facts["pinned"] = [sorted(side) for side in sides] if sides else None
    if sides is None and not args.no_pin:
        print("too few CPUs to pin the two processes apart: they share, and ratios suffer\n")
    report = Report(args.json, facts)
    budget = Budget(
        args.budget_s, [1.0] * len(blocks) + list(transfer_small.SHARES) * (not args.no_small)
    )
    pool_nbytes = max(2 * args.num_blocks * max(blocks), 4 << 20)
    peers: list[PeerPair] = []
    try:
        with terminated_like_interrupted():
            peers, absent = start_peers(args.nixl_python, args.mooncake_python, sides)
            if args.budget_s is not None:
                for peer in peers:  # one that is stuck must not eat the others' time
                    peer.answer_s = max(5.0, args.budget_s / 20)
            report.found["skipped"] |= absent
            with World(pool_nbytes, sides, args.spin_us) as world:
                world.keep(args.paths.split(",") if args.paths else [])
                report.found["skipped"] |= world.refused
                measure(args, world, peers, budget, report)
    except KeyboardInterrupt:
        report.write(stopped="it was interrupted")
        print("interrupted: what was measured before is written", flush=True)
        return 130
    except Exception as error:
        report.write(stopped=f"{type(error).__name__}: {error}")
        raise
    finally:
        for peer in peers:
            peer.close()
    for name, reason in report.found["skipped"].items():
        # What --calibrate prints is Python to the last line.
        print(f"{'# ' if args.calibrate else ''}not measured: {name}: {reason}")
    report.write(stopped=None)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
