# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""What one request of 1024 blocks costs a NIC, on paper: work requests, doorbells, PCIe transactions, wire.

`python bench/verbs_model.py --json bench/results/verbs-model.json` writes what docs/verbs.md quotes. Nothing here is
measured: sizes come from standards and from rdma-core's headers, as `SOURCES` says, and where a number has no public
source the table shows what it would have to be instead of a guess.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

NUM_BLOCKS = 1024
BLOCK_BYTES = (4096, 16384, 65536)

SOURCES = {
    "link": "400 Gb/s and PCIe 5.0 x16: docs.nvidia.com/networking/display/ConnectX7VPI/Introduction",
    "message_rate": "215 million messages a second, of the generation before, at 200 Gb/s: "
    "docs.nvidia.com/networking/display/ConnectX6EN/Introduction. No figure for ConnectX-7 with a public source was found",
    "packets": "RoCE v2: InfiniBand Architecture Specification, annex 17; headers of volume 1, chapter 9",
    "wqe": "rdma-core 44, providers/mlx5/mlx5dv.h: control, remote address and data segments of 16 bytes each, "
    "MLX5_SEND_WQE_BB = 64, struct mlx5_cqe64",
    "doorbell": "rdma-core 44, providers/mlx5/qp.c: a post of one work request may write its WQE through the doorbell "
    "page (BlueFlame, 64 bytes); a chain rings once, and the NIC fetches the WQEs",
    "pcie": "PCI Express Base Specification 5.0: 128b/130b, 4 bytes of framing and sequence, 12 of header (16 with a "
    "64-bit address), 4 of LCRC a packet. Payload of 256 and read request of 512 bytes: common defaults of servers, "
    "an assumption",
    "uccl_mi300x": "MI300X, 400 Gb/s, 128 descriptors a call: UCCL, issue 972",
    "uccl_lmcache": "UCCL, host memory, 2 x 100 Gb/s, reads, 256 descriptors a call: LMCache, pull request 4161",
    "nixl_lmcache": "NIXL with UCX, the same table: LMCache, pull request 4161",
    "fabric_lib": "400 Gb/s on ConnectX-7: arXiv 2510.27656. No figures by block size",
}
# GB/s by block size; what others published, and the link they had it on.
PUBLISHED = {
    "uccl_mi300x": (400, {4096: 15.2, 16384: 31.8, 65536: 43.1}),
    "uccl_lmcache": (200, {4096: 11.6, 16384: 19.1, 65536: 22.9}),
    "nixl_lmcache": (200, {4096: 4.3, 16384: 8.9, 65536: 23.8}),
}


@dataclass(frozen=True)
class Nic:
    """A NIC and its slot; bytes and bytes per second unless the name says otherwise."""

    link_gb_per_s: float = 50.0
    messages_per_s: float = 215e6
    path_mtu: int = 4096
    pcie_gb_per_s: float = 32 * 16 * 128 / 130 / 8  # 32 GT/s, 16 lanes
    pcie_payload: int = 256
    pcie_read_request: int = 512
    wqe_unit: int = 64
    cqe: int = 64
    reads_in_flight: int = 16  # max_rd_atomic that our queue pairs ask for

    def wqe_bytes(self, num_sges: int) -> int:
        """Control, remote address and data segments, in whole units."""
        return math.ceil((16 + 16 + 16 * num_sges) / self.wqe_unit) * self.wqe_unit

    def wire_bytes(self, nbytes: int, *, read: bool = False) -> int:
        """One message on a RoCE v2 wire, from preamble to gap."""
        packets = max(1, math.ceil(nbytes / self.path_mtu))
        ethernet = 8 + 14 + 4 + 12  # preamble, header, FCS, gap
        each = ethernet + 20 + 8 + 12 + 4  # IPv4, UDP, BTH, ICRC
        # RETH on the first packet of a write; AETH on the first and last of a read's answer.
        return nbytes + packets * each + (4 * min(packets, 2) if read else 16)

    def pcie_bytes(self, nbytes: int) -> int:
        """What `nbytes` take on the bus, in packets of at most ``pcie_payload``."""
        return nbytes + math.ceil(nbytes / self.pcie_payload) * (4 + 12 + 4)


@dataclass(frozen=True)
class Cost:
    """One request of ``NUM_BLOCKS`` blocks, at the NIC that works through the requests."""

    way: str
    block_bytes: int
    work_requests: int
    doorbells: int
    wqe_bytes: int
    pcie_wqe_reads: int
    pcie_payload_transactions: int
    cqe_writes: int
    wire_us: float  # at the link's rate
    pcie_us: float  # payload, WQEs and CQEs over the slot, the busier direction
    messages_us: float  # at the published message rate
    predicted_gb_per_s: float  # the slowest of the three
    ns_per_work_request: float  # what software may take for each, or it is the bound
    messages_needed_per_s: float  # to fill the link
    full_pipe_rtt_us: (
        float | None
    )  # reads only: longest round trip with which `reads_in_flight` fill the link


