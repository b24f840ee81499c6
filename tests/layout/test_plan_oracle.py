# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Plans over random pairs of layouts, ranks and block lists, byte by byte against the oracle."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layout_oracle import Model, Move, Rank, fewest_spans, spans_as_bytes

from kvxfer.layout import SpanGroup, transfer_pairs

ORDERS = ["".join(p) + "C" for p in itertools.permutations("LBKNH")]
MLA_ORDERS = ["LBNC", "BLNC", "LBNHC", "NLBC"]
QUIET = settings(max_examples=80)


@st.composite
def models(draw: st.DrawFn) -> Model:
    heads = draw(st.sampled_from([1, 2, 3, 4, 6]))
    width = draw(st.integers(1, 3))
    return Model(
        num_layers=draw(st.integers(1, 4)),
        num_heads=heads,
        head_dim=width,
        head_dim_v=draw(st.sampled_from([width, width, draw(st.integers(1, 3))])),
        dtype=draw(st.sampled_from(["float32", "bfloat16", "uint8"])),
    )


@st.composite
def sides(
    draw: st.DrawFn, model: Model, num_tokens: int, *, like: Rank | None = None
) -> tuple[tuple[Rank, ...], np.ndarray]:
    """All ranks of one side, and a block list that holds the tokens."""
    sizes = [r for r in (1, 2, 3, 4, 6, 8) if r % model.num_heads == 0 or model.num_heads % r == 0]
    tp_size = draw(st.sampled_from(sizes))
    order = draw(st.sampled_from(ORDERS if model.head_dim_v else MLA_ORDERS))
    block_size = draw(st.sampled_from([1, 1, 2, 3, 4, 5]))
    if like is not None:
        order, block_size, tp_size = like.order, like.block_size, like.tp_size
    needed = -(-num_tokens // block_size)
    num_blocks = needed + draw(st.sampled_from([0, 0, 1, 3])) + (needed == 0)
    cuts = (
        sorted(draw(st.sets(st.integers(1, model.num_layers - 1), max_size=1)))
        if model.num_layers > 1
        else []
    )
    edges = [0, *cuts, model.num_layers]
    ranks = tuple(
        Rank(
            model,
            order,
            num_blocks,
            block_size,
            tuple(range(a, b)),
            r,
            tp_size,
            4 * draw(st.integers(0, 2)),
        )
        for a, b in itertools.pairwise(edges)
        for r in range(tp_size)
    )
    # Half the lists run in order, so that neighbours exist to be merged.
    ids = (
        draw(st.permutations(range(num_blocks))) if draw(st.booleans()) else list(range(num_blocks))
    )
    return ranks, np.array(ids[:needed], dtype=np.int64)


@st.composite
def moves(draw: st.DrawFn) -> Move:
    model = draw(models())
    num_tokens = draw(st.integers(0, 9))
    src, src_blocks = draw(sides(model, num_tokens))
    # Equal layouts are the common case, and the one where most neighbours meet.
    like = draw(st.sampled_from([None, src[0]]))
    dst, dst_blocks = draw(sides(model, num_tokens, like=like))
    for index in draw(st.sets(st.integers(0, max(0, len(dst_blocks) - 1)), max_size=1)):
        dst_blocks[index : index + 1] = -1
    return Move(src, dst, src_blocks, dst_blocks, draw(st.integers(0, num_tokens)), num_tokens)


@given(moves(), st.booleans(), st.booleans())
@QUIET
def test_every_destination_byte_is_written_once_and_from_its_source(
    move: Move, by_layer: bool, spread: bool
) -> None:
    check_covered(move, by_layer=by_layer, spread=spread)


def check_covered(move: Move, **how: bool) -> None:
    plans = move.plans(kind="direct", **how)
    for j in range(len(move.dst)):
        arrived: dict[int, int] = {}
        wanted_at_all: set[int] = set()
        for i in range(len(move.src)):
            wanted = move.wanted(i, j)
            wanted_at_all |= set(wanted)
            moved = spans_as_bytes(plans[i, j])
            assert all(wanted[dst][0] == src for dst, src in moved.items())
            assert not set(moved) & set(arrived), "two sources write the same byte"
            arrived |= moved
        assert set(arrived) == wanted_at_all


@pytest.mark.parametrize("sizes", [(528, 1056), (1056, 528), (528, 16), (48, 528), (528, 528)])
def test_blocks_as_large_as_those_of_hybrid_models(sizes: tuple[int, int]) -> None:
    model = Model(num_layers=2, num_heads=2, head_dim=2, head_dim_v=1, dtype="uint8")
    rng = np.random.default_rng(sizes)
    num_tokens = 1200
    ranks, lists = [], []
    for order, size, tp_size in (("LKBNHC", sizes[0], 1), ("BLHKNC", sizes[1], 2)):
        needed = -(-num_tokens // size)
        ranks.append(
            tuple(Rank(model, order, needed + 2, size, (0, 1), r, tp_size) for r in range(tp_size))
        )
        lists.append(rng.permutation(needed + 2)[:needed])
    move = Move(*ranks, *lists, 37, num_tokens)
    check_covered(move)
    for kind in ("gathered", "packed"):
        check_staged(move, kind, by_layer=False)


@given(moves(), st.booleans())
@QUIET
def test_no_fewer_spans_would_do(move: Move, by_layer: bool) -> None:
    """Small plans are merged to the last neighbour; see test_plan_sizes for large ones."""
    for (i, j), plan in move.plans(kind="direct", by_layer=by_layer).items():
        wanted = move.wanted(i, j) if plan.num_spans else {}
        layer_of = {dst: layer for dst, (_, layer) in wanted.items()} if by_layer else None
        assert plan.num_spans == fewest_spans(spans_as_bytes(plan), layer_of)


@given(moves())
@QUIET
def test_layers_of_a_plan_by_layer_add_up_to_the_plan(move: Move) -> None:
    for (i, j), plan in move.plans(kind="direct", by_layer=True).items():
        rows: list[tuple[int, int, int]] = []
        wanted = move.wanted(i, j)
        # Unlike parts whose distance changes from layer to layer (KL.. with head_dim_v) need two groups.
        assert len(plan.groups) <= 1 or plan.src.head_dim != plan.src.head_dim_v
        for group, layer in itertools.product(plan.groups, plan.layers):
            bases = plan.for_layer(layer) if len(plan.groups) == 1 else group.for_layer(layer)
            for base in bases:
                spans = group.template.repeated(base[None])
                rows += zip(
                    spans.src.tolist(), spans.dst.tolist(), spans.nbytes.tolist(), strict=True
                )
                assert all(wanted[int(d)][1] == layer for d in spans.dst)
        assert sorted(rows) == sorted(
            zip(
                plan.src_offsets.tolist(),
                plan.dst_offsets.tolist(),
                plan.nbytes.tolist(),
                strict=True,
            )
        )


@given(moves(), st.booleans())
@QUIET
def test_pairs_are_exactly_the_plans_that_move_something(move: Move, spread: bool) -> None:
    pairs = transfer_pairs(
        [rank.layout() for rank in move.src], [rank.layout() for rank in move.dst], spread=spread
    )
    named = {(i, j): layers for i, j, layers in pairs}
    assert len(named) == len(pairs)
    for (i, j), plan in move.plans(kind="direct", spread=spread).items():
        assert named.get((i, j), ()) == plan.layers


@given(moves(), st.sampled_from(["gathered", "packed"]), st.booleans())
@QUIET
def test_staged_plans_land_the_same_bytes_as_direct_ones(
    move: Move, kind: str, by_layer: bool
) -> None:
    check_staged(move, kind, by_layer=by_layer)


def check_staged(move: Move, kind: str, *, by_layer: bool) -> None:
    direct, staged = move.plans(kind="direct"), move.plans(kind=kind, by_layer=by_layer)
    for pair, plan in staged.items():
        if not direct[pair].num_spans:
            assert plan.num_spans == 0
            continue
        assert plan.wire_layout is not None
        source = np.random.default_rng(1).integers(1, 256, plan.src.nbytes, dtype=np.uint8)
        expected = np.zeros(plan.dst.nbytes, np.uint8)
        _copy(source, expected, direct[pair].groups)
        staging = np.zeros(plan.staging_nbytes[0], np.uint8)
        _copy(source, staging, plan.pack_groups)
        got = np.zeros(plan.dst.nbytes, np.uint8)
        if kind == "packed":
            arrived = np.zeros(plan.staging_nbytes[1], np.uint8)
            _copy(staging, arrived, plan.groups)
            _copy(arrived, got, plan.unpack_groups)
        else:
            _copy(staging, got, plan.groups)
        assert np.array_equal(got, expected)


def _copy(src: np.ndarray, dst: np.ndarray, groups: Sequence[SpanGroup]) -> None:
    for group in groups:
        spans = group.template.repeated(group.bases)
        for a, b, n in zip(spans.src, spans.dst, spans.nbytes, strict=True):
            assert 0 <= a <= a + n <= len(src)
            assert 0 <= b <= b + n <= len(dst)
            dst[b : b + n] = src[a : a + n]


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize(
    ("src_tp", "dst_tp"), [(2, 4), (4, 2), (6, 4), (4, 6), (8, 2), (1, 8), (6, 2)]
)
def test_replicated_heads_are_covered_once(heads: int, src_tp: int, dst_tp: int) -> None:
    """Replica counts where one divides the other, and where neither does."""
    model = Model(num_layers=4, num_heads=heads, head_dim=2, head_dim_v=2, dtype="uint8")
    src = tuple(Rank(model, "LKBHNC", 3, 2, (0, 1, 2, 3), r, src_tp) for r in range(src_tp))
    dst = tuple(Rank(model, "LBNHKC", 3, 3, (0, 1, 2, 3), r, dst_tp) for r in range(dst_tp))
    move = Move(src, dst, np.array([2, 0]), np.array([1, 2]), 0, 4)
    for spread in (True, False):
        plans = move.plans(kind="direct", spread=spread)
        for j in range(dst_tp):
            arrived = [byte for i in range(src_tp) for byte in spans_as_bytes(plans[i, j])]
            wanted = {byte for i in range(src_tp) for byte in move.wanted(i, j)}
            assert len(arrived) == len(set(arrived))
            assert set(arrived) == wanted
