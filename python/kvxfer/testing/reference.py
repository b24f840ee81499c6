# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Greedy answers of transformers, float32: the truth that the server's tokens are compared with.

Two correct implementations differ by rounding, so where the two best logits are all but equal each may
choose its own. Such prompts are kept out of a test, rather than tolerated in it: ``min_gap_ratio`` is the
smallest gap between the best two along the answer, in standard deviations of the logits, and 1e-3 is 60
times the rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

__all__ = ["CLEAR_GAP_RATIO", "clear_prompts", "load_reference", "reference_greedy"]

CLEAR_GAP_RATIO = 1e-3


def load_reference(model_dir: str | Path) -> Any:
    """The transformers model of this directory, in float32."""
    import transformers
    from transformers import AutoModelForCausalLM

    transformers.logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        str(model_dir), dtype=torch.float32, local_files_only=True
    )
    return model.eval()


@torch.inference_mode()
def reference_greedy(
    model_dir: str | Path, prompts: Sequence[Sequence[int]], n: int, *, model: Any = None
) -> tuple[list[list[int]], list[float]]:
    """For each prompt the next ``n`` greedy ids (end tokens do not end it) and its ``min_gap_ratio``."""
    model = load_reference(model_dir) if model is None else model
    answers, gaps = [], []
    for prompt in prompts:
        ids: list[int] = []
        smallest = float("inf")
        cache = None
        given = torch.tensor([list(prompt)])
        for _ in range(n):
            out = model(given, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = out.past_key_values
            logits = out.logits[0, -1].float()
            best = logits.topk(2).values
            smallest = min(smallest, float((best[0] - best[1]) / logits.std()))
            ids.append(int(logits.argmax()))
            given = torch.tensor([[ids[-1]]])
        answers.append(ids)
        gaps.append(smallest)
    return answers, gaps


def clear_prompts(
    model_dir: str | Path, candidates: Sequence[Sequence[int]], n: int, *, model: Any = None
) -> list[tuple[list[int], list[int]]]:
    """The (prompt, answer) pairs among ``candidates`` whose answer hangs on no tie."""
    answers, gaps = reference_greedy(model_dir, candidates, n, model=model)
    pairs = zip(candidates, answers, gaps, strict=True)
    return [(list(prompt), ids) for prompt, ids, gap in pairs if gap > CLEAR_GAP_RATIO]
