# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Proof that no two coordinates of a layout share a byte."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from kvxfer.errors import LayoutError

__all__ = ["Axis", "Extent", "check_disjoint"]


class Axis(NamedTuple):
    """One moving index: its name for messages, byte stride and extent (above 1)."""

    name: str
    stride: int
    extent: int


class Extent(NamedTuple):
    """One (part, layer): every byte at ``base + sum(index*stride) + [0, row)``."""

    label: str
    base: int
    row: int
    axes: tuple[Axis, ...]  # descending stride

    @property
    def reach(self) -> int:
        return self.row + sum(axis.stride * (axis.extent - 1) for axis in self.axes)


def check_disjoint(extents: Sequence[Extent]) -> None:
    """Raise ``LayoutError`` when a byte may be reached twice (sound; refuses some exotic legal tilings)."""
    seen: set[tuple[int, tuple[Axis, ...]]] = set()
    for extent in extents:
        if (extent.row, extent.axes) not in seen:
            seen.add((extent.row, extent.axes))
            _check_one(extent)
    _check_apart(list(extents))


def _check_one(extent: Extent) -> None:
    reach = extent.row
    for axis in reversed(extent.axes):
        if axis.stride < reach:
            raise LayoutError(
                f"parts.{extent.label}",
                f"{axis.name} stride {axis.stride} is less than the {reach} bytes that it must step over",
            )
        reach += axis.stride * (axis.extent - 1)


def _check_apart(extents: list[Extent]) -> None:
    """Cluster what overlaps as intervals; peel an outermost axis that a whole cluster shares; repeat."""
    extents.sort(key=lambda extent: extent.base)
    cluster: list[Extent] = []
    end = -1
    for extent in extents:
        if cluster and extent.base >= end:
            _check_cluster(cluster)
            cluster = []
        cluster.append(extent)
        end = max(end, extent.base + extent.reach)
    _check_cluster(cluster)


def _check_cluster(cluster: list[Extent]) -> None:
    if len(cluster) < 2:
        return
    outer = cluster[0].axes[0] if cluster[0].axes else None
    shared = outer is not None and all(
        extent.axes
        and extent.axes[0].stride == outer.stride
        and extent.axes[0].extent == outer.extent
        for extent in cluster
    )
    if shared and outer is not None:
        inner = [Extent(e.label, e.base, e.row, e.axes[1:]) for e in cluster]
        span = max(e.base + e.reach for e in inner) - min(e.base for e in inner)
        if span <= outer.stride:
            _check_apart(inner)
            return
    raise LayoutError(
        "bases",
        f"{cluster[0].label} at {cluster[0].base} and {cluster[1].label} at {cluster[1].base} share bytes, "
        "or interleave in a way that is not a common outer axis",
    )
