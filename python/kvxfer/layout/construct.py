# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""The two ways to make a layout: from the name of an order, and from tensors that exist."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kvxfer.errors import LayoutError
from kvxfer.layout.dtypes import itemsize_of
from kvxfer.layout.orders import (
    check_kind,
    check_order,
    has_two_parts,
    kind_of_order,
    order_from_strides,
    parts_from_order,
)
from kvxfer.layout.parts import MAX_LAYERS, KVPart, KVScales, as_int, check_scales
from kvxfer.layout.tensors import parts_from_tensors
from kvxfer.layout.validate import check_heads, part_names

if TYPE_CHECKING:
    from kvxfer.layout.kv_layout import KVLayout

__all__ = ["layout_from_order", "layout_from_tensors"]


def layout_from_order(
    cls: type[KVLayout],
    *,
    order: str,
    num_blocks: int,
    block_size: int,
    dtype: str,
    offset: int,
    block_align: int,
    layer_align: int,
    scales: KVScales | None,
    kind: str | None,
    **rest: Any,
) -> KVLayout:
    """See :meth:`KVLayout.from_order`."""
    kind = kind if kind is not None else _told_kind(order, rest["num_kv_heads"])
    check_kind(kind)
    check_order(order, kind)
    shape = _Shape(kind=kind, dtype=dtype, **rest)
    extents = {
        "L": len(shape.layers),
        "B": as_int("num_blocks", num_blocks, minimum=1),
        "N": as_int("block_size", block_size, minimum=1),
        "H": shape.heads_here,
    }
    for axis, field in (("N", "block_size"), ("H", "num_kv_heads")):
        if axis not in order and extents[axis] > 1:
            raise LayoutError(
                "order", f"{order!r} lacks {axis}, but {field} here is {extents[axis]}"
            )
    parts = parts_from_order(
        order,
        shape.widths,
        extents,
        itemsize=itemsize_of(dtype),
        offset=as_int("offset", offset, minimum=0),
        block_align=as_int("block_align", block_align, minimum=1),
        layer_align=as_int("layer_align", layer_align, minimum=1),
    )
    parts += _scale_parts(scales, kind, extents)
    return cls(
        order=order,
        num_blocks=num_blocks,
        block_size=block_size,
        parts=parts,
        scales=scales,
        **shape.fields,
    )


def layout_from_tensors(
    cls: type[KVLayout],
    *,
    tensors: Any,
    axes: str,
    dtype: str,
    block_size: int | None,
    region: Any,
    scales: KVScales | None,
    kind: str | None,
    **rest: Any,
) -> KVLayout:
    """See :meth:`KVLayout.from_tensors`."""
    if kind is None:
        kind = "fused" if axes.endswith("KC") else "split"
    check_kind(kind)
    shape = _Shape(kind=kind, dtype=dtype, **rest)
    found = parts_from_tensors(
        tensors,
        axes,
        shape.widths,
        kind=kind,
        num_layers=len(shape.layers),
        block_size=block_size,
        region=region,
    )
    heads = found.extents["H"]
    if heads != shape.heads_here:
        raise LayoutError(
            "num_kv_heads",
            f"the tensors have {heads} heads, this rank's share is {shape.heads_here}",
        )
    order = order_from_strides(found.parts, found.extents) if axes else ""
    parts = found.parts + _scale_parts(scales, kind, found.extents)
    return cls(
        order=order,
        num_blocks=found.extents["B"],
        block_size=found.extents["N"],
        parts=parts,
        scales=scales,
        **shape.fields,
    )


def _told_kind(order: str, num_kv_heads: int) -> str:
    kind = kind_of_order(order)
    if kind == "mla" and num_kv_heads != 1:
        raise LayoutError(
            "order",
            f"{order!r} has no K axis, which only a single-part cache of one head may lack; vLLM's fused "
            "names (KVLayout.vllm) put K before C",
        )
    return kind


class _Shape:
    """The fields that do not depend on where bytes lie, with their defaults resolved."""

    def __init__(
        self,
        *,
        kind: str,
        dtype: str,
        num_kv_heads: int,
        head_dim: int,
        num_layers: int | None,
        layers: Iterable[int] | None,
        head_dim_v: int | None,
        tp_rank: int,
        tp_size: int,
        format: str,
        atom: str,
        group: str,
    ) -> None:
        if num_layers is None:
            raise LayoutError(
                "num_layers",
                "how many layers the model has (in this group) must be told: a rank's tensors may hold "
                "some of them only; give num_layers=",
            )
        num_layers = as_int("num_layers", num_layers, minimum=1, maximum=MAX_LAYERS)
        self.layers = tuple(
            range(num_layers)
            if layers is None
            else (as_int("layers", x, minimum=0) for x in layers)
        )
        two = has_two_parts(kind)
        head_dim = as_int("head_dim", head_dim, minimum=1)
        if head_dim_v is None:
            head_dim_v = head_dim if two else 0
        num_kv_heads = as_int("num_kv_heads", num_kv_heads, minimum=1)
        tp_rank = as_int("tp_rank", tp_rank, minimum=0)
        tp_size = as_int("tp_size", tp_size, minimum=1)
        check_heads(num_kv_heads, tp_rank, tp_size)
        self.heads_here = max(1, num_kv_heads // tp_size)
        self.widths = [
            (name, as_int("head_dim_v", head_dim_v, minimum=1) if name == "v" else head_dim, dtype)
            for name in part_names(kind)
        ]
        self.fields: dict[str, Any] = {
            "kind": kind,
            "dtype": dtype,
            "num_layers": num_layers,
            "layers": self.layers,
            "num_kv_heads": num_kv_heads,
            "head_dim": head_dim,
            "head_dim_v": head_dim_v,
            "tp_rank": tp_rank,
            "tp_size": tp_size,
            "format": format,
            "atom": atom,
            "group": group,
        }


def _scale_parts(scales: KVScales | None, kind: str, extents: dict[str, int]) -> tuple[KVPart, ...]:
    check_scales(scales)
    if scales is None or scales.is_fixed:
        return ()
    per_head = scales.granularity == "token_head"
    if not scales.order:
        raise LayoutError(
            "scales.order", "scales in memory need the order of their axes, e.g. 'LKBHN'"
        )
    order = scales.order + "C"
    if not per_head and "H" in order:
        raise LayoutError(
            "scales.order", f"{scales.order!r} has H, but one scale serves all heads of a token"
        )
    # The head axis is put back where it has no effect, so that one rule checks every order.
    check_order(order if per_head else order.replace("C", "HC"), kind, "scales.order")
    widths = [(f"{name}_scale", 1, scales.dtype) for name in part_names(kind)]
    parts = parts_from_order(
        order,
        widths,
        extents if per_head else {**extents, "H": 1},
        itemsize=itemsize_of(scales.dtype),
        offset=scales.offset,
        per_head=per_head,
    )
    return tuple(replace(part, per_head=per_head) for part in parts)
