# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""The orders that today's engines use, each checked against a tensor built the engine's way in the tests.

Each function is a classmethod of ``KVLayout``; keywords that are not named here are ``from_order``'s.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from kvxfer.errors import LayoutError
from kvxfer.layout.parts import as_int

if TYPE_CHECKING:
    from kvxfer.layout.kv_layout import KVLayout

T = TypeVar("T")

__all__ = ["flashinfer", "fused", "hnd", "mla", "nhd", "sglang", "trtllm", "vllm", "vllm_split"]

VLLM_ORDERS = ("LBHNC", "LBNHC", "LHBNC", "BLHNC", "BLNHC", "BHLNC")


def _choose(field: str, value: str, known: dict[str, T]) -> T:
    if value not in known:
        raise LayoutError(field, f"{value!r} is not one of {', '.join(known)}")
    return known[value]


def nhd(cls: type[KVLayout], /, **shape: Any) -> KVLayout:
    """Per layer K then V, each ``[blocks, tokens, heads, dim]``."""
    return cls.from_order("LKBNHC", **shape)


def hnd(cls: type[KVLayout], /, **shape: Any) -> KVLayout:
    """Per layer K then V, each ``[blocks, heads, tokens, dim]``."""
    return cls.from_order("LKBHNC", **shape)


def fused(cls: type[KVLayout], /, *, kv_layout: str = "HND", **shape: Any) -> KVLayout:
    """K and V packed in one row of ``head_dim + head_dim_v``, head-major or token-major in the block."""
    return cls.from_order(
        _choose("kv_layout", kv_layout, {"HND": "LBHNKC", "NHD": "LBNHKC"}), **shape
    )


def mla(cls: type[KVLayout], /, *, latent_dim: int, order: str = "LBNC", **shape: Any) -> KVLayout:
    """One latent (with its rope part) a token, e.g. ``latent_dim=576``; the same on every TP rank."""
    return cls.from_order(order, kind="mla", num_kv_heads=1, head_dim=latent_dim, **shape)


def vllm(cls: type[KVLayout], /, *, order: str = "LBHNC", **shape: Any) -> KVLayout:
    """vLLM >= 0.26, where C holds K then V: ``order`` is one of its six names.

    LBHNC, LBNHC, LHBNC, BLHNC, BLNHC, BHLNC, which is also the order in memory.
    """
    if order not in VLLM_ORDERS:
        raise LayoutError("order", f"{order!r} is not one of vLLM's {', '.join(VLLM_ORDERS)}")
    return cls.from_order(order[:-1] + "KC", **shape)


def vllm_split(
    cls: type[KVLayout],
    /,
    *,
    backend: str = "flash_attn",
    kv_layout: str | None = None,
    **shape: Any,
) -> KVLayout:
    """vLLM before 0.26: ``[2,B,N,H,D]`` a layer; FlashInfer ``[B,2,N,H,D]``; the CPU ``[2,B,H,N,D]``.

    ``kv_layout``: ``"NHD"`` (None: that) or ``"HND"``, as VLLM_KV_CACHE_LAYOUT had it, which swaps N and H. The CPU has
    its own only.
    """
    if backend == "flashinfer":
        return flashinfer(cls, kv_layout=kv_layout or "NHD", **shape)
    orders = _choose(
        "backend",
        backend,
        {"flash_attn": {"NHD": "LKBNHC", "HND": "LKBHNC"}, "cpu": {"HND": "LKBHNC"}},
    )
    return cls.from_order(_choose("kv_layout", kv_layout or next(iter(orders)), orders), **shape)


def flashinfer(
    cls: type[KVLayout], /, *, kv_layout: str = "NHD", pair: bool = False, **shape: Any
) -> KVLayout:
    """FlashInfer's 5-D cache ``[B,2,N,H,D]`` or ``[B,2,H,N,D]``, or its (K, V) pair for each layer."""
    inner = _choose("kv_layout", kv_layout, {"NHD": "NHC", "HND": "HNC"})
    return cls.from_order(("LKB" if pair else "LBK") + inner, **shape)


def sglang(
    cls: type[KVLayout], /, *, num_slots: int, page_size: int = 1, mla: bool = False, **shape: Any
) -> KVLayout:
    """SGLang's token pools: K buffers of all layers, then V buffers, each ``[slots + page, heads, dim]``.

    Slot 0 (with pages: page 0) is its dummy and a legal id here. Separate allocations: ``with_bases``.
    ``mla=True``: one latent a slot; ``num_kv_heads`` is 1 and ``head_dim`` its width, the rope part included.
    """
    for name in ("num_blocks", "block_size"):
        if name in shape:
            raise LayoutError(name, "SGLang's pools are given by num_slots and page_size")
    page_size = as_int("page_size", page_size, minimum=1)
    num_slots = as_int("num_slots", num_slots, minimum=1)
    if num_slots % page_size:
        raise LayoutError("num_slots", f"{num_slots} is no multiple of page_size {page_size}")
    return cls.from_order(
        "LBNC" if mla else "KLBNHC",
        num_blocks=num_slots // page_size + 1,
        block_size=page_size,
        **shape,
    )


def trtllm(cls: type[KVLayout], /, *, mla: bool = False, **shape: Any) -> KVLayout:
    """TensorRT-LLM's pool ``[blocks, layers, 2, heads*tokens*dim]``; one group for each of its pools.

    ``mla=True``: one latent a token; ``num_kv_heads`` is 1 and ``head_dim`` its width.
    """
    return cls.from_order("BLNC" if mla else "BLKHNC", **shape)
