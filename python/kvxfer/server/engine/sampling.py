# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Logits to token ids, without state: what is drawn depends on (seed, position, choice) and the logits.

So a retry, a preemption or a move to another worker goes on with the same sample, and no generator's
state has to travel. Order of the filters: penalties, temperature, min_p, top_k, top_p.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kvxfer.errors import InternalError
from kvxfer.server.wire import SamplingParams

__all__ = ["SampleRequest", "sample", "uniforms"]

# Most draws end within the most likely few; sorting a vocabulary of 150,000 costs 10 ms, finding these 1.
_WIDTHS = (256, 4096)
# Below this a draw is the maximum anyway, and 1 / temperature leaves float32.
_GREEDY_BELOW = 1e-5


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """One token to draw."""

    params: SamplingParams
    position: int  # index of this token among the answer's, those of earlier attempts included
    choice: int = 0
    history: Sequence[int] = ()  # the answer's ids so far, for the penalties
    eos_token_ids: Sequence[int] = ()  # banned, with the request's stop ids, before min_tokens


def sample(
    logits: Tensor, requests: Sequence[SampleRequest], rows: Sequence[int] | None = None
) -> list[int]:
    """One id per request, from float32 ``logits`` [rows, vocab] on the CPU, which stay as they are.

    Args:
        rows: which row each request draws from (several choices of one prompt share one); None: its own.
    """
    table = logits.numpy()
    indices = list(range(len(requests))) if rows is None else list(rows)
    if len(indices) != len(requests):
        raise InternalError(f"{len(requests)} requests but {len(indices)} rows of logits")
    drawn = [r for r in requests if r.params.temperature >= _GREEDY_BELOW]
    draws = iter(uniforms(drawn) if drawn else ())
    ids = []
    for index, request in zip(indices, requests, strict=True):
        row = _adjusted(table[index], request)
        best = int(row.argmax())  # the first of equals; a NaN wins, and is caught here
        if not np.isfinite(row[best]):
            raise InternalError(f"logits of row {index} have the maximum {row[best]}")
        if request.params.temperature >= _GREEDY_BELOW:
            ids.append(_draw(row, row[best], request.params, float(next(draws))))
        else:
            ids.append(best)
    return ids


def _adjusted(row: NDArray[Any], request: SampleRequest) -> NDArray[Any]:
    """The row with penalties and bans, a copy if there are any."""
    params = request.params
    penalised = (params.presence_penalty or params.frequency_penalty) and request.history
    banned: Sequence[int] = ()
    if request.position < params.min_tokens:
        banned = [i for i in (*request.eos_token_ids, *params.stop_token_ids) if i < row.shape[0]]
    if not penalised and not banned:
        return row
    row = row.copy()
    if penalised:
        seen, counts = np.unique(np.asarray(request.history, np.int64), return_counts=True)
        # counts as float32: int64 would make the penalty float64 and round differently.
        weight = np.float32(params.frequency_penalty) * counts.astype(np.float32)
        row[seen] -= weight + np.float32(params.presence_penalty)
    if banned:
        row[banned] = -np.inf
    return row


def _draw(row: NDArray[Any], top: Any, params: SamplingParams, uniform: float) -> int:
    """Inverse CDF over what the filters keep, sorted by (-probability, id)."""
    # Relative to the maximum, so the most likely has 1 and nothing overflows at low temperatures.
    with np.errstate(over="ignore", under="ignore"):
        weights = np.exp((row - top) / np.float32(params.temperature))
    if params.min_p > 0:
        weights[weights < params.min_p] = 0
    vocab = weights.shape[0]
    top_k = min(params.top_k, vocab) if params.top_k > 0 else vocab
    total = float(weights.sum(dtype=np.float64)) if top_k == vocab else None
    for width in (*(w for w in _WIDTHS if w < vocab), vocab):
        if total is None and width < top_k:
            continue  # the kept mass is not known before all of top_k is
        order = _largest(weights, width)[:top_k]
        cumulative = np.cumsum(weights[order], dtype=np.float64)
        mass = float(cumulative[-1]) if total is None else total
        enough = params.top_p * mass
        if params.top_p < 1 and cumulative[-1] >= enough:
            # The smallest set whose mass reaches top_p; at least one.
            last = int(np.searchsorted(cumulative, enough))
            mass = float(cumulative[last])
        elif params.top_p < 1 and width < vocab:
            continue
        target = uniform * mass
        if cumulative[-1] > target or width == vocab:
            at = int(np.searchsorted(cumulative, target, side="right"))
            # Rounding can put the target at the very end; ids of weight 0 are never the answer.
            return int(order[min(at, np.count_nonzero(weights[order]) - 1)])
    raise InternalError("no width of the vocabulary sufficed")


def _largest(weights: NDArray[Any], width: int) -> NDArray[Any]:
    """Ids of the ``width`` largest (and of all that equal the last of them), by (-weight, id)."""
    vocab = weights.shape[0]
    if width >= vocab:
        ids = np.arange(vocab)
    else:
        threshold = np.partition(weights, vocab - width)[vocab - width]
        ids = np.flatnonzero(weights >= threshold)
    ordered: NDArray[Any] = ids[np.argsort(-weights[ids], kind="stable")]
    return ordered


_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


def uniforms(requests: Sequence[SampleRequest]) -> NDArray[np.float64]:
    """One number in [0, 1) per request: Philox4x32-10, key = seed, counter = (position, choice).

    Source: Random123 (Salmon et al., 2011). Written out because NumPy's own object takes 26 us each.
    """
    positions = np.array([r.position for r in requests], np.uint64)
    choices = np.array([r.choice for r in requests], np.uint64)
    seeds = np.array([r.params.seed & 0xFFFFFFFFFFFFFFFF for r in requests], np.uint64)
    a, b = positions & _LOW, positions >> _HALF
    c, d = choices & _LOW, choices >> _HALF
    key_a, key_b = seeds & _LOW, seeds >> _HALF
    for step in range(10):
        if step:
            key_a = (key_a + np.uint64(_KEY_STEPS[0])) & _LOW
            key_b = (key_b + np.uint64(_KEY_STEPS[1])) & _LOW
        # Products of 32-bit words held in 64 bits: both halves are at hand and nothing overflows.
        first, second = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b, c, d = (
            (second >> _HALF) ^ b ^ key_a,
            second & _LOW,
            (first >> _HALF) ^ d ^ key_b,
            first & _LOW,
        )
    bits = ((a << _HALF) | b) >> np.uint64(11)
    numbers: NDArray[np.float64] = bits.astype(np.float64) * 2.0**-53
    return numbers
