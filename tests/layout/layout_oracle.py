# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""What a transfer must do, from arrays that are built by axis order and indexed: no layout arithmetic here."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvxfer.layout import KVLayout, TransferPlan, plan_transfer

ITEMSIZE = {"float32": 4, "bfloat16": 2, "uint8": 1}


@dataclass(frozen=True)
class Model:
    """What all ranks share."""

    num_layers: int
    num_heads: int
    head_dim: int
    head_dim_v: int
    dtype: str

    @property
    def widths(self) -> tuple[int, ...]:
        return (self.head_dim, self.head_dim_v) if self.head_dim_v else (self.head_dim,)


@dataclass(frozen=True)
class Rank:
    """One rank's cache, described in an engine's words."""

    model: Model
    order: str
    num_blocks: int
    block_size: int
    layers: tuple[int, ...]
    tp_rank: int
    tp_size: int
    offset: int = 0

    @property
    def heads(self) -> range:
        count = self.model.num_heads
        if self.tp_size <= count:
            share = count // self.tp_size
            return range(self.tp_rank * share, (self.tp_rank + 1) * share)
        head = self.tp_rank * count // self.tp_size
        return range(head, head + 1)

    def layout(self) -> KVLayout:
        model = self.model
        return KVLayout.from_order(
            self.order,
            num_blocks=self.num_blocks,
            block_size=self.block_size,
            num_kv_heads=model.num_heads,
            head_dim=model.head_dim,
            head_dim_v=model.head_dim_v,
            dtype=model.dtype,
            num_layers=model.num_layers,
            layers=self.layers,
            tp_rank=self.tp_rank,
            tp_size=self.tp_size,
            offset=self.offset,
            kind=None if "K" in self.order else "mla",
        )

    def byte_index(self) -> tuple[np.ndarray, ...]:
        """For each part an array ``[layer, block, token, head, byte]`` of positions in the region."""
        extents = {"L": len(self.layers), "B": self.num_blocks, "N": self.block_size}
        extents["H"] = len(self.heads)
        itemsize = ITEMSIZE[self.model.dtype]
        cut = self.order.index("K") if "K" in self.order else 0
        outer, inner = self.order[:cut], self.order[cut:].lstrip("K")
        axes = outer + inner
        # A region is its outer axes, and in each of their places all of K, then all of V.
        rows = [[*(extents[a] for a in axes[:-1]), width * itemsize] for width in self.model.widths]
        places = int(np.prod([extents[a] for a in outer], dtype=np.int64))
        sizes = [int(np.prod(row, dtype=np.int64)) // places for row in rows]
        whole = np.arange(places * sum(sizes)).reshape(places, sum(sizes)) + self.offset
        found = []
        for row, size, start in zip(rows, sizes, np.cumsum([0, *sizes]), strict=False):
            array = whole[:, start : start + size].reshape(row)
            missing = [a for a in "LBNH" if a not in axes]
            array = array.reshape([*row[:-1], *([1] * len(missing)), row[-1]])
            names = axes[:-1] + "".join(missing) + "C"
            found.append(array.transpose([names.index(a) for a in "LBNHC"]))
        return tuple(found)


@dataclass(frozen=True)
class Move:
    """One sequence's move between all ranks of two sides."""

    src: tuple[Rank, ...]
    dst: tuple[Rank, ...]
    src_blocks: np.ndarray
    dst_blocks: np.ndarray
    first_token: int
    num_tokens: int

    def plans(self, **how: object) -> dict[tuple[int, int], TransferPlan]:
        layouts = [[rank.layout() for rank in side] for side in (self.src, self.dst)]
        return {
            (i, j): plan_transfer(
                a,
                b,
                self.src_blocks,
                self.dst_blocks,
                self.num_tokens,
                first_token=self.first_token,
                **how,
            )
            for i, a in enumerate(layouts[0])
            for j, b in enumerate(layouts[1])
        }

    def wanted(self, i: int, j: int) -> dict[int, tuple[int, int]]:
        """Destination byte -> (source byte, layer), over what the two ranks have in common."""
        src, dst = self.src[i], self.dst[j]
        pairs: dict[int, tuple[int, int]] = {}
        for ours, theirs in zip(src.byte_index(), dst.byte_index(), strict=True):
            for token in range(self.first_token, self.num_tokens):
                block = self.dst_blocks[token // dst.block_size]
                if block < 0:
                    continue
                source = self.src_blocks[token // src.block_size]
                for layer in set(src.layers) & set(dst.layers):
                    for head in set(src.heads) & set(dst.heads):
                        here = ours[
                            src.layers.index(layer),
                            source,
                            token % src.block_size,
                            head - src.heads[0],
                        ]
                        there = theirs[
                            dst.layers.index(layer),
                            block,
                            token % dst.block_size,
                            head - dst.heads[0],
                        ]
                        pairs.update(
                            zip(there.tolist(), ((x, layer) for x in here.tolist()), strict=True)
                        )
        return pairs


def spans_as_bytes(plan: TransferPlan) -> dict[int, int]:
    """Destination byte -> source byte, refusing a byte that two spans write."""
    moved: dict[int, int] = {}
    for src, dst, nbytes in zip(plan.src_offsets, plan.dst_offsets, plan.nbytes, strict=True):
        for k in range(int(nbytes)):
            assert int(dst) + k not in moved, f"byte {int(dst) + k} is written twice"
            moved[int(dst) + k] = int(src) + k
    return moved


def fewest_spans(moved: dict[int, int], layer_of: dict[int, int] | None = None) -> int:
    """How many runs the bytes fall into at least; layers kept apart when ``layer_of`` says where they are."""
    count, last = 0, None
    for dst in sorted(moved):
        now = (dst, moved[dst], layer_of[dst] if layer_of else 0)
        if last is None or now != (last[0] + 1, last[1] + 1, last[2]):
            count += 1
        last = now
    return count
