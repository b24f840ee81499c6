# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Checksums of what blocks hold, the same for any layout of the same content."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kvxfer.kernels._arrays import Array
from kvxfer.kernels._checksum_job import make_checksum_job
from kvxfer.kernels._dispatch import choose
from kvxfer.kernels._sides import LayoutLike, Side

__all__ = ["checksum_blocks"]


def checksum_blocks(
    layout: LayoutLike,
    tensors: Array | Sequence[Array],
    block_ids: Any,
    *,
    num_tokens: int | None = None,
    first_token: int = 0,
    layers: Sequence[int] | None = None,
    heads: tuple[int, int] | None = None,
    backend: str = "auto",
) -> npt.NDArray[np.uint64]:
    """One 64-bit sum per layer over the content of a sequence's tokens.

    The sum is over rows (part, head, token), each hashed with its place in the model and the sequence, so it does
    not depend on block ids, block size, order of axes or strides, and the sums of ranks that hold different heads
    add up (mod 2^64) to that of all heads. It finds flipped bits, swapped blocks, heads or tokens, and stale blocks;
    it is no defence against who forges on purpose. Values in another dtype have another sum.

    Args:
        layout, tensors: the cache, as ``src`` of :func:`copy_blocks`.
        block_ids: of the sequence, from its token 0.
        num_tokens, first_token: tokens ``[first_token, num_tokens)``; None: all that the blocks hold.
        layers: global layer ids; None: those held.
        heads: global head range ``(first, end)``; None: all that the layout holds.
    Returns:
        ``[len(layers)]`` uint64, on the host.
    Raises:
        InvalidArgumentError: a block id out of range, a list too short, heads not held.
        UnavailableError: no kernel for this device; carries the reason.
    Source: the NH hash of UMAC (Black, Halevi, Krawczyk, Krovetz, Rogaway, 1999), mixed by splitmix64 (Steele,
        Lea, Flood, 2014).
    """
    side = Side("tensors", layout, tensors)
    job = make_checksum_job(
        side, block_ids, num_tokens=num_tokens, first_token=first_token, layers=layers, heads=heads
    )
    module = choose("checksum_blocks", side.device, backend)
    sums: npt.NDArray[np.uint64] = module.checksum_blocks(job)
    return sums
