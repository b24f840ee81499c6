# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""The CUDA backend: takes torch tensors apart and launches on their current stream; no launch synchronises.

But for two moments: the first decode on a device waits until its counters are zeroed, and the tables of a copy of more
segments than travel with its launch come from pageable memory, which the driver may wait for.

Slots and block ids live on the device and are not looked at, unless ``KVXFER_CHECK_DEVICE_IDS=1`` asks for
that (it waits for the device): an id out of range is the caller's fault there.
"""

from __future__ import annotations

import functools
import math
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvxfer.kernels._arrays import FLOAT_DTYPES, Array, Operands, dtype_of
from kvxfer.kernels._checksum_job import ChecksumJob
from kvxfer.kernels._copy_job import CopyJob
from kvxfer.kernels._copy_route import CopyRoute, PartCopy
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
from kvxfer.kernels._upload import upload

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
REACHES_OTHERS = True  # pinned host memory and memory of other GPUs, in copies


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
            upload(torch.as_tensor(values, dtype=torch.int64), device)
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
    if job.is_empty:
        return
    torch = sys.modules["torch"]
    device = torch.device(job.device)
    bases, segments = job.bases, job.segments.tobytes()
    with torch.cuda.device(device):
        if job.dst.device not in (job.device, "cpu"):
            _reach(device.index, torch.device(job.dst.device).index)
        stream = torch.cuda.current_stream().cuda_stream
        for launch in job.route.once(plan_launches):
            chosen = bases[launch.chosen]
            tables = chosen.tobytes() + segments + launch.factors
            uploaded = None
            if len(tables) > native.INLINE_TABLES:
                host = torch.frombuffer(bytearray(tables), dtype=torch.uint8)
                uploaded = upload(host, device)
            src_dtype, dst_dtype = launch.kind or ("float32", "float32")
            native.copy_rows(
                launch.parts,
                tables=tables,
                at=0 if uploaded is None else uploaded.data_ptr(),
                num_layers=chosen.shape[1],
                num_segments=len(job.segments),
                num_heads=job.route.num_heads,
                access=launch.access(chosen),
                max_ctas=job.max_ctas,
                convert=bool(launch.kind),
                scaled=bool(launch.factors),
                from_dtype=DTYPE_TAG[src_dtype],
                to_dtype=DTYPE_TAG[dst_dtype],
                stream=stream,
            )


@functools.cache
def _reach(device: int, peer: int) -> None:
    native.reach_peer(device, peer)


@dataclass(frozen=True)
class Launch:
    """The parts of a route that one launch copies; no CUDA in it, so that it is tested everywhere."""

    kind: tuple[str, ...]  # what :attr:`PartCopy.converts` is for all of them
    chosen: list[int]  # which of the route's parts
    rows: tuple[tuple[Strides, Strides, int], ...]  # of each: strides of both sides, and the width
    grain: int  # the largest power of two, up to 16, that divides all strides and widths in bytes
    factors: bytes  # float32 [parts, layers, heads, 2]; none where nothing is scaled

    @functools.cached_property
    def parts(self) -> list[Any]:
        return [native.CopyPart(*row) for row in self.rows]

    def access(self, bases: np.ndarray[Any, Any]) -> int:
        """The widest access in bytes to which every address of the launch is aligned."""
        return math.gcd(self.grain, int(np.bitwise_or.reduce(bases, axis=None)))


Strides = tuple[int, int, int]


def plan_launches(route: CopyRoute) -> list[Launch]:
    return [_plan_launch(route, kind) for kind in sorted({p.converts for p in route.parts})]


def _plan_launch(route: CopyRoute, kind: tuple[str, ...]) -> Launch:
    chosen = [index for index, part in enumerate(route.parts) if part.converts == kind]
    parts = [route.parts[index] for index in chosen]
    numbers = [16]
    for part in parts:
        numbers += [*part.src_strides, *part.dst_strides, part.width * ITEMSIZE[part.src_dtype]]
    return Launch(
        kind=kind,
        chosen=chosen,
        rows=tuple(
            (
                part.src_strides,
                part.dst_strides,
                part.width * (1 if kind else ITEMSIZE[part.src_dtype]),
            )
            for part in parts
        ),
        grain=math.gcd(*numbers),
        factors=_factors(parts, route.num_heads),
    )


def _factors(parts: list[PartCopy], num_heads: int) -> bytes:
    if all(part.factors is None for part in parts):
        return b""
    ones = np.ones((len(parts[0].src_bases), num_heads, 2), np.float32)
    return b"".join([(ones if p.factors is None else p.factors).tobytes() for p in parts])
