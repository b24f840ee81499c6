# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""``plan_transfer``: the composition of one layout with the inverse of another."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from kvxfer.errors import InvalidArgumentError, LayoutError
from kvxfer.layout.cost import CostModel, cost_model, packed_cost_s, spans_cost_s
from kvxfer.layout.describe import describe
from kvxfer.layout.kv_layout import KVLayout
from kvxfer.layout.pairs import check_compatible, heads_sent, layers_sent
from kvxfer.layout.parts import as_int
from kvxfer.layout.rows import Spans
from kvxfer.layout.rules import check_whole_tokens
from kvxfer.layout.segments import Int64, Segments, block_ids, make_segments
from kvxfer.layout.spans import Side, SpanGroup, build_groups
from kvxfer.layout.staging import gathered_layout, packed_groups, packed_layout, packed_nbytes

__all__ = ["KINDS", "TransferPlan", "plan_transfer"]

KINDS = ("direct", "gathered", "packed")


@dataclass(frozen=True, eq=False)
class TransferPlan:
    """Which bytes go where, factored: ``bases`` x ``template``. Give ``engine.write`` both as they are.

    ``direct``: spans from the source's region to the destination's. ``gathered``: the source first copies
    into staging laid out by ``wire_layout`` (``kvxfer.kernels.pack_plan``), and source offsets count in that.
    ``packed``: both ends have staging of ``wire_layout``, both offsets count in it, and the receiver unpacks
    (``unpack_plan``).

    Attributes:
        layers, heads: what this pair of ranks moves, heads as ``[first, end)`` of the model.
        groups: more than one only when K and V have no common template (unequal width or strides, at
            distances that differ from layer to layer) and the plan is by layer.
        wire_layout: of the staging; its heads are ``heads``, counted from 0.
        staging_nbytes: bytes of staging at the (source, destination).
        convert: values change on the way (dtype or scales), so the bytes alone do not say it.
        cost_s: estimated seconds of each kind considered, on ``cost_path``.
    """

    src: KVLayout = field(repr=False)
    dst: KVLayout = field(repr=False)
    kind: str
    layers: tuple[int, ...]
    heads: tuple[int, int]
    first_token: int
    num_tokens: int
    by_layer: bool
    convert: bool
    groups: tuple[SpanGroup, ...] = field(repr=False)
    wire_layout: KVLayout | None
    staging_nbytes: tuple[int, int]
    cost_s: dict[str, float]
    cost_path: str
    src_blocks: Int64 = field(repr=False)
    dst_blocks: Int64 = field(repr=False)

    @property
    def num_spans(self) -> int:
        return sum(group.num_spans for group in self.groups)

    @cached_property
    def total_nbytes(self) -> int:
        return sum(group.total_nbytes for group in self.groups)

    @property
    def template(self) -> tuple[Int64, Int64, Int64]:
        """(source offsets, destination offsets, nbytes), relative to each row of ``bases``."""
        group = self._only_group()
        return group.template.src, group.template.dst, group.template.nbytes

    @property
    def bases(self) -> Int64:
        """int64 ``[m, 2]``: where the template is repeated, (source, destination)."""
        return self._only_group().bases

    def for_layer(self, layer: int) -> Int64:
        """The rows of ``bases`` that carry ``layer``; none if this pair of ranks does not send it."""
        if layer in self.layers:
            return self._only_group().for_layer(layer)
        if layer in self.src.layers or layer in self.dst.layers:
            return np.empty((0, 2), dtype=np.int64)
        raise InvalidArgumentError(f"layer: {layer} is held by neither side of this plan")

    @cached_property
    def _materialized(self) -> tuple[Int64, Int64, Int64]:
        spans = [group.template.repeated(group.bases) for group in self.groups]
        if not spans:
            empty = np.empty(0, np.int64)
            return empty, empty, empty
        if len(spans) == 1:
            return spans[0].src, spans[0].dst, spans[0].nbytes
        return (
            np.concatenate([s.src for s in spans]),
            np.concatenate([s.dst for s in spans]),
            np.concatenate([s.nbytes for s in spans]),
        )

    @property
    def src_offsets(self) -> Int64:
        """Every span's source offset; written out on first use."""
        return self._materialized[0]

    @property
    def dst_offsets(self) -> Int64:
        return self._materialized[1]

    @property
    def nbytes(self) -> Int64:
        return self._materialized[2]

    @cached_property
    def pack_groups(self) -> tuple[SpanGroup, ...]:
        """Spans from the source's region to ``wire_layout``: what the pack kernel does, and its oracle."""
        return self._staging_groups(packing=True)

    @cached_property
    def unpack_groups(self) -> tuple[SpanGroup, ...]:
        """Spans from ``wire_layout`` to the destination's region; of a gathered plan, its own spans."""
        return self._staging_groups(packing=False)

    @property
    def staging_origin(self) -> int:
        """The token at which the staging's blocks begin; of a direct plan, which has none, ``first_token``."""
        if self.kind != "gathered":
            return self.first_token
        size = self.dst.block_size
        return self.first_token // size * size

    def describe(self) -> str:
        """The plan for a person: sides, spans, kind, and why that kind."""
        return describe(self)

    def _only_group(self) -> SpanGroup:
        if len(self.groups) == 1:
            return self.groups[0]
        if not self.groups:
            empty = np.empty(0, np.int64)
            return SpanGroup(np.empty((0, 2), np.int64), Spans(empty, empty, empty), empty)
        raise InvalidArgumentError(
            f"this plan has {len(self.groups)} groups (parts without a common template): use plan.groups"
        )

    def _staging_groups(self, *, packing: bool) -> tuple[SpanGroup, ...]:
        wire = self.wire_layout
        if wire is None:
            raise InvalidArgumentError("a direct plan has no staging")
        if self.convert and packing:
            raise InvalidArgumentError("packing converts values here: no byte spans can say how")
        ids = np.arange(wire.num_blocks, dtype=np.int64)
        origin = self.staging_origin
        staging = Side(wire, self.heads[0])
        if packing:
            ends = (Side(self.src, self.src.head_range[0]), staging)
            segments = _segments(
                ends,
                self.src_blocks,
                ids,
                self.first_token,
                self.num_tokens,
                dst_origin=origin,
                skip_src_holes=True,
            )
        else:
            ends = (staging, Side(self.dst, self.dst.head_range[0]))
            segments = _segments(
                ends, ids, self.dst_blocks, self.first_token, self.num_tokens, src_origin=origin
            )
        return build_groups(*ends, segments, self.layers, self.heads, by_layer=self.by_layer)


