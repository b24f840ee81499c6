# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Byte spans between two layouts, kept factored: a template of spans, repeated at a table of bases.

Loops run over parts and over two classes of segments (full length, the rest); spans are NumPy rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvxfer.errors import InvalidArgumentError
from kvxfer.layout.kv_layout import KVLayout
from kvxfer.layout.parts import KVPart
from kvxfer.layout.rows import Axis, Spans, UnwrittenSpans, count_joins
from kvxfer.layout.segments import Int64, Segments

__all__ = ["NO_LAYER", "Side", "SpanGroup", "build_groups"]

NO_LAYER = (
    -1
)  # in SpanGroup.layers: this base covers several layers, because their spans have merged

# Below this many spans a plan is written out to look for neighbours across bases.
_MERGE_LIMIT = 4096
_MERGE_LIMIT_UNLIKE = (
    1 << 20
)  # K and V of unequal width: only there is it the sole way to find them


@dataclass(frozen=True, eq=False)
class SpanGroup:
    """``template`` repeated at each row of ``bases`` (source, destination); ``layers`` names each row's."""

    bases: Int64
    template: Spans
    layers: Int64

    @property
    def num_spans(self) -> int:
        return len(self.bases) * len(self.template)

    @property
    def total_nbytes(self) -> int:
        sizes, counts = self.template.sizes
        return len(self.bases) * int((sizes * counts).sum())

    def for_layer(self, layer: int) -> Int64:
        """The rows of ``bases`` that carry ``layer``."""
        if NO_LAYER in self.layers:
            raise InvalidArgumentError(
                f"layer: spans of several layers have merged; plan with by_layer=True to push layer {layer} alone"
            )
        rows: Int64 = self.bases[self.layers == layer]
        return rows


@dataclass(frozen=True)
class Side:
    """One end of a plan: a layout, and the head of the model that its head axis begins with."""

    layout: KVLayout
    first_head: int

    def bases(self, part: KVPart, layers: Sequence[int], head: int) -> Int64:
        rows = {layer: row for row, layer in enumerate(self.layout.layers)}
        shift = (head - self.first_head) * part.stride_head if part.per_head else 0
        return np.array([part.bases[rows[layer]] + shift for layer in layers], dtype=np.int64)

    def strides(self, part: KVPart, num_heads: int) -> tuple[int, int, int]:
        """Block, token and head stride; 0 where the axis does not move, as its stride means nothing."""
        layout = self.layout
        return (
            part.stride_block if layout.num_blocks > 1 else 0,
            part.stride_token if layout.block_size > 1 else 0,
            part.stride_head if num_heads > 1 else 0,
        )


class _Family:
    """Parts that one template serves: equal rows and equal strides on each side."""

    def __init__(
        self,
        key: tuple[object, ...],
        row_nbytes: int,
        num_heads: int,
        strides: tuple[tuple[int, int, int], ...],
    ) -> None:
        self.key = key
        self.row_nbytes = row_nbytes
        self.num_heads = num_heads
        self.src_strides, self.dst_strides = strides
        self.bases: list[Int64] = []  # one [layers, 2] for each part


# Segments of one class, their length (0: mixed), the run that they move at once, whether it contains all their
# tokens, and the axes along which it is repeated.
_Piece = tuple[Segments, int, int, bool, list[Axis]]


def build_groups(
    src: Side,
    dst: Side,
    segments: Segments,
    layers: Sequence[int],
    heads: tuple[int, int],
    *,
    by_layer: bool,
) -> tuple[SpanGroup, ...]:
    """All spans that carry ``heads`` of ``layers`` over ``segments``; one group wherever one can be made."""
    if not len(segments) or not layers or heads[0] >= heads[1]:
        return ()
    families = _families(src, dst, layers, heads)
    ids = np.array(layers, dtype=np.int64)
    if len(families) == 1:
        group = _family_group(families[0], segments, ids, by_layer=by_layer)
        return (_merge_across_bases(group, by_layer=by_layer, limit=_MERGE_LIMIT),)
    united = _unite(families, segments, ids)
    if united is not None:
        may_merge = not by_layer and united.num_spans <= _MERGE_LIMIT_UNLIKE
        limit = _MERGE_LIMIT_UNLIKE if may_merge and _layers_meet(united) else _MERGE_LIMIT
        return (_merge_across_bases(united, by_layer=by_layer, limit=limit),)
    groups = tuple(_family_group(family, segments, ids, by_layer=True) for family in families)
    if by_layer:
        return groups
    spans = Spans.concat([group.template.repeated(group.bases) for group in groups]).coalesced()
    return (_written_out(spans),)


