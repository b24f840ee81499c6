# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""The kernels as PyTorch operators, ``torch.ops.kvxfer.*``: for torch.compile and CUDA graphs.

Importing this module imports torch and registers the operators, once. Each takes what the function of the same
name in :mod:`kvxfer.kernels` takes, with the same meaning, checks and errors, less ``out``, ``return_lse``,
``kv_dtype`` (a tensor's dtype says it) and ``backend``; attention returns ``(out, lse)``, always new tensors. An
operator is opaque to the compiler, which learns shapes and dtypes from its fake implementation and what it writes
from its schema. The launch uses the current stream and never synchronises. None has a gradient: to go backward
through one raises :class:`UnavailableError`.

    import kvxfer.kernels.torch_ops
    out, lse = torch.ops.kvxfer.paged_decode(q, k_cache, v_cache, block_table, seq_lens)

A decode plan is two tensors, which :func:`plan_tensors` makes, so that the next step's plan does not compile anew:
``paged_decode(..., **plan_tensors(plan))``. A CUDA graph that was captured with a plan replays that plan, for its
lengths alone; without one it stays right when lengths change.

The copies and ``checksum_blocks`` take a layout as text, which :func:`layout_text` makes: an operator takes no
objects, and a number that stands for one would mean nothing to a graph that was saved and loaded in another process.
Block ids are int64 tensors on the host, whose values the compiler does not look at, so other blocks do not compile
anew. ``pack_blocks`` returns a new uint8 tensor, ``checksum_blocks`` uint64 on the host (of a GPU's cache it waits
for the device).

    text = layout_text(layout)
    packed = torch.ops.kvxfer.pack_blocks(text, [pool], torch.tensor([3, 7]), num_tokens=20)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from kvxfer import kernels
from kvxfer.errors import LayoutError, UnavailableError
from kvxfer.kernels._sides import token_range
from kvxfer.kernels._wire import wire_side
from kvxfer.kernels.torch_ops_plan import PLAN, plan_of, plan_tensors
from kvxfer.layout import KVLayout

__all__ = ["layout_text", "plan_tensors"]

_CACHES = "Tensor k_cache, Tensor v_cache"
# In front of the star, though meant to be named: autograd takes no tensors behind it.
_OPTIONAL = ("sinks", "k_scale_cache", "v_scale_cache")
_NUMBERS = (
    "*, float? sm_scale=None, str kv_layout='NHD', int window_left=-1, float logits_soft_cap=0.0, "
    "float k_scale=1.0, float v_scale=1.0"
)


def _optional(*names: str) -> str:
    return ", ".join(f"Tensor? {name}=None" for name in names)


def layout_text(layout: KVLayout) -> str:
    """The layout as the operators take it: JSON of :meth:`KVLayout.to_wire`, equal for equal layouts."""
    return json.dumps(layout.to_wire(), sort_keys=True, separators=(",", ":"))


@lru_cache(maxsize=256)
def _layout(text: str) -> KVLayout:
    """The layout of a text, validated once."""
    try:
        message = json.loads(text)
    except json.JSONDecodeError as error:
        raise LayoutError("text", f"expected what layout_text() returns: {error}") from error
    return KVLayout.from_wire(message)


def _register(
    schema: str, run: Callable[..., Any], fake: Callable[..., Any], *, floats: bool = False
) -> None:
    """One operator: its implementation on every device, and what the compiler may know of it.

    Args:
        floats: returns new tensors that autograd could ask the gradient of; to go backward through it is an error.
    """
    name = f"kvxfer::{schema[: schema.index('(')]}"
    _LIBRARY.define(schema)  # type: ignore[no-untyped-call]
    torch.library.impl(name, "default", run, lib=_LIBRARY)
    torch.library.register_fake(name, fake, lib=_LIBRARY)
    if floats:
        torch.library.register_autograd(name, partial(_no_gradient, name), lib=_LIBRARY)


def _no_gradient(name: str, context: Any, *gradients: Tensor) -> None:
    op = name.replace("::", ".")
    reason = f"torch.ops.{op} has no gradient"
    raise UnavailableError(
        f"{reason}; call it under torch.no_grad(), or on detached tensors", reason=reason
    )


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
    options |= dict(zip((*_OPTIONAL, *PLAN), tensors[5:], strict=False))
    plan = plan_of(*(options.pop(name, None) for name in PLAN))
    out, lse = kernels.paged_decode(*tensors[:5], return_lse=True, plan=plan, **options)
    return out, lse


def _paged_prefill(*tensors: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    options |= dict(zip(_OPTIONAL, tensors[6:], strict=False))
    out, lse = kernels.paged_prefill(*tensors[:6], return_lse=True, **options)
    return out, lse


def _mla_decode(*tensors: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    out, lse = kernels.mla_decode(*tensors, return_lse=True, **options)
    return out, lse


def _rows_like(q: Tensor, width: int | torch.SymInt) -> tuple[Tensor, Tensor]:
    rows, heads = q.shape[:2]
    return q.new_empty((rows, heads, width)), q.new_empty((rows, heads), dtype=torch.float32)


def _copy_blocks(
    src_layout: str,
    src: list[Tensor],
    dst_layout: str,
    dst: list[Tensor],
    src_blocks: Tensor,
    dst_blocks: Tensor,
    **options: Any,
) -> None:
    kernels.copy_blocks(
        _layout(src_layout), src, _layout(dst_layout), dst, src_blocks, dst_blocks, **options
    )


def _pack_blocks(
    layout: str,
    tensors: list[Tensor],
    block_ids: Tensor,
    *,
    heads: Sequence[int] | None = None,
    out_layout: str | None = None,
    **options: Any,
) -> Tensor:
    wire = None if out_layout is None else _layout(out_layout)
    packed: Tensor = kernels.pack_blocks(
        _layout(layout), tensors, block_ids, heads=_range(heads), out_layout=wire, **options
    )
    return packed


def _unpack_blocks(
    src: Tensor,
    layout: str,
    tensors: list[Tensor],
    block_ids: Tensor,
    *,
    heads: Sequence[int] | None = None,
    src_layout: str | None = None,
    **options: Any,
) -> None:
    wire = None if src_layout is None else _layout(src_layout)
    kernels.unpack_blocks(
        src, _layout(layout), tensors, block_ids, heads=_range(heads), src_layout=wire, **options
    )


def _checksum_blocks(
    layout: str,
    tensors: list[Tensor],
    block_ids: Tensor,
    *,
    heads: Sequence[int] | None = None,
    **options: Any,
) -> Tensor:
    sums = kernels.checksum_blocks(
        _layout(layout), tensors, block_ids, heads=_range(heads), **options
    )
    return torch.from_numpy(sums)


def _range(heads: Sequence[int] | None) -> tuple[int, int] | None:
    if heads is None:
        return None
    first, end = heads
    return int(first), int(end)


def _packed_shape(
    layout: str,
    tensors: list[Tensor],
    block_ids: Tensor,
    *,
    num_tokens: int | None = None,
    first_token: int = 0,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    out_layout: str | None = None,
    max_ctas: int = 0,
) -> Tensor:
    if out_layout is not None:
        return tensors[0].new_empty((_layout(out_layout).nbytes,), dtype=torch.uint8)
    known = _layout(layout)
    first, end = token_range(known, block_ids, num_tokens, first_token)
    chosen = list(known.layers if layers is None else layers)
    wire = wire_side(known, end - first, chosen, _range(heads) or known.head_range)
    return tensors[0].new_empty((wire.nbytes,), dtype=torch.uint8)


def _sum_shape(
    layout: str, tensors: list[Tensor], block_ids: Tensor, *, layers: Any = None, **options: Any
) -> Tensor:
    count = len(_layout(layout).layers if layers is None else layers)
    return torch.empty((count,), dtype=torch.uint64, device="cpu")


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
    f"paged_decode(Tensor q, {_CACHES}, Tensor block_table, Tensor seq_lens, {_optional(*_OPTIONAL, *PLAN)}, "
    f"{_NUMBERS}, int? split_size=None) -> (Tensor, Tensor)",
    _paged_decode,
    _attention_shapes,
    floats=True,
)
_register(
    f"paged_prefill(Tensor q, {_CACHES}, Tensor cu_seqlens_q, Tensor block_table, Tensor seq_lens, "
    f"{_optional(*_OPTIONAL)}, {_NUMBERS}, bool causal=True, "
    "bool batch_invariant=False) -> (Tensor, Tensor)",
    _paged_prefill,
    _attention_shapes,
    floats=True,
)
_register(
    "mla_decode(Tensor q_latent, Tensor q_rope, Tensor latent_cache, Tensor block_table, Tensor seq_lens, *, "
    "float sm_scale, float kv_scale=1.0, int? split_size=None) -> (Tensor, Tensor)",
    _mla_decode,
    _mla_shapes,
    floats=True,
)
_register(
    "merge_states(Tensor v_a, Tensor lse_a, Tensor v_b, Tensor lse_b) -> (Tensor, Tensor)",
    kernels.merge_states,
    _merge_shapes,
    floats=True,
)

_TOKENS = "int? num_tokens=None, int first_token=0, int[]? layers=None"
_register(
    "copy_blocks(str src_layout, Tensor[] src, str dst_layout, Tensor(a!)[] dst, Tensor src_blocks, "
    f"Tensor dst_blocks, *, {_TOKENS}, int max_ctas=0) -> ()",
    _copy_blocks,
    _nothing,
)
_register(
    f"pack_blocks(str layout, Tensor[] tensors, Tensor block_ids, *, {_TOKENS}, int[]? heads=None, "
    "str? out_layout=None, int max_ctas=0) -> Tensor",
    _pack_blocks,
    _packed_shape,
)
_register(
    f"unpack_blocks(Tensor src, str layout, Tensor(a!)[] tensors, Tensor block_ids, *, {_TOKENS}, "
    "int[]? heads=None, str? src_layout=None, int max_ctas=0) -> ()",
    _unpack_blocks,
    _nothing,
)
_register(
    f"checksum_blocks(str layout, Tensor[] tensors, Tensor block_ids, *, {_TOKENS}, int[]? heads=None) "
    "-> Tensor",
    _checksum_blocks,
    _sum_shape,
)
