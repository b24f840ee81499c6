# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Attention over a paged KV cache: decode, prefill, and the merge of two partial results."""

from __future__ import annotations

import math
from typing import Any

from kvxfer.errors import InvalidArgumentError
from kvxfer.kernels._arrays import (
    FLOAT_DTYPES,
    Array,
    as_numpy,
    check_array,
    check_same_place,
    dtype_of,
    empty_like_library,
    same_memory,
)
from kvxfer.kernels._dispatch import choose

__all__ = ["merge_states", "paged_decode", "paged_prefill"]

_NUMPY_BACKENDS = ("kvxfer.kernels.reference", "kvxfer.kernels._cpu")


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
    out: Array | None = None,
    return_lse: bool = False,
    split_size: int | None = None,
    backend: str = "auto",
) -> Any:
    """Paged attention for one new token per sequence.

    Args:
        q: ``[batch, num_q_heads, head_dim]``, float32, float16 or bfloat16. Any strides, channels adjacent.
        k_cache: axes by ``kv_layout``, any strides, channels adjacent (so a fused or head-major cache is
            passed as a view); float32, float16 or bfloat16, not necessarily that of ``q``.
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
        out: ``[batch, num_q_heads, head_dim_v]``, dtype of ``q``, overwritten; allocated when None.
        split_size: tokens per partial sum of the long axis; None: the backend's fixed length. Results do
            not depend on the batch's composition or on the number of threads.
    Returns:
        ``out``, or ``(out, lse)``; LSE float32 ``[batch, num_q_heads]``, natural logarithm.
    Raises:
        InvalidArgumentError: a shape, dtype, stride or device disagrees, or on the host a block id is out of
            range; the message names it, the expected and the given value.
        UnavailableError: no kernel for this device; carries the reason.
    Source: PagedAttention (Kwon et al., 2023), split-KV merge as in FlashDecoding.
    """
    batch, _, head_dim = check_array(
        "q", q, shape=["batch", "num_q_heads", "head_dim"], dtypes=FLOAT_DTYPES
    )
    k_cache, v_cache = check_caches(k_cache, v_cache, kv_layout, head_dim)
    check_array("block_table", block_table, shape=[batch, "max_blocks"], dtypes=("int32",))
    check_array("seq_lens", seq_lens, shape=[batch], dtypes=("int32",))
    if split_size is not None and split_size <= 0:
        raise InvalidArgumentError(f"split_size: expected > 0 or None, given {split_size}")
    call = _AttentionCall(
        "paged_decode", q, k_cache, v_cache, out, return_lse, sinks,
        {"block_table": block_table, "seq_lens": seq_lens},
        sm_scale, k_scale, v_scale, window_left, logits_soft_cap, backend,
    )  # fmt: skip
    call.options["split_size"] = split_size
    return call.run(block_table, seq_lens)


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
    out: Array | None = None,
    return_lse: bool = False,
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
        causal: a row sees keys up to its own position; False: all of the context.
        out: ``[num_tokens, num_q_heads, head_dim_v]``.
        k_cache, v_cache, block_table, sm_scale, kv_layout, window_left, logits_soft_cap, sinks, k_scale,
            v_scale: as in :func:`paged_decode`.
    Returns:
        ``out``, or ``(out, lse)``; LSE float32 ``[num_tokens, num_q_heads]``, natural logarithm.
    Raises:
        InvalidArgumentError, UnavailableError: as in :func:`paged_decode`.
    Source: FlashAttention-2 (Dao, 2023) over paged keys.
    """
    num_tokens, _, head_dim = check_array(
        "q", q, shape=["num_tokens", "num_q_heads", "head_dim"], dtypes=FLOAT_DTYPES
    )
    k_cache, v_cache = check_caches(k_cache, v_cache, kv_layout, head_dim)
    (batch,) = check_array("seq_lens", seq_lens, shape=["batch"], dtypes=("int32",))
    check_array("block_table", block_table, shape=[batch, "max_blocks"], dtypes=("int32",))
    check_array("cu_seqlens_q", cu_seqlens_q, shape=[batch + 1], dtypes=("int32",))
    call = _AttentionCall(
        "paged_prefill", q, k_cache, v_cache, out, return_lse, sinks,
        {"cu_seqlens_q": cu_seqlens_q, "block_table": block_table, "seq_lens": seq_lens},
        sm_scale, k_scale, v_scale, window_left, logits_soft_cap, backend,
    )  # fmt: skip
    if call.device == "cpu":
        _check_rows(as_numpy(cu_seqlens_q), as_numpy(seq_lens), num_tokens)
    call.options["causal"] = causal
    return call.run(cu_seqlens_q, block_table, seq_lens)


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
    shape = check_array(
        "v_a", v_a, shape=["num_tokens", "num_q_heads", "head_dim"], dtypes=FLOAT_DTYPES
    )
    check_array("v_b", v_b, shape=shape, dtypes=(dtype_of(v_a),))
    check_array("lse_a", lse_a, shape=shape[:2], dtypes=("float32",))
    check_array("lse_b", lse_b, shape=shape[:2], dtypes=("float32",))
    device = check_same_place({"v_a": v_a, "lse_a": lse_a, "v_b": v_b, "lse_b": lse_b})
    module = choose("merge_states", device, backend)
    out = empty_like_library(v_a, shape, dtype_of(v_a))
    lse = empty_like_library(lse_a, shape[:2], "float32")
    arrays: tuple[Array, ...] = (v_a, lse_a, v_b, lse_b, out, lse)
    if module.__name__ in _NUMPY_BACKENDS:
        arrays = tuple(as_numpy(array) for array in arrays)
    module.merge_states(*arrays)
    return out, lse


def check_caches(
    k_cache: Array, v_cache: Array, kv_layout: str, head_dim: int | None
) -> tuple[Array, Array]:
    """Check both caches and return them as views ``[block, token, head, channel]``."""
    if kv_layout not in ("NHD", "HND"):
        raise InvalidArgumentError(f"kv_layout: expected 'NHD' or 'HND', given {kv_layout!r}")
    nhd = kv_layout == "NHD"
    inner = ["block_size", "num_kv_heads"] if nhd else ["num_kv_heads", "block_size"]
    shape = check_array(
        "k_cache",
        k_cache,
        shape=["num_blocks", *inner, "head_dim" if head_dim is None else head_dim],
        dtypes=FLOAT_DTYPES,
    )
    check_array("v_cache", v_cache, shape=[*shape[:3], "head_dim_v"], dtypes=(dtype_of(k_cache),))
    block_size = shape[1] if nhd else shape[2]
    if not 1 <= block_size <= 256:
        raise InvalidArgumentError(
            f"k_cache: expected a block size from 1 to 256, given {block_size} "
            f"(kv_layout {kv_layout}, shape {list(shape)})"
        )
    if nhd:
        return k_cache, v_cache
    return _swap_middle(k_cache), _swap_middle(v_cache)


def _swap_middle(cache: Array) -> Array:
    return cache.permute(0, 2, 1, 3) if hasattr(cache, "permute") else cache.transpose(0, 2, 1, 3)


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


class _AttentionCall:
    """What decode and prefill have in common: checks, output, scale folding, the call itself."""

    def __init__(
        self,
        op: str,
        q: Array,
        k_cache: Array,
        v_cache: Array,
        out: Array | None,
        return_lse: bool,
        sinks: Array | None,
        others: dict[str, Array],
        sm_scale: float | None,
        k_scale: float,
        v_scale: float,
        window_left: int,
        logits_soft_cap: float,
        backend: str,
    ) -> None:
        rows, num_q_heads, head_dim = (int(n) for n in q.shape)
        num_kv_heads, head_dim_v = int(k_cache.shape[2]), int(v_cache.shape[3])
        if num_kv_heads == 0 or num_q_heads % num_kv_heads:
            raise InvalidArgumentError(
                f"q: expected num_q_heads to be a multiple of the cache's {num_kv_heads} KV heads, "
                f"given {num_q_heads}"
            )
        if head_dim == 0 or head_dim_v == 0:
            raise InvalidArgumentError(f"head_dim: expected > 0, given {head_dim} and {head_dim_v}")
        if window_left < -1:
            raise InvalidArgumentError(f"window_left: expected >= -1, given {window_left}")
        if not (logits_soft_cap >= 0 and math.isfinite(logits_soft_cap)):
            raise InvalidArgumentError(
                f"logits_soft_cap: expected a finite value >= 0, given {logits_soft_cap}"
            )
        scale = head_dim**-0.5 if sm_scale is None else float(sm_scale)
        if not math.isfinite(scale):
            raise InvalidArgumentError(f"sm_scale: expected a finite value, given {sm_scale}")
        arrays = {"q": q, "k_cache": k_cache, "v_cache": v_cache, **others}
        if sinks is not None:
            check_array("sinks", sinks, shape=[num_q_heads], dtypes=("float32",), contiguous="all")
            arrays["sinks"] = sinks
        out_shape = (rows, num_q_heads, head_dim_v)
        if out is not None:
            check_array("out", out, shape=out_shape, dtypes=(dtype_of(q),))
            arrays["out"] = out
        self.device = check_same_place(arrays)
        if out is not None:
            for name in ("q", "k_cache", "v_cache"):
                if same_memory(out, arrays[name]):
                    raise InvalidArgumentError(
                        f"out: expected memory of its own, given some of {name}"
                    )
        self.module = choose(op, self.device, backend)
        self.op, self.q, self.k_cache, self.v_cache = op, q, k_cache, v_cache
        self.out = empty_like_library(q, out_shape, dtype_of(q)) if out is None else out
        self.lse = empty_like_library(q, out_shape[:2], "float32") if return_lse else None
        self.options: dict[str, Any] = {
            "sm_scale": scale * float(k_scale),
            "v_scale": float(v_scale),
            "window_left": int(window_left),
            "logits_soft_cap": float(logits_soft_cap),
            "sinks": sinks,
        }

    def run(self, *tables: Array) -> Any:
        arrays = (self.q, self.k_cache, self.v_cache, *tables, self.out, self.lse)
        options = self.options
        if self.module.__name__ in _NUMPY_BACKENDS:
            arrays = tuple(None if array is None else as_numpy(array) for array in arrays)
            if options["sinks"] is not None:
                options["sinks"] = as_numpy(options["sinks"])
        getattr(self.module, self.op)(*arrays, **options)
        return self.out if self.lse is None else (self.out, self.lse)
