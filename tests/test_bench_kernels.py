# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""`kvxfer bench kernels` puts each number beside its bound, writes as it goes and ends within its budget."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def bench(path: Path, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "kvxfer", "bench", "kernels", "--quick", "--json", str(path)]
    done = subprocess.run(
        [*command, *arguments], capture_output=True, text=True, timeout=110, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(path.read_text())
    return found


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return bench(tmp_path_factory.mktemp("bench") / "kernels.json", "--budget-s", "40")


BESIDE = {
    "paged_decode": {"of_memory_read", "of_read", "of_read_of_blocks", "times_gather_and_sdpa"},
    "paged_prefill": {"of_mm_float32", "times_torch_gathered_mask"},
    "copy_blocks": {"copy_of_memcpy", "times_index_select"},
    "append_kv": {"times_torch_indexing"},
    "plan_transfer": {"num_spans", "of_writing_three_arrays"},
}


def test_every_row_has_its_bound_and_its_peer(quick: dict[str, Any]) -> None:
    assert {row["op"] for row in quick["rows"]} <= set(BESIDE)
    assert quick["rows"]
    for row in quick["rows"]:
        assert BESIDE[row["op"]] <= set(row), row
        assert all(value > 0 for value in row.values() if isinstance(value, float)), row


def test_versions_and_reasons_stand_beside_the_numbers(quick: dict[str, Any]) -> None:
    assert quick["facts"]["torch"]
    assert quick["facts"]["build"]["isa"]
    assert "--flex" in quick["skipped"]["FlexAttention"]


def test_a_spent_budget_ends_the_run_and_names_what_is_missing(tmp_path: Path) -> None:
    found = bench(tmp_path / "none.json", "--budget-s", "0")
    assert found["rows"] == []
    assert {name.split()[0] for name in found["skipped"]} == set(BESIDE)


@pytest.mark.parametrize(
    ("option", "given", "expected"),
    [
        ("--threads", "0", "1 to 1024"),
        ("--threads", "2000", "1 to 1024"),
        ("--rounds", "0", ">= 1"),
    ],
)
def test_numbers_that_measure_nothing_are_refused(option: str, given: str, expected: str) -> None:
    command = [sys.executable, "-m", "kvxfer", "bench", "kernels", option, given]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert f"error: {option}: expected {expected}, given {given}" in done.stderr
