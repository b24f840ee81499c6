# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Decode and prefill of every host backend against a float64 oracle, over poisoned caches."""

from __future__ import annotations

from functools import partial
from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from paged_cases import (
    DTYPES,
    EPS,
    NpArray,
    Paged,
    assert_close,
    decode,
    digest,
    encode,
    oracle,
    paged,
)

from kvxfer import kernels

FORMS = ("NHD", "HND", "fused", "padded")


def check_decode(
    rng: np.random.Generator,
    cache: Paged,
    backend: str,
    dtype: str,
    num_q_heads: int,
    slack: float = 1e-5,
    **options: Any,
) -> None:
    q = encode(rng.standard_normal((len(cache.seq_lens), num_q_heads, cache.k.shape[-1])), dtype)
    before = digest(cache.k, cache.v)
    given = kernels.paged_decode(
        q, cache.k, cache.v, cache.block_table, cache.seq_lens,
        kv_layout=cache.kv_layout, return_lse=True, backend=backend, **options,
    )  # fmt: skip
    assert digest(cache.k, cache.v) == before
    expected = [
        oracle(decode(q[b : b + 1]), *dense, **options)
        if len(dense[0])
        else empty_rows(1, num_q_heads, cache.v.shape[-1], options.get("sinks"))
        for b, dense in enumerate(cache.dense)
    ]
    assert_close(given, stack(expected), dtype, slack)


def check_prefill(
    rng: np.random.Generator,
    cache: Paged,
    new: list[int],
    backend: str,
    dtype: str,
    num_q_heads: int,
    slack: float = 1e-5,
    **options: Any,
) -> None:
    starts = np.concatenate([[0], np.cumsum(new)]).astype(np.int32)
    q = encode(rng.standard_normal((int(starts[-1]), num_q_heads, cache.k.shape[-1])), dtype)
    given = kernels.paged_prefill(
        q, cache.k, cache.v, starts, cache.block_table, cache.seq_lens,
        kv_layout=cache.kv_layout, return_lse=True, backend=backend, **options,
    )  # fmt: skip
    expected = [
        oracle(decode(q[starts[b] : starts[b + 1]]), *dense, **options)
        for b, dense in enumerate(cache.dense)
    ]
    assert_close(given, stack(expected), dtype, slack)


def empty_rows(rows: int, heads: int, width: int, sinks: NpArray | None) -> tuple[NpArray, NpArray]:
    lse = np.full((rows, heads), -np.inf) if sinks is None else np.tile(sinks, (rows, 1))
    return np.zeros((rows, heads, width)), lse


def stack(rows: list[tuple[NpArray, NpArray]]) -> tuple[NpArray, NpArray]:
    return np.concatenate([r[0] for r in rows]), np.concatenate([r[1] for r in rows])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("block_size", [1, 5, 16, 256, 528])
def test_decode_at_the_edges_of_blocks(
    rng: np.random.Generator, backend: str, block_size: int, form: str
) -> None:
    lengths = [0, 1, block_size - 1, block_size, block_size + 1, 70]
    cache = paged(rng, lengths, block_size=block_size, form=form, head_dim=32)
    check_decode(rng, cache, backend, "float32", 4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("head_dim", "head_dim_v", "num_kv_heads", "group"),
    [
        (8, 8, 1, 1),
        (16, 16, 2, 3),
        (40, 24, 2, 2),
        (64, 64, 2, 2),
        (128, 128, 1, 7),
        (256, 64, 1, 4),
        (12, 20, 3, 1),
        # Row groups of 8, 4, 2 and 1, and channels that fill no pair of vectors.
        (128, 128, 2, 8),
        (72, 104, 2, 15),
        (48, 80, 1, 16),
    ],
)
def test_decode_head_sizes_groups_and_dtypes(
    rng: np.random.Generator,
    backend: str,
    dtype: str,
    head_dim: int,
    head_dim_v: int,
    num_kv_heads: int,
    group: int,
) -> None:
    cache = paged(
        rng,
        [33, 7],
        dtype=dtype,
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        num_kv_heads=num_kv_heads,
    )
    check_decode(rng, cache, backend, dtype, num_kv_heads * group)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("block_size", [1, 16, 48, 528])
def test_prefill_of_fresh_prompts_and_of_chunks(
    rng: np.random.Generator, backend: str, block_size: int, form: str
) -> None:
    lengths = [1, block_size, block_size + 1, 130, 131, 64, 65]
    new = [1, block_size, 1, 130, 50, 64, 2]
    cache = paged(rng, lengths, block_size=block_size, form=form, head_dim=32)
    for causal in (True, False):
        check_prefill(rng, cache, new, backend, "float32", 4, causal=causal)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("head_dim", "head_dim_v", "num_kv_heads", "group"),
    [
        (8, 8, 1, 1),
        (16, 16, 2, 3),
        (40, 24, 2, 2),
        (64, 64, 2, 2),
        (128, 128, 1, 7),
        (12, 20, 3, 1),
    ],
)
def test_prefill_head_sizes_groups_and_dtypes(
    rng: np.random.Generator,
    backend: str,
    dtype: str,
    head_dim: int,
    head_dim_v: int,
    num_kv_heads: int,
    group: int,
) -> None:
    cache = paged(
        rng,
        [70, 9],
        dtype=dtype,
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        num_kv_heads=num_kv_heads,
    )
    check_prefill(rng, cache, [35, 9], backend, dtype, num_kv_heads * group)


