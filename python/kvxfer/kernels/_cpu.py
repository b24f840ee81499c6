# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""The C++ backend for host memory: adapts normalised calls to the extension module."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from kvxfer import _kernels_cpu
from kvxfer._kernels_cpu import merge_states, set_num_threads
from kvxfer.kernels._arrays import CACHE_DTYPES
from kvxfer.kernels._checksum_job import ChecksumJob, hash_keys
from kvxfer.kernels._copy_job import CopyJob
from kvxfer.kernels._copy_route import CopyRoute
from kvxfer.kernels._mla import mla_by_decode
from kvxfer.kernels._sides import ITEMSIZE

__all__ = [
    "CACHE_DTYPES",
    "append_again",
    "append_kv",
    "build_info",
    "checksum_blocks",
    "copy_again",
    "copy_blocks",
    "describe",
    "get_num_threads",
    "merge_states",
    "mla_decode",
    "paged_decode",
    "paged_prefill",
    "set_num_threads",
    "unavailable",
]

TAKES_NUMPY = True
SCALES = True

# DType of csrc/kernels/dtype.hpp.
_DTYPE_TAG = {name: tag for tag, name in enumerate(CACHE_DTYPES)}

get_num_threads = _kernels_cpu.get_num_threads
build_info = _kernels_cpu.build_info


def unavailable(op: str, device: str) -> str | None:
    return None if device == "cpu" else f"the cpu backend works on host memory, not on {device}"


def describe() -> str:
    info = build_info()
    return f"C++, {info['isa']}, {get_num_threads()} threads"


def append_kv(*arrays: Any, **options: Any) -> None:
    _kernels_cpu.append_kv(*arrays, **_native(options))


def append_again(*arrays: Any, **options: Any) -> Callable[..., None]:
    """What appends other arrays of the same shapes, strides and dtypes, given their five addresses."""
    bytes_are = _DTYPE_TAG[options.pop("cache_dtype")]
    return _kernels_cpu.AppendAgain(*arrays, bytes_are=bytes_are, **options)


def paged_decode(*arrays: Any, split_size: int | None, **options: Any) -> None:
    _kernels_cpu.paged_decode(*arrays, split_size=split_size or 0, **_native(options))


def paged_prefill(*arrays: Any, **options: Any) -> None:
    _kernels_cpu.paged_prefill(*arrays, **_native(options))


mla_decode = partial(mla_by_decode, paged_decode)


def _native(options: dict[str, Any]) -> dict[str, Any]:
    """The options as the extension module spells them: a float8 cache arrives there as mere bytes."""
    bytes_are = _DTYPE_TAG[options.pop("cache_dtype")]
    return {"k_scale_cache": None, "v_scale_cache": None, "bytes_are": bytes_are, **options}


def checksum_blocks(job: ChecksumJob) -> npt.NDArray[np.uint64]:
    pieces = [piece.ctypes.data for piece in job.pieces]
    sums = np.zeros(len(job.layers), np.uint64)
    for part in job.parts:
        _kernels_cpu.checksum_rows(
            np.array([pieces[piece] + offset for piece, offset in part.bases], np.int64),
            np.array(job.layers, np.int64),
            job.block_ids,
            hash_keys(),
            sums,
            part_id=part.part_id,
            row_bytes=part.row_bytes,
            strides=part.strides,
            extent=(job.num_blocks, job.block_size),
            tokens=(job.first_token, job.num_tokens),
            heads=(job.first_head, job.num_heads),
        )
    return sums


def copy_blocks(job: CopyJob) -> None:
    # The memory is alive in `job` while its addresses are in use.
    job.route.once(_rows_of)(job.src.addresses, job.dst.addresses, *job.blocks)


def copy_again(job: CopyJob) -> Callable[..., bool]:
    """What copies other blocks, whole ones, between other arrays of the same sizes and dtypes, given where they lie."""
    return job.route.once(_rows_of).whole


def _rows_of(route: CopyRoute) -> _kernels_cpu.CopyRows:
    parts = []
    for part, bases in zip(route.parts, route.bases, strict=True):
        tags = [_DTYPE_TAG[dtype] for dtype in part.converts] or [-1, -1]
        parts.append(
            _kernels_cpu.CopyPart(
                bases=bases,
                width=part.width,
                row_bytes=part.width * ITEMSIZE[part.src_dtype],
                src_strides=part.src_strides,
                dst_strides=part.dst_strides,
                src_dtype=tags[0],
                dst_dtype=tags[1],
                factors=part.factors,
            )
        )
    return _kernels_cpu.CopyRows(
        parts,
        num_heads=route.num_heads,
        src_extent=route.src_extent,
        dst_extent=route.dst_extent,
    )
