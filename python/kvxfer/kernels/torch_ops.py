# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""The attention and append functions as PyTorch operators, ``torch.ops.kvxfer.*``: for torch.compile and CUDA graphs.

Importing this module imports torch and registers the operators, once. Each takes what the function of the same
name in :mod:`kvxfer.kernels` takes, with the same meaning, checks and errors, less ``out``, ``return_lse``,
``kv_dtype`` (a tensor's dtype says it) and ``backend``; attention returns ``(out, lse)``, always new tensors. An
operator is opaque to the compiler, which learns shapes and dtypes from its fake implementation and what it writes
from its schema. The launch uses the current stream and never synchronises.

    import kvxfer.kernels.torch_ops
    out, lse = torch.ops.kvxfer.paged_decode(q, k_cache, v_cache, block_table, seq_lens)

The copies and ``checksum_blocks`` take layouts, which are no operator arguments, and belong outside of a graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvxfer import kernels

__all__: list[str] = []

_CACHES = "Tensor k_cache, Tensor v_cache"
_SCALES = (
    "float k_scale=1.0, float v_scale=1.0, Tensor? k_scale_cache=None, Tensor? v_scale_cache=None"
)
_ATTENTION = (
    "float? sm_scale=None, str kv_layout='NHD', int window_left=-1, float logits_soft_cap=0.0, "
    f"Tensor? sinks=None, {_SCALES}"
)


def _register(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """One operator: its implementation on every device, and what the compiler may know of it."""
    name = f"kvxfer::{schema[: schema.index('(')]}"
    _LIBRARY.define(schema)  # type: ignore[no-untyped-call]
    torch.library.impl(name, "default", run, lib=_LIBRARY)
    torch.library.register_fake(name, fake, lib=_LIBRARY)


def _append_kv(
    key: Tensor,
    value: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    **options: Any,
) -> None:
    kernels.append_kv(key, value, k_cache, v_cache, slot_mapping, **options)


def _paged_decode(*tensors: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    out, lse = kernels.paged_decode(*tensors, return_lse=True, **options)
    return out, lse


def _paged_prefill(*tensors: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    out, lse = kernels.paged_prefill(*tensors, return_lse=True, **options)
    return out, lse


def _mla_decode(*tensors: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    out, lse = kernels.mla_decode(*tensors, return_lse=True, **options)
    return out, lse


def _rows_like(q: Tensor, width: int | torch.SymInt) -> tuple[Tensor, Tensor]:
    rows, heads = q.shape[:2]
    return q.new_empty((rows, heads, width)), q.new_empty((rows, heads), dtype=torch.float32)


def _nothing(*tensors: Tensor, **options: Any) -> None:
    return None


def _attention_shapes(q: Tensor, k_cache: Tensor, v_cache: Tensor, *rest: Tensor, **options: Any) -> Any:  # fmt: skip
    return _rows_like(q, v_cache.shape[3])


def _mla_shapes(q_latent: Tensor, *rest: Tensor, **options: Any) -> Any:
    return _rows_like(q_latent, q_latent.shape[2])


def _merge_shapes(v_a: Tensor, lse_a: Tensor, v_b: Tensor, lse_b: Tensor) -> Any:
    return torch.empty_like(v_a, memory_format=torch.contiguous_format), lse_a.new_empty(lse_a.shape)  # fmt: skip


# A global, since it unregisters when it is collected.
_LIBRARY = torch.library.Library("kvxfer", "DEF")  # type: ignore[no-untyped-call]

_register(
    "append_kv(Tensor key, Tensor value, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slot_mapping, *, "
    "str kv_layout='NHD', float k_scale=1.0, float v_scale=1.0, Tensor(c!)? k_scale_cache=None, "
    "Tensor(d!)? v_scale_cache=None) -> ()",
    _append_kv,
    _nothing,
)
_register(
    f"paged_decode(Tensor q, {_CACHES}, Tensor block_table, Tensor seq_lens, *, {_ATTENTION}, "
    "int? split_size=None) -> (Tensor, Tensor)",
    _paged_decode,
    _attention_shapes,
)
_register(
    f"paged_prefill(Tensor q, {_CACHES}, Tensor cu_seqlens_q, Tensor block_table, Tensor seq_lens, *, "
    f"bool causal=True, {_ATTENTION}) -> (Tensor, Tensor)",
    _paged_prefill,
    _attention_shapes,
)
_register(
    "mla_decode(Tensor q_latent, Tensor q_rope, Tensor latent_cache, Tensor block_table, Tensor seq_lens, *, "
    "float sm_scale, float kv_scale=1.0, int? split_size=None) -> (Tensor, Tensor)",
    _mla_decode,
    _mla_shapes,
)
_register(
    "merge_states(Tensor v_a, Tensor lse_a, Tensor v_b, Tensor lse_b) -> (Tensor, Tensor)",
    kernels.merge_states,
    _merge_shapes,
)