@pytest.mark.parametrize("window_left", [0, 1, 17, 64, 1000])
def test_nothing_in_front_of_the_window_is_read(
    rng: np.random.Generator, backend: str, window_left: int
) -> None:
    lengths, new = [1, 40, 100, 140], [1, 40, 30, 1]
    options = {"window_left": window_left}
    firsts = [max(0, n - m - window_left) for n, m in zip(lengths, new, strict=True)]
    cache = paged(rng, lengths, first_keys=firsts, head_dim=16)
    check_prefill(rng, cache, new, backend, "float32", 2, **options)
    firsts = [max(0, n - 1 - window_left) for n in lengths]
    cache = paged(rng, lengths, first_keys=firsts, head_dim=16)
    check_decode(rng, cache, backend, "float32", 2, **options)


@pytest.mark.parametrize("cap", [0.0, 2.5, 50.0])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_caps_sinks_and_scales(
    rng: np.random.Generator, backend: str, cap: float, with_sinks: bool
) -> None:
    sinks = rng.standard_normal(6).astype(np.float32) * 3 if with_sinks else None
    options: dict[str, Any] = {"logits_soft_cap": cap, "sinks": sinks, "sm_scale": 1.7}
    cache = paged(rng, [0, 5, 90], head_dim=16)
    check_decode(rng, cache, backend, "float32", 6, **options)
    cache = paged(rng, [6, 90], head_dim=16)
    check_prefill(rng, cache, [6, 61], backend, "float32", 6, **options)


def test_stored_values_are_multiplied_by_their_scales(
    rng: np.random.Generator, backend: str
) -> None:
    cache = paged(rng, [40], head_dim=16)
    q = encode(rng.standard_normal((1, 2, 16)), "float32")
    out = kernels.paged_decode(
        q, cache.k, cache.v, cache.block_table, cache.seq_lens,
        kv_layout="HND", k_scale=0.5, v_scale=3.0, backend=backend,
    )  # fmt: skip
    k, v = cache.dense[0]
    assert np.allclose(out, oracle(decode(q), k * 0.5, v * 3)[0], atol=1e-5)


def test_huge_logits_neither_overflow_nor_turn_into_nan(
    rng: np.random.Generator, backend: str
) -> None:
    cache = paged(rng, [100, 3], head_dim=64)
    # Logits of thousands carry a rounding error of 1e-3 in float32, whoever computes them.
    check_decode(rng, cache, backend, "float32", 2, sm_scale=300.0, slack=5e-3)
    check_prefill(rng, cache, [100, 2], backend, "float32", 2, sm_scale=300.0, slack=5e-3)


