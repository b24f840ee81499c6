# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""append_kv: new keys and values into their slots, both in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kvxfer.kernels.triton._common import check_slots, narrow, need_tensors, on_device_of

__all__ = ["append_kv"]


@triton.jit  # type: ignore[untyped-decorator]
def _append_rows(  # type: ignore[no-untyped-def]
    rows,
    stride_row_token,
    stride_row_head,
    cache,
    stride_block,
    stride_token,
    stride_head,
    scale,
    token,
    block,
    slot,
    head,
    num_heads,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SCALED: tl.constexpr,
):
    channel = tl.arange(0, BLOCK_D)
    inside = (head < num_heads)[:, None] & (channel < WIDTH)[None, :]
    source = rows + token * stride_row_token + head.to(tl.int64)[:, None] * stride_row_head
    values = tl.load(source + channel[None, :], mask=inside)
    if SCALED:
        # True division, as the reference and vLLM do: a reciprocal differs in the last bit.
        values = tl.div_rn(values.to(tl.float32), scale)
    target = cache + block * stride_block + slot * stride_token
    target += head.to(tl.int64)[:, None] * stride_head
    tl.store(target + channel[None, :], narrow(values, cache.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def append_kernel(  # type: ignore[no-untyped-def]
    key,  # [num_tokens, num_kv_heads, head_dim]
    value,  # [num_tokens, num_kv_heads, head_dim_v]
    k_cache,  # [num_blocks, block_size, num_kv_heads, head_dim] by strides
    v_cache,
    slot_mapping,  # int64 [num_tokens]
    k_scale,
    v_scale,
    num_heads,
    stride_key_token,
    stride_key_head,
    stride_value_token,
    stride_value_head,
    stride_k_block,
    stride_k_token,
    stride_k_head,
    stride_v_block,
    stride_v_token,
    stride_v_head,
    stride_slot,
    BLOCK_SIZE: tl.constexpr,
    WIDTH_K: tl.constexpr,
    WIDTH_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_DK: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    SCALE_K: tl.constexpr,
    SCALE_V: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    at = tl.load(slot_mapping + token * stride_slot)
    if at >= 0:
        block, slot = at // BLOCK_SIZE, at % BLOCK_SIZE
        _append_rows(
            key, stride_key_token, stride_key_head,
            k_cache, stride_k_block, stride_k_token, stride_k_head,
            k_scale, token, block, slot, head, num_heads, WIDTH_K, BLOCK_DK, SCALE_K,
        )  # fmt: skip
        _append_rows(
            value, stride_value_token, stride_value_head,
            v_cache, stride_v_block, stride_v_token, stride_v_head,
            v_scale, token, block, slot, head, num_heads, WIDTH_V, BLOCK_DV, SCALE_V,
        )  # fmt: skip


def append_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    k_scale: float,
    v_scale: float,
) -> None:
    """See :func:`kvxfer.kernels.append_kv`. One program per token and group of heads."""
    need_tensors("key", key)
    num_blocks, block_size, num_heads, width_k = k_cache.shape
    check_slots(slot_mapping, num_blocks, block_size)
    num_tokens, width_v = key.shape[0], v_cache.shape[3]
    block_dk, block_dv = triton.next_power_of_2(width_k), triton.next_power_of_2(width_v)
    # About 2 KiB of values a program: 16 bytes for each of 128 threads.
    block_h = min(triton.next_power_of_2(num_heads), max(1, 1024 // max(block_dk, block_dv)))
    if not num_tokens:
        return
    with on_device_of(key):
        append_kernel[(num_tokens, triton.cdiv(num_heads, block_h))](
            key, value, k_cache, v_cache, slot_mapping, k_scale, v_scale, num_heads,
            *key.stride()[:2], *value.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3],
            slot_mapping.stride(0),
            BLOCK_SIZE=block_size, WIDTH_K=width_k, WIDTH_V=width_v,
            BLOCK_H=block_h, BLOCK_DK=block_dk, BLOCK_DV=block_dv,
            SCALE_K=k_scale != 1.0, SCALE_V=v_scale != 1.0,
            num_warps=4,
        )  # fmt: skip
