# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""An append like one that has passed its checks skips them: it writes the same, and mistakes are still refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from kvxfer import kernels
from kvxfer.errors import InvalidArgumentError
from kvxfer.kernels import append

Call = dict[str, Any]


@pytest.fixture(autouse=True)
def _nothing_known() -> Iterator[None]:
    append._passed.clear()
    yield
    append._passed.clear()


def call(kv_layout: str, dtype: torch.dtype, seed: int) -> Call:
    generator = torch.Generator().manual_seed(seed)
    shape = (5, 4, 2, 8) if kv_layout == "NHD" else (5, 2, 4, 8)
    key, value = (torch.randn(3, 2, 8, generator=generator) for _ in range(2))
    caches = {f"{name}_cache": torch.zeros(shape).to(dtype) for name in "kv"}
    slots = torch.randperm(20, generator=generator)[:3]
    return {"key": key, "value": value, **caches, "slot_mapping": slots, "kv_layout": kv_layout}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
def test_the_second_call_writes_what_a_first_one_would(
    backend: str, kv_layout: str, dtype: torch.dtype
) -> None:
    def run(seed: int) -> bytes:
        given = call(kv_layout, dtype, seed)
        kernels.append_kv(**given, k_scale=2.0, backend=backend)
        parts = [given[name].view(torch.uint8).numpy().tobytes() for name in ("k_cache", "v_cache")]
        return b"".join(parts)

    run(1)
    assert len(append._passed) == (backend == "cpu"), "the reference looks at all it gets"
    again = run(2)
    append._passed.clear()
    assert again == run(2)
    assert any(again)


@pytest.mark.parametrize("name", ["key", "value", "k_cache", "v_cache"])
def test_an_append_that_is_asked_for_gradients_says_that_it_has_none(
    backend: str, name: str
) -> None:
    """Once: they were dropped in silence; also by the second call, which skips checks."""
    kernels.append_kv(**call("NHD", torch.float32, 1), backend=backend)
    given = call("NHD", torch.float32, 2)
    want = {part: given[part].clone() for part in ("k_cache", "v_cache")}
    kernels.append_kv(**given | want, backend=backend)
    given[name].requires_grad_()
    for _ in range(2):
        with pytest.raises(InvalidArgumentError, match=f"{name}: expected no gradient to be asked for.*no_grad"):  # fmt: skip
            kernels.append_kv(**given, backend=backend)
        assert not given["k_cache"].any()
        assert not given["v_cache"].any()
        with torch.no_grad():
            into = {part: torch.zeros_like(w) for part, w in want.items()}
            if name in into:
                into[name].requires_grad_()
            kernels.append_kv(**given | into, backend=backend)
        assert all(torch.equal(into[part].detach(), want[part]) for part in want)


WRONG: dict[str, Callable[[Call], Call]] = {
    "slot out of range": lambda c: {"slot_mapping": c["slot_mapping"] + 20},
    "dtype of slots": lambda c: {"slot_mapping": c["slot_mapping"].int()},
    "rows of value": lambda c: {"value": c["value"][:2]},
    "strides of key": lambda c: {"key": torch.stack([c["key"]] * 2, -1)[..., 0]},
    "dtype of v_cache": lambda c: {"v_cache": c["v_cache"].half()},
    "scale": lambda c: {"k_scale": 0.0},
    "no text": lambda c: {"kv_layout": ["NHD"]},
    "no name of a backend": lambda c: {"backend": ["cpu"]},
    "no name of a dtype": lambda c: {"kv_dtype": []},
    "layout": lambda c: {"kv_layout": "HND"},
    "another library": lambda c: {"key": c["key"].numpy()},
}


@pytest.mark.parametrize("case", WRONG)
def test_mistakes_after_a_call_that_passed_are_refused(case: str) -> None:
    kernels.append_kv(**call("NHD", torch.float32, 1))
    given = call("NHD", torch.float32, 2)
    before = given["k_cache"].clone()
    with pytest.raises(InvalidArgumentError) as late:
        kernels.append_kv(**given | WRONG[case](given))
    assert torch.equal(given["k_cache"], before)
    append._passed.clear()
    with pytest.raises(InvalidArgumentError) as first:
        kernels.append_kv(**given | WRONG[case](given))
    assert str(late.value) == str(first.value)


def test_caches_that_come_to_share_memory_are_seen_and_halves_of_one_tensor_are_not_mistaken() -> (
    None
):
    given = call("NHD", torch.float32, 1)
    kernels.append_kv(**given)
    pool = torch.zeros(6, 4, 2, 8)
    shifted = {"k_cache": pool[:5], "v_cache": pool[1:]}
    with pytest.raises(InvalidArgumentError, match="v_cache: expected memory of its own"):
        kernels.append_kv(**given | shifted)
    assert not pool.any()
    for fused in (torch.zeros(5, 2, 4, 2, 8), torch.zeros(2, 5, 4, 2, 8).transpose(0, 1)):
        for _ in range(2):
            kernels.append_kv(**given | {"k_cache": fused[:, 0], "v_cache": fused[:, 1]})
        assert torch.equal(fused[:, 0], given["k_cache"])
        assert torch.equal(fused[:, 1], given["v_cache"])


def test_views_into_larger_tensors_are_told_apart_by_their_strides() -> None:
    given = call("NHD", torch.float32, 1)
    kernels.append_kv(**given)
    wide = torch.zeros(5, 4, 2, 16)
    kernels.append_kv(**given | {"k_cache": wide[..., 8:]})
    assert torch.equal(wide[..., 8:], given["k_cache"])
    assert not wide[..., :8].any()


def test_what_has_passed_is_not_kept_without_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(append, "_MOST_PASSED", 3)
    for tokens in range(1, 8):
        given = call("NHD", torch.float32, 1)
        for name in ("key", "value"):
            given[name] = torch.zeros(tokens, 2, 8)
        kernels.append_kv(**given | {"slot_mapping": torch.arange(tokens)})
        assert len(append._passed) <= 3
