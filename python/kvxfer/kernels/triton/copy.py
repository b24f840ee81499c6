# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""copy_blocks: rows between any two layouts, all layers of a part in one launch through a pointer table.

pack_blocks and unpack_blocks are this copy with a packed layout at one end.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from kvxfer.kernels._copy_job import CopyJob
from kvxfer.kernels._copy_route import PartCopy
from kvxfer.kernels._sides import ITEMSIZE
from kvxfer.kernels._upload import upload
from kvxfer.kernels.triton._common import on_device_of
from kvxfer.kernels.triton._numbers import TRITON_DTYPES, narrow, widen

__all__ = ["copy_blocks"]

_UNITS = {8: tl.int64, 4: tl.int32, 2: tl.int16, 1: tl.int8}
_CTAS_PER_SM = 8


@triton.jit  # type: ignore[untyped-decorator]
def copy_kernel(  # type: ignore[no-untyped-def]
    bases,  # int64 [num_bases, 2]: addresses of (source, destination), one pair per layer
    segments,  # int64 [num_segments, 5]: source block, slot, destination block, slot, tokens
    factors,  # float32 [num_bases, num_heads, 2], if SCALED: written = read * first / second
    num_segments,
    num_tiles,  # num_bases * num_segments
    num_heads,
    src_block,  # strides in units
    src_token,
    src_head,
    dst_block,
    dst_token,
    dst_head,
    WIDTH: tl.constexpr,  # units of a row
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SRC: tl.constexpr,
    DST: tl.constexpr,
    ALIGNED: tl.constexpr,  # every row starts at a multiple of 16 bytes on both sides
    SCALED: tl.constexpr,
    HEADS_INSIDE: tl.constexpr,  # walk a token's heads before the next token: as the destination lies
):
    column = tl.arange(0, BLOCK_C)
    # Persistent programs; a tile is one segment of one layer, decoded once, whatever its rows.
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        base = bases + (tile // num_segments).to(tl.int64) * 2
        segment = segments + (tile % num_segments).to(tl.int64) * 5
        tokens = tl.load(segment + 4)
        src = tl.load(base).to(tl.pointer_type(SRC))
        dst = tl.load(base + 1).to(tl.pointer_type(DST))
        src += tl.load(segment) * src_block + tl.load(segment + 1) * src_token
        dst += tl.load(segment + 2) * dst_block + tl.load(segment + 3) * dst_token
        for first in range(0, tokens * num_heads, BLOCK_R):
            row = first + tl.arange(0, BLOCK_R)
            if HEADS_INSIDE:
                token, head = row // num_heads, row % num_heads
            else:
                token, head = row % tokens, row // tokens
            inside = row < tokens * num_heads
            source = src + token * src_token + head * src_head
            target = dst + token * dst_token + head * dst_head
            if ALIGNED:
                # Addresses out of a table tell the compiler nothing; with this, accesses are 16 bytes.
                source, target = tl.multiple_of(source, 16), tl.multiple_of(target, 16)
            if SCALED:
                pair = factors + ((tile // num_segments).to(tl.int64) * num_heads + head) * 2
                times = tl.load(pair, mask=inside, other=1.0)
                over = tl.load(pair + 1, mask=inside, other=1.0)
            for start in range(0, WIDTH, BLOCK_C):
                at = start + column
                mask = inside[:, None] & (at < WIDTH)[None, :]
                values = tl.load(source[:, None] + at[None, :], mask=mask)
                if SCALED:
                    # Rounded once each, as the reference: true division, no reciprocal.
                    values = tl.div_rn(widen(values, tl.float32) * times[:, None], over[:, None])
                tl.store(target[:, None] + at[None, :], narrow(values, DST), mask=mask)


def copy_blocks(job: CopyJob) -> None:
    """See :func:`kvxfer.kernels.copy_blocks`; the job is resolved and checked."""
    if job.is_empty:
        return
    segments = upload(torch.from_numpy(job.segments), job.device)
    with on_device_of(segments):
        for part, addresses in zip(job.route.parts, job.bases, strict=True):
            _copy_part(job, part, addresses, segments)


def _copy_part(
    job: CopyJob, part: PartCopy, addresses: np.ndarray[Any, Any], segments: torch.Tensor
) -> None:
    src_unit, dst_unit = ITEMSIZE[part.src_dtype], ITEMSIZE[part.dst_dtype]
    width = part.width
    types = (TRITON_DTYPES.get(part.src_dtype), TRITON_DTYPES.get(part.dst_dtype))
    if not part.converts:
        src_unit = dst_unit = _unit(part, src_unit, addresses)
        types = (_UNITS[src_unit], _UNITS[src_unit])
        width = part.width * ITEMSIZE[part.src_dtype] // src_unit
    block_c = min(triton.next_power_of_2(width), 128)
    num_tiles = len(addresses) * len(segments)
    device = segments.device
    copy_kernel[(_programs(job, num_tiles, device),)](
        upload(torch.from_numpy(addresses), device),
        segments,
        segments if part.factors is None else upload(torch.from_numpy(part.factors), device),
        len(segments),
        num_tiles,
        job.route.num_heads,
        *(stride // src_unit for stride in part.src_strides),
        *(stride // dst_unit for stride in part.dst_strides),
        WIDTH=width,
        BLOCK_R=max(1, 2048 // block_c),
        BLOCK_C=block_c,
        SRC=types[0],
        DST=types[1],
        ALIGNED=_row_alignment(part, addresses) == 16,
        SCALED=part.factors is not None,
        HEADS_INSIDE=part.dst_strides[2] <= part.dst_strides[1],
        num_warps=8,
    )


def _row_alignment(part: PartCopy, addresses: np.ndarray[Any, Any]) -> int:
    """The largest power of two, up to 16, at whose multiples every row starts on both sides."""
    starts = int(
        np.bitwise_or.reduce(addresses, axis=None)
    )  # its lowest bit is that of all of them
    return math.gcd(16, starts, *part.src_strides, *part.dst_strides)


def _unit(part: PartCopy, itemsize: int, addresses: np.ndarray[Any, Any]) -> int:
    """The widest integer at whose multiples every row starts and ends."""
    return math.gcd(8, _row_alignment(part, addresses), part.width * itemsize)


def _programs(job: CopyJob, num_tiles: int, device: torch.device) -> int:
    limit = num_tiles
    if device.type == "cuda":
        limit = _CTAS_PER_SM * torch.cuda.get_device_properties(device).multi_processor_count
    if job.max_ctas:
        limit = min(limit, job.max_ctas)
    return max(1, min(limit, num_tiles))
