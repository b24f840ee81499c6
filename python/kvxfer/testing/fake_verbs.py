# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""The software NICs of tests/fake_verbs for Python: compiled once, and what goes wrong on them."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

__all__ = ["counts", "in_use", "library", "real_devices", "set_plan"]

_ROOT = Path(__file__).resolve().parents[3]
_SOURCES = _ROOT / "tests" / "fake_verbs"
_FLAGS = [
    "-std=c++20",
    "-O1",
    "-fPIC",
    "-fvisibility=hidden",
    "-pthread",
    "-shared",
    "-Wl,-z,nodelete",
]


def real_devices() -> list[str]:
    """RDMA devices that the kernel knows; where there are some, tests use them."""
    try:
        return sorted(os.listdir("/sys/class/infiniband"))
    except OSError:
        return []


def _compile(target: Path, compiler: list[str]) -> None:
    partial = target.with_suffix(f".{os.getpid()}")
    sources = sorted(_SOURCES.glob("*.cpp"))
    command = [*compiler, *_FLAGS, f"-I{_ROOT / 'csrc'}", "-x", "c++", "-", "-o", str(partial)]
    # One unit: the standard headers are most of the work.
    unit = "".join(f'#include "{source}"\n' for source in sources)
    done = subprocess.run(command, input=unit, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    partial.replace(target)


@lru_cache(maxsize=1)
def library() -> tuple[Path | None, str | None]:
    """Where ``libfake_verbs.so`` is, made when it is not there yet; or why there is none.

    Compiled once for each state of its sources, below ``build/fake_verbs``; processes that ask at
    the same time wait for each other. Raises ``RuntimeError`` when the sources do not compile.
    """
    if not _SOURCES.is_dir():
        return None, f"the sources of the software NICs are not there: {_SOURCES}"
    words = os.environ.get("CXX", "c++").split()
    state = hashlib.sha256(" ".join([*words, *_FLAGS]).encode())
    common = [_ROOT / "csrc" / "common" / name for name in ("clock.hpp", "racy_copy.hpp")]
    for path in [*sorted(_SOURCES.glob("*.[ch]*")), *common]:
        state.update(path.name.encode() + path.read_bytes())
    folder = _ROOT / "build" / "fake_verbs" / state.hexdigest()[:16]
    target = folder / "libfake_verbs.so"
    if target.exists():
        return target, None
    if shutil.which(words[0]) is None:
        return None, f"no C++ compiler for the software NICs: '{words[0]}' was not found"
    header = [*words, "-xc++", "-include", "infiniband/verbs.h", "-fsyntax-only", os.devnull]
    if subprocess.run(header, capture_output=True, check=False).returncode != 0:
        return None, "infiniband/verbs.h was not found: apt-get install libibverbs-dev"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            _compile(target, words)
    return target, None


@contextlib.contextmanager
def in_use() -> Iterator[None]:
    """Within, whatever opens libibverbs for the first time in this process gets the software one.

    Nothing changes where there are real devices, or where the user has named a library.
    """
    # Asked first: where there are devices nobody needs to compile anything.
    named = real_devices() or "KVXFER_LIBIBVERBS" in os.environ
    path = None if named else library()[0]
    if path is None:
        yield
        return
    os.environ["KVXFER_LIBIBVERBS"] = str(path)
    try:
        yield
    finally:
        del os.environ["KVXFER_LIBIBVERBS"]


def _loaded() -> ctypes.CDLL:
    named = os.environ.get("KVXFER_LIBIBVERBS")
    path, reason = (named, None) if named else library()
    if path is None:
        raise RuntimeError(reason)
    return ctypes.CDLL(str(path))


def set_plan(plan: str) -> None:
    """What goes wrong on this process's software NICs from now on; words of fake_verbs/plan.hpp."""
    if _loaded().fake_verbs_plan(plan.encode()) != 0:
        raise ValueError(f"no such plan: '{plan}'")


def counts(*names: str) -> list[int]:
    """What this process's software NICs have counted; names of fake_verbs/fake_verbs.h."""
    count = _loaded().fake_verbs_count
    count.restype = ctypes.c_int64
    return [int(count(name.encode())) for name in names]
