# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Each constructor against an array built the way its engine builds it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kvxfer.errors import LayoutError
from kvxfer.layout import KVLayout

L, B, N, H, D = 3, 4, 2, 2, 8
SHAPE = {"num_kv_heads": H, "head_dim": D, "dtype": "float32", "num_layers": L}
PAGED = {**SHAPE, "num_blocks": B, "block_size": N}
SIZES = {"L": L, "B": B, "N": N, "H": H, "C": D, "K": 2}


def numbered(*shape: int) -> np.ndarray:
    """Every element its own value, so that two places cannot be mistaken for each other."""
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def as_bytes(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).view(np.uint8).reshape(-1)


def assert_same(
    layout: KVLayout, buffer: np.ndarray, expected: list[tuple[np.ndarray, ...]]
) -> None:
    """``expected``: for each layer its parts, as ``[block, token, head, channel]``."""
    assert layout.nbytes == buffer.nbytes
    for views, parts in zip(layout.views(buffer), expected, strict=True):
        for view, part in zip(views, parts, strict=True):
            np.testing.assert_array_equal(view, part)


@pytest.mark.parametrize("name", ["LBHNC", "LBNHC", "LHBNC", "BLHNC", "BLNHC", "BHLNC"])
@pytest.mark.parametrize("value_width", [D, 4])
def test_vllm_fused_orders(name: str, value_width: int) -> None:
    sizes = {**SIZES, "C": D + value_width}
    pool = numbered(*(sizes[axis] for axis in name))
    logical = pool.transpose([name.index(axis) for axis in "LBHNC"])
    expected = [
        tuple(half.transpose(0, 2, 1, 3) for half in (layer[..., :D], layer[..., D:]))
        for layer in logical
    ]
    layout = KVLayout.vllm(order=name, head_dim_v=value_width, **PAGED)
    assert layout.kind == "fused"
    assert_same(layout, as_bytes(pool), expected)
    read = KVLayout.from_tensors(logical, "LBHNC", kind="fused", head_dim_v=value_width, **SHAPE)
    assert read == layout


@pytest.mark.parametrize(
    ("how", "axes"),
    [
        ({"backend": "flash_attn"}, "KBNHC"),
        ({"kv_layout": "NHD"}, "KBNHC"),
        ({"kv_layout": "HND"}, "KBHNC"),
        ({"backend": "cpu"}, "KBHNC"),
        ({"backend": "cpu", "kv_layout": "HND"}, "KBHNC"),
    ],
)
def test_vllm_split_has_one_tensor_a_layer(how: dict[str, str], axes: str) -> None:
    pool = numbered(L, *(SIZES[axis] for axis in axes))
    logical = pool.transpose([0, *(axes.index(axis) + 1 for axis in "KBNHC")])
    layout = KVLayout.vllm_split(**how, **PAGED)
    assert_same(layout, as_bytes(pool), [(layer[0], layer[1]) for layer in logical])
    assert KVLayout.from_tensors(list(pool), axes, region=pool, **SHAPE) == layout


@pytest.mark.parametrize(
    ("how", "field"),
    [
        ({"num_slots": 32, "page_size": 0}, "page_size"),
        ({"num_slots": "32"}, "num_slots"),
        ({"num_slots": 32.0}, "num_slots"),
        ({"num_slots": 0}, "num_slots"),
        ({"num_slots": -1}, "num_slots"),
        ({"num_slots": 32, "block_size": 16}, "block_size"),
        ({"num_slots": 32, "num_blocks": 16}, "num_blocks"),
    ],
)
def test_sglang_names_what_was_given(how: dict[str, Any], field: str) -> None:
    with pytest.raises(LayoutError) as refused:
        KVLayout.sglang(**how, **SHAPE)
    assert refused.value.field == field


@pytest.mark.parametrize(
    "how", [{"kv_layout": "nhd"}, {"kv_layout": "NDH"}, {"backend": "cpu", "kv_layout": "NHD"}]
)
def test_a_layout_that_vllm_does_not_have_is_refused(how: dict[str, str]) -> None:
    with pytest.raises(LayoutError) as refused:
        KVLayout.vllm_split(**how, **PAGED)
    assert refused.value.field == "kv_layout"


