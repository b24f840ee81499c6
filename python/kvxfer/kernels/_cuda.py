# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""The CUDA backend: takes torch tensors apart and launches on their current stream; never synchronises.

Slots and block ids live on the device and are not looked at, unless ``KVXFER_CHECK_DEVICE_IDS=1`` asks for
that (it waits for the device): an id out of range is the caller's fault there.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np

from kvxfer.kernels._arrays import FLOAT_DTYPES, Array, Operands, dtype_of
from kvxfer.kernels._checksum_job import ChecksumJob
from kvxfer.kernels._copy_job import CopyJob, PartCopy
from kvxfer.kernels._cuda_base import (
    DTYPE_TAG,
    byte_strides,
    check_ids,
    ids_are_checked,
    missing,
    native,
)
from kvxfer.kernels._cuda_decode import decode_params, paged_decode
from kvxfer.kernels._sides import ITEMSIZE

__all__ = [
    "append_kv",
    "checksum_blocks",
    "copy_blocks",
    "describe",
    "merge_states",
    "paged_decode",
    "refuses",
    "unavailable",
]

TAKES_NUMPY = False
CACHE_DTYPES = (*FLOAT_DTYPES, "float8_e4m3")
SCALES = True  # fixed ones, in copies
PLANS = True
REACHES_HOST = True  # pinned memory, in copies

# The tables of copies that CUDA graphs hold: a replay reads them again, and nobody says when the last one was.
_kept: list[Array] = []


def unavailable(op: str, device: str) -> str | None:
    if missing is not None:
        from kvxfer.kernels._dispatch import build_info

        return str(build_info().get("cuda_reason") or missing)
    if native.device_count() == 0:
        return "no CUDA device or driver on this machine"
    if not device.startswith("cuda"):
        return f"the cuda backend works on CUDA device memory, not on {device}"
    return None


def describe() -> str:
    return f"CUDA, {native.device_count()} devices"


def refuses(op: str, call: Operands) -> str | None:
    """Why these kernels cannot run a call whose arguments are all right."""
    if "k_scale_cache" in call.views:
        return f"the cuda {op} knows no scales in memory"
    if dtype_of(call.views["k_cache"]) not in DTYPE_TAG:
        return "the cuda kernels take float8 as torch's own dtype, not as bytes"
    if op == "paged_decode":
        if call.views["v_cache"].shape[3] != call.views["k_cache"].shape[3]:
            return "the cuda kernel takes values as wide as keys"
        views = call.views
        params = decode_params(views["q"], views["k_cache"], views["v_cache"])
        reason: str | None = native.decode_refuses(params)
        return reason
    return None


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
    if ids_are_checked():
        num_slots = int(k_cache.shape[0]) * int(k_cache.shape[1])
        wrong = (slot_mapping < -1) | (slot_mapping >= num_slots)
        check_ids("slot_mapping", slot_mapping, wrong, f"-1 or a slot from 0 to {num_slots - 1}")
    parts = []
    for rows, cache, scale in ((key, k_cache, k_scale), (value, v_cache, v_scale)):
        token, head, _ = byte_strides(rows)
        parts.append(
            native.AppendPart(
                rows.data_ptr(),
                cache.data_ptr(),
                from_strides=[0, token, head],
                to_strides=byte_strides(cache)[:3],
                width=int(rows.shape[2]),
                scale=scale,
            )
        )
    with torch.cuda.device(key.device):
        native.append_kv(
            *parts,
            slots=slot_mapping.contiguous().data_ptr(),
            num_tokens=int(key.shape[0]),
            num_kv_heads=int(key.shape[1]),
            block_size=int(k_cache.shape[1]),
            from_dtype=DTYPE_TAG[dtype_of(key)],
            to_dtype=DTYPE_TAG[dtype_of(k_cache)],
            stream=torch.cuda.current_stream().cuda_stream,
        )


def merge_states(
    v_a: Array, lse_a: Array, v_b: Array, lse_b: Array, out: Array, lse: Array
) -> None:
    torch = sys.modules["torch"]
    p = native.Merge()
    p.v_a, p.v_b, p.lse_a, p.lse_b = (x.data_ptr() for x in (v_a, v_b, lse_a, lse_b))
    p.out, p.lse = out.data_ptr(), lse.data_ptr()
    (p.a_row, p.a_head), (p.b_row, p.b_head) = v_a.stride()[:2], v_b.stride()[:2]
    (p.lse_a_row, p.lse_a_head), (p.lse_b_row, p.lse_b_head) = lse_a.stride(), lse_b.stride()
    p.num_rows, p.num_heads, p.width = v_a.shape
    p.type = DTYPE_TAG[dtype_of(v_a)]
    with torch.cuda.device(v_a.device):
        native.merge_states(p, torch.cuda.current_stream().cuda_stream)


