# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""The C++ backend for host memory: adapts normalised calls to the extension module."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kvxfer import _kernels_cpu
from kvxfer._kernels_cpu import append_kv, merge_states, paged_prefill, set_num_threads
from kvxfer.kernels._copy_job import ITEMSIZE, CopyJob

__all__ = [
    "append_kv",
    "build_info",
    "copy_blocks",
    "describe",
    "get_num_threads",
    "merge_states",
    "paged_decode",
    "paged_prefill",
    "set_num_threads",
    "unavailable",
]

TAKES_NUMPY = True

NpArray = npt.NDArray[Any]

_DTYPE_TAG = {"float32": 0, "float16": 1, "bfloat16": 2}

get_num_threads = _kernels_cpu.get_num_threads
build_info = _kernels_cpu.build_info


def unavailable(op: str, device: str) -> str | None:
    return None if device == "cpu" else f"the cpu backend works on host memory, not on {device}"


def describe() -> str:
    info = build_info()
    return f"C++, {info['isa']}, {get_num_threads()} threads"


def paged_decode(*arrays: Any, split_size: int | None, **options: Any) -> None:
    _kernels_cpu.paged_decode(*arrays, split_size=split_size or 0, **options)


def copy_blocks(job: CopyJob) -> None:
    # The pieces are alive in `job` while their addresses are in use.
    src = [piece.ctypes.data for piece in job.src_pieces]
    dst = [piece.ctypes.data for piece in job.dst_pieces]
    for part in job.parts:
        bases = np.array(
            [
                (src[a] + a_offset, dst[b] + b_offset)
                for (a, a_offset), (b, b_offset) in zip(part.src_bases, part.dst_bases, strict=True)
            ],
            np.int64,
        )
        same = part.src_dtype == part.dst_dtype
        _kernels_cpu.copy_rows(
            bases,
            job.segments,
            num_heads=job.num_heads,
            width=part.width,
            row_bytes=part.width * ITEMSIZE[part.src_dtype],
            src_strides=part.src_strides,
            dst_strides=part.dst_strides,
            src_extent=job.src_extent,
            dst_extent=job.dst_extent,
            src_dtype=0 if same else _DTYPE_TAG[part.src_dtype],
            dst_dtype=0 if same else _DTYPE_TAG[part.dst_dtype],
        )
