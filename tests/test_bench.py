# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""The benchmarks run, verify what they move, and put each number beside its bound."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from kvxfer.transfer import probe_transports

ROOT = Path(__file__).resolve().parents[1]
BENCH = ROOT / "bench"
sys.path.insert(0, str(BENCH))
import common  # noqa: E402
import report  # noqa: E402
from budget import Budget  # noqa: E402
from processes import MAX_DELAY, Sample, wait_behind_others_ns  # noqa: E402

# Those that bench_transfer has paths for, where they work.
HERE = {name for name, reason in probe_transports() if reason is None} & {"shm", "cma", "tcp"}


def kvxfer(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kvxfer", *arguments],
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("bench") / "quick.json"
    done = kvxfer("bench", "transfer", "--quick", "--json", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def rows(found: dict[str, Any], case: str) -> list[dict[str, Any]]:
    return [row for row in found["rows"] if row["case"] == case]


def test_every_path_moves_verified_bytes(quick: dict[str, Any]) -> None:
    paths = [row for row in rows(quick, "blocks") if row["kind"] == "path"]
    assert {row["name"].split()[0].rstrip(",") for row in paths} == HERE
    assert {row["block_nbytes"] for row in paths} == {4096, 16384}
    for row in paths:
        assert row["verified"] is True, row
        assert 0 < row["p50_us"] <= row["p99_us"], row
        assert row["gb_per_s"] > 0, row
        assert row["cpu_s_per_gb"] > 0, row


def test_every_path_stands_beside_a_bound_of_the_same_run(quick: dict[str, Any]) -> None:
    measured = {(row["name"], row["block_nbytes"]) for row in rows(quick, "blocks")}
    paths = {row["name"] for row in rows(quick, "blocks") if row["kind"] == "path"}
    assert {each["path"] for each in quick["ratios"]} == paths
    for each in quick["ratios"]:
        assert each["ratio"] > 0, each
        assert (each["other"], each["block_nbytes"]) in measured, each


def test_small_costs_are_there(quick: dict[str, Any]) -> None:
    trips = {row["name"]: row for row in rows(quick, "round_trip")}
    assert trips["tcp, asleep"]["times_bound"] > 0
    assert ("us_over_bound" in trips.get("shm, polling", {})) == ("shm" in HERE)
    send, *submits = rows(quick, "submit")
    assert send["kind"] == "bound"
    assert {row["num_blocks"] for row in submits} == {1, 64, 1024, 16384}
    assert all(row["p50_us"] > 0 for row in (send, *submits))
    assert {row["name"] for row in rows(quick, "connect")} >= {"bare tcp", "tcp"}
    (idle,) = rows(quick, "idle")
    assert 0 <= idle["cpu_share"] < 0.5, "an engine polls although nobody asked for anything"


def test_the_json_says_where_it_comes_from(quick: dict[str, Any]) -> None:
    facts = quick["facts"]
    assert "bench_transfer.py" in facts["command"]
    assert facts["cpus_usable"] > 0
    for name in ("cpu", "platform", "python", "numpy", "kvxfer"):
        assert facts[name], name
    assert set(quick["skipped"]) >= {"mooncake tcp"}, "a peer that is left out is named"


def test_the_report_is_a_table_of_reached_and_asked(quick: dict[str, Any]) -> None:
    lines = report.markdown(quick).splitlines()
    mapped = next(line for line in lines if line.startswith("| `shm mapped`"))
    assert "(0.85)" in mapped
    assert "(0.95)" in mapped
    assert mapped.count("|") == lines[lines.index(mapped) - 1].count("|")


def test_a_whole_run_says_so(quick: dict[str, Any]) -> None:
    assert quick["stopped"] is None
    assert "Not a whole run" not in report.markdown(quick)


def test_an_interrupted_run_leaves_the_rounds_that_it_has(tmp_path: Path) -> None:
    path = tmp_path / "part.json"
    command = [
        *(sys.executable, str(BENCH / "bench_transfer.py"), "--blocks", "4,64"),
        *("--rounds", "200", "--num-blocks", "64", "--paths", "tcp 1 lane", "--no-small"),
        *("--json", str(path)),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        # The table of the first block size ends in an empty line; the second one takes seconds.
        for line in run.stdout:
            if line.strip() == "":
                break
        time.sleep(0.5)
        run.terminate()
        rest = run.stdout.read()
        assert run.wait(60) == 130, rest
    found = json.loads(path.read_text())
    assert found["stopped"] == "it was interrupted"
    done = [row for row in found["rows"] if row["block_nbytes"] == 4096]
    assert {row["name"] for row in done} == {"tcp 1 lane", "raw socket"}
    assert len({row["samples"] for row in found["rows"] if row["block_nbytes"] == 4096}) == 1
    assert "Not a whole run" in report.markdown(found)


def test_a_peer_that_is_not_there_is_named_with_the_reason(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    done = kvxfer(
        *("bench", "transfer", "--quick", "--no-small", "--paths", "tcp 1 lane"),
        *("--nixl-python", str(tmp_path / "python"), "--mooncake-python", sys.executable),
        *("--json", str(path)),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    skipped = json.loads(path.read_text())["skipped"]
    assert "cannot run" in skipped["nixl tcp, polling"]
    assert "mooncake" in skipped["mooncake tcp"], "the interpreter has no such module"


def test_without_a_checkout_the_command_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The module by its file: an editable install puts the checkout before every path.
    copy = tmp_path / "site-packages" / "kvxfer" / "bench.py"
    copy.parent.mkdir(parents=True)
    shutil.copy(ROOT / "python" / "kvxfer" / "bench.py", copy)
    spec = importlib.util.spec_from_file_location("installed_bench", copy)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.run(argparse.Namespace(what="transfer", arguments=["--quick"])) == 2
    assert "source checkout" in capsys.readouterr().err


def test_a_round_that_is_cut_off_is_not_counted() -> None:
    taken: dict[str, list[int]] = {}
    count = 0

    def sample() -> int:
        nonlocal count
        count += 1
        if count == 8:
            raise KeyboardInterrupt
        return count

    with pytest.raises(KeyboardInterrupt):
        common.interleave(dict.fromkeys("abc", sample), 10, into=taken)
    assert {name: len(each) for name, each in taken.items()} == {"a": 2, "b": 2, "c": 2}


def test_a_budget_shares_what_is_left() -> None:
    assert common.interleave({"a": lambda: 1}, 5, deadline=0.0) == {"a": [1]}
    budget = Budget(100.0, [1.0, 3.0])
    first, second = budget.next_deadline(), budget.next_deadline()
    assert first < second
    assert 20 < first - time.monotonic() <= 25
    assert 99 < second - time.monotonic() <= 100
    assert Budget(None, [1.0]).next_deadline() == math.inf


def test_disturbed_samples_are_left_out_and_counted() -> None:
    samples = [Sample(1.0, delay=0.0)] * 8 + [Sample(9.0, delay=2 * MAX_DELAY)] * 7
    found = common.summary(samples, nbytes=10**9)
    assert (found["p50_us"], found["dropped"], found["noisy"]) == (1e6, 7, False)


@pytest.mark.parametrize(
    ("caller", "progress", "foreign"),
    [
        ((900, 0), (100, 850), 0),  # the caller kept the CPU from its own progress thread
        ((900, 150), (100, 0), 50),  # whereas this one waited longer than its sibling ran
        ((0, 0), (900, 300), 300),
    ],
)
def test_a_wait_behind_the_own_threads_is_no_disturbance(
    caller: tuple[int, int], progress: tuple[int, int], foreign: int
) -> None:
    before = {1: (10, 20)}  # thread 2 is new
    after = {1: (10 + caller[0], 20 + caller[1]), 2: progress}
    assert wait_behind_others_ns(before, after) == foreign


def test_a_run_that_was_disturbed_throughout_is_marked() -> None:
    samples = [Sample(1.0, delay=0.0)] * 2 + [Sample(9.0, delay=1.0)] * 13
    found = common.summary(samples, nbytes=10**9)
    assert (found["p50_us"], found["dropped"], found["noisy"]) == (9e6, 13, True)


def test_a_ratio_pairs_samples_of_one_round() -> None:
    ours = [Sample(seconds) for seconds in (1.0, 2.0, 4.0)]
    other = [Sample(seconds) for seconds in (2.0, 4.0, 8.0)]
    assert common.speed_ratio(ours, other)["ratio"] == 2.0


def test_each_round_takes_every_case_once() -> None:
    taken: list[str] = []
    names = "abcd"
    common.interleave({name: lambda name=name: taken.append(name) for name in names}, 20)
    turns = [taken[at : at + 4] for at in range(0, len(taken), 4)]
    assert all(sorted(turn) == list(names) for turn in turns)
    assert len({tuple(turn) for turn in turns}) > 1, "the order is not shuffled"
