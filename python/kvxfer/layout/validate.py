# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""What must hold of a layout, checked once when it is made."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvxfer.errors import LayoutError
from kvxfer.layout.aliasing import Axis, Extent, check_disjoint
from kvxfer.layout.dtypes import itemsize_of
from kvxfer.layout.orders import check_kind, check_order, check_strides, has_two_parts
from kvxfer.layout.parts import MAX_BLOCK_SIZE, MAX_HEADS, MAX_LAYERS, as_int, check_scales

if TYPE_CHECKING:
    from kvxfer.layout.kv_layout import KVLayout
    from kvxfer.layout.parts import KVPart

__all__ = ["check_heads", "normalize", "part_names", "validate"]

_MAXIMUM = {"num_layers": MAX_LAYERS, "num_kv_heads": MAX_HEADS, "tp_size": MAX_HEADS}
_MAX_NBYTES = 1 << 60

_MINIMUM = {
    "num_layers": 1,
    "num_blocks": 1,
    "block_size": 1,
    "num_kv_heads": 1,
    "head_dim": 1,
    "head_dim_v": 0,
    "tp_rank": 0,
    "tp_size": 1,
}


def normalize(layout: KVLayout) -> None:
    """Bring every number to a Python int and every sequence to a tuple."""
    for name, minimum in _MINIMUM.items():
        value = getattr(layout, name)
        object.__setattr__(
            layout, name, as_int(name, value, minimum=minimum, maximum=_MAXIMUM.get(name))
        )
    layers = tuple(as_int("layers", layer, minimum=0) for layer in layout.layers)
    object.__setattr__(layout, "layers", layers)
    object.__setattr__(layout, "parts", tuple(layout.parts))


def part_names(kind: str) -> tuple[str, ...]:
    return ("k", "v") if has_two_parts(kind) else ("latent",) if kind == "mla" else ("state",)


def check_heads(num_kv_heads: int, tp_rank: int, tp_size: int) -> None:
    """Ranks share heads evenly, or heads are replicated evenly over ranks."""
    if tp_rank >= tp_size:
        raise LayoutError("tp_rank", f"{tp_rank} is not below tp_size {tp_size}")
    small, large = sorted((num_kv_heads, tp_size))
    if large % small:
        raise LayoutError(
            "tp_size",
            f"{tp_size} ranks cannot share {num_kv_heads} KV heads: one must divide the other",
        )


def validate(layout: KVLayout) -> None:
    """Raise ``LayoutError`` naming the first field that contradicts the others."""
    _check_fields(layout)
    _check_parts(layout)
    if layout.nbytes > _MAX_NBYTES:
        raise LayoutError("num_blocks", f"{layout.nbytes} bytes of cache are beyond any memory")
    _check_order_of_parts(layout)
    check_disjoint([extent for part in layout.parts for extent in _extents(layout, part)])


def _extents(layout: KVLayout, part: KVPart) -> list[Extent]:
    moving = sorted(layout.part_axes(part), key=lambda axis: -axis[1])
    axes, row = tuple(Axis(*axis) for axis in moving), part.row_nbytes
    return [
        Extent(f"{part.name}[layer {layer}]", base, row, axes)
        for layer, base in zip(layout.layers, part.bases, strict=True)
    ]


