# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""What of a copy depends on layouts, sizes of memory, layers and heads alone: found once, used by every such copy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from kvxfer.errors import InvalidArgumentError, LayoutError
from kvxfer.kernels._arrays import FLOAT_DTYPES
from kvxfer.kernels._memo import remember
from kvxfer.kernels._scales import scale_factors
from kvxfer.kernels._sides import LayoutLike, Side, locate_layers
from kvxfer.layout.rules import check_equal, check_whole_blocks, must_convert

__all__ = ["CopyRoute", "PartCopy", "route_between"]

T = TypeVar("T")


@dataclass(frozen=True)
class PartCopy:
    """One part: strides in bytes, and per layer the (piece, offset) where its block 0 starts."""

    name: str
    width: int
    src_dtype: str
    dst_dtype: str
    src_strides: tuple[int, int, int]  # block, token, head
    dst_strides: tuple[int, int, int]
    src_bases: tuple[tuple[int, int], ...]  # the copied heads' first one included in the offset
    dst_bases: tuple[tuple[int, int], ...]
    # float32 [layers, heads, 2], where stored numbers change on the way: written = read * first / second.
    factors: npt.NDArray[np.float32] | None = None

    @property
    def converts(self) -> tuple[str, ...]:
        """The dtypes between which numbers are converted; none where bytes are copied."""
        same = self.src_dtype == self.dst_dtype and self.factors is None
        return () if same else (self.src_dtype, self.dst_dtype)


@dataclass(frozen=True, eq=False)
class CopyRoute:
    """Parts and heads to copy, whatever the blocks and wherever the memory."""

    layouts: tuple[LayoutLike, LayoutLike]  # held, since they are known by identity
    parts: tuple[PartCopy, ...]
    num_heads: int
    src_extent: tuple[int, int]  # num_blocks, block_size
    dst_extent: tuple[int, int]
    _made: dict[Callable[..., Any], Any] = field(default_factory=dict)

    @cached_property
    def cache_dtype(self) -> str | None:
        """One that is no float and is converted, which not every backend can."""
        return next((d for p in self.parts for d in p.converts if d not in FLOAT_DTYPES), None)

    @cached_property
    def scaled(self) -> bool:
        return any(part.factors is not None for part in self.parts)

    @cached_property
    def bases(self) -> npt.NDArray[np.int64]:
        """``[parts, layers, 4]``: piece of the source and offset there, of the destination likewise."""
        rows = [
            [(*src, *dst) for src, dst in zip(part.src_bases, part.dst_bases, strict=True)]
            for part in self.parts
        ]
        num_layers = len(rows[0]) if rows else 0
        return np.array(rows, np.int64).reshape(len(rows), num_layers, 4)

    def once(self, make: Callable[[CopyRoute], T]) -> T:
        """What ``make`` makes of this route; kept, for a backend's own form of it."""
        found: T | None = self._made.get(make)
        if found is None:
            found = self._made[make] = make(self)
        return found


# Of memory a route knows only the sizes; it keeps none alive.
_known: dict[tuple[Any, ...], CopyRoute] = {}
_MOST_KNOWN = 256


def route_between(
    src: Side, dst: Side, layers: Sequence[int] | None, heads: tuple[int, int] | None, empty: bool
) -> CopyRoute:
    """The way from one side to the other; of a copy of no tokens (``empty``) parts are not looked at.

    Raises:
        LayoutError: the layouts cannot be mapped; names the field.
        InvalidArgumentError: heads that not both hold, or memory that is too short for its layout.
    """
    a, b = src.layout, dst.layout
    key = (
        id(a),
        id(b),
        src.sizes,
        dst.sizes,
        src.dtypes,
        dst.dtypes,
        None if layers is None else tuple(layers),
        None if heads is None else tuple(heads),
        empty,
    )
    known = _known.get(key)
    if known is not None:
        return known
    src.check_dtypes("src")
    dst.check_dtypes("dst")
    check_equal(a, b, ("format",))
    # Layers and heads are matched by their numbers, which mean the same in one model only.
    advice = "Both must be of one model; the staging of a plan is filled by pack_plan"
    check_equal(a, b, ("num_layers", "num_kv_heads"), advice)
    check_whole_blocks(a, b)
    must_convert(a, b)
    chosen, first_head, num_heads = _common(a, b, layers, heads)
    route = CopyRoute(
        layouts=(a, b),
        parts=() if empty else _parts(src, dst, chosen, first_head, num_heads),
        num_heads=num_heads,
        src_extent=(a.num_blocks, a.block_size),
        dst_extent=(b.num_blocks, b.block_size),
    )
    return remember(_known, key, route, _MOST_KNOWN)


def _common(
    a: LayoutLike, b: LayoutLike, layers: Sequence[int] | None, heads: tuple[int, int] | None
) -> tuple[list[int], int, int]:
    """Layers, first head and number of heads to copy."""
    chosen = _layers(a, b, layers)
    low, high = max(a.head_range[0], b.head_range[0]), min(a.head_range[1], b.head_range[1])
    if heads is not None:
        if not low <= heads[0] <= heads[1] <= high:
            raise InvalidArgumentError(
                f"heads: expected a range within [{low}, {high}), given {tuple(heads)}"
            )
        low, high = heads
    return chosen, low, max(0, high - low)


def _layers(a: LayoutLike, b: LayoutLike, layers: Sequence[int] | None) -> list[int]:
    theirs = set(b.layers)
    both = [layer for layer in a.layers if layer in theirs]
    if layers is None:
        return both
    for layer in layers:
        if layer not in both:
            raise LayoutError(
                "layers",
                f"layer {layer} is not held by both: source {list(a.layers)}, destination {list(b.layers)}",
            )
    return list(layers)


def _parts(
    src: Side, dst: Side, layers: list[int], first_head: int, num_heads: int
) -> tuple[PartCopy, ...]:
    a, b = src.layout, dst.layout
    names_a, names_b = [p.name for p in a.parts], [p.name for p in b.parts]
    if sorted(names_a) != sorted(names_b):
        raise LayoutError("parts", f"source {names_a}, destination {names_b}")
    targets = {p.name: p for p in b.parts}
    result = []
    for part in a.parts:
        target = targets[part.name]
        if part.width != target.width:
            raise LayoutError(
                "head_dim", f"part {part.name}: source {part.width}, destination {target.width}"
            )
        result.append(
            PartCopy(
                name=part.name,
                width=part.width,
                src_dtype=part.dtype,
                dst_dtype=target.dtype,
                src_strides=(part.stride_block, part.stride_token, part.stride_head),
                dst_strides=(target.stride_block, target.stride_token, target.stride_head),
                src_bases=locate_layers("src", src, part, layers, first_head, num_heads),
                dst_bases=locate_layers("dst", dst, target, layers, first_head, num_heads),
                factors=scale_factors(a, b, part.name, layers, first_head, num_heads),
            )
        )
    return tuple(result)