def checksum_blocks(job: ChecksumJob) -> np.ndarray[Any, Any]:
    """Waits for the device: the sums are wanted on the host."""
    torch = sys.modules["torch"]
    device = job.pieces[0].device
    starts = [int(piece.data_ptr()) for piece in job.pieces]
    bases = [[starts[piece] + offset for piece, offset in part.bases] for part in job.parts]
    segments = _segments(job)
    sums = torch.zeros(len(job.layers), dtype=torch.int64, device=device)
    with torch.cuda.device(device):
        tables = [
            torch.as_tensor(values, dtype=torch.int64).to(device, non_blocking=True)
            for values in (bases, job.layers, segments)
        ]
        native.checksum_blocks(
            [(part.strides, part.row_bytes, part.part_id) for part in job.parts],
            bases=tables[0].data_ptr(),
            layers=tables[1].data_ptr(),
            num_layers=len(job.layers),
            segments=tables[2].data_ptr(),
            num_segments=len(segments),
            first_head=job.first_head,
            num_heads=job.num_heads,
            sums=sums.data_ptr(),
            stream=torch.cuda.current_stream().cuda_stream,
        )
        return np.asarray(sums.cpu().numpy().view(np.uint64))


def _segments(job: ChecksumJob) -> np.ndarray[Any, Any]:
    """Runs of tokens within one block, int64 [n, 4]: block, slot, tokens, token of the sequence."""
    size = job.block_size
    index = np.arange(job.first_token // size, -(-job.num_tokens // size), dtype=np.int64)
    begin = np.maximum(job.first_token, index * size)
    end = np.minimum(job.num_tokens, index * size + size)
    return np.stack([job.block_ids[index], begin - index * size, end - begin, begin], axis=1)


def copy_blocks(job: CopyJob) -> None:
    """One launch for all parts that are converted alike: as a rule, for all of them."""
    torch = sys.modules["torch"]
    device = torch.device(job.device)
    kinds = sorted({part.converts for part in job.parts})
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream().cuda_stream
        for kind in kinds:
            plan = plan_launch(job, kind)
            factors = plan["factors"]
            tables = plan["bases"].tobytes() + job.segments.tobytes()
            if factors is not None:
                tables += factors.tobytes()
            uploaded = _upload(tables, device) if len(tables) > native.INLINE_TABLES else None
            src_dtype, dst_dtype = kind or ("float32", "float32")
            native.copy_rows(
                [native.CopyPart(*part) for part in plan["parts"]],
                tables=tables,
                at=0 if uploaded is None else uploaded.data_ptr(),
                num_layers=plan["bases"].shape[1],
                num_segments=len(job.segments),
                num_heads=job.num_heads,
                access=plan["access"],
                max_ctas=job.max_ctas,
                convert=bool(kind),
                scaled=factors is not None,
                from_dtype=DTYPE_TAG[src_dtype],
                to_dtype=DTYPE_TAG[dst_dtype],
                stream=stream,
            )


def _upload(table: bytes, device: Any) -> Array:
    torch = sys.modules["torch"]
    host = torch.frombuffer(bytearray(table), dtype=torch.uint8)
    if torch.cuda.is_current_stream_capturing():
        host = host.pin_memory()
        _kept.append(host)
    return host.to(device, non_blocking=True)


def plan_launch(job: CopyJob, kind: tuple[str, ...]) -> dict[str, Any]:
    """The host's arithmetic for one launch; no CUDA in it, so that it is tested everywhere.

    Args:
        kind: what :attr:`PartCopy.converts` is for the parts of this launch.
    Returns:
        ``bases`` int64 ``[parts, layers, 2]`` (addresses), ``parts`` (strides and width of each), ``factors``
        float32 ``[parts, layers, heads, 2]`` or None, and ``access``, the widest access in bytes to which every
        address of the launch is aligned.
    """
    src = [_address(piece) for piece in job.src_pieces]
    dst = [_address(piece) for piece in job.dst_pieces]
    chosen = [part for part in job.parts if part.converts == kind]
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
    parts = [
        (part.src_strides, part.dst_strides, part.width * (1 if kind else ITEMSIZE[part.src_dtype]))
        for part in chosen
    ]
    numbers = [int(n) for n in bases.reshape(-1)]
    for part in chosen:
        numbers += [*part.src_strides, *part.dst_strides, part.width * ITEMSIZE[part.src_dtype]]
    return {
        "bases": bases,
        "parts": parts,
        "factors": _factors(chosen, job.num_heads),
        "access": math.gcd(16, *numbers),
    }


def _address(piece: Array) -> int:
    return int(piece.ctypes.data if isinstance(piece, np.ndarray) else piece.data_ptr())


def _factors(parts: list[PartCopy], num_heads: int) -> np.ndarray[Any, Any] | None:
    if all(part.factors is None for part in parts):
        return None
    ones = np.ones((len(parts[0].src_bases), num_heads, 2), np.float32)
    return np.stack([ones if part.factors is None else part.factors for part in parts])