def push(nic: Nic, block_bytes: int, *, chain: int, blocks_per_request: int = 1) -> Cost:
    """RDMA WRITE, one work request per run of blocks that are contiguous at the target.

    Args:
        chain: work requests per doorbell; 1: each rings, and its WQE goes through the doorbell page.
        blocks_per_request: gathered into one write; they must be neighbours at the target.
    """
    requests = math.ceil(NUM_BLOCKS / blocks_per_request)
    nbytes = block_bytes * blocks_per_request
    wqe = nic.wqe_bytes(blocks_per_request)
    doorbells = math.ceil(requests / chain)
    fetched = 0 if chain == 1 else requests * wqe
    completions = doorbells  # one signalled work request a chain
    payload = math.ceil(block_bytes / nic.pcie_read_request) * NUM_BLOCKS
    wire_us = requests * nic.wire_bytes(nbytes) / nic.link_gb_per_s / 1e3
    down = NUM_BLOCKS * nic.pcie_bytes(block_bytes) + nic.pcie_bytes(fetched)
    if chain == 1:
        down += requests * nic.pcie_bytes(wqe)  # written by the CPU, towards the NIC as well
    else:
        down += doorbells * nic.pcie_bytes(8)
    name = "write, one doorbell each" if chain == 1 else f"write, chains of {chain}"
    name += f", {blocks_per_request} gathered" if blocks_per_request > 1 else ""
    wqe_reads = math.ceil(fetched / nic.pcie_read_request)
    counts = (requests, doorbells, requests * wqe, wqe_reads, payload, completions)
    return _cost(nic, name, block_bytes, counts, wire_us, down, None)


def pull(nic: Nic, block_bytes: int, *, chain: int) -> Cost:
    """RDMA READ by the target, one work request per run of blocks that are contiguous at the source."""
    requests = NUM_BLOCKS
    wqe = nic.wqe_bytes(1)
    doorbells = math.ceil(requests / chain)
    fetched = requests * wqe
    wire = nic.wire_bytes(block_bytes, read=True)
    payload = math.ceil(block_bytes / nic.pcie_payload) * requests  # posted writes into memory
    # What is asked for and not yet here fills the link only if it covers a round trip.
    rtt_us = nic.reads_in_flight * wire / nic.link_gb_per_s / 1e3
    up = requests * nic.pcie_bytes(block_bytes) + doorbells * nic.pcie_bytes(nic.cqe)
    counts = (requests, doorbells, fetched, math.ceil(fetched / nic.pcie_read_request), payload)
    wire_us = requests * wire / nic.link_gb_per_s / 1e3
    return _cost(
        nic, f"read, chains of {chain}", block_bytes, (*counts, doorbells), wire_us, up, rtt_us
    )


def _cost(
    nic: Nic,
    way: str,
    block_bytes: int,
    counts: tuple[int, int, int, int, int, int],
    wire_us: float,
    bus_bytes: int,
    rtt_us: float | None,
) -> Cost:
    requests = counts[0]
    pcie_us = bus_bytes / nic.pcie_gb_per_s / 1e3
    messages_us = requests / nic.messages_per_s * 1e6
    slowest = max(wire_us, pcie_us, messages_us)
    total = NUM_BLOCKS * block_bytes
    return Cost(
        way,
        block_bytes,
        *counts,
        wire_us=wire_us,
        pcie_us=pcie_us,
        messages_us=messages_us,
        predicted_gb_per_s=total / slowest / 1e3,
        ns_per_work_request=slowest * 1e3 / requests,
        messages_needed_per_s=requests / wire_us * 1e6,
        full_pipe_rtt_us=rtt_us,
    )


def table(nic: Nic | None = None) -> list[Cost]:
    """Every way of moving the request, for each block size."""
    nic = nic or Nic()
    rows = []
    for block_bytes in BLOCK_BYTES:
        rows += [
            push(nic, block_bytes, chain=1),
            push(nic, block_bytes, chain=64),
            push(nic, block_bytes, chain=64, blocks_per_request=16),
            pull(nic, block_bytes, chain=64),
        ]
    return rows


def published() -> list[dict[str, Any]]:
    """What others published: GB/s, the share of their link, and what a block took them in all."""
    rows = []
    for name, (gbit, by_size) in PUBLISHED.items():
        for block_bytes, gb_per_s in by_size.items():
            rows.append(
                {
                    "who": name,
                    "block_bytes": block_bytes,
                    "gb_per_s": gb_per_s,
                    "share_of_link": gb_per_s * 8 / gbit,
                    "ns_per_block": block_bytes / gb_per_s,
                }
            )
    return rows


def result() -> dict[str, Any]:
    return {
        "command": "python bench/verbs_model.py --json bench/results/verbs-model.json",
        "measured": False,
        "num_blocks": NUM_BLOCKS,
        "nic": asdict(Nic()),
        "sources": SOURCES,
        "model": [asdict(row) for row in table()],
        "published": published(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--json", type=Path, help="write the numbers here, not only a table")
    options = parser.parse_args()
    for row in table():
        print(
            f"{row.block_bytes // 1024:3d} KiB  {row.way:32s} | {row.work_requests:5d} WRs  {row.doorbells:5d} doorbells  "
            f"{row.pcie_wqe_reads:4d} WQE reads  {row.pcie_payload_transactions:6d} payload  {row.cqe_writes:4d} CQEs | "
            f"wire {row.wire_us:7.1f} us  pcie {row.pcie_us:7.1f}  messages {row.messages_us:5.1f} | "
            f"{row.predicted_gb_per_s:5.1f} GB/s if software takes < {row.ns_per_work_request:7.1f} ns a WR"
        )
    if options.json:
        options.json.write_text(json.dumps(result(), indent=1) + "\n")


if __name__ == "__main__":
    main()
