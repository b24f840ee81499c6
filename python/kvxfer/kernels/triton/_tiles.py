# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Which tile a prefill takes: a table for Hopper, and what ``tune_prefill`` has measured in this process.

Nothing is ever measured on the way of a call: a call looks its shape up, so a CUDA graph captures what a plain call
runs, and results change only when someone tunes (another tile sums in another order).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

__all__ = [
    "EDGE_N",
    "INVARIANT_ROWS",
    "PrefillShape",
    "PrefillTile",
    "prefill_candidates",
    "prefill_tile",
    "remember",
]

# Masked tiles have at most this many keys: what a mask needs in registers comes on top of what a tile needs.
EDGE_N = 64

# What a call that must not depend on its batch takes for its rows: a chunk of a prompt.
INVARIANT_ROWS = 1024


@dataclass(frozen=True)
class PrefillTile:
    """Tile of one program, and how Triton shall compile it."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    packs_heads: bool = False  # the heads of a GQA group are rows of one tile


@dataclass(frozen=True)
class PrefillShape:
    """What the choice of a tile looks at."""

    head_dim: int  # the wider one of K and V, padded to a power of two
    rows: int  # per sequence, on average
    group: int  # query heads per KV head
    block_size: int
    cache_bits: int
    wide: bool  # dots in float32
    plain: bool = True  # neither a window nor a soft cap nor scales per row, which take registers

    @property
    def key(self) -> PrefillShape:
        """Shapes of one key share a measurement: rows to the next power of two, up to 4096."""
        rows = min(1 << max(0, self.rows - 1).bit_length(), 4096)
        return replace(self, rows=rows)


_measured: dict[PrefillShape, PrefillTile] = {}


def prefill_candidates(shape: PrefillShape) -> tuple[PrefillTile, ...]:
    """Tiles that fit Hopper's registers without spilling (compiled for sm_90 and looked at; see the tests).

    The first is the default, the fastest one measured on an H100. Three stages, because the block ids are an
    indirection that the pipeliner counts as one; two where a second program on the same SM does what a stage would.
    """
    # Fewer rows than a tile has would leave most of it empty: then the heads of a group share one.
    packs = shape.group > 1 and shape.rows < (32 if shape.wide else 64)
    if shape.wide:  # float32 dots have no tensor core path that keeps float32's precision
        return (PrefillTile(32, 32, 4, 2, packs),)
    short = packs or shape.rows <= 64
    if shape.head_dim > 128:
        small = PrefillTile(64, 32, 8, 3, packs)
        # An 8-bit cache is converted on the way, and the scales of its rows are held besides: each takes registers.
        if short or (shape.cache_bits == 8 and not shape.plain):
            return (small,)
        return PrefillTile(128, 32, 8, 2 if shape.cache_bits == 8 else 3, packs), small
    small = PrefillTile(64, 64, 4, 3, packs)
    if short:
        return small, PrefillTile(128, 64, 8, 3, packs)
    usual, light = PrefillTile(128, 64, 8, 3), PrefillTile(64, 64, 4, 2)
    large = PrefillTile(128, 128, 8, 3)
    if shape.head_dim <= 64:
        return large, usual, small
    if not shape.plain:
        return usual, small
    # Long sequences have work enough for one large program per SM; others rather have two small ones.
    return (large, usual, light) if shape.rows > 1024 else (light, usual, large)


def prefill_tile(shape: PrefillShape) -> PrefillTile:
    """The tile for a shape: the measured one where ``tune_prefill`` was asked, else the table's."""
    return _measured.get(shape.key) or prefill_candidates(shape)[0]


def remember(shape: PrefillShape, tile: PrefillTile | None) -> None:
    """Take this tile from now on; None: the table's again."""
    if tile is None:
        _measured.pop(shape.key, None)
    else:
        _measured[shape.key] = tile
