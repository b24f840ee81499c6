# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""float8 and int8 caches: codes as PyTorch has them, scales per tensor, head, and token and head."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from paged_cases import NpArray, assert_close, digest, oracle

from kvxfer import KVLayout, kernels
from kvxfer.errors import InvalidArgumentError, LayoutError, UnavailableError
from kvxfer.layout import KVScales

FLOAT8 = {"float8_e4m3": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}
EIGHT = (*FLOAT8, "int8")
LARGEST = {"float8_e4m3": 448.0, "float8_e5m2": 57344.0, "int8": 127.0}


def kv_dtype(dtype: str) -> str | None:
    return dtype if dtype in FLOAT8 else None


def zeros(shape: tuple[int, ...], dtype: str) -> NpArray:
    return np.zeros(shape, np.int8 if dtype == "int8" else np.uint8)


def values_of(stored: NpArray, dtype: str) -> NpArray:
    """What the stored numbers are, by PyTorch."""
    if dtype == "int8":
        return stored.astype(np.float64)
    return torch.from_numpy(stored).view(FLOAT8[dtype]).double().numpy()


def stored_by_torch(values: NpArray, dtype: str) -> NpArray:
    tensor = torch.from_numpy(np.asarray(values, np.float32))
    limit = LARGEST[dtype]
    if dtype == "int8":
        return torch.round(tensor).clamp(-128, 127).to(torch.int8).numpy()
    return tensor.clamp(-limit, limit).to(FLOAT8[dtype]).view(torch.uint8).numpy()


