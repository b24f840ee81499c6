# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Block lists are cut alike, and refused with the same words, by the extension module and by NumPy; routes are kept."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from kvxfer import kernels
from kvxfer.errors import InvalidArgumentError
from kvxfer.kernels import _copy_route, _host_numpy
from kvxfer.layout import KVLayout

native = pytest.importorskip("kvxfer._kernels_cpu", reason="not built")


@st.composite
def block_lists(draw: st.DrawFn) -> tuple[Any, ...]:
    """Two lists that hold the tokens, as a rule of blocks that exist, now and then of others."""
    first = draw(st.integers(0, 40))
    end = draw(st.integers(first, first + 60))
    lists, extents, origins = [], [], []
    for side in range(2):
        size = draw(st.integers(1, 20))
        origin = draw(st.sampled_from((0, first)))
        count = -(-(end - origin) // size) + draw(st.integers(0, 2))
        blocks = count + draw(st.integers(0, 1000))
        ids = draw(st.lists(st.integers(0, blocks), min_size=count, max_size=count, unique=True))
        if count and draw(st.integers(0, 3)) == 0:
            ids[draw(st.integers(0, count - 1))] = draw(st.sampled_from((-1, -2, ids[0], 2**40)))
        if side and draw(st.booleans()):
            ids = [-1 if draw(st.integers(0, 4)) == 0 else i for i in ids]
        lists.append(np.array(ids, np.int64))
        extents.append((blocks, size))
        origins.append(origin)
    return (*lists, *extents, (*origins, first, end), draw(st.booleans()))


def outcome(cut: Any, case: tuple[Any, ...]) -> tuple[str, Any]:
    try:
        return "segments", cut(*case).tolist()
    except InvalidArgumentError as error:
        return "refused", str(error)


@hypothesis.settings(max_examples=400)
@hypothesis.given(block_lists())
def test_both_cuts_give_the_same_segments_or_the_same_words(case: tuple[Any, ...]) -> None:
    ours, theirs = outcome(native.cut_segments, case), outcome(_host_numpy.cut_segments, case)
    if ours[0] == theirs[0] == "refused" and ours != theirs:
        # Two mistakes: one names the first in the order of tokens, the other a source before a destination.
        assert {ours[1].split("[")[0], theirs[1].split("[")[0]} == {"src_blocks", "dst_blocks"}
    else:
        assert ours == theirs


@pytest.mark.parametrize("num_blocks", [100, 10**9])  # ids are compared by bits, or sorted
def test_a_destination_that_comes_twice_is_named(num_blocks: int) -> None:
    ids = np.arange(40)
    ids[[7, 20, 33]] = 3
    lists = np.arange(40), ids, (num_blocks, 2), (num_blocks, 2), (0, 0, 0, 80), False
    for cut in (native.cut_segments, _host_numpy.cut_segments):
        with pytest.raises(InvalidArgumentError, match="each block at most once, given 3 4 times"):
            cut(*lists)


def test_lists_that_do_not_hold_the_tokens_are_refused() -> None:
    ids = np.arange(4)
    for tokens in ((0, 0, 0, 9), (0, 0, 3, 2), (4, 0, 3, 8), (0, 0, -1, 4)):
        with pytest.raises(InvalidArgumentError, match="expected blocks for tokens"):
            native.cut_segments(ids, ids, (4, 2), (4, 2), tokens, False)


def test_a_route_keeps_no_memory_alive_and_their_number_is_bounded(
    rng: np.random.Generator,
) -> None:
    shape: dict[str, Any] = {"block_size": 4, "num_kv_heads": 2, "head_dim": 4, "dtype": "float32"}
    for _ in range(_copy_route._MOST_KNOWN + 8):
        layout = KVLayout.from_order("LKBHNC", num_layers=1, num_blocks=2, **shape)
        memory = rng.integers(0, 256, layout.nbytes, dtype=np.uint8)
        packed = kernels.pack_blocks(layout, memory, [1, 0])
        alive = weakref.ref(memory)
        assert len(_copy_route._known) <= _copy_route._MOST_KNOWN
        del memory, packed
    gc.collect()
    assert alive() is None


def test_memory_of_another_size_or_place_is_looked_at_anew(rng: np.random.Generator) -> None:
    torch = pytest.importorskip("torch")
    shape: dict[str, Any] = {"block_size": 4, "num_kv_heads": 2, "head_dim": 4, "dtype": "float32"}
    layout = KVLayout.from_order("LKBHNC", num_layers=2, num_blocks=4, **shape)
    source = torch.from_numpy(rng.integers(0, 256, layout.nbytes, dtype=np.uint8))
    target = torch.zeros(layout.nbytes, dtype=torch.uint8)
    kernels.copy_blocks(layout, source, layout, target, [0, 1], [0, 1])
    target.resize_(layout.nbytes - 1)
    with pytest.raises(InvalidArgumentError, match="dst: layer 1, part v needs"):
        kernels.copy_blocks(layout, source, layout, target, [0, 1], [0, 1])
    target.resize_(4 * layout.nbytes).zero_()
    kernels.copy_blocks(layout, source, layout, target, [0, 1, 2, 3], [0, 1, 2, 3])
    assert torch.equal(target[: layout.nbytes], source)


def test_a_shifted_overlap_of_one_cache_is_refused(rng: np.random.Generator) -> None:
    """Equal layouts over ranges that only overlap: blocks of the one lie across blocks of the other."""
    shape: dict[str, Any] = {"block_size": 4, "num_kv_heads": 2, "head_dim": 4, "dtype": "float32"}
    layout = KVLayout.from_order("LKBHNC", num_layers=1, num_blocks=4, **shape)
    memory = rng.integers(0, 256, layout.nbytes + 64, dtype=np.uint8)
    with pytest.raises(InvalidArgumentError, match="given an overlap"):
        kernels.copy_blocks(layout, memory[:-64], layout, memory[64:], [0], [3])
