# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""A model of a few lines whose next token depends on every KV entry of its context, read from the cache.

A wrong block, a missing layer or a token in the wrong place changes the answer, as with a real model and
more surely. `answer` is what an unbatched, uncached run gives.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from kvxfer.server.engine.runner import Batch
from kvxfer.server.engine.sampling import SampleRequest
from kvxfer.server.wire import SamplingParams, TokenRequest

VOCAB = 97
NUM_LAYERS = 3
HEADS, DIM = 1, 4
SHAPE = {"num_layers": NUM_LAYERS, "num_kv_heads": HEADS, "head_dim": DIM, "dtype": "float32"}


def entry(token: int, position: int, layer: int) -> float:
    """What the cache holds for one token of one layer: exact in float32."""
    return float((token * 31 + position * 7 + layer * 1009) % 65536 + 1)


def new_cache(num_blocks: int, block_size: int) -> list[tuple[np.ndarray[Any, Any], ...]]:
    shape = (num_blocks, block_size, HEADS, DIM)
    return [tuple(np.full(shape, np.nan, np.float32) for _ in "kv") for _ in range(NUM_LAYERS)]


def next_token(context: np.ndarray[Any, Any], choice: int) -> int:
    """``context``: [layers, tokens] of cache entries."""
    digest = hashlib.blake2b(context.astype(np.float64).tobytes() + bytes([choice]), digest_size=8)
    return int.from_bytes(digest.digest(), "little") % VOCAB


def answer(
    spec: TokenRequest, eos_ids: Sequence[int] = (), max_model_len: int = 10**9
) -> list[list[int]]:
    """The ids of each choice."""
    choices = []
    for choice in range(spec.sampling.n):
        ids = list(spec.prompt)
        while True:
            context = [
                [entry(t, p, layer) for p, t in enumerate(ids)] for layer in range(NUM_LAYERS)
            ]
            ids.append(next_token(np.array(context), choice))
            num = len(ids) - len(spec.prompt)
            stops = not spec.sampling.ignore_eos and ids[-1] in eos_ids
            if stops or num >= spec.sampling.max_tokens or len(ids) >= max_model_len:
                break
        choices.append(ids[len(spec.prompt) :])
    return choices


class FakeRunner:
    """Same face as the real runner; ``cache`` as the layout's views."""

    def __init__(self, cache: Sequence[Sequence[np.ndarray[Any, Any]]], block_size: int) -> None:
        self.cache = cache
        self.block_size = block_size
        self.num_tokens = 0  # computed so far
        self.batch_sizes: list[int] = []

    def copy_block(self, source: int, target: int) -> None:
        for parts in self.cache:
            for part in parts:
                part[target] = part[source]

    def run(
        self, batch: Batch, on_layer: Callable[[int], None] | None = None
    ) -> list[np.ndarray[Any, Any]]:
        self.num_tokens += batch.num_tokens
        self.batch_sizes.append(batch.num_tokens)
        for layer, parts in enumerate(self.cache):
            for item in batch.items:
                for position, token in enumerate(item.token_ids, item.position):
                    block, offset = divmod(position, self.block_size)
                    for part in parts:
                        part[item.block_ids[block], offset] = entry(token, position, layer)
            if on_layer is not None:
                on_layer(layer)
        return [self._context(item) for item in batch.items if item.sample]

    def _context(self, item: Any) -> np.ndarray[Any, Any]:
        end = item.position + len(item.token_ids)
        blocks = item.block_ids[: -(-end // self.block_size)]
        rows = []
        for k, v in self.cache:
            keys = k[blocks].reshape(-1, HEADS * DIM)[:end]
            values = v[blocks].reshape(-1, HEADS * DIM)[:end]
            same = (keys == keys[:, :1]).all() and (keys == values).all()
            # A part that did not arrive differs from the rest of its entry, or is NaN.
            rows.append(keys[:, 0] if same else np.full(end, -1.0))
        return np.array(rows)


def fake_sampler(
    logits: list[np.ndarray[Any, Any]], requests: list[SampleRequest], rows: list[int]
) -> list[int]:
    return [
        next_token(logits[row], request.choice) for row, request in zip(rows, requests, strict=True)
    ]


def request_of(
    prompt: Sequence[int], max_tokens: int = 5, *, name: str = "r", **fields: Any
) -> TokenRequest:
    sampling = {
        key: fields.pop(key)
        for key in ("n", "ignore_eos", "min_tokens", "stop_token_ids")
        if key in fields
    }
    return TokenRequest(
        request_id=name,
        handoff=fields.pop("handoff", hashlib.md5(name.encode()).hexdigest()),
        deadline_s=fields.pop("deadline_s", 60.0),
        prompt=tuple(prompt),
        sampling=SamplingParams(max_tokens=max_tokens, temperature=0.0, **sampling),
        **fields,
    )
