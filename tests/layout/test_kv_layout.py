# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""What a layout refuses, what it tells, and what two sides compare."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvxfer.errors import InvalidArgumentError, LayoutError
from kvxfer.layout import KVLayout, KVPart, KVScales

SHAPE: dict[str, Any] = {
    "num_blocks": 4,
    "block_size": 16,
    "num_kv_heads": 8,
    "head_dim": 64,
    "dtype": "bfloat16",
    "num_layers": 2,
}


@pytest.mark.parametrize(
    ("order", "change", "field"),
    [
        ("LKBNHC", {"num_blocks": 0}, "num_blocks"),
        ("LKBNHC", {"block_size": 65_537}, "block_size"),
        ("LKBNHC", {"block_size": 2.0}, "block_size"),
        ("LKBNHC", {"dtype": "bf16"}, "dtype"),
        ("LKBNHC", {"num_layers": None}, "num_layers"),
        ("LKBNHC", {"layers": [1, 0]}, "layers"),
        ("LKBNHC", {"layers": [0, 2]}, "layers"),
        ("LKBNHC", {"layers": []}, "layers"),
        ("LKBNHC", {"tp_size": 3}, "tp_size"),
        ("LKBNHC", {"tp_size": 12}, "tp_size"),
        ("LKBNHC", {"tp_size": 2, "tp_rank": 2}, "tp_rank"),
        ("LKBNHC", {"format": "amx"}, "atom"),
        ("LKBNHC", {"atom": "row"}, "atom"),
        ("LKBNHC", {"offset": 1}, "parts.k.bases"),
        ("LKBNHC", {"block_align": 33}, "parts.k.stride_block"),
        ("LKBNHC", {"head_dim_v": 0}, "head_dim_v"),
        ("LKBNCH", {}, "order"),
        ("LKBNC", {}, "order"),
        ("LBNHC", {}, "order"),
        ("LLBNHC", {}, "order"),
        ("LBNC", {"num_kv_heads": 1, "head_dim_v": 64}, "head_dim_v"),
        ("LKBNHC", {"kind": "mla"}, "order"),
        ("LKBNHC", {"kind": "paged"}, "kind"),
    ],
)
def test_a_wrong_field_is_named(order: str, change: dict[str, Any], field: str) -> None:
    with pytest.raises(LayoutError) as caught:
        KVLayout.from_order(order, **{**SHAPE, **change})
    assert caught.value.field == field
    assert isinstance(caught.value, InvalidArgumentError)


def parts_of(**strides: int) -> tuple[KVPart, ...]:
    given = {"stride_block": 64, "stride_token": 8, "stride_head": 4, "base_v": 256, **strides}
    base_v = given.pop("base_v")
    return tuple(
        KVPart(
            name,
            2,
            "bfloat16",
            given["stride_block"],
            given["stride_token"],
            given["stride_head"],
            (base,),
        )
        for name, base in (("k", 0), ("v", base_v))
    )


def by_hand(parts: tuple[KVPart, ...], **change: Any) -> KVLayout:
    fields: dict[str, Any] = {
        "kind": "split",
        "order": "",
        "dtype": "bfloat16",
        "num_layers": 1,
        "layers": (0,),
        "num_blocks": 4,
        "block_size": 8,
        "num_kv_heads": 2,
        "head_dim": 2,
        "head_dim_v": 2,
        "parts": parts,
    }
    return KVLayout(**{**fields, **change})


@pytest.mark.parametrize(
    ("strides", "message"),
    [
        ({"stride_token": 4}, "stride 4 is less than"),
        ({"stride_block": 60}, "block stride 60 is less than the 64 bytes"),
        ({"stride_head": 2}, "head stride 2 is less than the 4 bytes"),
        ({"base_v": 252}, "share bytes"),
        ({"base_v": 0}, "share bytes"),
    ],
)
def test_layouts_that_alias_are_refused(strides: dict[str, int], message: str) -> None:
    by_hand(parts_of())
    with pytest.raises(LayoutError, match=message):
        by_hand(parts_of(**strides))


def test_axes_of_extent_one_mean_nothing() -> None:
    """torch reports arbitrary strides for them; neither validation nor size may look."""
    odd = by_hand(parts_of(stride_block=2, base_v=64), num_blocks=1)
    assert odd.nbytes == 128
    assert by_hand(parts_of(stride_head=2, base_v=256), num_kv_heads=1).nbytes == 508


