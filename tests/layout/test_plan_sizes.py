# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Large plans have few spans: at most 1.1 times the fewest that any plan could have."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from layout_oracle import Model, Rank

from kvxfer.layout import plan_transfer

MODEL = Model(num_layers=3, num_heads=4, head_dim=4, head_dim_v=4, dtype="uint8")
NUM_TOKENS, FIRST_TOKEN = 1000, 5
ORDERS = ("LKBNHC", "KLBNHC", "LKBHNC", "BLKNHC", "LBNKHC", "BHLKNC")


def rank(order: str, block_size: int, tp_rank: int, tp_size: int, model: Model = MODEL) -> Rank:
    num_blocks = -(-NUM_TOKENS // block_size) + 3
    layers = tuple(range(model.num_layers))
    return Rank(model, order, num_blocks, block_size, layers, tp_rank, tp_size)


def block_list(of: Rank, how: str, seed: int) -> np.ndarray:
    """In order; shuffled; or as an allocator leaves them: runs of one to nine neighbours, shuffled."""
    ids = np.arange(of.num_blocks)
    rng = np.random.default_rng(seed)
    if how == "shuffled":
        ids = rng.permutation(ids)
    elif how == "runs":
        edges = np.flatnonzero(rng.random(of.num_blocks - 1) < 0.2) + 1
        runs = np.split(ids, edges)
        ids = np.concatenate([runs[i] for i in rng.permutation(len(runs))])
    return ids[: -(-NUM_TOKENS // of.block_size)]


def fewest(
    src: Rank, dst: Rank, src_blocks: np.ndarray, dst_blocks: np.ndarray, *, by_layer: bool
) -> int:
    """Runs of bytes that follow each other on both sides: no plan that writes each once has fewer spans.

    From arrays indexed by axes, as the oracle's, but a whole plan at a time.
    """
    token = np.arange(FIRST_TOKEN, NUM_TOKENS)
    heads = sorted(set(src.heads) & set(dst.heads))
    sides = []
    for side, ids in ((src, src_blocks), (dst, dst_blocks)):
        mine = np.array(heads) - side.heads[0]
        at = (ids[token // side.block_size], token % side.block_size)
        sides.append([part[:, at[0], at[1]][:, :, mine] for part in side.byte_index()])
    layer = np.concatenate(
        [np.broadcast_to(np.arange(len(p))[:, None, None, None], p.shape).ravel() for p in sides[1]]
    )
    source, target = (np.concatenate([part.ravel() for part in side]) for side in sides)
    order = np.argsort(target)
    breaks = (np.diff(target[order]) != 1) | (np.diff(source[order]) != 1)
    if by_layer:
        breaks |= np.diff(layer[order]) != 0
    return 1 + int(breaks.sum())


@pytest.mark.parametrize("by_layer", [False, True])
@pytest.mark.parametrize("how", ["in order", "runs"])
@pytest.mark.parametrize("target", ORDERS)
@pytest.mark.parametrize("source", ORDERS)
def test_large_plans_have_nearly_the_fewest_spans(
    source: str, target: str, how: str, by_layer: bool
) -> None:
    for blocks, tp in (((16, 16), (1, 1)), ((16, 24), (2, 1)), ((8, 32), (2, 4))):
        src, dst = (
            rank(source, blocks[0], tp[0] - 1, tp[0]),
            rank(target, blocks[1], tp[1] - 1, tp[1]),
        )
        ids = block_list(src, how, 1), block_list(dst, how, 2)
        plan = plan_transfer(
            src.layout(), dst.layout(), *ids, NUM_TOKENS,
            first_token=FIRST_TOKEN, by_layer=by_layer, kind="direct",
        )  # fmt: skip
        least = fewest(src, dst, *ids, by_layer=by_layer)
        assert least <= plan.num_spans <= 1.1 * least, (blocks, tp)


def test_a_plan_of_nearly_100_000_spans_has_the_fewest() -> None:
    """Heads inside here and outside there, blocks shuffled: nothing can be merged, and nothing is cut."""
    model = replace(MODEL, num_layers=6, num_heads=8)
    src, dst = rank("LKBHNC", 16, 0, 1, model), rank("LKBNHC", 16, 0, 1, model)
    ids = block_list(src, "shuffled", 1), block_list(dst, "shuffled", 2)
    plan = plan_transfer(
        src.layout(), dst.layout(), *ids, NUM_TOKENS, first_token=FIRST_TOKEN, kind="direct"
    )
    assert plan.num_spans == fewest(src, dst, *ids, by_layer=False)
    assert plan.num_spans == (NUM_TOKENS - FIRST_TOKEN) * model.num_heads * model.num_layers * 2
