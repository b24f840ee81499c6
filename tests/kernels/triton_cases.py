# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Paged caches for the Triton tests: scattered blocks, NaN wherever nothing may be read."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from kvxfer.kernels.triton._common import INTERPRETED  # noqa: E402

needs_interpreter = pytest.mark.skipif(
    not INTERPRETED, reason="host tensors need TRITON_INTERPRET=1 before triton is imported"
)


@dataclass
class Paged:
    """A cache, its table and the lengths of its sequences."""

    k: torch.Tensor  # [block, token, head, channel] by strides
    v: torch.Tensor
    table: torch.Tensor
    lens: torch.Tensor

    @property
    def arguments(self) -> tuple[torch.Tensor, ...]:
        return self.k, self.v, self.table, self.lens


def paged(
    lengths: list[int],
    *,
    block_size: int,
    num_kv_heads: int = 2,
    head_dim: int = 64,
    head_dim_v: int | None = None,
    dtype: torch.dtype = torch.float32,
    order: str = "NHD",
    window_left: int = -1,
    num_new: list[int] | None = None,
    seed: int = 0,
) -> Paged:
    """Sequences over scattered blocks. Blocks in front of every window are holes (-1) of the table."""
    torch.manual_seed(seed)
    wide = head_dim if head_dim_v is None else head_dim_v
    counts = [-(-n // block_size) for n in lengths]
    num_blocks = sum(counts) + 3
    k = _cache(num_blocks, block_size, num_kv_heads, head_dim, dtype, order)
    v = _cache(num_blocks, block_size, num_kv_heads, wide, dtype, order)
    table = torch.full((len(lengths), max([*counts, 1]) + 1), -1, dtype=torch.int32)
    ids = torch.randperm(num_blocks)
    for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        mine, ids = ids[:count], ids[count:]
        new = 1 if num_new is None else num_new[row]
        low = 0 if window_left < 0 else max(0, length - new - window_left)
        for at, block in enumerate(mine.tolist()):
            first = at * block_size
            if first + block_size <= low:
                continue
            table[row, at] = block
            begin, end = max(low - first, 0), min(length - first, block_size)
            k[block, begin:end] = torch.randn(end - begin, num_kv_heads, head_dim).to(dtype)
            v[block, begin:end] = torch.randn(end - begin, num_kv_heads, wide).to(dtype)
    return Paged(k, v, table, torch.tensor(lengths, dtype=torch.int32))


def _cache(
    blocks: int, size: int, heads: int, width: int, dtype: torch.dtype, order: str
) -> torch.Tensor:
    """NaN everywhere; one more token and head in memory than the view shows, so that strides matter."""
    nan = float("nan")
    if order == "NHD":
        return torch.full((blocks, size + 1, heads + 1, width), nan, dtype=dtype)[:, :size, :heads]
    whole = torch.full((blocks, heads + 1, size + 1, width), nan, dtype=dtype)
    return whole[:, :heads, :size].permute(0, 2, 1, 3)
