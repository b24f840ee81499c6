# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""`make gpu-check` as far as it goes without a GPU: what it says and its exit codes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tools" / "gpu_check.sh"

pytestmark = pytest.mark.skipif(not SCRIPT.is_file(), reason="no source tree here")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "PYTHON": sys.executable},
    )


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="this machine may have a GPU")
def test_a_machine_without_a_gpu_is_told_so_and_nothing_is_built() -> None:
    done = run()
    assert done.returncode == 3
    assert "no NVIDIA GPU" in done.stderr
    assert not (ROOT / "build" / "gpu-check").exists()


def test_a_dry_run_says_what_would_be_done() -> None:
    done = run("--dry-run")
    assert done.returncode == 0, done.stderr
    for word in ("nvcc", "compute-sanitizer", "would compile", "checks.py", "bench/results/gpu-"):
        assert word in done.stdout
    assert "bench.py" not in run("--dry-run", "--no-bench").stdout


def test_an_unknown_argument_is_refused_with_the_usage() -> None:
    done = run("--fast")
    assert done.returncode == 2
    assert "--dry-run" in done.stderr
    assert "'--fast'" in done.stderr
