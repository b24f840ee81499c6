# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""FlashInfer's kernels for the benchmark's cases, where that package can be imported.

It compiles its kernels at first use, which takes minutes; what cannot be compiled or run is a reason, not an end.
Plans are made outside the measured calls, as ours are.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from cases import DecodeCase, PrefillCase
from timing import Call

WORKSPACE_NBYTES = 256 << 20


class Peers:
    """Raises ImportError where FlashInfer is not installed."""

    def __init__(self) -> None:
        import flashinfer

        self._module = flashinfer
        self.version = str(flashinfer.__version__)
        self._workspace = torch.zeros(WORKSPACE_NBYTES, dtype=torch.uint8, device="cuda")
        # XQA keeps semaphores in its own: it must begin as zeros and be shared with nobody.
        self._xqa_workspace = torch.zeros(WORKSPACE_NBYTES, dtype=torch.uint8, device="cuda")

    def decode(self, case: DecodeCase) -> dict[str, Callable[[], list[Call]]]:
        """By name, what makes the calls: one per set of pages."""
        return {
            "flashinfer fa2": lambda: self._decode(case, tensor_cores=True),
            "flashinfer cuda cores": lambda: self._decode(case, tensor_cores=False),
            "flashinfer xqa": lambda: self._xqa(case),
        }

    def _decode(self, case: DecodeCase, *, tensor_cores: bool) -> list[Call]:
        calls: list[Call] = []
        for pages, out in zip(case.sets, case.outs, strict=True):
            wrapper = self._module.BatchDecodeWithPagedKVCacheWrapper(
                self._workspace, "NHD", use_tensor_cores=tensor_cores, backend="fa2" if tensor_cores else "auto"
            )  # fmt: skip
            wrapper.plan(
                pages.indptr, pages.indices, pages.last, case.num_q_heads, case.num_kv_heads, case.head_dim,
                case.block_size, q_data_type=case.q.dtype, kv_data_type=case.pool.dtype,
            )  # fmt: skip
            calls.append(
                lambda wrapper=wrapper, out=out: wrapper.run(case.q, case.pool, out=out)  # type: ignore[misc]
            )
        return calls

    def _xqa(self, case: DecodeCase) -> list[Call]:
        run = self._module.decode.xqa_batch_decode_with_kv_cache
        lens = case.lens.view(torch.uint32)
        return [
            lambda pages=pages, out=out: run(  # type: ignore[misc]
                case.q, (case.k, case.v), self._xqa_workspace, pages.table, lens, max(case.lengths),
                bmm1_scale=case.head_dim**-0.5, bmm2_scale=1.0, kv_layout="NHD", out=out,
            )
            for pages, out in zip(case.sets, case.outs, strict=True)
        ]  # fmt: skip

    def prefill(self, case: PrefillCase) -> dict[str, Callable[[], list[Call]]]:
        names = ["fa2"] if case.pool.dtype != torch.bfloat16 else ["fa2", "fa3"]
        return {f"flashinfer {name}": lambda name=name: self._prefill(case, name) for name in names}  # type: ignore[misc]

    def _prefill(self, case: PrefillCase, backend: str) -> list[Call]:
        wrapper = self._module.BatchPrefillWithPagedKVCacheWrapper(
            self._workspace, "NHD", backend=backend
        )
        pages = case.sets[0]
        wrapper.plan(
            case.cu_seqlens_q, pages.indptr, pages.indices, pages.last, case.num_q_heads, case.num_kv_heads,
            case.head_dim, case.block_size, causal=True, q_data_type=case.q.dtype, kv_data_type=case.pool.dtype,
        )  # fmt: skip
        return [lambda: wrapper.run(case.q, case.pool, out=case.outs[0])]
