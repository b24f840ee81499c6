# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Other transfer libraries beside ours in the same interleaved run, each pair under its own interpreter."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from processes import Sample

PEERS = Path(__file__).resolve().parent / "peers"
sys.path.insert(0, str(PEERS))
from lines import Lines  # noqa: E402

# The callers of a NIXL pair without threads poll, so each side has a CPU; the others may use all.
NIXL: dict[str, tuple[list[str], bool]] = {
    "nixl, failure detection": (["--tls", "all", "--errors", "peer"], True),
    "nixl, failure detection, threads": (["--tls", "all", "--errors", "peer", "--threads"], False),
    "nixl shm, no detection": (["--tls", "shm", "--errors", "none"], True),
    "nixl posix, no detection": (["--tls", "posix", "--errors", "none"], True),
    "nixl tcp, polling": (["--tls", "tcp", "--errors", "peer"], True),
    "nixl tcp, threads": (["--tls", "tcp", "--errors", "peer", "--threads"], False),
}
MOONCAKE = "mooncake tcp"
START_S, ANSWER_S = 60.0, 120.0


class PeerError(RuntimeError):
    """A peer is not installed, does not work here, or stopped working."""


class PeerPair:
    """The driver of two processes of another library, asked over a pipe."""

    def __init__(self, name: str, command: list[str], *, pause: bool = False) -> None:
        self.name = name
        self._pids: list[int] = []
        self.answer_s = ANSWER_S
        self.log = tempfile.TemporaryFile()  # noqa: SIM115  closed with the pair
        try:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log
            )
        except OSError as error:
            raise PeerError(f"cannot run {command[0]}: {error.strerror}") from None
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._lines = Lines(self.process.stdout.fileno(), self.process.stdin.fileno())
        started = self._answer(START_S)
        # Threads that poll also between the samples would disturb everybody else's.
        self._pids = started["pids"] if pause else []
        self._signal(signal.SIGSTOP)

    def _signal(self, number: signal.Signals) -> None:
        for pid in self._pids:
            os.kill(pid, number)

    def _ask(self, **message: Any) -> dict[str, Any]:
        self._signal(signal.SIGCONT)
        self._lines.send(**message)
        answer = self._answer(self.answer_s)
        self._signal(signal.SIGSTOP)
        return answer

    def _answer(self, timeout_s: float) -> dict[str, Any]:
        assert self.process.stdout is not None
        try:
            if not select.select([self.process.stdout], [], [], timeout_s)[0]:
                raise PeerError(f"no answer within {timeout_s:.0f} s")
            return self._lines.receive()
        except (EOFError, PeerError) as error:
            self.process.kill()
            self.process.wait()
            self.log.seek(0)
            said = self.log.read().decode(errors="replace").strip().splitlines()
            raise PeerError(said[-1] if said else str(error)) from None

    def open(self, block: int, num_slots: int, src: list[int], dst: list[int]) -> bool:
        return bool(
            self._ask(do="case", block=block, num_slots=num_slots, src=src, dst=dst)["verified"]
        )

    def sample(self) -> Sample:
        return Sample(**self._ask(do="sample"))

    def close(self) -> None:
        assert self.process.stdin is not None
        if self.process.poll() is None:
            self._signal(signal.SIGCONT)
        self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.log.close()


def start_peers(
    nixl_python: str | None, mooncake_python: str | None, sides: tuple[set[int], set[int]] | None
) -> tuple[list[PeerPair], dict[str, str]]:
    """Those that start, and why each other one does not."""
    wanted: dict[str, list[str] | str] = {}
    for name, (flags, pinned) in NIXL.items():
        cpus = ["--cpus", *(str(min(side)) for side in sides)] if sides and pinned else []
        wanted[name] = (
            [nixl_python, str(PEERS / "nixl_pair.py"), *flags, *cpus]
            if nixl_python
            else "no --nixl-python given"
        )
    wanted[MOONCAKE] = (
        [mooncake_python, str(PEERS / "mooncake_pair.py")]
        if mooncake_python
        else "no --mooncake-python given"
    )
    pairs, absent = [], {}
    for name, command in wanted.items():
        if isinstance(command, str):
            absent[name] = command
            continue
        try:
            pairs.append(PeerPair(name, command, pause="--threads" in command))
        except PeerError as error:
            absent[name] = str(error)
    return pairs, absent
