# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""The CUDA backend: takes torch tensors apart and launches on their current stream; never synchronises.

Slots and block ids live on the device and are not looked at, unless ``KVXFER_CHECK_DEVICE_IDS=1`` asks for
that (it waits for the device): an id out of range is the caller's fault there.
"""

from __future__ import annotations

import math
import os
import sys
from typing import Any

import numpy as np

from kvxfer.errors import InvalidArgumentError
from kvxfer.kernels._arrays import FLOAT_DTYPES, Array, Operands, dtype_of
from kvxfer.kernels._checksum_job import ChecksumJob
from kvxfer.kernels._copy_job import CopyJob, PartCopy
from kvxfer.kernels._sides import ITEMSIZE
from kvxfer.kernels.plan import ENOUGH, MAX_BALANCED_SPLIT, DecodePlan

try:
    from kvxfer import _kernels_cuda
except ImportError as error:
    _missing: str | None = f"the extension module is not there: {error}"
else:
    _missing = None

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

_DTYPE_TAG = {"float32": 0, "float16": 1, "bfloat16": 2, "float8_e4m3": 3}

# Counters of finished splits, by device and stream: zeroed once, and left zero by every launch. Two streams
# must not share them. A launch that was aborted may leave them dirty; so may nothing else.
_arrived: dict[tuple[int, int], Array] = {}

# CUDA graphs take theirs from one zeroed piece of memory per device, so that a replay has nothing to zero:
# (counters, how many are given away). Given to a (device, stream, capture), whose launches follow one another.
_spare: dict[int, tuple[Array, int]] = {}
_captured: dict[tuple[int, int, int], Array] = {}
_NUM_SPARE = 1 << 20

# The tables of copies that CUDA graphs hold: a replay reads them again, and nobody says when the last one was.
_kept: list[Array] = []


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


def refuses(op: str, call: Operands) -> str | None:
    """Why these kernels cannot run a call whose arguments are all right."""
    if "k_scale_cache" in call.views:
        return f"the cuda {op} knows no scales in memory"
    if dtype_of(call.views["k_cache"]) not in _DTYPE_TAG:
        return "the cuda kernels take float8 as torch's own dtype, not as bytes"
    if op == "paged_decode":
        if call.views["v_cache"].shape[3] != call.views["k_cache"].shape[3]:
            return "the cuda kernel takes values as wide as keys"
        views = call.views
        params = _decode_params(views["q"], views["k_cache"], views["v_cache"])
        return _kernels_cuda.decode_refuses(params)
    return None


def _byte_strides(tensor: Array) -> list[int]:
    """Strides in bytes; of an axis of extent 1 a 0, because what torch reports there means nothing."""
    size = int(tensor.element_size())
    return [
        int(s) * size if n > 1 else 0 for s, n in zip(tensor.stride(), tensor.shape, strict=True)
    ]


def _check_ids(name: str, ids: Array, wrong: Array, expected: str) -> None:
    if bool(wrong.any()):
        at = wrong.nonzero()[0].tolist()
        raise InvalidArgumentError(f"{name}{at}: expected {expected}, given {int(ids[tuple(at)])}")


def _ids_are_checked() -> bool:
    return os.environ.get("KVXFER_CHECK_DEVICE_IDS") == "1"


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
    if _ids_are_checked():
        num_slots = int(k_cache.shape[0]) * int(k_cache.shape[1])
        wrong = (slot_mapping < -1) | (slot_mapping >= num_slots)
        _check_ids("slot_mapping", slot_mapping, wrong, f"-1 or a slot from 0 to {num_slots - 1}")
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


def paged_decode(
    q: Array,
    k_cache: Array,
    v_cache: Array,
    block_table: Array,
    seq_lens: Array,
    out: Array,
    lse: Array | None,
    *,
    sm_scale: float,
    v_scale: float,
    window_left: int,
    logits_soft_cap: float,
    sinks: Array | None,
    split_size: int | None,
    plan: DecodePlan | None = None,
) -> None:
    """See :func:`kvxfer.kernels.paged_decode`. A split_size is rounded up to whole tiles of 64 tokens.

    Without one, the number of splits follows from the batch's size and the device (:func:`choose_splits`), and
    each sequence's split size on the device from its own length. The grid follows from shapes alone (the
    table's width bounds the lengths), so that a CUDA graph of it stays right when lengths change.
    """
    torch = sys.modules["torch"]
    if _ids_are_checked():
        _check_block_table(block_table, seq_lens, window_left, *k_cache.shape[:2])
        if plan is not None and tuple(seq_lens.tolist()) != plan.seq_lens:
            raise InvalidArgumentError(
                f"plan: expected one for seq_lens {seq_lens.tolist()}, given one for {list(plan.seq_lens)}"
            )
    p = _decode_params(q, k_cache, v_cache)
    tile = _kernels_cuda.DECODE_TILE
    longest = int(block_table.shape[1]) * p.block_size
    units = p.batch * p.num_kv_heads * -(-(p.num_q_heads // p.num_kv_heads) // 16)
    p.out, p.lse = out.data_ptr(), 0 if lse is None else lse.data_ptr()
    p.out_batch, p.out_head = out.stride()[:2]
    p.block_table, p.seq_lens = block_table.data_ptr(), seq_lens.data_ptr()
    p.table_row, p.len_step = block_table.stride(0), seq_lens.stride(0)
    p.sinks = 0 if sinks is None else sinks.data_ptr()
    p.sm_scale, p.v_scale = sm_scale, v_scale
    p.window_left, p.soft_cap = window_left, logits_soft_cap
    with torch.cuda.device(q.device):
        if split_size is None:
            p.split_size = 0
            p.num_splits, p.min_split = choose_splits(units, _slots(q.device, p), longest)
        else:
            p.split_size = -(-split_size // tile) * tile
            p.num_splits = max(1, -(-longest // p.split_size))
        p.num_items = p.batch * p.num_splits
        if plan is not None:
            p.num_splits, p.num_items = plan.num_splits, plan.num_items
            p.items = plan.items.data_ptr()
        stream = torch.cuda.current_stream().cuda_stream
        if p.num_splits > 1:
            rows = p.batch * p.num_q_heads * p.num_splits
            partial = torch.empty(rows * (p.head_dim + 1), dtype=torch.float32, device=q.device)
            p.partial = partial.data_ptr()
            p.partial_lse = p.partial + rows * p.head_dim * 4
            p.arrived = _counters(q.device, stream, units).data_ptr()
        _kernels_cuda.paged_decode(p, stream)


def choose_splits(units: int, slots: int, longest: int) -> tuple[int, int]:
    """Into how many splits each sequence falls, and the least tokens of one.

    Sequences are split until the device is full once; more would only add sums to merge. Where whole sequences
    use all of the memory's bandwidth, splits have 4096 tokens, but no more than four times the device's thread
    blocks are launched: those of a short sequence find nothing to do, and cost time all the same. A plan, which
    knows the lengths, does better where they differ. The rule was fitted to a sweep (docs/gpu.md).

    Args:
        units: thread blocks of an unsplit call: sequences x KV heads x tiles of 16 query heads.
        slots: thread blocks that the device holds at once.
        longest: tokens that a row of the block table can hold.
    """
    least = min(max(2048 * units // slots // 64 * 64, 64), 1024)
    if units < ENOUGH * slots:
        wanted = min(slots // units, -(-longest // least))
    else:
        wanted = min(-(-longest // MAX_BALANCED_SPLIT), -(-4 * slots // units))
    return max(1, wanted), least


# By device, cache dtype, head_dim and whether pages are multiples of 16.
_slots_by_kernel: dict[tuple[int, int, int, bool], int] = {}


def _slots(device: Any, params: Any) -> int:
    key = (int(device.index), params.kv_type, params.head_dim, params.block_size % 16 == 0)
    if key not in _slots_by_kernel:
        _slots_by_kernel[key] = int(_kernels_cuda.decode_slots(params))
    return _slots_by_kernel[key]


def _decode_params(q: Array, k_cache: Array, v_cache: Array) -> Any:
    p = _kernels_cuda.Decode()
    p.q, p.k, p.v = q.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr()
    p.batch, p.num_q_heads, p.head_dim = q.shape
    p.block_size, p.num_kv_heads = k_cache.shape[1:3]
    p.q_batch, p.q_head = (
        int(s) if n > 1 else 0 for s, n in zip(q.stride()[:2], q.shape[:2], strict=True)
    )
    p.k_strides, p.v_strides = _byte_strides(k_cache)[:3], _byte_strides(v_cache)[:3]
    p.q_type, p.kv_type = _DTYPE_TAG[dtype_of(q)], _DTYPE_TAG[dtype_of(k_cache)]
    return p


def _counters(device: Any, stream: int, count: int) -> Array:
    torch = sys.modules["torch"]
    index = int(device.index)
    if torch.cuda.is_current_stream_capturing():
        return _counters_of_graph(index, stream, count)
    if index not in _spare:
        # Once per device, before graphs are captured: they may be replayed on any stream.
        _spare[index] = torch.zeros(_NUM_SPARE, dtype=torch.int32, device=device), 0
        torch.cuda.current_stream().synchronize()
    held = _arrived.get((index, stream))
    if held is None or held.numel() < count:
        held = torch.zeros(max(count, 1024), dtype=torch.int32, device=device)
        _arrived[index, stream] = held
    return held


def _counters_of_graph(index: int, stream: int, count: int) -> Array:
    torch = sys.modules["torch"]
    key = (index, stream, int(_kernels_cuda.capture_id(stream)))
    held = _captured.get(key)
    if held is not None and held.numel() >= count:
        return held
    spare, given = _spare.get(index, (None, 0))
    if spare is None or given + count > spare.numel():
        # Of the graph's own memory, and zeroed in it at every replay.
        return torch.zeros(count, dtype=torch.int32, device=f"cuda:{index}")
    _spare[index] = spare, given + count
    _captured[key] = spare[given : given + count]
    return _captured[key]


def _check_block_table(
    block_table: Array, seq_lens: Array, window_left: int, num_blocks: int, block_size: int
) -> None:
    torch = sys.modules["torch"]
    width = int(block_table.shape[1])
    _check_ids("seq_lens", seq_lens, (seq_lens < 0) | (seq_lens > width * block_size),
               f"0 to {width * block_size} ({width} blocks of {block_size})")  # fmt: skip
    first = (seq_lens - 1 - window_left).clamp(min=0) if window_left >= 0 else seq_lens * 0
    column = torch.arange(width, device=block_table.device)[None, :]
    used = column >= (first // block_size)[:, None]
    used &= column < ((seq_lens + block_size - 1) // block_size)[:, None]
    wrong = used & ((block_table < 0) | (block_table >= num_blocks))
    _check_ids("block_table", block_table, wrong, f"a block id from 0 to {num_blocks - 1}")


def merge_states(
    v_a: Array, lse_a: Array, v_b: Array, lse_b: Array, out: Array, lse: Array
) -> None:
    torch = sys.modules["torch"]
    p = _kernels_cuda.Merge()
    p.v_a, p.v_b, p.lse_a, p.lse_b = (x.data_ptr() for x in (v_a, v_b, lse_a, lse_b))
    p.out, p.lse = out.data_ptr(), lse.data_ptr()
    (p.a_row, p.a_head), (p.b_row, p.b_head) = v_a.stride()[:2], v_b.stride()[:2]
    (p.lse_a_row, p.lse_a_head), (p.lse_b_row, p.lse_b_head) = lse_a.stride(), lse_b.stride()
    p.num_rows, p.num_heads, p.width = v_a.shape
    p.type = _DTYPE_TAG[dtype_of(v_a)]
    with torch.cuda.device(v_a.device):
        _kernels_cuda.merge_states(p, torch.cuda.current_stream().cuda_stream)


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
        _kernels_cuda.checksum_blocks(
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
            uploaded = (
                _upload(tables, device) if len(tables) > _kernels_cuda.INLINE_TABLES else None
            )
            src_dtype, dst_dtype = kind or ("float32", "float32")
            _kernels_cuda.copy_rows(
                [_kernels_cuda.CopyPart(*part) for part in plan["parts"]],
                tables=tables,
                at=0 if uploaded is None else uploaded.data_ptr(),
                num_layers=plan["bases"].shape[1],
                num_segments=len(job.segments),
                num_heads=job.num_heads,
                access=plan["access"],
                max_ctas=job.max_ctas,
                convert=bool(kind),
                scaled=factors is not None,
                from_dtype=_DTYPE_TAG[src_dtype],
                to_dtype=_DTYPE_TAG[dst_dtype],
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
