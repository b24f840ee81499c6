# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Blocks whose offset passes 2^32 elements of host memory give what the same content in a small cache gives.

The memory is a file with holes, of which only the pages that a test writes or reads take place.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from paged_cases import NpArray

from kvxfer import KVLayout, kernels

BLOCK_SIZE, HEADS, WIDTH = 16, 2, 64
NUM_BLOCKS = 2**20 + 2**19  # 2^32 elements are 2^20 blocks of K and V
FAR = [NUM_BLOCKS - 1, 3, 2**20 + 5, 2**19 + 9]  # past 2^32 elements, near, past 2^32, past 2^31
NEAR = [2, 0, 3, 1]
TOKENS = 3 * BLOCK_SIZE + 7


def sparse(tmp_path: Path, shape: tuple[int, ...]) -> NpArray:
    """Zeros in float16."""
    memory = np.asarray(np.memmap(tmp_path / "cache", np.float16, "w+", shape=shape))
    assert memory[FAR[0]].ctypes.data - memory.ctypes.data > 2**33, "2^32 elements, 2^33 bytes"
    return memory


def filled(rng: np.random.Generator, far: NpArray) -> NpArray:
    """A small cache, whose blocks ``NEAR`` hold what blocks ``FAR`` of the large one do from now on."""
    near = rng.standard_normal((len(NEAR), *far.shape[1:])).astype(np.float16)
    far[FAR] = near[NEAR]
    return near


def attention_call(far: bool) -> dict[str, Any]:
    return {
        "block_table": np.array([FAR if far else NEAR], np.int32),
        "seq_lens": np.array([TOKENS], np.int32),
    }


@pytest.mark.parametrize("op", ["paged_decode", "paged_prefill"])
def test_attention(rng: np.random.Generator, tmp_path: Path, backend: str, op: str) -> None:
    far = sparse(tmp_path, (NUM_BLOCKS, 2, BLOCK_SIZE, HEADS, WIDTH))
    near = filled(rng, far)
    rows = 40 if op == "paged_prefill" else 1
    q = rng.standard_normal((rows, 2 * HEADS, WIDTH)).astype(np.float16)
    more = {"cu_seqlens_q": np.array([0, rows], np.int32)} if rows > 1 else {}
    given, want = (
        getattr(kernels, op)(
            q, k_cache=cache[:, 0], v_cache=cache[:, 1],
            **attention_call(cache is far), **more, return_lse=True, backend=backend,
        )
        for cache in (far, near)
    )  # fmt: skip
    assert np.array_equal(given[0], want[0])
    assert np.array_equal(given[1], want[1])


def test_mla_decode(rng: np.random.Generator, tmp_path: Path, backend: str) -> None:
    far = sparse(tmp_path, (NUM_BLOCKS, BLOCK_SIZE, 4 * WIDTH))
    near = filled(rng, far)
    q = rng.standard_normal((1, 3, 4 * WIDTH)).astype(np.float16)
    given, want = (
        kernels.mla_decode(
            q[..., :-WIDTH], q[..., -WIDTH:], cache, **attention_call(cache is far),
            sm_scale=0.1, return_lse=True, backend=backend,
        )
        for cache in (far, near)
    )  # fmt: skip
    assert np.array_equal(given[0], want[0])
    assert np.array_equal(given[1], want[1])


def test_append_kv(rng: np.random.Generator, tmp_path: Path, backend: str) -> None:
    far = sparse(tmp_path, (NUM_BLOCKS, 2, BLOCK_SIZE, HEADS, WIDTH))
    near = filled(rng, far)
    key, value = rng.standard_normal((2, 5, HEADS, WIDTH)).astype(np.float32)
    offsets = [0, 15, 7, -1, 3]
    for cache, ids in ((far, [*FAR, FAR[0]]), (near, [*NEAR, NEAR[0]])):
        slots = [i * BLOCK_SIZE + at if at >= 0 else -1 for i, at in zip(ids, offsets, strict=True)]
        kernels.append_kv(
            key, value, cache[:, 0], cache[:, 1], np.array(slots, np.int64), backend=backend
        )
    assert np.array_equal(far[FAR[0], 0, 0], key[0].astype(np.float16))
    assert np.array_equal(far[FAR], near[NEAR])


def layout(order: str, num_blocks: int, **changes: Any) -> KVLayout:
    options: dict[str, Any] = {"num_layers": 2, "block_size": BLOCK_SIZE, "num_kv_heads": HEADS, "head_dim": WIDTH // 2, "dtype": "float16"}  # fmt: skip
    return KVLayout.from_order(order, num_blocks=num_blocks, **{**options, **changes})


def layers_of(memory: NpArray, order: str) -> NpArray:
    """A view of the large cache whose axes begin with block and layer."""
    inner = (2, BLOCK_SIZE, HEADS, WIDTH // 2)
    if order[0] == "B":
        return memory.reshape(NUM_BLOCKS, 2, *inner)
    return memory.reshape(2, NUM_BLOCKS, *inner).swapaxes(0, 1)


@pytest.mark.parametrize("order", ["BLKNHC", "LBKNHC"])
def test_copy_and_checksum(
    rng: np.random.Generator, tmp_path: Path, backend: str, order: str
) -> None:
    memory = sparse(tmp_path, (NUM_BLOCKS, 2 * 2 * BLOCK_SIZE * HEADS * WIDTH // 2))
    blocks = layers_of(memory, order)
    near = filled(rng, blocks)
    large, small = layout(order, NUM_BLOCKS), layout("BLKNHC", len(NEAR))
    sums = [
        kernels.checksum_blocks(shape, data, ids, num_tokens=TOKENS, backend=backend).tolist()
        for shape, data, ids in ((large, memory, FAR), (small, near, NEAR))
    ]
    assert sums[0] == sums[1]
    # As they are, by rows of other heads, and converted.
    for other in (small, layout("BLKHNC", len(NEAR)), layout("BLKNHC", len(NEAR), dtype="float32")):
        given, want = (np.zeros(other.nbytes, np.uint8) for _ in range(2))
        kernels.copy_blocks(large, memory, other, given, FAR, [3, 1, 0, 2], backend=backend)
        kernels.copy_blocks(small, near, other, want, NEAR, [3, 1, 0, 2], backend=backend)
        assert want.any()
        assert np.array_equal(given, want)
        blocks[FAR] = 0
        kernels.copy_blocks(other, given, large, memory, [3, 1, 0, 2], FAR, backend=backend)
        assert np.array_equal(blocks[FAR], near[NEAR])