def _check_fields(layout: KVLayout) -> None:
    check_kind(layout.kind)
    if layout.order:
        check_order(layout.order, layout.kind)
    itemsize_of(layout.dtype)
    # A packed buffer is one block of all its tokens, so the limit binds only what is truly paged.
    if layout.block_size > MAX_BLOCK_SIZE and layout.num_blocks > 1:
        raise LayoutError("block_size", f"{layout.block_size} is not within 1 to {MAX_BLOCK_SIZE}")
    if not layout.layers or any(
        a >= b for a, b in zip(layout.layers, layout.layers[1:], strict=False)
    ):
        raise LayoutError("layers", f"needs ascending ids, each once, not {layout.layers}")
    if layout.layers[-1] >= layout.num_layers:
        raise LayoutError(
            "layers", f"{layout.layers[-1]} is not a layer of a model of {layout.num_layers}"
        )
    check_heads(layout.num_kv_heads, layout.tp_rank, layout.tp_size)
    if not has_two_parts(layout.kind):
        if layout.head_dim_v:
            raise LayoutError(
                "head_dim_v", f"{layout.head_dim_v} must be 0: {layout.kind} has no V"
            )
        if layout.num_kv_heads != 1 and layout.kind == "mla":
            raise LayoutError(
                "num_kv_heads", f"{layout.num_kv_heads} must be 1: a latent has no heads"
            )
    elif not layout.head_dim_v:
        raise LayoutError("head_dim_v", "0 leaves no room for V; kind='mla' has a single part")
    if layout.atom not in ("element", "token", "block"):
        raise LayoutError("atom", f"{layout.atom!r} is not one of 'element', 'token', 'block'")
    if layout.format != "plain" and layout.atom == "element":
        raise LayoutError(
            "atom", f"format {layout.format!r} must say what may be cut: 'token' or 'block'"
        )
    for field in ("format", "group"):
        if not isinstance(getattr(layout, field), str):
            raise LayoutError(field, f"a string is needed, not {getattr(layout, field)!r}")


def _check_order_of_parts(layout: KVLayout) -> None:
    extents = {"L": len(layout.layers), "B": layout.num_blocks, "N": layout.block_size}
    values = [part for part in layout.parts if not part.is_scale]
    scales = [part for part in layout.parts if part.is_scale]
    if layout.order:
        check_strides(layout.order, values, extents | {"H": layout.num_kv_heads_here})
    if scales and layout.scales is not None and layout.scales.order:
        heads = layout.part_heads(scales[0])
        check_strides(layout.scales.order + "C", scales, extents | {"H": heads}, "scales.order")


def _check_parts(layout: KVLayout) -> None:
    names = list(part_names(layout.kind))
    scales = layout.scales
    check_scales(scales)
    if scales is not None:
        if layout.dtype == "uint8":
            raise LayoutError("scales", "rows of dtype uint8 are opaque and carry no scales")
        if not scales.is_fixed:
            names += [f"{name}_scale" for name in names]
        elif has_two_parts(layout.kind) != (scales.v is not None):
            raise LayoutError(
                "scales.v", f"kind {layout.kind!r} needs v= exactly where it has a V part"
            )
        else:
            heads = layout.num_kv_heads if scales.granularity == "head" else 1
            for field, values in (("k", scales.k), ("v", scales.v)):
                if values is not None and len(values) not in (heads, heads * layout.num_layers):
                    raise LayoutError(
                        f"scales.{field}",
                        f"has {len(values)} numbers; needs {heads}, or {heads * layout.num_layers} for all layers",
                    )
    given = [part.name for part in layout.parts]
    if given != names:
        raise LayoutError("parts", f"kind {layout.kind!r} needs {names}, not {given}")
    widths = {"v": layout.head_dim_v}
    for part in layout.parts:
        if len(part.bases) != len(layout.layers):
            raise LayoutError(
                f"parts.{part.name}.bases",
                f"{len(part.bases)} bases for {len(layout.layers)} layers",
            )
        scale = scales if part.is_scale else None
        width = 1 if scale else widths.get(part.name, layout.head_dim)
        dtype = scale.dtype if scale else layout.dtype
        per_head = scale is None or scale.granularity == "token_head"
        if (part.width, part.dtype, part.per_head) != (width, dtype, per_head):
            raise LayoutError(
                f"parts.{part.name}",
                f"has {part.width} x {part.dtype}, per_head={part.per_head}; the fields above say "
                f"{width} x {dtype}, per_head={per_head}",
            )
