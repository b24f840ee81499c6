# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Writing to and moving between paged KV caches: append, copy, pack, unpack."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from kvxfer.errors import InvalidArgumentError, UnavailableError
from kvxfer.kernels._arrays import (
    FLOAT_DTYPES,
    Array,
    Operands,
    facts_of,
    is_torch,
    reach_of,
    share_elements,
)
from kvxfer.kernels._copy_job import make_job
from kvxfer.kernels._dispatch import choose, takes_numpy
from kvxfer.kernels._memo import remember
from kvxfer.kernels._numbers import MOST, finite, whole
from kvxfer.kernels._sides import (
    LayoutLike,
    Side,
    block_ids_of,
    check_layout,
    head_range_of,
    layers_of,
    token_range,
)
from kvxfer.kernels._wire import wire_side
from kvxfer.kernels.attention import add_caches, add_scale_caches, refuse_gradients

_ONE_BLOCK = np.zeros(1, np.int64)  # the block list of a packed buffer, which starts at first_token

__all__ = ["append_kv", "copy_blocks", "pack_blocks", "rename_sides", "unpack_blocks"]

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
    known = (facts, kv_layout, k_scale, v_scale, kv_dtype, backend)
    if facts is not None and (passed := _passed.get(known)) is not None:
        k_address, v_address = k_cache.data_ptr(), v_cache.data_ptr()
        if passed.are_apart(k_address, v_address):
            passed.again(
                key.data_ptr(), value.data_ptr(), k_address, v_address, slot_mapping.data_ptr()
            )
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
            distance=v_cache.data_ptr() - k_cache.data_ptr(),
        )
        remember(_passed, known, passed, _MOST_PASSED)


def copy_blocks(
    src_layout: LayoutLike,
    src: Array | Sequence[Array],
    dst_layout: LayoutLike,
    dst: Array | Sequence[Array],
    src_blocks: Any,
    dst_blocks: Any,
    *,
    num_tokens: int | None = None,
    first_token: int = 0,
    layers: Sequence[int] | None = None,
    max_ctas: int = 0,
    backend: str = "auto",
) -> None:
    """Copy tokens between two caches of any two layouts: order, block size, heads and dtype may differ.

    Args:
        src_layout, dst_layout: ``KVLayout`` of each side; the heads and layers that both hold are copied.
        src, dst: the memory: one contiguous array, or several that form one linear offset space in the order
            given (as in ``engine.register``). Of the layout's dtype (where scales lie in memory, or of theirs), or of
            integers of any width, which are raw bytes; float16 memory under a bfloat16 layout is refused. A layout of
            opaque rows (uint8) takes any. May be one cache under one layout, with disjoint blocks. On a GPU
            one side may be pinned host memory, which the kernel then reads or writes across the bus; and ``dst``
            may be memory (of ``cudaMalloc``, as torch's is) of another GPU that the source's reaches. It runs on the
            source's GPU, in its current stream: what uses ``dst`` on the other one waits for an event of that stream.
        src_blocks, dst_blocks: block ids, indexed from token 0 of the sequence; a destination id of -1 skips
            its tokens.
        num_tokens, first_token: tokens ``[first_token, num_tokens)`` are copied; None: all that both hold.
        layers: global layer ids; None: those that both hold.
        src_layout.scales, dst_layout.scales: where both are fixed (or none) and differ, written = read * its scale
            over the other's; scales in memory move with the data, between equal dtypes only. Where neither dtype nor
            scale changes the bits stay as they are; where one does, a NaN stays one
            (int8: -128), but its bits depend on the backend, whether it is a signalling one too.
        max_ctas: on a GPU, the most thread blocks to use (0: no limit). Of no effect on the host.
    Raises:
        LayoutError: the layouts cannot be mapped; names the field.
        InvalidArgumentError: a block id out of range or repeated, a list too short, an overlap; nothing copied.
        UnavailableError: no backend runs it here, with the reason; or the two GPUs do not reach each other.
    """
    a, b = Side("src", src_layout, src), Side("dst", dst_layout, dst)
    layers = layers_of(layers)
    _run(a, b, src_blocks, dst_blocks, num_tokens, first_token, layers, None, max_ctas, backend)


def pack_blocks(
    layout: LayoutLike,
    tensors: Array | Sequence[Array],
    block_ids: Any,
    out: Array | None = None,
    *,
    num_tokens: int | None = None,
    first_token: int = 0,
    layers: Sequence[int] | None = None,
    heads: tuple[int, int] | None = None,
    out_layout: LayoutLike | None = None,
    max_ctas: int = 0,
    backend: str = "auto",
) -> Array:
    """Gather tokens of a sequence into one contiguous buffer, and return it.

    Args:
        layout, tensors: the cache, as ``src`` of :func:`copy_blocks`.
        out: bytes to fill from the front; allocated when None. Its order is layer, part, head, token, channel
            in the cache's dtype, unless ``out_layout`` (with one block for all tokens) says otherwise.
        heads: global head range ``(first, end)``; None: all that the layout holds.
        num_tokens, first_token, layers, max_ctas: as in :func:`copy_blocks`.
    """
    side = Side("tensors", layout, tensors)
    layers = layers_of(layers)
    ids = block_ids_of("block_ids", block_ids)
    first, end = token_range(layout, ids, num_tokens, first_token)
    chosen = _some_heads(layout, heads)
    wire = _wire("out_layout", out_layout, layout, end - first, layers, chosen)
    if out is None:
        out = _allocate(tensors, wire)
    target = Side("out", wire, out)
    _check_wire(wire, target, end - first, "out")
    try:
        _run(side, target, ids, _ONE_BLOCK, end, first, layers, chosen, max_ctas, backend)
    except InvalidArgumentError as error:
        rename_sides(error, {"src": "tensors", "dst": "out", "src_blocks": "block_ids"})
        raise
    return out


