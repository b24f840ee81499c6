# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""The engine's own tests over the verbs transport, in the guest, between processes on Soft-RoCE devices.

The ordinary form is the core of everything in one boot, and requests over a cable that loses packets and is cut; the
slow form adds the whole suite, pulled and pushed, on one device, on two rails and over such a cable, all tests of peers
that die, harmless faults, everything else that takes a transport, and the server.
"""

from __future__ import annotations

import json
import os
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
RAILS = "tests/transfer/test_verbs_rails.py"
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


# One device that reaches itself; the two ends of a cable; and there and back over the same cable as two rails. Netem acts
# on the cable alone. What Soft-RoCE sends to itself has come when the post returns, so that the least busy rail would
# always be the first: striping needs a cable with a delay. Where packets are lost, retries come after 0.5 s, that of a
# deadline of 12 s, and not after the 2.1 s of the usual one.
PLACES = {
    "": "rxe0/rxe0",
    "two-rails": "rxe0,rxe1/rxe1,rxe0@12",
    "cable": "rxe0/rxe1@12",
}


def passed(
    guest: Guest,
    *files: str,
    options: tuple[str, ...] = (),
    places: tuple[str, ...] = (),
    select: str,
    timeout_s: float = 560,
) -> int:
    """Runs the tests that ``-k select`` takes in the guest; how many passed. None may fail or be skipped.

    Emulated processes start in seconds, and stand still for as long when the host is busy: hence the patience.
    Where netem is asked for, packets must have been lost.
    """
    environment = ["env", "KVXFER_TEST_PATIENCE=4", "PYTEST_DISABLE_PLUGIN_AUTOLOAD=1"]
    named = " ".join(f"{name}={PLACES[name]}".removeprefix("=") for name in places)
    environment += [f"KVXFER_TEST_VERBS_DEVICES={named}"] if places else []
    pytest_options = ["-v"]  # a run that is stopped at its limit shows where it stood
    pytest_options += ["-p", "no:cacheprovider", "-p", "pytest_timeout", "-o", "timeout=300"]
    # What the outer conftest sets up is for tests that run here: a guest is thrown away, and hypothesis takes as long
    # to import there as NumPy.
    pytest_options += ["--confcutdir=tests/transfer", "-k", select]
    tests = [sys.executable, "-m", "pytest", *pytest_options, *files]
    _compile(tests)
    done = guest(*options, "--", "bash", "-c", _AND_LOSSES, "bash", *environment, *tests, timeout_s=timeout_s)  # fmt: skip
    print(done.stdout, done.stderr)
    assert done.returncode == 0, (
        f"exit code {done.returncode}:\n{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
    )
    *_, summary, losses = done.stdout.strip().splitlines()
    assert "skipped" not in summary, done.stdout[-3000:]
    found = re.search(r"(\d+) passed", summary)
    assert found, summary
    if "--netem" in options:
        assert json.loads(losses)[0]["drops"] > 0, losses
    return int(found[1])


_AND_LOSSES = '"$@"; code=$?; tc -j -s qdisc show dev rdma0; exit $code'


def _compiling() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}


def _compile(tests: list[str]) -> None:
    """Compiles what the tests import, and their assertions, here: the guest would do it again at each start."""
    environment = _compiling() | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    collect = [*tests, "--collect-only", "-q"]
    done = subprocess.run(collect, env=environment, capture_output=True, text=True, check=False)
    # 5: nothing is left to collect, where the names are those of ways that only the guest has.
    assert done.returncode in (0, 5), done.stdout + done.stderr


def of(*ways: str) -> str:
    """For ``-k``: all tests of these ways, whatever their other parameters are."""
    return " or ".join(f"[{way}{end}" for way in ways for end in ("]", "-allocated", "-registered"))


# Everything, pulled; what else than that a push must keep; then some of what depends on rails and on losses.
LANDING = (
    "(random_scatter and (-0- or -1-)) or arrivals_are or arrivals_under or no_place_for or "
    "predecessor or foreign_and or revoked_lease or expired_lease or cancel_ends"
)
CORE = (
    f"[verbs] or [verbs-allocated or (verbs-push-registered and ({LANDING})) or "
    "(test_verbs_rails and not messages_move and not rail_fails) or "
    "((two-rails-allocated or cable-registered) and "
    "((random_scatter and (-0- or -1-)) or thousands_of_notifications or predecessor))"
)


def test_the_core_of_all_in_one_boot(verbs: Guest) -> None:
    """The conformance suite pulled, what pushing may break, a peer that dies, two rails, a cable that loses packets.

    One guest, one pytest and one fork server for all of it: they are most of what a run costs.
    """
    places = ("", "two-rails", "cable")
    files = (CONFORMANCE, DEATH, RAILS)
    count = passed(
        verbs, *files, options=("--netem", "loss 0.5% delay 1ms"), places=places, select=CORE
    )
    assert count >= 68


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
@pytest.mark.parametrize("place", ["", "two-rails"])
def test_conformance_and_kills_pulled_and_pushed(verbs: Guest, place: str) -> None:
    ways = [f"{way}-{place}".removesuffix("-") for way in ("verbs", "verbs-push")]
    places = ("", place) if place else ("",)
    files = (CONFORMANCE, *KILLS, RAILS)
    count = passed(
        verbs, *files, options=("--linked",), places=places, select=of(*ways), timeout_s=2400
    )
    assert count >= 150


@pytest.mark.slow
def test_conformance_over_a_cable_that_loses_packets(verbs: Guest) -> None:
    netem = ("--netem", "loss 0.5%")
    ways = of("verbs-cable", "verbs-push-cable")
    count = passed(
        verbs, CONFORMANCE, options=netem, places=("cable",), select=ways, timeout_s=3000
    )
    assert count >= 140


@pytest.mark.slow
@pytest.mark.parametrize("place", ["cable", "two-rails"])
def test_kills_over_a_cable_that_loses_and_delays(verbs: Guest, place: str) -> None:
    netem = ("--netem", "loss 1% delay 1ms")
    ways = of(f"verbs-{place}", f"verbs-push-{place}")
    count = passed(verbs, *KILLS, options=netem, places=(place,), select=ways, timeout_s=1500)
    assert count >= 16


@pytest.mark.slow
def test_requests_go_on_when_the_interface_of_a_rail_goes_down(verbs: Guest) -> None:
    count = passed(verbs, RAILS, options=("--rails", "2"), select="rail_fails_under_them")
    assert count == 2


@pytest.mark.slow
def test_conformance_with_harmless_faults(verbs: Guest) -> None:
    assert passed(verbs, CONFORMANCE, select=of("faulty-verbs"), timeout_s=1500) >= 70


@pytest.mark.slow
def test_everything_else_on_one_device(verbs: Guest) -> None:
    assert passed(verbs, *OTHERS, select=of("verbs", "verbs-push"), timeout_s=2400) >= 30


@pytest.mark.slow
def test_the_server_answers_alike_over_verbs(verbs: Guest) -> None:
    script = str(Path(__file__).with_name("server_over_verbs.py"))
    monolithic = subprocess.run(  # at this machine's own speed, and with its own instructions
        [sys.executable, script, "both"],
        env=_compiling(),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
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
