# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""The software NICs of tests/fake_verbs for Python: compiled once, and what goes wrong on them."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from kvxfer.testing._software import compiled

__all__ = ["counts", "in_use", "library", "real_devices", "set_plan"]


def real_devices() -> list[str]:
    """RDMA devices that the kernel knows; where there are some, tests use them."""
    try:
        return sorted(os.listdir("/sys/class/infiniband"))
    except OSError:
        return []


@lru_cache(maxsize=1)
def library() -> tuple[Path | None, str | None]:
    """Where ``libfake_verbs.so`` is, made when it is not there yet; or why there is none.

    Raises ``RuntimeError`` when the sources do not compile.
    """
    return compiled(
        "fake_verbs",
        also=(
            "csrc/common/clock.hpp",
            "csrc/common/racy_copy.hpp",
            "tests/fake_cuda/fake_cuda_dmabuf.h",
        ),
        header=("infiniband/verbs.h", "libibverbs-dev"),
    )


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


def set_port(device: str, port: int, *, up: bool) -> None:
    """A link of this process's software NICs goes or comes, with the event of its port."""
    if _loaded().fake_verbs_set_port(device.encode(), port, int(up)) != 0:
        raise ValueError(f"no software NIC {device} with a port {port}")


def counts(*names: str) -> list[int]:
    """What this process's software NICs have counted; names of fake_verbs/fake_verbs.h."""
    count = _loaded().fake_verbs_count
    count.restype = ctypes.c_int64
    return [int(count(name.encode())) for name in names]
