# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Triton attention under the interpreter, against the float32 reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from triton_cases import Paged, needs_interpreter, paged, torch

from kvxfer import kernels
from kvxfer.errors import InvalidArgumentError, UnavailableError
from kvxfer.kernels.triton import tune_prefill
from kvxfer.kernels.triton._tiles import (
    EDGE_N,
    PrefillShape,
    PrefillTile,
    prefill_candidates,
    prefill_tile,
    remember,
)
from kvxfer.kernels.triton.attention_prefill import prefill_shape

pytestmark = needs_interpreter

EDGES = {
    1: [0, 2, 40],
    3: [0, 1, 2, 3, 4, 40],
    16: [0, 1, 15, 16, 17, 90],
    64: [63, 64, 65, 150],
    528: [1, 527, 528, 529, 560],
}


def both(op: str, *arguments: Any, **options: Any) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """(out, lse) of Triton, and of the reference given the same inputs widened to float32."""
    call = getattr(kernels, op)
    wide = [a.float() if a.is_floating_point() else a for a in arguments]
    expected = call(*wide, return_lse=True, backend="reference", **options)
    split = {"split_size": 32} if op == "paged_decode" else {}
    given = call(*arguments, return_lse=True, backend="triton", **split, **options)
    return given, expected


def assert_close(
    given: tuple[Any, Any], expected: tuple[Any, Any], tolerance: float = 3e-6
) -> None:
    (out, lse), (want, want_lse) = given, expected
    assert torch.isfinite(out).all(), "poison was read, or rows were left out"
    torch.testing.assert_close(out.float(), want, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse, want_lse, atol=max(3e-6, tolerance / 10), rtol=3e-6)


def decode_inputs(
    lengths: list[int], num_q_heads: int = 4, head_dim: int = 64, **how: Any
) -> tuple[Any, Paged]:
    cache = paged(lengths, head_dim=head_dim, **how)
    q = torch.randn(len(lengths), num_q_heads, head_dim).to(how.get("dtype", torch.float32))
    return q, cache


@pytest.mark.parametrize("order", ["NHD", "HND"])
@pytest.mark.parametrize("block_size", sorted(EDGES))
def test_decode_at_the_edges_of_blocks(block_size: int, order: str) -> None:
    q, cache = decode_inputs(EDGES[block_size], block_size=block_size, order=order)
    before = [part.clone() for part in (cache.k, cache.v)]
    given, expected = both("paged_decode", q, *cache.arguments)
    assert_close(given, expected)
    for part, old in zip((cache.k, cache.v), before, strict=True):
        assert torch.equal(part.view(torch.int32), old.view(torch.int32))


@pytest.mark.parametrize(
    ("head_dim", "group"), [(16, 1), (16, 17), (80, 7), (128, 7), (256, 1), (256, 17)]
)
def test_decode_head_sizes_and_groups(head_dim: int, group: int) -> None:
    q, cache = decode_inputs(
        [5, 40],
        num_q_heads=group,
        head_dim=head_dim,
        head_dim_v=head_dim - head_dim // 4,
        block_size=16,
        num_kv_heads=1,
    )
    assert_close(*both("paged_decode", q, *cache.arguments))


