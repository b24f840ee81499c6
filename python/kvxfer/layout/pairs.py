# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Which rank sends which layers to whom: a pure function of the layouts, so that both sides agree unasked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kvxfer.errors import InvalidArgumentError, LayoutError
from kvxfer.layout.kv_layout import KVLayout
from kvxfer.layout.orders import has_two_parts

__all__ = ["check_compatible", "heads_sent", "layers_sent", "transfer_pairs"]

_EQUAL = ("group", "num_layers", "num_kv_heads", "head_dim", "head_dim_v", "format", "atom")


def check_compatible(src: KVLayout, dst: KVLayout) -> bool:
    """Refuse two layouts that cannot be mapped; True when values must be converted on the way."""
    for side, layout in (("src", src), ("dst", dst)):
        if not hasattr(layout, "head_range"):
            raise InvalidArgumentError(
                f"{side}: expected a KVLayout, given {type(layout).__name__}"
            )
    for field in _EQUAL:
        ours, theirs = getattr(src, field), getattr(dst, field)
        if ours != theirs:
            raise LayoutError(
                field, f"source has {ours!r}, destination {theirs!r}; they must be equal"
            )
    if src.kind != dst.kind and not (has_two_parts(src.kind) and has_two_parts(dst.kind)):
        raise LayoutError("kind", f"source has {src.kind!r}, destination {dst.kind!r}")
    if src.atom == "block":
        _check_whole_blocks(src, dst)
    return _must_convert(src, dst)


def _check_whole_blocks(src: KVLayout, dst: KVLayout) -> None:
    for field in ("block_size", "head_range"):
        ours, theirs = getattr(src, field), getattr(dst, field)
        if ours != theirs:
            raise LayoutError(
                field,
                f"source has {ours}, destination {theirs}; contents of atom 'block' cannot be cut",
            )
    for ours, theirs in zip(src.parts, dst.parts, strict=True):
        inside = [
            [axis for axis in layout.part_axes(part) if axis[0] != "block"]
            for layout, part in ((src, ours), (dst, theirs))
        ]
        if inside[0] != inside[1]:
            raise LayoutError(
                "order", f"{ours.name} of atom 'block' has other strides at the destination"
            )


def _must_convert(src: KVLayout, dst: KVLayout) -> bool:
    same_scales = src.scales is None and dst.scales is None
    if src.scales is not None and dst.scales is not None:
        a, b = src.scales, dst.scales
        same_scales = (a.granularity, a.dtype, a.k, a.v) == (b.granularity, b.dtype, b.k, b.v)
    if src.dtype == dst.dtype and same_scales:
        if src.scales is not None and src.scales.granularity == "token":
            first, end = src.head_range
            if not (first <= dst.head_range[0] and dst.head_range[1] <= end):
                raise LayoutError(
                    "scales",
                    f"one scale a token covers the source's heads {src.head_range}; the destination's "
                    f"{dst.head_range} would need several",
                )
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


def heads_sent(src: KVLayout, dst: KVLayout) -> tuple[int, int]:
    """Heads of the model that both ranks hold, ``[first, end)``; empty when first >= end."""
    return (
        max(src.head_range[0], dst.head_range[0]),
        min(src.head_range[1], dst.head_range[1]),
    )


def layers_sent(
    src: KVLayout, dst: KVLayout, layers: Iterable[int] | None = None, *, spread: bool = True
) -> tuple[int, ...]:
    """Layers that this source rank sends to this destination rank, ascending.

    Where several source ranks hold the same heads, each sends its share of the layers (``spread``), so
    that every link carries a part; a layer still comes from one source for each head.
    """
    held = set(src.layers) & set(dst.layers)
    if layers is None:
        wanted = sorted(held)
    else:
        wanted = sorted({int(layer) for layer in layers})
        for side, layout in (("source", src), ("destination", dst)):
            lacking = sorted(set(wanted) - set(layout.layers))
            if lacking:
                raise LayoutError("layers", f"the {side} does not hold {lacking}")
    first, end = heads_sent(src, dst)
    if first >= end:
        return ()
    ours, theirs = src.replicas, dst.replicas
    if ours >= theirs and ours % theirs == 0:
        share = ours // theirs
        if src.replica // share != dst.replica:
            return ()
        turn = src.replica % share
        if spread:
            return tuple(layer for layer in wanted if layer % share == turn)
        return tuple(wanted) if turn == 0 else ()
    serving = dst.replica % ours if ours < theirs else dst.replica
    return tuple(wanted) if src.replica == serving else ()


def transfer_pairs(
    src_layouts: Sequence[KVLayout], dst_layouts: Sequence[KVLayout], *, spread: bool = True
) -> tuple[tuple[int, int, tuple[int, ...]], ...]:
    """Every (source index, destination index, layers) that moves something.

    Both sides compute it, and so know the arrivals to expect: for a layer, the pairs that name it.
    """
    pairs = []
    for i, src in enumerate(src_layouts):
        for j, dst in enumerate(dst_layouts):
            check_compatible_fields(src, dst)
            layers = layers_sent(src, dst, spread=spread)
            if layers:
                check_compatible(src, dst)
                pairs.append((i, j, layers))
    return tuple(pairs)


def check_compatible_fields(src: KVLayout, dst: KVLayout) -> None:
    """The rules that hold even for ranks that exchange nothing."""
    for field in _EQUAL:
        ours, theirs = getattr(src, field), getattr(dst, field)
        if ours != theirs:
            raise LayoutError(
                field, f"source has {ours!r}, destination {theirs!r}; they must be equal"
            )
