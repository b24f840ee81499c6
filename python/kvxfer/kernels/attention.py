# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Attention over a paged KV cache: decode, prefill, and the merge of two partial results."""

from __future__ import annotations

import sys
from typing import Any

from kvxfer.errors import InvalidArgumentError
from kvxfer.kernels._arrays import (
    CACHE_DTYPES,
    FLOAT8_DTYPES,
    FLOAT_DTYPES,
    Array,
    Operands,
    same_memory,
)
from kvxfer.kernels._dispatch import choose, takes_numpy
from kvxfer.kernels._numbers import MOST, finite, flag, whole
from kvxfer.kernels.plan import DecodePlan, check_plan
from kvxfer.layout.parts import MAX_BLOCK_SIZE

__all__ = ["merge_states", "paged_decode", "paged_prefill"]


def paged_decode(
    q: Array,
    k_cache: Array,
    v_cache: Array,
    block_table: Array,
    seq_lens: Array,
    *,
    sm_scale: float | None = None,
    kv_layout: str = "NHD",
    window_left: int = -1,
    logits_soft_cap: float = 0.0,
    sinks: Array | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    k_scale_cache: Array | None = None,
    v_scale_cache: Array | None = None,
    kv_dtype: str | None = None,
    out: Array | None = None,
    return_lse: bool = False,
    plan: DecodePlan | None = None,
    split_size: int | None = None,
    backend: str = "auto",
) -> Any:
    """Paged attention for one new token per sequence.

    Args:
        q: ``[batch, num_q_heads, head_dim]``, float32, float16 or bfloat16. Any strides, channels adjacent.
        k_cache: axes by ``kv_layout``, any strides, channels adjacent (so a fused or head-major cache is
            passed as a view); float32, float16, bfloat16, float8 or int8, not necessarily that of ``q``.
        v_cache: as ``k_cache``; its last axis may differ, and is then that of the output.
        block_table: ``[batch, max_blocks]`` int32, -1 past the end and in front of the window.
        seq_lens: ``[batch]`` int32, in tokens, the new one included. A 0 gives zeros and an LSE of -inf
            (with sinks: the sink).
        sm_scale: factor of q·k; ``1 / sqrt(head_dim)`` when None.
        kv_layout: ``"NHD"``: ``[num_blocks, block_size, num_kv_heads, head_dim]``; ``"HND"``:
            ``[num_blocks, num_kv_heads, block_size, head_dim]``.
        window_left: a query at position p sees keys from ``p - window_left`` on; -1: all.
        logits_soft_cap: c > 0 replaces each scaled logit s by ``c * tanh(s / c)``.
        sinks: ``[num_q_heads]`` float32, a logit per head that takes weight and has no value. It is part
            of the LSE, so that merging with further states stays exact.
        k_scale, v_scale: value = stored * scale, per tensor.
        k_scale_cache, v_scale_cache: float32 scales in memory, one per token and head, axes of the cache less the
            channels, any strides: value = stored * scale_cache * scale. Both or none.
        kv_dtype: of caches that are NumPy ``uint8``: ``"float8_e4m3"`` or ``"float8_e5m2"``; never guessed.
        out: ``[batch, num_q_heads, head_dim_v]``, dtype of ``q``, overwritten; allocated when None.
        plan: what :func:`plan_decode` made of these lengths; its split_size then holds. On a device, where
            lengths are not looked at, a plan for other lengths gives wrong results.
        split_size: tokens per partial sum of the long axis; None: the backend's fixed length. Results do
            not depend on the batch's composition or on the number of threads.
    Returns:
        ``out``, or ``(out, lse)``; LSE float32 ``[batch, num_q_heads]``, natural logarithm.
    Raises:
        InvalidArgumentError: a shape, dtype, stride or device disagrees, or on the host a block id is out of
            range; the message names it, the expected and the given value. Or torch is asked for a gradient.
        UnavailableError: no kernel for this device; carries the reason.
    Source: PagedAttention (Kwon et al., 2023), split-KV merge as in FlashDecoding.
    """
    call = Operands()
    batch, _, head_dim = call.add("q", q, ("batch", "num_q_heads", "head_dim"), FLOAT_DTYPES)
    add_caches(call, k_cache, v_cache, kv_layout, head_dim, kv_dtype)
    add_scale_caches(call, k_scale_cache, v_scale_cache, kv_layout)
    call.add("block_table", block_table, (batch, "max_blocks"), ("int32",))
    call.add("seq_lens", seq_lens, (batch,), ("int32",))
    if split_size is not None:
        split_size = whole("split_size", split_size, 1, MOST, expected="> 0 or None")
    options = _options(call, sm_scale, k_scale, v_scale, window_left, logits_soft_cap, sinks)
    options["split_size"] = split_size
    if plan is not None:
        check_plan(plan, call, options["window_left"], split_size)
        options |= {"split_size": plan.split_size, "plan": plan}
    arrays = ("q", "k_cache", "v_cache", "block_table", "seq_lens")
    width = call.views["v_cache"].shape[3]
    return attend("paged_decode", call, arrays, width, out, return_lse, options, backend)


