# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""The host's half of a CUDA block copy: tables, strides and access widths, executed here access by access.

What this cannot show is the kernel itself, which needs a GPU; its index walk is tested in C++ (tests/cpp).
"""

from __future__ import annotations

import ctypes
import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kvxfer.kernels import _cuda, reference
from kvxfer.kernels._copy_job import CopyJob, make_job
from kvxfer.kernels._sides import make_side
from kvxfer.layout import KVLayout

NpArray = np.ndarray[Any, Any]


def run_as_the_kernel_would(job: CopyJob) -> None:
    """copy.cu in Python: for every tile and row, accesses of the planned width at the planned addresses."""

    def addressed(piece: NpArray) -> Any:
        return SimpleNamespace(data_ptr=lambda: piece.ctypes.data)

    on_device = dataclasses.replace(
        job,
        src_pieces=tuple(addressed(piece) for piece in job.src_pieces),
        dst_pieces=tuple(addressed(piece) for piece in job.dst_pieces),
    )
    dtypes = {(part.src_dtype, part.dst_dtype) for part in job.parts}
    assert len(dtypes) == 1
    plan = _cuda.plan_launch(on_device, *dtypes.pop())
    access = plan["access"]
    for (src_strides, dst_strides, width), layers in zip(plan["parts"], plan["bases"], strict=True):
        assert width % access == 0
        for src, dst in layers:
            for src_block, src_slot, dst_block, dst_slot, tokens in job.segments:
                for token in range(tokens):
                    for head in range(job.num_heads):
                        at = (
                            (src_block, src_slot + token, head),
                            (dst_block, dst_slot + token, head),
                        )
                        source = int(src + np.dot(at[0], src_strides))
                        target = int(dst + np.dot(at[1], dst_strides))
                        assert source % access == target % access == 0
                        ctypes.memmove(target, source, width)


@pytest.mark.parametrize("order", ["LKBNHC", "LKBHNC", "BLKHNC", "LBHNKC"])
@pytest.mark.parametrize(("head_dim", "access"), [(8, 16), (6, 8), (5, 4)])
def test_a_launch_plan_moves_what_the_reference_moves(
    rng: np.random.Generator, order: str, head_dim: int, access: int
) -> None:
    shape: dict[str, Any] = {
        "num_kv_heads": 4,
        "head_dim": head_dim,
        "dtype": "float32",
        "num_layers": 2,
    }
    src = KVLayout.from_order(order, num_blocks=4, block_size=3, **shape)
    dst = KVLayout.from_order("LKBHNC", num_blocks=3, block_size=5, tp_rank=1, tp_size=2, **shape)

    def aligned(nbytes: int) -> NpArray:
        room = np.zeros(nbytes + 64, np.uint8)
        start = -room.ctypes.data % 64
        return room[start : start + nbytes]

    memory = aligned(src.nbytes)
    memory[:] = rng.integers(0, 256, src.nbytes, dtype=np.uint8)
    results = []
    for run in (run_as_the_kernel_would, reference.copy_blocks):
        out = aligned(dst.nbytes)
        job = make_job(
            make_side("src", src, memory), make_side("dst", dst, out), [3, 0, 2], [2, 1],
            num_tokens=8, first_token=1, layers=None,
        )  # fmt: skip
        run(job)
        results.append(out)
    assert results[1].any()
    assert np.array_equal(*results)
    plan_width = _cuda.plan_launch(
        dataclasses.replace(
            job,
            src_pieces=(SimpleNamespace(data_ptr=lambda: 0),),
            dst_pieces=(SimpleNamespace(data_ptr=lambda: 0),),
        ),
        "float32",
        "float32",
    )["access"]
    assert plan_width == access


def test_the_reason_for_no_cuda_is_given() -> None:
    assert _cuda.unavailable("append_kv", "cpu")
