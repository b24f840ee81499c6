# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Which rank sends which layers to whom: a pure function of the layouts, so that both sides agree unasked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kvxfer.errors import InvalidArgumentError, LayoutError
from kvxfer.layout.kv_layout import KVLayout
from kvxfer.layout.orders import has_two_parts
from kvxfer.layout.rules import check_equal, check_whole_blocks, must_convert

__all__ = ["check_compatible", "heads_sent", "layers_sent", "transfer_pairs"]

_EQUAL = ("group", "num_layers", "num_kv_heads", "head_dim", "head_dim_v", "format", "atom")


def check_compatible(src: KVLayout, dst: KVLayout) -> bool:
    """Refuse two layouts that cannot be mapped; True when values must be converted on the way."""
    for side, layout in (("src", src), ("dst", dst)):
        if not hasattr(layout, "head_range"):
            raise InvalidArgumentError(
                f"{side}: expected a KVLayout, given {type(layout).__name__}"
            )
    check_equal(src, dst, _EQUAL)
    if src.kind != dst.kind and not (has_two_parts(src.kind) and has_two_parts(dst.kind)):
        raise LayoutError("kind", f"source has {src.kind!r}, destination {dst.kind!r}")
    check_whole_blocks(src, dst)
    converts = must_convert(src, dst)
    if not converts and src.scales is not None and src.scales.granularity == "token":
        first, end = src.head_range
        if not (first <= dst.head_range[0] and dst.head_range[1] <= end):
            raise LayoutError(
                "scales",
                f"one scale a token covers the source's heads {src.head_range}; the destination's "
                f"{dst.head_range} would need several",
            )
    return converts


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

    Args:
        src_layouts: of all source ranks, since each sends its share only; of the destination's any will do.
    Raises:
        LayoutError: two layouts cannot be mapped; or a destination would not get all of its layers and heads,
            because source ranks are missing: it names them, the layers and the heads.
    """
    pairs = []
    for j, dst in enumerate(dst_layouts):
        for i, src in enumerate(src_layouts):
            check_equal(src, dst, _EQUAL)  # also of ranks that exchange nothing
            layers = layers_sent(src, dst, spread=spread)
            if layers:
                check_compatible(src, dst)
                pairs.append((i, j, layers))
        _check_complete(src_layouts, j, dst, [(i, layers) for i, k, layers in pairs if k == j])
    return tuple(sorted(pairs))


def _check_complete(
    sources: Sequence[KVLayout], index: int, dst: KVLayout, sent: list[tuple[int, tuple[int, ...]]]
) -> None:
    """Refuse a destination that would not get each of its heads of each of its layers."""
    wanted = set(range(*dst.head_range))
    lacking: dict[tuple[int, ...], list[int]] = {}  # heads -> layers
    for layer in dst.layers:
        got = {
            h for i, layers in sent if layer in layers for h in range(*heads_sent(sources[i], dst))
        }
        if wanted - got:
            lacking.setdefault(tuple(sorted(wanted - got)), []).append(layer)
    for heads, layers in lacking.items():
        holders = [src for src in sources if layers[0] in src.layers]
        if not holders:
            raise LayoutError("layers", f"destination {index} holds {layers}, which no source does")
        tp_size = holders[0].tp_size
        missing = sorted(set(range(tp_size)) - {src.tp_rank for src in holders})
        raise LayoutError(
            "tp_rank",
            f"destination {index} (rank {dst.tp_rank} of {dst.tp_size}) would get no heads {list(heads)} of layers "
            f"{layers}: of the {tp_size} source ranks of these layers {missing} are missing; give the layouts of all",
        )
