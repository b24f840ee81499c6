# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Triton append, copy, pack and unpack under the interpreter: every byte against the reference."""

from __future__ import annotations

from typing import Any

import pytest
from triton_cases import needs_interpreter, torch

from kvxfer import kernels
from kvxfer.errors import InvalidArgumentError
from kvxfer.layout import KVLayout

pytestmark = needs_interpreter

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def bits(array: Any) -> Any:
    return array.view({4: torch.int32, 2: torch.int16}[array.element_size()])


@pytest.mark.parametrize("cache_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("block_size", "order"), [(1, "NHD"), (16, "NHD"), (5, "HND")])
def test_append_writes_its_slots_and_no_other_byte(
    dtype: Any, cache_dtype: Any, block_size: int, order: str
) -> None:
    torch.manual_seed(0)
    key, value = torch.randn(6, 3, 20).to(dtype), torch.randn(6, 4, 12).to(dtype)[:, :3]
    last = 32 * block_size - 1
    slots = torch.tensor([0, -1, last, block_size, last - block_size, 7])
    caches = {}
    for backend in ("triton", "reference"):
        k, v = (
            torch.full((32, 4, block_size, w), float("nan"))
            .to(cache_dtype)
            .permute(0, 2, 1, 3)[:, :, :3]
            if order == "HND"
            else torch.full((32, block_size, 4, w), float("nan")).to(cache_dtype)[:, :, :3]
            for w in (20, 12)
        )
        kernels.append_kv(key, value, k, v, slots, k_scale=0.37, v_scale=1.0, backend=backend)
        caches[backend] = (k, v)
    for ours, theirs in zip(caches["triton"], caches["reference"], strict=True):
        assert torch.equal(bits(ours.contiguous()), bits(theirs.contiguous()))
        assert not torch.isnan(ours[0, 0]).any()


def test_append_of_nothing_does_nothing() -> None:
    cache = torch.zeros(2, 4, 1, 8)
    kernels.append_kv(
        torch.ones(0, 1, 8),
        torch.ones(0, 1, 8),
        cache,
        cache.clone(),
        torch.empty(0, dtype=torch.int64),
        backend="triton",
    )
    assert not cache.any()


@pytest.mark.parametrize("slot", [8, -2])
def test_append_refuses_slots_that_no_block_has(slot: int) -> None:
    cache = torch.zeros(2, 4, 1, 8)
    row = torch.ones(2, 1, 8)
    with pytest.raises(
        InvalidArgumentError,
        match=rf"slot_mapping\[1\]: expected -1 or a slot from 0 to 7 .*given {slot}",
    ):
        kernels.append_kv(row, row, cache, cache.clone(), torch.tensor([0, slot]), backend="triton")
    assert not cache.any()


def test_nan_and_infinity_survive_the_way_to_bfloat16() -> None:
    values = torch.tensor(
        [float("nan"), float("inf"), -float("inf"), 3.4e38, 1e-40, -0.0, 1.00390625, 1.01171875]
    )
    k = torch.zeros(1, 1, 1, 8, dtype=torch.bfloat16)
    kernels.append_kv(
        values.view(1, 1, 8),
        values.view(1, 1, 8),
        k,
        k.clone(),
        torch.tensor([0]),
        backend="triton",
    )
    want = values.to(torch.bfloat16)
    assert torch.isnan(k.flatten()[0])
    assert torch.equal(bits(k.flatten()[1:]), bits(want[1:]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_keeps_its_dtype_keeps_the_bits_of_its_nans(dtype: Any) -> None:
    """Signalling ones too: once the interpreter's detour for bfloat16 made them quiet."""
    patterns = {
        torch.float32: [0x7FC00000, 0x7F800001, 0x7FABCDEF, -1],
        torch.float16: [0x7E00, 0x7C01, 0x7D55, -1],
        torch.bfloat16: [0x7FC0, 0x7F81, 0x7FA5, -1],
    }[dtype]
    rows = torch.tensor(patterns, dtype=bits(torch.zeros(1, dtype=dtype)).dtype).view(dtype)
    rows = rows.view(1, 1, 4).expand(1, 2, 4).contiguous()
    k, v = torch.zeros(1, 1, 2, 4, dtype=dtype), torch.zeros(1, 1, 2, 4, dtype=dtype)
    kernels.append_kv(rows, rows, k, v, torch.tensor([0]), backend="triton")
    assert torch.equal(bits(k[0]), bits(rows))
    assert torch.equal(bits(v[0]), bits(rows))


SHAPE: dict[str, Any] = {"num_kv_heads": 4, "num_layers": 3}


def filled(layout: KVLayout) -> Any:
    torch.manual_seed(1)
    if layout.dtype in ("uint8", "float8_e4m3"):
        return torch.randint(0, 255, (layout.nbytes,), dtype=torch.uint8)
    return (
        torch.randn(layout.nbytes // layout.itemsize)
        .to(getattr(torch, layout.dtype))
        .view(torch.uint8)
    )


CASES = {
    "16-byte rows, NHD to block-major HND": ("LKBNHC", "BLKHNC", "bfloat16", "bfloat16", 32),
    "fused to split": ("LBHNKC", "LKBNHC", "float16", "float16", 8),
    "odd rows": ("LKBHNC", "LBHNKC", "bfloat16", "bfloat16", 5),
    "bytes": ("LKBNHC", "LKBHNC", "uint8", "uint8", 3),
    "fp8 untouched": ("LKBNHC", "LKBHNC", "float8_e4m3", "float8_e4m3", 24),
    "wider than a tile": ("LKBNHC", "LKBNHC", "float32", "float32", 260),
    "narrowed": ("LKBNHC", "LKBHNC", "float32", "bfloat16", 16),
    "converted": ("LBHNKC", "LKBNHC", "bfloat16", "float16", 12),
}


@pytest.mark.parametrize(("ours", "theirs", "dtype", "other", "width"), CASES.values(), ids=CASES)
def test_copies_between_unlike_layouts(
    ours: str, theirs: str, dtype: str, other: str, width: int
) -> None:
    """Blocks of 5 to blocks of 7, one rank to the second of two, a hole, both ends inside blocks."""
    src = KVLayout.from_order(
        ours, num_blocks=9, block_size=5, head_dim=width, dtype=dtype, **SHAPE
    )
    dst = KVLayout.from_order(
        theirs,
        num_blocks=6,
        block_size=7,
        head_dim=width,
        dtype=other,
        tp_size=2,
        tp_rank=1,
        **SHAPE,
    )
    source = filled(src)
    got = {}
    for backend in ("triton", "reference"):
        got[backend] = torch.full((dst.nbytes,), 0xA5, dtype=torch.uint8)
        kernels.copy_blocks(
            src, source, dst, got[backend], [3, 1, 7, 8, 0], [2, -1, 5, 0],
            num_tokens=23, first_token=2, backend=backend,
        )  # fmt: skip
    assert torch.equal(got["triton"], got["reference"])
    assert (got["triton"] != 0xA5).any()


@pytest.mark.parametrize("max_ctas", [0, 1, 3])
def test_pack_then_unpack_is_the_identity_on_these_tokens(max_ctas: int) -> None:
    layout = KVLayout.from_order(
        "LBHNKC", num_blocks=8, block_size=4, head_dim=16, dtype="bfloat16", **SHAPE
    )
    cache = filled(layout)
    options: dict[str, Any] = {
        "num_tokens": 13,
        "first_token": 3,
        "backend": "triton",
        "max_ctas": max_ctas,
    }
    packed = kernels.pack_blocks(layout, cache, [5, 0, 7, 2], **options)
    assert torch.equal(
        packed,
        kernels.pack_blocks(layout, cache, [5, 0, 7, 2], **{**options, "backend": "reference"}),
    )
    target = torch.zeros_like(cache)
    kernels.unpack_blocks(packed, layout, target, [5, 0, 7, 2], **options)
    moved = target != 0
    assert torch.equal(target[moved], cache[moved])
    ours, theirs = (layout.views(x.numpy()) for x in (target, cache))
    for token in range(16):
        block, slot = [5, 0, 7, 2][token // 4], token % 4
        same = all(
            (a[block, slot] == b[block, slot]).all()
            for x, y in zip(ours, theirs, strict=True)
            for a, b in zip(x, y, strict=True)
        )
        assert same == (3 <= token < 13)
    assert packed.numel() == 10 * layout.token_nbytes


def test_packing_takes_a_share_of_heads_and_layers() -> None:
    layout = KVLayout.nhd(num_blocks=4, block_size=4, head_dim=8, dtype="float32", **SHAPE)
    cache = filled(layout)
    options: dict[str, Any] = {"layers": [2], "heads": (1, 3)}
    packed = kernels.pack_blocks(layout, cache, [3, 1], backend="triton", **options)
    keys, values = layout.views(cache.numpy())[2]
    for part, want in zip(packed.view(torch.float32).view(2, 2, 8, 8), (keys, values), strict=True):
        rows = torch.from_numpy(want[[3, 1]].reshape(8, 4, 8)[:, 1:3])
        assert torch.equal(part, rows.transpose(0, 1))
