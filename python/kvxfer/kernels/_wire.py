# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""The packed form of a part of a cache, as a layout of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvxfer.kernels._memo import remember
from kvxfer.kernels._scales import ScalesLike
from kvxfer.kernels._sides import ITEMSIZE, LayoutLike
from kvxfer.layout.parts import KVPart

__all__ = ["wire_side"]

# By what they depend on: layouts are immutable and known by identity, which the entry keeps theirs by holding them.
_wires: dict[tuple[Any, ...], tuple[LayoutLike, _Wire]] = {}
_MOST_KNOWN = 256


@dataclass(frozen=True)
class _Wire:
    layers: tuple[int, ...]
    num_blocks: int
    block_size: int
    head_range: tuple[int, int]
    parts: tuple[KVPart, ...]
    nbytes: int
    format: str
    dtype: str
    num_layers: int
    num_kv_heads: int
    scales: ScalesLike | None
    atom: str = "element"


def wire_side(
    layout: LayoutLike, num_tokens: int, layers: Sequence[int], heads: tuple[int, int]
) -> _Wire:
    """The packed form of ``num_tokens`` tokens: order LKHNC, one block that holds them all.

    One object for equal arguments, so that what was resolved for it is found again.
    """
    key = (id(layout), num_tokens, tuple(layers), tuple(heads))
    known = _wires.get(key)
    if known is None:
        wire = _new_wire(layout, num_tokens, layers, heads)
        known = remember(_wires, key, (layout, wire), _MOST_KNOWN)
    return known[1]


def _new_wire(
    layout: LayoutLike, num_tokens: int, layers: Sequence[int], heads: tuple[int, int]
) -> _Wire:
    num_heads = heads[1] - heads[0]
    rows = [p.width * ITEMSIZE[p.dtype] for p in layout.parts]
    per_layer = num_heads * num_tokens * sum(rows)
    parts = []
    start = 0
    for part, row in zip(layout.parts, rows, strict=True):
        bases = tuple(start + index * per_layer for index in range(len(layers)))
        parts.append(
            KVPart(part.name, part.width, part.dtype, per_layer, row, row * num_tokens, bases)
        )
        start += num_heads * num_tokens * row
    return _Wire(
        layers=tuple(layers),
        num_blocks=1,
        block_size=num_tokens,
        head_range=heads,
        parts=tuple(parts),
        nbytes=per_layer * len(layers),
        format=layout.format,
        dtype=layout.dtype,
        num_layers=layout.num_layers,
        num_kv_heads=layout.num_kv_heads,
        scales=layout.scales,
    )