def unpack_blocks(
    src: Array,
    layout: LayoutLike,
    tensors: Array | Sequence[Array],
    block_ids: Any,
    *,
    num_tokens: int | None = None,
    first_token: int = 0,
    layers: Sequence[int] | None = None,
    heads: tuple[int, int] | None = None,
    src_layout: LayoutLike | None = None,
    max_ctas: int = 0,
    backend: str = "auto",
) -> None:
    """Scatter what :func:`pack_blocks` gathered into the blocks of a cache. Arguments as there."""
    side = Side("tensors", layout, tensors)
    layers = layers_of(layers)
    ids = block_ids_of("block_ids", block_ids)
    first, end = token_range(layout, ids, num_tokens, first_token)
    chosen = _some_heads(layout, heads)
    wire = _wire("src_layout", src_layout, layout, end - first, layers, chosen)
    source = Side("src", wire, src)
    _check_wire(wire, source, end - first, "src")
    try:
        _run(source, side, _ONE_BLOCK, ids, end, first, layers, chosen, max_ctas, backend)
    except InvalidArgumentError as error:
        rename_sides(error, {"dst": "tensors", "dst_blocks": "block_ids"})
        raise


def _run(
    src: Side,
    dst: Side,
    src_blocks: Any,
    dst_blocks: Any,
    num_tokens: int | None,
    first_token: int,
    layers: Sequence[int] | None,
    heads: tuple[int, int] | None,
    max_ctas: int,
    backend: str,
) -> None:
    """Where one side is a packed buffer, its one block begins at ``first_token``."""
    run_copy(
        src,
        dst,
        src_blocks,
        dst_blocks,
        num_tokens=num_tokens,
        first_token=first_token,
        layers=layers,
        heads=heads,
        src_origin=first_token if src_blocks is _ONE_BLOCK else 0,
        dst_origin=first_token if dst_blocks is _ONE_BLOCK else 0,
        max_ctas=max_ctas,
        backend=backend,
    )


def run_copy(
    src: Side,
    dst: Side,
    src_blocks: Any,
    dst_blocks: Any,
    *,
    max_ctas: int,
    backend: str,
    **what: Any,
) -> None:
    """Resolves a copy and has a backend do it; ``what`` as :func:`make_job` takes it."""
    max_ctas = whole("max_ctas", max_ctas, 0, MOST, expected=">= 0")
    job = make_job(
        src,
        dst,
        src_blocks,
        dst_blocks,
        max_ctas=max_ctas,
        **what,
    )
    module = choose(
        "copy_blocks",
        job.device,
        backend,
        cache_dtype=job.route.cache_dtype,
        scaled=job.route.scaled,
    )
    if src.device != dst.device and not getattr(module, "REACHES_OTHERS", False):
        reason = "only the cuda kernel copies between two GPUs, or a GPU and pinned host memory"
        raise UnavailableError(f"copy_blocks: {reason}", reason=reason)
    for array in dst.arrays:
        if isinstance(array, np.ndarray) and not array.flags.writeable:
            raise InvalidArgumentError("dst: expected writable memory, given a read-only array")
    first, end = job.blocks.tokens[2:]
    if first < end:
        module.copy_blocks(job)


def _wire(
    name: str,
    given: LayoutLike | None,
    layout: LayoutLike,
    num_tokens: int,
    layers: Sequence[int] | None,
    heads: tuple[int, int] | None,
) -> Any:
    """The packed buffer's layout: the one that was given, else the usual one."""
    if given is not None:
        check_layout(name, given)
        return given
    chosen = list(layout.layers) if layers is None else list(layers)
    return wire_side(layout, num_tokens, chosen, heads or layout.head_range)


def _some_heads(layout: LayoutLike, heads: Any) -> tuple[int, int] | None:
    if heads is None:
        return None
    first, end = head_range_of(layout, heads)
    if first == end:
        low, high = layout.head_range
        raise InvalidArgumentError(
            f"heads: expected a range (first, end) of at least one head within [{low}, {high}), "
            f"given ({first}, {end})"
        )
    return first, end


def rename_sides(error: InvalidArgumentError, names: dict[str, str]) -> None:
    """A copy says src and dst; who packs or unpacks knows these by other names, and is told of those."""
    if type(error) is InvalidArgumentError:
        error.args = (_COPY_NAMES.sub(lambda match: names.get(match[0], match[0]), str(error)),)


_COPY_NAMES = re.compile(r"\b(src|dst)(_blocks)?\b")


def _allocate(tensors: Array | Sequence[Array], wire: Any) -> Array:
    first: Array = tensors[0] if isinstance(tensors, list | tuple) else tensors
    if is_torch(first):
        return sys.modules["torch"].empty(
            wire.nbytes, dtype=sys.modules["torch"].uint8, device=first.device
        )
    return np.empty(wire.nbytes, np.uint8)


def _check_wire(wire: LayoutLike, side: Side, num_tokens: int, name: str) -> None:
    if wire.block_size < num_tokens:
        raise InvalidArgumentError(
            f"{name}: expected a layout with one block for all {num_tokens} tokens, "
            f"given block_size {wire.block_size}"
        )
