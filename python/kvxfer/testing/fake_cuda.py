# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""The software GPUs of tests/fake_cuda for Python: memory that NICs reach and no CPU may touch."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvxfer.testing._software import compiled

__all__ = ["DeviceArray", "in_use", "library", "set_plan"]


@lru_cache(maxsize=1)
def library() -> tuple[Path | None, str | None]:
    """Where ``libfake_cuda.so`` is, made when it is not there yet; or why there is none."""
    return compiled("fake_cuda")


@contextlib.contextmanager
def in_use() -> Iterator[None]:
    """Within, whatever opens libcuda for the first time in this process gets the software one."""
    path, reason = library()
    if path is None:
        raise RuntimeError(reason)
    before = os.environ.get("KVXFER_LIBCUDA")
    os.environ["KVXFER_LIBCUDA"] = str(path)
    try:
        yield
    finally:
        if before is None:
            del os.environ["KVXFER_LIBCUDA"]
        else:
            os.environ["KVXFER_LIBCUDA"] = before


@lru_cache(maxsize=1)
def _loaded() -> ctypes.CDLL:
    path, reason = library()
    if path is None:
        raise RuntimeError(reason)
    loaded = ctypes.CDLL(str(path))
    loaded.fake_cuda_alloc.restype = ctypes.c_uint64
    loaded.fake_cuda_alloc.argtypes = [ctypes.c_int, ctypes.c_size_t, ctypes.c_char_p]
    loaded.fake_cuda_free.argtypes = [ctypes.c_uint64]
    for name in ("fake_cuda_poke", "fake_cuda_peek"):
        getattr(loaded, name).argtypes = [ctypes.c_uint64, ctypes.c_void_p, ctypes.c_size_t]
    return loaded


def set_plan(plan: str) -> None:
    """What this process's software GPUs can and cannot do; words of fake_cuda/fake_cuda.h."""
    if _loaded().fake_cuda_plan(plan.encode()) != 0:
        raise ValueError(f"no such plan: '{plan}'")


class DeviceArray:
    """An array in the memory of a software GPU, as a framework would hand it over.

    Args:
        shape: of it, zeros; ``dtype``: what one element is.
        device: which GPU. ``kind``: ``"legacy"`` (cudaMalloc), ``"mapped"``, ``"managed"`` or ``"host"``.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: npt.DTypeLike = np.uint8,
        *,
        device: int = 0,
        kind: str = "legacy",
    ) -> None:
        self.shape = shape
        self.dtype = np.dtype(dtype)
        self.nbytes = math.prod(shape) * self.dtype.itemsize
        self.address = int(_loaded().fake_cuda_alloc(device, self.nbytes, kind.encode()))
        if self.address == 0:
            raise MemoryError(f"{self.nbytes} bytes of a software GPU")
        self.read_only = False
        self.strides: tuple[int, ...] | None = None

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "version": 3,
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.address, self.read_only),
            "strides": self.strides,
        }

    def set(self, values: npt.NDArray[Any]) -> None:
        """As a kernel would write it: all of the array."""
        source = np.ascontiguousarray(values, self.dtype)
        assert source.shape == self.shape
        assert _loaded().fake_cuda_poke(self.address, source.ctypes.data, self.nbytes) == 0

    def get(self) -> npt.NDArray[Any]:
        """A copy in host memory."""
        out = np.empty(self.shape, self.dtype)
        assert _loaded().fake_cuda_peek(self.address, out.ctypes.data, self.nbytes) == 0
        return out

    def __del__(self) -> None:
        if getattr(self, "address", 0) != 0:
            _loaded().fake_cuda_free(self.address)