def test_interleaved_parts_are_told_from_overlapping_ones() -> None:
    """K and V rows alternate inside every common axis: disjoint, though their intervals are not."""
    fused = by_hand(parts_of(stride_block=128, stride_token=16, stride_head=8, base_v=4))
    assert fused.nbytes == 512
    with pytest.raises(LayoutError, match="share bytes"):
        by_hand(parts_of(stride_block=128, stride_token=16, stride_head=8, base_v=2))


@given(
    st.permutations("LBKNH"),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 3),
    st.sampled_from([1, 2]),
    st.integers(0, 2),
)
def test_no_byte_is_reached_twice(
    axes: list[str], blocks: int, size: int, layers: int, heads: int, shift: int
) -> None:
    """The check says so for what from_order makes; here every byte is counted."""
    layout = KVLayout.from_order(
        "".join(axes) + "C",
        num_blocks=blocks,
        block_size=size,
        num_kv_heads=heads,
        head_dim=2,
        head_dim_v=3,
        dtype="uint8",
        num_layers=layers,
        offset=shift,
        block_align=1 + shift,
    )
    buffer = np.zeros(layout.nbytes, np.uint8)
    for parts in layout.views(buffer):
        for part in parts:
            part += 1
    assert set(buffer.tolist()) <= {0, 1}
    assert buffer.sum() == layers * blocks * size * heads * 5
    assert buffer[-1] == 1


def test_layouts_are_values() -> None:
    assert KVLayout.nhd(**SHAPE) == KVLayout.nhd(**SHAPE)
    assert hash(KVLayout.nhd(**SHAPE)) == hash(KVLayout.nhd(**SHAPE))
    assert KVLayout.nhd(**{**SHAPE, "num_blocks": np.int32(4)}) == KVLayout.nhd(**SHAPE)
    assert KVLayout.nhd(**SHAPE) != KVLayout.hnd(**SHAPE)


def test_sizes_are_python_ints_past_every_width() -> None:
    """NumPy keeps int32 * int in int32 and wraps without a word."""
    layout = KVLayout.from_order(
        "LKBNHC", **{**SHAPE, "num_blocks": np.int32(1 << 21), "num_layers": np.int32(80)}
    )
    assert layout.nbytes == 80 * 2 * (1 << 21) * 16 * 8 * 64 * 2
    assert layout.nbytes > 1 << 33
    assert type(layout.parts[1].bases[-1]) is int


@pytest.mark.parametrize(
    ("heads", "tp_size", "ranges"),
    [
        (8, 2, [(0, 4), (4, 8)]),
        (2, 2, [(0, 1), (1, 2)]),
        (2, 4, [(0, 1), (0, 1), (1, 2), (1, 2)]),
    ],
)
def test_heads_of_ranks(heads: int, tp_size: int, ranges: list[tuple[int, int]]) -> None:
    layouts = [
        KVLayout.nhd(**{**SHAPE, "num_kv_heads": heads, "tp_rank": r, "tp_size": tp_size})
        for r in range(tp_size)
    ]
    assert [layout.head_range for layout in layouts] == ranges
    assert [layout.replica for layout in layouts] == [
        r % layouts[0].replicas for r in range(tp_size)
    ]


def test_vector_bytes_follow_the_smallest_step() -> None:
    assert KVLayout.nhd(**SHAPE).vector_bytes == 16
    assert KVLayout.nhd(**{**SHAPE, "head_dim": 6}).vector_bytes == 4
    assert KVLayout.nhd(**SHAPE, offset=2).vector_bytes == 2


def test_views_refuse_a_short_or_foreign_buffer() -> None:
    layout = KVLayout.nhd(**SHAPE)
    with pytest.raises(InvalidArgumentError, match=f"the layout reaches {layout.nbytes}"):
        layout.views(np.zeros(layout.nbytes - 1, np.uint8))
    with pytest.raises(InvalidArgumentError, match="contiguous uint8"):
        layout.views(np.zeros(layout.nbytes, np.int8))


def test_views_of_read_only_memory_are_read_only() -> None:
    layout = KVLayout.nhd(**SHAPE)
    buffer = np.zeros(layout.nbytes, np.uint8)
    buffer.flags.writeable = False
    assert not layout.views(buffer)[0][0].flags.writeable


