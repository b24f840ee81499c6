# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""The copies that a gathered or packed transfer plan asks for: into its staging buffer, and out of one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from kvxfer.errors import InvalidArgumentError
from kvxfer.kernels._arrays import Array
from kvxfer.kernels._sides import Side
from kvxfer.kernels.cache import rename_sides, run_copy

__all__ = ["pack_plan", "unpack_plan"]


class PlanLike(Protocol):
    """What is read of a ``TransferPlan``."""

    @property
    def src(self) -> Any: ...
    @property
    def dst(self) -> Any: ...
    @property
    def kind(self) -> str: ...
    @property
    def layers(self) -> tuple[int, ...]: ...
    @property
    def heads(self) -> tuple[int, int]: ...
    @property
    def first_token(self) -> int: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def staging_origin(self) -> int: ...
    @property
    def wire_layout(self) -> Any: ...
    @property
    def src_blocks(self) -> npt.NDArray[np.int64]: ...
    @property
    def dst_blocks(self) -> npt.NDArray[np.int64]: ...


class _Staging:
    """A plan's ``wire_layout``, which counts its heads from 0, under the model's numbers and the destination's scales."""

    def __init__(self, plan: PlanLike) -> None:
        self._wire = plan.wire_layout
        self.head_range = plan.heads
        self.num_kv_heads = plan.dst.num_kv_heads
        fixed = plan.dst.scales is not None and plan.dst.scales.is_fixed
        self.scales = plan.dst.scales if fixed else self._wire.scales
        self.block_ids = np.arange(self._wire.num_blocks, dtype=np.int64)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wire, name)


# A copy knows its layouts by identity: one for each plan, for as long as that lives.
_known: WeakKeyDictionary[PlanLike, _Staging] = WeakKeyDictionary()


def _staging_of(plan: PlanLike) -> Any:
    if getattr(plan, "wire_layout", None) is None:
        kind = getattr(plan, "kind", type(plan).__name__)
        raise InvalidArgumentError(
            f"plan: expected a gathered or packed TransferPlan, given {kind!r}: a direct one has no staging"
        )
    return _known.get(plan) or _known.setdefault(plan, _Staging(plan))


def pack_plan(
    plan: PlanLike,
    src: Array | Sequence[Array],
    staging: Array,
    *,
    max_ctas: int = 0,
    backend: str = "auto",
) -> None:
    """Copy what a gathered or packed plan moves into the sender's staging buffer, converted to the destination's dtype.

    Args:
        plan: of ``plan_transfer``, with ``kind`` ``gathered`` or ``packed``.
        src: memory of ``plan.src``, as in :func:`copy_blocks`.
        staging: at least ``plan.staging_nbytes[0]`` bytes, contiguous. Of a gathered plan blocks that it leaves out
            (destination ids of -1) and tokens before ``first_token`` may stay as they were.
        max_ctas, backend: as in :func:`copy_blocks`.
    Raises:
        InvalidArgumentError: a direct plan, memory too short, a block id out of range.
        LayoutError, UnavailableError: as :func:`copy_blocks`.
    """
    wire = _staging_of(plan)
    source, target = Side("src", plan.src, src), Side("staging", wire, staging)
    size = plan.src.block_size
    try:
        for first, end in _runs(plan.src_blocks, size, plan.first_token, plan.num_tokens):
            block = first // size
            run_copy(
                source,
                target,
                plan.src_blocks[block : -(-end // size)],
                wire.block_ids,
                num_tokens=end,
                first_token=first,
                layers=plan.layers,
                heads=plan.heads,
                src_origin=block * size,
                dst_origin=plan.staging_origin,
                max_ctas=max_ctas,
                backend=backend,
            )
    except InvalidArgumentError as error:
        rename_sides(error, {"dst": "staging", "src_blocks": "plan.src_blocks"})
        raise


def unpack_plan(
    plan: PlanLike,
    staging: Array,
    dst: Array | Sequence[Array],
    *,
    max_ctas: int = 0,
    backend: str = "auto",
) -> None:
    """Copy what arrived in the receiver's staging buffer into the blocks of a packed plan's destination.

    Of a gathered plan ``engine.write`` does that itself, by ``plan.bases`` and ``plan.template``. Arguments and errors
    as :func:`pack_plan`; ``dst`` is memory of ``plan.dst``.
    """
    wire = _staging_of(plan)
    source, target = Side("staging", wire, staging), Side("dst", plan.dst, dst)
    try:
        run_copy(
            source,
            target,
            wire.block_ids,
            plan.dst_blocks,
            num_tokens=plan.num_tokens,
            first_token=plan.first_token,
            layers=plan.layers,
            heads=plan.heads,
            src_origin=plan.staging_origin,
            max_ctas=max_ctas,
            backend=backend,
        )
    except InvalidArgumentError as error:
        rename_sides(error, {"src": "staging", "dst_blocks": "plan.dst_blocks"})
        raise


def _runs(ids: npt.NDArray[np.int64], size: int, first: int, end: int) -> Iterator[tuple[int, int]]:
    """The tokens of ``[first, end)`` in stretches without a source block of -1, which a plan allows where nothing is to land."""
    held = ids[first // size : -(-end // size)] >= 0
    edges = np.flatnonzero(np.diff(np.concatenate(([False], held, [False])).astype(np.int8)))
    for begin, stop in edges.reshape(-1, 2) + first // size:
        yield max(first, int(begin) * size), min(end, int(stop) * size)
