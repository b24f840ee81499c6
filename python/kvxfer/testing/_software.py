# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Compiles the libraries of tests/ that stand for hardware, once for each state of their sources."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

__all__ = ["compiled"]

_ROOT = Path(__file__).resolve().parents[3]
_FLAGS = [
    "-std=c++20",
    "-O1",
    "-fPIC",
    "-fvisibility=hidden",
    "-pthread",
    "-shared",
    "-Wl,-z,nodelete",
]


def _compile(sources: Path, target: Path, compiler: list[str]) -> None:
    partial = target.with_suffix(f".{os.getpid()}")
    command = [*compiler, *_FLAGS, f"-I{_ROOT / 'csrc'}", "-x", "c++", "-", "-o", str(partial)]
    # One unit: the standard headers are most of the work.
    unit = "".join(f'#include "{source}"\n' for source in sorted(sources.glob("*.cpp")))
    done = subprocess.run(command, input=unit, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    partial.replace(target)


def compiled(
    name: str, *, also: tuple[str, ...] = (), header: tuple[str, str] | None = None
) -> tuple[Path | None, str | None]:
    """Where ``lib{name}.so`` of ``tests/{name}`` is, made when it is not there yet; or why there is none.

    Below ``build/{name}``; processes that ask at the same time wait for each other. Raises
    ``RuntimeError`` when the sources do not compile.

    Args:
        also: further files that its sources include, from the root.
        header: one of the system that they need, and Debian's package of it.
    """
    sources = _ROOT / "tests" / name
    if not sources.is_dir():
        return None, f"the sources of lib{name}.so are not there: {sources}"
    words = os.environ.get("CXX", "c++").split()
    state = hashlib.sha256(" ".join([*words, *_FLAGS]).encode())
    for path in [*sorted(sources.glob("*.[ch]*")), *(_ROOT / each for each in also)]:
        state.update(path.name.encode() + path.read_bytes())
    folder = _ROOT / "build" / name / state.hexdigest()[:16]
    target = folder / f"lib{name}.so"
    if target.exists():
        return target, None
    if shutil.which(words[0]) is None:
        return None, f"no C++ compiler for lib{name}.so: '{words[0]}' was not found"
    if header is not None:
        check = [*words, "-xc++", "-include", header[0], "-fsyntax-only", os.devnull]
        if subprocess.run(check, capture_output=True, check=False).returncode != 0:
            return None, f"{header[0]} was not found: apt-get install {header[1]}"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            _compile(sources, target, words)
    return target, None
