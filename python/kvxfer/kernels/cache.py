# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Moving between paged KV caches, and between one and a buffer: copy, pack, unpack."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from kvxfer.errors import InvalidArgumentError, UnavailableError
from kvxfer.kernels._arrays import Array, is_torch
from kvxfer.kernels._copy_again import WholeCopy
from kvxfer.kernels._copy_job import make_job
from kvxfer.kernels._dispatch import choose
from kvxfer.kernels._numbers import MOST, whole
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

_ONE_BLOCK = np.zeros(1, np.int64)  # the block list of a packed buffer, which starts at first_token

__all__ = ["copy_blocks", "pack_blocks", "rename_sides", "unpack_blocks"]


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
    again = None
    if _are_usual((num_tokens, layers), first_token, max_ctas, backend):
        again = WholeCopy(src_layout, id(dst_layout), src, dst)
        if again.done(src_blocks, dst_blocks):
            return
    a, b = Side("src", src_layout, src), Side("dst", dst_layout, dst)
    layers = layers_of(layers)
    _run(a, b, src_blocks, dst_blocks, num_tokens, first_token, layers, None, max_ctas, backend, again)  # fmt: skip


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
    again = None
    choices = (num_tokens, layers, heads, out_layout)
    usual = _are_usual(choices, first_token, max_ctas, backend)
    if usual and out is not None and type(block_ids) is np.ndarray:
        again = WholeCopy(layout, block_ids.shape, tensors, out)
        if again.done(block_ids, _ONE_BLOCK):
            return out
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
        _run(side, target, ids, _ONE_BLOCK, end, first, layers, chosen, max_ctas, backend, again)
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
    again = None
    choices = (num_tokens, layers, heads, src_layout)
    if _are_usual(choices, first_token, max_ctas, backend) and type(block_ids) is np.ndarray:
        again = WholeCopy(layout, ("unpack", *block_ids.shape), src, tensors)
        if again.done(_ONE_BLOCK, block_ids):
            return
    side = Side("tensors", layout, tensors)
    layers = layers_of(layers)
    ids = block_ids_of("block_ids", block_ids)
    first, end = token_range(layout, ids, num_tokens, first_token)
    chosen = _some_heads(layout, heads)
    wire = _wire("src_layout", src_layout, layout, end - first, layers, chosen)
    source = Side("src", wire, src)
    _check_wire(wire, source, end - first, "src")
    try:
        _run(source, side, _ONE_BLOCK, ids, end, first, layers, chosen, max_ctas, backend, again)
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
    again: WholeCopy | None,
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
        again=again,
    )


def _are_usual(choices: tuple[Any, ...], first_token: Any, max_ctas: Any, backend: Any) -> bool:
    """Has the caller left all of these as they are?"""
    for choice in choices:
        if choice is not None:
            return False
    integers = type(first_token) is type(max_ctas) is int
    return integers and first_token == max_ctas == 0 and backend in ("auto", "cpu")


def run_copy(
    src: Side,
    dst: Side,
    src_blocks: Any,
    dst_blocks: Any,
    *,
    max_ctas: int,
    backend: str,
    again: WholeCopy | None = None,
    **what: Any,
) -> None:
    """Resolves a copy and has a backend do it; ``what`` as :func:`make_job` takes it. ``again`` knows it from then on."""
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
        if again is not None:
            again.keep(module, job)


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
