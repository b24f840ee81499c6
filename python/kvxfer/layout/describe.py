# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""A plan in a few lines that a person can read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from kvxfer.layout.kv_layout import KVLayout
    from kvxfer.layout.plan import TransferPlan

__all__ = ["describe"]


def _size(nbytes: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if nbytes < 1024:
            return f"{nbytes:.4g} {unit}"
        nbytes /= 1024
    return f"{nbytes:.4g} GiB"


def _side(layout: KVLayout) -> str:
    first, end = layout.head_range
    order = layout.order or "by strides"
    return (
        f"{layout.kind} {order}, {layout.dtype}, block {layout.block_size}, "
        f"rank {layout.tp_rank} of {layout.tp_size} (heads {first} to {end - 1}), "
        f"layers {layout.layers[0]} to {layout.layers[-1]}"
    )


def describe(plan: TransferPlan) -> str:
    """See :meth:`TransferPlan.describe`."""
    lines = [f"from {_side(plan.src)}", f"to   {_side(plan.dst)}"]
    if not plan.groups:
        lines.append(
            "moves nothing: these ranks share no heads, layers or tokens, or another rank sends them"
        )
        return "\n".join(lines)
    lines.append(
        f"tokens {plan.first_token} to {plan.num_tokens - 1}, heads {plan.heads[0]} to {plan.heads[1] - 1}, "
        f"{len(plan.layers)} layers: {_size(plan.total_nbytes)}"
    )
    sizes = np.concatenate([group.template.sizes[0] for group in plan.groups])
    rows = sum(len(group.template) for group in plan.groups)
    bases = sum(len(group.bases) for group in plan.groups)
    lines.append(
        f"{plan.kind}: {plan.num_spans} spans = {bases} bases x {rows} template rows, "
        f"{_size(float(sizes.min()))} to {_size(float(sizes.max()))} each"
    )
    if plan.wire_layout is not None:
        here, there = plan.staging_nbytes
        change = ", values converted" if plan.convert else ""
        lines.append(
            f"staging {plan.wire_layout.order} {plan.wire_layout.dtype}{change}: "
            f"{_size(here)} at the source, {_size(there)} at the destination"
        )
    if plan.kind == "direct" and len(plan.cost_s) == 1:
        lines.append(
            "other kinds were not worked out: direct was asked for, or there is little data, or no copy "
            "could beat these spans"
        )
    costs = ", ".join(f"{kind} {seconds * 1e3:.3g} ms" for kind, seconds in plan.cost_s.items())
    lines.append(f"estimated on {plan.cost_path}: {costs}")
    return "\n".join(lines)
