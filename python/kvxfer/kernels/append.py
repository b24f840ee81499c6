# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Writing new keys and values into a paged KV cache."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from kvxfer.errors import InvalidArgumentError
from kvxfer.kernels._arrays import (
    FLOAT_DTYPES,
    Array,
    Operands,
    facts_of,
    reach_of,
    share_elements,
)
from kvxfer.kernels._dispatch import choose, takes_numpy
from kvxfer.kernels._memo import remember
from kvxfer.kernels._numbers import finite
from kvxfer.kernels.attention import add_caches, add_scale_caches, refuse_gradients

__all__ = ["append_kv"]

# Appends of host tensors that have passed all checks: what these looked at, and what takes the addresses of the next. A decode step makes
# one such call per layer, alike but for addresses and slots, and the checks take longer than its work.
_passed: dict[tuple[Any, ...], _Passed] = {}
_MOST_PASSED = 512
_TEXT_OR_NONE = (str, type(None))


class _Passed(NamedTuple):
    again: Callable[..., None]
    reach: tuple[int, int]  # bytes from the first to the last of each cache
    distance: int  # from k_cache to v_cache, in bytes; found to hold no element twice

    def are_apart(self, k_address: int, v_address: int) -> bool:
        distance = v_address - k_address
        return distance >= self.reach[0] or -distance >= self.reach[1] or distance == self.distance


def append_kv(
    key: Array,
    value: Array,
    k_cache: Array,
    v_cache: Array,
    slot_mapping: Array,
    *,
    kv_layout: str = "NHD",
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    k_scale_cache: Array | None = None,
    v_scale_cache: Array | None = None,
    kv_dtype: str | None = None,
    backend: str = "auto",
) -> None:
    """Write new keys and values into their slots, converting to the cache's dtype: to the nearest, ties to even.

    Numbers past the range of an 8-bit dtype become its largest (float8 e4m3: 448, e5m2: 57344; int8: -128, 127).

    Args:
        key: ``[num_tokens, num_kv_heads, head_dim]``, float32, float16 or bfloat16, channels adjacent. What the cache
            has the dtype of keeps its bits, those of a NaN too, unless a scale divides it; any other NaN stays one (int8:
            -128), but its bits depend on the backend.
        value: ``[num_tokens, num_kv_heads, head_dim_v]``, dtype of ``key``.
        k_cache, v_cache: written in place, so no element may be in both; axes by ``kv_layout`` as in :func:`paged_decode`.
        slot_mapping: ``[num_tokens]`` int64, ``block_id * block_size + offset``; -1 skips the token.
            Two tokens with one slot: which of them stays is undefined.
        k_scale, v_scale: stored = value / scale, per tensor.
        k_scale_cache, v_scale_cache: written for each new token and head, float32, axes of the cache less the
            channels: its largest magnitude over the largest of the cache's dtype (1 where all are 0), by which it
            is divided. Both or none; only with float8 and int8 caches, and k_scale and v_scale stay 1.
        kv_dtype: of caches that are NumPy ``uint8``: ``"float8_e4m3"`` or ``"float8_e5m2"``; never guessed.
    Raises:
        InvalidArgumentError: a shape, dtype, stride or device disagrees, or on the host a slot is out of range;
            the message names it, the expected and the given value. Or torch is asked for a gradient. The cache is
            untouched then.
        UnavailableError: no kernel for this device; carries the reason.
    Source: reshape_and_cache (vLLM).
    """
    facts = None
    names_are_text = type(kv_layout) is type(backend) is str and type(kv_dtype) in _TEXT_OR_NONE
    numbers_are_floats = type(k_scale) is type(v_scale) is float
    if k_scale_cache is v_scale_cache is None and numbers_are_floats and names_are_text:
        facts = facts_of((key, value, k_cache, v_cache, slot_mapping))
    if facts is not None:
        alike, addresses = facts
        known = (alike, kv_layout, k_scale, v_scale, kv_dtype, backend)
        passed = _passed.get(known)
        if passed is not None and passed.are_apart(addresses[2], addresses[3]):
            passed.again(*addresses)
            return
    call = Operands()
    num_tokens, num_kv_heads, head_dim = call.add(
        "key", key, ("num_tokens", "num_kv_heads", "head_dim"), FLOAT_DTYPES
    )
    add_caches(call, k_cache, v_cache, kv_layout, head_dim, kv_dtype)
    add_scale_caches(call, k_scale_cache, v_scale_cache, kv_layout)
    heads_here, head_dim_v = call.views["k_cache"].shape[2], call.views["v_cache"].shape[3]
    if heads_here != num_kv_heads:
        raise InvalidArgumentError(
            f"key: expected num_kv_heads {heads_here} like k_cache (kv_layout {kv_layout}), "
            f"given {num_kv_heads}"
        )
    call.add("value", value, (num_tokens, num_kv_heads, head_dim_v), (call.dtypes["key"],))
    call.add("slot_mapping", slot_mapping, (num_tokens,), ("int64",))
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        finite(name, scale, "a finite value > 0", low=math.ulp(0.0))
    scaled = k_scale_cache is not None
    cache_dtype = call.dtypes["k_cache"]
    if scaled and (cache_dtype in FLOAT_DTYPES or (k_scale, v_scale) != (1.0, 1.0)):
        raise InvalidArgumentError(
            "k_scale_cache: expected an 8-bit cache and k_scale and v_scale of 1, "
            f"given {cache_dtype}, {k_scale} and {v_scale}"
        )
    written = ("k_cache", "v_cache", "k_scale_cache", "v_scale_cache")
    for name in written[: 4 if scaled else 2]:
        call.check_written(name)
    refuse_gradients(call, "key", "value", *written[: 4 if scaled else 2])
    for k_name, v_name in (written[:2], written[2:])[: 2 if scaled else 1]:
        if share_elements(call.views[k_name], call.views[v_name]):
            raise InvalidArgumentError(
                f"{v_name}: expected memory of its own, given some of {k_name}"
            )
    module = choose(
        "append_kv", call.device, backend, cache_dtype=cache_dtype, scaled=scaled, call=call
    )
    numpy = takes_numpy(module)
    source = call.source(numpy)
    names = ("key", "value", "k_cache", "v_cache", "slot_mapping")
    arrays = [source[name] for name in names]
    options: dict[str, Any] = {"k_scale": float(k_scale), "v_scale": float(v_scale)}
    options |= {name: source[name] for name in written[2:] if scaled}
    if numpy:
        options["cache_dtype"] = cache_dtype
    module.append_kv(*arrays, **options)
    if facts is not None and hasattr(module, "append_again"):
        k_view, v_view = call.views["k_cache"], call.views["v_cache"]
        passed = _Passed(
            again=module.append_again(*arrays, **options),
            reach=(reach_of(k_view), reach_of(v_view)),
            distance=addresses[3] - addresses[2],
        )
        remember(_passed, known, passed, _MOST_PASSED)
