# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""float8 and int8 caches in Triton, under the interpreter: codes bit for bit, attention against the reference."""

from __future__ import annotations

from typing import Any

import pytest
from triton_cases import needs_interpreter, torch

from kvxfer import kernels
from kvxfer.layout import KVLayout, KVScales

pytestmark = needs_interpreter

EIGHT = {
    "float8_e4m3": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
    "int8": torch.int8,
}
BACKENDS = ("triton", "reference")


def codes_of(tensor: Any) -> Any:
    """Bytes, where every NaN is the same one: which of its codes a NaN gets is not promised."""
    codes = tensor.contiguous().view(torch.uint8).clone()
    if tensor.dtype != torch.int8:
        codes[tensor.float().isnan()] = 0x7F
    return codes


def finite(dtype: str) -> Any:
    values = torch.arange(256, dtype=torch.uint8).view(EIGHT[dtype]).float()
    return values[values.isfinite()].sort().values


def stored(values: Any, dtype: str, **options: Any) -> Any:
    """``[tokens, 1, channels]`` through append_kv."""
    k = torch.zeros((len(values), 1, 1, values.shape[2]), dtype=EIGHT[dtype])
    kernels.append_kv(
        values, values, k, k.clone(), torch.arange(len(values)), backend="triton", **options
    )
    return k[:, 0]


@pytest.mark.parametrize("dtype", EIGHT)
def test_every_value_gets_the_code_of_pytorch(dtype: str) -> None:
    torch.manual_seed(0)
    exact = finite(dtype)
    ties = (exact[:-1] + exact[1:]) / 2
    below, above = (torch.nextafter(ties, torch.tensor(x)) for x in (-1e38, 1e38))
    wide = torch.randn(2000) * torch.exp2(torch.randint(-20, 20, (2000,)).float())
    edges = torch.tensor([0.0, -0.0, 1e30, -1e30, float("inf"), -float("inf"), 1e-40])
    values = torch.cat([exact, ties, below, above, wide, edges])
    values = torch.nn.functional.pad(values, (0, -len(values) % 64)).view(-1, 1, 64)
    limit = {"float8_e4m3": 448.0, "float8_e5m2": 57344.0}.get(dtype)
    if limit is None:
        want = values.clamp(-128, 127).round().to(torch.int8)
    else:
        want = values.clamp(-limit, limit).to(EIGHT[dtype])
    assert torch.equal(codes_of(stored(values, dtype)), codes_of(want))


@pytest.mark.parametrize("dtype", EIGHT)
def test_a_nan_stays_one_or_becomes_the_lowest_integer(dtype: str) -> None:
    given = stored(torch.full((1, 1, 16), float("nan")), dtype)
    if dtype == "int8":
        assert (given == -128).all()
    else:
        assert given.float().isnan().all()


