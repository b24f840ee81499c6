# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Arrays over a region in logical axes, whatever the physical order."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kvxfer.errors import InvalidArgumentError
from kvxfer.layout.dtypes import numpy_dtype

if TYPE_CHECKING:
    from kvxfer.layout.kv_layout import KVLayout

__all__ = ["part_views"]


def part_views(layout: KVLayout, buffer: Any) -> tuple[tuple[np.ndarray[Any, Any], ...], ...]:
    """See :meth:`KVLayout.views`."""
    flat = np.asarray(buffer)
    if flat.dtype != np.uint8 or flat.ndim != 1 or not flat.flags.c_contiguous:
        raise InvalidArgumentError(
            f"buffer: needs a contiguous uint8 array of one axis, not {flat.dtype} {flat.shape}"
        )
    if flat.nbytes < layout.nbytes:
        raise InvalidArgumentError(
            f"buffer: has {flat.nbytes} bytes, the layout reaches {layout.nbytes}"
        )
    views = []
    for layer in range(len(layout.layers)):
        row = []
        for part in layout.parts:
            row.append(
                np.ndarray(
                    (layout.num_blocks, layout.block_size, layout.part_heads(part), part.width),
                    numpy_dtype(part.dtype),
                    flat.data,
                    part.bases[layer],
                    (part.stride_block, part.stride_token, part.stride_head, part.itemsize),
                )
            )
        views.append(tuple(row))
    return tuple(views)
