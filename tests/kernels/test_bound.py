# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""A bound cache does what the plain functions do, for what it shortens and for what it hands on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from kvxfer import kernels
from kvxfer.errors import InvalidArgumentError

BLOCKS, SIZE, HEADS, DIM = 9, 4, 2, 8


def caches(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (BLOCKS, HEADS, SIZE, DIM)
    k, v = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    return k.permute(0, 2, 1, 3), v.permute(0, 2, 1, 3)


def step(dtype: torch.dtype = torch.float32, batch: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    # As a model has them: slices of one projection, so rows are strided.
    qkv = torch.randn(batch, 4 * HEADS, DIM, generator=generator).to(dtype)
    return {
        "q": qkv[:, : 2 * HEADS],
        "key": qkv[:, 2 * HEADS : 3 * HEADS],
        "value": qkv[:, 3 * HEADS :],
        "slots": torch.tensor([5, -1, 30])[:batch],
        "table": torch.tensor([[1, 3], [7, -1], [0, 2]], dtype=torch.int32)[:batch],
        "lens": torch.tensor([6, 4, 0], dtype=torch.int32)[:batch],
    }


def plain(k: Any, v: Any, s: dict[str, Any], window_left: int = -1) -> Any:
    kernels.append_kv(s["key"], s["value"], k, v, s["slots"])
    return kernels.paged_decode(
        s["q"], k, v, s["table"], s["lens"], sm_scale=0.3, window_left=window_left
    )


def bound(k: Any, v: Any, s: dict[str, Any], window_left: int = -1) -> Any:
    cache = kernels.BoundCache(k, v)
    cache.append(s["key"], s["value"], s["slots"])
    return cache.decode(s["q"], s["table"], s["lens"], sm_scale=0.3, window_left=window_left)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("window_left", [-1, 0, 2])
def test_bound_and_plain_calls_agree_bitwise(
    dtype: torch.dtype, batch: int, window_left: int
) -> None:
    ours, theirs = caches(dtype), caches(dtype)
    before = ours[0].clone()
    out = bound(*ours, step(dtype, batch), window_left)
    assert torch.equal(out, plain(*theirs, step(dtype, batch), window_left))
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])
    assert not torch.equal(ours[0], before)


def test_numpy_arrays_and_gradients_take_the_long_way() -> None:
    expected = plain(*caches(), step())
    arrays = {name: tensor.numpy() for name, tensor in step().items()}
    k, v = (cache.numpy() for cache in caches())
    out = bound(k, v, arrays)
    assert isinstance(out, np.ndarray)
    assert np.array_equal(out, expected.numpy())
    tracked = step() | {"q": step()["q"].clone().requires_grad_()}
    with torch.no_grad():
        assert torch.equal(bound(*caches(), tracked), expected)
    with pytest.raises(InvalidArgumentError, match="q: expected no gradient to be asked for"):
        bound(*caches(), tracked)
    for at, name in enumerate(("k_cache", "v_cache")):
        learned = list(caches())
        learned[at].requires_grad_()
        with pytest.raises(InvalidArgumentError, match=f"{name}: expected no gradient"):
            bound(*learned, step())
    tracked = step() | {"key": step()["key"].clone().requires_grad_()}
    with pytest.raises(InvalidArgumentError, match="key: expected no gradient to be asked for"):
        bound(*caches(), tracked)


@pytest.mark.parametrize(
    "how",
    [{"sm_scale": float("nan")}, {"sm_scale": "x"}, {"sm_scale": 1.0, "window_left": 1.5}, {"sm_scale": 1.0, "window_left": -2}],
)  # fmt: skip
def test_bad_numbers_get_the_error_of_the_plain_call(how: dict[str, Any]) -> None:
    (k, v), s = caches(), step()
    with pytest.raises(InvalidArgumentError) as theirs:
        kernels.paged_decode(s["q"], k, v, s["table"], s["lens"], **how)
    with pytest.raises(InvalidArgumentError) as ours:
        kernels.BoundCache(k, v).decode(s["q"], s["table"], s["lens"], **how)
    assert str(ours.value) == str(theirs.value)


def test_the_scale_may_be_left_to_the_width_and_numpy_numbers_are_numbers() -> None:
    (k, v), s = caches(), step()
    cache = kernels.BoundCache(k, v)
    expected = kernels.paged_decode(s["q"], k, v, s["table"], s["lens"])
    assert torch.equal(cache.decode(s["q"], s["table"], s["lens"], sm_scale=None), expected)
    how: dict[str, Any] = {"sm_scale": np.float64(DIM**-0.5), "window_left": np.int32(-1)}
    assert torch.equal(cache.decode(s["q"], s["table"], s["lens"], **how), expected)


def test_a_cache_whose_halves_are_one_is_not_appended_to() -> None:
    k, _ = caches()
    s = step()
    with pytest.raises(InvalidArgumentError, match="v_cache: expected memory of its own"):
        kernels.BoundCache(k, k).append(s["key"], s["value"], s["slots"])
    wide = k[:1].expand(BLOCKS, SIZE, HEADS, DIM)
    with pytest.raises(InvalidArgumentError, match="k_cache: expected each element at a place"):
        kernels.BoundCache(wide, caches()[1]).append(s["key"], s["value"], s["slots"])


def strided(tensor: torch.Tensor) -> torch.Tensor:
    return torch.stack([tensor, tensor], dim=-1)[..., 0]


BAD: dict[str, Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]] = {
    "rank of q": lambda s: {"q": s["q"][0]},
    "width of q": lambda s: {"q": s["q"][..., :4]},
    "heads of q": lambda s: {"q": s["q"][:, :3]},
    "dtype of q": lambda s: {"q": s["q"].double()},
    "strides of q": lambda s: {"q": strided(s["q"])},
    "heads of key": lambda s: {"key": s["key"][:, :1]},
    "rows of value": lambda s: {"value": s["value"][:2]},
    "dtype of slots": lambda s: {"slots": s["slots"].int()},
    "rows of slots": lambda s: {"slots": s["slots"][:2]},
    "slot out of range": lambda s: {"slots": s["slots"] + 1000},
    "dtype of table": lambda s: {"table": s["table"].long()},
    "rows of table": lambda s: {"table": s["table"][:2]},
    "block out of range": lambda s: {"table": s["table"] + 100},
    "rows of lens": lambda s: {"lens": s["lens"][:2]},
    "lens past the table": lambda s: {"lens": s["lens"] + 100},
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_get_the_error_of_the_plain_call(case: str) -> None:
    arguments = step() | BAD[case](step())
    with pytest.raises(InvalidArgumentError) as theirs:
        plain(*caches(), arguments)
    with pytest.raises(InvalidArgumentError) as ours:
        bound(*caches(), arguments)
    assert str(ours.value) == str(theirs.value)


def test_bad_caches_are_refused_when_bound() -> None:
    k, v = caches()
    with pytest.raises(InvalidArgumentError, match="v_cache"):
        kernels.BoundCache(k, v[:, :, :1])
