# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Plans at real sizes: span counts to know, offsets past 2^33, kinds and costs, and what is refused."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

from kvxfer.errors import InvalidArgumentError, LayoutError
from kvxfer.layout import CostModel, KVLayout, KVScales, TransferPlan, plan_transfer, transfer_pairs

LLAMA: dict[str, Any] = {
    "num_blocks": 2048,
    "block_size": 16,
    "num_kv_heads": 8,
    "head_dim": 128,
    "dtype": "bfloat16",
    "num_layers": 32,
}
KIB = 1024


def llama(order: str, **change: Any) -> KVLayout:
    return KVLayout.from_order(order, **{**LLAMA, **change})


def scattered(count: int, seed: int = 0, num_blocks: int = 2048) -> np.ndarray:
    """Block ids of which no two neighbours follow each other."""
    ids = np.random.default_rng(seed).permutation(num_blocks // 2)[:count] * 2
    return ids.astype(np.int64)


def plan_of(src: KVLayout, dst: KVLayout, num_tokens: int, **how: Any) -> TransferPlan:
    lists = [
        scattered(-(-num_tokens // x.block_size), i, x.num_blocks) for i, x in enumerate((src, dst))
    ]
    return plan_transfer(src, dst, *lists, num_tokens, **how)


@pytest.mark.parametrize(
    ("src", "dst", "span", "count"),
    [
        (llama("LKBNHC"), llama("LKBNHC"), 32 * KIB, 64 * 64),
        (llama("LKBHNC"), llama("LKBHNC"), 32 * KIB, 64 * 64),
        (llama("LBHNKC"), llama("LBHNKC"), 64 * KIB, 32 * 64),
        (llama("BLKHNC"), llama("BLKHNC"), 2048 * KIB, 64),
        (llama("LKBHNC", tp_size=4), llama("LKBHNC", tp_size=2), 8 * KIB, 64 * 64),
        (llama("LKBNHC", tp_size=4), llama("LKBNHC", tp_size=2), KIB // 2, 64 * 1024),
        (llama("LKBNHC"), llama("LKBHNC"), KIB // 4, 64 * 1024 * 8),
        (llama("LBHNKC"), llama("LBHNKC", block_size=128), 8 * KIB, 32 * 64 * 8),
    ],
    ids=["NHD", "HND", "fused", "block-major", "HND TP4 to 2", "NHD TP4 to 2", "NHD to HND", "16 to 128"],
)  # fmt: skip
def test_spans_are_as_few_as_can_be(src: KVLayout, dst: KVLayout, span: int, count: int) -> None:
    plan = plan_of(src, dst, 1024, kind="direct")
    assert (plan.nbytes == span).all()
    assert plan.num_spans == len(plan.nbytes) == count
    assert plan.total_nbytes == span * count


def test_runs_of_blocks_and_of_slots_are_one_span() -> None:
    ids = np.arange(100, 164)
    for layout in (llama("LKBNHC"), llama("LKBHNC")):
        plan = plan_transfer(layout, layout, ids, ids + 7)
        assert plan.num_spans == 64
    slots = KVLayout.sglang(
        num_slots=4096, num_kv_heads=8, head_dim=128, dtype="bfloat16", num_layers=2
    )
    plan = plan_transfer(slots, slots, np.r_[5:1005, 2000:3000], np.r_[1:2001])
    assert plan.num_spans == 2 * 2 * 2


def test_hundred_thousand_spans_stay_factored() -> None:
    """25,008 tokens of Llama-3-8B in one pool: the plan holds 1,563 rows and 64 bases, not 100,032 spans."""
    layout = llama("LKBNHC", num_blocks=8192)
    ids = scattered(1563, num_blocks=8192)
    plan = plan_transfer(layout, layout, ids, ids[::-1])
    assert plan.num_spans == 100_032
    assert len(plan.template[0]) == 1563
    assert plan.bases.shape == (64, 2)
    # Writing out three int64 arrays of that length is the floor; a loop in Python would be 100 times it.
    floor = min(
        _seconds(lambda: [np.add.outer(np.arange(64), ids[:1563]).ravel() for _ in range(3)])
        for _ in range(9)
    )
    taken = min(
        _seconds(lambda: plan_transfer(layout, layout, ids, ids[::-1]).src_offsets)
        for _ in range(9)
    )
    assert taken < 40 * floor


def _seconds(call: Any) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def test_pushing_a_layer_takes_rows_of_the_bases() -> None:
    layout = llama("LKBHNC", tp_size=2, layers=range(16, 32))
    plan = plan_of(layout, layout, 100, by_layer=True)
    rows = plan.for_layer(20)
    assert rows.dtype == np.int64
    assert rows.tolist() == [[part.bases[4]] * 2 for part in layout.parts]
    with pytest.raises(InvalidArgumentError, match="layer: 3 is held by neither"):
        plan.for_layer(3)
    pool = llama("BLKHNC")
    merged = plan_of(pool, pool, 64)
    with pytest.raises(InvalidArgumentError, match="by_layer=True"):
        merged.for_layer(0)
    assert plan_of(pool, pool, 64, by_layer=True).for_layer(7).shape == (1, 2)


@pytest.mark.parametrize("order", ["LKBNHC", "LKBHNC", "BLKHNC", "LBHNKC"])
def test_offsets_past_two_to_the_33(order: str) -> None:
    src = llama(order, num_blocks=1 << 16)
    dst = llama("LKBHNC", num_blocks=1 << 17, offset=1 << 40)
    ids = np.array([65535, 3, 65533], np.int32)
    plan = plan_transfer(src, dst, ids, ids, 40, kind="direct")
    ours = {  # by hand from the orders' names, in Python's unbounded integers
        "LKBNHC": lambda i, p, b, t, h: ((((i * 2 + p) << 16) + b) * 16 + t) * 8 + h,
        "LKBHNC": lambda i, p, b, t, h: ((((i * 2 + p) << 16) + b) * 8 + h) * 16 + t,
        "BLKHNC": lambda i, p, b, t, h: (((b * 32 + i) * 2 + p) * 8 + h) * 16 + t,
        "LBHNKC": lambda i, p, b, t, h: ((((i << 16) + b) * 8 + h) * 16 + t) * 2 + p,
    }[order]
    first = {}
    for layer, part, token, head in np.ndindex(32, 2, 40, 8):
        block, slot = int(ids[token // 16]), token % 16
        there = ((((layer * 2 + part) << 17) + block) * 8 + head) * 16 + slot
        first[(1 << 40) + there * 256] = ours(layer, part, block, slot, head) * 256
    rows = 0
    for a, b, n in zip(
        plan.src_offsets.tolist(), plan.dst_offsets.tolist(), plan.nbytes.tolist(), strict=True
    ):
        for step in range(0, n, 256):
            assert first[b + step] == a + step
            rows += 1
    assert rows == len(first)
    assert int(plan.src_offsets.max()) > 1 << 33


def test_separate_allocations_share_one_template() -> None:
    """vLLM and SGLang keep 32 to 160 tensors wherever the allocator put them."""
    rng = np.random.default_rng(3)
    spots = [(rng.permutation(64) * (1 << 28)).tolist() for _ in range(2)]
    src, dst = (llama("LKBNHC").with_bases({"k": spot[:32], "v": spot[32:]}) for spot in spots)
    plan = plan_of(src, dst, 100, by_layer=True)
    assert plan.bases.shape == (64, 2)
    assert sorted(plan.for_layer(5).tolist()) == sorted(
        [[spots[0][5], spots[1][5]], [spots[0][37], spots[1][37]]]
    )


def test_scales_in_memory_move_with_their_rows() -> None:
    def cache(order: str, **change: Any) -> KVLayout:
        shape = {**LLAMA, "dtype": "float8_e4m3", "num_blocks": 8, "num_layers": 2, **change}
        end = KVLayout.from_order(order, **shape).nbytes
        axes = order[:-1]
        return KVLayout.from_order(
            order, **shape, scales=KVScales("token_head", order=axes, offset=end)
        )

    src, dst = cache("LKBNHC"), cache("LKBHNC", block_size=32)
    plan = plan_transfer(src, dst, [1, 3, 5], [2, 0], 40, kind="direct")
    source = np.random.default_rng(0).integers(0, 256, src.nbytes, dtype=np.uint8)
    target = np.zeros(dst.nbytes, np.uint8)
    for a, b, n in zip(plan.src_offsets, plan.dst_offsets, plan.nbytes, strict=True):
        target[b : b + n] = source[a : a + n]
    for ours, theirs in zip(src.views(source), dst.views(target), strict=True):
        for x, y in zip(ours, theirs, strict=True):
            for token in range(40):
                block, other = [1, 3, 5][token // 16], [2, 0][token // 32]
                np.testing.assert_array_equal(
                    x[block, token % 16].view(np.uint8), y[other, token % 32].view(np.uint8)
                )
    assert plan.total_nbytes == 2 * 2 * 40 * 8 * (128 + 4)


# -- kinds and costs ----------------------------------------------------------------------------


def test_large_spans_go_direct_and_small_ones_packed_or_gathered() -> None:
    nhd, hnd = llama("LKBNHC"), llama("LKBHNC")
    assert plan_of(hnd, hnd, 1024).kind == "direct"
    assert plan_of(nhd, nhd, 1024, cost="verbs").kind == "direct"
    plan = plan_of(nhd, hnd, 1024)
    assert plan.kind == "gathered"
    assert plan.num_spans == 64 * 64  # the destination's runs: whole blocks
    assert set(plan.cost_s) == {"direct", "gathered", "packed"}
    assert plan.cost_s["gathered"] == min(plan.cost_s.values())
    tp = plan_of(llama("LKBNHC", tp_size=4), llama("LKBNHC", tp_size=2), 1024, cost="verbs_gpu")
    assert tp.kind == "packed"
    assert tp.num_spans <= tp.total_nbytes // KIB**2


def test_little_data_goes_direct_whatever_its_spans() -> None:
    assert plan_of(llama("LKBNHC"), llama("LKBHNC"), 3).kind == "direct"


def test_costs_can_be_told() -> None:
    nhd, hnd = llama("LKBNHC"), llama("LKBHNC")
    free = CostModel("mine", bytes_per_s=1e9, span_s=0.0)
    assert plan_of(nhd, hnd, 1024, cost=free).kind == "direct"
    with pytest.raises(InvalidArgumentError, match="'carrier pigeon' is not one of shm"):
        plan_of(nhd, hnd, 1024, cost="carrier pigeon")


def test_packed_pieces_are_at_most_four_mib() -> None:
    plan = plan_of(llama("LKBNHC"), llama("LKBHNC"), 4096, kind="packed")
    assert plan.wire_layout is not None
    assert plan.wire_layout.order == "LKBHNC"
    assert plan.wire_layout.block_size == 4096
    assert plan.nbytes.max() == 4 * KIB**2
    assert plan.total_nbytes == plan.wire_layout.nbytes == sum(plan.staging_nbytes) // 2
    assert (plan.src_offsets == plan.dst_offsets).all()


def test_conversion_is_never_direct() -> None:
    wide, narrow = llama("LKBNHC"), llama("LKBNHC", dtype="float8_e4m3")
    plan = plan_of(wide, narrow, 1024)
    assert plan.convert
    assert plan.kind in ("gathered", "packed")
    assert plan.wire_layout is not None
    assert plan.wire_layout.dtype == "float8_e4m3"
    assert plan.total_nbytes == 64 * 1024 * 8 * 128
    with pytest.raises(LayoutError, match="values must be converted"):
        plan_of(wide, narrow, 1024, kind="direct")
    with pytest.raises(InvalidArgumentError, match="no byte spans"):
        _ = plan.pack_groups


def test_same_dtype_under_other_fixed_scales_is_requantised() -> None:
    def cache(scale: float) -> KVLayout:
        return llama(
            "LKBNHC", dtype="float8_e4m3", scales=KVScales("tensor", k=(scale,), v=(scale,))
        )

    assert plan_of(cache(0.5), cache(0.5), 1024).kind == "direct"
    assert plan_of(cache(0.5), cache(0.25), 1024).convert


def test_a_plan_describes_itself() -> None:
    plan = plan_of(llama("LKBNHC", tp_size=4, tp_rank=1), llama("LKBHNC", tp_size=2), 1024)
    text = plan.describe()
    for part in (
        "LKBNHC",
        "LKBHNC",
        "rank 1 of 4 (heads 2 to 3)",
        "tokens 0 to 1023",
        plan.kind,
        "spans",
        "tcp",
    ):
        assert part in text
    nothing = plan_of(llama("LKBNHC", tp_size=4, tp_rank=3), llama("LKBHNC", tp_size=2), 1024)
    assert nothing.num_spans == 0
    assert "moves nothing" in nothing.describe()


# -- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"group": "window"}, "group"),
        ({"num_layers": 31}, "num_layers"),
        ({"num_kv_heads": 4}, "num_kv_heads"),
        ({"head_dim": 64}, "head_dim"),
        ({"head_dim_v": 64}, "head_dim_v"),
        ({"format": "nvfp4", "atom": "token"}, "format"),
        ({"dtype": "uint8", "head_dim": 128}, "dtype"),
    ],
)
def test_layouts_that_cannot_be_mapped_name_the_field_and_both_values(
    change: dict[str, Any], field: str
) -> None:
    ours, theirs = llama("LKBNHC"), llama("LKBHNC", **change)
    with pytest.raises(LayoutError) as caught:
        plan_of(ours, theirs, 16)
    assert caught.value.field == field
    assert repr(getattr(ours, field)) in str(caught.value)
    assert repr(getattr(theirs, field)) in str(caught.value)
    with pytest.raises(LayoutError):
        transfer_pairs([ours], [theirs])


def test_pairs_of_all_but_one_source_rank_are_refused() -> None:
    """Once: they were short of its heads in silence, and the destination took what it had for the whole."""
    ranks = [llama("LKBNHC", tp_size=4, tp_rank=r) for r in range(4)]
    ours, theirs = llama("LKBHNC", tp_size=2, tp_rank=1), llama("LKBHNC", tp_size=2)
    assert len(transfer_pairs(ranks, [ours, theirs])) == 4
    with pytest.raises(LayoutError, match=r"destination 0 \(rank 1 of 2\) would get no heads \[6, 7\] of layers \[0, 1,.*"
                       r"of the 4 source ranks of these layers \[3\] are missing") as caught:  # fmt: skip
        transfer_pairs(ranks[:3], [ours])
    assert caught.value.field == "tp_rank"
    assert transfer_pairs(ranks[:3], [theirs]), "whose heads the missing one does not hold"
    assert transfer_pairs(ranks[:3], []) == ()
    with pytest.raises(LayoutError, match=r"destination 0 holds \[0, 1,.*\], which no source does"):
        transfer_pairs([], [ours])


def test_pairs_without_a_stage_or_a_replica_are_refused() -> None:
    dst = llama("LKBHNC")
    stages = [llama("LKBNHC", layers=range(16)), llama("LKBNHC", layers=range(16, 32))]
    assert len(transfer_pairs(stages, [dst])) == 2
    with pytest.raises(LayoutError, match=r"destination 0 holds \[16, .*31\], which no source does") as caught:  # fmt: skip
        transfer_pairs(stages[:1], [dst])
    assert caught.value.field == "layers"
    # Ranks that hold the same heads share the layers, so that each of them is needed.
    replicas = [llama("LKBNHC", num_kv_heads=1, tp_size=2, tp_rank=r) for r in range(2)]
    dst = llama("LKBHNC", num_kv_heads=1)
    assert len(transfer_pairs(replicas, [dst])) == 2
    with pytest.raises(LayoutError, match=r"no heads \[0\] of layers \[1, 3, .*\[1\] are missing"):
        transfer_pairs(replicas[:1], [dst])
    assert transfer_pairs(replicas[:1], [dst], spread=False) == ((0, 0, tuple(range(32))),)


def test_a_latent_does_not_map_onto_keys_and_values() -> None:
    shape = {"num_blocks": 4, "block_size": 4, "dtype": "uint8", "num_layers": 2}
    latent = KVLayout.mla(latent_dim=8, **shape)
    state = KVLayout.from_order(
        "LBC", kind="state", num_kv_heads=1, head_dim=8, **{**shape, "block_size": 1}
    )
    with pytest.raises(LayoutError) as caught:
        plan_transfer(latent, state, [0], [0])
    assert caught.value.field == "kind"
    assert plan_transfer(state, state, [3], [1]).num_spans == 2


@pytest.mark.parametrize(
    ("src_ids", "dst_ids", "how", "message"),
    [
        ([0, 2048], [0, 1], {}, r"src_blocks\[1\]: id 2048 is not within 0 to 2047"),
        ([0, 1], [0, -2], {}, r"dst_blocks\[1\]: id -2"),
        ([0, 1], [5, 5], {}, r"dst_blocks\[1\]: id 5 stands at index 0 already"),
        ([0, -1], [0, 1], {}, r"src_blocks\[1\]: id -1 \(a hole"),
        ([0, 1], [0, 1], {"num_tokens": 33}, r"src_blocks: has 2 ids, 33 tokens need 3"),
        ([0, 1, 2], [0, 1], {"num_tokens": 33}, r"dst_blocks: has 2 ids, 33 tokens need 3"),
        (
            [0, 1],
            [0, 1],
            {"num_tokens": 8, "first_token": 9},
            "first_token: 9 lies past num_tokens 8",
        ),
        ([0, 1], [0, 1], {"num_tokens": -1}, "num_tokens: -1 is less than 0"),
        ([0.5, 1], [0, 1], {}, "src_blocks: needs one axis of integer block ids"),
        ([[0, 1]], [0, 1], {}, "src_blocks: needs one axis"),
        ([0], [0], {"kind": "fast"}, "kind: 'fast' is not one of"),
    ],
)
def test_wrong_blocks_are_refused_with_their_index(
    src_ids: Any, dst_ids: Any, how: dict[str, Any], message: str
) -> None:
    layout = llama("LKBNHC")
    with pytest.raises(InvalidArgumentError, match=message):
        plan_transfer(layout, layout, src_ids, dst_ids, **how)


def test_holes_outside_the_range_do_not_matter() -> None:
    layout = llama("LKBNHC")
    plan = plan_transfer(layout, layout, [-1, 4, 9], [-1, 7, 7], 30, first_token=16)
    assert plan.num_spans == 64
    assert plan_transfer(layout, layout, [-1, 4], [-1, 7]).num_spans == 64
    assert plan_transfer(layout, layout, [], []).num_spans == 0
    assert plan_transfer(layout, layout, [], []).src_offsets.dtype == np.int64


def test_named_layers_must_be_held_by_both() -> None:
    early, late = llama("LKBNHC", layers=range(20)), llama("LKBNHC", layers=range(10, 32))
    assert plan_of(early, late, 16).layers == tuple(range(10, 20))
    assert plan_of(early, late, 16, layers=[12, 11]).layers == (11, 12)
    with pytest.raises(LayoutError, match=r"layers: the source does not hold \[20\]"):
        plan_of(early, late, 16, layers=[19, 20])
    assert plan_of(llama("LKBNHC", layers=[0]), llama("LKBNHC", layers=[1]), 16).num_spans == 0


def test_blocks_that_may_not_be_cut_move_whole() -> None:
    amx = llama("LKBHNC", format="amx", atom="block")
    assert plan_of(amx, amx, 64).num_spans == 64 * 4
    for change, field in (({"block_size": 32}, "block_size"), ({"tp_size": 2}, "head_range")):
        with pytest.raises(LayoutError) as caught:
            plan_of(amx, llama("LKBHNC", format="amx", atom="block", **change), 64)
        assert caught.value.field == field
    with pytest.raises(LayoutError, match="atom: tokens 0 to 60 cut a block of 16"):
        plan_of(amx, amx, 60)
    with pytest.raises(LayoutError) as caught:
        plan_of(amx, llama("LKBNHC", format="amx", atom="block"), 64)
    assert caught.value.field == "order"


def test_one_scale_a_token_cannot_serve_two_sources() -> None:
    def cache(**change: Any) -> KVLayout:
        return llama(
            "LKBNHC", dtype="int8", scales=KVScales("token", order="LKBN", offset=1 << 40), **change
        )

    assert plan_of(cache(), cache(tp_size=2), 16, kind="direct").num_spans > 0
    with pytest.raises(LayoutError, match="would need several"):
        plan_of(cache(tp_size=2), cache(), 16)


@pytest.mark.parametrize("wrong", [None, 5, {"num_layers": 2}])
def test_what_is_no_layout_is_named(wrong: Any) -> None:
    layout = KVLayout.nhd(
        num_layers=1, num_blocks=4, block_size=4, num_kv_heads=1, head_dim=4, dtype="int8"
    )
    with pytest.raises(
        InvalidArgumentError, match=f"dst: expected a KVLayout, given {type(wrong).__name__}"
    ):
        plan_transfer(layout, wrong, [0], [1])
