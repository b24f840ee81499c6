# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""When the contents of one layout may become those of another: the rules of plans, and of the kernels that copy.

Layouts are read by their fields alone: what stands for one in a kernel (a packed buffer, a plan's staging) obeys too.
"""

from __future__ import annotations

from typing import Any

from kvxfer.errors import LayoutError

__all__ = ["check_equal", "check_whole_blocks", "check_whole_tokens", "must_convert"]


def check_equal(src: Any, dst: Any, fields: tuple[str, ...], advice: str = "") -> None:
    """Refuse the first of these fields that differs."""
    for field in fields:
        ours, theirs = getattr(src, field), getattr(dst, field)
        if ours != theirs:
            said = f"source has {ours!r}, destination {theirs!r}; they must be equal"
            raise LayoutError(field, f"{said}. {advice}" if advice else said)


def check_whole_blocks(src: Any, dst: Any) -> None:
    """Blocks of atom 'block' move as they are: of one size, with the same heads, and the same inside."""
    if "block" not in (src.atom, dst.atom):
        return
    for field in ("atom", "block_size", "head_range"):
        ours, theirs = getattr(src, field), getattr(dst, field)
        if ours != theirs:
            raise LayoutError(
                field,
                f"source has {ours}, destination {theirs}; contents of atom 'block' cannot be cut",
            )
    for ours, theirs in zip(src.parts, dst.parts, strict=False):
        inside = [_inside(layout, part) for layout, part in ((src, ours), (dst, theirs))]
        if inside[0] != inside[1]:
            raise LayoutError(
                "order",
                f"part {ours.name}: the insides of blocks of atom 'block' cannot be arranged anew: strides of token "
                f"and head are {inside[0]} bytes in the source, {inside[1]} in the destination",
            )


def _inside(layout: Any, part: Any) -> tuple[int, int]:
    """Strides of token and head, 0 for an axis that does not move."""
    first, end = layout.head_range
    one_head = end - first == 1 or not part.per_head
    return part.stride_token if layout.block_size > 1 else 0, 0 if one_head else part.stride_head


def check_whole_tokens(layout: Any, first: int, end: int) -> None:
    """Refuse a range of tokens that cuts a block of atom 'block'."""
    size = layout.block_size
    if layout.atom == "block" and (first % size or end % size):
        raise LayoutError(
            "atom",
            f"tokens {first} to {end} cut a block of {size}; contents of atom 'block' move whole",
        )


def must_convert(src: Any, dst: Any) -> bool:
    """Do stored numbers change on the way? Refuses where they would have to and no one knows how."""
    same_scales = src.scales is None and dst.scales is None
    if src.scales is not None and dst.scales is not None:
        a, b = src.scales, dst.scales
        same_scales = (a.granularity, a.dtype, a.k, a.v) == (b.granularity, b.dtype, b.k, b.v)
    if src.dtype == dst.dtype and same_scales:
        return False
    if "uint8" in (src.dtype, dst.dtype) or src.atom != "element":
        field = "dtype" if src.dtype != dst.dtype else "scales"
        raise LayoutError(
            field,
            f"source has {getattr(src, field)!r}, destination {getattr(dst, field)!r}; opaque contents "
            "are never converted",
        )
    for side, layout in (("source", src), ("destination", dst)):
        if layout.scales is not None and not layout.scales.is_fixed:
            raise LayoutError(
                "scales",
                f"the {side} has scales per {layout.scales.granularity} in memory, which move with their numbers and "
                f"are never converted: source {src.dtype}, {src.scales}; destination {dst.dtype}, {dst.scales}",
            )
        if layout.scales is None and layout.dtype == "int8":
            raise LayoutError(
                "scales",
                f"the {side} is int8 without scales, so what its numbers mean is not known; give the layout scales=",
            )
    return True
