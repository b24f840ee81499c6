# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""What a gathered or packed plan stages by the kernels is what its spans say, whatever ranks and heads move."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kvxfer import KVLayout, kernels, plan_transfer
from kvxfer.errors import InvalidArgumentError, LayoutError
from kvxfer.layout import KVScales, TransferPlan

SHAPE: dict[str, Any] = {
    "num_layers": 3,
    "num_blocks": 9,
    "num_kv_heads": 8,
    "head_dim": 16,
    "dtype": "float16",
}


def run(groups: Any, src: np.ndarray, dst: np.ndarray) -> None:
    for group in groups:
        spans = group.template.repeated(group.bases)
        for a, b, n in zip(spans.src, spans.dst, spans.nbytes, strict=True):
            dst[b : b + n] = src[a : a + n]


def memory_of(layout: KVLayout) -> np.ndarray:
    return np.random.default_rng(0).integers(1, 255, layout.nbytes, np.uint8)


def moved(plan: TransferPlan, source: np.ndarray, backend: str) -> np.ndarray:
    """What lands at the destination, with the kernels at both ends."""
    staging = np.zeros(plan.staging_nbytes[0], np.uint8)
    kernels.pack_plan(plan, source, staging, backend=backend)
    if not plan.convert:
        expected = np.zeros_like(staging)
        run(plan.pack_groups, source, expected)
        held = expected != 0  # what the plan leaves out may be anything
        np.testing.assert_array_equal(staging[held], expected[held])
    target = np.zeros(plan.dst.nbytes, np.uint8)
    if plan.kind == "packed":
        arrived = np.zeros(plan.staging_nbytes[1], np.uint8)
        run(plan.groups, staging, arrived)
        kernels.unpack_plan(plan, arrived, target, backend=backend)
    else:
        run(plan.groups, staging, target)
    return target


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("kind", ["gathered", "packed"])
@pytest.mark.parametrize(("tp", "rank"), [((1, 2), 1), ((2, 4), 3), ((4, 2), 1), ((2, 8), 5)])
def test_staged_bytes_land_as_direct_ones(
    kind: str, tp: tuple[int, int], rank: int, backend: str
) -> None:
    dst = KVLayout.hnd(**SHAPE, block_size=4, tp_size=tp[1], tp_rank=rank)
    src = KVLayout.nhd(**SHAPE, block_size=8, tp_size=tp[0], tp_rank=rank * tp[0] // tp[1])
    where: dict[str, Any] = {
        "src_blocks": [2, 7, 1],
        "dst_blocks": [3, 8, -1, 4, 2],
        "num_tokens": 18,
        "first_token": 3,
    }
    source = memory_of(src)
    expected = np.zeros(dst.nbytes, np.uint8)
    direct = plan_transfer(src, dst, **where, kind="direct")
    run(direct.groups, source, expected)
    plan = plan_transfer(src, dst, **where, kind=kind)
    assert plan.kind == kind
    assert plan.heads[0] > 0
    np.testing.assert_array_equal(moved(plan, source, backend), expected)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("kind", ["gathered", "packed"])
def test_values_are_converted_with_the_scales_of_the_heads_that_move(
    kind: str, backend: str
) -> None:
    scales = KVScales("head", k=tuple(2.0**i for i in range(8)), v=(0.5,) * 8)
    src = KVLayout.nhd(**SHAPE, block_size=8)
    dst = KVLayout.hnd(
        **SHAPE | {"dtype": "int8"}, block_size=4, tp_size=2, tp_rank=1, scales=scales
    )
    plan = plan_transfer(src, dst, [4, 2], [1, 0, 6], 11, kind=kind)
    assert plan.convert
    values = np.random.default_rng(1).normal(0, 40, src.nbytes // 2).astype(np.float16)
    source = values.view(np.uint8)
    expected = np.zeros(dst.nbytes, np.uint8)
    kernels.copy_blocks(
        src, source, dst, expected, [4, 2], [1, 0, 6], num_tokens=11, backend=backend
    )
    assert expected.any()
    np.testing.assert_array_equal(moved(plan, source, backend), expected)


@pytest.mark.parametrize("kind", ["gathered", "packed"])
def test_source_blocks_that_nothing_needs_may_be_absent(kind: str) -> None:
    src = KVLayout.nhd(**SHAPE, block_size=4)
    dst = KVLayout.hnd(**SHAPE, block_size=4)
    plan = plan_transfer(src, dst, [5, -1, 3], [1, -1, 7], 11, kind=kind)
    source, expected = memory_of(src), np.zeros(dst.nbytes, np.uint8)
    run(plan_transfer(src, dst, [5, -1, 3], [1, -1, 7], 11, kind="direct").groups, source, expected)
    np.testing.assert_array_equal(moved(plan, source, "cpu"), expected)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"dtype": "float16"}, {"dtype": "int8"}),
        ({"dtype": "int8", "scales": KVScales("tensor", k=0.1, v=0.1)}, {"dtype": "int8"}),
        (
            {"dtype": "float16"},
            {"dtype": "int8", "scales": KVScales("token_head", order="LKBNH", offset=1 << 20)},
        ),
    ],
)
def test_plans_and_copies_refuse_the_same_conversions(
    ours: dict[str, Any], theirs: dict[str, Any]
) -> None:
    src, dst = (KVLayout.nhd(**SHAPE | each, block_size=4) for each in (ours, theirs))
    for a, b in ((src, dst), (dst, src)):
        with pytest.raises(LayoutError):
            plan_transfer(a, b, [1], [2])
        with pytest.raises(LayoutError):
            kernels.copy_blocks(a, memory_of(a), b, memory_of(b), [1], [2])


