# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Paged attention and KV-cache kernels: one set of functions, several backends, one truth (``reference``).

Arrays are NumPy (bfloat16 as ``uint16``) or torch tensors; what goes in comes out. torch is never
imported here: a caller who holds a tensor has imported it already. ``torch.ops.kvxfer`` (for
torch.compile) is there after ``import kvxfer.kernels.torch_ops``.
"""

from __future__ import annotations

from kvxfer.kernels._dispatch import (
    backend_reasons,
    build_info,
    explain,
    get_num_threads,
    set_num_threads,
)
from kvxfer.kernels.append import append_kv
from kvxfer.kernels.attention import merge_states, paged_decode, paged_prefill
from kvxfer.kernels.bound import BoundCache
from kvxfer.kernels.cache import copy_blocks, pack_blocks, unpack_blocks
from kvxfer.kernels.checksum import checksum_blocks
from kvxfer.kernels.mla import mla_decode
from kvxfer.kernels.plan import DecodePlan, plan_decode
from kvxfer.kernels.staging import pack_plan, unpack_plan

__all__ = [
    "BoundCache",
    "DecodePlan",
    "append_kv",
    "backend_reasons",
    "build_info",
    "checksum_blocks",
    "copy_blocks",
    "explain",
    "get_num_threads",
    "merge_states",
    "mla_decode",
    "pack_blocks",
    "pack_plan",
    "paged_decode",
    "paged_prefill",
    "plan_decode",
    "set_num_threads",
    "unpack_blocks",
    "unpack_plan",
]
