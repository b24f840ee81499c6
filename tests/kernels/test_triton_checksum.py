# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Triton's checksum_blocks under the interpreter: the sums of the reference, whatever rows are aligned to."""

from __future__ import annotations

from typing import Any

import pytest
from triton_cases import needs_interpreter, torch

from kvxfer import kernels
from kvxfer.layout import KVLayout, KVScales

pytestmark = needs_interpreter


def sums(layout: KVLayout, memory: Any, ids: list[int], **options: Any) -> list[list[int]]:
    return [
        kernels.checksum_blocks(layout, memory, ids, backend=backend, **options).tolist()
        for backend in ("triton", "reference")
    ]


def made(order: str = "LBKNHC", **changes: Any) -> tuple[KVLayout, Any]:
    how: dict[str, Any] = {
        "num_layers": 2, "num_blocks": 9, "block_size": 4, "num_kv_heads": 3, "head_dim": 16, "dtype": "bfloat16",
    }  # fmt: skip
    layout = KVLayout.from_order(order, **{**how, **changes})
    torch.manual_seed(0)
    return layout, torch.randint(0, 256, (layout.nbytes,), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("width", "dtype"),
    [(16, "bfloat16"), (6, "float16"), (5, "bfloat16"), (7, "int8"), (1, "int8"), (257, "float32")],
)
def test_rows_of_any_length_and_alignment(width: int, dtype: str) -> None:
    """Loads of 8, 4, 2 and 1 bytes; rows that end inside a pair of words."""
    scales = KVScales("tensor", k=(1.0,), v=(1.0,)) if dtype == "int8" else None
    layout, memory = made(head_dim=width, dtype=dtype, scales=scales)
    ours, theirs = sums(layout, memory, [7, 2, 5], num_tokens=11, first_token=3)
    assert ours == theirs
    assert len(set(ours)) == 2


@pytest.mark.parametrize(
    ("order", "changes"),
    [
        ("LBKHNC", {}),
        ("LBHNKC", {"block_size": 16}),
        ("BLKNHC", {"block_size": 3, "tp_size": 3, "tp_rank": 1}),
    ],
)
def test_orders_ranks_layers_and_heads(order: str, changes: dict[str, Any]) -> None:
    layout, memory = made(order, **changes)
    ours, theirs = sums(layout, memory, [8, 0, 3], layers=[1])
    assert ours == theirs
    high = layout.head_range[1]
    ours, theirs = sums(layout, memory, [8, 0, 3], heads=(high - 1, high))
    assert ours == theirs


def test_one_bit_changes_the_sum_of_its_layer_alone() -> None:
    layout, memory = made()
    before, _ = sums(layout, memory, [1, 2])
    memory[layout.nbytes // 2 + 2 * layout.nbytes // 18 // 2 + 5] ^= 4  # in block 1 of layer 1
    after, theirs = sums(layout, memory, [1, 2])
    assert after == theirs
    assert after[0] == before[0]
    assert after[1] != before[1]


def test_nothing_sums_to_zero() -> None:
    layout, memory = made()
    assert sums(layout, memory, []) == [[0, 0]] * 2
    assert sums(layout, memory, [1], layers=[]) == [[], []]
