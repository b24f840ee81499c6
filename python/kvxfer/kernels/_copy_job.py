# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""A block copy, resolved: which rows of which memory go where. Every backend executes the same job.

A row is the channels of one (layer, part, head, token). The job is factored: a table of base addresses per
(layer, part), strides per part, and segments (runs of tokens within one source and one destination block).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kvxfer.errors import InvalidArgumentError, LayoutError
from kvxfer.kernels._arrays import CACHE_DTYPES, Array, same_memory
from kvxfer.kernels._scales import ScalesLike, scale_factors
from kvxfer.kernels._sides import ITEMSIZE, LayoutLike, Side, block_ids_of, locate_layers

__all__ = ["CopyJob", "PartCopy", "make_job", "wire_side"]


@dataclass(frozen=True)
class PartCopy:
    """One part: strides in bytes, and per layer the (piece, offset) where its block 0 starts."""

    name: str
    width: int
    src_dtype: str
    dst_dtype: str
    src_strides: tuple[int, int, int]  # block, token, head
    dst_strides: tuple[int, int, int]
    src_bases: tuple[tuple[int, int], ...]  # the copied heads' first one included in the offset
    dst_bases: tuple[tuple[int, int], ...]
    # float32 [layers, heads, 2], where stored numbers change on the way: written = read * first / second.
    factors: npt.NDArray[np.float32] | None = None

    @property
    def converts(self) -> tuple[str, ...]:
        """The dtypes between which numbers are converted; none where bytes are copied."""
        same = self.src_dtype == self.dst_dtype and self.factors is None
        return () if same else (self.src_dtype, self.dst_dtype)


@dataclass(frozen=True)
class CopyJob:
    """Rows to copy: for each part, layer, segment, head and token of the segment."""

    parts: tuple[PartCopy, ...]
    src_pieces: tuple[Array, ...]
    dst_pieces: tuple[Array, ...]
    segments: npt.NDArray[np.int64]  # [n, 5]: src block, src slot, dst block, dst slot, tokens
    num_heads: int
    src_extent: tuple[int, int]  # num_blocks, block_size
    dst_extent: tuple[int, int]
    max_ctas: int = 0
    device: str = "cpu"  # where it runs; one side may be host memory that this device reaches

    @property
    def nbytes(self) -> int:
        """Bytes written."""
        tokens = int(self.segments[:, 4].sum())
        row = sum(p.width * ITEMSIZE[p.dst_dtype] * len(p.dst_bases) for p in self.parts)
        return tokens * self.num_heads * row


@dataclass(frozen=True)
class _Part:
    name: str
    width: int
    dtype: str
    stride_block: int
    stride_token: int
    stride_head: int
    bases: tuple[int, ...]


@dataclass(frozen=True)
class _Wire:
    layers: tuple[int, ...]
    num_blocks: int
    block_size: int
    head_range: tuple[int, int]
    parts: tuple[_Part, ...]
    nbytes: int
    format: str
    dtype: str
    num_layers: int
    num_kv_heads: int
    scales: ScalesLike | None
    atom: str = "element"


# What does not depend on the blocks of a copy, by what it does depend on. Layouts are immutable and known by
# identity, which the entry keeps theirs by holding them; of the memory it holds only the sizes.
_resolved: dict[tuple[Any, ...], tuple[LayoutLike, LayoutLike, tuple[PartCopy, ...], int]] = {}
_wires: dict[tuple[Any, ...], tuple[LayoutLike, _Wire]] = {}  # packed forms, likewise
_MOST_RESOLVED = 256


def wire_side(
    layout: LayoutLike, num_tokens: int, layers: Sequence[int], heads: tuple[int, int]
) -> _Wire:
    """The packed form of ``num_tokens`` tokens: order LKHNC, one block that holds them all.

    One object for equal arguments, so that what was resolved for it is found again.
    """
    key = (id(layout), num_tokens, tuple(layers), tuple(heads))
    known = _wires.get(key)
    if known is None:
        if len(_wires) >= _MOST_RESOLVED:
            _wires.clear()
        known = _wires[key] = (layout, _new_wire(layout, num_tokens, layers, heads))
    return known[1]


