# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""``kvxfer bench``: runs a benchmark of the checkout that this package is installed from."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

__all__ = ["add_arguments", "run"]

SCRIPTS = {
    "transfer": "bench_transfer.py",
    "kernels": "bench_kernels.py",
    "serve": "bench_serving.py",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=SCRIPTS, help="which benchmark")
    parser.add_argument(
        "arguments",
        nargs=argparse.REMAINDER,
        help="passed on; `kvxfer bench transfer --help` lists them",
    )


def folder() -> Path | None:
    """The checkout's ``bench/``; None where the package was installed without it."""
    found = Path(__file__).resolve().parents[2] / "bench"
    return found if (found / "common.py").is_file() else None


def run(args: argparse.Namespace) -> int:
    place = folder()
    if place is None:
        print(
            "kvxfer bench: the benchmarks are not part of the installed package, only of a source "
            f"checkout. From one, run: python bench/{SCRIPTS[args.what]}",
            file=sys.stderr,
        )
        return 2
    command = [sys.executable, str(place / SCRIPTS[args.what]), *args.arguments]
    return subprocess.run(command, check=False).returncode
