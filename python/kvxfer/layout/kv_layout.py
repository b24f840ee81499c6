# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""``KVLayout``: which bytes of one region hold which KV values. A value, checked when made, free of I/O."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

import numpy as np

from kvxfer.errors import LayoutError
from kvxfer.layout import engines, wire
from kvxfer.layout.construct import layout_from_order, layout_from_tensors
from kvxfer.layout.dtypes import itemsize_of
from kvxfer.layout.parts import KVPart, KVScales
from kvxfer.layout.validate import normalize, validate
from kvxfer.layout.views import part_views

__all__ = ["KVLayout"]


@dataclass(frozen=True)
class KVLayout:
    """Where one rank keeps its share of a paged KV cache. All strides and bases are in bytes.

    The byte of (layer, part, block, slot, head, channel) is ``part.bases[layer] + block*stride_block +
    slot*stride_token + (head - head_range[0])*stride_head + channel*itemsize``; nothing else in the
    library knows. Prefer the constructors to naming every part by hand.

    Args:
        kind: ``split`` (K and V apart), ``fused`` (K and V in one row), ``mla`` or ``state``.
        order: physical axes, outermost first, from ``L B K N H C``; ``""`` for strides that are none.
        dtype: of the values: ``float32``, ``float16``, ``bfloat16``, ``float8_e4m3`` (torch's float8_e4m3fn),
            ``float8_e5m2``, ``int8``; ``uint8`` for opaque rows.
        num_layers, layers: of the model in this group, and the ids held here, ascending.
        block_size: tokens of a block, 1 to 65,536; a packed buffer, which is one block, may have more.
        num_kv_heads, head_dim, head_dim_v: of the model, not of this rank (MLA: 1, latent width, 0).
        tp_rank, tp_size: give ``head_range`` and ``replica``.
        format, atom: packed contents name their format and the smallest piece that may be cut:
            ``element``, ``token`` (rows are opaque) or ``block``.
        group: name of the cache group; a hybrid model is a tuple of layouts, one for each group.

    Raises:
        LayoutError: the layout contradicts itself; ``.field`` names where.
    """

    kind: str
    order: str
    dtype: str
    num_layers: int
    layers: tuple[int, ...]
    num_blocks: int
    block_size: int
    num_kv_heads: int
    head_dim: int
    head_dim_v: int
    parts: tuple[KVPart, ...] = field(repr=False)
    tp_rank: int = 0
    tp_size: int = 1
    scales: KVScales | None = None
    format: str = "plain"
    atom: str = "element"
    group: str = ""

    def __post_init__(self) -> None:
        normalize(self)
        validate(self)

    # -- constructors ---------------------------------------------------------------------------

    @classmethod
    def from_order(
        cls,
        order: str,
        *,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: str,
        num_layers: int | None = None,
        layers: Iterable[int] | None = None,
        head_dim_v: int | None = None,
        tp_rank: int = 0,
        tp_size: int = 1,
        offset: int = 0,
        block_align: int = 1,
        layer_align: int = 1,
        scales: KVScales | None = None,
        format: str = "plain",
        atom: str = "element",
        group: str = "",
        kind: str | None = None,
    ) -> KVLayout:
        """One dense pool in ``order`` from byte ``offset`` on, e.g. ``LKBNHC`` (NHD) or ``BLKHNC``.

        ``num_layers`` counts the model's; ``layers`` names those held here (default: all). Without
        ``head_dim_v`` V is as wide as K. ``block_align`` and ``layer_align`` round those strides up.
        ``kind`` is needed for ``state`` only.
        """
        return layout_from_order(cls, **{k: v for k, v in locals().items() if k != "cls"})

    @classmethod
    def from_tensors(
        cls,
        tensors: Any,
        axes: str,
        *,
        num_kv_heads: int,
        head_dim: int,
        dtype: str,
        num_layers: int | None = None,
        layers: Iterable[int] | None = None,
        head_dim_v: int | None = None,
        block_size: int | None = None,
        tp_rank: int = 0,
        tp_size: int = 1,
        region: Any = None,
        scales: KVScales | None = None,
        format: str = "plain",
        atom: str = "element",
        group: str = "",
        kind: str | None = None,
    ) -> KVLayout:
        """The layout of existing tensors (torch, NumPy, CUDA arrays): strides are read, meaning is told.

        Args:
            tensors: one tensor if ``axes`` has L; else one for each layer held. Where ``axes`` has no K
                and the kind is ``split``, each of these is a (K, V) pair.
            axes: what each dimension means, e.g. ``KBNHC``; ``S`` stands for slots, that is block and
                token in one dimension. Without K and with ``kind="fused"`` the C axis holds K then V.
            dtype: told, because fp8 and bf16 caches are often plain integers to their tensor library. Tensors of
                another float dtype are refused, unless rows are opaque (``uint8``).
            num_layers: of the model, of which a rank may hold some: always to be told.
            layers: which of them the tensors hold; None for all.
            region: where offsets count from: the NumPy array or tensor that they are views of, or a list
                of byte offsets, one for each tensor (``region.piece_offsets``). None for one tensor
                alone: offsets count from its first byte.
        """
        return layout_from_tensors(cls, **{k: v for k, v in locals().items() if k != "cls"})

    nhd = classmethod(engines.nhd)
    hnd = classmethod(engines.hnd)
    fused = classmethod(engines.fused)
    mla = classmethod(engines.mla)
    vllm = classmethod(engines.vllm)
    vllm_split = classmethod(engines.vllm_split)
    flashinfer = classmethod(engines.flashinfer)
    sglang = classmethod(engines.sglang)
    trtllm = classmethod(engines.trtllm)

    def with_bases(self, bases: Mapping[str, Sequence[int]]) -> KVLayout:
        """The same blocks with other bases: ``{"k": [one per held layer], "v": [...]}``."""
        unknown = set(bases) - {part.name for part in self.parts}
        if unknown:
            raise LayoutError("bases", f"no part is called {', '.join(sorted(unknown))}")
        parts = tuple(replace(p, bases=tuple(bases.get(p.name, p.bases))) for p in self.parts)
        return replace(self, parts=parts, order="")

    # -- ranks ----------------------------------------------------------------------------------

    @property
    def replicas(self) -> int:
        """How many ranks hold the same heads."""
        return max(1, self.tp_size // self.num_kv_heads)

    @property
    def replica(self) -> int:
        """Which of the ranks that hold these heads this one is."""
        return self.tp_rank % self.replicas

    @property
    def head_range(self) -> tuple[int, int]:
        """Heads of the model held here, ``[first, end)``."""
        if self.tp_size > self.num_kv_heads:
            head = self.tp_rank // self.replicas
            return head, head + 1
        share = self.num_kv_heads // self.tp_size
        return self.tp_rank * share, (self.tp_rank + 1) * share

    @property
    def num_kv_heads_here(self) -> int:
        first, end = self.head_range
        return end - first

    # -- sizes ----------------------------------------------------------------------------------

    @property
    def itemsize(self) -> int:
        return itemsize_of(self.dtype)

    @cached_property
    def nbytes(self) -> int:
        """Bytes of region that the map can reach: a region must be at least this long."""
        return max(
            max(part.bases)
            + (self.num_blocks - 1) * part.stride_block
            + (self.block_size - 1) * part.stride_token
            + (self.part_heads(part) - 1) * part.stride_head
            + part.row_nbytes
            for part in self.parts
        )

    @cached_property
    def token_nbytes(self) -> int:
        """Bytes that one token occupies over all layers and parts held here."""
        rows = sum(part.row_nbytes * self.part_heads(part) for part in self.parts)
        return rows * len(self.layers)

    @cached_property
    def vector_bytes(self) -> int:
        """Largest access (16, 8, 4, 2 or 1 bytes) that every row's start and length allow."""
        numbers = [16]
        for part in self.parts:
            moving = self.part_axes(part)
            numbers += [part.row_nbytes, *part.bases, *(stride for _, stride, _ in moving)]
        return int(np.gcd.reduce(np.array(numbers, dtype=np.int64)))

    def part_heads(self, part: KVPart) -> int:
        """Extent of the head axis of ``part`` here."""
        return self.num_kv_heads_here if part.per_head else 1

    def part_axes(self, part: KVPart) -> tuple[tuple[str, int, int], ...]:
        """(name, byte stride, extent) of the axes that move, that is of extent above 1."""
        axes = (
            ("block", part.stride_block, self.num_blocks),
            ("token", part.stride_token, self.block_size),
            ("head", part.stride_head, self.part_heads(part)),
        )
        return tuple(axis for axis in axes if axis[2] > 1)

    # -- use ------------------------------------------------------------------------------------

    def views(self, buffer: Any) -> tuple[tuple[np.ndarray[Any, Any], ...], ...]:
        """For each held layer one array per part, axes ``[num_blocks, block_size, heads here, width]``.

        Axes are logical: strides differ with the physical order. ``buffer`` is a uint8 array of at least
        ``nbytes``; bfloat16 appears as uint16, fp8 as uint8. Nothing is copied.
        """
        return part_views(self, buffer)

    def signature(self) -> dict[str, Any]:
        """What two sides compare before a byte moves: JSON scalars and their ``digest``, no addresses.

        Equal digests mean that whole blocks may be copied blindly between equal ranks.
        """
        return wire.signature(self)

    def to_wire(self) -> dict[str, Any]:
        """Everything, as JSON values: a peer must be able to compute our offsets."""
        return wire.to_wire(self)

    @classmethod
    def from_wire(cls, message: Mapping[str, Any]) -> KVLayout:
        """The layout that a peer sent, validated anew."""
        return cls(**wire.from_wire(message, {f.name for f in fields(cls)}))