def plan_transfer(
    src: KVLayout,
    dst: KVLayout,
    src_blocks: Any,
    dst_blocks: Any,
    num_tokens: int | None = None,
    layers: Iterable[int] | None = None,
    *,
    first_token: int = 0,
    by_layer: bool = False,
    spread: bool = True,
    kind: str = "auto",
    cost: CostModel | str | None = None,
) -> TransferPlan:
    """Which bytes of ``src``'s region go where in ``dst``'s so that tokens ``[first_token, num_tokens)`` move.

    Args:
        src_blocks, dst_blocks: block ids from token 0 of the sequence on. A destination id of -1 leaves
            its tokens out.
        num_tokens: end of the range, counted from token 0; None for all that both lists hold.
        layers: ids to move; None for those that both ranks hold.
        by_layer: keep layers apart, so that ``for_layer`` works; a layer-by-layer push needs it.
        spread: share the layers among source ranks that hold the same heads.
        kind: ``direct``, ``gathered``, ``packed``, or ``auto`` for the cheapest by ``cost``, but direct
            below ``CostModel.pack_from_nbytes`` (1 MiB), where a kernel would wait for its turn.
        cost: a path's name (``shm``, ``tcp``, ``verbs``, ...) or a :class:`CostModel`; None for tcp.

    Raises:
        LayoutError: the layouts cannot be mapped; ``.field`` names the first that differs.
        InvalidArgumentError: a block id or a length is wrong; the message gives its index.
    """
    if kind not in ("auto", *KINDS):
        raise InvalidArgumentError(
            f"kind: {kind!r} is not one of 'auto', 'direct', 'gathered', 'packed'"
        )
    convert = check_compatible(src, dst)
    if convert and kind == "direct":
        raise LayoutError(
            "dtype" if src.dtype != dst.dtype else "scales",
            f"source has {src.dtype}, {src.scales}, destination {dst.dtype}, {dst.scales}: values must be "
            "converted, which a direct plan cannot; use kind='auto'",
        )
    src_ids, dst_ids = block_ids("src_blocks", src_blocks), block_ids("dst_blocks", dst_blocks)
    first_token, num_tokens = _token_range(src, dst, src_ids, dst_ids, first_token, num_tokens)
    sent, heads = layers_sent(src, dst, layers, spread=spread), heads_sent(src, dst)
    ends = (Side(src, src.head_range[0]), Side(dst, dst.head_range[0]))
    segments = _segments(ends, src_ids, dst_ids, first_token, num_tokens)
    model = cost_model(cost)
    direct = TransferPlan(
        src=src,
        dst=dst,
        kind="direct",
        layers=sent,
        heads=heads,
        first_token=first_token,
        num_tokens=num_tokens,
        by_layer=by_layer,
        convert=convert,
        groups=() if convert else build_groups(*ends, segments, sent, heads, by_layer=by_layer),
        wire_layout=None,
        staging_nbytes=(0, 0),
        cost_s={},
        cost_path=model.path,
        src_blocks=src_ids,
        dst_blocks=dst_ids,
    )
    if not convert:
        direct.cost_s["direct"] = spans_cost_s(direct.groups, model)
    empty = not len(segments) or not sent or heads[0] >= heads[1]
    if empty or kind == "direct":
        return direct
    if kind == "auto" and not convert and _direct_wins(direct, model):
        return direct
    costs = dict(direct.cost_s)
    if kind in ("auto", "gathered"):
        gathered, costs["gathered"] = _gathered(direct, model)
    if kind in ("auto", "packed"):
        nbytes = packed_nbytes(dst, sent, heads, num_tokens - first_token)
        costs["packed"] = packed_cost_s(nbytes, 2, model)
    best = min(costs, key=lambda name: costs[name]) if kind == "auto" else kind
    if best == "direct":
        return replace(direct, cost_s=costs)
    return replace(gathered if best == "gathered" else _packed(direct), cost_s=costs)


