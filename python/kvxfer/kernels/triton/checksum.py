# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""checksum_blocks: the sums that every backend has (csrc/kernels/checksum.hpp), read once at full width."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl

from kvxfer.kernels._checksum_job import ChecksumJob, PartRows, hash_keys
from kvxfer.kernels._upload import upload
from kvxfer.kernels.triton._common import on_device_of, tensors_of

__all__ = ["checksum_blocks"]

_UNITS = {8: tl.uint64, 4: tl.uint32, 2: tl.uint16, 1: tl.uint8}
_CTAS_PER_SM = 8


@triton.jit
def _mix(z):  # type: ignore[no-untyped-def]
    """The finaliser of splitmix64."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit  # type: ignore[untyped-decorator]
def checksum_kernel(  # type: ignore[no-untyped-def]
    bases,  # int64 [num_layers]: addresses of block 0
    layers,  # int64 [num_layers]: their ids
    block_ids,  # int64, from token 0 of the sequence
    keys,  # int64: pairs of key words, the earlier one in the lower half
    sums,  # int64 [num_layers], added to
    first_token,
    num_rows,  # tokens of the range times heads
    first_head,
    num_heads,
    stride_block,  # in units
    stride_token,
    stride_head,
    PART: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    UNIT: tl.constexpr,  # bytes of a load: what rows start and end at multiples of
    LOADED: tl.constexpr,  # the unsigned integer of as many bytes
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    layer = tl.program_id(1)
    base = tl.load(bases + layer).to(tl.pointer_type(LOADED))
    place = (tl.load(layers + layer).to(tl.uint64) << 48) + (tl.full([], PART, tl.uint64) << 60)
    pair = tl.arange(0, BLOCK_P)
    PER_PAIR: tl.constexpr = 8 // UNIT
    UNITS: tl.constexpr = ROW_BYTES // UNIT
    # Behind a row's end words are 0, but they have their keys; behind the last pair there is nothing.
    in_row = pair < (ROW_BYTES + 7) // 8
    key = tl.load(keys + pair, mask=in_row, other=0).to(tl.uint64)
    key_low, key_high = key & 0xFFFFFFFF, key >> 32
    found = tl.zeros([BLOCK_R], tl.uint64)
    for first in range(tl.program_id(0) * BLOCK_R, num_rows, tl.num_programs(0) * BLOCK_R):
        row = first + tl.arange(0, BLOCK_R).to(tl.int64)
        inside = row < num_rows
        token, head = first_token + row // num_heads, row % num_heads
        block = tl.load(block_ids + token // BLOCK_SIZE, mask=inside, other=0)
        start = (
            base + block * stride_block + (token % BLOCK_SIZE) * stride_token + head * stride_head
        )
        words = tl.zeros([BLOCK_R, BLOCK_P], tl.uint64)
        for piece in tl.static_range(PER_PAIR):
            at = pair * PER_PAIR + piece
            mask = inside[:, None] & (at < UNITS)[None, :]
            part = tl.load(start[:, None] + at[None, :], mask=mask, other=0).to(tl.uint64)
            words = words | (part << (8 * UNIT * piece))
        low = ((words & 0xFFFFFFFF) + key_low[None, :]) & 0xFFFFFFFF
        high = ((words >> 32) + key_high[None, :]) & 0xFFFFFFFF
        product = tl.where(in_row[None, :], low * high, 0)
        where = place + ((first_head + head).to(tl.uint64) << 32) + token.to(tl.uint64)
        found += tl.where(inside, _mix(tl.sum(product, 1) ^ _mix(where)), 0)
    tl.atomic_add(sums + layer, tl.sum(found, 0).to(tl.int64, bitcast=True))


def checksum_blocks(job: ChecksumJob) -> npt.NDArray[np.uint64]:
    """See :func:`kvxfer.kernels.checksum_blocks`; the job is resolved and checked. Waits for the sums."""
    pieces = tensors_of(job.pieces)
    device = pieces[0].device
    sums = torch.zeros(len(job.layers), dtype=torch.int64, device=device)
    if len(job.layers) and job.num_tokens > job.first_token and job.num_heads:
        with on_device_of(pieces[0]):
            for part in job.parts:
                _hash_part(job, part, pieces, sums)
    return sums.cpu().numpy().view(np.uint64)


def _hash_part(
    job: ChecksumJob, part: PartRows, pieces: list[torch.Tensor], sums: torch.Tensor
) -> None:
    device = sums.device
    bases = np.array([pieces[at].data_ptr() + offset for at, offset in part.bases], np.int64)
    unit = math.gcd(8, int(np.gcd.reduce(bases)), *part.strides, part.row_bytes)
    block_p = triton.next_power_of_2(-(-part.row_bytes // 8))
    block_r = max(1, 2048 // block_p)
    num_rows = (job.num_tokens - job.first_token) * job.num_heads
    tiles = triton.cdiv(num_rows, block_r)
    if device.type == "cuda":
        count = torch.cuda.get_device_properties(device).multi_processor_count
        tiles = min(tiles, max(1, _CTAS_PER_SM * count // len(job.layers)))
    arrays = (bases, np.array(job.layers, np.int64), job.block_ids, hash_keys().view(np.int64))
    checksum_kernel[(tiles, len(job.layers))](
        *(upload(torch.from_numpy(array), device) for array in arrays),
        sums, job.first_token, num_rows, job.first_head, job.num_heads,
        *(stride // unit for stride in part.strides),
        PART=part.part_id, ROW_BYTES=part.row_bytes, BLOCK_SIZE=job.block_size,
        UNIT=unit, LOADED=_UNITS[unit], BLOCK_R=block_r, BLOCK_P=block_p,
        num_warps=4,
    )  # fmt: skip
