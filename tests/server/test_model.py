# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""The four families give transformers' greedy tokens, whatever the chunks and the company in a batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kvxfer.server.engine.runner import Batch, BatchItem
from kvxfer.testing.greedy import greedy_answers, make_runner
from kvxfer.testing.models import make_random_checkpoint
from kvxfer.testing.reference import clear_prompts, load_reference, reference_greedy

NUM_TOKENS = 10
NUM_BLOCKS = 320
LENGTHS = [1, 1, 2, 3, 7, 15, 16, 17, 31, 33, 47, 64, 65, 100, 129, 200, 255, 300, 411]

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-gqa2-llama3-tied": ("llama", {"rope": "llama3", "tie_embeddings": True}),
    "llama-mqa-linear-old-biases-shards": (
        "llama",
        {"num_kv_heads": 1, "head_dim": 64, "rope": "linear", "old_form": True, "num_shards": 3,
         "extra": {"attention_bias": True, "mlp_bias": True}},
    ),
    "llama-mha-dynamic": ("llama", {"num_kv_heads": 4, "head_dim": 32, "rope": "dynamic"}),
    "llama-three-layers-yarn-old": (
        "llama", {"num_layers": 3, "head_dim": 80, "rope": "yarn", "old_form": True, "rope_theta": 500000.0},
    ),
    "qwen2-gqa3-yarn": ("qwen2", {"num_heads": 6, "head_dim": 32, "rope": "yarn"}),
    "qwen2-window-tied": (
        "qwen2", {"num_kv_heads": 4, "sliding_window": 21, "max_window_layers": 1, "tie_embeddings": True},
    ),
    "qwen3-mha-128-tied": ("qwen3", {"num_kv_heads": 4, "head_dim": 128, "tie_embeddings": True}),
    "qwen3-gqa4-layer-types-biases-yarn": (
        "qwen3",
        {"num_heads": 8, "sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"],
         "rope": "yarn", "extra": {"attention_bias": True}},
    ),
    "mistral-mqa8-linear": ("mistral", {"num_heads": 8, "num_kv_heads": 1, "head_dim": 64, "rope": "linear"}),
    "mistral-window-old": (
        "mistral", {"num_heads": 6, "num_kv_heads": 3, "head_dim": 24, "sliding_window": 40, "old_form": True},
    ),
    "mistral-window-of-one-block": ("mistral", {"sliding_window": 16, "tie_embeddings": True}),
}  # fmt: skip


def prompts_of(lengths: list[int], seed: int = 11) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    return [generator.integers(0, 256, n).tolist() for n in lengths]


@pytest.mark.parametrize("name", CASES)
def test_greedy_tokens_equal_transformers(name: str, tmp_path: Path) -> None:
    family, fields = CASES[name]
    model_dir = make_random_checkpoint(tmp_path / "m", family, seed=7, **fields)
    pairs = clear_prompts(model_dir, prompts_of(LENGTHS), NUM_TOKENS)[:16]
    assert len(pairs) >= 14, "too many of the reference's answers hang on ties"
    prompts, truth = [list(x) for x in zip(*pairs, strict=True)]
    runner, _ = make_runner(model_dir, NUM_BLOCKS)
    for chunk, budget in ((512, 512), (37, 150), (5, 40)):
        answers = greedy_answers(
            runner,
            prompts,
            NUM_TOKENS,
            num_blocks=NUM_BLOCKS,
            chunk=chunk,
            budget=budget,
            seed=chunk,
        )
        assert answers == truth, f"chunks of {chunk}"


@pytest.mark.parametrize(
    ("family", "fields"),
    [("llama", {"rope": "yarn"}),
     ("mistral", {"sliding_window": 1000, "num_kv_heads": 1, "head_dim": 32})],
)  # fmt: skip
def test_prompts_of_several_thousand_tokens(
    family: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    model_dir = make_random_checkpoint(tmp_path / "m", family, seed=8, **fields)
    pairs = clear_prompts(model_dir, prompts_of([2500, 3000, 3500]), NUM_TOKENS)
    assert pairs
    prompts, truth = [list(x) for x in zip(*pairs, strict=True)]
    runner, _ = make_runner(model_dir, 700)
    assert greedy_answers(runner, prompts, NUM_TOKENS, num_blocks=700, chunk=400) == truth


def test_two_threads_give_the_same_tokens(tmp_path: Path) -> None:
    model_dir = make_random_checkpoint(tmp_path / "m", "qwen3", seed=4, num_heads=8)
    pairs = clear_prompts(model_dir, prompts_of([1, 40, 90, 700]), NUM_TOKENS)
    assert pairs
    prompts, truth = [list(x) for x in zip(*pairs, strict=True)]
    runner, _ = make_runner(model_dir, NUM_BLOCKS)
    try:
        runner.set_num_threads(2)
        answers = greedy_answers(runner, prompts, NUM_TOKENS, num_blocks=NUM_BLOCKS, chunk=300)
    finally:
        runner.set_num_threads(1)
    assert answers == truth


def test_logits_differ_from_transformers_by_rounding_only(tmp_path: Path) -> None:
    for family in ("llama", "qwen2", "qwen3", "mistral"):
        model_dir = make_random_checkpoint(tmp_path / family, family, seed=9)
        (prompt,) = prompts_of([200])
        with torch.inference_mode():
            expected = load_reference(model_dir)(torch.tensor([prompt])).logits[0, -1]
        runner, _ = make_runner(model_dir, 16)
        item = BatchItem(prompt, 0, list(range(16)), sample=True)
        (logits,) = runner.run(Batch([item]))
        assert (logits - expected).abs().max() < 1e-4 * expected.std()


def test_a_wrong_cache_changes_the_answer(tmp_path: Path) -> None:
    model_dir = make_random_checkpoint(tmp_path / "m", "llama", seed=7)
    (prompt,) = prompts_of([100])
    (answers, _) = reference_greedy(model_dir, [prompt], 1)
    runner, cache = make_runner(model_dir, 16)
    blocks = list(range(16))
    runner.run(Batch([BatchItem(prompt[:-1], 0, blocks, sample=False)]))
    step = Batch([BatchItem(prompt[-1:], len(prompt) - 1, blocks, sample=True)])
    (right,) = runner.run(step)
    assert [right.argmax().item()] == answers[0]
    cache[1][1][:3] = 0  # the values of three blocks of the last layer
    (wrong,) = runner.run(step)
    assert (wrong - right).abs().max() > 0.1 * right.std()


def test_bfloat16_is_as_near_to_float32_as_that_of_transformers(tmp_path: Path) -> None:
    for family in ("llama", "qwen3"):
        model_dir = make_random_checkpoint(tmp_path / family, family, seed=9, std=0.05)
        (prompt,) = prompts_of([100])
        reference = load_reference(model_dir)
        with torch.inference_mode():
            truth = reference(torch.tensor([prompt])).logits[0, -1]
            theirs = reference.to(torch.bfloat16)(torch.tensor([prompt])).logits[0, -1].float()
        runner, _ = make_runner(model_dir, 8, dtype=torch.bfloat16)
        item = BatchItem(prompt, 0, list(range(8)), sample=True)
        (ours,) = runner.run(Batch([item]))
        assert ours.dtype == torch.float32
        assert (ours - truth).norm() < 2 * (theirs - truth).norm()
