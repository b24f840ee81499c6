# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Staging buffers are layouts too, so that pack and unpack are copies between two layouts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from kvxfer.layout.kv_layout import KVLayout
from kvxfer.layout.orders import has_two_parts
from kvxfer.layout.parts import KVScales
from kvxfer.layout.rows import Spans
from kvxfer.layout.segments import Segments
from kvxfer.layout.spans import Side, SpanGroup, build_groups

__all__ = ["CHUNK_NBYTES", "gathered_layout", "packed_groups", "packed_layout", "packed_nbytes"]

# Pieces of a packed buffer: large enough for any link, small enough that unpacking starts early.
CHUNK_NBYTES = 4 << 20


def packed_layout(
    dst: KVLayout, layers: tuple[int, ...], heads: tuple[int, int], num_tokens: int
) -> KVLayout:
    """One block of all tokens, order ``LKHNC``, the destination's dtype and the heads that move."""
    order = "LKBHNC" if has_two_parts(dst.kind) else "LBHNC"
    return _wire(dst, order, layers, heads, num_blocks=1, block_size=num_tokens)


def packed_nbytes(
    dst: KVLayout, layers: tuple[int, ...], heads: tuple[int, int], num_tokens: int
) -> int:
    """``packed_layout(...).nbytes``, from sizes alone: a layout is not made only to be priced."""
    rows, num_heads = num_tokens * len(layers), heads[1] - heads[0]
    values, scales = (
        sum(
            part.row_nbytes * rows * (num_heads if part.per_head else 1)
            for part in dst.parts
            if part.is_scale == is_scale
        )
        for is_scale in (False, True)
    )
    return _scales_at(values) + scales if scales else values


def gathered_layout(
    dst: KVLayout, layers: tuple[int, ...], heads: tuple[int, int], num_blocks: int
) -> KVLayout:
    """The destination's own order, dense, with just the blocks and heads that move."""
    order = dst.order or _nearest_order(dst)
    return _wire(dst, order, layers, heads, num_blocks=num_blocks, block_size=dst.block_size)


def _wire(
    dst: KVLayout,
    order: str,
    layers: tuple[int, ...],
    heads: tuple[int, int],
    *,
    num_blocks: int,
    block_size: int,
) -> KVLayout:
    # Axes that MLA orders leave out have extent 1, unless the staging block is larger than the cache's.
    for axis in "NH":
        if axis not in order:
            order = order[:-1] + axis + "C"
    plain = KVLayout.from_order(
        order,
        num_blocks=num_blocks,
        block_size=block_size,
        num_kv_heads=heads[1] - heads[0],
        head_dim=dst.head_dim,
        head_dim_v=dst.head_dim_v,
        dtype=dst.dtype,
        num_layers=dst.num_layers,
        layers=layers,
        format=dst.format,
        atom=dst.atom,
        group=dst.group,
        kind=None if has_two_parts(dst.kind) else dst.kind,
    )
    scales = dst.scales
    if scales is None or scales.is_fixed:
        # Fixed scales count the model's heads, which the staging layout does not have; values are the
        # destination's, converted on the way in, and need no word about them here.
        return plain
    axes = "LKBHN" if has_two_parts(dst.kind) else "LBHN"
    if scales.granularity == "token":
        axes = axes.replace("H", "")
    at = _scales_at(plain.nbytes)
    moved = KVScales(scales.granularity, scales.dtype, order=axes, offset=at)
    with_scales = KVLayout.from_order(
        order,
        num_blocks=num_blocks,
        block_size=block_size,
        num_kv_heads=plain.num_kv_heads,
        head_dim=dst.head_dim,
        head_dim_v=dst.head_dim_v,
        dtype=dst.dtype,
        num_layers=dst.num_layers,
        layers=layers,
        scales=moved,
        kind=None if has_two_parts(dst.kind) else dst.kind,
    )
    return replace(with_scales, format=dst.format, atom=dst.atom, group=dst.group)


def _scales_at(values_nbytes: int) -> int:
    """Where scales begin behind so many bytes of values."""
    return -(-values_nbytes // 16) * 16


def _nearest_order(layout: KVLayout) -> str:
    """Axes by falling stride: the dense order most like strides that are no order."""
    part = layout.parts[0]
    place = {"B": part.stride_block, "N": part.stride_token, "H": part.stride_head}
    place["L"] = part.bases[1] - part.bases[0] if len(part.bases) > 1 else 1 << 62
    axes = "LBNH"
    if has_two_parts(layout.kind):
        axes = "LBKNH"
        place["K"] = abs(layout.parts[1].bases[0] - part.bases[0])
    return "".join(sorted(axes, key=lambda axis: -place[axis])) + "C"


def packed_groups(
    wire: KVLayout, heads: tuple[int, int], *, by_layer: bool
) -> tuple[SpanGroup, ...]:
    """The whole packed buffer, as pieces of at most ``CHUNK_NBYTES``; both sides count from its start."""
    zero = np.zeros(1, np.int64)
    everything = Segments(zero, zero, zero, zero, zero + wire.block_size)
    side = Side(wire, heads[0])
    groups = build_groups(side, side, everything, wire.layers, heads, by_layer=by_layer)
    return tuple(replace(group, template=_chunked(group.template)) for group in groups)


def _chunked(spans: Spans) -> Spans:
    pieces = -(-spans.nbytes // CHUNK_NBYTES)
    if (pieces == 1).all():
        return spans
    row = np.repeat(np.arange(len(spans)), pieces)
    step = np.arange(len(row)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    offset = step * CHUNK_NBYTES
    nbytes = np.minimum(spans.nbytes[row] - offset, CHUNK_NBYTES)
    return Spans(spans.src[row] + offset, spans.dst[row] + offset, nbytes)