def paged_prefill(
    q: Array,
    k_cache: Array,
    v_cache: Array,
    cu_seqlens_q: Array,
    block_table: Array,
    seq_lens: Array,
    *,
    causal: bool = True,
    sm_scale: float | None = None,
    kv_layout: str = "NHD",
    window_left: int = -1,
    logits_soft_cap: float = 0.0,
    sinks: Array | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    k_scale_cache: Array | None = None,
    v_scale_cache: Array | None = None,
    kv_dtype: str | None = None,
    out: Array | None = None,
    return_lse: bool = False,
    batch_invariant: bool = False,
    backend: str = "auto",
) -> Any:
    """Paged attention for a run of new tokens per sequence, whose keys are in the cache already.

    The tokens of sequence b are ``q[cu_seqlens_q[b]:cu_seqlens_q[b + 1]]``, and they are the last ones of
    its context: row i of them stands at position ``seq_lens[b] - num_new + i``. So a chunk of a long prompt
    is an ordinary call.

    Args:
        q: ``[num_tokens, num_q_heads, head_dim]``.
        cu_seqlens_q: ``[batch + 1]`` int32, from 0 to num_tokens, not descending; equal neighbours: no rows.
        seq_lens: ``[batch]`` int32, tokens of context, the new ones included.
        causal: a row sees keys up to its own position; False: all of the context. What a row may not see does not
            reach it, but for one limit of the ``triton`` backend: it multiplies V by weights of 0, so that a NaN or an
            infinity in V also reaches rows of the same tile: of less than 191 tokens before it, and with a window of
            less than 128 behind the last that sees it. Slots past ``seq_lens`` reach no one.
        out: ``[num_tokens, num_q_heads, head_dim_v]``.
        batch_invariant: a sequence's result has the same bits in whatever batch. So it always has on the host; the
            ``triton`` backend then takes one tile for all, where the table's would be faster for few new tokens.
        k_cache, v_cache, block_table, sm_scale, kv_layout, window_left, logits_soft_cap, sinks, k_scale, v_scale,
            k_scale_cache, v_scale_cache, kv_dtype: as in :func:`paged_decode`.
    Returns:
        ``out``, or ``(out, lse)``; LSE float32 ``[num_tokens, num_q_heads]``, natural logarithm.
    Raises:
        InvalidArgumentError, UnavailableError: as in :func:`paged_decode`.
    Source: FlashAttention-2 (Dao, 2023) over paged keys.
    """
    call = Operands()
    num_tokens, _, head_dim = call.add(
        "q", q, ("num_tokens", "num_q_heads", "head_dim"), FLOAT_DTYPES
    )
    add_caches(call, k_cache, v_cache, kv_layout, head_dim, kv_dtype)
    add_scale_caches(call, k_scale_cache, v_scale_cache, kv_layout)
    (batch,) = call.add("seq_lens", seq_lens, ("batch",), ("int32",))
    call.add("block_table", block_table, (batch, "max_blocks"), ("int32",))
    call.add("cu_seqlens_q", cu_seqlens_q, (batch + 1,), ("int32",))
    if call.device == "cpu":
        _check_rows(call.views["cu_seqlens_q"], call.views["seq_lens"], num_tokens)
    options = _options(call, sm_scale, k_scale, v_scale, window_left, logits_soft_cap, sinks)
    options["causal"] = flag("causal", causal)
    options["batch_invariant"] = flag("batch_invariant", batch_invariant)
    arrays = ("q", "k_cache", "v_cache", "cu_seqlens_q", "block_table", "seq_lens")
    width = call.views["v_cache"].shape[3]
    return attend("paged_prefill", call, arrays, width, out, return_lse, options, backend)