def test_a_nan_that_may_be_read_is_not_hidden(rng: np.random.Generator, backend: str) -> None:
    for which in ("k", "v"):
        cache = paged(rng, [40, 40], head_dim=16)
        block = cache.block_table[1, 1]
        getattr(cache, which)[block, 0, 3, 5] = np.nan
        q = encode(rng.standard_normal((2, 2, 16)), "float32")
        out = kernels.paged_decode(
            q, cache.k, cache.v, cache.block_table, cache.seq_lens, kv_layout="HND", backend=backend
        )
        assert np.isnan(out[1, 0]).any()
        assert np.isfinite(out[0]).all()
        assert np.isfinite(out[1, 1]).all()


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("causal", "window_left"), [(True, -1), (True, 20), (False, 20)])
@pytest.mark.parametrize("which", ["k", "v"])
def test_what_a_row_may_not_see_does_not_reach_it(
    rng: np.random.Generator,
    backend: str,
    which: str,
    causal: bool,
    window_left: int,
    wrong: float,
) -> None:
    # Once: a later token's NaN came to all rows of its tile, by a weight of 0 that multiplied it.
    length, new, tokens = 190, 170, [30, 64, 101]
    tokens += [189] if causal else []  # which all rows see otherwise
    cache = paged(rng, [length], head_dim=24, head_dim_v=20)
    q = encode(rng.standard_normal((new, 4, 24)), "float32")

    def run() -> tuple[NpArray, NpArray]:
        return kernels.paged_prefill(
            q, cache.k, cache.v, np.array([0, new], np.int32), cache.block_table, cache.seq_lens,
            kv_layout="HND", causal=causal, window_left=window_left, return_lse=True, backend=backend,
        )  # fmt: skip

    clean, clean_lse = run()
    sees = np.zeros(new, bool)
    positions = np.arange(length - new, length)
    for token in tokens:
        getattr(cache, which)[cache.block_table[0, token // 16], 0, token % 16, 3] = wrong
        sees |= (not causal or token <= positions) & (
            window_left < 0 or token >= positions - window_left
        )
    assert 0 < sees.sum() < new
    out, lse = run()
    assert np.array_equal(out[~sees], clean[~sees])
    assert np.array_equal(lse[~sees], clean_lse[~sees])
    assert np.array_equal(out[:, 2:], clean[:, 2:]), "the other KV head"
    if which == "v" or np.isnan(wrong):
        assert not np.isfinite(out[sees, :2, 3]).any(), "what is seen is not hidden"


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_element_of_out_is_written_and_nothing_beside_it(
    rng: np.random.Generator, backend: str, dtype: str
) -> None:
    lengths, new = [0, 1, 90, 0, 20, 33], [0, 1, 61, 0, 0, 33]
    starts = np.concatenate([[0], np.cumsum(new)]).astype(np.int32)
    cache = paged(rng, lengths, head_dim=40, head_dim_v=24, dtype=dtype)
    rest = (cache.block_table, cache.seq_lens)
    for op, rows, more in (
        ("paged_decode", len(lengths), rest),
        ("paged_prefill", int(starts[-1]), (starts, *rest)),
    ):
        q = encode(rng.standard_normal((rows, 6, 40)), dtype)
        wide = encode(np.full((rows, 6, 24 + 5), np.nan), dtype)
        out = wide[..., 2:-3]
        run = partial(getattr(kernels, op), q, cache.k, cache.v, *more, kv_layout="HND", backend=backend)  # fmt: skip
        assert run(out=out) is out
        assert np.isfinite(decode(out)).all(), op
        assert np.isnan(decode(wide)).sum() == 5 * rows * 6
        assert np.array_equal(out, run())
        if op == "paged_decode":
            assert not decode(out)[cache.seq_lens == 0].any()


@st.composite
def shapes(draw: st.DrawFn) -> dict[str, Any]:
    length = st.integers(1, 150)
    lengths = draw(st.lists(length, min_size=1, max_size=4))
    return {
        "seed": draw(st.integers(0, 2**32 - 1)),
        "lengths": lengths,
        "new": [draw(st.integers(0, n)) for n in lengths],
        "block_size": draw(st.integers(1, 70)),
        "num_kv_heads": draw(st.integers(1, 3)),
        "group": draw(st.integers(1, 9)),
        "head_dim": draw(st.integers(1, 72)),
        "head_dim_v": draw(st.integers(1, 72)),
        "dtype": draw(st.sampled_from(DTYPES)),
        "form": draw(st.sampled_from(FORMS)),
        "window_left": draw(st.sampled_from([-1, -1, 0, 3, 40])),
        "logits_soft_cap": draw(st.sampled_from([0.0, 0.0, 20.0])),
        "causal": draw(st.booleans()),
        "sinks": draw(st.booleans()),
    }


@hypothesis.settings(max_examples=60)
@hypothesis.given(shapes())
def test_any_shape_agrees_with_the_oracle(case: dict[str, Any]) -> None:
    rng = np.random.default_rng(case["seed"])
    num_q_heads = case["num_kv_heads"] * case["group"]
    options = {
        "window_left": case["window_left"],
        "logits_soft_cap": case["logits_soft_cap"],
        "sinks": rng.standard_normal(num_q_heads).astype(np.float32) if case["sinks"] else None,
    }
    shape = {
        name: case[name]
        for name in ("block_size", "num_kv_heads", "head_dim", "head_dim_v", "dtype", "form")
    }
    cache = paged(rng, case["lengths"], **shape)
    check_decode(rng, cache, "auto", case["dtype"], num_q_heads, **options)
    check_prefill(
        rng,
        cache,
        case["new"],
        "auto",
        case["dtype"],
        num_q_heads,
        causal=case["causal"],
        **options,
    )


def test_merged_halves_equal_the_whole(rng: np.random.Generator, backend: str) -> None:
    for dtype in DTYPES:
        q = rng.standard_normal((5, 3, 20))
        k, v = rng.standard_normal((50, 3, 20)), rng.standard_normal((50, 3, 20))
        whole = oracle(q, k, v, causal=False)
        a, b = oracle(q, k[:20], v[:20], causal=False), oracle(q, k[20:], v[20:], causal=False)
        halves = [(encode(out, dtype), lse.astype(np.float32)) for out, lse in (a, b)]
        given = kernels.merge_states(*halves[0], *halves[1], backend=backend)
        assert given[0].dtype == halves[0][0].dtype
        assert np.abs(decode(given[0]) - whole[0]).max() < 4 * EPS[dtype] + 1e-6
        assert np.abs(given[1] - whole[1]).max() < 1e-5


def test_merging_with_nothing_changes_nothing(rng: np.random.Generator, backend: str) -> None:
    v = rng.standard_normal((2, 3, 20)).astype(np.float32)
    lse = rng.standard_normal((2, 3)).astype(np.float32)
    unwritten, nothing = np.full_like(v, np.nan), np.full_like(lse, -np.inf)
    out, out_lse = kernels.merge_states(v, lse, unwritten, nothing, backend=backend)
    assert np.allclose(out, v)
    assert np.allclose(out_lse, lse)
    out, out_lse = kernels.merge_states(unwritten, nothing, unwritten, nothing, backend=backend)
    assert (out == 0).all()
    assert np.isneginf(out_lse).all()
