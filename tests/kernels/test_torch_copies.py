# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""The copies as operators: registered as PyTorch wants it, and the same bytes inside a compiled graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvxfer import kernels
from kvxfer.errors import InvalidArgumentError, LayoutError
from kvxfer.kernels.torch_ops import layout_text
from kvxfer.layout import KVLayout, KVScales

ops = torch.ops.kvxfer

SHAPE: dict[str, Any] = {"num_kv_heads": 2, "head_dim": 8, "dtype": "float16", "num_layers": 2}
NHD = KVLayout.from_order("LKBNHC", num_blocks=6, block_size=4, **SHAPE)
HND = KVLayout.from_order("BLKHNC", num_blocks=4, block_size=6, **SHAPE)
BLOCKS, OTHERS = torch.tensor([5, 0, 2]), torch.tensor([3, 1])


def pool(layout: KVLayout, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 255, (layout.nbytes,), dtype=torch.uint8, generator=generator)


def pieces(layout: KVLayout) -> list[torch.Tensor]:
    """The same memory as two tensors, the first with all of layer 0."""
    return list(pool(layout).view(torch.float16).tensor_split(2))


def arguments(op: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    nhd, hnd = layout_text(NHD), layout_text(HND)
    some = {"num_tokens": 10, "first_token": 3}
    if op == "copy_blocks":
        return (nhd, pieces(NHD), hnd, [pool(HND, 2)], BLOCKS, OTHERS), some
    if op == "pack_blocks":
        return (nhd, pieces(NHD), BLOCKS), {**some, "layers": [1], "heads": [1, 2]}
    if op == "unpack_blocks":
        packed = kernels.pack_blocks(HND, pool(HND, 2), OTHERS, **some)
        return (packed, nhd, pieces(NHD), BLOCKS), some
    return (nhd, pieces(NHD), BLOCKS), some


NAMES = ["copy_blocks", "pack_blocks", "unpack_blocks", "checksum_blocks"]


@pytest.mark.parametrize("name", NAMES)
def test_opcheck_passes(name: str) -> None:
    args, options = arguments(name)
    results = torch.library.opcheck(getattr(ops, name).default, args, options)
    assert set(results.values()) == {"SUCCESS"}


def tensors_of(args: tuple[Any, ...]) -> list[torch.Tensor]:
    flat = [x for each in args for x in (each if isinstance(each, list) else [each])]
    # As bytes: random ones are NaN here and there.
    return [each.view(torch.uint8) for each in flat if isinstance(each, torch.Tensor)]


@pytest.mark.parametrize("name", NAMES)
def test_a_compiled_graph_moves_the_same_bytes(name: str) -> None:
    op = getattr(ops, name).default

    def step(args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        result = op(*args, **options)
        return None if result is None else result.view(torch.uint8) ^ 1

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    plain_args, options = arguments(name)
    before = [each.clone() for each in tensors_of(plain_args)]
    expected = step(plain_args, options)
    args, _ = arguments(name)
    result = compiled(args, options)
    if expected is not None:
        assert torch.equal(result, expected)
    for ours, theirs in zip(tensors_of(args), tensors_of(plain_args), strict=True):
        assert torch.equal(ours, theirs), "what an operator writes must be written in the graph too"
    if name in ("copy_blocks", "unpack_blocks"):
        after = tensors_of(plain_args)
        assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_other_blocks_do_not_compile_anew() -> None:
    counts = {"compiled": 0}

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        counts["compiled"] += 1
        return graph.forward

    text = layout_text(NHD)
    memory = pool(NHD)

    @torch.compile(fullgraph=True, backend=backend)
    def pack(memory: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return ops.pack_blocks(text, [memory], ids)

    for ids in ([5, 0, 2], [1, 2, 3], [4, 3, 0]):
        packed = pack(memory, torch.tensor(ids))
        assert torch.equal(packed, kernels.pack_blocks(NHD, memory, ids))
    assert counts["compiled"] == 1


@pytest.mark.parametrize("heads", [None, [1, 2]])
@pytest.mark.parametrize("layers", [None, [0]])
def test_packing_and_unpacking_undo_each_other(
    layers: list[int] | None, heads: list[int] | None
) -> None:
    text, memory = layout_text(NHD), pool(NHD)
    how: dict[str, Any] = {"num_tokens": 11, "first_token": 2, "layers": layers, "heads": heads}
    packed = ops.pack_blocks(text, [memory], BLOCKS, **how)
    changed = memory.clone()
    ops.unpack_blocks(torch.zeros_like(packed), text, [changed], BLOCKS, **how)
    assert not torch.equal(changed, memory)
    ops.unpack_blocks(packed, text, [changed], BLOCKS, **how)
    assert torch.equal(changed, memory)


def test_an_order_of_the_packed_buffer_may_be_asked_for() -> None:
    wire = KVLayout.from_order("LKNHBC", num_blocks=1, block_size=12, **SHAPE)
    packed = ops.pack_blocks(layout_text(NHD), [pool(NHD)], BLOCKS, out_layout=layout_text(wire))
    assert torch.equal(packed, kernels.pack_blocks(NHD, pool(NHD), BLOCKS, out_layout=wire))
    target = torch.zeros(NHD.nbytes, dtype=torch.uint8)
    ops.unpack_blocks(packed, layout_text(NHD), [target], BLOCKS, src_layout=layout_text(wire))
    sums = ops.checksum_blocks(layout_text(NHD), [target], BLOCKS)
    assert torch.equal(sums, ops.checksum_blocks(layout_text(NHD), [pool(NHD)], BLOCKS))


def test_fixed_scales_travel_in_the_text() -> None:
    eight = KVLayout.from_order(
        "LKBHNC", num_blocks=6, block_size=4, **SHAPE | {"dtype": "int8"},
        scales=KVScales("head", k=(0.5, 2.0), v=(0.25, 1.0)),
    )  # fmt: skip
    source = torch.randn(NHD.nbytes // 2).half()
    ours, theirs = (torch.zeros(eight.nbytes, dtype=torch.int8) for _ in range(2))
    ops.copy_blocks(layout_text(NHD), [source], layout_text(eight), [ours], BLOCKS, BLOCKS)
    kernels.copy_blocks(NHD, source, eight, theirs, BLOCKS, BLOCKS)
    assert torch.equal(ours, theirs)
    assert ours.any()


def test_text_is_equal_for_equal_layouts_and_nothing_else_is_taken() -> None:
    again = KVLayout.from_order("LKBNHC", num_blocks=6, block_size=4, **SHAPE)
    assert layout_text(again) == layout_text(NHD) != layout_text(HND)
    memory = [pool(NHD)]
    with pytest.raises(LayoutError, match="layout_text"):
        ops.pack_blocks("NHD", memory, BLOCKS)
    with pytest.raises(LayoutError, match="fields"):
        ops.pack_blocks('{"version": 1}', memory, BLOCKS)


def test_mistakes_are_refused_through_the_operator_too() -> None:
    with pytest.raises(InvalidArgumentError, match=r"src_blocks\[1\]: .* given 6"):
        ops.copy_blocks(
            layout_text(NHD), [pool(NHD)], layout_text(HND), [pool(HND)], torch.tensor([0, 6]), OTHERS
        )  # fmt: skip
    with pytest.raises(InvalidArgumentError, match=r"heads: expected a range within \[0, 2\)"):
        ops.checksum_blocks(layout_text(NHD), [pool(NHD)], BLOCKS, heads=[1, 3])


def test_block_ids_on_a_device_are_refused_before_they_are_waited_for() -> None:
    with pytest.raises(InvalidArgumentError, match="src_blocks: expected block ids on the host"):
        kernels.copy_blocks(NHD, pool(NHD), HND, pool(HND), BLOCKS.to("meta"), OTHERS)
