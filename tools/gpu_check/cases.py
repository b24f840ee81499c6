# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""The attention cases of the benchmark: Llama-3-8B's heads over blocks of 16 in random order."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from timing import num_sets

NUM_Q_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE = 32, 8, 128, 16

DECODE = [
    (f"batch {batch}, context {context}", [context] * batch)
    for batch in (1, 4, 16, 64, 128, 256)
    for context in (1024, 4096, 8192, 16384, 32768)
]
DECODE.append(("batch 16, one of 32768, the rest of 512", [32768] + [512] * 15))
_lengths = (torch.randn(64, generator=torch.Generator().manual_seed(1)) + 7.6).exp()
DECODE.append(("batch 64, lognormal lengths", _lengths.clamp(17, 32768).int().tolist()))

PREFILL = [
    ("1 x 2048", [2048], [2048]),
    ("1 x 8192", [8192], [8192]),
    ("4 x 4096", [4096] * 4, [4096] * 4),
    ("16 x 1024", [1024] * 16, [1024] * 16),
    ("8 x 512 new of 8192", [512] * 8, [8192] * 8),
    ("1 x 2048 new of 32768", [2048], [32768]),
]


@dataclass(frozen=True)
class Pages:
    """One set of blocks for all sequences, as a table and as FlashInfer's lists."""

    table: torch.Tensor  # int32 [batch, max_blocks]
    indptr: torch.Tensor  # int32 [batch + 1]
    indices: torch.Tensor  # int32 [blocks]
    last: torch.Tensor  # int32 [batch], tokens in each last block


@dataclass(frozen=True)
class DecodeCase:
    name: str
    lengths: list[int]
    pool: torch.Tensor  # [blocks, 2, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM]
    q: torch.Tensor
    lens: torch.Tensor  # int32 [batch]
    sets: list[Pages]
    outs: list[torch.Tensor]
    num_q_heads: int = NUM_Q_HEADS
    num_kv_heads: int = NUM_KV_HEADS
    head_dim: int = HEAD_DIM
    block_size: int = BLOCK_SIZE

    @property
    def k(self) -> torch.Tensor:
        return self.pool[:, 0]

    @property
    def v(self) -> torch.Tensor:
        return self.pool[:, 1]

    @property
    def kv_nbytes(self) -> int:
        return sum(self.lengths) * 2 * NUM_KV_HEADS * HEAD_DIM * self.pool.element_size()


@dataclass(frozen=True)
class PrefillCase(DecodeCase):
    new: tuple[int, ...] = ()
    cu_seqlens_q: torch.Tensor = field(default_factory=torch.Tensor)

    @property
    def flops(self) -> int:
        pairs = sum(n * m - n * (n - 1) // 2 for n, m in zip(self.new, self.lengths, strict=True))
        return 4 * NUM_Q_HEADS * HEAD_DIM * pairs


def make_pool(dtype: torch.dtype, num_blocks: int) -> torch.Tensor:
    pool = torch.empty(
        num_blocks, 2, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM, dtype=dtype, device="cuda"
    )
    for part in pool.split(4096):
        part.copy_(torch.randn(part.shape, dtype=torch.bfloat16, device="cuda"))
    return pool


def blocks_of(lengths: list[int]) -> int:
    return sum(-(-n // BLOCK_SIZE) for n in lengths)


def make_pages(pool: torch.Tensor, lengths: list[int], most: int = 64) -> list[Pages]:
    """Disjoint sets of random blocks."""
    per_sequence = [-(-n // BLOCK_SIZE) for n in lengths]
    total = sum(per_sequence)
    count = num_sets(total * pool[0].nbytes, min(most, len(pool) // total))
    order = torch.randperm(len(pool), device="cuda").int()
    indptr = torch.tensor([0, *per_sequence]).cumsum(0).int()
    last = torch.tensor([(n - 1) % BLOCK_SIZE + 1 for n in lengths], dtype=torch.int32)
    sets = []
    for index in range(count):
        ids = order[index * total : (index + 1) * total].contiguous()
        table = torch.zeros(len(lengths), max(per_sequence), dtype=torch.int32, device="cuda")
        for row, (first, blocks) in enumerate(zip(indptr.tolist(), per_sequence, strict=False)):
            table[row, :blocks] = ids[first : first + blocks]
        sets.append(Pages(table, indptr.cuda(), ids, last.cuda()))
    return sets


def decode_case(name: str, pool: torch.Tensor, lengths: list[int]) -> DecodeCase:
    q = torch.randn(len(lengths), NUM_Q_HEADS, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
    sets = make_pages(pool, lengths)
    lens = torch.tensor(lengths, dtype=torch.int32, device="cuda")
    return DecodeCase(name, lengths, pool, q, lens, sets, [torch.empty_like(q) for _ in sets])


def prefill_case(name: str, pool: torch.Tensor, new: list[int], lengths: list[int]) -> PrefillCase:
    q = torch.randn(sum(new), NUM_Q_HEADS, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
    lens = torch.tensor(lengths, dtype=torch.int32, device="cuda")
    starts = torch.tensor([0, *new]).cumsum(0).int().cuda()
    sets = make_pages(
        pool, lengths, most=1
    )  # bound by arithmetic: where the keys are does not matter
    return PrefillCase(
        name, lengths, pool, q, lens, sets, [torch.empty_like(q)], new=tuple(new), cu_seqlens_q=starts
    )  # fmt: skip


def attention_error(case: DecodeCase, new: int, out: torch.Tensor) -> float:
    """Of the last sequence's last `new` rows: norm of the difference over norm of the float32 result."""
    length = case.lengths[-1]
    blocks = case.sets[0].table[-1, : -(-length // BLOCK_SIZE)].long()
    group = NUM_Q_HEADS // NUM_KV_HEADS
    k, v = (
        part[blocks].float().reshape(-1, NUM_KV_HEADS, HEAD_DIM)[:length].repeat_interleave(group, 1)
        for part in (case.k, case.v)
    )  # fmt: skip
    logits = torch.einsum("qhd,khd->hqk", case.q[-new:].float(), k) * HEAD_DIM**-0.5
    position = torch.arange(length - new, length, device="cuda")
    hidden = torch.arange(length, device="cuda")[None, :] > position[:, None]
    weights = logits.masked_fill(hidden, -torch.inf).softmax(-1)
    want = torch.einsum("hqk,khd->qhd", weights, v)
    return float((out[-new:].float() - want).norm() / want.norm())
