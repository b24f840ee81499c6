# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Copies of whole blocks between host arrays that were made before: known again, and done by one native call.

To resolve a copy takes as long as to move half a MiB, and a server moves blocks between the same pools all the time.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from kvxfer.kernels._arrays import Array
from kvxfer.kernels._copy_job import CopyJob
from kvxfer.kernels._copy_route import CopyRoute
from kvxfer.kernels._host import host_arrays
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

    __slots__ = ("_arrays", "_key")

    def __init__(self, layout: LayoutLike, other: Any, src: Array, dst: Array) -> None:
        self._arrays = arrays = host_arrays(src, dst)
        self._key = () if arrays is None else (id(layout), other, arrays[1], *arrays[3:])

    def done(self, src_blocks: Any, dst_blocks: Any) -> bool:
        """Does it if it is known; False: nothing was done, and whoever resolves it finds out whether it may be."""
        arrays, known = self._arrays, _known.get(self._key)
        if arrays is None or known is None:
            return False
        return known[0](*arrays[:4], src_blocks, dst_blocks)

    def keep(self, module: ModuleType, job: CopyJob) -> None:
        """To know it again: ``module`` has done ``job``."""
        if self._arrays is not None and not job.blocks.apart and hasattr(module, "copy_again"):
            remember(_known, self._key, (module.copy_again(job), job.route), _MOST_KNOWN)
