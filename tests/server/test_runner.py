# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Batches reach the model as scheduled: right slots, right rows, the hook in time, the rest untouched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from kvxfer.errors import InternalError, InvalidArgumentError
from kvxfer.layout import KVLayout
from kvxfer.server.engine.runner import Batch, BatchItem, Runner, torch_views
from kvxfer.testing.greedy import make_cache, make_runner
from kvxfer.testing.models import make_random_checkpoint

PROMPT = list(range(40, 80))
BLOCKS = [5, 2, 9]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runner") / "m"
    return make_random_checkpoint(folder, "llama", seed=3, num_layers=3)


@pytest.fixture
def made(model_dir: Path) -> tuple[Runner, list[tuple[Tensor, Tensor]]]:
    return make_runner(model_dir, 12)


def written(view: Tensor) -> list[tuple[int, int]]:
    """(block, offset) of the slots that hold something; all of a slot or nothing of it."""
    filled = ~view.isnan()
    whole = filled.flatten(2).all(-1)
    assert torch.equal(whole, filled.flatten(2).any(-1))
    return [tuple(pair) for pair in whole.nonzero().tolist()]


def slots(blocks: list[int], begin: int, end: int) -> list[tuple[int, int]]:
    return sorted((blocks[p // 16], p % 16) for p in range(begin, end))


def test_each_layer_is_in_the_cache_when_its_hook_is_called(
    made: tuple[Runner, list[tuple[Tensor, Tensor]]],
) -> None:
    runner, cache = made
    called: list[int] = []

    def on_layer(layer: int) -> None:
        called.append(layer)
        for index, views in enumerate(cache):
            for view in views:
                assert written(view) == (slots(BLOCKS, 0, 40) if index <= layer else [])

    runner.run(Batch([BatchItem(PROMPT, 0, BLOCKS, sample=False)]), on_layer)
    assert called == [0, 1, 2]


def test_only_the_slots_of_the_batch_are_written(
    made: tuple[Runner, list[tuple[Tensor, Tensor]]],
) -> None:
    runner, cache = made
    runner.run(Batch([BatchItem(PROMPT[:20], 0, BLOCKS, sample=False)]))
    before = [view.clone() for views in cache for view in views]
    items = [
        BatchItem(PROMPT[20:33], 20, BLOCKS, sample=False),
        BatchItem([7], 0, [11], sample=True),
    ]
    runner.run(Batch(items))
    expected = sorted([*slots(BLOCKS, 0, 33), (11, 0)])
    for old, new in zip(before, (v for views in cache for v in views), strict=True):
        assert written(new) == expected
        kept = ~old.isnan()
        assert torch.equal(old[kept], new[kept])


def test_logits_come_for_sampled_items_in_their_order(
    made: tuple[Runner, list[tuple[Tensor, Tensor]]],
) -> None:
    runner, _ = made
    prompts = [PROMPT[:9], PROMPT[9:12], PROMPT[12:13], PROMPT[13:40]]
    blocks = [[0], [1], [2], [3, 4]]
    alone = [
        runner.run(Batch([BatchItem(ids, 0, held, sample=True)]))[0]
        for ids, held in zip(prompts, blocks, strict=True)
    ]
    for flags in ([True] * 4, [False, True, False, True], [True, False, False, False]):
        items = [
            BatchItem(ids, 0, held, sample)
            for ids, held, sample in zip(prompts, blocks, flags, strict=True)
        ]
        logits = runner.run(Batch(items))
        expected = [row for row, sample in zip(alone, flags, strict=True) if sample]
        assert logits.shape == (len(expected), 256)
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits, torch.stack(expected), rtol=0, atol=1e-5)
    nothing = runner.run(Batch([BatchItem(prompts[0], 0, blocks[0], sample=False)]))
    assert nothing.shape == (0, 256)


def test_decode_beside_unsampled_decode(made: tuple[Runner, list[tuple[Tensor, Tensor]]]) -> None:
    runner, _ = made
    rows = [[1, 2, 3], [4, 5, 6]]
    for index, ids in enumerate(rows):
        runner.run(Batch([BatchItem(ids[:-1], 0, [index], sample=False)]))
    last = [BatchItem(ids[-1:], 2, [index], sample=index == 1) for index, ids in enumerate(rows)]
    (logits,) = runner.run(Batch(last))
    (expected,) = runner.run(Batch([BatchItem(rows[1], 0, [7], sample=True)]))
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


def test_positions_past_the_rope_table_are_computed(model_dir: Path) -> None:
    runner, cache = make_runner(model_dir, 300)
    blocks = list(range(300))
    for views in cache:
        for view in views:
            view.fill_(0.5)
    far = Batch([BatchItem([1, 2], 4000, blocks, sample=True)])
    first = runner.run(far)
    assert torch.isfinite(first).all()
    fresh, other = make_runner(model_dir, 300)
    for views in other:
        for view in views:
            view.fill_(0.5)
    # A table that grew in several steps has the values of one that grew at once.
    for position in (900, 1024, 2500):
        fresh.run(Batch([BatchItem([1], position, blocks, sample=False)]))
        for views in other:
            for view in views:
                view[position // 16, position % 16] = 0.5
    assert torch.equal(fresh.run(far), first)


def test_copied_blocks_are_equal_in_all_layers(
    made: tuple[Runner, list[tuple[Tensor, Tensor]]],
) -> None:
    runner, cache = made
    runner.run(Batch([BatchItem(PROMPT[:16], 0, [3], sample=False)]))
    runner.copy_block(3, 8)
    for views in cache:
        for view in views:
            assert torch.equal(view[8], view[3])
            assert written(view) == sorted([*slots([3], 0, 16), *slots([8], 0, 16)])


@pytest.mark.parametrize(
    "items",
    [
        [],
        [BatchItem([], 0, [1], sample=False)],
        [BatchItem([1, 2], 15, [1], sample=True)],
        [BatchItem([1], 0, [1], sample=True), BatchItem([1], 32, [2, 3], sample=True)],
    ],
)
def test_batches_that_cannot_be_computed_are_an_error(
    made: tuple[Runner, list[tuple[Tensor, Tensor]]], items: list[BatchItem]
) -> None:
    runner, cache = made
    with pytest.raises(InternalError):
        runner.run(Batch(items))
    assert all(written(view) == [] for views in cache for view in views)


@pytest.mark.parametrize(
    "make",
    [
        lambda: make_cache(2, 12, 16, 2, 16),
        lambda: make_cache(3, 12, 32, 2, 16),
        lambda: make_cache(3, 12, 16, 4, 16),
        lambda: make_cache(3, 12, 16, 2, 16, torch.bfloat16),
    ],
    ids=["layers", "block_size", "heads", "dtype"],
)
def test_a_cache_of_another_shape_is_refused(
    made: tuple[Runner, list[tuple[Tensor, Tensor]]],
    make: Callable[[], list[tuple[Tensor, Tensor]]],
) -> None:
    with pytest.raises(InvalidArgumentError, match="cache"):
        Runner(made[0].model, make(), 16, num_threads=1)


def test_views_share_bytes_with_the_region() -> None:
    arrays = [tuple(np.zeros((4, 16, 2, 8), np.uint16) for _ in range(2)) for _ in range(2)]
    views = torch_views(arrays, torch.bfloat16)
    views[1][0][3, 15, 1, 7] = 1.0
    assert arrays[1][0][3, 15, 1, 7] == 0x3F80
    assert [len(pair) for pair in views] == [2, 2]
    with pytest.raises(InvalidArgumentError, match="parts"):
        torch_views([(arrays[0][0],)], torch.bfloat16)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_servers_layout_gives_the_same_logits(model_dir: Path, dtype: str) -> None:
    served = getattr(torch, dtype)
    layout = KVLayout.hnd(
        num_layers=3, num_blocks=12, block_size=16, num_kv_heads=2, head_dim=16, dtype=dtype
    )
    region = np.zeros(layout.nbytes, np.uint8)
    runner, cache = make_runner(model_dir, 12, dtype=served)
    other = Runner(runner.model, torch_views(layout.views(region), served), 16, num_threads=1)
    batch = Batch([BatchItem(PROMPT, 0, BLOCKS, sample=True)])
    assert torch.equal(other.run(batch), runner.run(batch))
    for ours, (k, v) in zip(torch_views(layout.views(region), served), cache, strict=True):
        for block in BLOCKS[:2]:
            assert torch.equal(ours[0][block], k[block])
            assert torch.equal(ours[1][block], v[block])
