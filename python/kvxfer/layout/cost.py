# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""What a plan costs on a path: the one table of constants, and the choice that follows from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvxfer.errors import InvalidArgumentError
from kvxfer.layout.spans import SpanGroup

__all__ = ["COST_MODELS", "CostModel", "cost_model", "packed_cost_s", "spans_cost_s"]


@dataclass(frozen=True)
class CostModel:
    """A span of n bytes takes ``max(span_s, n / bytes_per_s)``; packing adds ``pack_s_per_byte`` a side.

    Args:
        overlap: share of the pack time that is not hidden (1 on a CPU, about 0.1 on a GPU).
        fixed_s: what a packed transfer costs before its first byte: kernel launches, a notification.
        pack_from_nbytes: below this total direct is taken whatever the spans, because a pack kernel
            waits for its turn longer than the transfer takes.
    """

    path: str
    bytes_per_s: float
    span_s: float
    pack_s_per_byte: float = 1e-10
    overlap: float = 1.0
    fixed_s: float = 50e-6
    pack_from_nbytes: int = 1 << 20


# Estimates from published and our own early measurements, right within a factor of two; a caller who has
# measured a machine passes its own CostModel.
COST_MODELS: dict[str, CostModel] = {
    model.path: model
    for model in (
        # On mapped memory the transfer is the copy itself, so packing is one more copy of everything.
        CostModel("shm", 15e9, 0.15e-6),
        CostModel("cma", 11.5e9, 0.35e-6),
        CostModel("tcp", 4e9, 0.3e-6),
        CostModel("verbs", 48e9, 0.25e-6),
        CostModel("verbs_gpu", 48e9, 0.25e-6, overlap=0.1, fixed_s=100e-6),
        CostModel("cuda_ipc", 380e9, 1e-9, overlap=0.1, fixed_s=100e-6),
    )
}


def cost_model(cost: CostModel | str | None) -> CostModel:
    """``cost`` itself, a path's entry of the table, or tcp's, which every pair of processes has."""
    if isinstance(cost, CostModel):
        return cost
    name = "tcp" if cost is None else cost
    if name not in COST_MODELS:
        raise InvalidArgumentError(f"cost: {name!r} is not one of {', '.join(COST_MODELS)}")
    return COST_MODELS[name]


def spans_cost_s(groups: Sequence[SpanGroup], model: CostModel) -> float:
    """Seconds to move the spans as they are."""
    total = 0.0
    for group in groups:
        sizes, counts = group.template.sizes
        each = counts * np.maximum(model.span_s, sizes / model.bytes_per_s)
        total += len(group.bases) * float(each.sum())
    return total


def packed_cost_s(nbytes: int, sides: int, model: CostModel) -> float:
    """Seconds to pack at ``sides`` ends and move ``nbytes`` in large pieces."""
    pack = nbytes * sides * model.pack_s_per_byte * model.overlap
    return nbytes / model.bytes_per_s + pack + model.fixed_s
