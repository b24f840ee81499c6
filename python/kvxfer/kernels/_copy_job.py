# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""A block copy, resolved: which rows of which memory go where. Every backend executes the same job.

A row is the channels of one (layer, part, head, token). The job is factored: a table of base addresses per
(layer, part), strides per part, and segments (runs of tokens within one source and one destination block).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kvxfer.errors import InvalidArgumentError
from kvxfer.kernels._copy_route import CopyRoute, route_between
from kvxfer.kernels._host import cut_segments
from kvxfer.kernels._sides import Side, block_ids_of, range_within
from kvxfer.layout.rules import check_whole_tokens

__all__ = ["BlockLists", "CopyJob", "make_job"]


class BlockLists(NamedTuple):
    """The tokens of a copy, and the blocks they lie in."""

    src_ids: npt.NDArray[np.int64]
    dst_ids: npt.NDArray[np.int64]
    tokens: tuple[
        int, int, int, int
    ]  # where the source's list begins, where the destination's; first, end
    apart: bool  # both sides are one cache, so that no block may be read and written


@dataclass(eq=False)  # not frozen: that would take as long again as all of its fields
class CopyJob:
    """Rows to copy: for each part, layer, segment, head and token of the segment.

    A backend looks at ``segments`` before it moves anything, or checks ``blocks`` as :func:`cut_segments` does.
    """

    route: CopyRoute
    src: Side
    dst: Side
    blocks: BlockLists
    max_ctas: int
    device: str  # where it runs; one side may be other memory that this device reaches

    @cached_property
    def segments(self) -> npt.NDArray[np.int64]:
        """Runs of tokens within one block of each side, ``[n, 5]``: as :func:`cut_segments` finds them."""
        src_ids, dst_ids, tokens, apart = self.blocks
        return cut_segments(
            src_ids, dst_ids, self.route.src_extent, self.route.dst_extent, tokens, apart
        )

    @property
    def is_empty(self) -> bool:
        """Nothing is to be written."""
        return not (len(self.segments) and self.route.num_heads and self.route.bases.size)

    @property
    def bases(self) -> npt.NDArray[np.int64]:
        """Addresses, ``[parts, layers, 2]``: where each layer's part begins in the source and the destination."""
        table = self.route.bases
        found = np.empty((*table.shape[:2], 2), np.int64)
        for side, addresses in enumerate((self.src.addresses, self.dst.addresses)):
            piece, offset = table[..., 2 * side], table[..., 2 * side + 1]
            np.add(np.array(addresses, np.int64)[piece], offset, out=found[..., side])
        return found


def make_job(
    src: Side,
    dst: Side,
    src_blocks: Any,
    dst_blocks: Any,
    *,
    num_tokens: int | None,
    first_token: int,
    layers: Sequence[int] | None,
    heads: tuple[int, int] | None = None,
    src_origin: int = 0,
    dst_origin: int = 0,
    max_ctas: int = 0,
) -> CopyJob:
    """Resolve a copy. Every mistake is refused before a byte is touched: wrong ids by the backend, all others here.

    ``src_origin`` and ``dst_origin`` are the sequence positions of the first token of each block list.
    """
    device = src.device if src.device == dst.device else _device_of_both(src, dst)
    src_ids = block_ids_of("src_blocks", src_blocks)
    dst_ids = block_ids_of("dst_blocks", dst_blocks)
    size_a, size_b = src.layout.block_size, dst.layout.block_size
    held = min(src_origin + len(src_ids) * size_a, dst_origin + len(dst_ids) * size_b)
    counts = ((len(src_ids), size_a), (len(dst_ids), size_b))
    first, end = range_within(held, counts, num_tokens, first_token)
    check_whole_tokens(src.layout, first, end)
    route = route_between(src, dst, layers, heads, first == end)
    tokens = (src_origin, dst_origin, first, end)
    apart = first < end and _in_one_cache(src, dst)
    return CopyJob(route, src, dst, BlockLists(src_ids, dst_ids, tokens, apart), max_ctas, device)


def _device_of_both(src: Side, dst: Side) -> str:
    """A GPU reaches host memory that is pinned, and memory of GPUs that it is joined to."""
    if src.device.startswith("cuda") and dst.device.startswith("cuda"):
        return src.device  # stores go out over the link and are forgotten, loads are waited for
    for gpu, host in ((src, dst), (dst, src)):
        if gpu.device.startswith("cuda") and host.device == "cpu" and _is_pinned(host):
            return gpu.device
    raise InvalidArgumentError(
        f"dst: expected memory on {src.device} like src, of another GPU, or pinned host memory on one side, given {dst.device}"
    )


def _is_pinned(side: Side) -> bool:
    torch = sys.modules["torch"]  # there, since the other side is a tensor
    return all(p.flags.writeable and torch.from_numpy(p).is_pinned() for p in side.pieces)


def _in_one_cache(src: Side, dst: Side) -> bool:
    """Do both lie in the same memory, under the same layout? Refuses any other overlap."""
    if src.device != dst.device or not src.meets(dst):
        return False
    alike = src.layout is dst.layout or src.layout == dst.layout
    if not alike or src.addresses != dst.addresses or src.sizes != dst.sizes:
        raise InvalidArgumentError(
            "dst: expected memory apart from src (or the same memory under the same layout), given an overlap"
        )
    return True
