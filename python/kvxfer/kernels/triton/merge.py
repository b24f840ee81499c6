# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""merge_states: two partial attentions over disjoint keys into the attention over both."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kvxfer.kernels.triton._common import need_tensors, on_device_of
from kvxfer.kernels.triton._numbers import narrow

__all__ = ["merge_states"]


@triton.jit  # type: ignore[untyped-decorator]
def merge_kernel(  # type: ignore[no-untyped-def]
    v_a,  # [rows, head_dim]: tokens and heads as one axis, contiguous
    lse_a,  # float32 [rows], natural logarithm
    v_b,
    lse_b,
    out,
    lse,
    num_rows,
    WIDTH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    channel = tl.arange(0, BLOCK_D)
    a = tl.load(lse_a + row, mask=row < num_rows, other=0.0)
    b = tl.load(lse_b + row, mask=row < num_rows, other=0.0)
    highest = tl.maximum(a, b)
    finite = tl.where(highest == float("-inf"), 0.0, highest)
    weight_a, weight_b = tl.exp(a - finite), tl.exp(b - finite)
    total = weight_a + weight_b
    empty = total == 0.0
    at = row[:, None] * WIDTH + channel[None, :]
    inside = (row < num_rows)[:, None] & (channel < WIDTH)[None, :]
    # A side of weight 0 may hold anything, also NaN: it is not even loaded.
    from_a = tl.load(v_a + at, mask=inside & (weight_a != 0.0)[:, None], other=0.0).to(tl.float32)
    from_b = tl.load(v_b + at, mask=inside & (weight_b != 0.0)[:, None], other=0.0).to(tl.float32)
    values = from_a * weight_a[:, None] + from_b * weight_b[:, None]
    values = values / tl.where(empty, 1.0, total)[:, None]
    tl.store(out + at, narrow(values, out.dtype.element_ty), mask=inside)
    merged = tl.log(tl.where(empty, 1.0, total)) + finite
    tl.store(lse + row, tl.where(empty, float("-inf"), merged), mask=row < num_rows)


def merge_states(
    v_a: torch.Tensor,
    lse_a: torch.Tensor,
    v_b: torch.Tensor,
    lse_b: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """See :func:`kvxfer.kernels.merge_states`."""
    need_tensors("v_a", v_a)
    num_rows, width = lse.numel(), out.shape[-1]
    if not num_rows:
        return
    block_d = triton.next_power_of_2(width)
    block_r = max(1, 2048 // block_d)
    with on_device_of(out):
        merge_kernel[(triton.cdiv(num_rows, block_r),)](
            v_a.contiguous(), lse_a.contiguous(), v_b.contiguous(), lse_b.contiguous(), out, lse,
            num_rows, WIDTH=width, BLOCK_R=block_r, BLOCK_D=block_d, num_warps=4,
        )  # fmt: skip
