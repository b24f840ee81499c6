# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""A decode plan as two tensors: an operator of torch takes no objects, and an integer that changes compiles anew."""

from __future__ import annotations

import torch
from torch import Tensor

from kvxfer.errors import InvalidArgumentError
from kvxfer.kernels.plan import DecodePlan

__all__ = ["PLAN", "plan_of", "plan_tensors"]

PLAN = ("plan_items", "plan_numbers")
_NUMBERS = (
    "num_q_heads", "num_kv_heads", "head_dim", "block_size", "window_left", "split_size", "num_splits"
)  # fmt: skip


def plan_tensors(plan: DecodePlan) -> dict[str, Tensor]:
    """A decode plan as ``torch.ops.kvxfer.paged_decode`` takes it: two tensors, whose values no compiler looks at.

    Returns:
        ``plan_items``, where the plan's are, and ``plan_numbers``, int64 on the host.
    """
    if not isinstance(plan, DecodePlan):
        raise InvalidArgumentError(
            f"plan: expected what plan_decode returns, given {type(plan).__name__}"
        )
    items = plan.items if isinstance(plan.items, Tensor) else torch.from_numpy(plan.items)
    numbers = [*(getattr(plan, name) for name in _NUMBERS), *plan.seq_lens]
    return {"plan_items": items, "plan_numbers": torch.tensor(numbers, dtype=torch.int64)}


def plan_of(items: Tensor | None, numbers: Tensor | None) -> DecodePlan | None:
    """The plan of such tensors; what it says of the call is checked with the call."""
    if items is None and numbers is None:
        return None
    if items is None or numbers is None:
        missing = PLAN[0] if items is None else PLAN[1]
        raise InvalidArgumentError(f"{missing}: expected both tensors of plan_tensors(), or none")
    count = len(_NUMBERS)
    if not numbers.is_cpu or numbers.dtype != torch.int64 or numbers.ndim != 1 or len(numbers) < count:  # fmt: skip
        raise InvalidArgumentError(
            f"plan_numbers: expected at least {count} of int64 on the host, given shape {list(numbers.shape)}, "
            f"{numbers.dtype} on {numbers.device}"
        )
    if items.dtype != torch.int32 or items.ndim != 2 or items.shape[1] != 2:
        raise InvalidArgumentError(
            f"plan_items: expected shape [num_items, 2] of int32, given {list(items.shape)} of {items.dtype}"
        )
    values = numbers.tolist()
    items = items.contiguous()
    return DecodePlan(
        **dict(zip(_NUMBERS, values[:count], strict=True)),
        seq_lens=tuple(values[count:]),
        items=items.numpy() if items.is_cpu else items,
        device=str(items.device),
    )
