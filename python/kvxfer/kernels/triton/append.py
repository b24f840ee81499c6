# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""append_kv: new keys and values into their slots, both in one launch; 8-bit caches quantise on the way."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kvxfer.kernels.triton._common import check_slots, need_tensors, on_device_of, scale_arguments
from kvxfer.kernels.triton._numbers import largest_of, narrow, widen

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
    scales,
    stride_scale_block,
    stride_scale_token,
    stride_scale_head,
    scale,
    token,
    block,
    slot,
    head,
    num_heads,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DIVIDE: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
):
    channel = tl.arange(0, BLOCK_D)
    inside = (head < num_heads)[:, None] & (channel < WIDTH)[None, :]
    source = rows + token * stride_row_token + head.to(tl.int64)[:, None] * stride_row_head
    values = tl.load(source + channel[None, :], mask=inside, other=0.0)
    # True division, as the reference and vLLM do: a reciprocal differs in the last bit.
    if SCALE_ROWS:
        values = widen(values, tl.float32)
        top = tl.max(tl.where(values == values, tl.abs(values), 0.0), 1)  # a NaN counts as 0
        divisor = tl.where(top > 0.0, tl.div_rn(top, largest_of(cache.dtype.element_ty)), 1.0)
        at = scales + block * stride_scale_block + slot * stride_scale_token
        tl.store(at + head.to(tl.int64) * stride_scale_head, divisor, mask=head < num_heads)
        values = tl.div_rn(values, divisor[:, None])
    elif DIVIDE:
        values = tl.div_rn(widen(values, tl.float32), scale)
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
    k_scales,  # float32 [num_blocks, block_size, num_kv_heads] by strides; written if SCALE_ROWS
    v_scales,
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
    stride_ks_block,
    stride_ks_token,
    stride_ks_head,
    stride_vs_block,
    stride_vs_token,
    stride_vs_head,
    stride_slot,
    BLOCK_SIZE: tl.constexpr,
    WIDTH_K: tl.constexpr,
    WIDTH_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_DK: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    DIVIDE_K: tl.constexpr,
    DIVIDE_V: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    at = tl.load(slot_mapping + token * stride_slot)
    if at >= 0:
        block, slot = at // BLOCK_SIZE, at % BLOCK_SIZE
        _append_rows(
            key, stride_key_token, stride_key_head,
            k_cache, stride_k_block, stride_k_token, stride_k_head,
            k_scales, stride_ks_block, stride_ks_token, stride_ks_head,
            k_scale, token, block, slot, head, num_heads, WIDTH_K, BLOCK_DK, DIVIDE_K, SCALE_ROWS,
        )  # fmt: skip
        _append_rows(
            value, stride_value_token, stride_value_head,
            v_cache, stride_v_block, stride_v_token, stride_v_head,
            v_scales, stride_vs_block, stride_vs_token, stride_vs_head,
            v_scale, token, block, slot, head, num_heads, WIDTH_V, BLOCK_DV, DIVIDE_V, SCALE_ROWS,
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
    k_scale_cache: torch.Tensor | None = None,
    v_scale_cache: torch.Tensor | None = None,
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
    scales = scale_arguments(k_scale_cache, v_scale_cache, key)
    with on_device_of(key):
        append_kernel[(num_tokens, triton.cdiv(num_heads, block_h))](
            key, value, k_cache, v_cache, slot_mapping, *scales[:2], k_scale, v_scale, num_heads,
            *key.stride()[:2], *value.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3],
            *scales[2:], slot_mapping.stride(0),
            BLOCK_SIZE=block_size, WIDTH_K=width_k, WIDTH_V=width_v,
            BLOCK_H=block_h, BLOCK_DK=block_dk, BLOCK_DV=block_dv,
            DIVIDE_K=k_scale != 1.0, DIVIDE_V=v_scale != 1.0, SCALE_ROWS=k_scale_cache is not None,
            num_warps=4,
        )  # fmt: skip