@pytest.mark.parametrize(("kv_layout", "axes"), [("NHD", "BKNHC"), ("HND", "BKHNC")])
def test_flashinfer_five_axes(kv_layout: str, axes: str) -> None:
    pool = numbered(L, *(SIZES[axis] for axis in axes))
    logical = pool.transpose([0, *(axes.index(axis) + 1 for axis in "KBNHC")])
    expected = [(layer[0], layer[1]) for layer in logical]
    layout = KVLayout.flashinfer(kv_layout=kv_layout, **PAGED)
    assert_same(layout, as_bytes(pool), expected)
    assert KVLayout.vllm_split(backend="flashinfer", kv_layout=kv_layout, **PAGED) == layout
    # vLLM shows the HND cache as [B, 2, N, H, D] with other strides: strides are read, never shapes.
    view = pool.transpose([0, *(axes.index(axis) + 1 for axis in "BKNHC")])
    assert KVLayout.from_tensors(view, "LBKNHC", **SHAPE) == layout


@pytest.mark.parametrize(("kv_layout", "make"), [("NHD", KVLayout.nhd), ("HND", KVLayout.hnd)])
def test_flashinfer_pair_is_the_plain_layout(kv_layout: str, make: object) -> None:
    axes = "BNHC" if kv_layout == "NHD" else "BHNC"
    pool = numbered(L, 2, *(SIZES[axis] for axis in axes))
    logical = pool if kv_layout == "NHD" else pool.transpose(0, 1, 2, 4, 3, 5)
    layout = KVLayout.flashinfer(kv_layout=kv_layout, pair=True, **PAGED)
    assert make(**PAGED) == layout  # type: ignore[operator]
    assert_same(layout, as_bytes(pool), [(layer[0], layer[1]) for layer in logical])
    pairs = [(layer[0], layer[1]) for layer in pool]
    assert KVLayout.from_tensors(pairs, axes, region=pool, **SHAPE) == layout


@pytest.mark.parametrize("page", [1, 2])
def test_sglang_token_pools(page: int) -> None:
    slots, wide = 8, 4
    keys, values = numbered(L, slots + page, H, D), numbered(L, slots + page, H, wide) + 1e4
    layout = KVLayout.sglang(num_slots=slots, page_size=page, head_dim_v=wide, **SHAPE)
    expected = [
        (k.reshape(-1, page, H, D), v.reshape(-1, page, H, wide))
        for k, v in zip(keys, values, strict=True)
    ]
    buffer = np.concatenate((as_bytes(keys), as_bytes(values)))
    assert_same(layout, buffer, expected)
    pairs = list(zip(keys, values, strict=True))
    offsets = [
        x for i in range(L) for x in (i * keys[0].nbytes, keys.nbytes + i * values[0].nbytes)
    ]
    read = KVLayout.from_tensors(
        pairs, "SHC", block_size=page, region=offsets, head_dim_v=wide, **SHAPE
    )
    assert read.parts == layout.parts
    latents = numbered(L, slots + page, 1, 12)
    latent = KVLayout.sglang(
        num_slots=slots, page_size=page, mla=True, **{**SHAPE, "num_kv_heads": 1, "head_dim": 12}
    )
    assert_same(latent, as_bytes(latents), [(x.reshape(-1, page, 1, 12),) for x in latents])


def test_trtllm_pool_is_block_major_and_head_major_inside() -> None:
    pool = numbered(B, L, 2, H * N * D)
    logical = pool.reshape(B, L, 2, H, N, D).transpose(1, 2, 0, 4, 3, 5)
    layout = KVLayout.trtllm(**PAGED)
    assert_same(layout, as_bytes(pool), [(layer[0], layer[1]) for layer in logical])
    latents = numbered(B, L, 1, N * 12)
    latent = KVLayout.trtllm(mla=True, **{**PAGED, "num_kv_heads": 1, "head_dim": 12})
    expected = [(x.reshape(B, N, 1, 12),) for x in latents.transpose(1, 0, 2, 3)]
    assert_same(latent, as_bytes(latents), expected)


@pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
def test_fused_rows(kv_layout: str) -> None:
    axes = "BNHC" if kv_layout == "NHD" else "BHNC"
    sizes = {**SIZES, "C": 2 * D}
    pool = numbered(L, *(sizes[axis] for axis in axes))
    logical = pool.transpose([0, *(axes.index(axis) + 1 for axis in "BNHC")])
    layout = KVLayout.fused(kv_layout=kv_layout, **PAGED)
    assert_same(layout, as_bytes(pool), [(x[..., :D], x[..., D:]) for x in logical])


