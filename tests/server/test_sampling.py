# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""A token is a function of its logits, seed, position and choice; the filters keep what they promise."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvxfer.errors import InternalError
from kvxfer.server.engine.sampling import SampleRequest, sample, uniforms
from kvxfer.server.wire import SamplingParams


def request(
    *,
    position: int = 0,
    choice: int = 0,
    history: tuple[int, ...] = (),
    eos: tuple[int, ...] = (),
    **params: Any,
) -> SampleRequest:
    return SampleRequest(SamplingParams(max_tokens=99, **params), position, choice, history, eos)


def one(logits: list[float] | torch.Tensor, **fields: Any) -> int:
    return sample(torch.as_tensor(logits, dtype=torch.float32)[None], [request(**fields)])[0]


def drawn(logits: list[float], count: int = 4000, **params: Any) -> Counter[int]:
    table = torch.tensor([logits], dtype=torch.float32)
    requests = [request(position=i, seed=5, **params) for i in range(count)]
    return Counter(sample(table, requests, [0] * count))


def naive(row: np.ndarray[Any, Any], params: SamplingParams, uniform: float) -> int:
    """The same by one full sort, in the words of the definition."""
    weights = np.exp((row - row.max()) / np.float32(params.temperature))
    order = sorted(range(len(row)), key=lambda i: (-weights[i], i))
    order = [i for i in order if weights[i] >= params.min_p]
    if params.top_k:
        order = order[: params.top_k]
    mass = np.cumsum(weights[order].astype(np.float64))
    if params.top_p < 1:
        count = int(np.searchsorted(mass, params.top_p * mass[-1])) + 1
        order, mass = order[:count], mass[:count]
    return order[int(np.searchsorted(mass, uniform * mass[-1], side="right"))]


def test_philox_agrees_with_the_published_vectors() -> None:
    # Random123's known answers for philox4x32-10: counter, key, first two words.
    vectors = [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E)),
        ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
         (0xD16CFE09, 0x94FDCCEB)),
    ]  # fmt: skip
    requests = [
        request(position=c[0] | c[1] << 32, choice=c[2] | c[3] << 32, seed=k[0] | k[1] << 32)
        for c, k, _ in vectors
    ]
    expected = [(((a << 32) | b) >> 11) * 2.0**-53 for _, _, (a, b) in vectors]
    assert uniforms(requests).tolist() == expected


def test_greedy_takes_the_lowest_of_equals() -> None:
    assert one([0.0, 3.0, 1.0, 3.0], temperature=0) == 1
    assert one([0.0, 3.0, 1.0, 3.0], temperature=1e-9, seed=4) == 1


