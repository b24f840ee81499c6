# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Plans are counted and priced before their rows are written: the numbers are those of the rows."""

from __future__ import annotations

import itertools
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvxfer.layout import KVLayout, KVScales, TransferPlan, plan_transfer
from kvxfer.layout.cost import cost_model, spans_cost_s
from kvxfer.layout.rows import Axis, Spans, UnwrittenSpans, count_joins
from kvxfer.layout.spans import SpanGroup
from kvxfer.layout.staging import packed_layout, packed_nbytes

RUN = 2
STEPS = st.integers(1, 12)


@given(
    st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60), st.integers(1, 3)), min_size=1),
    st.lists(st.tuples(st.integers(2, 3), STEPS, STEPS), max_size=2),
    st.lists(st.tuples(st.integers(2, 3), STEPS, STEPS), max_size=2),
    st.tuples(STEPS, STEPS) | st.none(),
    st.booleans(),
)
@example([(0, 0, 1), (1, 1, 2)], [], [], (RUN, RUN), True)
@example([(0, 0, 1), (2, 2, 1), (4, 4, 1)], [], [], None, False)
@example([(0, 0, 1), (8, 8, 1)], [(3, 100, 100)], [(2, 6, 6)], None, False)
@settings(max_examples=300)
def test_joins_are_counted_as_rows_show_them(
    starts: list[tuple[int, int, int]],
    outer: list[tuple[int, int, int]],
    inner: list[tuple[int, int, int]],
    token: tuple[int, int] | None,
    token_outside: bool,
) -> None:
    """Against all rows, written out one by one in the order of the nest."""
    starts.sort(key=lambda start: start[1])
    src, dst, lengths = (np.array(column, np.int64) for column in zip(*starts, strict=True))
    outside, inside = ([Axis("head", *axis) for axis in axes] for axes in (outer, inner))
    if token:
        nest = outside if token_outside else inside
        nest.append(Axis("token", int(lengths.max()), *token))
    joins = count_joins(src, dst, lengths, RUN, outside, inside)
    rows = []
    levels = outside + inside
    for out in itertools.product(*(range(axis.extent) for axis in outside)):
        for a, b, length in starts:
            for into in itertools.product(*(range(axis.extent) for axis in inside)):
                steps = list(zip(out + into, levels, strict=True))
                if all(i < length for i, axis in steps if axis.name == "token"):
                    step_src = sum(i * axis.src for i, axis in steps)
                    rows.append((a + step_src, b + sum(i * axis.dst for i, axis in steps)))
    written = Spans(*np.array(rows, np.int64).T, np.full(len(rows), RUN, np.int64))
    if joins is None:
        return
    joined = written.coalesced()
    assert np.array_equal(np.sort(written.dst), written.dst)
    assert len(joined) == len(rows) - joins
    assert sorted(joined.nbytes) == [RUN] * (len(rows) - 2 * joins) + [2 * RUN] * joins


def plan_of(*, scattered: bool = True, **how: Any) -> TransferPlan:
    src, dst = (
        KVLayout.from_order(
            order, num_layers=2, num_blocks=90, block_size=16, num_kv_heads=8, head_dim=64, dtype="float16"
        )
        for order in ("LKBNHC", "LKBHNC")
    )  # fmt: skip
    blocks = np.random.default_rng(0).permutation(45)[:40] * 2 if scattered else np.arange(40)
    return plan_transfer(src, dst, blocks, blocks, 40 * 16 - 5, **how)


@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize("first_token", [0, 3])
def test_a_plan_is_counted_and_priced_as_its_rows_say(first_token: int, scattered: bool) -> None:
    """Once its 200,000 rows were written and compared only to find that another kind costs less."""
    plan = plan_of(kind="direct", first_token=first_token, scattered=scattered)
    (group,) = plan.groups
    assert isinstance(group.template, UnwrittenSpans)
    text, num_spans, nbytes = plan.describe(), plan.num_spans, plan.total_nbytes
    assert "_written" not in vars(group.template)
    rows = pickle.loads(pickle.dumps(group.template))
    assert type(rows) is Spans
    assert len(rows.coalesced()) == len(rows) == len(group.template)
    assert (num_spans, nbytes) == (len(plan.nbytes), plan.nbytes.sum())
    written = SpanGroup(group.bases, rows, group.layers)
    for path in ("tcp", "verbs", "cuda_ipc"):
        model = cost_model(path)
        assert spans_cost_s([group], model) == pytest.approx(spans_cost_s([written], model))
    assert plan.describe() == text


def test_a_packed_plan_is_priced_as_if_it_were_made() -> None:
    auto, packed = plan_of(cost="verbs"), plan_of(kind="packed", cost="verbs")
    assert list(auto.cost_s) == ["direct", "gathered", "packed"]
    assert auto.cost_s["packed"] == packed.cost_s["packed"]


@pytest.mark.parametrize("heads", [(0, 8), (3, 4)])
@pytest.mark.parametrize("granularity", [None, "token", "token_head"])
@pytest.mark.parametrize("widths", [(8, 8), (8, 24), (5, 0)])
def test_the_packed_size_is_that_of_the_layout(
    widths: tuple[int, int], granularity: str | None, heads: tuple[int, int]
) -> None:
    mla = not widths[1]
    order = "LBN" if mla else "LKBN"
    scales = granularity and KVScales(
        granularity, order=order + "H" * (granularity == "token_head"), offset=1 << 20
    )
    dst = KVLayout.from_order(
        order + "HC", num_layers=3, num_blocks=4, block_size=4, num_kv_heads=1 if mla else 8,
        head_dim=widths[0], head_dim_v=widths[1], dtype="int8", scales=scales or None,
    )  # fmt: skip
    if mla:
        heads = (0, 1)
    wire = packed_layout(dst, (0, 2), heads, 13)
    assert packed_nbytes(dst, (0, 2), heads, 13) == wire.nbytes