def _families(src: Side, dst: Side, layers: Sequence[int], heads: tuple[int, int]) -> list[_Family]:
    found: dict[tuple[object, ...], _Family] = {}
    for ours, theirs in zip(src.layout.parts, dst.layout.parts, strict=True):
        num_heads = heads[1] - heads[0] if ours.per_head else 1
        strides = (src.strides(ours, num_heads), dst.strides(theirs, num_heads))
        key = (ours.row_nbytes, num_heads, strides)
        family = found.setdefault(key, _Family(key, ours.row_nbytes, num_heads, strides))
        family.bases.append(
            np.stack(
                (src.bases(ours, layers, heads[0]), dst.bases(theirs, layers, heads[0])), axis=1
            )
        )
    return list(found.values())


def _constant_step(table: Int64) -> tuple[int, int] | None:
    """The (source, destination) distance between all neighbouring rows of ``table``, if there is one."""
    steps = np.diff(table, axis=0)
    return (int(steps[0, 0]), int(steps[0, 1])) if (steps == steps[0]).all() else None


def _family_group(
    family: _Family, segments: Segments, layers: Int64, *, by_layer: bool
) -> SpanGroup:
    parts = sorted(family.bases, key=lambda bases: int(bases[0, 1]))
    axes = [Axis("head", family.num_heads, family.src_strides[2], family.dst_strides[2])]
    if len(parts) > 1:
        apart = parts[1] - parts[0]
        if len(parts) == 2 and (apart == apart[0]).all():
            axes.append(Axis("part", 2, int(apart[0, 0]), int(apart[0, 1])))
    if len(layers) > 1 and not by_layer:
        step = _constant_step(parts[0])
        same = all((np.diff(part, axis=0) == step).all() for part in parts) if step else False
        if step is not None and same:
            axes.append(Axis("layer", len(layers), *step))
    template, absorbed = _template(family, segments, [axis for axis in axes if axis.extent > 1])
    if "part" in absorbed:
        parts = parts[:1]
    table, ids = np.stack(parts, axis=1), np.repeat(layers[:, None], len(parts), axis=1)
    if "layer" in absorbed:
        table, ids = table[:1], np.full((1, len(parts)), NO_LAYER, dtype=np.int64)
    return SpanGroup(table.reshape(-1, 2), template, ids.reshape(-1))


def _template(family: _Family, segments: Segments, axes: list[Axis]) -> tuple[Spans, set[str]]:
    """Spans of one base, and which of the part and layer axes they contain."""
    longest = int(segments.length.max())
    is_full = segments.length == longest
    classes = []
    if is_full.all():
        classes.append((segments, longest))
    else:
        classes.append((segments.take(is_full), longest))
        classes.append((segments.take(~is_full), 0))
    collapsed = [(pieces, length, *_collapse(family, axes, length)) for pieces, length in classes]
    outer = {axis.name for axis in axes if axis.name in ("part", "layer")}
    absorbed = {
        name for name in outer if any(name not in _names(left) for _, _, _, _, left in collapsed)
    }
    pieces = [
        (chosen, length, run, whole, [a for a in left if a.name not in outer - absorbed])
        for chosen, length, run, whole, left in collapsed
    ]

    def write() -> Spans:
        return Spans.concat([_expand(family, *piece) for piece in pieces]).coalesced()

    counts = _count_rows(family, segments, pieces)
    spans = UnwrittenSpans(*counts, pieces[0][2], write) if counts else write()
    return spans, absorbed


def _count_rows(
    family: _Family, segments: Segments, pieces: Sequence[_Piece]
) -> tuple[int, int] | None:
    """Rows of these pieces, and how many join the one before, where that shows without writing them out."""
    _, length, run, whole, axes = pieces[0]
    num_rows = math.prod(axis.extent for axis in axes)
    num_rows *= len(segments) if whole else int(segments.length.sum())
    # Tokens that no run contains are the same axis in all pieces; few spans are quickly written out.
    if num_rows <= _MERGE_LIMIT or (whole and (len(pieces) > 1 or not axes)):
        return None
    outer, inner = _nest(family, length, whole, axes)
    src, dst = _starts(family, segments)
    joins = count_joins(src, dst, segments.length, run, outer, inner)
    return None if joins is None else (num_rows, joins)


def _names(axes: list[Axis]) -> set[str]:
    return {axis.name for axis in axes}


def _collapse(family: _Family, axes: list[Axis], length: int) -> tuple[int, bool, list[Axis]]:
    """Absorb axes that continue the run on both sides: (run, tokens absorbed, axes left).

    ``length`` 0 stands for segments of mixed length: once tokens are in the run it has no single size,
    and nothing can follow (a head after half a block would carry bytes past the valid tokens).
    """
    run = family.row_nbytes
    left = list(axes)
    token = (family.src_strides[1], family.dst_strides[1])
    waiting = length != 1
    while True:
        if waiting and token == (run, run):
            waiting = False
            if not length:
                return run, True, left
            run *= length
            continue
        found = next((axis for axis in left if axis.src == axis.dst == run), None)
        if found is None:
            return run, not waiting, left
        run *= found.extent
        left.remove(found)