def test_a_draw_does_not_depend_on_its_batch() -> None:
    logits = torch.randn(12, 500, generator=torch.Generator().manual_seed(1))
    requests = [request(position=i * 7, choice=i % 3, seed=i // 2, top_p=0.9) for i in range(12)]
    together = sample(logits, requests)
    assert together == [sample(logits[i : i + 1], [r])[0] for i, r in enumerate(requests)]
    order = list(reversed(range(12)))
    assert sample(logits, [requests[i] for i in order], order) == [together[i] for i in order]


def test_seed_position_and_choice_each_change_the_draw() -> None:
    flat = [0.0] * 1000
    base = {"seed": 3, "position": 5, "choice": 1}
    first = one(flat, **base)
    assert one(flat, **base) == first
    for change in ({"seed": 4}, {"position": 6}, {"choice": 0}, {"seed": 3 + (1 << 40)}):
        assert one(flat, **(base | change)) != first


def test_draws_follow_the_distribution() -> None:
    probabilities = np.array([0.5, 0.25, 0.15, 0.1])
    counts = drawn(np.log(probabilities).tolist(), 20000)
    # Five standard deviations of a binomial; the seed is fixed, so this holds or fails for good.
    for i, p in enumerate(probabilities):
        assert abs(counts[i] / 20000 - p) < 5 * np.sqrt(p * (1 - p) / 20000)


def test_temperature_sharpens_and_flattens() -> None:
    logits = [2.0, 1.0, 0.0]
    cold, warm, hot = (drawn(logits, temperature=t)[0] for t in (0.5, 1.0, 2.0))
    assert cold > warm > hot


def test_filters_keep_exactly_what_they_promise() -> None:
    logits = np.log([0.4, 0.3, 0.2, 0.06, 0.04]).tolist()
    assert set(drawn(logits, top_k=2)) == {0, 1}
    assert set(drawn(logits, top_k=1)) == {0}
    assert set(drawn(logits, top_k=99)) == {0, 1, 2, 3, 4}
    assert set(drawn(logits, top_p=0.65)) == {0, 1}
    assert set(drawn(logits, top_p=0.75)) == {0, 1, 2}
    assert set(drawn(logits, top_p=1e-6)) == {0}
    assert set(drawn(logits, min_p=0.45)) == {0, 1, 2}
    # Of the two that top_k keeps, 0.4 and 0.3, the first alone holds 4/7 of what is left.
    assert set(drawn(logits, top_k=2, top_p=0.55)) == {0}
    # min_p is applied before top_p: the first is 4/9 of the 0.9 left.
    assert set(drawn(logits, min_p=0.45, top_p=0.43)) == {0}
    assert set(drawn(logits, min_p=0.45, top_p=0.45)) == {0, 1}


def test_ties_at_the_edge_of_top_k_go_to_the_lowest_ids() -> None:
    assert set(drawn([1.0, 0.0, 1.0, 1.0, 1.0], top_k=3)) == {0, 2, 3}


@given(
    seed=st.integers(0, 2**32),
    vocab=st.sampled_from([1, 2, 255, 256, 257, 700, 5000]),
    spread=st.sampled_from([0.0, 0.01, 1.0, 8.0]),
    temperature=st.sampled_from([0.1, 0.8, 1.0, 3.0]),
    top_k=st.sampled_from([0, 1, 5, 256, 300, 100000]),
    top_p=st.sampled_from([1.0, 0.999, 0.9, 0.5, 0.01]),
    min_p=st.sampled_from([0.0, 0.001, 0.1, 1.0]),
)
def test_draws_equal_a_full_sort(seed: int, vocab: int, spread: float, **filters: Any) -> None:
    generator = np.random.default_rng(seed)
    # Rounded, so that there are ties, at the edges of the filters too.
    row = np.round(generator.normal(size=vocab) * spread, 2).astype(np.float32)
    asked = request(seed=seed, position=seed % 1000, **filters)
    expected = naive(row, asked.params, float(uniforms([asked])[0]))
    assert sample(torch.from_numpy(row)[None], [asked]) == [expected]


def test_a_large_vocabulary_equals_a_full_sort() -> None:
    row = np.random.default_rng(2).normal(size=150_000).astype(np.float32)
    for position, temperature in enumerate((0.1, 0.5, 1.0, 2.0)):
        asked = request(position=position, seed=9, temperature=temperature, top_p=0.95)
        expected = naive(row, asked.params, float(uniforms([asked])[0]))
        assert sample(torch.from_numpy(row)[None], [asked]) == [expected]


def test_penalties_count_the_answer_and_apply_to_greedy_too() -> None:
    logits = [2.0, 1.5, 1.0]
    assert one(logits, temperature=0, presence_penalty=0.6, history=(0,)) == 1
    assert one(logits, temperature=0, presence_penalty=0.6, history=(0, 1)) == 0
    assert one(logits, temperature=0, frequency_penalty=0.3, history=(0,)) == 0
    assert one(logits, temperature=0, frequency_penalty=0.3, history=(0, 0)) == 1
    assert one(logits, temperature=0, presence_penalty=-1.0, history=(2,)) == 0
    assert one(logits, temperature=0, presence_penalty=-1.1, history=(2,)) == 2


def test_end_tokens_are_banned_before_min_tokens() -> None:
    logits = [1.0, 9.0, 8.0]
    stops: dict[str, Any] = {"temperature": 0, "eos": (1, 5000), "stop_token_ids": (2,)}
    assert one(logits, min_tokens=3, position=2, **stops) == 0
    assert one(logits, min_tokens=3, position=3, **stops) == 1
    assert one(logits, min_tokens=3, position=2, **(stops | {"temperature": 1.0})) == 0


def test_logits_are_left_as_they_were() -> None:
    logits = torch.randn(2, 50)
    before = logits.clone()
    penalised = request(
        presence_penalty=1.0, history=(3,), min_tokens=5, eos=(4,), top_k=3, min_p=0.1
    )
    sample(logits, [penalised, request(temperature=0)])
    assert torch.equal(logits, before)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_an_error(value: float, temperature: float) -> None:
    with pytest.raises(InternalError, match="maximum"):
        one([0.0, value, 1.0], temperature=temperature)
    with pytest.raises(InternalError, match="maximum"):
        one([-float("inf")] * 3, temperature=temperature)