@pytest.mark.parametrize("to", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("dtype", EIGHT)
def test_every_code_is_read_as_its_value(dtype: str, to: str) -> None:
    """All 256 through a copy; the interpreter's own conversion knows no NaN and no infinity of them."""
    shape: dict[str, Any] = {"num_blocks": 1, "block_size": 4, "num_kv_heads": 1, "head_dim": 32}
    unit = KVScales("tensor", k=(1.0,), v=(1.0,)) if dtype == "int8" else None
    src = KVLayout.from_order("LBKNHC", num_layers=1, dtype=dtype, scales=unit, **shape)
    dst = KVLayout.from_order("LBKNHC", num_layers=1, dtype=to, **shape)
    codes = torch.arange(256, dtype=torch.uint8)
    out = torch.zeros(dst.nbytes, dtype=torch.uint8)
    kernels.copy_blocks(src, codes, dst, out, [0], [0], backend="triton")
    given = out.view(getattr(torch, to))
    torch.testing.assert_close(
        given, codes.view(EIGHT[dtype]).to(given.dtype), atol=0, rtol=0, equal_nan=True
    )


@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize("dtype", EIGHT)
def test_append_quantises_and_touches_nothing_else(
    dtype: str, in_memory: bool, source: Any
) -> None:
    torch.manual_seed(0)
    rows = torch.randn(6, 3, 20) * torch.exp2(torch.randint(-8, 8, (6, 3, 1)).float())
    rows[2, 1] = 0
    if dtype != "int8":
        rows[3, 0, 5] = float("nan")  # counts as 0 in its row's largest magnitude
    key, value = rows.to(source), rows.to(source)[..., :12] * 3
    slots = torch.tensor([9, -1, 0, 4, 15, 7])
    found = []
    for backend in BACKENDS:
        k, v = (
            torch.full((4, 4, 4, w), 0x55, dtype=torch.uint8).view(EIGHT[dtype])[:, :3]
            for w in (20, 12)
        )
        scales = [torch.full((4, 4, 5), float("nan"))[:, :3, 1:] for _ in range(2)]
        options: dict[str, Any] = {"k_scale": 0.37, "v_scale": 1.0}
        if in_memory:
            options = {"k_scale_cache": scales[0], "v_scale_cache": scales[1]}
        kernels.append_kv(key, value, k, v, slots, kv_layout="HND", backend=backend, **options)
        found.append((codes_of(k), codes_of(v), *(s.nan_to_num(-7.0) for s in scales)))
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)
    assert not in_memory or (found[0][2] != -7).sum() == 5 * 3