# -- signature and wire -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"num_layers": 10**9}, "num_layers: 1000000000 is more than 4096"),
        ({"num_kv_heads": 2**40}, "num_kv_heads: 1099511627776 is more than 65536"),
        ({"num_blocks": 2**62}, "bytes of cache are beyond any memory"),
        ({"head_dim": 2**61}, "bytes of cache are beyond any memory"),
        ({"scales": 1.0}, "scales: a KVScales is needed, not float"),
        ({"scales": KVScales("token"), "dtype": "int8"}, "scales.order: scales in memory need"),
    ],
)
def test_what_no_memory_could_hold_is_refused_at_once(change: dict[str, Any], text: str) -> None:
    with pytest.raises(LayoutError, match=text):
        KVLayout.nhd(**SHAPE | change)


def test_one_number_is_a_scale_for_all() -> None:
    assert KVScales("tensor", k=2, v=np.float32(0.5)) == KVScales("tensor", k=(2.0,), v=(0.5,))


@pytest.mark.parametrize("order", ["LKBHNC", "BLKNHC", "LBNHKC", "LBKNHC", "KLBNHC"])
def test_an_order_must_be_that_of_the_strides(order: str) -> None:
    """Else the signature would vouch for bytes that lie otherwise."""
    layout = KVLayout.nhd(**SHAPE)
    kind = "fused" if order.endswith("KC") else "split"
    with pytest.raises(LayoutError, match=f"'{order}' puts .* inside each step"):
        replace(layout, order=order, kind=kind)
    message = layout.to_wire() | {"order": order, "kind": kind}
    with pytest.raises(LayoutError, match=f"'{order}' puts"):
        KVLayout.from_wire(message)
    # That of the strides, or none, may be said; and strides may be wider.
    assert replace(layout, order="LKBNHC") == layout
    assert replace(layout, order="").order == ""
    wide = KVLayout.from_order("LKBNHC", **SHAPE, block_align=1 << 20, layer_align=1 << 22)
    assert wide.order == "LKBNHC"


def test_an_order_of_scales_must_be_that_of_their_strides() -> None:
    scales = KVScales("token_head", "float32", order="LKBHN", offset=1 << 20)
    layout = KVLayout.nhd(**SHAPE | {"dtype": "int8"}, scales=scales)
    with pytest.raises(LayoutError, match=r"scales\.order: .* puts"):
        replace(layout, scales=replace(scales, order="LKBNH"))


def test_signature_is_flat_json_without_places() -> None:
    layout = KVLayout.hnd(**SHAPE)
    signature = layout.signature()
    assert json.loads(json.dumps(signature)) == signature
    assert all(isinstance(value, (str, int)) for value in signature.values())
    moved = KVLayout.hnd(**{**SHAPE, "num_blocks": 9, "offset": 64, "layer_align": 4096})
    assert moved.signature()["digest"] == signature["digest"]
    stage = KVLayout.hnd(**{**SHAPE, "layers": [1]})
    assert stage.signature()["digest"] == signature["digest"]
    ranks = [KVLayout.hnd(**SHAPE, tp_rank=r, tp_size=2).signature()["digest"] for r in (0, 1)]
    assert ranks[0] == ranks[1] != signature["digest"]


@pytest.mark.parametrize(
    "change",
    [
        {"block_size": 8},
        {"dtype": "float16"},
        {"head_dim": 32},
        {"head_dim_v": 32},
        {"num_layers": 3},
        {"group": "window"},
        {"num_kv_heads": 4},
        {"format": "nvfp4", "atom": "token"},
        {"dtype": "float8_e4m3", "scales": KVScales("tensor", k=(0.5,), v=(0.5,))},
    ],
)
def test_every_field_that_matters_changes_the_digest(change: dict[str, Any]) -> None:
    ours = KVLayout.hnd(**SHAPE).signature()["digest"]
    assert KVLayout.hnd(**{**SHAPE, **change}).signature()["digest"] != ours