def merge_states(
    v_a: Array, lse_a: Array, v_b: Array, lse_b: Array, *, backend: str = "auto"
) -> tuple[Array, Array]:
    """Merge two partial attentions over disjoint keys: the result of attending to both at once.

    Args:
        v_a, v_b: ``[num_tokens, num_q_heads, head_dim]``, float32, float16 or bfloat16, the same dtype.
        lse_a, lse_b: ``[num_tokens, num_q_heads]`` float32, natural logarithm; -inf: nothing attended.
    Returns:
        ``(v, lse)``. Where both are -inf: zeros and -inf.
    Source: FlashAttention's log-sum-exp identity; cascade inference (FlashInfer).
    """
    call = Operands()
    shape = call.add("v_a", v_a, ("num_tokens", "num_q_heads", "head_dim"), FLOAT_DTYPES)
    call.add("v_b", v_b, shape, (call.dtypes["v_a"],))
    call.add("lse_a", lse_a, shape[:2], ("float32",))
    call.add("lse_b", lse_b, shape[:2], ("float32",))
    refuse_gradients(call, "v_a", "lse_a", "v_b", "lse_b")
    module = choose("merge_states", call.device, backend)
    out, out_view = call.allocate(shape, call.dtypes["v_a"])
    lse, lse_view = call.allocate(shape[:2], "float32")
    numpy = takes_numpy(module)
    arrays = call.source(numpy)
    inputs = [arrays[name] for name in ("v_a", "lse_a", "v_b", "lse_b")]
    module.merge_states(*inputs, *((out_view, lse_view) if numpy else (out, lse)))
    return out, lse


def add_caches(
    call: Operands,
    k_cache: Array,
    v_cache: Array,
    kv_layout: str,
    head_dim: int | str,
    kv_dtype: str | None,
) -> None:
    """Check both caches; from here on they are views ``[block, token, head, channel]``."""
    if kv_layout not in ("NHD", "HND"):
        raise InvalidArgumentError(f"kv_layout: expected 'NHD' or 'HND', given {kv_layout!r}")
    nhd = kv_layout == "NHD"
    inner = ("block_size", "num_kv_heads") if nhd else ("num_kv_heads", "block_size")
    dtypes = (*CACHE_DTYPES, "uint8")  # the last is settled below
    shape = call.add("k_cache", k_cache, ("num_blocks", *inner, head_dim), dtypes)
    call.add("v_cache", v_cache, (*shape[:3], "head_dim_v"), (call.dtypes["k_cache"],))
    name_bytes(call, kv_dtype, "k_cache", "v_cache")
    block_size = shape[1] if nhd else shape[2]
    if not 1 <= block_size <= MAX_BLOCK_SIZE:
        raise InvalidArgumentError(
            f"k_cache: expected a block size from 1 to {MAX_BLOCK_SIZE}, given {block_size} "
            f"(kv_layout {kv_layout}, shape {list(shape)})"
        )
    if not nhd:
        call.swap_middle("k_cache", "v_cache")


def name_bytes(call: Operands, kv_dtype: str | None, *names: str) -> None:
    """Settle which float8 the caches are, where their own dtype does not say it."""
    given = call.dtypes[names[0]]
    if given != "uint8":
        if kv_dtype not in (None, given):
            raise InvalidArgumentError(
                f"kv_dtype: expected {given!r} or None, since {names[0]} is {given}, given {kv_dtype!r}"
            )
        return
    if kv_dtype not in FLOAT8_DTYPES:
        raise InvalidArgumentError(
            f"kv_dtype: expected {' or '.join(map(repr, FLOAT8_DTYPES))} for a uint8 cache, given {kv_dtype!r}"
        )
    for name in names:
        call.dtypes[name] = kv_dtype


def add_scale_caches(
    call: Operands, k_scale_cache: Array | None, v_scale_cache: Array | None, kv_layout: str
) -> None:
    """Check both or none; they become views ``[block, token, head]``."""
    if k_scale_cache is None and v_scale_cache is None:
        return
    if k_scale_cache is None or v_scale_cache is None:
        missing = "k_scale_cache" if k_scale_cache is None else "v_scale_cache"
        raise InvalidArgumentError(f"{missing}: expected scales for both K and V, or for none")
    blocks, tokens, heads = call.views["k_cache"].shape[:3]  # swapped by now
    shape = (blocks, tokens, heads) if kv_layout == "NHD" else (blocks, heads, tokens)
    call.add("k_scale_cache", k_scale_cache, shape, ("float32",), any_strides=True)
    call.add("v_scale_cache", v_scale_cache, shape, ("float32",), any_strides=True)
    if kv_layout == "HND":
        call.swap_middle("k_scale_cache", "v_scale_cache")