def _token_range(
    src: KVLayout,
    dst: KVLayout,
    src_ids: Int64,
    dst_ids: Int64,
    first_token: int,
    num_tokens: int | None,
) -> tuple[int, int]:
    held = min(len(src_ids) * src.block_size, len(dst_ids) * dst.block_size)
    end = held if num_tokens is None else as_int("num_tokens", num_tokens, minimum=0)
    first = as_int("first_token", first_token, minimum=0)
    if first > end:
        raise InvalidArgumentError(f"first_token: {first} lies past num_tokens {end}")
    for name, ids, layout in (("src_blocks", src_ids, src), ("dst_blocks", dst_ids, dst)):
        if end > first and len(ids) * layout.block_size < end:
            needed = -(-end // layout.block_size)
            raise InvalidArgumentError(f"{name}: has {len(ids)} ids, {end} tokens need {needed}")
    check_whole_tokens(src, first, end)
    return first, end


def _segments(
    ends: tuple[Side, Side],
    src_ids: Int64,
    dst_ids: Int64,
    first_token: int,
    num_tokens: int,
    **how: Any,
) -> Segments:
    src, dst = ends[0].layout, ends[1].layout
    return make_segments(
        src_ids,
        dst_ids,
        src.block_size,
        dst.block_size,
        first_token,
        num_tokens,
        src_num_blocks=src.num_blocks,
        dst_num_blocks=dst.num_blocks,
        **how,
    )


def _direct_wins(direct: TransferPlan, model: CostModel) -> bool:
    """Without working the others out: little data, or spans that one packed copy could not beat."""
    nbytes = direct.total_nbytes
    return nbytes < model.pack_from_nbytes or direct.cost_s["direct"] <= packed_cost_s(
        nbytes, 1, model
    )


def _gathered(direct: TransferPlan, model: CostModel) -> tuple[TransferPlan, float]:
    """The gathered form of ``direct`` and its cost."""
    first, end, size = direct.first_token, direct.num_tokens, direct.dst.block_size
    num_blocks = -(-end // size) - first // size
    wire = gathered_layout(direct.dst, direct.layers, direct.heads, num_blocks)
    plan = replace(direct, kind="gathered", wire_layout=wire, staging_nbytes=(wire.nbytes, 0))
    plan = replace(plan, groups=plan.unpack_groups)
    nbytes = plan.total_nbytes
    spans = spans_cost_s(plan.groups, model)
    return plan, spans + packed_cost_s(nbytes, 1, model) - nbytes / model.bytes_per_s


def _packed(direct: TransferPlan) -> TransferPlan:
    """The packed form of ``direct``."""
    num_tokens = direct.num_tokens - direct.first_token
    wire = packed_layout(direct.dst, direct.layers, direct.heads, num_tokens)
    return replace(
        direct,
        kind="packed",
        groups=packed_groups(wire, direct.heads, by_layer=direct.by_layer),
        wire_layout=wire,
        staging_nbytes=(wire.nbytes, wire.nbytes),
    )
