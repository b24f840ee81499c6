# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""The host's part of a copy by NumPy: what the extension module must do, and what stands in where it was not built."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kvxfer.errors import InvalidArgumentError

__all__ = ["address_of", "cut_segments", "host_arrays", "tensor_facts"]


def address_of(array: np.ndarray[Any, Any]) -> int:
    """Where the array's first element lies."""
    return int(array.ctypes.data)


def host_arrays(src: object, dst: object) -> None:
    """Nothing: what is done by one native call is known to the extension module alone."""


def tensor_facts(tensors: object) -> Any:
    """Not known here: to be asked in Python."""
    return NotImplemented


def cut_segments(
    src_blocks: npt.NDArray[np.int64],
    dst_blocks: npt.NDArray[np.int64],
    src_extent: tuple[int, int],
    dst_extent: tuple[int, int],
    tokens: tuple[int, int, int, int],
    apart: bool,
) -> npt.NDArray[np.int64]:
    """Runs of tokens that lie in one source and one destination block each, int64 ``[n, 5]``: block and slot of the
    source, of the destination, and tokens; those whose destination block is -1 are left out.

    Args:
        src_extent, dst_extent: number of blocks and their size.
        tokens: the sequence's token at which each list begins; first token and end of the range.
        apart: both are one cache, and no block may be read and written.
    Raises:
        InvalidArgumentError: an id that is no block, a destination that comes twice, a block that is both.
    """
    src_origin, dst_origin, first, end = tokens
    src = _End(src_blocks, src_extent[1], src_extent[0], src_origin, "src_blocks")
    dst = _End(dst_blocks, dst_extent[1], dst_extent[0], dst_origin, "dst_blocks")
    segments = _cut(src, dst, first, end)
    both = np.intersect1d(segments[:, 0], segments[:, 2]) if apart else np.zeros(0, np.int64)
    if both.size:
        raise InvalidArgumentError(
            f"dst_blocks: expected blocks that are not read by the same copy, given {both[:8].tolist()}"
        )
    return segments


@dataclass(frozen=True)
class _End:
    """A block list and where its tokens stand in the sequence."""

    ids: npt.NDArray[np.int64]
    block_size: int
    num_blocks: int
    origin: int
    name: str

    def cuts(self, first: int, end: int) -> npt.NDArray[np.int64]:
        size = self.block_size
        low, high = first - self.origin, end - self.origin
        return np.arange(low // size + 1, -(-high // size), dtype=np.int64) * size + self.origin

    def locate(
        self, tokens: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        index = (tokens - self.origin) // self.block_size
        return index, tokens - self.origin - index * self.block_size

    def check(self, index: npt.NDArray[np.int64], wanted: npt.NDArray[np.bool_]) -> None:
        ids = self.ids[index]
        wrong = wanted & ((ids < 0) | (ids >= self.num_blocks))
        if wrong.any():
            at = int(wrong.argmax())
            raise InvalidArgumentError(
                f"{self.name}[{int(index[at])}]: expected a block id from 0 to {self.num_blocks - 1}, "
                f"given {int(ids[at])}"
            )


def _cut(src: _End, dst: _End, first: int, end: int) -> npt.NDArray[np.int64]:
    """Runs of tokens that lie in one source and one destination block each."""
    if first == end:
        return np.zeros((0, 5), np.int64)
    # A packed buffer has no cuts, and equal blocks the same ones: the usual cases need no sorting.
    alike = (src.block_size, src.origin) == (dst.block_size, dst.origin)
    between = src.cuts(first, end)
    if not alike:
        theirs = dst.cuts(first, end)
        if theirs.size:
            between = np.union1d(between, theirs) if between.size else theirs
    edges = np.empty(between.size + 2, np.int64)
    edges[0], edges[1:-1], edges[-1] = first, between, end
    starts = edges[:-1]
    src_index, src_slot = src.locate(starts)
    dst_index, dst_slot = (src_index, src_slot) if alike else dst.locate(starts)
    wanted = dst.ids[dst_index] != -1
    src.check(src_index, wanted)
    dst.check(dst_index, wanted)
    used = dst_index[wanted]  # ascending, so an index that repeats follows itself
    fresh = np.ones(used.size, np.bool_)
    np.not_equal(used[1:], used[:-1], out=fresh[1:])
    used = np.sort(dst.ids[used[fresh]])
    repeated = used[1:][used[1:] == used[:-1]]
    if repeated.size:
        times = int((used == repeated[0]).sum())
        raise InvalidArgumentError(
            f"{dst.name}: expected each block at most once, given {int(repeated[0])} {times} times"
        )
    segments = np.empty((starts.size, 5), np.int64)
    segments[:, 0], segments[:, 1] = src.ids[src_index], src_slot
    segments[:, 2], segments[:, 3] = dst.ids[dst_index], dst_slot
    np.subtract(edges[1:], starts, out=segments[:, 4])
    return segments if wanted.all() else segments[wanted]
