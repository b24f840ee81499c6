# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""A decode plan covers every visible token once, changes no result, and is refused for another call."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvxfer import kernels
from kvxfer.errors import InvalidArgumentError, UnavailableError

LENS = [700, 0, 1, 64, 65, 2100]
SHAPE: dict[str, int] = {"num_q_heads": 4, "num_kv_heads": 2, "head_dim": 8, "block_size": 16}
WAYS = st.fixed_dictionaries({}, optional={"split_size": st.integers(1, 900)}) | st.fixed_dictionaries(
    {"balanced": st.just(True), "num_sms": st.integers(1, 132), "ctas_per_sm": st.integers(1, 3)}
)  # fmt: skip


def call(lens: list[int], window_left: int = -1) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    width = -(-max([*lens, 1]) // 16)
    table = np.full((len(lens), width), -1, np.int32)
    free = iter(rng.permutation(len(lens) * width))
    for row, length in zip(table, lens, strict=True):
        row[: -(-length // 16)] = [next(free) for _ in range(-(-length // 16))]
    k, v = (rng.standard_normal((table.size, 16, 2, 8)).astype(np.float32) for _ in range(2))
    q = rng.standard_normal((len(lens), 4, 8)).astype(np.float32)
    return {
        "q": q, "k_cache": k, "v_cache": v, "block_table": table,
        "seq_lens": np.array(lens, np.int32), "window_left": window_left,
    }  # fmt: skip


@given(
    lens=st.lists(st.integers(0, 5000), max_size=12),
    window_left=st.sampled_from([-1, 0, 63, 64, 1000]),
    how=WAYS,
)
def test_items_cover_each_visible_token_once(
    lens: list[int], window_left: int, how: dict[str, Any]
) -> None:
    plan = kernels.plan_decode(lens, **SHAPE, window_left=window_left, **how)
    assert plan.split_size % 64 == 0
    assert plan.num_items == len({tuple(item) for item in plan.items.tolist()})
    assert plan.num_splits >= plan.items[:, 1].max(initial=0) + 1
    seen = [np.zeros(length, int) for length in lens]
    for sequence, split in plan.items.tolist():
        begin = split * plan.split_size
        seen[sequence][begin : begin + plan.split_size] += 1
    assert set(plan.items[:, 0].tolist()) == set(range(len(lens))), "empty sequences get zeros"
    for length, counts in zip(lens, seen, strict=True):
        visible = 0 if window_left < 0 else max(0, length - 1 - window_left)
        assert (counts[visible:] == 1).all()
        assert counts[: visible // plan.split_size * plan.split_size].sum() == 0
    if how.get("balanced"):
        assert plan.split_size <= 4096 * 1.25 + 64


@pytest.mark.parametrize("window_left", [-1, 100])
def test_a_plan_changes_no_bit_and_its_split_is_what_counts(backend: str, window_left: int) -> None:
    given = call(LENS, window_left)
    plan = kernels.plan_decode(LENS, **SHAPE, window_left=window_left)
    plain = kernels.paged_decode(**given, backend=backend, return_lse=True)
    for ours, theirs in zip(
        kernels.paged_decode(**given, backend=backend, return_lse=True, plan=plan), plain, strict=True
    ):  # fmt: skip
        assert np.array_equal(ours, theirs)
    short = kernels.plan_decode(LENS, **SHAPE, window_left=window_left, split_size=100)
    assert short.split_size == 128
    assert np.array_equal(
        kernels.paged_decode(**given, backend=backend, plan=short),
        kernels.paged_decode(**given, backend=backend, split_size=128),
    )


def test_results_with_a_plan_do_not_depend_on_the_batch() -> None:
    given = call(LENS)
    plan = kernels.plan_decode(LENS, **SHAPE)
    together = kernels.paged_decode(**given, plan=plan)
    for row, length in enumerate(LENS):
        alone = {
            name: value[row : row + 1] if name in ("q", "block_table", "seq_lens") else value
            for name, value in given.items()
        }
        plan = kernels.plan_decode([length], **SHAPE)
        assert np.array_equal(kernels.paged_decode(**alone, plan=plan)[0], together[row])


@pytest.mark.parametrize(
    ("lens", "split"),
    [
        ([1024], 64),  # 8 heads of 16 splits: half a wave of 264, since no split is shorter
        ([8192], 256),  # 256 thread blocks, one wave
        ([32768], 1024),
        ([8192] * 4, 1024),
        ([1024] * 16, 1024),  # 128 thread blocks use the memory's bandwidth without splits
        ([8192] * 16, 4096),
        ([1024] * 256, 1024),
        ([32768] * 256, 4096),
        ([32768] + [512] * 15, 1280),  # 26 splits of the long one beside 15 short ones
    ],
)
def test_balanced_splits_fill_one_wave(lens: list[int], split: int) -> None:
    shape = SHAPE | {"num_q_heads": 32, "num_kv_heads": 8, "head_dim": 128}
    plan = kernels.plan_decode(lens, **shape, balanced=True, num_sms=132, ctas_per_sm=2)
    assert plan.split_size == split
    # The longest first, so that no long one starts when all others are done.
    tokens = [min(split, lens[row] - index * split) for row, index in plan.items.tolist()]
    assert tokens == sorted(tokens, reverse=True)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "other lengths": ({"lens": [700, 0, 1, 64, 66, 2100]}, "number 4 is 65, given one for 66"),
    "another batch": ({"lens": LENS[:5]}, "batch is 6, given one for 5"),
    "another group": ({"num_q_heads": 8}, "num_q_heads is 4, given one for 8"),
    "other heads": ({"num_kv_heads": 4}, "num_kv_heads is 2, given one for 4"),
    "another width": ({"head_dim": 16}, "head_dim is 8, given one for 16"),
    "other blocks": ({"block_size": 32}, "block_size is 16, given one for 32"),
    "another window": ({"window_left": 7}, "window_left is -1, given one for 7"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_plan_for_another_call_is_refused(case: str) -> None:
    change, message = REFUSED[case]
    lens = change.pop("lens", LENS) if "lens" in change else LENS
    plan = kernels.plan_decode(lens, **SHAPE | change)
    with pytest.raises(InvalidArgumentError, match=message):
        kernels.paged_decode(**call(LENS), plan=plan)


def test_a_plan_for_another_device_is_refused() -> None:
    plan = kernels.plan_decode(torch.tensor(LENS), **SHAPE, device="meta")
    assert plan.items.device.type == "meta"
    with pytest.raises(InvalidArgumentError, match="device is cpu, given one for meta"):
        kernels.paged_decode(**call(LENS), plan=plan)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "negative length": ({"seq_lens": [3, -1]}, r"seq_lens\[1\]: expected >= 0, given -1"),
    "shape of lengths": ({"seq_lens": [[3]]}, "seq_lens: expected a list of lengths"),
    "lengths on a device": (
        {"seq_lens": torch.empty(2, dtype=torch.int32, device="meta")},
        "seq_lens: expected lengths on the host, given a tensor on meta",
    ),
    "no heads": ({"num_kv_heads": 0}, "num_kv_heads: expected > 0, given 0"),
    "heads that do not divide": ({"num_kv_heads": 3}, "multiple of num_kv_heads 3, given 4"),
    "window": ({"window_left": -2}, "window_left: expected >= -1, given -2"),
    "split of nothing": ({"split_size": 0}, "split_size: expected > 0 or None, given 0"),
    "both": ({"split_size": 64, "balanced": True}, "split_size: expected None, since balanced"),
    "no processors": ({"balanced": True, "num_sms": 0}, "num_sms: expected > 0 or None, given 0"),
    "no blocks": (
        {"balanced": True, "ctas_per_sm": -1},
        "ctas_per_sm: expected > 0 or None, given -1",
    ),
    "half a head": ({"num_kv_heads": 0.5}, "num_kv_heads: expected an integer > 0, given 0.5"),
    "half a window": ({"window_left": 1.5}, "window_left: expected an integer >= -1, given 1.5"),
    "a length that no call takes": (
        {"seq_lens": [3, 2**40]},
        r"seq_lens\[1\]: expected at most 2147483647, given 1099511627776",
    ),
    "a length past int64": (
        {"seq_lens": np.array([2**64 - 1], np.uint64)},
        r"seq_lens\[0\]: expected at most",
    ),
    "more splits than are worth a plan": (
        {"seq_lens": [2**31 - 1], "split_size": 64},
        "expected at most 16777216 splits, given 33554432 of 64 tokens",
    ),
    "ragged lengths": ({"seq_lens": [[1], [1, 2]]}, "seq_lens: expected a list of lengths"),
    "no device": (
        {"device": "xyz"},
        "device: expected 'cpu' or what torch calls a device, given 'xyz'",
    ),
    "not text": ({"balanced": "no"}, "balanced: expected True or False, given 'no'"),
}


def test_a_device_that_is_not_here_is_unavailable() -> None:
    if torch.cuda.is_available():
        pytest.skip("there are GPUs here")
    with pytest.raises(UnavailableError, match="plan_decode: no device 'cuda:7': ") as caught:
        kernels.plan_decode([3, 4], **SHAPE, device="cuda:7")
    assert caught.value.reason


@pytest.mark.parametrize("case", BAD)
def test_bad_numbers_are_refused(case: str) -> None:
    change, message = BAD[case]
    with pytest.raises(InvalidArgumentError, match=message):
        kernels.plan_decode(**{"seq_lens": [3, 4], **SHAPE, **change})


def test_plan_and_split_size_exclude_each_other_and_no_other_object_is_a_plan() -> None:
    plan = kernels.plan_decode(LENS, **SHAPE)
    with pytest.raises(
        InvalidArgumentError, match="split_size: expected None, since the plan has 512"
    ):
        kernels.paged_decode(**call(LENS), plan=plan, split_size=64)
    with pytest.raises(InvalidArgumentError, match="plan: expected what plan_decode returns"):
        kernels.paged_decode(**call(LENS), plan=512)