def _starts(family: _Family, segments: Segments) -> tuple[Int64, Int64]:
    src, dst = family.src_strides, family.dst_strides
    return (
        segments.src_block * src[0] + segments.src_slot * src[1],
        segments.dst_block * dst[0] + segments.dst_slot * dst[1],
    )


def _nest(
    family: _Family, length: int, whole: bool, axes: Sequence[Axis]
) -> tuple[list[Axis], list[Axis]]:
    """The axes outside and inside the segments, nested as the destination is: so the rows come out sorted."""
    if length and not whole:
        axes = [*axes, Axis("token", length, family.src_strides[1], family.dst_strides[1])]
    axes = sorted(axes, key=lambda axis: -axis.dst)
    place = sum(axis.dst > family.dst_strides[0] for axis in axes)
    return axes[:place], axes[place:]


def _expand(
    family: _Family, segments: Segments, length: int, run: int, whole: bool, axes: list[Axis]
) -> Spans:
    """One row for each segment and each step of the axes that are left, outermost destination axis first."""
    src, dst = _starts(family, segments)
    nbytes = np.full(len(src), run, dtype=np.int64)
    if whole and not length:
        nbytes = segments.length * run
    elif not whole and not length:
        row = np.repeat(np.arange(len(src)), segments.length)
        step = np.arange(len(row)) - np.repeat(
            np.cumsum(segments.length) - segments.length, segments.length
        )
        src = src[row] + step * family.src_strides[1]
        dst = dst[row] + step * family.dst_strides[1]
        nbytes = nbytes[row]
    outer, inner = _nest(family, length, whole, axes)
    axes = outer + inner
    if not axes:
        return Spans(src, dst, nbytes)
    shape = [*(a.extent for a in outer), len(src), *(a.extent for a in inner)]
    place = len(outer)

    def spread(values: Int64, steps: list[int]) -> Int64:
        total = values.reshape([-1 if i == place else 1 for i in range(len(shape))])
        for i, step in enumerate(steps):
            at = i + (i >= place)
            column = np.arange(shape[at], dtype=np.int64) * step
            total = total + column.reshape([-1 if j == at else 1 for j in range(len(shape))])
        return np.broadcast_to(total, shape).reshape(-1)

    return Spans(
        spread(src, [axis.src for axis in axes]),
        spread(dst, [axis.dst for axis in axes]),
        spread(nbytes, [0] * len(axes)),
    )


def _unite(families: list[_Family], segments: Segments, layers: Int64) -> SpanGroup | None:
    """One template for unlike parts (K and V of unequal width, scales), if their distances are constant."""
    origin = families[0].bases[0]
    pieces = []
    for family in families:
        template, _ = _template(
            family,
            segments,
            [Axis("head", family.num_heads, family.src_strides[2], family.dst_strides[2])]
            if family.num_heads > 1
            else [],
        )
        for bases in family.bases:
            apart = bases - origin
            if not (apart == apart[0]).all():
                return None
            pieces.append(template.shifted(int(apart[0, 0]), int(apart[0, 1])))
    return SpanGroup(origin, Spans.concat(pieces).coalesced(), layers)


def _written_out(spans: Spans) -> SpanGroup:
    """Spans of all layers in one template, based at 0."""
    return SpanGroup(np.zeros((1, 2), np.int64), spans, np.full(1, NO_LAYER, dtype=np.int64))


def _layers_meet(group: SpanGroup) -> bool:
    """Whether the end of some span is the start of a span at the next base, on both sides."""
    template = group.template
    for (src_a, dst_a), (src_b, dst_b) in zip(group.bases[:2], group.bases[1:3], strict=False):
        meets = np.isin(template.dst + template.nbytes - (dst_b - dst_a), template.dst)
        if np.isin(template.src + template.nbytes - (src_b - src_a), template.src)[meets].any():
            return True
    return False


def _merge_across_bases(group: SpanGroup, *, by_layer: bool, limit: int) -> SpanGroup:
    """Where it is cheap to look: neighbours that meet across parts, and across layers if they may."""
    if len(group.bases) < 2 or group.num_spans > limit:
        return group
    if not by_layer:
        merged = group.template.repeated(group.bases).coalesced()
        if len(merged) < group.num_spans:
            return _written_out(merged)
        return group
    first = group.layers == group.layers[0]
    per_layer = int(first.sum())
    tables = group.bases.reshape(-1, per_layer, 2) if len(group.bases) % per_layer == 0 else None
    if per_layer < 2 or tables is None:
        return group
    apart = tables - tables[:, :1]
    if not (apart == apart[0]).all():
        return group
    merged = group.template.repeated(apart[0]).coalesced()
    if len(merged) == per_layer * len(group.template):
        return group
    return SpanGroup(tables[:, 0], merged, group.layers[::per_layer])
