# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""A copy like one that was made before is not resolved again: it writes the same, and mistakes are still refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from kvxfer import kernels
from kvxfer.errors import InvalidArgumentError, KvxferError
from kvxfer.kernels import _copy_again, cache
from kvxfer.layout import KVLayout

SHAPE: dict[str, Any] = {"num_layers": 2, "num_kv_heads": 2, "head_dim": 8}
SRC = KVLayout.from_order("LKBNHC", num_blocks=6, block_size=4, dtype="float16", **SHAPE)
DST = KVLayout.from_order("BLKHNC", num_blocks=5, block_size=4, dtype="float16", **SHAPE)
WIDE = KVLayout.from_order("LKBHNC", num_blocks=3, block_size=8, dtype="float32", **SHAPE)

Ids = np.ndarray[Any, np.dtype[np.int64]]


@pytest.fixture(autouse=True)
def _nothing_known() -> Iterator[None]:
    _copy_again._known.clear()
    yield
    _copy_again._known.clear()


def ids(*blocks: int) -> Ids:
    return np.array(blocks, np.int64)


def filled(layout: KVLayout, seed: int) -> Any:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.standard_normal(layout.nbytes // 4).astype(np.float16)).repeat(2)


class Calls:
    """The three functions over caches of their own; ``forms`` makes their arrays NumPy's or torch's."""

    def __init__(self, seed: int, dst: KVLayout, form: Callable[[Any], Any], backend: str) -> None:
        self.dst, self.backend = dst, backend
        self.source = form(filled(SRC, seed).view(torch.uint8))
        self.target = form(torch.zeros(dst.nbytes, dtype=torch.uint8))
        self.packed = form(torch.zeros(3 * SRC.nbytes // 6, dtype=torch.uint8))

    def run(self, src_blocks: Any, dst_blocks: Any) -> bytes:
        chosen = {"backend": self.backend}
        kernels.copy_blocks(SRC, self.source, self.dst, self.target, src_blocks, dst_blocks, **chosen)  # fmt: skip
        kernels.pack_blocks(SRC, self.source, src_blocks, self.packed, **chosen)
        kernels.unpack_blocks(self.packed, SRC, self.source, src_blocks[::-1].copy(), **chosen)
        arrays = (self.target, self.packed, self.source)
        return b"".join(np.asarray(array).tobytes() for array in arrays)


@pytest.mark.parametrize("form", [lambda array: array, lambda array: array.numpy()])
@pytest.mark.parametrize("dst", [DST, WIDE], ids=["same dtype", "converted"])
def test_the_second_call_writes_what_a_first_one_would(
    backend: str, dst: KVLayout, form: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    into = (ids(4, 0, 2), ids(1, 3, 0)) if dst is DST else (ids(2, 0), ids(1, 2))
    Calls(1, dst, form, backend).run(ids(0, 1, 2), into[0])
    assert len(_copy_again._known) == (3 if backend == "cpu" else 0), "the reference is asked"
    want = Calls(2, dst, form, "reference").run(ids(5, 1, 3), into[1])
    if backend == "cpu":
        monkeypatch.setattr(cache, "run_copy", lambda *_, **__: pytest.fail("resolved again"))
    assert Calls(2, dst, form, backend).run(ids(5, 1, 3), into[1]) == want


@pytest.mark.parametrize(
    "change",
    [
        lambda given: given | {"src_blocks": ids(0, 6)},
        lambda given: given | {"src_blocks": ids(-1, 2)},
        lambda given: given | {"dst_blocks": ids(5, 1)},
        lambda given: given | {"dst_blocks": ids(1, 1)},
        lambda given: given | {"src_blocks": ids(0, 2)[:, None]},
        lambda given: given | {"src_blocks": np.array([0.0, 2.0])},
        lambda given: given | {"dst": given["dst"].reshape(2, -1).t()},
        lambda given: given | {"dst": given["dst"][:-1]},
        lambda given: given | {"dst": given["dst"].view(torch.float32)},
        lambda given: given | {"src": given["dst"][: SRC.nbytes]},
        lambda given: given | {"max_ctas": -1},
        lambda given: given | {"first_token": -1},
        lambda given: given | {"num_tokens": 99},
        lambda given: given | {"layers": [2]},
        lambda given: given | {"backend": "no such"},
    ],
)
def test_mistakes_of_the_second_call_are_told_as_those_of_a_first(
    change: Callable[[dict[str, Any]], dict[str, Any]],
) -> None:
    def given() -> dict[str, Any]:
        return {
            "src_layout": SRC,
            "src": filled(SRC, 1).view(torch.uint8),
            "dst_layout": DST,
            "dst": torch.zeros(DST.nbytes, dtype=torch.uint8),
            "src_blocks": ids(0, 2),
            "dst_blocks": ids(1, 3),
        }

    with pytest.raises(KvxferError) as first:
        kernels.copy_blocks(**change(given()))
    kernels.copy_blocks(**given())
    assert len(_copy_again._known) == 1
    wrong = change(given())
    with pytest.raises(type(first.value)) as second:
        kernels.copy_blocks(**wrong)
    assert str(second.value) == str(first.value)
    assert wrong["dst"].count_nonzero() == 0


def test_memory_that_may_not_be_written_is_refused_by_the_second_call() -> None:
    source = filled(SRC, 1).view(torch.uint8).numpy()
    target = np.zeros(DST.nbytes, np.uint8)
    kernels.copy_blocks(SRC, source, DST, target, ids(0), ids(0))
    target.flags.writeable = False
    with pytest.raises(InvalidArgumentError, match="read-only"):
        kernels.copy_blocks(SRC, source, DST, target, ids(1), ids(0))


def test_names_are_those_of_the_function_that_was_called() -> None:
    source, out = filled(SRC, 1).view(torch.uint8), torch.zeros(SRC.nbytes, dtype=torch.uint8)
    kernels.pack_blocks(SRC, source, ids(0, 1), out)
    with pytest.raises(InvalidArgumentError, match="block_ids"):
        kernels.pack_blocks(SRC, source, ids(0, 6), out)


def test_the_blocks_of_one_cache_are_still_kept_apart() -> None:
    layout = KVLayout.from_order("BLKHNC", num_blocks=5, block_size=4, dtype="float16", **SHAPE)
    memory, other = (filled(layout, seed).view(torch.uint8) for seed in (1, 2))
    kernels.copy_blocks(layout, memory, layout, other, ids(0, 1), ids(1, 2))
    with pytest.raises(InvalidArgumentError):
        kernels.copy_blocks(layout, memory, layout, memory, ids(0, 1), ids(1, 2))
    kernels.copy_blocks(layout, memory, layout, memory, ids(0, 1), ids(3, 4))
    blocks = memory.reshape(5, -1)
    assert torch.equal(blocks[:2], blocks[3:])


def test_a_known_copy_keeps_its_layouts_and_their_number_is_bounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A key has the layouts' ids: another layout must not get one of them while the copy is known."""
    monkeypatch.setattr(_copy_again, "_MOST_KNOWN", 3)
    for num_blocks in range(3, 10):
        layout = KVLayout.from_order(
            "BLKHNC", num_blocks=num_blocks, block_size=4, dtype="float16", **SHAPE
        )
        kernels.copy_blocks(
            SRC, filled(SRC, 1), layout, filled(layout, 2), ids(0), ids(num_blocks - 1)
        )
        assert len(_copy_again._known) <= 3
        assert any(layout is route.layouts[1] for _, route in _copy_again._known.values())
