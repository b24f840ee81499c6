# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""MLA for a backend whose paged decode takes any widths and strides: it is one KV head that all heads share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["mla_by_decode"]

NpArray = npt.NDArray[Any]


def mla_by_decode(
    decode: Callable[..., None],
    q_latent: NpArray,
    q_rope: NpArray,
    latent_cache: NpArray,
    block_table: NpArray,
    seq_lens: NpArray,
    out: NpArray,
    lse: npt.NDArray[np.float32] | None,
    *,
    sm_scale: float,
    kv_scale: float,
    split_size: int | None,
    cache_dtype: str,
) -> None:
    """All heads over one KV head whose value is the front of its key."""
    rows = latent_cache[:, :, None, :]
    decode(
        np.concatenate([q_latent, q_rope], axis=2),
        rows,
        rows[..., : q_latent.shape[2]],
        block_table,
        seq_lens,
        out,
        lse,
        sm_scale=sm_scale * kv_scale,
        v_scale=kv_scale,
        window_left=-1,
        logits_soft_cap=0.0,
        sinks=None,
        split_size=split_size,
        cache_dtype=cache_dtype,
    )
