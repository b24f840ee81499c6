# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Decode attention over the latent cache of multi-head latent attention (MLA)."""

from __future__ import annotations

from typing import Any

from kvxfer.errors import InvalidArgumentError
from kvxfer.kernels._arrays import CACHE_DTYPES, FLOAT_DTYPES, Array, Operands
from kvxfer.kernels._numbers import MOST, finite, whole
from kvxfer.kernels.attention import attend, name_bytes
from kvxfer.layout.parts import MAX_BLOCK_SIZE

__all__ = ["mla_decode"]


def mla_decode(
    q_latent: Array,
    q_rope: Array,
    latent_cache: Array,
    block_table: Array,
    seq_lens: Array,
    *,
    sm_scale: float,
    kv_scale: float = 1.0,
    kv_dtype: str | None = None,
    out: Array | None = None,
    return_lse: bool = False,
    split_size: int | None = None,
    backend: str = "auto",
) -> Any:
    """Paged attention for one new token per sequence, where all heads share one latent row per token.

    A row is the compressed latent followed by the rotated key part. Its first ``latent_dim`` channels are the key's
    content and the value alike, so each byte of the cache is loaded once.

    Args:
        q_latent: ``[batch, num_q_heads, latent_dim]`` (512 in DeepSeek's models), float32, float16 or bfloat16: the
            query with the key's up-projection absorbed.
        q_rope: ``[batch, num_q_heads, rope_dim]`` (64), dtype of ``q_latent``.
        latent_cache: ``[num_blocks, block_size, latent_dim + rope_dim]``, channels adjacent, float32, float16,
            bfloat16, float8 or int8.
        block_table, seq_lens, split_size, kv_dtype, out, return_lse: as in :func:`paged_decode`; ``out`` is
            ``[batch, num_q_heads, latent_dim]``, still to be multiplied by the value's up-projection.
        sm_scale: factor of q·k. There is no default: it follows from the widths before absorption
            (``1 / sqrt(128 + 64)`` in DeepSeek's models, times what its rope scaling adds).
        kv_scale: value = stored * scale, of the whole row.
    Returns:
        ``out``, or ``(out, lse)``; LSE float32 ``[batch, num_q_heads]``, natural logarithm.
    Raises:
        InvalidArgumentError, UnavailableError: as in :func:`paged_decode`.
    Source: DeepSeek-V2 (2024), the absorbed form; FlashMLA (deepseek-ai).
    """
    call = Operands()
    batch, num_q_heads, latent_dim = call.add(
        "q_latent", q_latent, ("batch", "num_q_heads", "latent_dim"), FLOAT_DTYPES
    )
    dtype = call.dtypes["q_latent"]
    *_, rope_dim = call.add("q_rope", q_rope, (batch, num_q_heads, "rope_dim"), (dtype,))
    width = latent_dim + rope_dim
    shape = ("num_blocks", "block_size", width)
    _, block_size, _ = call.add("latent_cache", latent_cache, shape, (*CACHE_DTYPES, "uint8"))
    name_bytes(call, kv_dtype, "latent_cache")
    if not 1 <= block_size <= MAX_BLOCK_SIZE:
        raise InvalidArgumentError(
            f"latent_cache: expected a block size from 1 to {MAX_BLOCK_SIZE}, given {block_size}"
        )
    call.add("block_table", block_table, (batch, "max_blocks"), ("int32",))
    call.add("seq_lens", seq_lens, (batch,), ("int32",))
    if 0 in (num_q_heads, latent_dim):
        raise InvalidArgumentError(
            f"q_latent: expected heads and channels, given shape {[batch, num_q_heads, latent_dim]}"
        )
    if split_size is not None:
        split_size = whole("split_size", split_size, 1, MOST, expected="> 0 or None")
    options = {
        "sm_scale": finite("sm_scale", sm_scale),
        "kv_scale": finite("kv_scale", kv_scale),
        "split_size": split_size,
    }
    arrays = ("q_latent", "q_rope", "latent_cache", "block_table", "seq_lens")
    return attend("mla_decode", call, arrays, latent_dim, out, return_lse, options, backend)
