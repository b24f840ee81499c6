# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Measure the tiles of paged_prefill on this GPU, when asked and only then."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from kvxfer.errors import UnavailableError
from kvxfer.kernels.attention import paged_prefill
from kvxfer.kernels.triton._tiles import PrefillTile, prefill_candidates, remember
from kvxfer.kernels.triton.attention_prefill import is_plain, prefill_shape

__all__ = ["tune_prefill"]

_CALLS, _ROUNDS = 4, 7  # calls between two events; rounds, in which the candidates take turns


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def tune_prefill(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    kv_layout: str = "NHD",
    **options: Any,
) -> dict[PrefillTile, float]:
    """Time each candidate on these arguments, and take the fastest for all calls of their kind from then on.

    Of their kind: head sizes, group, block size, width of the cache's dtype, whether there are windows,
    soft caps or scales per row, and rows per sequence to the next power
    of two. It waits for the device, compiles, and holds for this process; call it at start, before graphs are captured
    and from one thread. Two tiles round differently in the last bits, so replicas that must agree bit by bit should
    all tune or none.

    Args:
        as of :func:`kvxfer.kernels.paged_prefill`.
    Returns:
        Microseconds per call by tile, the chosen one first.
    Raises:
        UnavailableError: not CUDA tensors, or a CUDA graph is being captured.
    """
    if not q.is_cuda:
        reason = f"tiles are measured on a CUDA device, the tensors are on {q.device}"
        raise UnavailableError(f"tune_prefill: {reason}", reason=reason)
    if torch.cuda.is_current_stream_capturing():
        reason = "a CUDA graph is being captured, in which nothing can be measured; tune before"
        raise UnavailableError(f"tune_prefill: {reason}", reason=reason)
    caches = (k_cache, v_cache)
    if kv_layout == "HND":
        caches = (k_cache.transpose(1, 2), v_cache.transpose(1, 2))
    batch = None if options.get("batch_invariant") else seq_lens.shape[0]
    shape = prefill_shape(q, *caches, batch, plain=is_plain(**options))
    times: dict[PrefillTile, list[float]] = {tile: [] for tile in prefill_candidates(shape)}
    remember(shape, None)

    def run(tile: PrefillTile) -> None:
        remember(shape, tile)
        paged_prefill(
            q, k_cache, v_cache, cu_seqlens_q, block_table, seq_lens,
            kv_layout=kv_layout, backend="triton", **options,
        )  # fmt: skip

    try:
        with torch.cuda.device(q.device):
            for tile in times:
                run(tile)  # compiles
            for _ in range(_ROUNDS):
                for tile, found in times.items():
                    begin, end = _event(), _event()
                    begin.record()
                    for _ in range(_CALLS):
                        run(tile)
                    end.record()
                    end.synchronize()
                    found.append(begin.elapsed_time(end) * 1e3 / _CALLS)
    finally:
        remember(shape, None)
    medians = {tile: statistics.median(found) for tile, found in times.items()}
    ranked = sorted(medians, key=medians.__getitem__)
    remember(shape, ranked[0])
    return {tile: medians[tile] for tile in ranked}
