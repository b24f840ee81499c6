# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Which ratios of bench_transfer are asked for, and how large they should be at least."""

from __future__ import annotations

from dataclasses import dataclass

BLOCKS = (4096, 16384, 65536, 262144)

DETECTING = ("nixl, failure detection", "nixl, failure detection, threads")
NIXL_TCP = ("nixl tcp, polling", "nixl tcp, threads")
NOT_DETECTING = ("nixl shm, no detection", "nixl posix, no detection")


@dataclass(frozen=True)
class Target:
    """``ours`` over the fastest of ``others``, at blocks of 4, 16, 64 and 256 KiB."""

    ours: str
    to: str
    others: tuple[str, ...]
    floors: tuple[float | None, ...] = (None,) * len(BLOCKS)

    def floor(self, block: int) -> float | None:
        return self.floors[BLOCKS.index(block)] if block in BLOCKS else None


def of(ours: str, to: str, *floors: float, others: tuple[str, ...] | None = None) -> Target:
    return Target(ours, to, others or (to,), floors or (None,) * len(BLOCKS))


# What a request takes when nobody names a transport, by the memory its source lies in.
ALLOCATED, REGISTERED = "same host, allocated memory", "same host, registered memory"

TARGETS = (
    of("shm mapped", "memcpy", 0.85, 0.95, 0.95, 0.95),
    of("shm staged", "memcpy", 0.55, 0.80, 0.85, 0.65),
    of("shm staged", "process_vm_readv", 2.0, 1.8, 1.6, 1.3),
    of("shm staged", "process_vm_writev"),
    of("cma", "process_vm_readv", 0.75, 0.75, 0.90, 0.90),
    of("cma", "process_vm_writev"),
    of("tcp 1 lane", "raw socket", 0.95, 0.95, 1.0, 1.0),
    of("tcp", "raw socket", 1.2, 1.3, 1.4, 1.4),
    of("shm mapped, read", "memcpy, reader"),
    of("shm staged, read", "memcpy, reader"),
    of("cma, read", "process_vm_readv, reader"),
    of("tcp, read", "raw socket"),
    *(
        target
        for ours in (ALLOCATED, REGISTERED)
        for target in (
            of(ours, "best NIXL with failure detection", 3, 3, 1.5, 1.5, others=DETECTING),
            of(ours, "best NIXL at all", 0.8, 1.5, 1.2, 1.0, others=DETECTING + NOT_DETECTING),
        )
    ),
    of("tcp", "NIXL tcp", 3, 2, 1.3, 1.2, others=NIXL_TCP),
    of("tcp", "mooncake tcp", 15, 8, 3, 2),
)

# At most so much over the bound: microseconds, or times.
ROUND_TRIPS = {
    "shm, polling": ("us_over_bound", 0.5),
    "tcp, polling": ("times_bound", 1.3),
    "tcp, asleep": ("times_bound", 1.3),
}


def submit_us(num_blocks: int) -> float:
    """What submitting a request may cost its caller."""
    return 2 + 0.01 * num_blocks
