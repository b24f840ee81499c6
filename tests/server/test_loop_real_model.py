# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""The real runner and sampler under the loop: handed-off greedy tokens are transformers' tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from fake_engine import Net
from fake_model import request_of
from loop_world import Worker, World

from kvxfer.layout import KVLayout
from kvxfer.server.config import load_config
from kvxfer.server.engine.runner import Runner, torch_views
from kvxfer.server.engine.sequence import Limits
from kvxfer.server.model import CausalLM
from kvxfer.server.weights import load_weights, parse_dtype
from kvxfer.server.wire import Usage
from kvxfer.testing.models import make_random_checkpoint
from kvxfer.testing.reference import CLEAR_GAP_RATIO, reference_greedy

BLOCK_SIZE, NUM_TOKENS = 16, 10


def real_world(model_dir: Path) -> World:
    def make_worker(net: Net, name: str) -> Worker:
        cfg = load_config(model_dir)
        dtype = parse_dtype("float32", cfg)
        layout = KVLayout.hnd(
            num_layers=cfg.num_layers,
            num_blocks=40,
            block_size=BLOCK_SIZE,
            num_kv_heads=cfg.num_kv_heads,
            head_dim=cfg.head_dim,
            dtype="float32",
        )
        model = CausalLM(cfg, load_weights(model_dir, cfg, dtype), dtype)

        def make_runner(views: Any) -> Runner:
            return Runner(model, torch_views(views, dtype), BLOCK_SIZE, num_threads=1)

        limits = Limits(max_num_seqs=8, max_num_batched_tokens=64, max_model_len=600)
        return Worker(net, name, layout, make_runner, limits)

    return World(make_worker)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model_dir = tmp_path_factory.mktemp("models") / "llama"
    make_random_checkpoint(model_dir, "llama", seed=3, num_heads=4, num_kv_heads=2, head_dim=32)
    return model_dir


@pytest.fixture(scope="module")
def truth(checkpoint: Path) -> list[tuple[list[int], list[int]]]:
    """Prompts whose answers hang on no tie, and those answers."""
    generator = np.random.default_rng(5)
    prompts = [generator.integers(0, 256, n).tolist() for n in (1, 15, 16, 17, 64, 100, 150, 37)]
    prompts.append([*prompts[5][:80], 7, 8, 9])  # shares a prefix with another
    answers, gaps = reference_greedy(checkpoint, prompts, NUM_TOKENS)
    pairs = list(zip(prompts, answers, strict=True))
    kept = [pair for pair, gap in zip(pairs, gaps, strict=True) if gap > CLEAR_GAP_RATIO]
    assert len(kept) >= 6
    return kept


@pytest.mark.parametrize("way", ["handoff", "local"])
def test_tokens_equal_those_of_transformers(
    way: str, checkpoint: Path, truth: list[tuple[list[int], list[int]]]
) -> None:
    world = real_world(checkpoint)
    legs = []
    for index, (prompt, _) in enumerate(truth):
        if way == "local":
            spec = request_of(prompt, NUM_TOKENS, ignore_eos=True, name=str(index))
            legs.append(world.open(spec, "local"))
        else:
            legs.append(world.ask(prompt, NUM_TOKENS, ignore_eos=True)[0])
    world.settle()
    for leg, (_, expected) in zip(legs, truth, strict=True):
        assert isinstance(leg.last, Usage)
        assert leg.ids == [expected]


def test_seeded_choices_survive_handoff_preemption_and_retry(checkpoint: Path) -> None:
    """The sample depends on seed, position and choice alone, so every way gives the same answer."""
    prompt = list(range(3, 40))
    spec = request_of(prompt, 12, ignore_eos=True, n=2, name="s")
    sampling = msgspec.structs.replace(spec.sampling, temperature=0.9, top_p=0.9, seed=77)
    spec = msgspec.structs.replace(spec, sampling=sampling)
    alone, handed = real_world(checkpoint), real_world(checkpoint)
    first = alone.open(spec, "local")
    alone.settle()
    legs = [handed.open(spec, role) for role in ("decode", "prefill")]
    handed.settle()
    assert first.ids == legs[0].ids
    assert first.ids[0] != first.ids[1]
    # A retry of one choice goes on from the ids already sent.
    single = msgspec.structs.replace(sampling, n=1, max_tokens=7)
    sent = tuple(first.ids[0][:5])
    retry = msgspec.structs.replace(
        spec, prompt=(*prompt, *sent), position0=5, sampling=single, handoff="f" * 32
    )
    again = real_world(checkpoint)
    rest = again.open(retry, "decode")
    again.open(retry, "prefill")
    again.settle()
    assert [*sent, *rest.ids[0]] == first.ids[0]
