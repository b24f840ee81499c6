# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Rows of spans, written out on first use where their number is known without."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from kvxfer.layout.segments import Int64

__all__ = ["Axis", "Spans", "UnwrittenSpans", "count_joins"]


@dataclass(frozen=True, eq=False)
class Spans:
    """Rows of (source offset, destination offset, length)."""

    src: Int64
    dst: Int64
    nbytes: Int64

    def __len__(self) -> int:
        return len(self.nbytes)

    @property
    def sizes(self) -> tuple[Int64, Int64]:
        """Lengths, and how many spans each of them stands for: enough to count bytes and to price."""
        return self.nbytes, np.ones(1, np.int64)

    @staticmethod
    def concat(pieces: Sequence[Spans]) -> Spans:
        if len(pieces) == 1:
            return pieces[0]
        return Spans(
            np.concatenate([piece.src for piece in pieces]),
            np.concatenate([piece.dst for piece in pieces]),
            np.concatenate([piece.nbytes for piece in pieces]),
        )

    def shifted(self, src: int, dst: int) -> Spans:
        return Spans(self.src + src, self.dst + dst, self.nbytes) if src or dst else self

    def repeated(self, bases: Int64) -> Spans:
        """The template written out at each base."""
        if len(bases) == 1:
            return self.shifted(int(bases[0, 0]), int(bases[0, 1]))
        return Spans(
            np.add.outer(bases[:, 0], self.src).ravel(),
            np.add.outer(bases[:, 1], self.dst).ravel(),
            np.tile(self.nbytes, len(bases)),
        )

    def coalesced(self) -> Spans:
        """In destination order, neighbours that continue each other on both sides made one."""
        src, dst, nbytes = self.src, self.dst, self.nbytes
        if len(nbytes) < 2:
            return self
        if not (dst[1:] > dst[:-1]).all():
            order = np.argsort(dst, kind="stable")
            src, dst, nbytes = src[order], dst[order], nbytes[order]
        breaks = (dst[1:] != dst[:-1] + nbytes[:-1]) | (src[1:] != src[:-1] + nbytes[:-1])
        starts = np.concatenate(([0], np.flatnonzero(breaks) + 1))
        if len(starts) == len(nbytes):
            return Spans(src, dst, nbytes)
        return Spans(src[starts], dst[starts], np.add.reduceat(nbytes, starts))


class UnwrittenSpans(Spans):
    """``num_rows`` of ``run`` bytes, of which pairs have become one ``num_joins`` times: all that a price needs.

    ``write`` is called when rows are read. The direct way between unlike layouts has most rows of all, and is mostly
    priced only to be refused.
    """

    _counts: tuple[int, int]  # spans of one run, of two
    _run: int
    _write: Callable[[], Spans]

    def __init__(self, num_rows: int, num_joins: int, run: int, write: Callable[[], Spans]) -> None:
        vars(self).update(_counts=(num_rows - 2 * num_joins, num_joins), _run=run, _write=write)

    def __len__(self) -> int:
        return sum(self._counts)

    def __reduce__(self) -> tuple[Any, ...]:  # what pickle can take
        return Spans, (self.src, self.dst, self.nbytes)

    @property
    def sizes(self) -> tuple[Int64, Int64]:
        sizes = np.array([self._run, 2 * self._run], np.int64)
        counts = np.array(self._counts, np.int64)
        return sizes[counts > 0], counts[counts > 0]

    @cached_property
    def _written(self) -> Spans:
        return self._write()

    @property
    def src(self) -> Int64:
        return self._written.src

    @property
    def dst(self) -> Int64:
        return self._written.dst

    @property
    def nbytes(self) -> Int64:
        return self._written.nbytes


@dataclass(frozen=True)
class Axis:
    """One moving index of a template: byte strides at the source and the destination."""

    name: str  # "token", "head", "part", "layer"
    extent: int
    src: int
    dst: int


def count_joins(
    src: Int64,
    dst: Int64,
    lengths: Int64,
    run: int,
    outer: Sequence[Axis],
    inner: Sequence[Axis],
) -> int | None:
    """How many rows of ``run`` bytes, nested as given and in destination order, continue the row before them.

    Neighbours differ by a step of one level, from the last row of the levels inside it to their first. So a look
    at each level for each start stands for a look at all rows. ``lengths`` are the extents of the token axis.
    None where that is not plain: rows out of order, three that join, or others than a start's last and the next's first.
    """

    def apart(steps: Int64) -> bool:
        return bool(((steps[1] > 0) & (steps != run).any(axis=0)).all())

    starts = np.stack((src, dst))
    last = np.zeros_like(starts)  # from each start to the last row of the levels seen so far
    fewest = 1  # rows of a start
    for axis in reversed(inner):
        step = np.array([[axis.src], [axis.dst]], np.int64)
        if not apart(step - last):
            return None
        extent = lengths if axis.name == "token" else np.array(axis.extent)
        last += step * (extent - 1)
        fewest *= int(extent.min())
    steps = np.diff(starts) - last[:, :-1]
    joins = int((steps == run).all(axis=0).sum())
    if (steps[1] <= 0).any() or (joins and fewest < 2):
        return None
    last = starts[:, -1:] - starts[:, :1] + last[:, -1:]
    for axis in reversed(outer):
        step = np.array([[axis.src], [axis.dst]], np.int64)
        if not apart(step - last) or (axis.name == "token" and (lengths != axis.extent).any()):
            return None
        last += step * (axis.extent - 1)
        joins *= axis.extent
    return joins
