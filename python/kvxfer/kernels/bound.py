# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""One layer's cache, checked once, for a caller who appends to it and attends over it at every step.

The checks of `append_kv` and `paged_decode` take 40 us of Python; the work of a decode step of one sequence
takes 1 and 9 us. Here only what changes from call to call is looked at, and anything out of the ordinary
goes the long way, which serves it or says what is wrong.
"""

from __future__ import annotations

import math
import sys
from typing import Any

from kvxfer.kernels._arrays import Array, Operands, share_elements
from kvxfer.kernels._dispatch import choose
from kvxfer.kernels._numbers import MOST
from kvxfer.kernels.append import append_kv
from kvxfer.kernels.attention import add_caches, paged_decode

__all__ = ["BoundCache"]


class BoundCache:
    """Keys and values of one layer. Results are those of `append_kv` and `paged_decode`, bit for bit.

    Args:
        k_cache, v_cache: as in :func:`paged_decode`, NHD or any strides that amount to it.
    Raises:
        InvalidArgumentError: as :func:`paged_decode` for its caches.
    """

    def __init__(self, k_cache: Array, v_cache: Array) -> None:
        call = Operands()
        add_caches(call, k_cache, v_cache, "NHD", "head_dim", None)
        self.k_cache, self.v_cache = k_cache, v_cache
        _, _, self._num_kv_heads, self._head_dim = k_cache.shape
        self._short = (
            call.torch
            and call.device == "cpu"
            and k_cache.shape == v_cache.shape
            and not (k_cache.requires_grad or v_cache.requires_grad)
            # Half precision would need views of another dtype per call: not the case worth shortening.
            and call.dtypes["k_cache"] == "float32"
            and all(
                choose(op, "cpu", "auto").__name__ == "kvxfer.kernels._cpu"
                for op in ("append_kv", "paged_decode")
            )
        )
        # What may not be written goes the long way, which says why.
        self._appends = self._short and not (
            share_elements(k_cache, v_cache) or 0 in (*k_cache.stride(), *v_cache.stride())
        )
        if self._short:
            self._torch = sys.modules["torch"]
            self._module: Any = choose("paged_decode", "cpu", "auto")
            self._k, self._v = call.views["k_cache"], call.views["v_cache"]

    def append(self, key: Array, value: Array, slot_mapping: Array) -> None:
        """:func:`append_kv` into this cache."""
        if (
            self._appends
            and self._plain(key)
            and self._plain(value)
            and key.shape[1] == self._num_kv_heads
            and key.shape == value.shape
            and type(slot_mapping) is self._torch.Tensor
            and slot_mapping.is_cpu
            and slot_mapping.dtype == self._torch.int64
            and slot_mapping.shape == key.shape[:1]
        ):
            self._module.append_kv(
                key.numpy(), value.numpy(), self._k, self._v, slot_mapping.numpy(),
                k_scale=1.0, v_scale=1.0, cache_dtype="float32",
            )  # fmt: skip
        else:
            append_kv(key, value, self.k_cache, self.v_cache, slot_mapping)

    def decode(
        self,
        q: Array,
        block_table: Array,
        seq_lens: Array,
        *,
        sm_scale: float | None,
        window_left: int = -1,
    ) -> Array:
        """:func:`paged_decode` over this cache, with the same arguments and errors."""
        if not (
            self._short
            and self._plain(q)
            and q.shape[1] % self._num_kv_heads == 0
            and self._plain_table(block_table, 2)
            and self._plain_table(seq_lens, 1)
            and q.shape[:1] == block_table.shape[:1] == seq_lens.shape
            and type(window_left) is int
            and -1 <= window_left <= MOST
            and type(sm_scale) is float
            and math.isfinite(sm_scale)
        ):
            return paged_decode(
                q, self.k_cache, self.v_cache, block_table, seq_lens, sm_scale=sm_scale, window_left=window_left
            )  # fmt: skip
        out = self._torch.empty(q.shape)
        self._module.paged_decode(
            q.numpy(), self._k, self._v, block_table.numpy(), seq_lens.numpy(), out.numpy(), None,
            sm_scale=sm_scale, v_scale=1.0, window_left=window_left, logits_soft_cap=0.0, sinks=None,
            split_size=None, cache_dtype="float32",
        )  # fmt: skip
        return out

    def _plain(self, rows: Array) -> bool:
        """Float32 rows [n, heads, head_dim] on the host with adjacent channels."""
        return (
            type(rows) is self._torch.Tensor
            and rows.is_cpu
            and rows.dtype == self._torch.float32
            and rows.dim() == 3
            and rows.shape[2] == self._head_dim
            and rows.stride(2) == 1
            and not rows.requires_grad
        )

    def _plain_table(self, table: Array, num_axes: int) -> bool:
        return (
            type(table) is self._torch.Tensor
            and table.is_cpu
            and table.dtype == self._torch.int32
            and table.dim() == num_axes
            and table.stride(-1) == 1
        )