def test_mla_is_the_same_on_every_rank() -> None:
    shape = {"num_blocks": B, "block_size": N, "dtype": "bfloat16", "num_layers": L}
    ranks = [KVLayout.mla(latent_dim=576, tp_rank=r, tp_size=4, **shape) for r in range(4)]
    assert {rank.head_range for rank in ranks} == {(0, 1)}
    assert [rank.replica for rank in ranks] == [0, 1, 2, 3]
    assert ranks[0].views(np.zeros(ranks[0].nbytes, np.uint8))[0][0].shape == (B, N, 1, 576)


def test_torch_tensors_are_read_in_place() -> None:
    torch = pytest.importorskip("torch")
    pool = torch.zeros(L, 2, B, H, N, D, dtype=torch.bfloat16)
    layers = [
        pool[layer].permute(0, 1, 3, 2, 4) for layer in range(L)
    ]  # [2, B, N, H, D] by strides
    layout = KVLayout.from_tensors(layers, "KBNHC", region=pool, **{**SHAPE, "dtype": "bfloat16"})
    assert layout == KVLayout.hnd(**{**PAGED, "dtype": "bfloat16"})
    assert layout.views(pool.view(torch.uint8).numpy().reshape(-1))[1][1].dtype == np.uint16


@pytest.mark.parametrize(("is_of", "told"), [("float16", "bfloat16"), ("bfloat16", "float16"), ("float8_e5m2", "float8_e4m3"), ("float8_e4m3fn", "int8")])  # fmt: skip
def test_a_tensor_of_another_float_dtype_than_is_told_is_refused(is_of: str, told: str) -> None:
    """Once only the widths were compared. Integers of the width are raw, as a library without the type has them."""
    torch = pytest.importorskip("torch")
    pool = torch.zeros(L, 2, B, N, H, D, dtype=getattr(torch, is_of))
    with pytest.raises(LayoutError, match=f"tensor 0 is of {is_of.removesuffix('fn')}, {told} is told") as caught:  # fmt: skip
        KVLayout.from_tensors(pool, "LKBNHC", **SHAPE | {"dtype": told})
    assert caught.value.field == "dtype"
    for raw in (torch.int16, torch.uint16) if pool.element_size() == 2 else (torch.uint8,):
        assert KVLayout.from_tensors(pool.view(raw), "LKBNHC", **SHAPE | {"dtype": told}).dtype == told  # fmt: skip


def test_padded_blocks_have_no_order_and_still_work() -> None:
    pool = numbered(L, 2, B, N + 1, H, D)[:, :, :, :N]
    layout = KVLayout.from_tensors(pool, "LKBNHC", **SHAPE)
    assert layout.order == ""
    assert "k.stride_block" in layout.signature()
    views = layout.views(as_bytes(pool.base))
    np.testing.assert_array_equal(views[2][1], pool[2, 1])


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"num_kv_heads": 4}, "num_kv_heads"),
        ({"head_dim": 4}, "head_dim"),
        ({"dtype": "float16"}, "dtype"),
        ({"num_layers": 2}, "layers"),
        ({"block_size": 3}, "block_size"),
        ({"axes": "LKBNH"}, "axes"),
        ({"axes": "LKBNHS"}, "axes"),
        ({"axes": "KLBNHC"}, "layers"),
    ],
)
def test_tensors_that_contradict_what_is_told_are_refused(
    change: dict[str, object], field: str
) -> None:
    told = {"axes": "LKBNHC", **SHAPE, **change}
    with pytest.raises(LayoutError) as caught:
        KVLayout.from_tensors(numbered(L, 2, B, N, H, D), **told)  # type: ignore[arg-type]
    assert caught.value.field == field


def test_separate_tensors_need_to_be_placed() -> None:
    layers = [numbered(2, B, N, H, D) for _ in range(L)]
    with pytest.raises(LayoutError, match="need region="):
        KVLayout.from_tensors(layers, "KBNHC", **SHAPE)
    with pytest.raises(LayoutError, match="tensor 0 is not inside it"):
        KVLayout.from_tensors(layers, "KBNHC", region=np.zeros(8, np.float32), **SHAPE)
    placed = KVLayout.from_tensors(layers, "KBNHC", region=[0, 1 << 20, 1 << 30], **SHAPE)
    assert placed.parts[0].bases == (0, 1 << 20, 1 << 30)
    assert (
        placed.parts
        == KVLayout.nhd(**PAGED)
        .with_bases(
            {
                name: [x + i * layers[0].nbytes // 2 for x in (0, 1 << 20, 1 << 30)]
                for i, name in enumerate("kv")
            }
        )
        .parts
    )
