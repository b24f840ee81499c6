# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""What a copy does to stored numbers when the two sides scale them differently."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

__all__ = ["ScaledLike", "ScalesLike", "scale_factors"]


class ScalesLike(Protocol):
    """What a copy reads of KVScales: value = stored * scale."""

    @property
    def granularity(self) -> str: ...
    @property
    def is_fixed(self) -> bool: ...
    @property
    def k(self) -> Sequence[float] | None: ...
    @property
    def v(self) -> Sequence[float] | None: ...


class ScaledLike(Protocol):
    """What of a KVLayout says how its numbers are scaled."""

    @property
    def dtype(self) -> str: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def scales(self) -> ScalesLike | None: ...


def scale_factors(
    src: ScaledLike,
    dst: ScaledLike,
    part: str,
    layers: Sequence[int],
    first_head: int,
    num_heads: int,
) -> npt.NDArray[np.float32] | None:
    """``[layers, heads, 2]``: what was stored times the first, over the second, is to be stored.

    None where stored numbers stay as they are but for their dtype. The sides have passed ``layout.rules``, so scales in
    memory are on both or on neither, and move along as parts of their own.
    """
    a, b = src.scales, dst.scales
    if a is None and b is None:
        return None
    if any(scales is not None and not scales.is_fixed for scales in (a, b)):
        return None
    factors = np.ones((len(layers), num_heads, 2), np.float32)
    for column, (layout, scales) in enumerate(((src, a), (dst, b))):
        if scales is None or part.endswith("_scale"):
            continue
        values = scales.v if part == "v" else scales.k
        assert values is not None, "a layout checks that it has the scales of each of its parts"
        per_head = layout.num_kv_heads if scales.granularity == "head" else 1
        table = np.asarray(values, np.float32).reshape(-1, per_head)  # 1 or num_layers rows
        table = np.broadcast_to(table, (layout.num_layers, per_head))[list(layers)]
        heads = slice(first_head, first_head + num_heads) if per_head > 1 else slice(None)
        factors[:, :, column] = table[:, heads]
    return None if np.array_equal(factors[..., 0], factors[..., 1]) else factors