def _check_rows(cu_seqlens_q: Any, seq_lens: Any, num_tokens: int) -> None:
    counts = cu_seqlens_q[1:] - cu_seqlens_q[:-1]
    if cu_seqlens_q[0] != 0 or cu_seqlens_q[-1] != num_tokens or (counts < 0).any():
        raise InvalidArgumentError(
            f"cu_seqlens_q: expected not descending from 0 to {num_tokens} (rows of q), "
            f"given {cu_seqlens_q.tolist()}"
        )
    if (counts > seq_lens).any():
        index = int((counts > seq_lens).argmax())
        raise InvalidArgumentError(
            f"seq_lens[{index}]: expected at least the {int(counts[index])} new tokens of that sequence "
            f"(the context includes them), given {int(seq_lens[index])}"
        )


def _options(
    call: Operands,
    sm_scale: float | None,
    k_scale: float,
    v_scale: float,
    window_left: int,
    logits_soft_cap: float,
    sinks: Array | None,
) -> dict[str, Any]:
    """Check what decode and prefill have in common, and fold the scales."""
    _, num_q_heads, head_dim = call.views["q"].shape
    num_kv_heads, head_dim_v = call.views["k_cache"].shape[2], call.views["v_cache"].shape[3]
    if num_kv_heads == 0 or num_q_heads % num_kv_heads:
        raise InvalidArgumentError(
            f"q: expected num_q_heads to be a multiple of the cache's {num_kv_heads} KV heads, "
            f"given {num_q_heads}"
        )
    if head_dim == 0 or head_dim_v == 0:
        raise InvalidArgumentError(f"head_dim: expected > 0, given {head_dim} and {head_dim_v}")
    window = min(whole("window_left", window_left, -1), MOST)  # longer ones see all as well
    cap = finite("logits_soft_cap", logits_soft_cap, "a finite value >= 0", low=0)
    scale = head_dim**-0.5 if sm_scale is None else finite("sm_scale", sm_scale)
    scale *= finite("k_scale", k_scale)
    v_factor = finite("v_scale", v_scale)
    if sinks is not None:
        call.add("sinks", sinks, (num_q_heads,), ("float32",), dense=True)
        refuse_gradients(call, "sinks")
    return {
        "sm_scale": scale,
        "v_scale": v_factor,
        "window_left": window,
        "logits_soft_cap": cap,
        "sinks": None,
    }


def refuse_gradients(call: Operands, *names: str) -> None:
    """A kernel computes no gradient, so a caller who asks for one is told, instead of getting none."""
    if not call.torch:
        return
    for name in names:
        if call.given[name].requires_grad and sys.modules["torch"].is_grad_enabled():
            raise InvalidArgumentError(
                f"{name}: expected no gradient to be asked for, since there is none through kvxfer's kernels; "
                f"use torch.no_grad() or {name}.detach()"
            )


def attend(
    op: str,
    call: Operands,
    arrays: tuple[str, ...],
    width: int,
    out: Array | None,
    return_lse: bool,
    options: dict[str, Any],
    backend: str,
) -> Any:
    """Allocate what is missing and run; returns what the public function returns.

    Args:
        arrays: in the backend's order: a query first, a cache third, nothing that ``out`` may share up to there.
        width: channels of ``out``.
    """
    flag("return_lse", return_lse)
    refuse_gradients(call, *arrays[:3])
    views = call.views
    dtype, cache_dtype = call.dtypes[arrays[0]], call.dtypes[arrays[2]]
    shape = (*views[arrays[0]].shape[:2], width)
    if out is not None:
        call.add("out", out, shape, (dtype,))
        for name in arrays[:3]:
            if same_memory(views["out"], views[name]):
                raise InvalidArgumentError(f"out: expected memory of its own, given some of {name}")
        call.check_written("out")
    module = choose(
        op,
        call.device,
        backend,
        cache_dtype=cache_dtype,
        scaled="k_scale_cache" in views,
        call=call,
    )
    if out is None:
        call.given["out"], views["out"] = call.allocate(shape, dtype)
    lse = lse_view = None
    if return_lse:
        lse, lse_view = call.allocate(shape[:2], "float32")
    numpy = takes_numpy(module)
    source = call.source(numpy)
    for name in ("k_scale_cache", "v_scale_cache", "sinks"):
        if name in source:
            options[name] = source[name]
    if numpy:
        options["cache_dtype"] = cache_dtype
    if not getattr(module, "PLANS", False):
        options.pop("plan", None)  # its split_size says all that these want to know
    if not getattr(module, "TILES_BY_BATCH", False):
        options.pop("batch_invariant", None)  # these are in any case
    getattr(module, op)(
        *[source[name] for name in arrays],
        source["out"],
        lse_view if numpy else lse,
        **options,
    )
    result = call.given["out"]
    return (result, lse) if return_lse else result