def store(backend: str, values: NpArray, dtype: str, **options: Any) -> tuple[NpArray, NpArray]:
    """Values ``[tokens, heads, channels]`` through append_kv into blocks of 4."""
    tokens, heads, width = values.shape
    k = zeros((-(-tokens // 4), 4, heads, width), dtype)
    v = k.copy()
    kernels.append_kv(
        values,
        values,
        k,
        v,
        np.arange(tokens),
        kv_dtype=kv_dtype(dtype),
        backend=backend,
        **options,
    )
    return k.reshape(-1, heads, width)[:tokens], v.reshape(-1, heads, width)[:tokens]


@pytest.mark.parametrize("dtype", EIGHT)
def test_stored_numbers_are_those_of_pytorch(
    rng: np.random.Generator, backend: str, dtype: str
) -> None:
    edge = np.array([0.0, -0.0, np.nan, 1e30, -1e30, 2.0**-9, 2.0**-10, 3 * 2.0**-10, 2.0**-17])
    codes = np.arange(256, dtype=np.uint8).view(np.int8 if dtype == "int8" else np.uint8)
    exact = values_of(codes, dtype)
    exact = exact[np.isfinite(exact)]
    between = (np.sort(exact)[:-1] + np.sort(exact)[1:]) / 2  # ties
    wide = rng.standard_normal(997) * np.exp2(rng.integers(-20, 20, 997))
    values = np.concatenate([edge, exact, between, wide]).astype(np.float32)
    if dtype == "int8":
        values = values[~np.isnan(values)]  # torch has no rule for it
    values = np.resize(values, (len(values) // 37 + 1, 1, 37))
    k, v = store(backend, values, dtype)
    np.testing.assert_array_equal(k, stored_by_torch(values, dtype))
    np.testing.assert_array_equal(v, k)


def test_what_has_no_code(backend: str) -> None:
    values = np.array([np.inf, -np.inf, np.nan], np.float32).reshape(1, 1, 3)
    for dtype in FLOAT8:
        stored = values_of(store(backend, values, dtype)[0], dtype).ravel()
        assert stored[0] == LARGEST[dtype]
        assert stored[1] == -LARGEST[dtype]
        assert np.isnan(stored[2])
    assert store(backend, values, "int8")[0].ravel().tolist() == [127, -128, -128]


@pytest.mark.parametrize("source", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("dtype", EIGHT)
def test_append_divides_by_its_scale(
    rng: np.random.Generator, backend: str, dtype: str, source: str
) -> None:
    wide = torch.from_numpy(rng.standard_normal((9, 2, 24)).astype(np.float32) * 3)
    values = wide.to(getattr(torch, source))
    k = torch.zeros((3, 4, 2, 24), dtype=FLOAT8.get(dtype, torch.int8))
    v = k.clone()
    kernels.append_kv(
        values, values, k, v, torch.arange(9), k_scale=0.07, v_scale=1.5, backend=backend
    )
    for cache, scale in ((k, 0.07), (v, 1.5)):
        expected = stored_by_torch((values.float() / np.float32(scale)).numpy(), dtype)
        given = cache.view(torch.uint8 if dtype != "int8" else torch.int8).numpy()
        np.testing.assert_array_equal(given.reshape(-1, 2, 24)[:9], expected)


@pytest.mark.parametrize("dtype", EIGHT)
def test_append_with_scales_per_token_and_head(
    rng: np.random.Generator, backend: str, dtype: str
) -> None:
    values = rng.standard_normal((7, 3, 20)).astype(np.float32)
    values *= np.exp2(rng.integers(-8, 8, (7, 3, 1))).astype(np.float32)
    values[2, 1] = 0
    k = zeros((2, 3, 4, 20), dtype)
    v = k.copy()
    scales = [np.full((2, 3, 4), np.nan, np.float32) for _ in range(2)]
    slots = np.array([5, -1, 0, 7, 1, 2, 3])
    kernels.append_kv(
        values, values, k, v, slots, kv_layout="HND", kv_dtype=kv_dtype(dtype),
        k_scale_cache=scales[0], v_scale_cache=scales[1], backend=backend,
    )  # fmt: skip
    for cache, scale in ((k, scales[0]), (v, scales[1])):
        for row, slot in enumerate(slots):
            if slot < 0:
                continue
            block, offset = divmod(int(slot), 4)
            top = np.abs(values[row]).max(axis=1)
            expected = np.where(top > 0, top / np.float32(LARGEST[dtype]), np.float32(1))
            np.testing.assert_array_equal(scale[block, :, offset], expected)
            back = values_of(cache[block, :, offset], dtype) * expected[:, None]
            limit = (0.5 / 127 if dtype == "int8" else 2.0**-3) * top[:, None]
            assert (np.abs(back - values[row]) <= limit + 1e-12).all()
        written = {(int(s) // 4, int(s) % 4) for s in slots if s >= 0}
        for block, offset in set(np.ndindex(2, 4)) - written:
            assert np.isnan(scale[block, :, offset]).all(), "a scale of no token was touched"


@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
@pytest.mark.parametrize("dtype", EIGHT)
def test_attention_over_eight_bits(
    rng: np.random.Generator, backend: str, dtype: str, kv_layout: str, in_memory: bool
) -> None:
    lengths, block_size, heads, width = [37, 1, 0, 16], 8, 2, 40
    num_blocks = 16
    shape = (num_blocks, block_size, heads, width)
    table = np.full((4, 5), -1, np.int32)
    order = iter(rng.permutation(num_blocks))
    poison = 0x7F  # a NaN as float8; int8 has none, so its scales are NaN
    k, v = np.full_like(zeros(shape, dtype), poison), np.full_like(zeros(shape, dtype), poison)
    scales = [np.full(shape[:3], np.nan, np.float32) for _ in range(2)]
    dense = []
    k_scale, v_scale = 0.013, 0.021
    for b, length in enumerate(lengths):
        row: list[list[NpArray]] = [[], []]
        for column in range(-(-length // block_size)):
            table[b, column] = next(order)
        for token in range(length):
            at = (table[b, token // block_size], token % block_size)
            for side, (cache, fixed) in enumerate(((k, k_scale), (v, v_scale))):
                values = rng.standard_normal((heads, width)) * (40 if dtype == "int8" else 1)
                cache[at] = stored_by_torch(values, dtype)
                scales[side][at] = rng.uniform(0.5, 2, heads)
                factor = scales[side][at][:, None] if in_memory else 1.0
                row[side].append(values_of(cache[at], dtype) * factor * fixed)
        dense.append([np.array(side).reshape(-1, heads, width) for side in row])
    options: dict[str, Any] = {"k_scale": k_scale, "v_scale": v_scale, "kv_layout": kv_layout}
    arrays = [k, v, *scales]
    if kv_layout == "HND":
        arrays = [np.ascontiguousarray(a.swapaxes(1, 2)) for a in arrays]
    if in_memory:
        options |= {"k_scale_cache": arrays[2], "v_scale_cache": arrays[3]}
    before = digest(*arrays)
    q = rng.standard_normal((4, 6, width)).astype(np.float32)
    lens = np.array(lengths, np.int32)
    given = kernels.paged_decode(
        q, arrays[0], arrays[1], table, lens,
        return_lse=True, kv_dtype=kv_dtype(dtype), backend=backend, **options,
    )  # fmt: skip
    for b, (dense_k, dense_v) in enumerate(dense):
        if not lengths[b]:
            assert not given[0][b].any()
            assert np.isneginf(given[1][b]).all()
            continue
        expected = oracle(q[b : b + 1].astype(np.float64), dense_k, dense_v)
        assert_close((given[0][b : b + 1], given[1][b : b + 1]), expected, "float32", 2e-5)
    starts = np.array([0, 5, 6, 6, 22], np.int32)
    q = rng.standard_normal((22, 6, width)).astype(np.float32)
    given = kernels.paged_prefill(
        q, arrays[0], arrays[1], starts, table, lens,
        return_lse=True, kv_dtype=kv_dtype(dtype), backend=backend, **options,
    )  # fmt: skip
    for b, (dense_k, dense_v) in enumerate(dense):
        rows = slice(int(starts[b]), int(starts[b + 1]))
        if rows.start == rows.stop:
            continue
        expected = oracle(q[rows].astype(np.float64), dense_k, dense_v)
        assert_close((given[0][rows], given[1][rows]), expected, "float32", 2e-5)
    assert digest(*arrays) == before


def layout(dtype: str, scales: KVScales | None, order: str = "LBKNHC") -> KVLayout:
    return KVLayout.from_order(
        order, num_layers=2, num_blocks=3, block_size=4, num_kv_heads=2, head_dim=24, dtype=dtype,
        scales=scales,
    )  # fmt: skip


PER_TENSOR = KVScales("tensor", k=(0.5, 0.02), v=(0.03,))
PER_HEAD = KVScales("head", k=(0.1, 0.2, 0.3, 0.4), v=(0.7, 0.05))


@pytest.mark.parametrize(
    ("src", "dst"),
    [
        (("float32", None), ("float8_e4m3", PER_HEAD)),
        (("bfloat16", None), ("int8", PER_TENSOR)),
        (("float8_e4m3", PER_TENSOR), ("float16", None)),
        (("float8_e5m2", None), ("float8_e4m3", PER_HEAD)),
        (("int8", PER_HEAD), ("int8", PER_TENSOR)),
        (("int8", PER_HEAD), ("int8", PER_HEAD)),
        (("float8_e4m3", PER_HEAD), ("float8_e4m3", PER_HEAD)),
    ],
)
def test_copy_converts_between_fixed_scales(
    rng: np.random.Generator,
    backend: str,
    src: tuple[str, KVScales | None],
    dst: tuple[str, KVScales | None],
) -> None:
    a, b = layout(*src), layout(*dst, order="LBKHNC")
    source = rng.integers(0, 256, a.nbytes, np.uint8)
    if "float" in src[0]:
        parts = np.concatenate([rng.standard_normal(a.nbytes).astype(np.float32)])
        tensor = torch.from_numpy(parts)
        named = FLOAT8.get(src[0], getattr(torch, src[0], None))
        source = tensor.to(named).view(torch.uint8).numpy()[: a.nbytes].copy()
    target = np.zeros(b.nbytes, np.uint8)
    kernels.copy_blocks(a, source, b, target, [0, 1, 2], [2, 0, 1], backend=backend)
    view = read(source, a, src[0]).transpose(0, 1, 2, 4, 3, 5)  # L B K N H C -> L B K H N C
    factors = np.ones((2, 2, 2, 2), np.float32)  # src or dst, layer, part, head
    for side, scales in enumerate((src[1], dst[1])):
        if scales is None:
            continue
        for part, numbers in enumerate((scales.k, scales.v)):
            heads = 2 if scales.granularity == "head" else 1
            table = np.asarray(numbers, np.float32).reshape(-1, heads)
            factors[side, :, part] = np.broadcast_to(table, (2, heads))
    values = view.astype(np.float32) * factors[0][:, None, :, :, None, None]
    values = values / factors[1][:, None, :, :, None, None]
    given = read(target, b, dst[0], heads_first=True)[:, [2, 0, 1]]
    if src[0] == dst[0] and src[1] == dst[1]:
        expected = view
    elif dst[0] in EIGHT:
        expected = values_of(stored_by_torch(values, dst[0]), dst[0])
    else:
        expected = torch.from_numpy(values).to(getattr(torch, dst[0])).double().numpy()
    np.testing.assert_array_equal(given, expected)


def read(memory: NpArray, a: KVLayout, dtype: str, heads_first: bool = False) -> NpArray:
    """All values as float64 in the layout's own order of axes."""
    shape = (2, 3, 2, 2, 4, 24) if heads_first else (2, 3, 2, 4, 2, 24)
    if dtype == "int8":
        return memory.view(np.int8).reshape(shape).astype(np.float64)
    tensor = torch.from_numpy(memory).view(FLOAT8.get(dtype, getattr(torch, dtype, None)))
    return tensor.double().numpy().reshape(shape)


def test_copy_refuses_to_rescale_what_has_scales_in_memory() -> None:
    scaled = KVLayout.from_order(
        "LBKNHC", num_layers=2, num_blocks=3, block_size=4, num_kv_heads=2, head_dim=24,
        dtype="float8_e4m3", scales=KVScales("token_head", order="LBKNH", offset=1 << 14),
    )  # fmt: skip
    plain = layout("float16", None)
    with pytest.raises(LayoutError, match="scales: the source has scales per token_head in memory"):
        kernels.copy_blocks(
            scaled,
            np.zeros(scaled.nbytes, np.uint8),
            plain,
            np.zeros(plain.nbytes, np.uint8),
            [0],
            [0],
        )


def test_bytes_are_never_guessed() -> None:
    cache = np.zeros((2, 4, 1, 16), np.uint8)
    key = np.zeros((1, 1, 16), np.float32)
    slots = np.zeros(1, np.int64)
    with pytest.raises(InvalidArgumentError, match="kv_dtype: expected 'float8_e4m3' or"):
        kernels.append_kv(key, key, cache, cache.copy(), slots)
    with pytest.raises(InvalidArgumentError, match="since k_cache is int8"):
        kernels.append_kv(
            key, key, cache.view(np.int8), cache.view(np.int8).copy(), slots, kv_dtype="float8_e4m3"
        )


def test_scale_caches_come_in_pairs_and_only_with_eight_bits() -> None:
    key = np.zeros((1, 1, 16), np.float32)
    slots = np.zeros(1, np.int64)
    scale = np.ones((2, 4, 1), np.float32)
    eight = np.zeros((2, 4, 1, 16), np.int8)
    with pytest.raises(InvalidArgumentError, match="v_scale_cache: expected scales for both"):
        kernels.append_kv(key, key, eight, eight.copy(), slots, k_scale_cache=scale)
    wide = np.zeros((2, 4, 1, 16), np.float32)
    both = {"k_scale_cache": scale, "v_scale_cache": scale.copy()}
    with pytest.raises(InvalidArgumentError, match="expected an 8-bit cache"):
        kernels.append_kv(key, key, wide, wide.copy(), slots, **both)
    with pytest.raises(InvalidArgumentError, match="k_scale and v_scale of 1"):
        kernels.append_kv(key, key, eight, eight.copy(), slots, k_scale=2.0, **both)
    both["k_scale_cache"] = np.ones((2, 5, 1), np.float32)
    with pytest.raises(InvalidArgumentError, match=r"k_scale_cache: expected shape \[2, 4, 1\]"):
        kernels.append_kv(key, key, eight, eight.copy(), slots, **both)


def test_a_backend_without_a_dtype_says_so() -> None:
    cache = torch.zeros((2, 4, 1, 16), dtype=torch.int8)
    key = torch.zeros((1, 1, 16))
    with pytest.raises(UnavailableError, match="not int8"):
        kernels.append_kv(
            key, key, cache, cache.clone(), torch.zeros(1, dtype=torch.int64), backend="cuda"
        )
