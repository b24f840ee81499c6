# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""JSON lines between the benchmark and the processes of a peer; also what those have in common.

Peers run under an interpreter of their own: nothing here needs more than NumPy.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

PR_SET_PDEATHSIG = 1
MARK = "> "  # libraries print to stdout as they please: only lines that open with this are ours


class Lines:
    """One end of a pipe pair."""

    def __init__(self, fd_in: int, fd_out: int) -> None:
        self._in, self._out, self._have = fd_in, fd_out, b""

    def send(self, **message: Any) -> None:
        data = (MARK + json.dumps(message) + "\n").encode()
        while data:
            data = data[os.write(self._out, data) :]

    def ready(self) -> bool:
        return b"\n" in self._have or bool(select.select([self._in], [], [], 0)[0])

    def receive(self) -> dict[str, Any]:
        while True:
            line, newline, rest = self._have.partition(b"\n")
            if newline:
                self._have = rest
                text = line.decode(errors="replace")
                if text.startswith(MARK):
                    message: dict[str, Any] = json.loads(text[len(MARK) :])
                    return message
                continue
            data = os.read(self._in, 1 << 16)
            if not data:
                raise EOFError("the other process has ended")
            self._have += data

    def ask(self, **message: Any) -> dict[str, Any]:
        self.send(**message)
        return self.receive()


def standard() -> Lines:
    """To whoever started this process, with whom it dies, also when it is stopped just then.

    What prints to stdout from now on goes to stderr.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    out = os.dup(1)
    os.dup2(2, 1)
    return Lines(0, out)


def start_target(arguments: list[str]) -> tuple[subprocess.Popen[bytes], Lines]:
    """This script once more, as the passive side; it ends when its stdin does."""
    child = subprocess.Popen(
        [sys.executable, sys.argv[0], *arguments, "--role", "target"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    return child, Lines(child.stdout.fileno(), child.stdin.fileno())


def fill(pool: np.ndarray, seed: int) -> None:
    pool[:] = np.random.default_rng(seed).integers(0, 256, len(pool), np.uint8)


def digest(pool: np.ndarray, slots: list[int], block: int) -> str:
    found = hashlib.blake2b(digest_size=16)
    for slot in slots:
        found.update(pool[slot * block : (slot + 1) * block])
    return found.hexdigest()
