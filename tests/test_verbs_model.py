# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""The paper model of a verbs request: hand-computed cases, its stored result, and what the docs quote of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "bench"))

import verbs_model  # noqa: E402
from verbs_model import NUM_BLOCKS, Nic, pull, push  # noqa: E402


def test_wqes_are_whole_units_of_64_bytes() -> None:
    nic = Nic()
    assert [nic.wqe_bytes(n) for n in (1, 2, 3, 16, 30)] == [64, 64, 128, 320, 512]


def test_a_write_of_one_packet_has_98_bytes_of_headers_and_two_packets_share_one_reth() -> None:
    assert Nic().wire_bytes(4096) == 4096 + 82 + 16
    assert Nic().wire_bytes(8192) == 8192 + 2 * 82 + 16
    assert Nic().wire_bytes(4096, read=True) == 4096 + 82 + 4
    assert Nic().wire_bytes(0) == 82 + 16


def test_pcie_packets_carry_20_bytes_each() -> None:
    assert Nic().pcie_bytes(4096) == 4096 + 16 * 20
    assert Nic().pcie_bytes(8) == 28


def test_a_chain_rings_once_and_completes_once() -> None:
    row = push(Nic(), 4096, chain=64)
    assert (row.work_requests, row.doorbells, row.cqe_writes) == (1024, 16, 16)
    assert row.pcie_wqe_reads == 1024 * 64 // 512
    assert row.pcie_payload_transactions == 1024 * 8
    each = push(Nic(), 4096, chain=1)
    assert (each.doorbells, each.cqe_writes, each.pcie_wqe_reads) == (1024, 1024, 0)


def test_gathering_divides_work_requests_and_needs_less_wire() -> None:
    gathered, single = (push(Nic(), 4096, chain=64, blocks_per_request=n) for n in (16, 1))
    assert gathered.work_requests == 64
    assert gathered.doorbells == 1
    assert gathered.wire_us < single.wire_us


def test_reads_in_flight_bound_the_round_trip() -> None:
    row = pull(Nic(), 4096, chain=64)
    assert row.full_pipe_rtt_us == pytest.approx(16 * 4182 / 50e3)
    assert push(Nic(), 4096, chain=64).full_pipe_rtt_us is None


def test_the_slowest_resource_decides() -> None:
    slow = Nic(messages_per_s=1e6)
    assert push(slow, 4096, chain=64).predicted_gb_per_s == pytest.approx(4.096)
    narrow = Nic(pcie_gb_per_s=10.0)
    assert push(narrow, 65536, chain=64).predicted_gb_per_s < 10.0
    wire = push(Nic(), 65536, chain=64)
    assert wire.predicted_gb_per_s == pytest.approx(NUM_BLOCKS * 65536 / wire.wire_us / 1e3)


def test_the_stored_result_is_what_the_model_says_now() -> None:
    stored = json.loads((ROOT / "bench/results/verbs-model.json").read_text())
    assert stored == json.loads(json.dumps(verbs_model.result()))


def test_the_docs_quote_the_stored_rows() -> None:
    text = (ROOT / "docs/verbs.md").read_text()
    for row in verbs_model.table():
        line = (
            f"| {row.block_bytes // 1024} KiB | {row.way} | {row.work_requests} | {row.doorbells} | "
            f"{row.pcie_wqe_reads} | {row.pcie_payload_transactions} | {row.cqe_writes} | "
        )
        assert line in text, line
        assert f"| {row.predicted_gb_per_s:.1f} | {row.ns_per_work_request:.0f} |" in text
