# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Byte spans between two layouts, kept factored: a template of spans, repeated at a table of bases.

Loops run over parts and over two classes of segments (full length, the rest); spans are NumPy rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvxfer.errors import InvalidArgumentError
from kvxfer.layout.kv_layout import KVLayout
from kvxfer.layout.parts import KVPart
from kvxfer.layout.segments import Int64, Segments

__all__ = ["NO_LAYER", "Side", "SpanGroup", "Spans", "build_groups"]

NO_LAYER = (
    -1
)  # in SpanGroup.layers: this base covers several layers, because their spans have merged

# Below this many spans a plan is written out to look for neighbours across bases.
_MERGE_LIMIT = 4096
_MERGE_LIMIT_UNLIKE = (
    1 << 20
)  # K and V of unequal width: only there is it the sole way to find them


@dataclass(frozen=True, eq=False)
class Spans:
    """Rows of (source offset, destination offset, length)."""

    src: Int64
    dst: Int64
    nbytes: Int64

    def __len__(self) -> int:
        return len(self.nbytes)

    @staticmethod
    def concat(pieces: Sequence[Spans]) -> Spans:
        return Spans(
            np.concatenate([piece.src for piece in pieces]),
            np.concatenate([piece.dst for piece in pieces]),
            np.concatenate([piece.nbytes for piece in pieces]),
        )

    def shifted(self, src: int, dst: int) -> Spans:
        return Spans(self.src + src, self.dst + dst, self.nbytes) if src or dst else self

    def repeated(self, bases: Int64) -> Spans:
        """The template written out at each base."""
        if len(bases) == 1:
            return self.shifted(int(bases[0, 0]), int(bases[0, 1]))
        return Spans(
            np.add.outer(bases[:, 0], self.src).ravel(),
            np.add.outer(bases[:, 1], self.dst).ravel(),
            np.tile(self.nbytes, len(bases)),
        )

    def coalesced(self) -> Spans:
        """In destination order, neighbours that continue each other on both sides made one."""
        src, dst, nbytes = self.src, self.dst, self.nbytes
        if len(nbytes) < 2:
            return self
        if not (dst[1:] > dst[:-1]).all():
            order = np.argsort(dst, kind="stable")
            src, dst, nbytes = src[order], dst[order], nbytes[order]
        breaks = (dst[1:] != dst[:-1] + nbytes[:-1]) | (src[1:] != src[:-1] + nbytes[:-1])
        starts = np.concatenate(([0], np.flatnonzero(breaks) + 1))
        if len(starts) == len(nbytes):
            return Spans(src, dst, nbytes)
        return Spans(src[starts], dst[starts], np.add.reduceat(nbytes, starts))


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
        return len(self.bases) * int(self.template.nbytes.sum())

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


@dataclass(frozen=True)
class _Axis:
    name: str  # "token", "head", "part", "layer"
    extent: int
    src: int
    dst: int


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
        limit = _MERGE_LIMIT_UNLIKE if not by_layer and _layers_meet(united) else _MERGE_LIMIT
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
    axes = [_Axis("head", family.num_heads, family.src_strides[2], family.dst_strides[2])]
    if len(parts) > 1:
        apart = parts[1] - parts[0]
        if len(parts) == 2 and (apart == apart[0]).all():
            axes.append(_Axis("part", 2, int(apart[0, 0]), int(apart[0, 1])))
    if len(layers) > 1 and not by_layer:
        step = _constant_step(parts[0])
        same = all((np.diff(part, axis=0) == step).all() for part in parts) if step else False
        if step is not None and same:
            axes.append(_Axis("layer", len(layers), *step))
    template, absorbed = _template(family, segments, [axis for axis in axes if axis.extent > 1])
    if "part" in absorbed:
        parts = parts[:1]
    table, ids = np.stack(parts, axis=1), np.repeat(layers[:, None], len(parts), axis=1)
    if "layer" in absorbed:
        table, ids = table[:1], np.full((1, len(parts)), NO_LAYER, dtype=np.int64)
    return SpanGroup(table.reshape(-1, 2), template, ids.reshape(-1))


def _template(family: _Family, segments: Segments, axes: list[_Axis]) -> tuple[Spans, set[str]]:
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
        _expand(
            family, chosen, length, run, whole, [a for a in left if a.name not in outer - absorbed]
        )
        for chosen, length, run, whole, left in collapsed
    ]
    return Spans.concat(pieces).coalesced(), absorbed


def _names(axes: list[_Axis]) -> set[str]:
    return {axis.name for axis in axes}


def _collapse(family: _Family, axes: list[_Axis], length: int) -> tuple[int, bool, list[_Axis]]:
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


def _expand(
    family: _Family, segments: Segments, length: int, run: int, whole: bool, axes: list[_Axis]
) -> Spans:
    """One row for each segment and each step of the axes that are left, outermost destination axis first."""
    src = segments.src_block * family.src_strides[0] + segments.src_slot * family.src_strides[1]
    dst = segments.dst_block * family.dst_strides[0] + segments.dst_slot * family.dst_strides[1]
    nbytes = np.full(len(src), run, dtype=np.int64)
    if whole and not length:
        nbytes = segments.length * run
    elif not whole and length:
        axes = [*axes, _Axis("token", length, family.src_strides[1], family.dst_strides[1])]
    elif not whole:
        row = np.repeat(np.arange(len(src)), segments.length)
        step = np.arange(len(row)) - np.repeat(
            np.cumsum(segments.length) - segments.length, segments.length
        )
        src = src[row] + step * family.src_strides[1]
        dst = dst[row] + step * family.dst_strides[1]
        nbytes = nbytes[row]
    if not axes:
        return Spans(src, dst, nbytes)
    # Nested as the destination is, the rows come out sorted, and neighbours stand beside each other.
    axes = sorted(axes, key=lambda axis: -axis.dst)
    place = sum(axis.dst > family.dst_strides[0] for axis in axes)
    shape = [axis.extent for axis in axes]
    shape.insert(place, len(src))

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
            [_Axis("head", family.num_heads, family.src_strides[2], family.dst_strides[2])]
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