@pytest.mark.parametrize(
    "layout",
    [
        KVLayout.hnd(**SHAPE, offset=32, tp_rank=1, tp_size=4),
        KVLayout.mla(latent_dim=656, format="fp8_ds_mla", atom="token", num_blocks=4, block_size=64, dtype="uint8", num_layers=2),
        KVLayout.nhd(**{**SHAPE, "dtype": "float8_e4m3"}, scales=KVScales("head", k=(0.5,) * 8, v=(1.0,) * 8)),
        KVLayout.nhd(**{**SHAPE, "dtype": "int8"}, scales=KVScales("token_head", order="LKBNH", offset=1 << 20)),
        KVLayout.nhd(**{**SHAPE, "dtype": "int8"}, scales=KVScales("token", order="LKBN", offset=1 << 20)),
    ],
    ids=["plain", "opaque", "fixed scales", "scales per token and head", "scales per token"],
)  # fmt: skip
def test_wire_form_carries_everything(layout: KVLayout) -> None:
    assert KVLayout.from_wire(json.loads(json.dumps(layout.to_wire()))) == layout


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"version": 2}, "version"),
        ({"num_blocks": "4"}, "num_blocks"),
        ({"num_blocks": -1}, "num_blocks"),
        ({"layers": "01"}, "layers"),
        ({"dtype": 5}, "dtype"),
        ({"extra": 1}, "wire"),
        ({"parts": [{"name": "k"}]}, "wire"),
        ({"parts": 7}, "parts"),
        ({"scales": {"granularity": "token"}}, "wire"),
        ({"kind": "fused "}, "kind"),
    ],
)
def test_a_peer_s_nonsense_is_refused(change: dict[str, Any], field: str) -> None:
    message = {**KVLayout.hnd(**SHAPE).to_wire(), **change}
    with pytest.raises(LayoutError) as caught:
        KVLayout.from_wire(message)
    assert caught.value.field == field
    with pytest.raises(LayoutError, match="mapping"):
        KVLayout.from_wire([message])  # type: ignore[arg-type]


# -- scales -------------------------------------------------------------------------------------


def test_scales_in_memory_are_parts() -> None:
    plain = KVLayout.nhd(**{**SHAPE, "dtype": "float8_e4m3"})
    scales = KVScales("token_head", order="LKBNH", offset=plain.nbytes)
    layout = KVLayout.nhd(**{**SHAPE, "dtype": "float8_e4m3"}, scales=scales)
    assert [part.name for part in layout.parts] == ["k", "v", "k_scale", "v_scale"]
    assert [view.shape for view in layout.views(np.zeros(layout.nbytes, np.uint8))[0]] == [
        (4, 16, 8, 64),
        (4, 16, 8, 64),
        (4, 16, 8, 1),
        (4, 16, 8, 1),
    ]
    assert layout.nbytes == plain.nbytes + plain.nbytes // 64 * 4
    shared = KVScales("token", order="LKBN", offset=plain.nbytes)
    per_token = KVLayout.nhd(**{**SHAPE, "dtype": "float8_e4m3"}, scales=shared)
    assert per_token.views(np.zeros(per_token.nbytes, np.uint8))[1][3].shape == (4, 16, 1, 1)


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: KVScales("page"), "scales.granularity"),
        (lambda: KVScales("tensor"), "scales.k"),
        (lambda: KVScales("tensor", k=(0.0,)), "scales.k"),
        (lambda: KVScales("tensor", k=(float("nan"),)), "scales.k"),
        (lambda: KVScales("token", k=(1.0,)), "scales.k"),
        (lambda: KVLayout.nhd(**SHAPE, scales=KVScales("tensor", k=(1.0,))), "scales.v"),
        (lambda: KVLayout.nhd(**SHAPE, scales=KVScales("head", k=(1.0,), v=(1.0,))), "scales.k"),
        (lambda: KVLayout.nhd(**SHAPE, scales=KVScales("token", order="LKBNH")), "scales.order"),
        (
            lambda: KVLayout.nhd(**SHAPE, scales=KVScales("token_head", order="LKBN")),
            "scales.order",
        ),
        (lambda: KVLayout.nhd(**SHAPE, scales=KVScales("token_head", order="LKBNH")), "bases"),
    ],
)
def test_wrong_scales_are_named(make: Any, field: str) -> None:
    with pytest.raises(LayoutError) as caught:
        make()
    assert caught.value.field == field


def test_scales_may_lie_in_the_padding_of_their_block() -> None:
    """vLLM carves per-token-head scales out of a page's padding: strided, inside the block's stride."""
    rows = 16 * 8 * 64
    part = KVPart("latent", 64, "float8_e4m3", rows + 1024, 64, 64, (0,))
    scale = KVPart("latent_scale", 1, "float32", rows + 1024, 4, 4, (rows - 16 * 7 * 64,))
    layout = KVLayout(
        kind="mla",
        order="",
        dtype="float8_e4m3",
        num_layers=1,
        layers=(0,),
        num_blocks=4,
        block_size=16,
        num_kv_heads=1,
        head_dim=64,
        head_dim_v=0,
        parts=(part, scale),
        scales=KVScales("token_head", order="LBNH"),
    )
    with pytest.raises(LayoutError, match="share bytes"):
        replace(layout, parts=(part, replace(scale, bases=(rows - 16 * 7 * 64 - 4,))))
