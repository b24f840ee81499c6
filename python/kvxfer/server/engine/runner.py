# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Turns a scheduled batch (lists of ids) into tensors and runs the model over the cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvxfer import kernels
from kvxfer.errors import InternalError, InvalidArgumentError
from kvxfer.server.model import CausalLM, StepInputs

__all__ = ["Batch", "BatchItem", "Runner", "torch_views"]


@dataclass(slots=True)
class BatchItem:
    """Compute these tokens of one sequence, whose earlier KV is in its blocks."""

    token_ids: list[int]
    position: int  # of the first of token_ids
    block_ids: list[int]  # of the sequence, from its token 0 on; may reach further than needed
    sample: bool  # logits of the last token are wanted


@dataclass(slots=True)
class Batch:
    items: list[BatchItem] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(len(item.token_ids) for item in self.items)


def torch_views(
    views: Sequence[Sequence[np.ndarray[Any, Any]]], dtype: torch.dtype
) -> list[tuple[Tensor, Tensor]]:
    """``KVLayout.views`` as tensors over the same bytes; NumPy has no bfloat16 and lends uint16."""
    pairs = []
    for layer, parts in enumerate(views):
        if len(parts) != 2:
            raise InvalidArgumentError(f"layer {layer} has {len(parts)} parts, not k and v")
        k, v = (torch.from_numpy(part).view(dtype) for part in parts)
        pairs.append((k, v))
    return pairs


class Runner:
    """The model over one cache. Only the engine thread calls it."""

    def __init__(
        self,
        model: CausalLM,
        cache_views: Sequence[tuple[Tensor, Tensor]],
        block_size: int,
        *,
        num_threads: int,
    ) -> None:
        cfg = model.cfg
        expected = (block_size, cfg.num_kv_heads, cfg.head_dim)
        if len(cache_views) != cfg.num_layers:
            raise InvalidArgumentError(
                f"cache has {len(cache_views)} layers, model {cfg.num_layers}"
            )
        for view in chain.from_iterable(cache_views):
            if view.shape[1:] != expected or view.dtype != model.dtype:
                raise InvalidArgumentError(
                    f"cache view is {view.dtype} {list(view.shape)}, "
                    f"model needs {model.dtype} [num_blocks, {', '.join(map(str, expected))}]"
                )
        self.model = model
        self.block_size = block_size
        self._cache = [kernels.BoundCache(k, v) for k, v in cache_views]
        self.set_num_threads(num_threads)

    def set_num_threads(self, num_threads: int) -> None:
        """Of torch and the kernels, process-wide. Workers that share cores must share them out."""
        torch.set_num_threads(num_threads)
        # Without the native extension the kernels run on NumPy (they log that), which has no such setting.
        if kernels.backend_reasons("paged_prefill")["cpu"] is None:
            kernels.set_num_threads(num_threads)

    def copy_block(self, source: int, target: int) -> None:
        """Copy one block's KV in all layers (choices of one prompt part in its last block)."""
        for layer in self._cache:
            for view in (layer.k_cache, layer.v_cache):
                view[target].copy_(view[source])

    def run(self, batch: Batch, on_layer: Callable[[int], None] | None = None) -> Tensor:
        """Logits float32 [items with ``sample``, vocab], in the items' order.

        ``on_layer(layer)`` is called when that layer's KV of all tokens of the batch is in the cache.
        """
        return self.model.forward(self._inputs(batch), self._cache, on_layer)

    def _inputs(self, batch: Batch) -> StepInputs:
        items = batch.items
        if not items:
            raise InternalError("an empty batch was scheduled")
        counts = np.array([len(item.token_ids) for item in items], np.int64)
        starts = np.array([item.position for item in items], np.int64)
        ends = starts + counts
        sampled = [index for index, item in enumerate(items) if item.sample]
        table = self._block_table(items, ends)
        decode_only = bool((counts == 1).all())
        if decode_only:
            sequences, positions = np.arange(len(items)), starts
            cu_seqlens = np.arange(len(items) + 1, dtype=np.int32)
        else:
            cu_seqlens = np.zeros(len(items) + 1, np.int32)
            np.cumsum(counts, out=cu_seqlens[1:])
            sequences = np.repeat(np.arange(len(items)), counts)
            positions = np.arange(cu_seqlens[-1]) + (starts - cu_seqlens[:-1])[sequences]
        block, offset = np.divmod(positions, self.block_size)
        slots = table[sequences, block].astype(np.int64) * self.block_size + offset
        ids = np.fromiter(chain.from_iterable(item.token_ids for item in items), np.int64)
        block_table, seq_lens = torch.from_numpy(table), torch.from_numpy(ends.astype(np.int32))
        every = decode_only and len(sampled) == len(items)
        chosen = None if every else torch.tensor(sampled, dtype=torch.int64)
        return StepInputs(
            token_ids=torch.from_numpy(ids),
            positions=torch.from_numpy(positions),
            last_position=int(ends.max()) - 1,
            slot_mapping=torch.from_numpy(slots),
            cu_seqlens_q=torch.from_numpy(cu_seqlens),
            block_table=block_table,
            seq_lens=seq_lens,
            decode_only=decode_only,
            sampled_rows=None if every else torch.from_numpy(cu_seqlens[1:][sampled] - 1),
            sampled_block_table=block_table if chosen is None else block_table[chosen],
            sampled_seq_lens=seq_lens if chosen is None else seq_lens[chosen],
        )

    def _block_table(
        self, items: list[BatchItem], ends: np.ndarray[Any, Any]
    ) -> np.ndarray[Any, Any]:
        """[items, blocks] int32, only as wide as the longest context needs, -1 padded."""
        needed = (-(-ends // self.block_size)).tolist()
        table = np.full((len(items), max(needed)), -1, np.int32)
        for row, item, width in zip(table, items, needed, strict=True):
            if not item.token_ids or len(item.block_ids) < width:
                raise InternalError(
                    f"{len(item.token_ids)} tokens at position {item.position} need {width} blocks, "
                    f"{len(item.block_ids)} given"
                )
            row[:width] = item.block_ids[:width]
        return table