def _new_wire(
    layout: LayoutLike, num_tokens: int, layers: Sequence[int], heads: tuple[int, int]
) -> _Wire:
    num_heads = heads[1] - heads[0]
    rows = [p.width * ITEMSIZE[p.dtype] for p in layout.parts]
    per_layer = num_heads * num_tokens * sum(rows)
    parts = []
    start = 0
    for part, row in zip(layout.parts, rows, strict=True):
        bases = tuple(start + index * per_layer for index in range(len(layers)))
        parts.append(
            _Part(part.name, part.width, part.dtype, per_layer, row, row * num_tokens, bases)
        )
        start += num_heads * num_tokens * row
    return _Wire(
        layers=tuple(layers),
        num_blocks=1,
        block_size=num_tokens,
        head_range=heads,
        parts=tuple(parts),
        nbytes=per_layer * len(layers),
        format=layout.format,
        dtype=layout.dtype,
        num_layers=layout.num_layers,
        num_kv_heads=layout.num_kv_heads,
        scales=layout.scales,
    )


def make_job(
    src: Side,
    dst: Side,
    src_blocks: Any,
    dst_blocks: Any,
    *,
    num_tokens: int | None,
    first_token: int,
    layers: Sequence[int] | None,
    heads: tuple[int, int] | None = None,
    src_origin: int = 0,
    dst_origin: int = 0,
    max_ctas: int = 0,
) -> CopyJob:
    """Resolve a copy; every mistake is refused here, before a byte is touched.

    ``src_origin`` and ``dst_origin`` are the sequence positions of the first token of each block list.
    """
    a, b = src.layout, dst.layout
    device = _device_of_copy(src, dst)
    if a.format != b.format:
        raise LayoutError("format", f"source {a.format!r}, destination {b.format!r}")
    _check_atom(a, b)
    src_ids, dst_ids = (
        block_ids_of("src_blocks", src_blocks),
        block_ids_of("dst_blocks", dst_blocks),
    )
    held = min(src_origin + len(src_ids) * a.block_size, dst_origin + len(dst_ids) * b.block_size)
    end = held if num_tokens is None else int(num_tokens)
    if not 0 <= first_token <= end or end > held:
        raise InvalidArgumentError(
            f"num_tokens: expected 0 <= first_token <= num_tokens <= {held} (what {len(src_ids)} source "
            f"blocks of {a.block_size} and {len(dst_ids)} destination blocks of {b.block_size} hold), "
            f"given first_token {first_token}, num_tokens {end}"
        )
    ends = (
        _End(src_ids, a.block_size, a.num_blocks, src_origin, "src_blocks"),
        _End(dst_ids, b.block_size, b.num_blocks, dst_origin, "dst_blocks"),
    )
    segments = _segments(*ends, int(first_token), end)
    if len(segments):
        parts, num_heads = _parts_once(src, dst, layers, heads)
    else:
        parts, num_heads = (), _common(a, b, layers, heads)[2]
    job = CopyJob(
        parts=parts,
        src_pieces=src.pieces,
        dst_pieces=dst.pieces,
        segments=segments,
        num_heads=num_heads,
        src_extent=(a.num_blocks, a.block_size),
        dst_extent=(b.num_blocks, b.block_size),
        max_ctas=max_ctas,
        device=device,
    )
    if job.nbytes:
        _check_overlap(src, dst, segments)
    return job


def _parts_once(
    src: Side, dst: Side, layers: Sequence[int] | None, heads: tuple[int, int] | None
) -> tuple[tuple[PartCopy, ...], int]:
    """The parts of a copy and its number of heads."""
    a, b = src.layout, dst.layout
    key = (
        id(a),
        id(b),
        tuple(len(piece) for piece in src.pieces),
        tuple(len(piece) for piece in dst.pieces),
        None if layers is None else tuple(layers),
        None if heads is None else tuple(heads),
    )
    known = _resolved.get(key)
    if known is not None:
        return known[2:]
    chosen, first_head, num_heads = _common(a, b, layers, heads)
    parts = _parts(src, dst, chosen, first_head, num_heads)
    if len(_resolved) >= _MOST_RESOLVED:
        _resolved.clear()
    _resolved[key] = (a, b, parts, num_heads)
    return parts, num_heads


