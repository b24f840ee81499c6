# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""mla_decode against a float64 oracle over poisoned latent caches."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from paged_cases import DTYPES, NpArray, assert_close, decode, digest, encode, oracle

from kvxfer import kernels
from kvxfer.errors import InvalidArgumentError


def latents(
    rng: np.random.Generator, lengths: list[int], block_size: int, width: int, dtype: str
) -> tuple[NpArray, NpArray, list[NpArray]]:
    """A cache whose unread slots are NaN, its table, and per sequence the rows in float64."""
    num_blocks = sum(-(-n // block_size) for n in lengths) + 2
    cache = np.repeat(encode(np.full((1, block_size, width), np.nan), dtype), num_blocks, axis=0)
    table = np.full((len(lengths), max(1, max(-(-n // block_size) for n in lengths))), -1, np.int32)
    free = iter(rng.permutation(num_blocks))
    dense = []
    for b, length in enumerate(lengths):
        rows = encode(rng.standard_normal((length, width)), dtype)
        for token in range(length):
            if token % block_size == 0:
                table[b, token // block_size] = next(free)
            cache[table[b, token // block_size], token % block_size] = rows[token]
        dense.append(decode(rows))
    return cache, table, dense


def check(given: tuple[NpArray, NpArray], q: NpArray, dense: list[NpArray], latent: int, dtype: str, **options: Any) -> None:  # fmt: skip
    for b, rows in enumerate(dense):
        one = (given[0][b : b + 1], given[1][b : b + 1])
        if not len(rows):
            assert not decode(one[0]).any()
            assert np.isneginf(one[1]).all()
            continue
        k, v = rows[:, None, :], rows[:, None, :latent]
        assert_close(one, oracle(decode(q[b : b + 1]), k, v, **options), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [1, 16, 64, 528])
def test_it_attends_to_latents(
    rng: np.random.Generator, backend: str, dtype: str, block_size: int
) -> None:
    lengths = [0, 1, block_size - 1, block_size, block_size + 1, 90]
    cache, table, dense = latents(rng, lengths, block_size, 48 + 16, dtype)
    q = encode(rng.standard_normal((6, 5, 64)), dtype)
    before = digest(cache)
    given = kernels.mla_decode(
        q[..., :48], q[..., 48:], cache, table, np.array(lengths, np.int32),
        sm_scale=0.11, return_lse=True, backend=backend,
    )  # fmt: skip
    assert digest(cache) == before
    check(given, q, dense, 48, dtype, sm_scale=0.11)


def test_the_widths_of_deepseek_in_several_splits(rng: np.random.Generator, backend: str) -> None:
    cache, table, dense = latents(rng, [150, 33], 64, 576, "bfloat16")
    q = encode(rng.standard_normal((2, 16, 576)), "bfloat16")
    lens = np.array([150, 33], np.int32)
    given = kernels.mla_decode(
        q[..., :512], q[..., 512:], cache, table, lens,
        sm_scale=192**-0.5, split_size=64, return_lse=True, backend=backend,
    )  # fmt: skip
    check(given, q, dense, 512, "bfloat16", sm_scale=192**-0.5)


def test_a_scaled_float8_cache(rng: np.random.Generator, backend: str) -> None:
    rows = torch.from_numpy(rng.standard_normal((3, 8, 80)).astype(np.float32))
    cache = (rows / 0.02).clamp(-448, 448).to(torch.float8_e4m3fn)
    q = torch.from_numpy(rng.standard_normal((1, 4, 80)).astype(np.float32))
    table = torch.tensor([[2, 0, 1]], dtype=torch.int32)
    out, lse = kernels.mla_decode(
        q[..., :64].contiguous(), q[..., 64:].contiguous(), cache, table,
        torch.tensor([20], dtype=torch.int32),
        sm_scale=0.1, kv_scale=0.02, return_lse=True, backend=backend,
    )  # fmt: skip
    dense = (cache.double() * 0.02)[[2, 0, 1]].reshape(24, 80)[:20].numpy()
    check((out.numpy(), lse.numpy()), q.numpy(), [dense], 64, "float32", sm_scale=0.1)


def test_out_is_written_in_place(rng: np.random.Generator, backend: str) -> None:
    cache, table, dense = latents(rng, [9], 4, 24, "float32")
    q = encode(rng.standard_normal((1, 2, 24)), "float32")
    out = np.full((1, 2, 16), np.nan, np.float32)
    result, lse = kernels.mla_decode(
        q[..., :16], q[..., 16:], cache, table, np.array([9], np.int32),
        sm_scale=1.0, out=out, return_lse=True, backend=backend,
    )  # fmt: skip
    assert result is out
    check((out, lse), q, dense, 16, "float32", sm_scale=1.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_element_of_out_is_written_and_nothing_beside_it(
    rng: np.random.Generator, backend: str, dtype: str
) -> None:
    lengths = [0, 33, 1, 0]
    cache, table, dense = latents(rng, lengths, 16, 24, dtype)
    q = encode(rng.standard_normal((4, 3, 24)), dtype)
    wide = encode(np.full((4, 3, 16 + 5), np.nan), dtype)
    given = kernels.mla_decode(
        q[..., :16], q[..., 16:], cache, table, np.array(lengths, np.int32),
        sm_scale=0.2, out=wide[..., 2:-3], return_lse=True, backend=backend,
    )  # fmt: skip
    assert np.isfinite(decode(given[0])).all()
    assert np.isnan(decode(wide)).sum() == 5 * 4 * 3
    check(given, q, dense, 16, dtype, sm_scale=0.2)


@pytest.mark.parametrize(
    ("match", "change"),
    [
        (r"latent_cache: expected shape \[num_blocks, block_size, 24\]", {"latent_cache": np.zeros((2, 4, 25), np.float32)}),
        (r"q_rope: expected shape", {"q_rope": np.zeros((1, 3, 8), np.float32)}),
        (r"q_rope: expected dtype float32", {"q_rope": np.zeros((1, 2, 8), np.float16)}),
        (r"block_table\[0, 0\]: expected a block id", {"block_table": np.array([[5]], np.int32)}),
        (r"sm_scale: expected a finite", {"sm_scale": float("nan")}),
        (r"split_size", {"split_size": 0}),
        (r"out: expected shape", {"out": np.zeros((1, 2, 24), np.float32)}),
        (r"latent_cache: expected a block size", {"latent_cache": np.zeros((1, 65_537, 24), np.float32)}),
    ],
)  # fmt: skip
def test_mistakes_are_refused(backend: str, match: str, change: dict[str, Any]) -> None:
    call: dict[str, Any] = {
        "q_latent": np.zeros((1, 2, 16), np.float32),
        "q_rope": np.zeros((1, 2, 8), np.float32),
        "latent_cache": np.zeros((2, 4, 24), np.float32),
        "block_table": np.array([[1]], np.int32),
        "seq_lens": np.array([3], np.int32),
        "sm_scale": 1.0,
        "backend": backend,
        **change,
    }
    with pytest.raises(InvalidArgumentError, match=match):
        kernels.mla_decode(**call)
