# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""A layout over memory: what the kernels read of a KVLayout, and where its rows lie in the given pieces.

A KVLayout is read by its fields alone, so that what stands for one (a packed buffer, a plan's staging) will do.
"""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from kvxfer.errors import InvalidArgumentError
from kvxfer.kernels._arrays import Array, as_numpy, is_torch
from kvxfer.kernels._host import address_of
from kvxfer.kernels._numbers import MOST, shown, whole
from kvxfer.kernels._scales import ScaledLike
from kvxfer.layout.dtypes import DTYPES, meaning_of

__all__ = [
    "ITEMSIZE",
    "LayoutLike",
    "PartLike",
    "Side",
    "block_ids_of",
    "check_layout",
    "head_range_of",
    "layers_of",
    "locate_layers",
    "range_within",
    "token_range",
]

ITEMSIZE = {name: dtype.itemsize for name, dtype in DTYPES.items()}


class PartLike(Protocol):
    """One part of a KVLayout; strides and bases in bytes, one base per held layer."""

    @property
    def name(self) -> str: ...
    @property
    def width(self) -> int: ...
    @property
    def dtype(self) -> str: ...
    @property
    def stride_block(self) -> int: ...
    @property
    def stride_token(self) -> int: ...
    @property
    def stride_head(self) -> int: ...
    @property
    def per_head(self) -> bool: ...
    @property
    def bases(self) -> Sequence[int]: ...


class LayoutLike(ScaledLike, Protocol):
    """What a copy reads of a KVLayout."""

    @property
    def layers(self) -> Sequence[int]: ...
    @property
    def num_blocks(self) -> int: ...
    @property
    def block_size(self) -> int: ...
    @property
    def head_range(self) -> tuple[int, int]: ...
    @property
    def parts(self) -> Sequence[PartLike]: ...
    @property
    def format(self) -> str: ...
    @property
    def atom(self) -> str: ...


class Side:
    """One side of a copy: a layout over memory that is given as pieces of one linear offset space.

    Made for each copy, so that it holds only what all of them look at; views wait until a backend wants them.
    """

    def __init__(self, name: str, layout: LayoutLike, memory: Array | Sequence[Array]) -> None:
        check_layout("layout" if name == "tensors" else f"{name}_layout", layout)
        arrays = tuple(memory) if type(memory) in _SEQUENCES else (memory,)
        if not arrays:
            raise InvalidArgumentError(f"{name}: expected at least one array, given none")
        self.layout = layout
        self.arrays = arrays  # contiguous, of any shape and dtype; laid end to end
        self.device, address = _place(name, arrays[0])
        if len(arrays) == 1:
            self.addresses: tuple[int, ...] = (address,)
            self.sizes: tuple[int, ...] = (arrays[0].nbytes,)  # bytes
            self.dtypes: tuple[Any, ...] = (arrays[0].dtype,)  # the library's own
            return
        places = [_place(name, array) for array in arrays]
        for device, _ in places:
            if device != self.device:
                raise InvalidArgumentError(
                    f"{name}: expected all of its memory on {self.device} like its first array, given {device}"
                )
        self.addresses = tuple([address for _, address in places])
        self.sizes = tuple([array.nbytes for array in arrays])
        self.dtypes = tuple([array.dtype for array in arrays])

    @cached_property
    def pieces(self) -> tuple[Array, ...]:
        """The arrays as uint8, one-dimensional; NumPy where they are on the host."""
        return tuple(_flat_bytes(array) for array in self.arrays)

    def meets(self, other: Side) -> bool:
        """May the two share bytes, being on one device? Never falsely negative."""
        for start, length in zip(self.addresses, self.sizes, strict=True):
            for low, size in zip(other.addresses, other.sizes, strict=True):
                if start < low + size and low < start + length and length and size:
                    return True
        return False

    def check_dtypes(self, name: str) -> None:
        """Refuse memory that says of itself that it holds other numbers than the layout's.

        Integers (of any width) are raw bytes, and rows of dtype uint8 are opaque: these say nothing. Scales in memory
        may lie in arrays of their own dtype.
        """
        held = {part.dtype for part in self.layout.parts}
        for array in self.arrays:
            meaning = meaning_of(array)
            if meaning is not None and meaning not in held and "uint8" not in held:
                raise InvalidArgumentError(
                    f"{name}: expected memory of dtype {' or '.join(sorted(held))} like its layout, or raw bytes (uint8), "
                    f"given {meaning}"
                )


_SEQUENCES = (list, tuple)
_layouts: set[type] = set()  # the types that have been taken for layouts


def check_layout(name: str, layout: Any) -> None:
    if type(layout) in _layouts:
        return
    if not hasattr(layout, "head_range"):
        raise InvalidArgumentError(f"{name}: expected a KVLayout, given {shown(layout)}")
    _layouts.add(type(layout))


def head_range_of(layout: LayoutLike, heads: Any) -> tuple[int, int]:
    """The range as two integers, all heads that the layout holds for None; refuses what these do not include."""
    low, high = layout.head_range
    if heads is None:
        return low, high
    try:
        first, end = heads
        first, end = whole("heads", first, low), whole("heads", end, low)
    except (TypeError, ValueError):  # no pair; no integers, or too small ones
        first = end = low - 1
    if not low <= first <= end <= high:
        raise InvalidArgumentError(
            f"heads: expected a range within [{low}, {high}), as a pair (first, end), given {shown(heads)}"
        )
    return first, end


def _place(name: str, array: Array) -> tuple[str, int]:
    """Device and address of contiguous memory."""
    if is_torch(array):
        if not array.is_contiguous():
            raise InvalidArgumentError(f"{name}: expected a contiguous tensor, given strides")
        return ("cpu" if array.is_cpu else str(array.device)), array.data_ptr()
    if not isinstance(array, np.ndarray):
        raise InvalidArgumentError(
            f"{name}: expected a NumPy array or a torch tensor, given {type(array).__name__}"
        )
    if array.dtype.kind not in "fuibc" and not _is_number(array.dtype):
        raise InvalidArgumentError(
            f"{name}: expected an array of plain numbers, given dtype {array.dtype}"
        )
    if not array.flags.c_contiguous:
        raise InvalidArgumentError(
            f"{name}: expected a C-contiguous array, given strides {list(array.strides)}"
        )
    return "cpu", address_of(array)


def _is_number(dtype: np.dtype[Any]) -> bool:
    """Is it one of other libraries' number types (ml_dtypes)? Bytes written over an object are a wild pointer."""
    return dtype.kind == "V" and dtype.type is not np.void and not dtype.hasobject


def _flat_bytes(array: Array) -> Array:
    if not is_torch(array):
        return array.reshape(-1).view(np.uint8)
    flat = array.detach().reshape(-1).view(sys.modules["torch"].uint8)
    return as_numpy(flat) if flat.is_cpu else flat


def token_range(
    layout: LayoutLike, block_ids: Any, num_tokens: int | None, first_token: int
) -> tuple[int, int]:
    """Check and fill in the tokens of a sequence that its blocks hold: ``(first, end)``."""
    count, size = len(block_ids), layout.block_size
    return range_within(count * size, ((count, size),), num_tokens, first_token)


def range_within(
    held: int, blocks: Sequence[tuple[int, int]], num_tokens: int | None, first_token: int
) -> tuple[int, int]:
    """Check and fill in a range of the ``held`` tokens: ``(first, end)``; for the message, how many blocks of what size."""
    first = whole("first_token", first_token, -MOST)
    end = held if num_tokens is None else whole("num_tokens", num_tokens, -MOST)
    if not 0 <= first <= end <= held:
        by_what = " and ".join(f"{count} blocks of {size}" for count, size in blocks)
        raise InvalidArgumentError(
            f"num_tokens: expected 0 <= first_token <= num_tokens <= {held} (what {by_what} hold), "
            f"given first_token {first}, num_tokens {end}"
        )
    return first, end


def block_ids_of(name: str, ids: Any) -> npt.NDArray[np.int64]:
    if type(ids) is np.ndarray and ids.dtype == np.int64 and ids.ndim == 1:
        return ids
    if is_torch(ids):
        if not ids.is_cpu:  # reading them would wait for the device
            raise InvalidArgumentError(
                f"{name}: expected block ids on the host, given a tensor on {ids.device}"
            )
        ids = as_numpy(ids)
    try:
        array = np.asarray(ids)
    except ValueError as error:  # lists of unequal lengths
        raise InvalidArgumentError(f"{name}: expected a list of block ids: {error}") from error
    if array.size == 0:
        return np.zeros(0, np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise InvalidArgumentError(
            f"{name}: expected a list of block ids, given {shown(ids)}, "
            f"of shape {list(array.shape)}, dtype {array.dtype}"
        )
    return array.astype(np.int64, copy=False)


def layers_of(layers: Any) -> list[int] | None:
    """The layers as a list of integers; None, which means all, stays."""
    if layers is None:
        return None
    if is_torch(layers) or isinstance(layers, str) or not isinstance(layers, Iterable):
        raise InvalidArgumentError(f"layers: expected a list of layer ids, given {shown(layers)}")
    return [whole(f"layers[{i}]", layer, -MOST, expected=">= 0") for i, layer in enumerate(layers)]


def locate_layers(
    name: str, side: Side, part: PartLike, layers: list[int], first_head: int, num_heads: int
) -> tuple[tuple[int, int], ...]:
    """Per layer the piece that holds it and the offset there; all of the layer must lie in that piece."""
    layout = side.layout
    sizes = side.sizes
    starts = list(accumulate(sizes, initial=0))
    row = part.width * ITEMSIZE[part.dtype]
    heads_here = layout.head_range[1] - layout.head_range[0]
    reach = row + (layout.num_blocks - 1) * part.stride_block
    reach += (layout.block_size - 1) * part.stride_token + (heads_here - 1) * part.stride_head
    shift = (first_head - layout.head_range[0]) * part.stride_head if num_heads else 0
    found = []
    held = {layer: index for index, layer in enumerate(layout.layers)}
    for layer in layers:
        base = int(part.bases[held[layer]])
        piece = bisect_right(starts, base) - 1
        if piece >= len(sizes) or base + reach > starts[piece + 1]:
            raise InvalidArgumentError(
                f"{name}: layer {layer}, part {part.name} needs bytes [{base}, {base + reach}) in one piece, "
                f"given pieces of {list(sizes)} bytes"
            )
        found.append((piece, base - starts[piece] + shift))
    return tuple(found)
