# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""A layout over memory: what the kernels read of a KVLayout, and where its rows lie in the given pieces.

A KVLayout is read by its fields alone; ``kernels`` does not import ``layout``.
"""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from kvxfer.errors import InvalidArgumentError
from kvxfer.kernels._arrays import Array, as_numpy, device_of, is_torch
from kvxfer.kernels._scales import ScaledLike

__all__ = [
    "ITEMSIZE",
    "LayoutLike",
    "PartLike",
    "Side",
    "block_ids_of",
    "locate_layers",
    "make_side",
    "token_range",
]

ITEMSIZE = {
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3": 1,
    "float8_e5m2": 1,
    "int8": 1,
    "uint8": 1,
}


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


@dataclass(frozen=True)
class Side:
    """One side of a copy: a layout over memory that is given as pieces of one linear offset space."""

    layout: LayoutLike
    pieces: tuple[Array, ...]  # uint8, one-dimensional, contiguous; laid end to end

    @property
    def device(self) -> str:
        return device_of(self.pieces[0])


def make_side(name: str, layout: LayoutLike, memory: Array | Sequence[Array]) -> Side:
    """Check and flatten the memory of one side."""
    arrays = list(memory) if isinstance(memory, list | tuple) else [memory]
    if not arrays:
        raise InvalidArgumentError(f"{name}: expected at least one array, given none")
    return Side(layout, tuple(_flat_bytes(name, array) for array in arrays))


def _flat_bytes(name: str, array: Array) -> Array:
    if is_torch(array):
        if not array.is_contiguous():
            raise InvalidArgumentError(f"{name}: expected a contiguous tensor, given strides")
        torch = sys.modules["torch"]
        flat = array.detach().reshape(-1).view(torch.uint8)
        return as_numpy(flat) if device_of(array) == "cpu" else flat
    if not isinstance(array, np.ndarray):
        raise InvalidArgumentError(
            f"{name}: expected a NumPy array or a torch tensor, given {type(array).__name__}"
        )
    if not array.flags.c_contiguous:
        raise InvalidArgumentError(
            f"{name}: expected a C-contiguous array, given strides {list(array.strides)}"
        )
    return array.reshape(-1).view(np.uint8)


def token_range(
    layout: LayoutLike, block_ids: Any, num_tokens: int | None, first_token: int
) -> tuple[int, int]:
    """Check and fill in the tokens of a sequence that its blocks hold: ``(first, end)``."""
    held = len(block_ids) * layout.block_size
    end = held if num_tokens is None else int(num_tokens)
    if not 0 <= first_token <= end <= held:
        raise InvalidArgumentError(
            f"num_tokens: expected 0 <= first_token <= num_tokens <= {held} (what {len(block_ids)} blocks "
            f"hold), given first_token {first_token}, num_tokens {end}"
        )
    return int(first_token), end


def block_ids_of(name: str, ids: Any) -> npt.NDArray[np.int64]:
    if is_torch(ids):
        if not ids.is_cpu:  # reading them would wait for the device
            raise InvalidArgumentError(
                f"{name}: expected block ids on the host, given a tensor on {ids.device}"
            )
        ids = as_numpy(ids)
    array = np.asarray(ids)
    if array.size == 0:
        return np.zeros(0, np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise InvalidArgumentError(
            f"{name}: expected a list of block ids, given shape {list(array.shape)}, dtype {array.dtype}"
        )
    return array.astype(np.int64)


def locate_layers(
    name: str, side: Side, part: PartLike, layers: list[int], first_head: int, num_heads: int
) -> tuple[tuple[int, int], ...]:
    """Per layer the piece that holds it and the offset there; all of the layer must lie in that piece."""
    layout = side.layout
    sizes = [int(piece.shape[0]) for piece in side.pieces]
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
                f"given pieces of {sizes} bytes"
            )
        found.append((piece, base - starts[piece] + shift))
    return tuple(found)
