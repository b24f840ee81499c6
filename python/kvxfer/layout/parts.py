# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""The two values a layout is made of: where one part (k, v, a scale) lies, and what its scales are."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvxfer.errors import LayoutError
from kvxfer.layout.dtypes import itemsize_of

__all__ = [
    "MAX_BLOCK_SIZE",
    "MAX_HEADS",
    "MAX_LAYERS",
    "KVPart",
    "KVScales",
    "as_int",
    "check_scales",
]


# Far beyond any model: what a peer or a slip of the pen asks for must not be worked on for minutes.
MAX_LAYERS = 4096
MAX_HEADS = 65_536
# vLLM's hybrid models make a block of attention as large as a state: 528 tokens and more.
MAX_BLOCK_SIZE = 65_536


def as_int(
    field: str, value: Any, *, minimum: int | None = None, maximum: int | None = None
) -> int:
    """``value`` as a Python int: NumPy's would wrap silently in the first multiplication past its width."""
    try:
        number = operator.index(value)
    except TypeError:
        raise LayoutError(field, f"an integer is needed, not {value!r}") from None
    if minimum is not None and number < minimum:
        raise LayoutError(field, f"{number} is less than {minimum}")
    if maximum is not None and number > maximum:
        raise LayoutError(field, f"{number} is more than {maximum}")
    return int(number)


@dataclass(frozen=True)
class KVPart:
    """One affine map: ``bases[layer] + block*stride_block + slot*stride_token + head*stride_head``, in bytes.

    Args:
        name: ``k``, ``v``, ``latent``, ``state``, or one of these with ``_scale``.
        width: elements of one (token, head) row; they are always contiguous.
        stride_head: counts heads from the first one held here.
        bases: one byte offset for each layer held here, in the order of ``KVLayout.layers``.
        per_head: False for a value that all heads of a token share; ``stride_head`` then means nothing.
    """

    name: str
    width: int
    dtype: str
    stride_block: int
    stride_token: int
    stride_head: int
    bases: tuple[int, ...]
    per_head: bool = True

    def __post_init__(self) -> None:
        itemsize = itemsize_of(self.dtype, f"parts.{self.name}.dtype")
        put = object.__setattr__
        put(self, "width", as_int(f"parts.{self.name}.width", self.width, minimum=1))
        for field in ("stride_block", "stride_token", "stride_head"):
            name = f"parts.{self.name}.{field}"
            put(self, field, as_int(name, getattr(self, field), minimum=0))
            if getattr(self, field) % itemsize:
                raise LayoutError(
                    name,
                    f"{getattr(self, field)} is no multiple of {self.dtype}'s {itemsize} bytes",
                )
        bases = tuple(as_int(f"parts.{self.name}.bases", base, minimum=0) for base in self.bases)
        put(self, "bases", bases)
        for layer, base in enumerate(bases):
            if base % itemsize:
                raise LayoutError(
                    f"parts.{self.name}.bases",
                    f"{base} (entry {layer}) is no multiple of {self.dtype}'s {itemsize} bytes",
                )

    @property
    def itemsize(self) -> int:
        return itemsize_of(self.dtype)

    @property
    def row_nbytes(self) -> int:
        """Bytes of one (token, head) row."""
        return self.width * self.itemsize

    @property
    def is_scale(self) -> bool:
        return self.name.endswith("_scale")


@dataclass(frozen=True)
class KVScales:
    """How stored numbers become values: ``value = stored * scale``.

    Args:
        granularity: ``tensor`` or ``head``: fixed numbers, held in ``k`` and ``v``. ``token`` or
            ``token_head``: numbers in memory that move with the data, as parts of their own.
        k, v: for ``tensor`` one number, or one per layer of the model; for ``head`` one per head of the
            model, or layers x heads in that order. Counted over the model, never over a rank's share,
            so that ranks and pipeline stages of one model agree. ``v`` stays None for MLA.
        order: for scales in memory, their axes from ``L B K N H`` (``H`` absent for ``token``), as in
            :meth:`KVLayout.from_order`.
        offset: where in the region the scales in memory begin.
    """

    granularity: str
    dtype: str = "float32"
    k: tuple[float, ...] | None = None
    v: tuple[float, ...] | None = None
    order: str = ""
    offset: int = 0

    def __post_init__(self) -> None:
        if self.granularity not in ("tensor", "head", "token", "token_head"):
            raise LayoutError(
                "scales.granularity",
                f"{self.granularity!r} is not one of 'tensor', 'head', 'token', 'token_head'",
            )
        itemsize_of(self.dtype, "scales.dtype")
        for field in ("k", "v"):
            given: Sequence[float] | None = getattr(self, field)
            if given is None:
                continue
            if isinstance(given, int | float | np.number):
                given = (float(given),)
            if not self.is_fixed:
                raise LayoutError(
                    f"scales.{field}", f"{self.granularity!r} scales lie in memory, not in {field}="
                )
            values = tuple(float(x) for x in given)
            if not values or not all(math.isfinite(x) and x > 0 for x in values):
                raise LayoutError(f"scales.{field}", f"needs finite numbers above 0, not {given!r}")
            object.__setattr__(self, field, values)
        if self.is_fixed and self.k is None:
            raise LayoutError("scales.k", f"{self.granularity!r} scales need their values in k=")
        if self.is_fixed and self.order:
            raise LayoutError("scales.order", "fixed scales have no place in memory")
        object.__setattr__(self, "offset", as_int("scales.offset", self.offset, minimum=0))

    @property
    def is_fixed(self) -> bool:
        return self.granularity in ("tensor", "head")


def check_scales(scales: object) -> None:
    """Refuse what is neither None nor a KVScales."""
    if scales is not None and not isinstance(scales, KVScales):
        raise LayoutError("scales", f"a KVScales is needed, not {type(scales).__name__}")
