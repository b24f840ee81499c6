# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Triton's mla_decode under the interpreter, against the float32 reference, over poisoned latent caches."""

from __future__ import annotations

from typing import Any

import pytest
from triton_cases import needs_interpreter, torch

from kvxfer import kernels
from kvxfer.errors import InvalidArgumentError

pytestmark = needs_interpreter


def inputs(
    lengths: list[int],
    *,
    heads: int = 5,
    latent: int = 48,
    rope: int = 16,
    block_size: int = 8,
    dtype: Any = torch.float32,
    cache_dtype: Any = None,
) -> dict[str, Any]:
    """Rows of a cache one token longer than the view, NaN (of int8 the largest) wherever nothing may be read."""
    torch.manual_seed(0)
    stored = cache_dtype or dtype
    counts = [-(-n // block_size) for n in lengths]
    shape = (sum(counts) + 2, block_size + 1, latent + rope)
    if stored.itemsize == 1:
        cache = torch.full(shape, 0x7F, dtype=torch.uint8).view(stored)
    else:
        cache = torch.full(shape, float("nan"), dtype=stored)
    table = torch.full((len(lengths), max([1, *counts])), -1, dtype=torch.int32)
    ids = torch.randperm(len(cache)).tolist()
    for row, length in enumerate(lengths):
        for column in range(counts[row]):
            table[row, column] = block = ids.pop()
            end = min(block_size, length - column * block_size)
            numbers = torch.randn(end, latent + rope) * (40 if stored == torch.int8 else 1)
            cache[block, :end] = numbers.to(stored)
    q = torch.randn(len(lengths), heads, latent + rope).to(dtype)
    return {
        "q_latent": q[..., :latent],
        "q_rope": q[..., latent:],
        "latent_cache": cache[:, :block_size],
        "block_table": table,
        "seq_lens": torch.tensor(lengths, dtype=torch.int32),
        "sm_scale": 0.1,
    }


def check(call: dict[str, Any], tolerance: float = 3e-6, **options: Any) -> None:
    wide = {k: call[k].float() for k in ("q_latent", "q_rope")}
    want, want_lse = kernels.mla_decode(
        **{**call, **wide}, **options, return_lse=True, backend="reference"
    )
    out, lse = kernels.mla_decode(
        **call, **options, split_size=32, return_lse=True, backend="triton"
    )
    assert torch.isfinite(out).all(), "poison was read, or rows were left out"
    torch.testing.assert_close(out.float(), want, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse, want_lse, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("block_size", [1, 16, 64])
def test_it_attends_at_the_edges_of_blocks(block_size: int) -> None:
    lengths = [0, 1, block_size - 1, block_size, block_size + 1, 70]
    call = inputs(lengths, block_size=block_size)
    before = call["latent_cache"].clone()
    check(call)
    assert torch.equal(call["latent_cache"].view(torch.int32), before.view(torch.int32))


@pytest.mark.parametrize(
    ("heads", "latent", "rope"), [(1, 16, 16), (17, 24, 8), (70, 80, 0), (3, 300, 20)]
)
def test_widths_and_heads_that_fill_no_tile(heads: int, latent: int, rope: int) -> None:
    check(inputs([40, 3], heads=heads, latent=latent, rope=rope))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_widths_of_deepseek(dtype: Any) -> None:
    call = inputs([70, 33], heads=16, latent=512, rope=64, block_size=64, dtype=dtype)
    check(call | {"sm_scale": 192**-0.5}, 2e-3 if dtype == torch.float16 else 1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cache_dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8])
def test_eight_bit_caches_with_a_scale(cache_dtype: Any, dtype: Any) -> None:
    call = inputs([37, 20], dtype=dtype, cache_dtype=cache_dtype)
    scale = 0.02 if cache_dtype == torch.int8 else 0.5
    check(call, 3e-6 if dtype == torch.float32 else 1e-2, kv_scale=scale)


def test_a_scale_below_zero_turns_the_order_of_logits() -> None:
    check(inputs([40]) | {"sm_scale": -0.1})


def test_a_row_does_not_depend_on_its_batch() -> None:
    call = inputs([70, 3, 64])
    whole = kernels.mla_decode(**call, split_size=32, backend="triton")
    names = ("q_latent", "q_rope", "block_table", "seq_lens")
    alone = kernels.mla_decode(
        **{**call, **{n: call[n][2:] for n in names}}, split_size=32, backend="triton"
    )
    assert torch.equal(whole[2:], alone)


def test_what_the_kernel_cannot_hold_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="at most 512 channels, given 520"):
        kernels.mla_decode(**inputs([3], heads=1, latent=520), backend="triton")
    call = inputs([3, 20])
    call["block_table"][1, 1] = 99
    with pytest.raises(InvalidArgumentError, match=r"block_table\[1, 1\]: expected a block id"):
        kernels.mla_decode(**call, backend="triton")
