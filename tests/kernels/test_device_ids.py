# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Ids on a device are not looked at, but where KVXFER_CHECK_DEVICE_IDS=1 asks for it: then a wrong one is refused.

Through the functions, on the two backends for devices; those of the host always look (test_kernel_arguments.py). Host
tensors stand for a device's, and launches are noted in place of being made.
"""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
triton_append = pytest.importorskip("kvxfer.kernels.triton.append")

from kvxfer import kernels  # noqa: E402
from kvxfer.errors import InvalidArgumentError  # noqa: E402
from kvxfer.kernels import _cuda, _cuda_base, _cuda_decode  # noqa: E402
from kvxfer.kernels.triton import attention_decode, attention_prefill, mla  # noqa: E402
from kvxfer.kernels.triton._common import INTERPRETED  # noqa: E402

needs_cuda = pytest.mark.skipif(
    _cuda_base.missing is not None, reason=f"not built: {_cuda_base.missing}"
)
needs_triton = pytest.mark.skipif(not INTERPRETED, reason="host tensors need TRITON_INTERPRET=1")

Call = dict[str, Any]


class Kernel:
    """Notes that it was launched, as Triton's kernels are and as the extension module's functions are."""

    def __init__(self) -> None:
        self.launches = 0

    def __getitem__(self, grid: Any) -> Any:
        return self

    def __call__(self, *arguments: Any, **options: Any) -> None:
        self.launches += 1


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    monkeypatch.delenv("KVXFER_CHECK_DEVICE_IDS", raising=False)
    kernel = Kernel()
    native = SimpleNamespace(
        append_kv=kernel,
        paged_decode=kernel,
        AppendPart=lambda *_, **__: None,
        Decode=SimpleNamespace,
        DECODE_TILE=64,
    )
    for module in (_cuda, _cuda_decode):
        monkeypatch.setattr(module, "native", native)
    for name in ("unavailable", "refuses"):
        monkeypatch.setattr(_cuda, name, lambda op, _: None)
    for module, name in (
        (triton_append, "append_kernel"),
        (attention_decode, "decode_kernel"),
        (attention_decode, "merge_splits_kernel"),
        (attention_prefill, "prefill_kernel"),
        (mla, "mla_kernel"),
    ):
        monkeypatch.setattr(module, name, kernel)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=7))
    return kernel


def run(op: str, backend: str, where: str | None = None, at: Any = None, to: int = 0) -> None:
    """A call of two sequences over 5 blocks of 16 tokens, in which one number may be another."""
    call: Call = {"k_cache": torch.zeros(5, 16, 2, 64), "v_cache": torch.zeros(5, 16, 2, 64)}
    call = {name: cache.half() for name, cache in call.items()}
    if op == "append_kv":
        row = torch.zeros(3, 2, 64).half()
        call |= {"key": row, "value": row.clone(), "slot_mapping": torch.tensor([0, -1, 79])}
    else:
        call |= {
            "q": torch.zeros(2, 4, 64).half(),
            "block_table": torch.tensor([[3, 0], [4, -1]], dtype=torch.int32),
            "seq_lens": torch.tensor([17, 16], dtype=torch.int32),
        }
    if op == "paged_decode":
        call["split_size"] = 64
    if op == "mla_decode":
        del call["q"], call["k_cache"], call["v_cache"]
        call |= {
            "q_latent": torch.zeros(2, 4, 48).half(),
            "q_rope": torch.zeros(2, 4, 16).half(),
            "latent_cache": torch.zeros(5, 16, 64).half(),
            "sm_scale": 1.0,
        }
    if op == "paged_prefill":
        call["cu_seqlens_q"] = torch.tensor([0, 1, 2], dtype=torch.int32)
    if where is not None:
        call[where][at] = to
    getattr(kernels, op)(**call, backend=backend)


BACKENDS = [
    pytest.param("cuda", "append_kv", marks=needs_cuda),
    pytest.param("cuda", "paged_decode", marks=needs_cuda),
    pytest.param("triton", "append_kv", marks=needs_triton),
    pytest.param("triton", "paged_decode", marks=needs_triton),
    pytest.param("triton", "paged_prefill", marks=needs_triton),
    pytest.param("triton", "mla_decode", marks=needs_triton),
]
ATTENTION = [
    ("block_table", (0, 1), 5, r"block_table\[0, 1\]: expected a block id from 0 to 4, given 5"),
    ("block_table", (1, 0), -1, r"block_table\[1, 0\]: expected a block id from 0 to 4, given -1"),
    ("seq_lens", 1, 33, "expected .*2 blocks of 16.*given 33|at least 3 blocks of 16 for the 33 tokens of sequence 1, given 2"),
]  # fmt: skip
APPEND = [
    ("slot_mapping", 2, 80, r"slot_mapping\[2\]: expected -1 or a slot from 0 to 79.*, given 80"),
    ("slot_mapping", 0, -2, r"slot_mapping\[0\]: expected -1 or a slot from 0 to 79.*, given -2"),
]


@pytest.mark.parametrize(("backend", "op"), BACKENDS)
def test_wrong_ids_on_a_device_are_refused_when_asked_for_and_only_then(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch, backend: str, op: str
) -> None:
    wrong = APPEND if op == "append_kv" else ATTENTION
    for where, at, to, _ in wrong:
        run(op, backend, where, at, to)
    unchecked = kernel.launches
    assert unchecked >= len(wrong), "a look at ids on a device waits for it"
    monkeypatch.setenv("KVXFER_CHECK_DEVICE_IDS", "1")
    for where, at, to, message in wrong:
        with pytest.raises(InvalidArgumentError, match=message):
            run(op, backend, where, at, to)
    assert kernel.launches == unchecked, "what is refused must not be launched"
    run(op, backend)
    assert kernel.launches > unchecked


@needs_cuda
def test_a_plan_for_other_lengths_on_a_device_is_refused_when_asked_for(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    lens = torch.tensor([17, 16], dtype=torch.int32)
    plan = kernels.plan_decode(
        [17, 15], num_q_heads=4, num_kv_heads=2, head_dim=64, block_size=16, split_size=64
    )
    monkeypatch.setenv("KVXFER_CHECK_DEVICE_IDS", "1")
    q, cache = torch.zeros(2, 4, 64).half(), torch.zeros(5, 16, 2, 64).half()
    table = torch.tensor([[3, 0], [4, -1]], dtype=torch.int32)
    with pytest.raises(
        InvalidArgumentError,
        match=r"plan: expected one for seq_lens \[17, 16\], given one for \[17, 15\]",
    ):
        _cuda.paged_decode(
            q, cache, cache, table, lens, torch.empty_like(q), None,
            sm_scale=1.0, v_scale=1.0, window_left=-1, logits_soft_cap=0.0, sinks=None,
            split_size=64, plan=plan,
        )  # fmt: skip
    assert kernel.launches == 0