def _common(
    a: LayoutLike, b: LayoutLike, layers: Sequence[int] | None, heads: tuple[int, int] | None
) -> tuple[list[int], int, int]:
    """Layers, first head and number of heads to copy."""
    chosen = _layers(a, b, layers)
    low, high = max(a.head_range[0], b.head_range[0]), min(a.head_range[1], b.head_range[1])
    if heads is not None:
        if not low <= heads[0] <= heads[1] <= high:
            raise InvalidArgumentError(
                f"heads: expected a range within [{low}, {high}), given {tuple(heads)}"
            )
        low, high = heads
    return chosen, low, max(0, high - low)


def _device_of_copy(src: Side, dst: Side) -> str:
    """A GPU reaches host memory that is pinned, and nothing else that is not its own."""
    if src.device == dst.device:
        return src.device
    for gpu, host in ((src, dst), (dst, src)):
        if gpu.device.startswith("cuda") and host.device == "cpu" and _is_pinned(host):
            return gpu.device
    raise InvalidArgumentError(
        f"dst: expected memory on {src.device} like src, or pinned host memory on one side, given {dst.device}"
    )


def _is_pinned(side: Side) -> bool:
    torch = sys.modules["torch"]  # there, since the other side is a tensor
    return all(p.flags.writeable and torch.from_numpy(p).is_pinned() for p in side.pieces)


def _check_atom(a: LayoutLike, b: LayoutLike) -> None:
    if a.atom != b.atom and "block" in (a.atom, b.atom):
        raise LayoutError("atom", f"source {a.atom!r}, destination {b.atom!r}")
    if a.atom == "block" and (a.block_size, a.head_range) != (b.block_size, b.head_range):
        raise LayoutError(
            "atom",
            "blocks of this format cannot be cut, so block_size and heads must be equal: source "
            f"{a.block_size}, {a.head_range}; destination {b.block_size}, {b.head_range}",
        )


