# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Prompts are offered a few ahead, and no decode worker's shortage holds up another's prompts."""

from __future__ import annotations

from fake_model import request_of

from kvxfer.server.engine.offers import OfferQueue
from kvxfer.server.engine.sequence import Request, Sequence
from kvxfer.server.wire import KVTransferParams, PeerRef


def prompt_for(peer: str, length: int) -> Sequence:
    reference = PeerRef(engine="e", incarnation=peer, signature="s", model="m")
    params = KVTransferParams(role="prefill", peer=reference)
    spec = request_of(range(1, length + 1), kv_transfer_params=params)
    request = Request(spec, "prefill", lambda _: None, 0.0)
    return Sequence(request, 0, list(spec.prompt))


def test_long_prompts_are_offered_few_at_a_time_and_short_ones_by_tokens() -> None:
    offers = OfferQueue(min_ahead=2, tokens_ahead=100)
    long = [prompt_for("d", 80) for _ in range(4)]
    for sequence in long:
        offers.add(sequence)
    assert list(offers.take()) == long[:2]
    assert list(offers.take()) == []
    offers.settle(long[0])
    offers.settle(long[0])
    assert list(offers.take()) == [long[2]]
    short = [prompt_for("d", 8) for _ in range(40)]
    for sequence in [*long[1:3]]:
        offers.settle(sequence)
    for sequence in short:
        offers.add(sequence)
    # 80 of the last long one, then threes of 8 until 100 are ahead.
    assert list(offers.take()) == [long[3], *short[:3]]


def test_one_full_decode_worker_does_not_hold_up_another() -> None:
    offers = OfferQueue(min_ahead=1, tokens_ahead=1)
    stuck = [prompt_for("full", 5) for _ in range(3)]
    for sequence in stuck:
        offers.add(sequence)
    assert list(offers.take()) == stuck[:1]
    other = prompt_for("free", 5)
    offers.add(other)
    assert list(offers.take()) == [other]
    assert offers.waiting() == stuck[1:]


def test_withdrawn_prompt_is_never_offered() -> None:
    offers = OfferQueue(min_ahead=1, tokens_ahead=1)
    first, second, third = (prompt_for("d", 5) for _ in range(3))
    for sequence in (first, second, third):
        offers.add(sequence)
    assert list(offers.take()) == [first]
    assert offers.withdraw(second)
    assert not offers.withdraw(first), "it was offered"
    offers.settle(first)
    assert list(offers.take()) == [third]
    offers.settle(third)
    assert not offers.withdraw(third)
    assert offers.ahead() == offers.waiting() == []
