# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""`tests/rdma_vm/run`: what it passes on, what it keeps, how it ends, and the devices it makes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from vm_guest import RUN, Guest

_REPORT = """
echo to stdout; echo to stderr >&2; echo reopened >/dev/stdout
printf 'cwd=%s\\nword=%s\\nuid=%s\\ndevices=%s\\nmemlock=%s\\n' "$PWD" "$WORD" "$(id -u)" "$KVXFER_RDMA_DEVICES" "$(ulimit -l)"
echo kept >"$1/kept"
echo lost >"$2/lost" && cat "$2/lost" "$2/host"
ibv_devinfo -d rxe0 | grep state
sleep 1000 &
exit 41
"""


@pytest.fixture(scope="module")
def report(
    guest: Guest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[subprocess.CompletedProcess[str], Path, Path]:
    """One boot that writes to a shared and to an unshared folder and ends with exit code 41."""
    shared, unshared = tmp_path_factory.mktemp("a shared, odd name"), tmp_path_factory.mktemp("not")
    (unshared / "host").write_text("of the host\n")
    os.environ["WORD"] = "two words, 'quoted' $HOME\nand a second line"
    try:
        done = guest("--write", shared, "--", "bash", "-c", _REPORT, "bash", shared, unshared)
    finally:
        del os.environ["WORD"]
    return done, shared, unshared


Report = tuple["subprocess.CompletedProcess[str]", Path, Path]


def test_the_exit_code_is_the_commands(report: Report) -> None:
    assert report[0].returncode == 41, report[0].stderr


def test_output_comes_without_the_machines_own(report: Report) -> None:
    lines = report[0].stdout.splitlines()
    assert lines[0] == "to stdout"
    assert "reopened" in lines
    assert report[0].stderr == "to stderr\n"


def test_folder_and_environment_are_passed_on(report: Report) -> None:
    assert f"cwd={Path.cwd()}\n" in report[0].stdout
    assert "word=two words, 'quoted' $HOME\nand a second line\n" in report[0].stdout
    assert "uid=0\n" in report[0].stdout
    assert "devices=rxe0\n" in report[0].stdout
    assert "memlock=unlimited\n" in report[0].stdout


def test_only_shared_folders_keep_what_is_written(report: Report) -> None:
    done, shared, unshared = report
    assert (shared / "kept").read_text() == "kept\n"
    assert "lost\nof the host\n" in done.stdout
    assert sorted(path.name for path in unshared.iterdir()) == ["host"]


def test_there_is_an_active_device(report: Report) -> None:
    assert "PORT_ACTIVE" in report[0].stdout


def test_rails_are_devices_on_networks_of_their_own(guest: Guest) -> None:
    done = guest(
        "--rails",
        "2",
        "--",
        "bash",
        "-c",
        "ibv_devices; ip -o -4 addr show; ip link show type dummy",
    )
    assert done.returncode == 0, done.stderr
    assert set(re.findall(r"\brxe\d\b", done.stdout)) == {"rxe0", "rxe1"}
    assert "rdma0    inet 10.77.0.1/24" in done.stdout
    assert "rdma1    inet 10.77.1.1/24" in done.stdout


# A tool whose two sides wait for each other before they end. ibv_rc_pingpong does not: when the acknowledgement of its
# last message is lost and the other side has ended, Soft-RoCE sends that message for ever (docs/verbs.md).
_SENT_OVER_THE_CABLE = """
ask="timeout 100 ib_send_bw -x 1 -s 65536 -n 200"
$ask -d rxe1 >/tmp/server 2>&1 & server=$!
for try in $(seq 100); do ss -Hltn sport = :18515 | grep -q . && break; sleep 0.1; done
$ask -d rxe0 localhost && wait $server
code=$?
[ $code = 0 ] || {
  cat /tmp/server; rdma resource show qp
  grep -v '^0$' /sys/class/infiniband/rxe*/ports/1/hw_counters/[!l]*
}
tc -j -s qdisc show dev rdma0
exit $code
"""


def test_linked_devices_lose_packets_and_all_messages_arrive(guest: Guest) -> None:
    done = guest("--netem", "loss 1%", "--", "bash", "-c", _SENT_OVER_THE_CABLE)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^ 65536 +200 ", done.stdout, re.MULTILINE), done.stdout
    statistics = json.loads(done.stdout[done.stdout.rindex("[{") :])[0]
    assert statistics["packets"] > 200 * 16  # all over the cable
    assert statistics["drops"] > 0


def test_ib_write_bw_runs(guest: Guest) -> None:
    server = "ib_write_bw -d rxe0 -x 1 -s 65536 -n 200"
    script = f"""
    {server} >/tmp/server 2>&1 & server=$!
    for try in $(seq 100); do ss -Hltn sport = :18515 | grep -q . && break; sleep 0.1; done
    {server} localhost && wait $server"""
    done = guest("bash", "-c", script)
    assert done.returncode == 0, done.stdout + done.stderr
    row = re.search(r"^ 65536 +200 +([\d.]+) +([\d.]+)", done.stdout, re.MULTILINE)
    assert row, done.stdout
    assert float(row[2]) > 0


def test_the_time_limit_ends_the_machine(guest: Guest) -> None:
    done = guest("sleep", "1000", timeout_s=2)
    assert done.returncode == 124
    assert "time limit of 2 s" in done.stderr


@pytest.mark.slow  # it must be awaited
def test_before_its_time_limit_the_guest_says_what_still_runs(guest: Guest) -> None:
    done = guest("sleep", "1000", timeout_s=40)
    assert done.returncode == 124
    assert re.search(r"^ *\d+ S +sleep 1000$", done.stderr, re.MULTILINE), done.stderr
    assert "link rxe0/1" in done.stderr


def test_a_netem_that_tc_refuses_is_said(guest: Guest) -> None:
    done = guest("--netem", "lose everything", "--", "true")
    assert done.returncode == 125
    assert "tc refuses netem lose everything" in done.stderr


@pytest.mark.parametrize(
    ("ending", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)]
)
def test_interrupted_it_takes_the_machine_along(
    guest: Guest, ending: signal.Signals, code: int
) -> None:
    command = [
        "env",
        "--default-signal=INT",
        RUN,
        "sleep",
        "1000",
    ]  # a suite in the background ignores it
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        try:
            machine = _child_named(process.pid, "qemu-system-x86")
            process.send_signal(ending)
            assert process.wait(timeout=60) == code
        finally:
            process.kill()
    end = time.monotonic() + 60
    while Path(f"/proc/{machine}").exists() and time.monotonic() < end:
        time.sleep(0.05)  # a killed parent's child is reaped by init, when it gets to it
    assert not Path(f"/proc/{machine}").exists()


def _child_named(parent: int, name: str, patience_s: float = 60) -> int:
    end = time.monotonic() + patience_s
    while time.monotonic() < end:
        for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
            if Path(f"/proc/{child}/comm").read_text().startswith(name[:15]):
                return int(child)
        time.sleep(0.05)
    raise AssertionError(f"{parent} started no {name} within {patience_s} s")
