# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""`run` as a function, for tests and benchmarks."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

RUN = Path(__file__).resolve().parent / "run"
Guest = Callable[..., "subprocess.CompletedProcess[str]"]


def in_guest(*arguments: str | Path, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
    """``run --timeout timeout_s ARGUMENTS``: options and command; its exit code is not checked."""
    command = [RUN, "--timeout", str(timeout_s), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=timeout_s + 60, check=False
    )
