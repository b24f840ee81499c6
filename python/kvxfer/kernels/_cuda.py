# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""The CUDA backend: takes torch tensors apart and launches on their current stream; never synchronises.

Slots and block ids live on the device and are not looked at: an id out of range is the caller's fault
there, and is found by running the same call on the host.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np

from kvxfer.kernels._arrays import Array, dtype_of
from kvxfer.kernels._copy_job import CopyJob
from kvxfer.kernels._sides import ITEMSIZE

try:
    from kvxfer import _kernels_cuda
except ImportError as error:
    _missing: str | None = f"the extension module is not there: {error}"
else:
    _missing = None

__all__ = ["append_kv", "copy_blocks", "describe", "unavailable"]

TAKES_NUMPY = False

_DTYPE_TAG = {"float32": 0, "float16": 1, "bfloat16": 2}


def unavailable(op: str, device: str) -> str | None:
    if _missing is not None:
        from kvxfer.kernels._dispatch import build_info

        return str(build_info().get("cuda_reason") or _missing)
    if _kernels_cuda.device_count() == 0:
        return "no CUDA device or driver on this machine"
    if not device.startswith("cuda"):
        return f"the cuda backend works on CUDA device memory, not on {device}"
    return None


def describe() -> str:
    return f"CUDA, {_kernels_cuda.device_count()} devices"


def _byte_strides(tensor: Array) -> list[int]:
    size = int(tensor.element_size())
    return [int(s) * size for s in tensor.stride()]


def append_kv(
    key: Array,
    value: Array,
    k_cache: Array,
    v_cache: Array,
    slot_mapping: Array,
    *,
    k_scale: float,
    v_scale: float,
) -> None:
    torch = sys.modules["torch"]
    parts = []
    for rows, cache, scale in ((key, k_cache, k_scale), (value, v_cache, v_scale)):
        token, head, _ = _byte_strides(rows)
        parts.append(
            _kernels_cuda.AppendPart(
                rows.data_ptr(),
                cache.data_ptr(),
                from_strides=[0, token, head],
                to_strides=_byte_strides(cache)[:3],
                width=int(rows.shape[2]),
                scale=scale,
            )
        )
    with torch.cuda.device(key.device):
        _kernels_cuda.append_kv(
            *parts,
            slots=slot_mapping.contiguous().data_ptr(),
            num_tokens=int(key.shape[0]),
            num_kv_heads=int(key.shape[1]),
            block_size=int(k_cache.shape[1]),
            from_dtype=_DTYPE_TAG[dtype_of(key)],
            to_dtype=_DTYPE_TAG[dtype_of(k_cache)],
            stream=torch.cuda.current_stream().cuda_stream,
        )


def copy_blocks(job: CopyJob) -> None:
    """One launch for all parts that share their dtypes: as a rule, for all of them."""
    torch = sys.modules["torch"]
    device = job.dst_pieces[0].device
    kinds = sorted({(part.src_dtype, part.dst_dtype) for part in job.parts})
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream().cuda_stream
        segments = torch.from_numpy(job.segments).to(device, non_blocking=True)
        for src_dtype, dst_dtype in kinds:
            plan = plan_launch(job, src_dtype, dst_dtype)
            bases = torch.from_numpy(plan["bases"]).to(device, non_blocking=True)
            same = src_dtype == dst_dtype
            _kernels_cuda.copy_rows(
                [_kernels_cuda.CopyPart(*part) for part in plan["parts"]],
                bases=bases.data_ptr(),
                num_layers=plan["bases"].shape[1],
                segments=segments.data_ptr(),
                num_segments=len(job.segments),
                num_heads=job.num_heads,
                access=plan["access"],
                max_ctas=job.max_ctas,
                from_dtype=0 if same else _DTYPE_TAG[src_dtype],
                to_dtype=0 if same else _DTYPE_TAG[dst_dtype],
                stream=stream,
            )


def plan_launch(job: CopyJob, src_dtype: str, dst_dtype: str) -> dict[str, Any]:
    """The host's arithmetic for one launch; no CUDA in it, so that it is tested everywhere.

    Returns:
        ``bases`` int64 ``[parts, layers, 2]`` (addresses), ``parts`` (strides and width of each) and
        ``access``, the widest access in bytes to which every address of the launch is aligned.
    """
    src = [int(piece.data_ptr()) for piece in job.src_pieces]
    dst = [int(piece.data_ptr()) for piece in job.dst_pieces]
    chosen = [
        part for part in job.parts if (part.src_dtype, part.dst_dtype) == (src_dtype, dst_dtype)
    ]
    bases = np.array(
        [
            [
                (src[a] + a_offset, dst[b] + b_offset)
                for (a, a_offset), (b, b_offset) in zip(part.src_bases, part.dst_bases, strict=True)
            ]
            for part in chosen
        ],
        np.int64,
    )
    same = src_dtype == dst_dtype
    parts = [
        (part.src_strides, part.dst_strides, part.width * (ITEMSIZE[src_dtype] if same else 1))
        for part in chosen
    ]
    numbers = [int(n) for n in bases.reshape(-1)]
    for part in chosen:
        numbers += [*part.src_strides, *part.dst_strides, part.width * ITEMSIZE[src_dtype]]
    return {"bases": bases, "parts": parts, "access": math.gcd(16, *numbers)}
