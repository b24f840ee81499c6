# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""The GPU kernels on a GPU: each against float64 or bytes, with poison wherever nothing may be read.

    python tools/gpu_check/checks.py [--quick] [--backend cuda|triton] [--device cuda] [--json PATH]

Needs numpy and torch alone. ``--device cpu --backend reference`` tries the checks themselves on any machine.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import kernels_only  # noqa: F401 - before anything of kvxfer
import torch

from kvxfer import kernels
from kvxfer.layout import KVLayout, KVScales

Case = TypeVar("Case")
HALVES = (torch.float16, torch.bfloat16)
OUT_EPS = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-20}


class Checks:
    """The checks by name; each raises AssertionError or runs to its end."""

    def __init__(self, device: str, backend: str, quick: bool) -> None:
        self.device, self.backend, self.quick = torch.device(device), backend, quick
        self.generator = torch.Generator().manual_seed(1)

    def randn(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator)

    def cache_dtypes(self) -> Iterator[tuple[torch.dtype, torch.dtype]]:
        for dtype in HALVES:
            yield dtype, dtype
            yield dtype, torch.float8_e4m3fn
        if self.backend != "cuda":
            yield torch.bfloat16, torch.float8_e5m2

    def some(self, cases: Iterable[Case], most: int) -> list[Case]:
        """Of Triton's, which compiles each case anew, so many, spread over all; of others all."""
        found = list(cases)
        if self.backend != "triton" or len(found) <= most:
            return found
        return random.Random(1).sample(found, most)

    def decode(self) -> None:
        dims = (128,) if self.quick else (64, 128, 256)
        sizes = (16, 7) if self.quick else (1, 7, 16, 32)
        groups = (4,) if self.quick else (1, 4, 8, 20)
        cases = itertools.product(self.cache_dtypes(), dims, sizes, groups)
        options = ((-1, 0.0, False), (100, 3.0, True))
        for index, ((q_dtype, kv_dtype), dim, size, group) in enumerate(self.some(cases, 16)):
            # Under compute-sanitizer a launch takes seconds.
            for window, cap, sinks in options[index % 2 :][:1] if self.quick else options:
                self._decode(q_dtype, kv_dtype, dim, size, group, window, cap, sinks)

    def _decode(
        self, q_dtype: torch.dtype, kv_dtype: torch.dtype, dim: int, size: int, group: int,
        window: int, cap: float, with_sinks: bool,
    ) -> None:  # fmt: skip
        lengths = [0, 1, size - 1, size, size + 1, 300 if self.quick else 1500]
        heads = 2
        blocks = sum(-(-n // size) for n in lengths) + 2
        nan = torch.full((2, blocks, heads, size, dim), float("nan"))
        table = torch.full((len(lengths), -(-max(lengths) // size) + 1), -1, dtype=torch.int32)
        ids = torch.randperm(blocks, generator=self.generator).tolist()
        for row, length in enumerate(lengths):
            first = 0 if window < 0 else max(0, length - 1 - window)
            for column in range(first // size, -(-length // size)):
                table[row, column] = block = ids.pop()
                low, high = max(first - column * size, 0), min(length - column * size, size)
                nan[:, block, :, low:high] = self.randn(2, heads, high - low, dim)
        cache = nan.to(kv_dtype)
        q = self.randn(len(lengths), heads * group, dim).to(q_dtype)
        sinks = self.randn(heads * group) if with_sinks else None
        # What the kernel does not write stays poison.
        out = torch.full_like(q, float("nan")).to(self.device)
        k, v = cache.to(self.device)
        result, lse = kernels.paged_decode(
            q.to(self.device), k, v, table.to(self.device),
            torch.tensor(lengths, dtype=torch.int32, device=self.device), kv_layout="HND",
            window_left=window, logits_soft_cap=cap, v_scale=0.5, out=out, return_lse=True,
            sinks=None if sinks is None else sinks.to(self.device), backend=self.backend,
        )  # fmt: skip
        # All heads of a sequence at once, on the device unless its kernels are slow: float64 is float64 anywhere.
        where = torch.device("cpu") if self.quick else self.device
        wide, result, lse = cache.double().to(where), result.to(where), lse.to(where)
        for row, length in enumerate(lengths):
            first = 0 if window < 0 else max(0, length - 1 - window)
            keys = torch.arange(first, length)
            columns = table[row, keys // size].long()
            ks, vs = wide[:, columns.to(where), :, (keys % size).to(where)].unbind(1)
            queries = q[row].double().to(where).view(heads, group, dim)
            logits = torch.einsum("nhd,hgd->hgn", ks, queries).reshape(heads * group, -1)
            logits *= dim**-0.5
            if cap:
                logits = cap * torch.tanh(logits / cap)
            all_logits = logits
            if sinks is not None:
                sink = sinks.double().to(where)[:, None]
                all_logits = torch.cat([logits, sink], dim=1)
            want_lse = torch.logsumexp(all_logits, 1)
            weights = torch.exp(logits - want_lse[:, None]).nan_to_num(0).view(heads, group, -1)
            want = (torch.einsum("hgn,nhd->hgd", weights, vs) * 0.5).reshape(-1, dim)
            size_of = (torch.einsum("hgn,nhd->hgd", weights, vs.abs()) * 0.5).reshape(-1, dim)
            off = (result[row].double() - want).abs()
            bound = OUT_EPS[q_dtype] * (want.abs() + size_of) + 1e-4 * (1 + size_of)
            assert (off <= bound).all(), (row, float((off - bound).max()))
            lse_off = (lse[row].double() - want_lse).abs()
            same = (lse[row] == want_lse) | (lse_off < 1e-4 * (1 + want_lse.abs()))
            assert same.all(), (row, lse[row].tolist(), want_lse.tolist())

    def decode_is_repeatable_and_independent_of_the_batch(self) -> None:
        blocks, size, heads, dim = 600, 16, 2, 128
        k, v = (self.randn(blocks, size, heads, dim).half().to(self.device) for _ in range(2))
        q = self.randn(4, 8, dim).half().to(self.device)
        table = torch.randperm(blocks)[: 4 * 150].reshape(4, 150).int().to(self.device)
        lens = torch.tensor([2400, 1, 1000, 2399], dtype=torch.int32, device=self.device)

        def run(rows: slice) -> torch.Tensor:
            return kernels.paged_decode(
                q[rows], k, v, table[rows], lens[rows], split_size=512, backend=self.backend
            )

        first = run(slice(None))
        for _ in range(3 if self.quick else 50):
            assert torch.equal(run(slice(None)), first)
        for row in range(4):
            assert torch.equal(run(slice(row, row + 1))[0], first[row])

    def append(self) -> None:
        for (dtype, kv_dtype), size in itertools.product(self.cache_dtypes(), (16, 5)):
            blocks, heads, dim, tokens = 9, 3, 64, 37
            cache = torch.zeros(2, blocks, heads, size, dim).to(kv_dtype).to(self.device)
            rows = self.randn(2, tokens, heads, dim).to(dtype)
            slots = torch.randperm(blocks * size, generator=self.generator)[:tokens]
            slots[3] = -1
            scale = 0.75 if dtype != kv_dtype else 1.0
            kernels.append_kv(
                *rows.to(self.device), *cache, slots.to(self.device), kv_layout="HND",
                k_scale=scale, v_scale=scale, backend=self.backend,
            )  # fmt: skip
            want = torch.zeros(2, blocks, heads, size, dim)
            for token, slot in enumerate(slots.tolist()):
                if slot >= 0:
                    want[:, slot // size, :, slot % size] = rows[:, token].float() / scale
            assert torch.equal(cache.cpu().float(), want.to(kv_dtype).float())

    def append_with_scales_in_memory(self) -> None:
        if self.backend == "cuda":
            return  # it knows none
        for kv_dtype in (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8):
            rows = self.randn(2, 37, 3, 64).bfloat16() * 1000
            slots = torch.randperm(9 * 16, generator=self.generator)[:37]
            found = []
            for device, backend in ((self.device, self.backend), ("cpu", "reference")):
                cache = torch.zeros(2, 9, 16, 3, 64, dtype=torch.uint8).view(kv_dtype).to(device)
                scales = torch.zeros(2, 9, 16, 3, device=device)
                kernels.append_kv(
                    *rows.to(device), *cache, slots.to(device),
                    k_scale_cache=scales[0], v_scale_cache=scales[1], backend=backend,
                )  # fmt: skip
                found.append((cache.view(torch.uint8).cpu(), scales.cpu()))
            assert torch.equal(found[0][0], found[1][0]), kv_dtype
            assert torch.equal(found[0][1], found[1][1]), kv_dtype

    def conversions(self) -> None:
        """Every code of an 8-bit dtype, and numbers at, between and past them."""
        if self.backend == "cuda":
            return
        for kv_dtype in (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8):
            exact = torch.arange(256, dtype=torch.uint8).view(kv_dtype).float()
            exact = exact[exact.isfinite()].sort().values
            ties = (exact[:-1] + exact[1:]) / 2
            near = [torch.nextafter(ties, torch.tensor(x)) for x in (-1e38, 1e38)]
            wide = self.randn(500) * 2.0 ** torch.arange(-250, 250).div(12)
            values = torch.cat([exact, ties, *near, wide, torch.tensor([1e30, -1e30, torch.inf])])
            values = values[: len(values) // 32 * 32].reshape(-1, 1, 32)
            found = []
            for device, backend in ((self.device, self.backend), ("cpu", "reference")):
                cache = torch.zeros(len(values), 1, 1, 32, dtype=torch.uint8).view(kv_dtype)
                k, v = cache.to(device), cache.clone().to(device)
                rows = values.to(device)
                slots = torch.arange(len(values), device=device)
                kernels.append_kv(rows, rows, k, v, slots, backend=backend)
                found.append(k.view(torch.uint8).cpu())
            assert torch.equal(*found), (kv_dtype, (found[0] != found[1]).nonzero()[:4])

    def prefill(self) -> None:
        if self.backend == "cuda":
            return  # it has none
        dims = (128,) if self.quick else (64, 128, 256)
        # Whole prompts and continuations; the last ones are short, so that heads share tiles.
        batches = [([70, 300, 0], [70, 130, 0]), ([200, 33, 9], [1, 5, 2])]
        cases = itertools.product(self.cache_dtypes(), dims, (16, 64), batches)
        for (q_dtype, kv_dtype), dim, size, batch in self.some(cases, 6):
            for window, cap, sinks, causal in (
                (-1, 0.0, False, True), (40, 3.0, True, True), (-1, 0.0, False, False),
            ):  # fmt: skip
                self._prefill(q_dtype, kv_dtype, dim, size, *batch, window, cap, sinks, causal)

    def _prefill(
        self, q_dtype: torch.dtype, kv_dtype: torch.dtype, dim: int, size: int, lengths: list[int],
        new: list[int], window: int, cap: float, with_sinks: bool, causal: bool,
    ) -> None:  # fmt: skip
        heads, group = 2, 4
        blocks = sum(-(-n // size) for n in lengths) + 1
        cache = torch.full((2, blocks, size, heads, dim), float("nan"))
        table = torch.full((len(lengths), -(-max(lengths) // size)), -1, dtype=torch.int32)
        ids = torch.randperm(blocks, generator=self.generator).tolist()
        for row, length in enumerate(lengths):
            for column in range(-(-length // size)):
                table[row, column] = block = ids.pop()
                end = min(size, length - column * size)
                cache[:, block, :end] = self.randn(2, end, heads, dim)
        cache = cache.to(kv_dtype)
        q = self.randn(sum(new), heads * group, dim).to(q_dtype)
        sinks = self.randn(heads * group) if with_sinks else None
        starts = torch.tensor([0, *itertools.accumulate(new)], dtype=torch.int32)
        k, v = cache.to(self.device)

        def prefill(batch: int, **how: bool) -> tuple[torch.Tensor, torch.Tensor]:
            """Of the first so many sequences."""
            return kernels.paged_prefill(
                q[: starts[batch]].to(self.device), k, v, starts[: batch + 1].to(self.device),
                table[:batch].to(self.device),
                torch.tensor(lengths[:batch], dtype=torch.int32, device=self.device), causal=causal,
                window_left=window, logits_soft_cap=cap, v_scale=0.5, return_lse=True,
                sinks=None if sinks is None else sinks.to(self.device), backend=self.backend, **how,
            )  # fmt: skip

        result, lse = prefill(len(lengths))
        if causal and window < 0 and not self.quick:  # compiles one more tile
            one, all_ = prefill(1, batch_invariant=True), prefill(len(new), batch_invariant=True)
            for alone, beside in zip(one, all_, strict=True):
                assert torch.equal(alone, beside[: new[0]]), "other bits in another batch"
        for row, (length, count) in enumerate(zip(lengths, new, strict=True)):
            keys = torch.arange(length)
            ks, vs = cache[:, table[row, keys // size].long(), keys % size].double()
            queries = q[starts[row] : starts[row + 1]].double()
            at = torch.arange(length - count, length)
            seen = torch.ones(count, length, dtype=torch.bool)
            if causal:
                seen &= keys <= at[:, None]
            if window >= 0:
                seen &= keys >= at[:, None] - window
            ks, vs = (x.repeat_interleave(group, 1).transpose(0, 1) for x in (ks, vs))
            logits = queries.transpose(0, 1) @ ks.transpose(1, 2) * dim**-0.5
            if cap:
                logits = cap * torch.tanh(logits / cap)
            logits = logits.masked_fill(~seen, -torch.inf)
            want_lse = torch.logsumexp(logits, 2)
            if sinks is not None:
                want_lse = torch.logaddexp(want_lse, sinks.double()[:, None])
            weights = torch.exp(logits - want_lse[..., None])
            want, size_of = (weights @ x.nan_to_num() * 0.5 for x in (vs, vs.abs()))
            got = result[starts[row] : starts[row + 1]].transpose(0, 1).double().cpu()
            # Weights are rounded to the operands' dtype, each by itself.
            bound = 2 * OUT_EPS[q_dtype] * (want.abs() + size_of) + 1e-4 * (1 + size_of)
            assert ((got - want).abs() <= bound).all(), (row, (got - want).abs().max())
            given = lse[starts[row] : starts[row + 1]].T.double().cpu()
            assert torch.allclose(given, want_lse, rtol=1e-4, atol=1e-4)

    def mla(self) -> None:
        if self.backend == "cuda":
            return  # it has none
        cases = itertools.product(self.cache_dtypes(), (64, 7), (16, 128))
        for (q_dtype, kv_dtype), size, heads in self.some(cases, 8):
            lengths = [0, 1, 65, 700]
            blocks = sum(-(-n // size) for n in lengths) + 1
            cache = torch.full((blocks, size, 576), float("nan"))
            table = torch.full((4, -(-700 // size)), -1, dtype=torch.int32)
            ids = torch.randperm(blocks, generator=self.generator).tolist()
            for row, length in enumerate(lengths):
                for column in range(-(-length // size)):
                    table[row, column] = block = ids.pop()
                    end = min(size, length - column * size)
                    cache[block, :end] = self.randn(end, 576)
            cache = cache.to(kv_dtype)
            q = self.randn(4, heads, 576).to(q_dtype)
            result, lse = kernels.mla_decode(
                q[..., :512].to(self.device), q[..., 512:].to(self.device), cache.to(self.device),
                table.to(self.device), torch.tensor(lengths, dtype=torch.int32, device=self.device),
                sm_scale=0.07, kv_scale=0.5, return_lse=True, backend=self.backend,
            )  # fmt: skip
            for row, length in enumerate(lengths):
                keys = torch.arange(length)
                rows = cache[table[row, keys // size].long(), keys % size].double() * 0.5
                logits = q[row].double() @ rows.T * 0.07
                want_lse = torch.logsumexp(logits, 1)
                weights = torch.exp(logits - want_lse[:, None]).nan_to_num()
                want, size_of = weights @ rows[:, :512], weights @ rows[:, :512].abs()
                got = result[row].double().cpu()
                bound = 2 * OUT_EPS[q_dtype] * (want.abs() + size_of) + 1e-4 * (1 + size_of)
                assert ((got - want).abs() <= bound).all(), (row, (got - want).abs().max())
                assert torch.allclose(lse[row].double().cpu(), want_lse, rtol=1e-4, atol=1e-4)

    def checksums(self) -> None:
        for order, width in itertools.product(("LKBNHC", "BLKHNC"), (128, 5)):
            a = KVLayout.from_order(
                order, num_layers=3, num_blocks=40, block_size=16, num_kv_heads=4, head_dim=width,
                dtype="bfloat16",
            )  # fmt: skip
            memory = torch.randint(0, 256, (a.nbytes,), dtype=torch.uint8, generator=self.generator)
            ids = torch.randperm(40, generator=self.generator).tolist()
            found = [
                kernels.checksum_blocks(
                    a, memory.to(device), ids, num_tokens=630, first_token=3, backend=backend
                ).tolist()
                for device, backend in ((self.device, self.backend), ("cpu", "reference"))
            ]
            assert found[0] == found[1], (order, width)

    def copies_between_scales(self) -> None:
        if self.backend == "cuda":
            dtypes = [("bfloat16", "float8_e4m3"), ("float8_e4m3", "float16")]
        else:
            dtypes = [("bfloat16", "float8_e4m3"), ("float8_e5m2", "int8"), ("int8", "float16")]
        how: dict[str, Any] = {"num_kv_heads": 4, "head_dim": 64, "num_layers": 2, "num_blocks": 6}
        scales = KVScales("head", k=(0.1, 0.2, 0.3, 0.4), v=(0.7, 0.05, 1.0, 2.0))
        for names in dtypes:
            a, b = (
                KVLayout.from_order(
                    order, block_size=8, dtype=name, scales=scales if "8" in name else None, **how
                )
                for order, name in zip(("LKBNHC", "LKBHNC"), names, strict=True)
            )
            wide = self.randn(a.nbytes // a.itemsize) * 20
            named = {"float8_e4m3": "float8_e4m3fn"}.get(names[0], names[0])
            memory = wide.to(getattr(torch, named)).view(torch.uint8)
            found = []
            for device, backend in ((self.device, self.backend), ("cpu", "reference")):
                out = torch.zeros(b.nbytes, dtype=torch.uint8, device=device)
                kernels.copy_blocks(
                    a, memory.to(device), b, out, [5, 0, 2], [1, 2, 3], backend=backend
                )
                found.append(out.cpu())
            assert torch.equal(*found), names

    def copies(self) -> None:
        shape: dict[str, Any] = {"num_kv_heads": 4, "head_dim": 64, "num_layers": 3}
        orders = ("LKBNHC", "LKBHNC", "BLKHNC", "LBHNKC")
        for a, b in itertools.product(orders, orders[:2] if self.quick else orders):
            for dtypes in (("bfloat16", "bfloat16"), ("bfloat16", "float32")):
                src = KVLayout.from_order(a, num_blocks=7, block_size=16, dtype=dtypes[0], **shape)
                dst = KVLayout.from_order(b, num_blocks=30, block_size=5, dtype=dtypes[1], **shape)
                # Random bytes would be NaNs, which conversions may renew: small integers of bfloat16.
                memory = torch.randint(0, 99, (src.nbytes // 2,), generator=self.generator)
                memory = memory.to(torch.bfloat16).view(torch.uint8)
                results = []
                for device, backend in ((self.device, self.backend), ("cpu", "reference")):
                    out = torch.full((dst.nbytes,), 0x55, dtype=torch.uint8, device=device)
                    kernels.copy_blocks(
                        src, memory.to(device), dst, out, [6, 2, 3], list(range(20, 10, -1)),
                        num_tokens=45, first_token=2, backend=backend, max_ctas=3,
                    )  # fmt: skip
                    results.append(out.cpu())
                assert torch.equal(*results), (a, b, dtypes)

    def merges(self) -> None:
        for dtype in (torch.float32, *HALVES):
            v = self.randn(2, 33, 5, 64).to(dtype)
            lse = self.randn(2, 33, 5)
            lse[0, 3] = lse[1, 4] = lse[:, 5] = -torch.inf
            v[0, 3] = v[1, 4] = v[:, 5] = float("nan")
            got, got_lse = kernels.merge_states(
                v[0].to(self.device), lse[0].to(self.device), v[1].to(self.device),
                lse[1].to(self.device), backend=self.backend,
            )  # fmt: skip
            want_lse = torch.logsumexp(lse.double(), 0)
            weights = torch.exp(lse.double() - want_lse).nan_to_num(0)
            want = (weights[..., None] * v.double().nan_to_num(0)).sum(0)
            assert torch.allclose(got.cpu().double(), want, rtol=OUT_EPS[dtype], atol=1e-5)
            assert torch.allclose(got_lse.cpu().double(), want_lse, atol=1e-5)

    def graphs(self) -> None:
        """A captured decode stays right when lengths change."""
        if self.device.type != "cuda":
            return
        k, v = (self.randn(64, 16, 2, 64).half().to(self.device) for _ in range(2))
        q = self.randn(2, 4, 64).half().to(self.device)
        table = torch.arange(64, dtype=torch.int32, device=self.device).reshape(2, 32)
        lens = torch.tensor([500, 12], dtype=torch.int32, device=self.device)
        kernels.paged_decode(q, k, v, table, lens, backend=self.backend, split_size=64)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = kernels.paged_decode(q, k, v, table, lens, backend=self.backend, split_size=64)
        for lengths in ([500, 12], [1, 511], [0, 512]):
            lens.copy_(torch.tensor(lengths, dtype=torch.int32))
            graph.replay()
            want = kernels.paged_decode(q, k, v, table, lens, backend=self.backend, split_size=64)
            assert torch.equal(out, want), lengths

    def graphs_of_copies(self) -> None:
        """A captured copy moves what lies there at the replay; its tables are still there."""
        if self.device.type != "cuda" or self.backend != "cuda":
            return
        for blocks in (8, 300):  # tables in the launch, and on the device
            layout = KVLayout.from_order(
                "LKBNHC", num_layers=2, num_blocks=blocks, block_size=16, num_kv_heads=2, head_dim=64,
                dtype="bfloat16",
            )  # fmt: skip
            src = torch.zeros(layout.nbytes, dtype=torch.uint8, device=self.device)
            dst = torch.zeros_like(src)
            ids = list(range(blocks))
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                kernels.copy_blocks(layout, src, layout, dst, ids, ids[::-1], backend="cuda")
            src.copy_(torch.randint(0, 256, src.shape, generator=self.generator).to(torch.uint8))
            for _ in range(2):
                dst.zero_()
                graph.replay()
                rows = src.view(2, 2, blocks, -1)
                assert torch.equal(dst.view(2, 2, blocks, -1), rows.flip(2)), blocks

    def pinned_host_memory(self) -> None:
        """Copies out to pinned host memory and back, in another order, give the same bytes."""
        if self.device.type != "cuda" or self.backend != "cuda":
            return
        how: dict[str, Any] = {"num_layers": 2, "num_blocks": 40, "num_kv_heads": 2, "head_dim": 64}
        device, host = (
            KVLayout.from_order(order, block_size=16, dtype="bfloat16", **how)
            for order in ("LKBNHC", "LKBHNC")
        )
        memory = torch.randint(0, 256, (device.nbytes,), generator=self.generator).to(torch.uint8)
        src, back = memory.to(self.device), torch.zeros_like(memory, device=self.device)
        pinned = torch.zeros(host.nbytes, dtype=torch.uint8).pin_memory()
        ids = torch.randperm(40, generator=self.generator).tolist()
        kernels.copy_blocks(device, src, host, pinned, list(range(40)), ids, backend="cuda")
        torch.cuda.synchronize()
        want = torch.zeros(host.nbytes, dtype=torch.uint8)
        kernels.copy_blocks(device, memory, host, want, list(range(40)), ids, backend="reference")
        assert torch.equal(pinned, want)
        kernels.copy_blocks(host, pinned, device, back, ids, list(range(40)), backend="cuda")
        assert torch.equal(back.cpu(), memory)

    def another_gpu(self) -> None:
        """A copy into memory of a second GPU, where there is one and it can be reached, gives the same bytes."""
        if self.backend != "cuda" or torch.cuda.device_count() < 2:
            return
        other = torch.device("cuda", 1 - (self.device.index or 0))
        if not torch.cuda.can_device_access_peer(self.device.index or 0, other.index):
            return
        layout = KVLayout.from_order(
            "LKBNHC", num_layers=2, num_blocks=40, block_size=16, num_kv_heads=2, head_dim=64,
            dtype="bfloat16",
        )  # fmt: skip
        memory = torch.randint(0, 256, (layout.nbytes,), generator=self.generator).to(torch.uint8)
        src, dst = memory.to(self.device), torch.zeros_like(memory, device=other)
        ids = torch.randperm(40, generator=self.generator).tolist()
        kernels.copy_blocks(layout, src, layout, dst, list(range(40)), ids, backend="cuda")
        torch.cuda.synchronize(self.device)
        want = torch.zeros_like(memory)
        kernels.copy_blocks(layout, memory, layout, want, list(range(40)), ids, backend="reference")
        assert torch.equal(dst.cpu(), want)

    def compiled(self) -> None:
        """A decode step of operators, compiled whole by torch.compile and captured, gives what plain calls give."""
        if self.device.type != "cuda" or self.backend != "cuda" or self.quick:
            return
        import kvxfer.kernels.torch_ops  # noqa: F401

        ops = torch.ops.kvxfer
        k, v = (self.randn(64, 16, 2, 64).half().to(self.device) for _ in range(2))
        q, new = self.randn(2, 8, 64).half().to(self.device), self.randn(2, 2, 64).half()
        new = new.to(self.device)
        table = torch.arange(64, dtype=torch.int32, device=self.device).reshape(2, 32)
        lens = torch.tensor([500, 12], dtype=torch.int32, device=self.device)

        def step(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            slots = (
                table[torch.arange(2, device=q.device), (lens - 1) // 16].long() * 16
                + (lens - 1) % 16
            )
            ops.append_kv(new * 2, new + 1, k, v, slots)
            return ops.paged_decode(q * 2, k, v, table, lens)[0] + 1

        want_k, want_v = k.clone(), v.clone()
        want = step(q, want_k, want_v)
        compiled = torch.compile(step, fullgraph=True)
        ours_k, ours_v = k.clone(), v.clone()
        for _ in range(2):
            assert torch.allclose(compiled(q, ours_k, ours_v), want, rtol=0, atol=2e-3)
        assert torch.equal(ours_k, want_k)
        assert torch.equal(ours_v, want_v)
        graph_k, graph_v = k.clone(), v.clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = step(q, graph_k, graph_v)
        graph.replay()
        assert torch.equal(out, want)
        assert torch.equal(graph_k, want_k)

    def planned(self) -> None:
        """A plan gives what the call gives without one, and takes any lengths."""
        if self.device.type != "cuda" or self.backend != "cuda":
            return
        lengths = [0, 1, 1500, 64, 700, 129]
        k, v = (self.randn(200, 16, 2, 128).half().to(self.device) for _ in range(2))
        q = self.randn(len(lengths), 8, 128).half().to(self.device)
        table = torch.zeros(len(lengths), 100, dtype=torch.int32)
        ids = torch.randperm(200, generator=self.generator).tolist()
        for row, length in enumerate(lengths):
            for column in range(-(-length // 16)):
                table[row, column] = ids.pop()
        arguments = (
            q,
            k,
            v,
            table.to(self.device),
            torch.tensor(lengths, dtype=torch.int32).to(self.device),
        )
        how: dict[str, Any] = {
            "num_q_heads": 8,
            "num_kv_heads": 2,
            "head_dim": 128,
            "block_size": 16,
        }
        for split_size in (64, 512):
            want = kernels.paged_decode(*arguments, split_size=split_size, backend="cuda")
            plan = kernels.plan_decode(lengths, split_size=split_size, device=self.device, **how)
            assert torch.equal(kernels.paged_decode(*arguments, plan=plan, backend="cuda"), want)
        plan = kernels.plan_decode(lengths, balanced=True, device=self.device, **how)
        balanced = kernels.paged_decode(*arguments, plan=plan, backend="cuda")
        assert torch.allclose(balanced.float(), want.float(), atol=2e-3)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few shapes, for compute-sanitizer")
    parser.add_argument("--backend", action="append", choices=["cuda", "triton", "reference"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", help="the name of one check")
    parser.add_argument(
        "--not", action="append", default=[], dest="left_out", help="of one to leave out"
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    for backend in args.backend or ["cuda", "triton"]:
        checks = Checks(args.device, backend, args.quick)
        names = [name for name in vars(Checks) if not name.startswith("_")]
        for name in names:
            if name in ("randn", "cache_dtypes", "some") or args.only not in (None, name):
                continue
            if name in args.left_out:
                continue
            check: Callable[[], None] = getattr(checks, name)
            started = time.perf_counter()
            try:
                check()
                error = ""
            except Exception as problem:  # noqa: BLE001 - every kernel is tried, whatever came before
                error = f"{type(problem).__name__}: {problem}"
            seconds = time.perf_counter() - started
            rows.append({"backend": backend, "check": name, "error": error, "seconds": seconds})
            print(
                f"  {backend:9} {name:50} {'FAILED ' + error[:400] if error else 'ok'} ({seconds:.1f} s)"
            )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    return any(row["error"] for row in rows)


if __name__ == "__main__":
    sys.exit(main())