OPTIONS: dict[str, dict[str, Any]] = {
    "window": {"window_left": 20},
    "window of one": {"window_left": 0},
    "soft cap": {"logits_soft_cap": 3.0},
    "sinks": {"sinks": torch.tensor([0.5, -1.0, 9.0, -40.0])},
    "scales": {"sm_scale": 0.3, "k_scale": 0.5, "v_scale": 2.0},
    "all": {
        "window_left": 33,
        "logits_soft_cap": 20.0,
        "sinks": torch.tensor([1.0, 2.0, 3.0, 4.0]),
    },
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_decode_options(options: dict[str, Any]) -> None:
    q, cache = decode_inputs(
        [0, 1, 21, 100], block_size=8, window_left=options.get("window_left", -1)
    )
    assert_close(*both("paged_decode", q, *cache.arguments, **options))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_errors_in_half_precision_are_at_most_twice_torch_s(dtype: torch.dtype) -> None:
    q, cache = decode_inputs([90, 33], block_size=16, dtype=dtype)
    (out, _), (want, _) = both("paged_decode", q, *cache.arguments)
    peer = torch.empty_like(out)
    for row, length in enumerate(cache.lens.tolist()):
        at = torch.arange(length)
        k, v = (part[cache.table[row, at // 16].long(), at % 16] for part in (cache.k, cache.v))
        k, v = (part.repeat_interleave(2, dim=1).transpose(0, 1) for part in (k, v))
        peer[row] = torch.nn.functional.scaled_dot_product_attention(q[row, :, None], k, v)[:, 0]
    error, theirs = ((x.float() - want).abs().max() for x in (out, peer))
    assert 0 < error <= 2 * theirs


def test_decode_does_not_depend_on_its_batch_nor_on_how_it_is_split() -> None:
    q, cache = decode_inputs([70, 3, 100], block_size=8)
    whole = kernels.paged_decode(q, *cache.arguments, backend="triton", split_size=32)
    alone = kernels.paged_decode(
        q[2:], cache.k, cache.v, cache.table[2:], cache.lens[2:], backend="triton", split_size=32
    )
    assert torch.equal(whole[2:], alone)
    unsplit = kernels.paged_decode(q, *cache.arguments, backend="triton", split_size=512)
    torch.testing.assert_close(whole, unsplit, atol=2e-6, rtol=2e-6)


def test_decode_writes_into_out_and_mixes_dtypes() -> None:
    q, cache = decode_inputs([17, 4], block_size=4)
    out = torch.full((2, 4, 64), float("nan"))
    half = paged([17, 4], block_size=4, dtype=torch.float16)
    given = kernels.paged_decode(q, *half.arguments, out=out, backend="triton")
    assert given is out
    assert_close(
        (out, cache.lens),
        (kernels.paged_decode(q, *half.arguments, backend="reference"), cache.lens),
    )


# -- prefill ------------------------------------------------------------------------------------


def prefill_inputs(
    lengths: list[int], new: list[int], num_q_heads: int = 2, head_dim: int = 32, **how: Any
) -> tuple[Any, Any, Any, Any, Any, Any]:
    cache = paged(
        lengths, head_dim=head_dim, num_new=new, num_kv_heads=how.pop("num_kv_heads", 1), **how
    )
    q = torch.randn(sum(new), num_q_heads, head_dim).to(how.get("dtype", torch.float32))
    starts = torch.tensor([0, *torch.tensor(new).cumsum(0).tolist()], dtype=torch.int32)
    return q, cache.k, cache.v, starts, cache.table, cache.lens


@pytest.mark.parametrize("block_size", [1, 5, 16, 32])
def test_prefill_at_the_edges_of_blocks(block_size: int) -> None:
    """Whole prompts and chunked continuations; 32 is a block a tile lies in, so that one id serves it."""
    n = block_size
    lengths = [0, 1, max(1, n - 1), n, n + 1, 70]
    new = [0, 1, max(1, n - 1), 1, n + 1, 37]
    assert_close(*both("paged_prefill", *prefill_inputs(lengths, new, block_size=n)))


def test_prefill_over_blocks_as_large_as_those_of_hybrid_models() -> None:
    """528 tokens are no multiple of a tile, so that tiles lie in two blocks."""
    assert_close(
        *both("paged_prefill", *prefill_inputs([40, 530, 560], [5, 3, 40], block_size=528))
    )


@pytest.mark.parametrize("window_left", [-1, 20])
def test_how_far_what_is_masked_reaches(window_left: int) -> None:
    """A NaN in K reaches no row that may not see it; in V, rows of its tile, since 0 * NaN is NaN."""
    inputs = prefill_inputs([150], [150], block_size=16, num_q_heads=1)
    q, k, v, _, table, _ = inputs
    options: dict[str, Any] = {"window_left": window_left, "backend": "triton"}
    clean = kernels.paged_prefill(*inputs, **options)
    token, positions = 101, torch.arange(150)
    sees = (positions >= token) & ((window_left < 0) | (positions <= token + window_left))
    for which in (k, v):
        place = which[table[0, token // 16].long(), token % 16, 0]
        kept = place[3].item()
        place[3] = float("nan")
        out = kernels.paged_prefill(*inputs, **options)
        place[3] = kept
        assert torch.isnan(out[sees, 0, 3]).all()
        far = ~sees
        if which is v:
            tile = prefill_tile(prefill_shape(q, k, v, 1, plain=window_left < 0))
            rows, keys = tile.block_m - 1, min(tile.block_n, EDGE_N) - 1
            assert rows <= 127, "as the docs of paged_prefill say"
            assert keys <= 63, "as the docs of paged_prefill say"
            far &= (positions < token - rows - keys) | (
                positions > token + max(0, window_left) + rows
            )
            assert torch.isnan(out[~sees & ~far]).any(), "mended? then so should be the docs"
        assert far.any()
        assert torch.equal(out[far], clean[far])


def test_prefill_from_every_place_near_the_edge_of_a_tile() -> None:
    """Tiles of 32 keys: the first row of a chunk stands at 29 to 33, the last unmasked tile ends there or not."""
    before = [29, 30, 31, 32, 33]
    inputs = prefill_inputs([n + 3 for n in before], [3] * 5, block_size=16)
    assert_close(*both("paged_prefill", *inputs))
    assert_close(*both("paged_prefill", *inputs, window_left=30))
    # Here the window's edge crosses a tile that lies whole in front of the first row's diagonal.
    wide = prefill_inputs([128], [64], block_size=16, window_left=40)
    assert_close(*both("paged_prefill", *wide, window_left=40))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_prefill_options(options: dict[str, Any]) -> None:
    chosen = dict(options)
    if "sinks" in chosen:
        chosen["sinks"] = chosen["sinks"][:2].contiguous()
    inputs = prefill_inputs(
        [100, 7], [60, 7], block_size=8, window_left=options.get("window_left", -1)
    )
    assert_close(*both("paged_prefill", *inputs, **chosen))


def test_prefill_sees_everything_when_not_causal() -> None:
    inputs = prefill_inputs([50, 33], [10, 33], block_size=16, order="HND", head_dim_v=16)
    assert_close(*both("paged_prefill", *inputs, causal=False))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_prefill_in_half_precision(dtype: torch.dtype) -> None:
    inputs = prefill_inputs([140], [140], num_q_heads=2, head_dim=128, block_size=64, dtype=dtype)
    given, expected = both("paged_prefill", *inputs)
    q, k, v, _, table, lens = inputs
    at = torch.arange(int(lens[0]))
    keys, values = (part[table[0, at // 64].long(), at % 64].transpose(0, 1) for part in (k, v))
    peer = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(0, 1), keys.expand(2, -1, -1), values.expand(2, -1, -1), is_causal=True
    ).transpose(0, 1)
    error, theirs = ((x.float() - expected[0]).abs().max() for x in (given[0], peer))
    assert 0 < error <= 2 * theirs


def test_prefill_of_one_row_is_decode() -> None:
    q, cache = decode_inputs([30, 9], block_size=8)
    starts = torch.tensor([0, 1, 2], dtype=torch.int32)
    rows = kernels.paged_prefill(
        q, cache.k, cache.v, starts, cache.table, cache.lens, backend="triton"
    )
    tokens = kernels.paged_decode(q, *cache.arguments, backend="triton")
    torch.testing.assert_close(rows, tokens, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("group", [1, 2, 3, 8])
def test_heads_of_a_group_share_the_tiles_of_short_prefills(group: int) -> None:
    """Rows of several tokens and heads in one tile, also where a group is no power of two."""
    new = [1, 0, 5, 20]
    inputs = prefill_inputs(
        [70, 3, 5, 33], new, num_q_heads=2 * group, num_kv_heads=2, block_size=8
    )
    q, k, v, *_ = inputs
    assert prefill_tile(prefill_shape(q, k, v, len(new))).packs_heads == (group > 1)
    sinks = torch.linspace(-2, 2, 2 * group)
    assert_close(*both("paged_prefill", *inputs))
    assert_close(*both("paged_prefill", *inputs, window_left=9, sinks=sinks, logits_soft_cap=5.0))


@pytest.mark.parametrize("batch_invariant", [True, False])
def test_bits_of_a_sequence_are_the_same_in_whatever_batch_where_that_is_asked(
    batch_invariant: bool,
) -> None:
    """Five new tokens alone take a tile of 64 keys, and beside 200 others one of 128, which sums in another order."""
    together = prefill_inputs(
        [300, 250], [5, 200], num_q_heads=1, head_dim=64, block_size=16, dtype=torch.float16
    )
    q, k, v, _, table, lens = together
    alone = (q[:5], k, v, torch.tensor([0, 5], dtype=torch.int32), table[:1], lens[:1])
    same = {}
    for backend in ("triton", "cpu"):
        (out, lse), (beside, lse_beside) = (
            kernels.paged_prefill(
                *each, return_lse=True, batch_invariant=batch_invariant, backend=backend
            )
            for each in (alone, together)
        )
        same[backend] = torch.equal(out, beside[:5]) and torch.equal(lse, lse_beside[:5])
    assert same == {"triton": batch_invariant, "cpu": True}
    if batch_invariant:
        assert_close(*both("paged_prefill", *together, batch_invariant=True), tolerance=2e-3)


@pytest.mark.parametrize("sm_scale", [-0.2, 0.0])
def test_scales_that_turn_or_end_the_order_of_logits(sm_scale: float) -> None:
    """A positive scale is multiplied in after the maximum was taken; others must not be."""
    inputs = prefill_inputs([40, 9], [37, 9], block_size=8)
    assert_close(*both("paged_prefill", *inputs, sm_scale=sm_scale))
    q, cache = decode_inputs([40, 9], block_size=8)
    assert_close(*both("paged_decode", q, *cache.arguments, sm_scale=sm_scale))


def test_each_tile_a_tuner_may_choose_gives_the_same_attention() -> None:
    inputs = prefill_inputs([100, 70], [80, 64], num_q_heads=4, num_kv_heads=2, block_size=16)
    shape = PrefillShape(128, 72, 2, 16, 16, wide=False)
    tiles = [*prefill_candidates(shape), *prefill_candidates(replace(shape, rows=5))]
    assert len(set(tiles)) >= 4
    own = prefill_shape(inputs[0], inputs[1], inputs[2], 2)
    try:
        for tile in tiles:
            remember(own, tile)
            assert prefill_tile(own) == tile
            assert_close(*both("paged_prefill", *inputs))
    finally:
        remember(own, None)
    assert prefill_tile(own) not in tiles


def test_shapes_of_one_bucket_share_their_tile() -> None:
    shape = PrefillShape(128, 65, 4, 16, 16, wide=False)
    chosen = PrefillTile(128, 128, 8, 3)
    try:
        remember(shape, chosen)
        assert prefill_tile(replace(shape, rows=128)) == chosen
        assert prefill_tile(replace(shape, rows=129)) != chosen
        assert prefill_tile(replace(shape, cache_bits=8)) != chosen
    finally:
        remember(shape, None)
    assert prefill_tile(shape) == prefill_candidates(shape)[0]


def test_tuning_without_a_gpu_says_why_not() -> None:
    inputs = prefill_inputs([4], [4], block_size=4)
    with pytest.raises(UnavailableError, match="measured on a CUDA device, the tensors are on cpu"):
        tune_prefill(*inputs)


@pytest.mark.parametrize("op", ["paged_decode", "paged_prefill"])
@pytest.mark.parametrize(
    ("row", "column", "value", "message"),
    [
        (1, 1, -1, r"block_table\[1, 1\]: expected a block id from 0 to \d+, given -1"),
        (0, 0, 99, r"block_table\[0, 0\]: expected a block id from 0 to \d+, given 99"),
    ],
)
def test_wrong_block_ids_on_the_host_are_refused(
    op: str, row: int, column: int, value: int, message: str
) -> None:
    q, cache = decode_inputs([3, 20], block_size=16)
    cache.table[row, column] = value
    starts = [torch.tensor([0, 1, 2], dtype=torch.int32)] if op == "paged_prefill" else []
    with pytest.raises(InvalidArgumentError, match=message):
        getattr(kernels, op)(
            q, cache.k, cache.v, *starts, cache.table, cache.lens, backend="triton"
        )


def test_a_short_table_is_refused() -> None:
    q, cache = decode_inputs([3, 20], block_size=16)
    with pytest.raises(
        InvalidArgumentError, match="at least 2 blocks of 16 for the 20 tokens of sequence 1"
    ):
        kernels.paged_decode(q, cache.k, cache.v, cache.table[:, :1], cache.lens, backend="triton")


def test_merging_splits_of_the_keys_gives_the_whole() -> None:
    torch.manual_seed(3)
    parts = [torch.randn(5, 3, 20).to(torch.bfloat16) for _ in range(2)]
    lses = [torch.randn(5, 3) for _ in range(2)]
    lses[0][0] = lses[1][0, 1] = lses[1][2] = float("-inf")
    parts[0][0] = float("nan")  # never attended, so never written
    states = (parts[0], lses[0], parts[1], lses[1])
    out, lse = kernels.merge_states(*states, backend="triton")
    want, want_lse = kernels.merge_states(*states, backend="reference")
    assert torch.equal(out, want)
    torch.testing.assert_close(lse, want_lse, atol=1e-6, rtol=1e-6)


def test_numpy_arrays_are_refused_by_name() -> None:
    q, cache = decode_inputs([3], block_size=4)
    arrays = [x.numpy() for x in (q, *cache.arguments)]
    with pytest.raises(
        InvalidArgumentError, match="q: the triton backend takes torch tensors, given ndarray"
    ):
        kernels.paged_decode(*arrays, backend="triton")


def test_offsets_past_two_to_the_31_elements() -> None:
    """Blocks 0 and 2 of three, in memory of which only they are ever touched.

    The stride fits 32 bits and twice of it does not: a product in int32 wraps.
    """
    apart, size, head_dim = (1 << 30) + 64, 4, 16
    memory = torch.empty(2 * apart + 64 * size * 2, dtype=torch.float16)
    k, v = (
        memory.as_strided(
            (3, size, 1, head_dim), (apart, head_dim, head_dim, 1), half * 64 * size // 4
        )
        for half in (0, 1)
    )
    row = torch.randn(5, 1, head_dim).half()
    slots = torch.tensor([8, 9, 10, 11, 1])
    kernels.append_kv(row, row + 1, k, v, slots, backend="triton")
    assert torch.equal(k[2], row[:4])
    assert torch.equal(v[0, 1], row[4] + 1)
    k[0, 0], v[0, 0] = row[0], row[0]
    table, lens = torch.tensor([[2, 0]], dtype=torch.int32), torch.tensor([6], dtype=torch.int32)
    q = torch.randn(1, 1, head_dim).half()
    near = [torch.stack((part[0], part[0] * 0, part[2])) for part in (k, v)]
    far = kernels.paged_decode(q, k, v, table, lens, backend="triton")
    assert torch.equal(far, kernels.paged_decode(q, *near, table, lens, backend="triton"))
    starts = torch.tensor([0, 1], dtype=torch.int32)
    rows = kernels.paged_prefill(q, k, v, starts, table, lens, backend="triton")
    assert torch.equal(rows, kernels.paged_prefill(q, *near, starts, table, lens, backend="triton"))
