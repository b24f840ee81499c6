# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""The host's half of a CUDA block copy: tables, strides and access widths, executed here access by access.

What this cannot show is the kernel itself, which needs a GPU; its index walk is tested in C++ (tests/cpp).
"""

from __future__ import annotations

import contextlib
import ctypes
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kvxfer.errors import InvalidArgumentError
from kvxfer.kernels import _cuda, _cuda_base, _cuda_decode, reference
from kvxfer.kernels._copy_job import CopyJob, make_job
from kvxfer.kernels._sides import Side
from kvxfer.layout import KVLayout

NpArray = np.ndarray[Any, Any]


def run_as_the_kernel_would(job: CopyJob) -> None:
    """copy.cu in Python: for every tile and row, accesses of the planned width at the planned addresses."""
    (launch,) = _cuda.plan_launches(job.route)
    bases = job.bases[launch.chosen]
    access = launch.access(bases)
    for (src_strides, dst_strides, width), layers in zip(launch.rows, bases, strict=True):
        assert width % access == 0
        for src, dst in layers:
            for src_block, src_slot, dst_block, dst_slot, tokens in job.segments:
                for token in range(tokens):
                    for head in range(job.route.num_heads):
                        at = (
                            (src_block, src_slot + token, head),
                            (dst_block, dst_slot + token, head),
                        )
                        source = int(src + np.dot(at[0], src_strides))
                        target = int(dst + np.dot(at[1], dst_strides))
                        assert source % access == target % access == 0
                        ctypes.memmove(target, source, width)


@pytest.mark.parametrize("order", ["LKBNHC", "LKBHNC", "BLKHNC", "LBHNKC"])
@pytest.mark.parametrize(("head_dim", "access"), [(8, 16), (6, 8), (5, 4)])
def test_a_launch_plan_moves_what_the_reference_moves(
    rng: np.random.Generator, order: str, head_dim: int, access: int
) -> None:
    shape: dict[str, Any] = {
        "num_kv_heads": 4,
        "head_dim": head_dim,
        "dtype": "float32",
        "num_layers": 2,
    }
    src = KVLayout.from_order(order, num_blocks=4, block_size=3, **shape)
    dst = KVLayout.from_order("LKBHNC", num_blocks=3, block_size=5, tp_rank=1, tp_size=2, **shape)

    def aligned(nbytes: int) -> NpArray:
        room = np.zeros(nbytes + 64, np.uint8)
        start = -room.ctypes.data % 64
        return room[start : start + nbytes]

    memory = aligned(src.nbytes)
    memory[:] = rng.integers(0, 256, src.nbytes, dtype=np.uint8)
    results = []
    for run in (run_as_the_kernel_would, reference.copy_blocks):
        out = aligned(dst.nbytes)
        job = make_job(
            Side("src", src, memory), Side("dst", dst, out), [3, 0, 2], [2, 1],
            num_tokens=8, first_token=1, layers=None,
        )  # fmt: skip
        run(job)
        results.append(out)
    assert results[1].any()
    assert np.array_equal(*results)
    (launch,) = _cuda.plan_launches(job.route)
    assert launch.access(np.array(job.route.bases[..., 1::2])) == access


built = pytest.mark.skipif(
    _cuda_base.missing is not None, reason=f"not built: {_cuda_base.missing}"
)


def decode_call(**changes: Any) -> Any:
    torch = pytest.importorskip("torch")
    given: dict[str, Any] = {
        "dim": 64,
        "q": torch.float16,
        "kv": torch.float16,
        "gap": 0,
        **changes,
    }
    views = {"q": torch.zeros(2, 8, given["dim"], dtype=given["q"])}
    for name in ("k_cache", "v_cache"):
        whole = torch.zeros(3, 16, 2, given["dim"] + given["gap"]).to(given["kv"])
        views[name] = whole[..., : given["dim"]]
    return SimpleNamespace(views=views, dtypes={})


@built
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"dim": 96}, "64, 128 or 256"),
        ({"q": "float32", "kv": "float32"}, "float16 or bfloat16"),
        ({"kv": "bfloat16"}, "dtype"),
        ({"kv": "float8_e4m3fn"}, None),
        ({"gap": 4}, "16 bytes"),
        ({"gap": 8}, None),
    ],
)
def test_decode_says_what_it_cannot_run(changes: dict[str, Any], reason: str | None) -> None:
    torch = pytest.importorskip("torch")
    changes = {k: getattr(torch, v) if isinstance(v, str) else v for k, v in changes.items()}
    given = _cuda.refuses("paged_decode", decode_call(**changes))
    assert given is None if reason is None else given is not None and reason in given


@built
def test_values_of_another_width_than_keys_are_not_for_cuda() -> None:
    call = decode_call()
    call.views["v_cache"] = call.views["v_cache"][..., :32]
    assert "as wide as keys" in str(_cuda.refuses("paged_decode", call))


@pytest.mark.parametrize("wrong", [-2, 48])
def test_device_side_slots_are_checked_when_asked(
    monkeypatch: pytest.MonkeyPatch, wrong: int
) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setenv("KVXFER_CHECK_DEVICE_IDS", "1")
    rows, cache = torch.zeros(3, 2, 8), torch.zeros(3, 16, 2, 8)
    slots = torch.tensor([0, -1, wrong])
    with pytest.raises(InvalidArgumentError, match=rf"slot_mapping\[2\].* 0 to 47, given {wrong}"):
        _cuda.append_kv(rows, rows, cache, cache, slots, k_scale=1.0, v_scale=1.0)


@pytest.mark.parametrize(
    ("table", "lens", "window", "message"),
    [
        ([[0, 3]], [17], -1, r"block_table\[0, 1\]: expected a block id from 0 to 2, given 3"),
        ([[-1, 1]], [17], -1, r"block_table\[0, 0\].*given -1"),
        ([[-1, 1]], [17], 0, None),
        ([[0, 1]], [33], -1, r"seq_lens\[0\]: expected 0 to 32 \(2 blocks of 16\), given 33"),
        ([[0, -1]], [16], -1, None),
    ],
)
def test_device_side_tables_are_checked_when_asked(
    table: list[list[int]], lens: list[int], window: int, message: str | None
) -> None:
    torch = pytest.importorskip("torch")
    arguments = (torch.tensor(table), torch.tensor(lens), window, 3, 16)
    if message is None:
        _cuda_decode.check_block_table(*arguments)
        return
    with pytest.raises(InvalidArgumentError, match=message):
        _cuda_decode.check_block_table(*arguments)


@pytest.mark.parametrize(
    ("units", "longest", "splits"),
    [
        (8, 1024, (16, 64)),  # no split is shorter than 64 tokens
        (8, 32768, (33, 64)),  # the device once
        (32, 8192, (8, 192)),
        (128, 1024, (1, 960)),  # whole sequences use all of the memory's bandwidth
        (128, 32768, (8, 960)),  # 4096 tokens
        (
            512,
            131072,
            (3, 1024),
        ),  # but no more than four waves, whose blocks may find nothing to do
        (2048, 32768, (1, 1024)),
    ],
)
def test_an_unplanned_decode_is_split_by_batch_and_device(
    units: int, longest: int, splits: tuple[int, int]
) -> None:
    assert _cuda_decode.choose_splits(units, 264, longest) == splits


def test_the_reason_for_no_cuda_is_given() -> None:
    assert _cuda.unavailable("append_kv", "cpu")


def sides_on(src_device: str, dst_device: str) -> tuple[Side, Side]:
    layout = KVLayout.from_order(
        "LKBNHC", num_layers=1, num_blocks=2, block_size=4, num_kv_heads=1, head_dim=8, dtype="float16"
    )  # fmt: skip
    sides = [Side(name, layout, np.zeros(layout.nbytes, np.uint8)) for name in ("src", "dst")]
    sides[0].device, sides[1].device = src_device, dst_device
    return sides[0], sides[1]


def test_a_copy_to_another_gpu_runs_on_the_sources_and_is_given_access_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch = pytest.importorskip("torch")
    reached, launched = [], []
    native = SimpleNamespace(
        reach_peer=lambda device, peer: reached.append((device, peer)),
        copy_rows=lambda *_, **how: launched.append(how),
        CopyPart=lambda *_: None,
        INLINE_TABLES=1 << 20,
        MAX_PARTS=16,
    )
    monkeypatch.setattr(_cuda, "native", native)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=7))
    _cuda._reach.cache_clear()
    try:
        for src, dst in [("cuda:2", "cuda:1"), ("cuda:2", "cuda:1"), ("cuda:1", "cuda:1")]:
            job = make_job(*sides_on(src, dst), [0, 1], [1, 0], num_tokens=None, first_token=0, layers=None)  # fmt: skip
            assert job.device == src
            _cuda.copy_blocks(job)
        assert reached == [(2, 1)]
        assert [how["stream"] for how in launched] == [7, 7, 7]
    finally:
        _cuda._reach.cache_clear()


def test_a_copy_between_a_gpu_and_ordinary_host_memory_is_refused() -> None:
    pytest.importorskip("torch")
    with pytest.raises(
        InvalidArgumentError, match="of another GPU, or pinned host memory on one side, given cpu"
    ):
        make_job(*sides_on("cuda:0", "cpu"), [0], [1], num_tokens=None, first_token=0, layers=None)
