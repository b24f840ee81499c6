# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Drives a Runner without a scheduler: many prompts at once, in odd chunks, prefill beside decode."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from kvxfer.server.config import load_config
from kvxfer.server.engine.runner import Batch, BatchItem, Runner
from kvxfer.server.model import CausalLM
from kvxfer.server.weights import load_weights

__all__ = ["greedy_answers", "make_cache", "make_runner"]


def make_cache(
    num_layers: int,
    num_blocks: int,
    block_size: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype = torch.float32,
) -> list[tuple[Tensor, Tensor]]:
    """Head-major storage seen token-major, as the server's layout is; NaN wherever nothing was written."""

    def empty() -> Tensor:
        storage = torch.full((num_blocks, num_kv_heads, block_size, head_dim), float("nan"))
        return storage.to(dtype).permute(0, 2, 1, 3)

    return [(empty(), empty()) for _ in range(num_layers)]


def make_runner(
    model_dir: str | Path,
    num_blocks: int,
    *,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    num_threads: int = 1,
) -> tuple[Runner, list[tuple[Tensor, Tensor]]]:
    """A runner of this checkpoint and its cache."""
    cfg = load_config(model_dir)
    shape = (cfg.num_layers, num_blocks, block_size, cfg.num_kv_heads, cfg.head_dim)
    cache = make_cache(*shape, dtype)
    model = CausalLM(cfg, load_weights(model_dir, cfg, dtype), dtype)
    return Runner(model, cache, block_size, num_threads=num_threads), cache


def greedy_answers(
    runner: Runner,
    prompts: Sequence[Sequence[int]],
    n: int,
    *,
    num_blocks: int,
    chunk: int = 512,
    budget: int = 512,
    seed: int = 0,
) -> list[list[int]]:
    """``n`` greedy ids per prompt. Each step takes a random part of the unfinished prompts, in random order,
    at most ``chunk`` tokens of each and ``budget`` in all, and blocks are dealt out at random."""
    generator = random.Random(seed)
    free = list(range(num_blocks))
    generator.shuffle(free)
    ids = [list(prompt) for prompt in prompts]
    computed = [0] * len(ids)
    blocks = []
    for prompt in prompts:
        needed = -(-(len(prompt) + n) // runner.block_size)
        blocks.append([free.pop() for _ in range(needed)])
    while pending := [i for i, p in enumerate(prompts) if len(ids[i]) < len(p) + n]:
        chosen = generator.sample(pending, generator.randint(1, len(pending)))
        items, members, left = [], [], budget
        for i in chosen:
            count = min(chunk, left, len(ids[i]) - computed[i])
            if count == 0:
                continue
            begin, end = computed[i], computed[i] + count
            items.append(BatchItem(ids[i][begin:end], begin, blocks[i], end == len(ids[i])))
            members.append(i)
            computed[i], left = end, left - count
        sampled = [i for i, item in zip(members, items, strict=True) if item.sample]
        logits = runner.run(Batch(items))
        for i, token in zip(sampled, logits.argmax(dim=-1).tolist(), strict=True):
            ids[i].append(token)
    return [one[len(prompt) :] for one, prompt in zip(ids, prompts, strict=True)]