def eight_bit_cache(dtype: str, lengths: list[int], block_size: int, width: int) -> dict[str, Any]:
    """Scattered blocks of two heads; where nothing may be read stand NaNs, or the largest int8 and NaN scales."""
    torch.manual_seed(1)
    counts = [-(-n // block_size) for n in lengths]
    shape = (sum(counts) + 2, block_size, 2, width)
    poison = torch.full(shape, 0x7F, dtype=torch.uint8).view(EIGHT[dtype])
    k, v = poison.clone(), poison.clone()
    scales = [torch.full(shape[:3], float("nan")) for _ in range(2)]
    table = torch.full((len(lengths), max(counts) + 1), -1, dtype=torch.int32)
    ids = torch.randperm(shape[0]).tolist()
    for row, length in enumerate(lengths):
        for column in range(counts[row]):
            table[row, column] = block = ids.pop()
            end = min(block_size, length - column * block_size)
            for cache, scale in zip((k, v), scales, strict=True):
                numbers = torch.randn(end, 2, width) * (40 if dtype == "int8" else 1)
                cache[block, :end] = numbers.to(EIGHT[dtype])
                scale[block, :end] = torch.rand(end, 2) * 1e-6 + 1e-7  # small: float16 loses them
    lens = torch.tensor(lengths, dtype=torch.int32)
    return {"k": k, "v": v, "scales": scales, "table": table, "lens": lens}


@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize("q_dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", EIGHT)
def test_attention_over_eight_bits(dtype: str, q_dtype: Any, in_memory: bool) -> None:
    cache = eight_bit_cache(dtype, [37, 1, 0, 70], 8, 40)
    # Logits of size 1: rounding them, which grows with them, is not what is compared here.
    k_scale = 0.01 if dtype == "int8" else 0.5
    options: dict[str, Any] = {"k_scale": k_scale, "v_scale": 2.0, "return_lse": True}
    if in_memory:
        names = ("k_scale_cache", "v_scale_cache")
        options |= dict(zip(names, cache["scales"], strict=True))
        options |= {"k_scale": k_scale * 2e6, "v_scale": 2e6}
    pages = (cache["table"], cache["lens"])
    tolerance = 3e-6 if q_dtype == torch.float32 else 2e-3
    q = torch.randn(4, 4, 40).to(q_dtype)
    calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [
        (kernels.paged_decode, (q, cache["k"], cache["v"], *pages), {"split_size": 32})
    ]
    q = torch.randn(45, 4, 40).to(q_dtype)
    starts = torch.tensor([0, 5, 6, 6, 45], dtype=torch.int32)
    calls.append((kernels.paged_prefill, (q, cache["k"], cache["v"], starts, *pages), {}))
    for call, arrays, more in calls:
        wide = (arrays[0].float(), *arrays[1:])
        want, want_lse = call(*wide, backend="reference", **options)
        out, lse = call(*arrays, backend="triton", **options, **more)
        assert torch.isfinite(out).all(), "poison was read, or rows were left out"
        scale = want.abs().max()
        rounding = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}.get(q_dtype, 0)
        bound = (tolerance + rounding) * scale
        assert (out.float() - want).abs().max() <= bound
        torch.testing.assert_close(lse, want_lse, atol=1e-5, rtol=1e-5)


PER_TENSOR = KVScales("tensor", k=(0.5, 0.02), v=(0.03,))
PER_HEAD = KVScales("head", k=(0.1, 0.2, 0.3, 0.4), v=(0.7, 0.05))


@pytest.mark.parametrize(
    ("src", "dst"),
    [
        (("float32", None), ("float8_e4m3", PER_HEAD)),
        (("bfloat16", None), ("int8", PER_TENSOR)),
        (("float8_e4m3", PER_TENSOR), ("float16", None)),
        (("float8_e4m3", None), ("bfloat16", None)),
        (("float8_e5m2", None), ("float8_e4m3", PER_HEAD)),
        (("int8", PER_HEAD), ("int8", PER_TENSOR)),
        (("int8", PER_HEAD), ("int8", PER_HEAD)),
    ],
)
def test_copies_convert_between_fixed_scales(src: Any, dst: Any) -> None:
    torch.manual_seed(2)
    shape: dict[str, Any] = {
        "num_layers": 2, "num_blocks": 3, "block_size": 4, "num_kv_heads": 2, "head_dim": 24,
    }  # fmt: skip
    a = KVLayout.from_order("LBKNHC", dtype=src[0], scales=src[1], **shape)
    b = KVLayout.from_order("LBKHNC", dtype=dst[0], scales=dst[1], **shape)
    wide = torch.randn(a.nbytes // a.itemsize) * (40 if src[0] == "int8" else 2)
    source = wide.to(EIGHT.get(src[0], getattr(torch, src[0], None))).view(torch.uint8)
    found = []
    for backend in BACKENDS:
        out = torch.zeros(b.nbytes, dtype=torch.uint8)
        kernels.copy_blocks(a, source, b, out, [0, 1, 2], [2, 0, 1], num_tokens=11, backend=backend)
        found.append(out)
    assert torch.equal(*found)
    assert found[0].any()


def test_packing_quantises_on_the_way() -> None:
    torch.manual_seed(3)
    shape: dict[str, Any] = {"num_layers": 2, "num_kv_heads": 2, "head_dim": 16}
    a = KVLayout.nhd(num_blocks=5, block_size=4, dtype="bfloat16", **shape)
    wire = KVLayout.from_order(
        "LBKHNC", num_blocks=1, block_size=10, dtype="float8_e4m3", scales=PER_HEAD, **shape
    )
    cache = torch.randn(a.nbytes // 2).bfloat16().view(torch.uint8)
    packed = [
        kernels.pack_blocks(
            a, cache, [4, 0, 3], num_tokens=12, first_token=2, out_layout=wire, backend=backend
        )
        for backend in BACKENDS
    ]
    assert torch.equal(*packed)
    back = []
    for backend in BACKENDS:
        target = torch.zeros_like(cache)
        kernels.unpack_blocks(
            packed[0], a, target, [4, 0, 3], num_tokens=12, first_token=2, src_layout=wire,
            backend=backend,
        )  # fmt: skip
        back.append(target)
    assert torch.equal(*back)
    assert back[0].any()
