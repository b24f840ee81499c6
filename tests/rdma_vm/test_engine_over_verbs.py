# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""The engine's own tests over the verbs transport, in the guest, between processes on Soft-RoCE devices.

The ordinary form is the conformance suite and one death on one device, pushed writes under leases, and requests over a
cable that loses packets and is cut; the slow form adds the whole suite with pushed writes, all tests of peers that die,
both suites over such a cable, harmless faults, everything else that takes a transport, and the server.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from vm_guest import Guest

from kvxfer.transfer import probe_transports

ROOT = Path(__file__).resolve().parents[2]
CONFORMANCE = "tests/transfer/test_conformance.py"
DEATH = "tests/transfer/test_faults.py::test_peer_death_fails_pending_transfers"
KILLS = ("tests/transfer/test_processes.py", "tests/transfer/test_faults.py")
OTHERS = (
    "tests/transfer/test_blocks_and_after.py",
    "tests/transfer/test_errors.py",
    "tests/transfer/test_leases.py",
    "tests/transfer/test_memory.py",
    "tests/transfer/test_waiting.py",
)


@pytest.fixture(scope="module")
def verbs(guest: Guest) -> Guest:
    """The machine, where this build has the verbs transport."""
    reasons = dict(probe_transports())
    if "verbs" not in reasons:
        pytest.skip("this build has no verbs transport")
    if "built" in (reasons["verbs"] or ""):
        pytest.skip(f"verbs: {reasons['verbs']}")
    return guest


def passed(
    guest: Guest,
    *files: str,
    options: tuple[str, ...] = (),
    linked: bool = False,
    way: str = "verbs",
    only: str = "test",
    without: str = "no_such_test",
    timeout_s: float = 560,
) -> int:
    """Runs the tests of that way in the guest; how many passed. None may fail, and none may be skipped."""
    environment = ["env", "KVXFER_TEST_PATIENCE=4"]
    environment += ["KVXFER_TEST_VERBS_DEVICES=rxe0,rxe1"] if linked else []
    # Emulated processes start in seconds, and stand still for as long when the host is busy.
    pytest_options = [
        "-v",  # a run that is stopped at its limit shows where it stood
        "-p",
        "no:cacheprovider",
        "-o",
        "timeout=300",
        "-k",
        f"([{way}] or [{way}-allocated or [{way}-registered) and ({only}) and not {without}",
    ]
    command = [*environment, sys.executable, "-m", "pytest", *pytest_options, *files]
    done = guest(*options, "--", *command, timeout_s=timeout_s)
    print(done.stdout, done.stderr)
    assert done.returncode == 0, (
        f"exit code {done.returncode}:\n{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
    )
    summary = done.stdout.strip().splitlines()[-1]
    assert "skipped" not in summary, done.stdout[-3000:]
    found = re.search(r"(\d+) passed", summary)
    assert found, summary
    return int(found[1])


def test_conformance_and_a_death_on_one_device(verbs: Guest) -> None:
    assert passed(verbs, CONFORMANCE, DEATH) >= 30


def test_pushed_writes_on_one_device(verbs: Guest) -> None:
    """Those under leases; Soft-RoCE has windows, though it does not check their bounds."""
    assert passed(verbs, CONFORMANCE, way="verbs-push", only="lease or arrival") >= 5


@pytest.mark.slow
@pytest.mark.parametrize("num_rails", ["1", "2"])
def test_conformance_and_kills_with_pushed_writes(verbs: Guest, num_rails: str) -> None:
    options = ("--rails", num_rails)
    assert (
        passed(verbs, CONFORMANCE, *KILLS, options=options, way="verbs-push", timeout_s=2400) >= 35
    )


@pytest.mark.slow
def test_kills_on_one_device(verbs: Guest) -> None:
    assert passed(verbs, *KILLS, timeout_s=1500) >= 5


def test_bytes_are_right_over_a_cable_that_loses_packets_and_a_cut_is_seen(verbs: Guest) -> None:
    script = Path(__file__).with_name("lossy_cable.py")
    done = verbs("--netem", "loss 0.5%", "--", sys.executable, script)
    print(done.stderr)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout)
    assert result["lost_packets"] > 0
    # By the queue pair's retries, long before the deadline: on Soft-RoCE seven of them would be for ever.
    assert result["cut"] == {"write": "PeerDisconnectedError", "read": "PeerDisconnectedError"}


@pytest.mark.slow
def test_conformance_over_a_cable_that_loses_packets(verbs: Guest) -> None:
    count = passed(
        verbs,
        CONFORMANCE,
        options=("--netem", "loss 0.5%"),
        linked=True,
        # 1500 requests of 512 bytes at once: the answers that are lost are awaited one after the other, each for the
        # 2 s that follow from a deadline of 30 s, which then ends the last of them.
        without="test_thousands_of_mixed_transfers_in_flight",
        timeout_s=1500,
    )
    assert count >= 30


@pytest.mark.slow
def test_kills_over_a_cable_that_loses_and_delays(verbs: Guest) -> None:
    assert (
        passed(verbs, *KILLS, options=("--netem", "loss 1% delay 1ms"), linked=True, timeout_s=1500)
        >= 5
    )


@pytest.mark.slow
def test_conformance_with_harmless_faults(verbs: Guest) -> None:
    assert passed(verbs, CONFORMANCE, way="faulty-verbs", timeout_s=1500) >= 30


@pytest.mark.slow
@pytest.mark.parametrize("file", OTHERS)
def test_everything_else_on_one_device(verbs: Guest, file: str) -> None:
    assert passed(verbs, file, timeout_s=1500) >= 1


@pytest.mark.slow
def test_the_server_answers_alike_over_verbs(verbs: Guest) -> None:
    script = str(Path(__file__).with_name("server_over_verbs.py"))
    monolithic = subprocess.run(  # at this machine's own speed, and with its own instructions
        [sys.executable, script, "both"], capture_output=True, text=True, timeout=600, check=False
    )
    assert monolithic.returncode == 0, monolithic.stderr
    done = verbs("--memory", "4000", "--", sys.executable, script, "split", timeout_s=1500)
    print(done.stderr)
    assert done.returncode == 0, done.stdout + done.stderr
    split = json.loads(done.stdout)
    assert split["tokens"] == json.loads(monolithic.stdout)["tokens"]
    moved = {name: value for name, value in split["metrics"].items() if "bytes" in name and value}
    assert moved, split["metrics"]
    assert all('transport="verbs"' in name for name in moved), moved
