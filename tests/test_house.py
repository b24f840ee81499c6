# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""What the repository promises about itself: licence lines, dependency lists, a bare import, the command."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:  # the pip inside every virtual environment carries a reader for 3.10
    from pip._vendor import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )


def test_the_server_group_equals_the_server_extra() -> None:
    extra = set(PROJECT["project"]["optional-dependencies"]["server"])
    base = set(PROJECT["project"]["dependencies"])
    assert set(PROJECT["dependency-groups"]["server"]) == extra | base


def test_every_source_file_names_its_licence() -> None:
    sources = [
        path
        for folder in ("python", "csrc", "tests", "bench", "tools", "examples")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in {".py", ".pyi", ".hpp", ".cpp", ".cu", ".cuh", ".sh"}
    ]
    assert len(sources) > 20
    bare = [
        str(path.relative_to(ROOT))
        for path in sources
        if "SPDX-License-Identifier: Apache-2.0" not in path.read_text()[:400]
    ]
    assert not bare, bare


def test_import_needs_numpy_alone() -> None:
    """The base install has only NumPy: importing kvxfer must not load any extra."""
    extras = {
        re.split(r"[<>=; ]", line)[0].replace("-", "_")
        for lines in PROJECT["project"]["optional-dependencies"].values()
        for line in lines
    } - {"cuda_python"}
    code = (
        "import sys, kvxfer; kvxfer.TransferEngine, kvxfer.KVLayout, kvxfer.kernels\n"
        f"loaded = sorted({extras!r} & set(sys.modules)); assert not loaded, loaded"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr


def test_public_names_exist_and_are_few() -> None:
    import kvxfer

    missing = [name for name in kvxfer.__all__ if not hasattr(kvxfer, name)]
    assert not missing
    assert len(kvxfer.__all__) <= 30


@pytest.mark.parametrize(
    "arguments", [["--help"], ["doctor", "--help"], ["serve", "--help"], ["bench", "--help"]]
)
def test_help_is_there(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "kvxfer", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "usage: kvxfer" in done.stdout


def test_unknown_command_is_refused_with_the_list() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "kvxfer", "swerve"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert "serve" in done.stderr


def test_doctor_names_every_transport_and_backend_with_a_reason() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "kvxfer", "doctor"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for word in ("tcp", "shm", "cpu", "reference", "triton", "cuda"):
        assert re.search(rf"\b{word}\b", done.stdout), word
