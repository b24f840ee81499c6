# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""What the transport relies on in Soft-RoCE, asked again of the kernel that is here now."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import vm_facts
from vm_guest import Guest

STORED = Path(__file__).resolve().parents[2] / "bench/results/verbs-rxe-facts.json"


@pytest.fixture(scope="module")
def facts(guest: Guest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler to build tests/rdma_vm/facts with")
    program = vm_facts.build_facts(tmp_path_factory.mktemp("facts"))
    return vm_facts.ask(program, linked=False)


def test_a_window_lets_through_until_it_is_invalidated(facts: dict[str, str]) -> None:
    assert facts["write through it"] == "success, bytes there"
    assert facts["LOCAL_INV of a window"] == "success"
    refused = "remote access error, nothing landed, then initiator ERR, target ERR"
    assert facts["write under the invalidated key"] == refused


def test_a_window_serves_its_own_queue_pair_and_its_latest_key(facts: dict[str, str]) -> None:
    refused = "remote access error, then initiator ERR, target ERR"
    assert facts["write through another QP than the one it was bound on"] == refused
    assert facts["write under the key of the earlier bind"] == refused
    assert facts["read through it, bound for writes only"] == refused


def test_at_most_a_packet_lands_after_the_fence(facts: dict[str, str]) -> None:
    late = [seen for fact, seen in facts.items() if fact.startswith("bytes of a write")]
    assert len(late) == 2
    for seen in late:
        found = re.search(r"at most (\d+) bytes", seen)
        assert found, seen
        assert int(found[1]) <= 4096


def test_the_immediate_comes_behind_its_bytes(facts: dict[str, str]) -> None:
    assert facts["immediate before the bytes of 8 earlier writes"] == "0 of 200 times"


def test_err_flushes_and_reset_does_not(facts: dict[str, str]) -> None:
    assert facts["16 outstanding writes, then ERR"] == "16 flushed, 16 in order"
    assert facts["16 outstanding writes, then RESET"] == "0 completions"


def test_six_retries_end_and_seven_do_not(facts: dict[str, str]) -> None:
    """Why the transport asks for six."""
    assert (
        facts["the same with 6 retries of 17 ms, within 3 s"] == "transport retry counter exceeded"
    )
    assert facts["the same with 7 retries of 17 ms, within 3 s"] == "no completion"


def test_the_stored_facts_name_what_is_asked(facts: dict[str, str]) -> None:
    stored = json.loads(STORED.read_text())
    assert list(stored["one_device"]) == list(facts)
    text = (STORED.parents[2] / "docs/verbs.md").read_text()
    for fact, seen in stored["one_device"].items():
        assert f"| {fact} | {seen}" in text
