# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Triton kernels for NVIDIA GPUs; on host tensors they run under Triton's interpreter, for tests.

The functions are a backend of ``kvxfer.kernels`` (see ``_dispatch``): arguments come checked, caches as
views ``[block, token, head, channel]`` of any strides. No launch synchronises, but for the opt-in check
of device-side ids (``KVXFER_CHECK_DEVICE_IDS=1``); ``checksum_blocks``, whose result is on the host, does.

``tune_prefill`` measures the tiles of ``paged_prefill`` on this GPU when it is called, and at no other time.
"""

from __future__ import annotations

from kvxfer.kernels._arrays import CACHE_DTYPES
from kvxfer.kernels.triton._common import describe, unavailable
from kvxfer.kernels.triton.append import append_kv
from kvxfer.kernels.triton.attention_decode import paged_decode
from kvxfer.kernels.triton.attention_prefill import paged_prefill
from kvxfer.kernels.triton.checksum import checksum_blocks
from kvxfer.kernels.triton.copy import copy_blocks
from kvxfer.kernels.triton.merge import merge_states
from kvxfer.kernels.triton.mla import mla_decode
from kvxfer.kernels.triton.tuning import tune_prefill

TAKES_NUMPY = False
SCALES = True
TILES_BY_BATCH = True

__all__ = [
    "CACHE_DTYPES",
    "SCALES",
    "TAKES_NUMPY",
    "TILES_BY_BATCH",
    "append_kv",
    "checksum_blocks",
    "copy_blocks",
    "describe",
    "merge_states",
    "mla_decode",
    "paged_decode",
    "paged_prefill",
    "tune_prefill",
    "unavailable",
]