@dataclass(frozen=True)
class _End:
    """A block list and where its tokens stand in the sequence."""

    ids: npt.NDArray[np.int64]
    block_size: int
    num_blocks: int
    origin: int
    name: str

    def cuts(self, first: int, end: int) -> npt.NDArray[np.int64]:
        size = self.block_size
        low, high = first - self.origin, end - self.origin
        return np.arange(low // size + 1, -(-high // size), dtype=np.int64) * size + self.origin

    def locate(
        self, tokens: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        index = (tokens - self.origin) // self.block_size
        return index, tokens - self.origin - index * self.block_size

    def check(self, index: npt.NDArray[np.int64], wanted: npt.NDArray[np.bool_]) -> None:
        ids = self.ids[index]
        wrong = wanted & ((ids < 0) | (ids >= self.num_blocks))
        if wrong.any():
            at = int(wrong.argmax())
            raise InvalidArgumentError(
                f"{self.name}[{int(index[at])}]: expected a block id from 0 to {self.num_blocks - 1}, "
                f"given {int(ids[at])}"
            )


def _segments(src: _End, dst: _End, first: int, end: int) -> npt.NDArray[np.int64]:
    """Runs of tokens that lie in one source and one destination block each."""
    if first == end:
        return np.zeros((0, 5), np.int64)
    # A packed buffer has no cuts, and equal blocks the same ones: the usual cases need no sorting.
    alike = (src.block_size, src.origin) == (dst.block_size, dst.origin)
    between = src.cuts(first, end)
    if not alike:
        theirs = dst.cuts(first, end)
        if theirs.size:
            between = np.union1d(between, theirs) if between.size else theirs
    edges = np.empty(between.size + 2, np.int64)
    edges[0], edges[1:-1], edges[-1] = first, between, end
    starts = edges[:-1]
    src_index, src_slot = src.locate(starts)
    dst_index, dst_slot = (src_index, src_slot) if alike else dst.locate(starts)
    wanted = dst.ids[dst_index] != -1
    src.check(src_index, wanted)
    dst.check(dst_index, wanted)
    used = dst_index[wanted]  # ascending, so an index that repeats follows itself
    fresh = np.ones(used.size, np.bool_)
    np.not_equal(used[1:], used[:-1], out=fresh[1:])
    used = np.sort(dst.ids[used[fresh]])
    repeated = used[1:][used[1:] == used[:-1]]
    if repeated.size:
        times = int((used == repeated[0]).sum())
        raise InvalidArgumentError(
            f"{dst.name}: expected each block at most once, given {int(repeated[0])} {times} times"
        )
    segments = np.empty((starts.size, 5), np.int64)
    segments[:, 0], segments[:, 1] = src.ids[src_index], src_slot
    segments[:, 2], segments[:, 3] = dst.ids[dst_index], dst_slot
    np.subtract(edges[1:], starts, out=segments[:, 4])
    return segments if wanted.all() else segments[wanted]


def _layers(a: LayoutLike, b: LayoutLike, layers: Sequence[int] | None) -> list[int]:
    theirs = set(b.layers)
    both = [layer for layer in a.layers if layer in theirs]
    if layers is None:
        return both
    for layer in layers:
        if layer not in both:
            raise LayoutError(
                "layers",
                f"layer {layer} is not held by both: source {list(a.layers)}, destination {list(b.layers)}",
            )
    return list(layers)


def _parts(
    src: Side, dst: Side, layers: list[int], first_head: int, num_heads: int
) -> tuple[PartCopy, ...]:
    a, b = src.layout, dst.layout
    names_a, names_b = [p.name for p in a.parts], [p.name for p in b.parts]
    if sorted(names_a) != sorted(names_b):
        raise LayoutError("parts", f"source {names_a}, destination {names_b}")
    targets = {p.name: p for p in b.parts}
    result = []
    for part in a.parts:
        target = targets[part.name]
        if part.width != target.width:
            raise LayoutError(
                "head_dim", f"part {part.name}: source {part.width}, destination {target.width}"
            )
        both = (part.dtype, target.dtype)
        if part.dtype != target.dtype and not all(d in CACHE_DTYPES for d in both):
            raise LayoutError(
                "dtype",
                f"part {part.name}: expected equal dtypes, or a conversion among "
                f"{', '.join(CACHE_DTYPES)}; source {part.dtype}, destination {target.dtype}",
            )
        result.append(
            PartCopy(
                name=part.name,
                width=part.width,
                src_dtype=part.dtype,
                dst_dtype=target.dtype,
                src_strides=(part.stride_block, part.stride_token, part.stride_head),
                dst_strides=(target.stride_block, target.stride_token, target.stride_head),
                src_bases=locate_layers("src", src, part, layers, first_head, num_heads),
                dst_bases=locate_layers("dst", dst, target, layers, first_head, num_heads),
                factors=scale_factors(a, b, part.name, layers, first_head, num_heads),
            )
        )
    return tuple(result)


def _check_overlap(src: Side, dst: Side, segments: npt.NDArray[np.int64]) -> None:
    """Source and destination may be one cache (copy-on-write), but not the same blocks of it."""
    if not any(same_memory(x, y) for x in src.pieces for y in dst.pieces):
        return
    same = [p is q or same_memory(p, q) for p, q in zip(src.pieces, dst.pieces, strict=False)]
    if src.layout != dst.layout or len(src.pieces) != len(dst.pieces) or not all(same):
        raise InvalidArgumentError(
            "dst: expected memory apart from src (or the same memory under the same layout), given an overlap"
        )
    shared = np.intersect1d(segments[:, 0], segments[:, 2])
    if shared.size:
        raise InvalidArgumentError(
            f"dst_blocks: expected blocks that are not read by the same copy, given {shared[:8].tolist()}"
        )
