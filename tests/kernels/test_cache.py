# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""append, copy, pack and unpack on the host, byte for byte; what is not asked for stays as it was."""

from __future__ import annotations

import re
from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from paged_cases import DTYPES, NpArray, digest, encode

from kvxfer import kernels
from kvxfer.errors import InvalidArgumentError, LayoutError
from kvxfer.layout import KVLayout, KVScales

# Values whose narrowing is a trap: ties, subnormals, overflow, signed zero, infinity, NaN.
TRAPS = np.array(
    [0, -0.0, 1.00390625, 1.01171875, 1.0009765625, 65504, 65519.996, 65520, 1e30, -3e38, 6e-8, 2e-8, 3e-8,
     1e-40, 6.1e-5, 3.3895314e38, 3.4e38, np.inf, -np.inf, np.nan, 2.0**-14, 2.0**-24, 2.0**-25, 5.9604645e-8],
    np.float32,
)  # fmt: skip


def expected_bits(values: NpArray, dtype: str) -> NpArray:
    """Round to nearest even, independent of the kernels: by NumPy for float16, by exact halves for bfloat16."""
    if dtype == "float32":
        return values.view(np.uint32)
    if dtype == "float16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).view(np.uint16)
    torch = pytest.importorskip("torch")
    bits: NpArray = torch.from_numpy(values.copy()).bfloat16().view(torch.int16).numpy()
    return bits.view(np.uint16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_append_rounds_to_nearest_even(backend: str, dtype: str) -> None:
    with np.errstate(over="ignore"):
        key = np.tile(TRAPS, (3, 2, 1)).copy()
    cache = encode(np.zeros((2, 4, 2, len(TRAPS))), dtype)
    kernels.append_kv(
        key, key, cache, cache.copy(), np.array([5, -1, 0], np.int64), backend=backend
    )
    nan = np.isnan(key[0])
    want = expected_bits(key[0], dtype)
    for block, offset in ((1, 1), (0, 0)):
        got = cache[block, offset].view(want.dtype)
        assert np.array_equal(got[~nan], want[~nan])
        values = cache[block, offset]
        if dtype == "bfloat16":
            values = (values.astype(np.uint32) << 16).view(np.float32)
        assert np.array_equal(np.isnan(values), nan)
    assert not cache[0, 1:].any()


@pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
@pytest.mark.parametrize("block_size", [1, 16, 33, 528])
@pytest.mark.parametrize("dtype", DTYPES)
def test_append_writes_its_slots_and_no_other_byte(
    rng: np.random.Generator, backend: str, dtype: str, block_size: int, kv_layout: str
) -> None:
    shape = (6, block_size, 3) if kv_layout == "NHD" else (6, 3, block_size)
    both = encode(rng.standard_normal((*shape, 40)), dtype)  # fused: K and V in one row
    k, v = both[..., :24], both[..., 24:]
    rows = encode(rng.standard_normal((5, 3, 2 * 40)), dtype)
    key, value = rows[..., 3:27], rows[..., 30:46]
    slots = np.array([0, 6 * block_size - 1, -1, 3 * block_size, block_size], np.int64)
    want = both.copy()
    for token, slot in enumerate(slots):
        if slot >= 0:
            block, offset = divmod(int(slot), block_size)
            at: Any = (block, offset) if kv_layout == "NHD" else (block, slice(None), offset)
            want[at] = np.concatenate([key[token], value[token]], axis=-1)
    kernels.append_kv(key, value, k, v, slots, kv_layout=kv_layout, backend=backend)
    assert np.array_equal(both, want)


def test_append_divides_by_the_scale(rng: np.random.Generator, backend: str) -> None:
    key = rng.standard_normal((2, 1, 24)).astype(np.float32)
    k, v = np.zeros((1, 2, 1, 24), np.float32), np.zeros((1, 2, 1, 24), np.float32)
    kernels.append_kv(
        key, key, k, v, np.array([0, 1], np.int64), k_scale=0.3, v_scale=7.0, backend=backend
    )
    assert np.array_equal(k[0], key / np.float32(0.3))
    assert np.array_equal(v[0], key / np.float32(7.0))


def test_nothing_is_appended_when_one_slot_is_wrong(backend: str) -> None:
    rows, cache = np.ones((3, 1, 8), np.float32), np.zeros((2, 4, 1, 8), np.float32)
    other = cache.copy()
    for wrong in (8, -2, 2**62, -(2**63)):
        slots = np.array([0, wrong, 2], np.int64)
        with pytest.raises(InvalidArgumentError, match=rf"slot_mapping\[1\].*{wrong}"):
            kernels.append_kv(rows, rows, cache, other, slots, backend=backend)
        assert not cache.any()
        assert not other.any()


ORDERS = ("LKBNHC", "LKBHNC", "BLKHNC", "LBKNHC", "KLBNHC", "LBHNKC", "LHBNKC", "BLNHKC")


def layout(order: str, **shape: Any) -> KVLayout:
    return KVLayout.from_order(
        order, **{"head_dim": 6, "dtype": "float32", "num_layers": 2, **shape}
    )


def random_memory(rng: np.random.Generator, shape: KVLayout) -> NpArray:
    return rng.integers(0, 256, shape.nbytes, dtype=np.uint8)


def gather(
    shape: KVLayout, memory: NpArray, blocks: list[int], first: int, end: int
) -> dict[Any, NpArray]:
    """Bytes by coordinate, through `views` (NumPy axes), not through the strides that the kernels use."""
    rows = {}
    for layer, parts in zip(shape.layers, shape.views(memory), strict=True):
        for part, view in enumerate(parts):
            for token in range(first, end):
                block = blocks[token // shape.block_size]
                if block >= 0:
                    rows[layer, part, token] = view[block, token % shape.block_size].copy()
    return rows


@st.composite
def copies(draw: st.DrawFn) -> dict[str, Any]:
    num_tokens = draw(st.integers(1, 60))
    sides = []
    for _ in range(2):
        block_size = draw(st.integers(1, 20))
        needed = -(-num_tokens // block_size)
        num_blocks = needed + draw(st.integers(0, 3))
        order = draw(st.sampled_from(ORDERS))
        blocks = draw(st.permutations(range(num_blocks)))[:needed]
        sides.append(
            {"order": order, "block_size": block_size, "num_blocks": num_blocks, "blocks": blocks}
        )
    return {
        "sides": sides,
        "num_tokens": num_tokens,
        "first_token": draw(st.integers(0, num_tokens)),
        "num_kv_heads": draw(st.integers(1, 4)),
        "dtype": draw(st.sampled_from(("float32", "bfloat16", "uint8"))),
        "seed": draw(st.integers(0, 2**32 - 1)),
        "backend": draw(st.sampled_from(("auto", "reference"))),
    }


@hypothesis.settings(max_examples=80)
@hypothesis.given(copies())
def test_copy_between_any_two_layouts_moves_exactly_the_tokens(case: dict[str, Any]) -> None:
    rng = np.random.default_rng(case["seed"])
    sides = []
    for side in case["sides"]:
        made = layout(
            side["order"],
            num_blocks=side["num_blocks"],
            block_size=side["block_size"],
            num_kv_heads=case["num_kv_heads"],
            dtype=case["dtype"],
        )
        sides.append((made, random_memory(rng, made), side["blocks"]))
    (src, src_memory, src_blocks), (dst, dst_memory, dst_blocks) = sides
    first, end = case["first_token"], case["num_tokens"]
    want = dst_memory.copy()
    rows = gather(src, src_memory, src_blocks, first, end)
    for layer, parts in zip(dst.layers, dst.views(want), strict=True):
        for part, view in enumerate(parts):
            for token in range(first, end):
                block = dst_blocks[token // dst.block_size]
                view[block, token % dst.block_size] = rows[layer, part, token]
    before = digest(src_memory)
    kernels.copy_blocks(
        src, src_memory, dst, dst_memory, src_blocks, dst_blocks,
        num_tokens=end, first_token=first, backend=case["backend"],
    )  # fmt: skip
    assert np.array_equal(dst_memory, want)
    assert digest(src_memory) == before


@pytest.mark.parametrize("sizes", [(528, 1056), (1056, 528), (528, 16), (48, 528)])
def test_copies_between_blocks_as_large_as_those_of_hybrid_models(
    rng: np.random.Generator, backend: str, sizes: tuple[int, int]
) -> None:
    first, end = 37, 1200
    src, dst = (
        layout(order, num_blocks=-(-end // size) + 1, block_size=size, num_kv_heads=2)
        for order, size in zip(("LKBNHC", "BLKHNC"), sizes, strict=True)
    )
    src_blocks, dst_blocks = (rng.permutation(side.num_blocks)[:-1].tolist() for side in (src, dst))
    memory, got = random_memory(rng, src), random_memory(rng, dst)
    want = got.copy()
    rows = gather(src, memory, src_blocks, first, end)
    for layer, parts in zip(dst.layers, dst.views(want), strict=True):
        for part, view in enumerate(parts):
            for token in range(first, end):
                view[dst_blocks[token // sizes[1]], token % sizes[1]] = rows[layer, part, token]
    kernels.copy_blocks(
        src, memory, dst, got, src_blocks, dst_blocks, num_tokens=end, first_token=first, backend=backend
    )  # fmt: skip
    assert np.array_equal(got, want)


# Quiet and signalling NaN with payloads, of both signs.
NAN_BITS = {
    "float32": np.array([0x7FC00000, 0x7F800001, 0xFFBFFFFF, 0x7FABCDEF, 0xFFC12345], np.uint32),
    "float16": np.array([0x7E00, 0x7C01, 0xFDFF, 0x7D55, 0xFE23], np.uint16),
    "bfloat16": np.array([0x7FC0, 0x7F81, 0xFFBF, 0x7FA5, 0xFFC7], np.uint16),
}


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_keeps_its_dtype_keeps_the_bits_of_its_nans(backend: str, dtype: str) -> None:
    bits = np.resize(NAN_BITS[dtype], (3, 2, 40))
    rows = bits if dtype == "bfloat16" else bits.view(dtype)
    k, v = np.zeros((2, 1, 2, 2, 40), rows.dtype)  # 1 block of 2 slots
    kernels.append_kv(rows[:2], rows[1:], k, v, np.array([1, 0], np.int64), backend=backend)
    assert np.array_equal(k[0].view(bits.dtype), bits[[1, 0]])
    assert np.array_equal(v[0].view(bits.dtype), bits[[2, 1]])
    src, dst = (
        layout(order, num_blocks=2, block_size=4, num_kv_heads=2, dtype=dtype)
        for order in ("LKBHNC", "LKBNHC")
    )
    memory = np.resize(bits.reshape(-1), src.nbytes // bits.itemsize).view(np.uint8).copy()
    out, back = np.zeros_like(memory), np.zeros_like(memory)
    kernels.copy_blocks(src, memory, dst, out, [0, 1], [1, 0], backend=backend)
    kernels.copy_blocks(dst, out, src, back, [1, 0], [0, 1], backend=backend)
    assert np.array_equal(back, memory)
    packed = kernels.pack_blocks(dst, out, [1, 0], backend=backend)
    again = np.zeros_like(memory)
    kernels.unpack_blocks(packed, src, again, [0, 1], backend=backend)
    assert np.array_equal(again, memory)


@pytest.mark.parametrize("target", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_changes_its_dtype_has_nans_where_it_had_them(
    backend: str, dtype: str, target: str
) -> None:
    src, dst = (
        layout("LKBHNC", num_blocks=1, block_size=4, num_kv_heads=2, dtype=name)
        for name in (dtype, target)
    )
    bits = NAN_BITS[dtype].copy()
    bits[-1] = 0
    memory = np.resize(bits, src.nbytes // bits.itemsize).view(np.uint8).copy()
    out = np.zeros(dst.nbytes, np.uint8)
    kernels.copy_blocks(src, memory, dst, out, [0], [0], backend=backend)
    got = out.view(NAN_BITS[target].dtype)
    infinity = {"float32": 0x7F800000, "float16": 0x7C00, "bfloat16": 0x7F80}[target]
    is_nan = (got & np.array((1 << (8 * got.itemsize - 1)) - 1, got.dtype)) > infinity
    assert np.array_equal(is_nan, np.resize([True] * 4 + [False], len(got)))


@pytest.mark.parametrize("order", ORDERS)
def test_unpack_undoes_pack_and_leaves_the_rest(
    rng: np.random.Generator, backend: str, order: str
) -> None:
    shape = layout(order, num_blocks=7, block_size=5, num_kv_heads=4)
    memory = random_memory(rng, shape)
    blocks = [4, 1, 6]
    chosen: dict[str, Any] = {"num_tokens": 13, "first_token": 3, "layers": [1], "heads": (1, 3)}
    packed = kernels.pack_blocks(shape, memory, blocks, backend=backend, **chosen)
    assert packed.nbytes == 2 * 2 * 10 * 6 * 4  # parts, heads, tokens, channels, bytes
    rows = gather(shape, memory, blocks, 3, 13)
    wire = packed.view(np.float32).reshape(2, 2, 10, 6)
    for part in range(2):
        for token in range(3, 13):
            assert np.array_equal(
                wire[part, :, token - 3].view(np.uint32), rows[1, part, token][1:3].view(np.uint32)
            )
    other = random_memory(rng, shape)
    want = other.copy()
    for part, view in enumerate(shape.views(want)[1]):
        for token in range(3, 13):
            view[[2, 0, 3][token // 5], token % 5, 1:3] = rows[1, part, token][1:3]
    kernels.unpack_blocks(packed, shape, other, [2, 0, 3], backend=backend, **chosen)
    assert np.array_equal(other, want)


def test_copy_converts_between_float_types(rng: np.random.Generator, backend: str) -> None:
    src = layout("LKBHNC", num_blocks=2, block_size=4, num_kv_heads=2, head_dim=len(TRAPS))
    memory = np.resize(TRAPS, src.nbytes // 4).view(np.uint8).copy()
    for dtype in ("float16", "bfloat16"):
        dst = layout(
            "LKBNHC", num_blocks=2, block_size=4, num_kv_heads=2, head_dim=len(TRAPS), dtype=dtype
        )
        out = np.zeros(dst.nbytes, np.uint8)
        kernels.copy_blocks(src, memory, dst, out, [0, 1], [1, 0], backend=backend)
        got = dst.views(out)[0][0][1, 0, 0].view(np.uint16)
        nan = np.isnan(TRAPS)
        assert np.array_equal(got[~nan], expected_bits(TRAPS, dtype)[~nan])


def test_ranks_exchange_the_heads_that_both_hold(rng: np.random.Generator, backend: str) -> None:
    shape = {"num_blocks": 3, "block_size": 4, "num_kv_heads": 4}
    src = layout("LKBHNC", tp_rank=1, tp_size=2, **shape)  # heads 2, 3
    dst = layout("LKBNHC", tp_rank=3, tp_size=4, **shape)  # head 3
    src_memory, dst_memory = random_memory(rng, src), random_memory(rng, dst)
    kernels.copy_blocks(src, src_memory, dst, dst_memory, [2], [0], backend=backend)
    for source, target in zip(src.views(src_memory), dst.views(dst_memory), strict=True):
        for a, b in zip(source, target, strict=True):
            assert np.array_equal(a[2, :, 1].view(np.uint32), b[0, :, 0].view(np.uint32))


def test_memory_may_be_pieces_of_one_offset_space(rng: np.random.Generator, backend: str) -> None:
    shape = layout("LKBHNC", num_blocks=3, block_size=4, num_kv_heads=2)
    memory = random_memory(rng, shape)
    halves = [memory[: memory.size // 2].copy(), memory[memory.size // 2 :].copy()]
    whole = kernels.pack_blocks(shape, memory, [1, 2], backend=backend)
    assert np.array_equal(kernels.pack_blocks(shape, halves, [1, 2], backend=backend), whole)
    third = memory.size // 3
    with pytest.raises(InvalidArgumentError, match="in one piece"):
        kernels.pack_blocks(
            shape, [memory[:third].copy(), memory[third:].copy()], [1], backend=backend
        )


def test_a_copy_past_the_caches_is_exact(rng: np.random.Generator, backend: str) -> None:
    # Above 16 MiB the C++ backend streams its stores; odd offsets make it start in the middle of a line.
    src = layout(
        "LKBHNC", num_blocks=40, block_size=16, num_kv_heads=2, head_dim=125, num_layers=16
    )
    dst = layout(
        "LKBNHC",
        num_blocks=40,
        block_size=16,
        num_kv_heads=2,
        head_dim=125,
        num_layers=16,
        offset=4,
    )
    src_memory, dst_memory = random_memory(rng, src), random_memory(rng, dst)
    blocks = rng.permutation(40)
    kernels.copy_blocks(src, src_memory, dst, dst_memory, blocks, np.arange(40), backend=backend)
    for source, target in zip(src.views(src_memory), dst.views(dst_memory), strict=True):
        for a, b in zip(source, target, strict=True):
            assert np.array_equal(a[blocks].view(np.uint32), b.view(np.uint32))


def bad_copies() -> list[tuple[str, type[Exception], str, dict[str, Any]]]:
    return [
        ("source id out of range", InvalidArgumentError, r"src_blocks\[1\].*given 3", {"src_blocks": [0, 3]}),
        ("source hole", InvalidArgumentError, r"src_blocks\[0\].*given -1", {"src_blocks": [-1, 0]}),
        ("destination id out of range", InvalidArgumentError, r"dst_blocks\[0\].*given 9", {"dst_blocks": [9, 0]}),
        ("destination twice", InvalidArgumentError, "at most once, given 1", {"dst_blocks": [1, 1]}),
        ("too many tokens", InvalidArgumentError, "num_tokens.*given first_token 0, num_tokens 9", {"num_tokens": 9}),
        ("negative first", InvalidArgumentError, "first_token -1", {"first_token": -1}),
        ("unknown layer", LayoutError, "layers: layer 5", {"layers": [5]}),
        ("no list", InvalidArgumentError, "src_blocks: expected a list", {"src_blocks": [0.5, 1.5]}),
        ("head_dim", LayoutError, "head_dim: part k: source 6, destination 7", {"dst": {"head_dim": 7}}),
        ("dtype", LayoutError, "scales: .*int8 without", {"dst": {"dtype": "int8"}}),
        ("short memory", InvalidArgumentError, "dst: layer 1, part v needs", {"cut": 1}),
        ("negative ctas", InvalidArgumentError, "max_ctas", {"max_ctas": -1}),
        ("ctas in text", InvalidArgumentError, "max_ctas: expected an integer >= 0, given '3'", {"max_ctas": "3"}),
        ("tokens in text", InvalidArgumentError, "num_tokens: expected an integer .*given '5'", {"num_tokens": "5"}),
        ("tokens as a float", InvalidArgumentError, "num_tokens: expected an integer .*given 5.0", {"num_tokens": 5.0}),
        ("half a token", InvalidArgumentError, "first_token: expected an integer .*given 2.5", {"first_token": 2.5}),
        ("ragged ids", InvalidArgumentError, "src_blocks: expected a list of block ids", {"src_blocks": [[0], [1, 2]]}),
    ]  # fmt: skip


@pytest.mark.parametrize(("name", "error", "match", "change"), bad_copies())
def test_a_bad_copy_is_refused_and_nothing_moves(
    rng: np.random.Generator, name: str, error: type[Exception], match: str, change: dict[str, Any]
) -> None:
    base = {"num_blocks": 3, "block_size": 4, "num_kv_heads": 2}
    src, dst = layout("LKBHNC", **base), layout("LKBHNC", **{**base, **change.pop("dst", {})})
    src_memory, dst_memory = random_memory(rng, src), random_memory(rng, dst)
    cut = change.pop("cut", 0)
    dst_memory = dst_memory[: dst_memory.size - cut].copy()
    before = digest(dst_memory)
    arguments = {"src_blocks": [0, 1], "dst_blocks": [1, 2], **change}
    blocks = arguments.pop("src_blocks"), arguments.pop("dst_blocks")
    with pytest.raises(error, match=match):
        kernels.copy_blocks(src, src_memory, dst, dst_memory, *blocks, **arguments)
    assert digest(dst_memory) == before


IDS: list[tuple[Any, str]] = [
    (0, "block_ids: expected a list of block ids, given 0"),
    (None, "block_ids: expected a list of block ids, given None"),
    (np.array(3), r"block_ids: expected a list of block ids, given ndarray of shape \[\]"),
    (iter([0, 1]), "block_ids: expected a list of block ids, given a list_iterator"),
    ([0.5], "block_ids: expected a list of block ids"),
    ([0, 3], r"^block_ids\[1\]: expected a block id from 0 to 2, given 3"),
    ([0, -2], r"^block_ids\[1\]: expected a block id from 0 to 2, given -2"),
]


@pytest.mark.parametrize(("ids", "match"), IDS)
def test_bad_ids_are_refused_by_the_callers_name(backend: str, ids: Any, match: str) -> None:
    shape = layout("LKBHNC", num_blocks=3, block_size=4, num_kv_heads=2)
    memory = np.zeros(shape.nbytes, np.uint8)
    packed = np.zeros(shape.nbytes, np.uint8)
    for call in (
        lambda: kernels.pack_blocks(shape, memory, ids, backend=backend),
        lambda: kernels.unpack_blocks(packed, shape, memory, ids, backend=backend),
        lambda: kernels.checksum_blocks(shape, memory, ids, backend=backend),
    ):
        with pytest.raises(InvalidArgumentError, match=match):
            call()


def test_no_blocks_are_nothing_to_move(backend: str) -> None:
    shape = layout("LKBHNC", num_blocks=3, block_size=4, num_kv_heads=2)
    memory = np.zeros(shape.nbytes, np.uint8)
    packed = kernels.pack_blocks(shape, memory, [], backend=backend)
    assert (packed.shape, packed.dtype) == ((0,), np.dtype(np.uint8))
    kernels.unpack_blocks(packed, shape, memory, [], backend=backend)
    kernels.copy_blocks(shape, memory, shape, memory.copy(), [], [], backend=backend)


@pytest.mark.parametrize(
    ("layers", "match"),
    [(3, "layers: expected a list of layer ids, given 3"), ("01", "layers: expected a list of layer ids, given '01'"),
     ([0, 0.5], r"layers\[1\]: expected an integer >= 0, given 0.5"), ([True], r"layers\[0\]: expected an integer"),
     ([[0]], r"layers\[0\]: expected an integer")],
)  # fmt: skip
def test_layers_are_a_list_of_integers(layers: Any, match: str) -> None:
    shape = layout("LKBHNC", num_blocks=3, block_size=4, num_kv_heads=2)
    memory, packed = np.zeros(shape.nbytes, np.uint8), np.zeros(shape.nbytes, np.uint8)
    for call in (
        lambda: kernels.copy_blocks(shape, memory, shape, packed, [0], [0], layers=layers),
        lambda: kernels.pack_blocks(shape, memory, [0], layers=layers),
        lambda: kernels.unpack_blocks(packed, shape, memory, [0], layers=layers),
        lambda: kernels.checksum_blocks(shape, memory, [0], layers=layers),
    ):
        with pytest.raises(InvalidArgumentError, match=match):
            call()
    some = kernels.pack_blocks(shape, memory, [0], layers=np.array([1]))
    assert some.nbytes * shape.num_layers == kernels.pack_blocks(shape, memory, [0]).nbytes


HEADS = [(3, 1), (0,), (0, 1, 2), 3, (2, 2), (-1, 2), (0, 5), (0.0, 2), "ab"]


@pytest.mark.parametrize("heads", HEADS)
def test_heads_are_a_range_of_those_held(heads: Any) -> None:
    shape = layout("LKBHNC", num_blocks=3, block_size=4, num_kv_heads=4)
    memory, packed = np.zeros(shape.nbytes, np.uint8), np.zeros(shape.nbytes, np.uint8)
    match = r"heads: expected a range .*within \[0, 4\).*, given " + re.escape(repr(heads))
    with pytest.raises(InvalidArgumentError, match=match):
        kernels.pack_blocks(shape, memory, [0], heads=heads)
    with pytest.raises(InvalidArgumentError, match=match):
        kernels.unpack_blocks(packed, shape, memory, [0], heads=heads)


@pytest.mark.parametrize("wrong", [None, 3, {"num_blocks": 3}])
def test_what_is_no_layout_is_refused(wrong: Any) -> None:
    shape = layout("LKBHNC", num_blocks=3, block_size=4, num_kv_heads=2)
    memory = np.zeros(shape.nbytes, np.uint8)
    said = f"expected a KVLayout, given {re.escape(repr(wrong))}"
    with pytest.raises(InvalidArgumentError, match="src_layout: " + said):
        kernels.copy_blocks(wrong, memory, shape, memory.copy(), [0], [0])
    with pytest.raises(InvalidArgumentError, match="dst_layout: " + said):
        kernels.copy_blocks(shape, memory, wrong, memory.copy(), [0], [0])
    with pytest.raises(InvalidArgumentError, match="^layout: " + said):
        kernels.pack_blocks(wrong, memory, [0])
    with pytest.raises(InvalidArgumentError, match="^layout: " + said):
        kernels.unpack_blocks(memory, wrong, memory, [0])
    if wrong is None:
        return
    with pytest.raises(InvalidArgumentError, match="out_layout: " + said):
        kernels.pack_blocks(shape, memory, [0], out_layout=wrong)
    with pytest.raises(InvalidArgumentError, match="src_layout: " + said):
        kernels.unpack_blocks(memory, shape, memory, [0], src_layout=wrong)


def test_packing_names_the_callers_memory() -> None:
    shape = layout("LKBHNC", num_blocks=3, block_size=4, num_kv_heads=2)
    memory = np.zeros(shape.nbytes, np.uint8)
    short, small = memory[:-1], np.zeros(8, np.uint8)
    fixed = np.zeros(shape.nbytes, np.uint8)
    fixed.setflags(write=False)
    for match, call in {
        "^tensors: layer": lambda: kernels.pack_blocks(shape, short, [0]),
        "^out: layer": lambda: kernels.pack_blocks(shape, memory, [0], small),
        "^out: expected writable": lambda: kernels.pack_blocks(shape, memory, [0], fixed),
        "^out: expected memory apart from tensors": lambda: kernels.pack_blocks(shape, memory, [0], memory),
        "^src: layer": lambda: kernels.unpack_blocks(small, shape, memory, [0]),
        "^tensors: layer ": lambda: kernels.unpack_blocks(memory, shape, short, [0]),
        "^tensors: expected writable": lambda: kernels.unpack_blocks(memory, shape, fixed, [0]),
        "^block_ids: expected each block at most once": lambda: kernels.unpack_blocks(fixed, shape, memory, [1, 1]),
    }.items():  # fmt: skip
        with pytest.raises(InvalidArgumentError, match=match):
            call()


def not_numbers() -> list[NpArray]:
    pointers = np.empty(96, object)
    pointers[:] = [[i] for i in range(96)]
    fields = np.zeros(96, [("a", object)])
    return [pointers, fields, *(np.zeros(96, t) for t in ("V8", "M8[s]", "U2", [("a", "i8")]))]


@pytest.mark.parametrize("array", not_numbers(), ids=lambda a: str(a.dtype))
def test_memory_of_anything_but_numbers_is_refused(array: NpArray) -> None:
    # Once: objects' pointers were overwritten, and the process died when it next looked at one.
    shape = layout("LKBHNC", num_blocks=2, block_size=4, num_kv_heads=2)
    good = np.zeros(shape.nbytes, np.uint8)
    match = f": expected an array of plain numbers, given dtype {re.escape(str(array.dtype))}"
    with pytest.raises(InvalidArgumentError, match="^dst" + match):
        kernels.copy_blocks(shape, good, shape, array, [0], [1])
    with pytest.raises(InvalidArgumentError, match="^out" + match):
        kernels.pack_blocks(shape, good, [0], out=array)
    with pytest.raises(InvalidArgumentError, match="^tensors" + match):
        kernels.unpack_blocks(good, shape, array, [0])
    with pytest.raises(InvalidArgumentError, match="^tensors" + match):
        kernels.checksum_blocks(shape, array, [0])


@pytest.mark.parametrize("name", ["bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_memory_of_ml_dtypes_is_taken(rng: np.random.Generator, name: str) -> None:
    dtype = getattr(pytest.importorskip("ml_dtypes"), name)
    told = name.removesuffix("fn")
    shape = layout("LKBHNC", num_blocks=2, block_size=4, num_kv_heads=2, dtype=told)
    memory = random_memory(rng, shape)
    target = np.zeros(shape.nbytes // np.dtype(dtype).itemsize, dtype)
    kernels.copy_blocks(shape, memory, shape, target, [0, 1], [0, 1])
    assert np.array_equal(target.view(np.uint8), memory.reshape(-1).view(np.uint8))


def memory_call(shape: KVLayout, memory: Any, which: str) -> None:
    good = np.zeros(shape.nbytes, np.uint8)
    if not isinstance(memory, np.ndarray):
        good = pytest.importorskip("torch").from_numpy(good)
    {
        "src": lambda: kernels.copy_blocks(shape, memory, shape, good, [0], [1]),
        "dst": lambda: kernels.copy_blocks(shape, good, shape, memory, [0], [1]),
        "out": lambda: kernels.pack_blocks(shape, good, [0], out=memory),
        "tensors": lambda: kernels.unpack_blocks(good, shape, memory, [0]),
        "checksum": lambda: kernels.checksum_blocks(shape, memory, [0]),
    }[which]()


@pytest.mark.parametrize("which", ["src", "dst", "out", "tensors", "checksum"])
@pytest.mark.parametrize(
    ("told", "is_of"),
    [
        ("bfloat16", "float16"), ("float16", "bfloat16"), ("float32", "float16"), ("float8_e4m3", "float8_e5m2"),
        ("float8_e5m2", "float8_e4m3fn"), ("int8", "float8_e4m3fn"), ("float32", "float64"), ("int8", "bool"),
    ],
)  # fmt: skip
def test_memory_of_another_dtype_than_its_layouts_is_refused(
    told: str, is_of: str, which: str
) -> None:
    # Once: float16 memory under a bfloat16 layout, of the same width, was copied and converted as what it was not.
    torch = pytest.importorskip("torch")
    dtype = getattr(torch, is_of)
    shape = layout("LKBHNC", num_blocks=2, block_size=4, num_kv_heads=2, dtype=told)
    raw = torch.zeros(shape.nbytes, dtype=torch.uint8)
    given = is_of.removesuffix("fn")
    name = "tensors" if which == "checksum" else which
    match = (
        f"^{name}: expected memory of dtype {told} like its layout, or raw bytes.*, given {given}"
    )
    memory = raw.view(dtype)
    with pytest.raises(InvalidArgumentError, match=match):
        memory_call(shape, memory, which)
    if is_of in ("float16", "float64", "bool"):
        with pytest.raises(InvalidArgumentError, match=match):
            memory_call(shape, memory.numpy(), which)


@pytest.mark.parametrize("which", ["src", "dst", "out", "tensors", "checksum"])
def test_memory_of_the_layouts_dtype_and_of_raw_bytes_is_taken(which: str) -> None:
    torch = pytest.importorskip("torch")
    for told in ("float32", "float16", "bfloat16", "float8_e4m3", "float8_e5m2", "int8", "uint8"):
        shape = layout("LKBHNC", num_blocks=2, block_size=4, num_kv_heads=2, dtype=told)
        raw = torch.zeros(shape.nbytes, dtype=torch.uint8)
        own = getattr(torch, told.replace("e4m3", "e4m3fn"))
        anything = [torch.float16, torch.bfloat16, torch.float32] if told == "uint8" else []
        for dtype in (own, torch.uint8, torch.int8, torch.int16, torch.int64, *anything):
            memory_call(shape, raw.view(dtype), which)
        for numpy in (np.uint8, np.int8, np.uint16, np.int64):
            memory_call(shape, raw.numpy().view(numpy), which)


def test_scales_in_memory_may_lie_in_arrays_of_their_own_dtype() -> None:
    plain = layout("LKBNHC", num_blocks=2, block_size=4, num_kv_heads=2, head_dim=8, dtype="int8")
    scales = KVScales("token_head", order="LKBNH", offset=plain.nbytes)
    shape = layout(
        "LKBNHC", num_blocks=2, block_size=4, num_kv_heads=2, head_dim=8, dtype="int8", scales=scales
    )  # fmt: skip
    numbers = np.zeros(plain.nbytes, np.int8)
    factors = np.ones((shape.nbytes - plain.nbytes) // 4, np.float32)
    packed = kernels.pack_blocks(shape, [numbers, factors], [1])
    assert packed.nbytes == shape.nbytes // 2
    with pytest.raises(InvalidArgumentError, match=r"tensors: expected memory of dtype float32 or int8 .*, given float16"):  # fmt: skip
        kernels.pack_blocks(shape, [numbers, factors.view(np.float16)], [1])


@pytest.mark.parametrize("granularity", ["token", "token_head"])
def test_scales_in_memory_are_copied_packed_and_unpacked_with_their_rows(
    rng: np.random.Generator, backend: str, granularity: str
) -> None:
    def cache(order: str, **shape: Any) -> KVLayout:
        sized = {"num_kv_heads": 2, "head_dim": 8, "dtype": "float8_e4m3", **shape}
        axes = order[:-1] if granularity == "token_head" else order[:-1].replace("H", "")
        scales = KVScales(granularity, order=axes, offset=layout(order, **sized).nbytes)
        return layout(order, **sized, scales=scales)

    src = cache("LKBNHC", num_blocks=5, block_size=4)
    dst = cache("BLKHNC", num_blocks=3, block_size=8)
    memory = rng.integers(0, 256, src.nbytes, np.uint8)
    packed = kernels.pack_blocks(src, memory, [3, 0, 4], backend=backend)
    copied, unpacked = (np.zeros(dst.nbytes, np.uint8) for _ in range(2))
    again = np.zeros(src.nbytes, np.uint8)
    kernels.copy_blocks(src, memory, dst, copied, [3, 0, 4], [2, 1], backend=backend)
    kernels.unpack_blocks(packed, src, again, [1, 2, 3], backend=backend)
    kernels.copy_blocks(src, again, dst, unpacked, [1, 2, 3], [2, 1], backend=backend)
    assert np.array_equal(copied, unpacked)
    for ours, theirs in zip(src.views(memory), dst.views(copied), strict=True):
        assert len(ours) == 4
        for x, y in zip(ours, theirs, strict=True):
            for token in range(12):
                read, written = [3, 0, 4][token // 4], [2, 1][token // 8]
                rows = (x[read, token % 4].view(np.uint8), y[written, token % 8].view(np.uint8))
                assert rows[0].any()
                assert np.array_equal(*rows)


def test_one_cache_may_be_copied_within_but_not_onto_what_is_read(
    rng: np.random.Generator, backend: str
) -> None:
    shape = layout("LKBHNC", num_blocks=4, block_size=4, num_kv_heads=2)
    memory = random_memory(rng, shape)
    kernels.copy_blocks(shape, memory, shape, memory, [0, 1], [3, 2], backend=backend)
    for parts in shape.views(memory):
        for view in parts:
            assert np.array_equal(view[0].view(np.uint32), view[3].view(np.uint32))
    with pytest.raises(InvalidArgumentError, match=r"not read by the same copy, given \[1\]"):
        kernels.copy_blocks(shape, memory, shape, memory, [0, 1], [1, 2], backend=backend)
    other = layout("LKBNHC", num_blocks=4, block_size=4, num_kv_heads=2)
    with pytest.raises(InvalidArgumentError, match="overlap"):
        kernels.copy_blocks(shape, memory, other, memory, [0], [1], backend=backend)


def test_destination_holes_skip_their_tokens(rng: np.random.Generator, backend: str) -> None:
    shape = layout("LKBHNC", num_blocks=4, block_size=4, num_kv_heads=2)
    src, dst = random_memory(rng, shape), random_memory(rng, shape)
    before = dst.copy()
    kernels.copy_blocks(shape, src, shape, dst, [-1, 1], [-1, 2], backend=backend)
    want = shape.views(before)
    for layer, parts in enumerate(shape.views(dst)):
        for part, view in enumerate(parts):
            source = shape.views(src)[layer][part]
            for block in (0, 1, 3):
                assert np.array_equal(
                    view[block].view(np.uint32), want[layer][part][block].view(np.uint32)
                )
            assert np.array_equal(view[2].view(np.uint32), source[1].view(np.uint32))


def test_layouts_that_were_copied_between_are_checked_against_new_memory(
    rng: np.random.Generator,
) -> None:
    """What a pair of layouts was found to need is remembered; that the memory has it is not."""
    shape = layout("LKBNHC", num_blocks=4, block_size=4, num_kv_heads=2)
    source = random_memory(rng, shape)
    for _ in range(2):
        target = np.zeros(shape.nbytes, np.uint8)
        kernels.copy_blocks(shape, source, shape, target, [0, 1, 2, 3], [0, 1, 2, 3])
        assert np.array_equal(target, source)
        parts = [part.copy() for part in np.split(source, [shape.nbytes // 2])]
        halves = [np.zeros_like(part) for part in parts]
        kernels.copy_blocks(shape, parts, shape, halves, [0, 1, 2, 3], [0, 1, 2, 3])
        assert np.array_equal(np.concatenate(halves), source)
        with pytest.raises(InvalidArgumentError, match="in one piece"):
            kernels.copy_blocks(shape, source[:-1].copy(), shape, target, [0], [0])
