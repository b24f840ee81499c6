# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Plans over what is no plain number: opaque rows, int8, and ranks that hold only some layers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kvxfer.layout import KVLayout, KVScales, TransferPlan, plan_transfer

SRC_BLOCKS, DST_BLOCKS = [5, 0], [7, 2, 4]


def moved(plan: TransferPlan, source: np.ndarray, target: np.ndarray) -> np.ndarray:
    result = target.copy()
    for src, dst, n in zip(plan.src_offsets, plan.dst_offsets, plan.nbytes, strict=True):
        result[dst : dst + n] = source[src : src + n]
    return result


def memory(layout: KVLayout, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, layout.nbytes, dtype=np.uint8)


def test_opaque_rows_of_656_bytes_move_whole_between_unequal_blocks() -> None:
    """DeepSeek's fp8 latent rows: any block size, but no cut within a row."""
    kind: dict[str, Any] = {"format": "fp8_ds_mla", "atom": "token", "dtype": "uint8"}
    src = KVLayout.mla(latent_dim=656, num_blocks=6, block_size=64, num_layers=2, **kind)
    dst = KVLayout.mla(latent_dim=656, num_blocks=8, block_size=48, num_layers=2, **kind)
    plan = plan_transfer(src, dst, SRC_BLOCKS, DST_BLOCKS, 100, kind="direct")
    assert (plan.nbytes % 656 == 0).all()
    a, b = memory(src, 1), memory(dst, 2)
    # By axis order, not by the layout's own arithmetic: [layer, block, token, row].
    rows, expected = a.reshape(2, 6, 64, 656), b.reshape(2, 8, 48, 656).copy()
    for token in range(100):
        expected[:, DST_BLOCKS[token // 48], token % 48] = rows[:, SRC_BLOCKS[token // 64], token % 64]  # fmt: skip
    assert np.array_equal(moved(plan, a, b), expected.reshape(-1))


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3", "float8_e5m2", "float16"])
def test_every_dtype_moves_by_its_own_size(dtype: str) -> None:
    size = 2 if dtype == "float16" else 1
    scales = None if dtype == "float16" else KVScales("tensor", k=(0.5,), v=(0.25,))
    shape: dict[str, Any] = {"num_kv_heads": 2, "head_dim": 8, "num_layers": 1}
    src = KVLayout.nhd(num_blocks=6, block_size=6, dtype=dtype, scales=scales, **shape)
    dst = KVLayout.hnd(num_blocks=8, block_size=4, dtype=dtype, scales=scales, **shape)
    plan = plan_transfer(src, dst, SRC_BLOCKS, DST_BLOCKS, 11, kind="direct")
    a, b = memory(src, 1), memory(dst, 2)
    keys = a.reshape(2, 6, 6, 2, 8 * size)  # K and V, block, token, head
    expected = b.reshape(2, 8, 2, 4, 8 * size).copy()
    for token in range(11):
        expected[:, DST_BLOCKS[token // 4], :, token % 4] = keys[:, SRC_BLOCKS[token // 6], token % 6]  # fmt: skip
    assert np.array_equal(moved(plan, a, b), expected.reshape(-1))


def test_pipeline_stages_move_the_layers_that_both_hold() -> None:
    shape: dict[str, Any] = {
        "block_size": 4, "num_kv_heads": 1, "head_dim": 4, "dtype": "float32", "num_layers": 8,
    }  # fmt: skip
    src = KVLayout.from_order("LKBNHC", num_blocks=6, layers=range(5), **shape)
    dst = KVLayout.from_order("BLKHNC", num_blocks=8, layers=range(3, 8), **shape)
    plan = plan_transfer(src, dst, [5, 0], [7, 2], by_layer=True, kind="direct")
    assert plan.layers == (3, 4)
    a, b = memory(src, 1), memory(dst, 2)
    rows = a.reshape(5, 2, 6, 4 * 16)  # layer, K or V, block
    expected = b.reshape(8, 5, 2, 4 * 16).copy()
    for layer in (3, 4):
        for ours, theirs in ((5, 7), (0, 2)):
            expected[theirs, layer - 3] = rows[layer, :, ours]
    assert np.array_equal(moved(plan, a, b), expected.reshape(-1))
    assert len(plan.for_layer(0)) == len(plan.for_layer(7)) == 0
    apart = KVLayout.from_order("LKBNHC", num_blocks=8, layers=range(5, 8), **shape)
    assert plan_transfer(src, apart, [5, 0], [7, 2]).num_spans == 0