def test_a_direct_plan_has_no_staging() -> None:
    layout = KVLayout.nhd(**SHAPE, block_size=4)
    plan = plan_transfer(layout, layout, [1], [2], kind="direct")
    memory = memory_of(layout)
    with pytest.raises(InvalidArgumentError, match="a direct one has no staging"):
        kernels.pack_plan(plan, memory, memory.copy())
    with pytest.raises(InvalidArgumentError, match="given 'NoneType'"):
        kernels.unpack_plan(None, memory, memory)  # type: ignore[arg-type]


def test_staging_that_is_too_short_is_refused() -> None:
    src, dst = KVLayout.nhd(**SHAPE, block_size=4), KVLayout.hnd(**SHAPE, block_size=4)
    plan = plan_transfer(src, dst, [1], [2], kind="packed")
    with pytest.raises(InvalidArgumentError, match=r"needs bytes .* given pieces of"):
        kernels.pack_plan(plan, memory_of(src), np.zeros(plan.staging_nbytes[0] - 1, np.uint8))


def test_staging_names_the_callers_memory() -> None:
    """Once: the texts said dst of the sender's staging, and src of the receiver's, which no argument is called."""
    src, dst = KVLayout.nhd(**SHAPE, block_size=4), KVLayout.hnd(**SHAPE, block_size=4)
    plan = plan_transfer(src, dst, [1], [2], kind="packed")
    source, target = memory_of(src), np.zeros(dst.nbytes, np.uint8)
    staging = np.zeros(plan.staging_nbytes[0], np.uint8)
    fixed = staging.copy()
    fixed.setflags(write=False)
    half = staging.view(np.float16).astype(np.float32)
    pack, unpack = kernels.pack_plan, kernels.unpack_plan
    for match, call in {
        r"^staging: layer \d, part . needs bytes": lambda: pack(plan, source, staging[:-1]),
        r"^src: layer \d, part . needs bytes": lambda: pack(plan, source[:9], staging),
        "^staging: expected writable memory": lambda: pack(plan, source, fixed),
        "^staging: expected memory apart from src ": lambda: pack(plan, source, source[: staging.size]),
        "^staging: expected memory of dtype float16 ": lambda: pack(plan, source, half),
        r"^staging: layer \d, part . needs": lambda: unpack(plan, staging[:-1], target),
        r"^dst: layer \d, part . needs": lambda: unpack(plan, staging, target[:9]),
        "^dst: expected memory apart from staging ": lambda: unpack(plan, target[: staging.size], target),
        "^staging: expected memory of dtype float16 like": lambda: unpack(plan, half, target),
    }.items():  # fmt: skip
        with pytest.raises(InvalidArgumentError, match=match):
            call()


def test_heads_of_the_staging_are_not_mistaken_for_the_models() -> None:
    src = KVLayout.nhd(**SHAPE, block_size=4)
    dst = KVLayout.hnd(**SHAPE, block_size=4, tp_size=2, tp_rank=1)
    plan = plan_transfer(src, dst, [1], [2], kind="packed")
    assert plan.wire_layout is not None
    with pytest.raises(LayoutError, match=r"num_kv_heads: source has 8, destination 4.*pack_plan"):
        kernels.copy_blocks(
            src,
            memory_of(src),
            plan.wire_layout,
            np.zeros(plan.wire_layout.nbytes, np.uint8),
            [1],
            [0],
        )


def test_the_inside_of_an_opaque_block_stays_as_it_is() -> None:
    shape = SHAPE | {"dtype": "uint8", "format": "tiles", "atom": "block", "block_size": 4}
    src, dst = KVLayout.nhd(**shape), KVLayout.hnd(**shape)
    with pytest.raises(LayoutError, match="insides of blocks of atom 'block'"):
        kernels.copy_blocks(src, memory_of(src), dst, memory_of(dst), [1], [2])
    with pytest.raises(InvalidArgumentError, match="tokens 0 to 3 cut a block of 4"):
        kernels.copy_blocks(src, memory_of(src), src, memory_of(src), [1], [2], num_tokens=3)
