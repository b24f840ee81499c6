# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""checksum_blocks: equal for equal content in any layout, different for every fault it is there to find."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kvxfer import KVLayout, kernels
from kvxfer.errors import InvalidArgumentError, LayoutError

MASK = (1 << 64) - 1


def mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def row_sum(row: bytes, part: int, layer: int, head: int, token: int) -> int:
    """The definition, in plain integers."""
    row += bytes(-len(row) % 8)
    total = 0
    for i in range(0, len(row), 8):
        pair = []
        for j in range(2):
            key = mix(((i // 4 + j + 1) * 0x9E3779B97F4A7C15) & MASK) >> 32
            pair.append(
                (int.from_bytes(row[i + 4 * j : i + 4 * j + 4], "little") + key) % (1 << 32)
            )
        total += pair[0] * pair[1]
    place = part << 60 | layer << 48 | head << 32 | token
    return mix((total & MASK) ^ mix(place))


def layout(order: str = "LBKNHC", **changes: Any) -> KVLayout:
    options: dict[str, Any] = {
        "num_layers": 2, "num_blocks": 9, "block_size": 4, "num_kv_heads": 4, "head_dim": 10, "dtype": "float16",
    }  # fmt: skip
    return KVLayout.from_order(order, **{**options, **changes})


@pytest.fixture
def content(rng: np.random.Generator) -> tuple[KVLayout, np.ndarray[Any, Any]]:
    a = layout()
    return a, rng.integers(0, 256, a.nbytes, np.uint8)


def test_it_is_what_the_definition_says(backend: str, content: Any) -> None:
    a, memory = content
    ids = [7, 2, 5]
    view = memory.reshape(2, 9, 2, 4, 4, 20)  # layer, block, K or V, token, head, bytes
    expected = [
        sum(
            row_sum(view[layer, ids[t // 4], part, t % 4, head].tobytes(), part, layer, head, t)
            for part in range(2)
            for t in range(3, 11)
            for head in range(4)
        )
        & MASK
        for layer in range(2)
    ]
    given = kernels.checksum_blocks(a, memory, ids, num_tokens=11, first_token=3, backend=backend)
    assert given.dtype == np.uint64
    assert given.tolist() == expected


@pytest.mark.parametrize("head_dim", [1, 3, 8, 16, 33, 64, 257])
def test_rows_of_any_length(rng: np.random.Generator, backend: str, head_dim: int) -> None:
    a = layout(head_dim=head_dim, num_layers=1, num_kv_heads=1, num_blocks=1)
    memory = rng.integers(0, 256, a.nbytes, np.uint8)
    view = memory.reshape(2, 4, head_dim * 2)
    expected = sum(
        row_sum(view[part, t].tobytes(), part, 0, 0, t) for part in range(2) for t in range(4)
    )
    assert kernels.checksum_blocks(a, memory, [0], backend=backend).tolist() == [expected & MASK]


@pytest.mark.parametrize(
    ("order", "changes"),
    [
        ("LBKHNC", {}),
        ("KLBNHC", {"num_blocks": 40, "block_size": 1}),
        ("LBHNKC", {"block_size": 16, "num_blocks": 2}),
        ("BLKNHC", {"block_size": 3, "num_blocks": 11}),
    ],
)
def test_unlike_layouts_of_the_same_content_agree(
    backend: str, content: Any, order: str, changes: dict[str, Any]
) -> None:
    a, memory = content
    b = layout(order, **changes)
    other = np.full(b.nbytes, 0xA5, np.uint8)
    src, dst = [8, 0, 3], list(range(b.num_blocks))[::-1]
    kernels.copy_blocks(a, memory, b, other, src, dst, num_tokens=10)
    given = [
        kernels.checksum_blocks(side, data, ids, num_tokens=10, backend=backend).tolist()
        for side, data, ids in ((a, memory, src), (b, other, dst))
    ]
    assert given[0] == given[1]


def test_ranks_and_layers_add_up(backend: str, content: Any) -> None:
    a, memory = content
    whole = kernels.checksum_blocks(a, memory, [1, 2], backend=backend)
    halves = [
        kernels.checksum_blocks(a, memory, [1, 2], heads=heads, backend=backend)
        for heads in ((0, 1), (1, 4))
    ]
    assert (halves[0] + halves[1]).tolist() == whole.tolist()
    second = kernels.checksum_blocks(a, memory, [1, 2], layers=[1], backend=backend)
    assert second.tolist() == whole[1:].tolist()
    rank = layout(tp_size=2, tp_rank=1)
    part = np.zeros(rank.nbytes, np.uint8)
    kernels.copy_blocks(a, memory, rank, part, [1, 2], [4, 5])
    of_rank = kernels.checksum_blocks(rank, part, [4, 5], backend=backend)
    upper = kernels.checksum_blocks(a, memory, [1, 2], heads=(2, 4), backend=backend)
    assert of_rank.tolist() == upper.tolist()


def test_each_fault_changes_the_sum(rng: np.random.Generator, backend: str, content: Any) -> None:
    a, memory = content
    ids = [1, 2, 3]
    good = kernels.checksum_blocks(a, memory, ids, backend=backend).tolist()

    def sums(data: np.ndarray[Any, Any], blocks: list[int]) -> list[int]:
        return kernels.checksum_blocks(a, data, blocks, backend=backend).tolist()

    assert all(x != y for x, y in zip(sums(memory, [2, 1, 3]), good, strict=True)), "swapped blocks"
    assert all(x != y for x, y in zip(sums(memory, [1, 2, 4]), good, strict=True)), "stale block"
    view = memory.reshape(2, 9, 2, 4, 4, 20)
    for name, swap in {
        "layers": (view[0], view[1]),
        "K and V": (view[:, :, 0], view[:, :, 1]),
        "tokens": (view[:, :, :, 0], view[:, :, :, 1]),
        "heads": (view[..., 0, :], view[..., 3, :]),
    }.items():
        left, right = swap[0].copy(), swap[1].copy()
        swap[0][...], swap[1][...] = right, left
        assert all(x != y for x, y in zip(sums(memory, ids), good, strict=True)), name
        swap[0][...], swap[1][...] = left, right
    assert sums(memory, ids) == good
    for _ in range(64):  # any one bit
        layer, block = int(rng.integers(2)), int(rng.choice(ids))
        at = (layer, block, *(int(rng.integers(n)) for n in view.shape[2:]))
        bit = np.uint8(1 << rng.integers(8))
        view[at] ^= bit
        changed = sums(memory, ids)
        assert changed[layer] != good[layer]
        assert changed[1 - layer] == good[1 - layer]
        view[at] ^= bit


def test_nothing_sums_to_zero(backend: str, content: Any) -> None:
    a, memory = content
    assert kernels.checksum_blocks(a, memory, [], backend=backend).tolist() == [0, 0]
    assert kernels.checksum_blocks(a, memory, [1], layers=[], backend=backend).tolist() == []


@pytest.mark.parametrize(
    ("error", "match", "change"),
    [
        (InvalidArgumentError, r"block_ids\[1\].*given 9", {"block_ids": [0, 9]}),
        (InvalidArgumentError, r"block_ids\[0\].*given -1", {"block_ids": [-1]}),
        (InvalidArgumentError, "num_tokens", {"num_tokens": 9}),
        (InvalidArgumentError, "heads", {"heads": (0, 5)}),
        (LayoutError, "layer 2 is not held", {"layers": [2]}),
    ],
)
def test_mistakes_are_refused(
    content: Any, error: type[Exception], match: str, change: dict[str, Any]
) -> None:
    a, memory = content
    ids = change.pop("block_ids", [0, 1])
    with pytest.raises(error, match=match):
        kernels.checksum_blocks(a, memory, ids, **change)
