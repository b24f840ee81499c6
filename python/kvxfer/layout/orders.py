# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""From the name of a physical axis order to byte strides and bases."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from kvxfer.errors import LayoutError
from kvxfer.layout.parts import KVPart

__all__ = [
    "check_kind",
    "check_order",
    "check_strides",
    "has_two_parts",
    "kind_of_order",
    "order_from_strides",
    "parts_from_order",
]

AXES = "LBKNHC"


def has_two_parts(kind: str) -> bool:
    return kind in ("split", "fused")


def kind_of_order(order: str) -> str:
    """``fused`` where K and V share a row, ``split`` where they do not, ``mla`` without a K axis."""
    if "K" not in order:
        return "mla"
    return "fused" if order.endswith("KC") else "split"


def check_kind(kind: str) -> None:
    if kind not in ("split", "fused", "mla", "state"):
        raise LayoutError("kind", f"{kind!r} is not one of 'split', 'fused', 'mla', 'state'")


def check_order(order: str, kind: str, field: str = "order") -> None:
    """Refuse what is not an order of this kind's axes, outermost first and channels last."""
    known = isinstance(order, str) and set(order) <= set(AXES) and len(set(order)) == len(order)
    if not known:
        raise LayoutError(
            field,
            f"{order!r} must name each axis once, from L (layer) B (block) K (K or V) N (token) H (head) C (channel)",
        )
    optional = {"mla": "H", "state": "NH"}.get(kind, "")
    required = set(AXES) - set(optional) - (set() if has_two_parts(kind) else {"K"})
    missing = [axis for axis in AXES if axis in required and axis not in order]
    if missing:
        raise LayoutError(
            field, f"{order!r} lacks {', '.join(missing)}, which a cache of kind {kind!r} has"
        )
    if "K" in order and not has_two_parts(kind):
        raise LayoutError(field, f"{order!r} has K, but a cache of kind {kind!r} is a single part")
    if order[-1] != "C":
        raise LayoutError(
            field,
            f"{order!r} must end in C: channels are contiguous; K packed as [D/x, N, x] is opaque (atom='block')",
        )


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def parts_from_order(
    order: str,
    widths: Sequence[tuple[str, int, str]],
    extents: dict[str, int],
    *,
    itemsize: int,
    offset: int = 0,
    block_align: int = 1,
    layer_align: int = 1,
    per_head: bool = True,
) -> tuple[KVPart, ...]:
    """Lay ``widths`` (name, elements, dtype) out densely in ``order``; ``extents`` gives L, B, N, H.

    Axes within K are sized for their own part, axes outside it for the sum of the parts.
    """
    sizes = [width * itemsize for _, width, _ in widths]
    starts = [0] * len(sizes)
    strides: list[dict[str, int]] = [{} for _ in sizes]
    for axis in reversed(order[:-1]):
        if axis == "K":
            starts = [sum(sizes[:i]) for i in range(len(sizes))]
            sizes = [sum(sizes)] * len(sizes)
            continue
        align = {"B": block_align, "L": layer_align}.get(axis, 1)
        for i, size in enumerate(sizes):
            strides[i][axis] = _round_up(size, align)
            sizes[i] = strides[i][axis] * extents[axis]
    return tuple(
        KVPart(
            name=name,
            width=width,
            dtype=dtype,
            stride_block=strides[i]["B"],
            stride_token=strides[i].get("N", 0),
            stride_head=strides[i].get("H", 0),
            bases=tuple(
                offset + starts[i] + layer * strides[i]["L"] for layer in range(extents["L"])
            ),
            per_head=per_head,
        )
        for i, (name, width, dtype) in enumerate(widths)
    )


def check_strides(
    order: str, parts: Sequence[KVPart], extents: dict[str, int], field: str = "order"
) -> None:
    """Refuse strides and bases that do not nest as ``order`` says: its signature would vouch for other bytes.

    Strides may be wider than dense ones (``block_align``, ``layer_align``).
    """
    reach = [part.row_nbytes for part in parts]  # bytes from an element's start to its end
    for axis in reversed(order[:-1]):
        if axis == "K":
            apart = parts[1].bases[0] - parts[0].bases[0]
            _check_nested(field, order, axis, apart, reach[0])
            reach = [apart + reach[1]] * 2
            continue
        for i, part in enumerate(parts):
            if extents[axis] == 1:
                continue
            for stride in _strides(part, axis):
                _check_nested(field, order, axis, stride, reach[i])
            reach[i] += (extents[axis] - 1) * _strides(part, axis)[0]


def _strides(part: KVPart, axis: str) -> Sequence[int]:
    if axis == "L":
        return [after - before for before, after in pairwise(part.bases)]
    return [{"B": part.stride_block, "N": part.stride_token, "H": part.stride_head}[axis]]


def _check_nested(field: str, order: str, axis: str, stride: int, inside: int) -> None:
    if stride < inside:
        raise LayoutError(
            field,
            f"{order!r} puts {inside} bytes inside each step along {axis}, but the parts take {stride} bytes for "
            'one: give the order that the strides have, or "" for none',
        )


def order_from_strides(parts: Sequence[KVPart], extents: dict[str, int]) -> str:
    """The order that ``from_order`` would need for the same bytes, or ``""`` if none gives them.

    Axes of extent 1 are put where they are outermost among equals: their strides mean nothing.
    """
    first = parts[0]
    place = {"B": first.stride_block, "N": first.stride_token, "H": first.stride_head}
    if len(first.bases) > 1:
        place["L"] = first.bases[1] - first.bases[0]
    if len(parts) > 1:
        place["K"] = parts[1].bases[0] - first.bases[0]
    axes = [axis for axis in "LBKNH" if axis != "K" or len(parts) > 1]
    moving = [axis for axis in axes if axis == "K" or extents[axis] > 1]
    moving.sort(key=lambda axis: -place[axis])
    # Extent-1 axes can stand anywhere; the customary place keeps one name for one arrangement.
    for axis in axes:
        if axis not in moving:
            before = [a for a in "LBNH"[: "LBNH".index(axis)] if a in moving]
            moving.insert(moving.index(before[-1]) + 1 if before else 0, axis)
    order = "".join(moving) + "C"
    widths = [(part.name, part.width, part.dtype) for part in parts]
    dense = parts_from_order(order, widths, extents, itemsize=first.itemsize, offset=first.bases[0])
    same = all(
        ours.bases == theirs.bases
        and all(
            extents[axis] == 1 or getattr(ours, name) == getattr(theirs, name)
            for axis, name in (("B", "stride_block"), ("N", "stride_token"), ("H", "stride_head"))
        )
        for ours, theirs in zip(dense, parts, strict=True)
    )
    return order if same else ""
