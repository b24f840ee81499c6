# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Strides and bases read from tensors; what each dimension means is told, never guessed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvxfer.errors import LayoutError
from kvxfer.layout.dtypes import itemsize_of, meaning_of
from kvxfer.layout.orders import has_two_parts
from kvxfer.layout.parts import KVPart, as_int

__all__ = ["FoundParts", "parts_from_tensors"]


@dataclass(frozen=True)
class FoundParts:
    parts: tuple[KVPart, ...]
    extents: dict[str, int]  # L, B, N, H


@dataclass(frozen=True)
class _Array:
    """Address, shape and byte strides of a torch tensor, a NumPy array or a CUDA array."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    itemsize: int
    meaning: str | None  # of its elements, where its own dtype says it

    @classmethod
    def read(cls, name: str, tensor: Any) -> _Array:
        if hasattr(tensor, "data_ptr") and hasattr(tensor, "stride"):
            size = int(tensor.element_size())
            strides = tuple(int(stride) * size for stride in tensor.stride())
            shape = tuple(map(int, tensor.shape))
            return cls(int(tensor.data_ptr()), shape, strides, size, meaning_of(tensor))
        for protocol in ("__array_interface__", "__cuda_array_interface__"):
            face = getattr(tensor, protocol, None)
            if face is None:
                continue
            shape = tuple(map(int, face["shape"]))
            size = int(face["typestr"][2:])
            given = face.get("strides")
            strides = tuple(map(int, given)) if given is not None else _dense(shape, size)
            return cls(int(face["data"][0]), shape, strides, size, meaning_of(tensor))
        raise LayoutError(
            "tensors", f"{name} is a {type(tensor).__name__}, not a tensor or an array"
        )

    @property
    def reach(self) -> int:
        return self.itemsize + sum(
            (n - 1) * s for n, s in zip(self.shape, self.strides, strict=True)
        )


def _dense(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    return tuple(itemsize * math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def parts_from_tensors(
    tensors: Any,
    axes: str,
    widths: Sequence[tuple[str, int, str]],
    *,
    kind: str,
    num_layers: int,
    block_size: int | None,
    region: Any,
) -> FoundParts:
    """Read ``widths`` (name, elements, dtype) out of ``tensors`` whose dimensions ``axes`` names."""
    _check_axes(axes, kind)
    dtype = widths[0][2]
    itemsize = itemsize_of(dtype)
    pairs = has_two_parts(kind) and "K" not in axes and kind != "fused"
    arrays = _arrays(tensors, by_layer="L" not in axes, pairs=pairs, num_layers=num_layers)
    offsets = _offsets(arrays, region)
    extents = {"L": num_layers, "B": 1, "N": 1, "H": 1}
    strides: dict[str, dict[str, int]] = {name: {} for name, _, _ in widths}
    bases: dict[str, list[int]] = {name: [] for name, _, _ in widths}
    inside = sum(width for _, width, _ in widths) if kind == "fused" and "K" not in axes else 0
    first = True
    for index, (array, offset) in enumerate(zip(arrays, offsets, strict=True)):
        steps, sizes = _dimensions(index, array, axes, dtype, block_size)
        if sizes.get("L", num_layers) != num_layers:
            raise LayoutError(
                "layers", f"the tensor has {sizes['L']} layers, {num_layers} are held here"
            )
        start = 0
        for position, (name, width, _) in enumerate(widths):
            if pairs and index % 2 != position:
                continue
            if sizes["C"] != (inside or width):
                raise LayoutError(
                    "head_dim",
                    f"tensor {index} has {sizes['C']} channels, {inside or width} are told",
                )
            if "K" in axes and sizes["K"] != len(widths):
                raise LayoutError(
                    "axes", f"K of {axes!r} has extent {sizes['K']}, not {len(widths)}"
                )
            base = offset + (position * steps["K"] if "K" in axes else start)
            start += width * itemsize if inside else 0
            bases[name] += [base + layer * steps.get("L", 0) for layer in range(sizes.get("L", 1))]
            here = {axis: steps.get(axis, 0) for axis in "BNH"}
            if strides[name] and strides[name] != here:
                raise LayoutError(
                    "tensors", f"tensor {index} ({name}) has other strides than the first"
                )
            strides[name] = here
        here_extents = {axis: sizes.get(axis, 1) for axis in "BNH"}
        if not first and any(extents[axis] != n for axis, n in here_extents.items()):
            raise LayoutError("tensors", f"tensor {index} has another shape than the first")
        extents.update(here_extents)
        first = False
    parts = tuple(
        KVPart(
            name=name,
            width=width,
            dtype=dtype,
            stride_block=strides[name]["B"],
            stride_token=strides[name]["N"],
            stride_head=strides[name]["H"],
            bases=tuple(bases[name]),
        )
        for name, width, dtype in widths
    )
    return FoundParts(parts, extents)


def _check_axes(axes: str, kind: str) -> None:
    known = isinstance(axes, str) and len(set(axes)) == len(axes) and set(axes) <= set("LBKNHCS")
    if not known or "C" not in axes:
        raise LayoutError(
            "axes", f"{axes!r} must name each dimension once, from L B K N H C, or S for B and N"
        )
    if ("S" in axes) == ("B" in axes) or ("S" in axes and "N" in axes):
        raise LayoutError("axes", f"{axes!r} must have either S, or B (and N)")
    if "K" in axes and not has_two_parts(kind):
        raise LayoutError("axes", f"{axes!r} has K, but kind {kind!r} is a single part")


def _arrays(tensors: Any, *, by_layer: bool, pairs: bool, num_layers: int) -> list[_Array]:
    """Flat list, K before V where they come in pairs."""
    entries = list(tensors) if by_layer else [tensors]
    if by_layer and len(entries) != num_layers:
        raise LayoutError("tensors", f"{len(entries)} given, {num_layers} layers are held here")
    flat: list[_Array] = []
    for index, entry in enumerate(entries):
        both = list(entry) if pairs else [entry]
        if pairs and len(both) != 2:
            raise LayoutError(
                "tensors", f"entry {index} must be a (K, V) pair, or axes must name K"
            )
        flat += [_Array.read(f"tensor {index}", tensor) for tensor in both]
    return flat


def _offsets(arrays: list[_Array], region: Any) -> list[int]:
    if region is None:
        if len(arrays) > 1:
            raise LayoutError(
                "region",
                f"{len(arrays)} tensors need region=: the array they are views of, or their byte offsets",
            )
        return [0]
    if isinstance(region, (list, tuple)):
        if len(region) != len(arrays):
            raise LayoutError("region", f"{len(region)} offsets for {len(arrays)} tensors")
        return [as_int("region", offset, minimum=0) for offset in region]
    origin = _Array.read("region", region)
    for index, array in enumerate(arrays):
        start = array.address - origin.address
        if start < 0 or start + array.reach > origin.reach:
            raise LayoutError("region", f"tensor {index} is not inside it")
    return [array.address - origin.address for array in arrays]


def _dimensions(
    index: int, array: _Array, axes: str, dtype: str, block_size: int | None
) -> tuple[dict[str, int], dict[str, int]]:
    """Byte stride and extent of each axis, S resolved into B and N."""
    if len(array.shape) != len(axes):
        raise LayoutError(
            "axes", f"{axes!r} names {len(axes)} dimensions, tensor {index} has {len(array.shape)}"
        )
    itemsize = itemsize_of(dtype)
    if array.itemsize != itemsize:
        raise LayoutError(
            "dtype", f"tensor {index} has elements of {array.itemsize} bytes, {itemsize} are told"
        )
    if array.meaning not in (None, dtype) and dtype != "uint8":
        raise LayoutError("dtype", f"tensor {index} is of {array.meaning}, {dtype} is told")
    steps = dict(zip(axes, array.strides, strict=True))
    sizes = dict(zip(axes, array.shape, strict=True))
    if sizes["C"] > 1 and steps["C"] != itemsize:
        raise LayoutError(
            "axes", f"channels of tensor {index} are not contiguous (stride {steps['C']} bytes)"
        )
    if "S" in axes:
        size = as_int("block_size", block_size, minimum=1) if block_size is not None else 1
        if sizes["S"] % size:
            raise LayoutError(
                "block_size", f"{size} does not divide the {sizes['S']} slots of tensor {index}"
            )
        steps["N"], sizes["N"] = steps.pop("S"), size
        steps["B"], sizes["B"] = steps["N"] * size, sizes.pop("S") // size
    elif block_size is not None and sizes.get("N", 1) != block_size:
        raise LayoutError(
            "block_size", f"{block_size} is told, tensor {index} has {sizes.get('N', 1)}"
        )
    return steps, sizes
