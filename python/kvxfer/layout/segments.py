# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Token ranges cut so that each piece lies in one source block and in one destination block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kvxfer.errors import InvalidArgumentError

__all__ = ["Int64", "Segments", "block_ids", "make_segments"]

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Segments:
    """Pieces in ascending destination position; all arrays int64 of one length."""

    src_block: Int64
    src_slot: Int64
    dst_block: Int64
    dst_slot: Int64
    length: Int64

    def __len__(self) -> int:
        return len(self.length)

    def take(self, chosen: Any) -> Segments:
        return Segments(
            self.src_block[chosen],
            self.src_slot[chosen],
            self.dst_block[chosen],
            self.dst_slot[chosen],
            self.length[chosen],
        )


def block_ids(name: str, ids: Any) -> Int64:
    """``ids`` as an int64 array of one axis (a copy: the caller's list may change later)."""
    array = np.asarray(ids)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise InvalidArgumentError(
            f"{name}: needs one axis of integer block ids, not {array.dtype} {array.shape}"
        )
    return array.astype(np.int64)


def make_segments(
    src_ids: Int64,
    dst_ids: Int64,
    src_block_size: int,
    dst_block_size: int,
    first_token: int,
    num_tokens: int,
    *,
    src_num_blocks: int,
    dst_num_blocks: int,
    src_origin: int = 0,
    dst_origin: int = 0,
    skip_src_holes: bool = False,
) -> Segments:
    """Cut tokens ``[first_token, num_tokens)``; an origin is the token at which that side's list begins.

    Tokens of a destination hole (-1) are left out; those of a source hole too, if ``skip_src_holes``.
    """
    if first_token >= num_tokens:
        empty = np.empty(0, np.int64)
        return Segments(empty, empty, empty, empty, empty)
    starts = np.array([first_token], np.int64)
    sizes = {
        (src_block_size, src_origin % src_block_size),
        (dst_block_size, dst_origin % dst_block_size),
    }
    for size, phase in sizes:
        begin = phase + (first_token - phase) // size * size + size
        starts = np.concatenate((starts, np.arange(begin, num_tokens, size, dtype=np.int64)))
    if len(sizes) > 1:
        starts = np.unique(starts)
    length = np.diff(starts, append=num_tokens)
    src_at, src_slot = np.divmod(starts - src_origin, src_block_size)
    dst_at, dst_slot = np.divmod(starts - dst_origin, dst_block_size)
    _check_long_enough("src_blocks", src_ids, src_at, num_tokens)
    _check_long_enough("dst_blocks", dst_ids, dst_at, num_tokens)
    segments = Segments(src_ids[src_at], src_slot, dst_ids[dst_at], dst_slot, length)
    holes = segments.dst_block < 0
    if skip_src_holes:
        holes |= segments.src_block == -1
    if holes.any():
        _check_range("dst_blocks", segments.dst_block, dst_at, -1, dst_num_blocks)
        wanted = ~holes
        segments, src_at, dst_at = segments.take(wanted), src_at[wanted], dst_at[wanted]
        if not len(segments):
            return segments
    _check_range("src_blocks", segments.src_block, src_at, 0, src_num_blocks)
    _check_range("dst_blocks", segments.dst_block, dst_at, 0, dst_num_blocks)
    return _by_destination(segments, dst_at)


def _check_long_enough(name: str, ids: Int64, at: Int64, num_tokens: int) -> None:
    if at[-1] >= len(ids):
        raise InvalidArgumentError(
            f"{name}: has {len(ids)} ids, {num_tokens} tokens need {int(at[-1]) + 1}"
        )


def _check_range(name: str, ids: Int64, at: Int64, lowest: int, num_blocks: int) -> None:
    if int(ids.min()) >= lowest and int(ids.max()) < num_blocks:
        return
    index = int(np.flatnonzero((ids < lowest) | (ids >= num_blocks))[0])
    hole = " (a hole, but its tokens are wanted)" if ids[index] == -1 else ""
    raise InvalidArgumentError(
        f"{name}[{int(at[index])}]: id {int(ids[index])}{hole} is not within 0 to {num_blocks - 1}"
    )


def _by_destination(segments: Segments, dst_at: Int64) -> Segments:
    """Sort by destination block, and refuse a block that two places of the list name."""
    ids = segments.dst_block
    if not (ids[1:] > ids[:-1]).all():
        if not (ids[1:] >= ids[:-1]).all():
            order = np.argsort(ids, kind="stable")
            segments, dst_at = segments.take(order), dst_at[order]
            ids = segments.dst_block
        twice = np.flatnonzero((ids[1:] == ids[:-1]) & (dst_at[1:] != dst_at[:-1]))
        if len(twice):
            index = int(twice[0])
            raise InvalidArgumentError(
                f"dst_blocks[{int(dst_at[index + 1])}]: id {int(ids[index])} stands at index "
                f"{int(dst_at[index])} already; a block can be written once"
            )
    return segments
