# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""A checksum, resolved: which rows of which memory, and the place of each in the model and the sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from kvxfer.errors import InvalidArgumentError, LayoutError
from kvxfer.kernels._arrays import Array
from kvxfer.kernels._sides import (
    ITEMSIZE,
    Side,
    block_ids_of,
    head_range_of,
    layers_of,
    locate_layers,
    token_range,
)

__all__ = [
    "MAX_ROW_BYTES",
    "ChecksumJob",
    "PartRows",
    "hash_keys",
    "make_checksum_job",
    "splitmix64",
]

# The hash has one key word per 4 bytes of a row; the widest rows known are MLA's, 576 bf16 or 656 bytes.
MAX_ROW_BYTES = 4096
PART_IDS = {"k": 0, "v": 1, "latent": 2, "state": 3}


@dataclass(frozen=True)
class PartRows:
    """One part: strides in bytes, and per layer the (piece, offset) of the first wanted head in block 0."""

    part_id: int  # enters the hash
    row_bytes: int
    strides: tuple[int, int, int]  # block, token, head
    bases: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class ChecksumJob:
    """Rows to hash: for each part, layer, token and head."""

    parts: tuple[PartRows, ...]
    pieces: tuple[Array, ...]
    block_ids: npt.NDArray[np.int64]  # from token 0
    block_size: int
    num_blocks: int
    first_token: int
    num_tokens: int  # the end of the range, as everywhere
    first_head: int  # global
    num_heads: int
    layers: tuple[int, ...]


def make_checksum_job(
    side: Side,
    block_ids: Any,
    *,
    num_tokens: int | None,
    first_token: int,
    layers: Sequence[int] | None,
    heads: tuple[int, int] | None,
) -> ChecksumJob:
    """Resolve a checksum; every mistake is refused here."""
    layout = side.layout
    side.check_dtypes("tensors")
    ids = block_ids_of("block_ids", block_ids)
    begin, end = token_range(layout, ids, num_tokens, first_token)
    used = slice(begin // layout.block_size, -(-end // layout.block_size))
    wrong = (ids[used] < 0) | (ids[used] >= layout.num_blocks)
    if wrong.any():
        at = used.start + int(wrong.argmax())
        raise InvalidArgumentError(
            f"block_ids[{at}]: expected a block id from 0 to {layout.num_blocks - 1}, given {int(ids[at])}"
        )
    chosen = layers_of(layers)
    if chosen is None:
        chosen = list(layout.layers)
    for layer in chosen:
        if layer not in layout.layers:
            raise LayoutError("layers", f"layer {layer} is not held: {list(layout.layers)}")
    first, last = head_range_of(layout, heads)
    parts = []
    for part in layout.parts:
        row_bytes = part.width * ITEMSIZE[part.dtype]
        if row_bytes > MAX_ROW_BYTES:
            raise InvalidArgumentError(
                f"layout: expected rows of at most {MAX_ROW_BYTES} bytes, part {part.name} has {row_bytes}"
            )
        parts.append(
            PartRows(
                part_id=_part_id(part.name),
                row_bytes=row_bytes,
                strides=(part.stride_block, part.stride_token, part.stride_head),
                bases=locate_layers("tensors", side, part, chosen, first, last - first),
            )
        )
    return ChecksumJob(
        parts=tuple(parts),
        pieces=side.pieces,
        block_ids=ids,
        block_size=layout.block_size,
        num_blocks=layout.num_blocks,
        first_token=begin,
        num_tokens=end,
        first_head=first,
        num_heads=last - first,
        layers=tuple(chosen),
    )


def _part_id(name: str) -> int:
    """Small and fixed, as sums are compared between processes."""
    scale = name.endswith("_scale")
    return PART_IDS[name.removesuffix("_scale")] + (8 if scale else 0)


@cache
def hash_keys() -> npt.NDArray[np.uint32]:
    """One key word per 4 bytes of the widest row: splitmix64 from seed 0, its upper halves."""
    with np.errstate(over="ignore"):
        steps = np.arange(1, MAX_ROW_BYTES // 4 + 1, dtype=np.uint64)
        mixed = splitmix64(steps * np.uint64(0x9E3779B97F4A7C15))
    keys: npt.NDArray[np.uint32] = (mixed >> np.uint64(32)).astype(np.uint32)
    return keys


def splitmix64(z: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of splitmix64: a bijection that lets each bit in change half of the bits out."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: npt.NDArray[np.uint64] = z ^ (z >> np.uint64(31))
    return mixed
