# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Copies of whole blocks between host arrays that were made before: known again, and done by one native call.

To resolve a copy takes as long as to move half a MiB, and a server moves blocks between the same pools all the time.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np

from kvxfer.kernels._arrays import Array
from kvxfer.kernels._copy_job import CopyJob
from kvxfer.kernels._copy_route import CopyRoute
from kvxfer.kernels._host import address_of
from kvxfer.kernels._memo import remember
from kvxfer.kernels._sides import LayoutLike

__all__ = ["WholeCopy"]

# The route is kept for the layouts that it holds: a key has their ids.
_known: dict[tuple[Any, ...], tuple[Callable[..., bool], CopyRoute]] = {}
_MOST_KNOWN = 256


class WholeCopy:
    """A call that names no tokens, heads or layers; ``key`` is all that resolving it would look at but the block ids.

    Args:
        layout, other: of both sides; or, where one is a packed buffer, what its layout follows from.
    """

    __slots__ = ("_key", "_places")

    def __init__(self, layout: LayoutLike, other: Any, src: Array, dst: Array) -> None:
        a, b = _place(src, False), _place(dst, True)
        self._places = a, b
        self._key = None if a is None or b is None else (id(layout), other, *a[1:], *b[1:])

    def done(self, src_blocks: Any, dst_blocks: Any) -> bool:
        """Does it if it is known; False: nothing was done, and whoever resolves it finds out whether it may be."""
        known = _known.get(self._key) if self._key is not None else None
        if known is None:
            return False
        a, b = self._places
        return known[0](a[0], a[1], b[0], b[1], src_blocks, dst_blocks)  # type: ignore[index]

    def keep(self, module: ModuleType, job: CopyJob) -> None:
        """To know it again: ``module`` has done ``job``."""
        if self._key is not None and not job.blocks.apart and hasattr(module, "copy_again"):
            remember(_known, self._key, (module.copy_again(job), job.route), _MOST_KNOWN)


def _place(array: Array, written: bool) -> tuple[int, int, Any] | None:
    """Address, bytes and dtype of one contiguous array in host memory; None: it is something else."""
    kind = type(array)
    if kind is np.ndarray:
        flags = array.flags
        if not flags.c_contiguous or (written and not flags.writeable):
            return None
        return address_of(array), array.nbytes, array.dtype
    torch = sys.modules.get("torch")
    if torch is None or kind is not torch.Tensor or not array.is_cpu or not array.is_contiguous():
        return None
    return array.data_ptr(), array.nbytes, array.dtype
