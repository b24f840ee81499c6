# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Two engine loops and a handoff between them: right tokens, one end for each leg, every block back."""

from __future__ import annotations

import re
from typing import Any

import pytest
from fake_engine import FakeEngine
from fake_model import answer, request_of
from hypothesis import given, settings
from hypothesis import strategies as st
from loop_world import SIZE, World

from kvxfer.server.wire import ErrorEvent, PrefillReply, Reserved, Usage


def samples(world: World, name: str) -> dict[str, float]:
    """Both workers' samples of a metric, added up."""
    found: dict[str, float] = {}
    for worker in (world.prefill, world.decode):
        for line in worker.metrics.render().decode().splitlines():
            if re.match(rf"kvxfer:{name}[ {{]", line):
                key, _, value = line.rpartition(" ")
                found[key] = found.get(key, 0.0) + float(value)
    return found


def test_handoff_gives_the_answer_of_a_lone_run() -> None:
    world = World()
    decode, prefill = world.ask(list(range(1, 40)), 8, ignore_eos=True)
    world.settle()
    world.check_all()
    assert isinstance(decode.events[0], Reserved)
    assert isinstance(decode.last, Usage)
    assert (decode.last.prompt_tokens, decode.last.completion_tokens) == (39, 8)
    assert isinstance(prefill.last, PrefillReply)
    assert prefill.last.status == "handed_off"
    assert world.decode.runner.num_tokens == 7, "decode computed more than its own tokens"
    assert world.prefill.runner.batch_sizes == [16, 16, 7]
    assert {"offered", "granted", "commit", "layer2_posted", "end"} <= set(prefill.last.timeline)
    assert {"granted", "accept", "first_token", "end"} <= set(decode.last.timeline)


def test_zeroed_kv_changes_the_answer() -> None:
    world = World()
    land = world.decode.engine.region.array
    decode, _ = world.ask(list(range(1, 20)), 8, ignore_eos=True)
    while not decode.ids:
        world.prefill.step()
        while world.net.pending:
            world.net.run(0)
        if world.decode.engine.inbox:
            # What has landed is wiped just before the commit is looked at.
            land[:] = 0
        world.decode.step()
    world.settle()
    assert decode.ids != answer(decode.spec)


def test_metrics_name_what_was_moved_and_how_it_ended() -> None:
    world = World()
    world.ask(list(range(1, 18)), 4)
    world.settle()
    ends = samples(world, "handoffs_total")
    assert ends['kvxfer:handoffs_total{end="accepted",role="decode"}'] == 1
    assert ends['kvxfer:handoffs_total{end="accepted",role="prefill"}'] == 1
    nbytes = 17 * world.decode.layout.nbytes / world.decode.layout.num_blocks / SIZE
    moved = samples(world, "kv_transfer_bytes_total")
    assert moved == {
        'kvxfer:kv_transfer_bytes_total{direction="sent",transport="fake"}': nbytes,
        'kvxfer:kv_transfer_bytes_total{direction="received",transport="fake"}': nbytes,
    }
    blocks = samples(world, "blocks")
    assert sum(blocks.values()) == 48
    assert blocks['kvxfer:blocks{state="leased"}'] == 0
    assert samples(world, "kv_transfer_seconds_count") == {"kvxfer:kv_transfer_seconds_count": 1}
    assert samples(world, "prompt_tokens_total") == {"kvxfer:prompt_tokens_total": 17}


def test_cached_prefix_on_both_sides_is_not_sent_again() -> None:
    world = World()
    world.ask(list(range(1, 22)), 2, ignore_eos=True)
    world.settle()
    sent = sum(samples(world, "kv_transfer_bytes_total").values())
    second, prefill = world.ask([*range(1, 22), 50, 51], 2, ignore_eos=True)
    world.settle()
    world.check_all()
    assert isinstance(second.events[0], Reserved)
    assert second.events[0].cached_tokens == 20
    assert isinstance(prefill.last, PrefillReply)
    assert prefill.last.cached_tokens == 20
    moved = sum(samples(world, "kv_transfer_bytes_total").values()) - sent
    assert moved == pytest.approx(sent * 3 / 21)


def test_prefix_that_only_prefill_has_is_sent_from_its_cache() -> None:
    world = World()
    world.ask(list(range(1, 22)), 2)
    world.settle()
    # Decode forgets all it has.
    everything = world.decode.pool.allocate(24)
    assert everything is not None
    world.decode.pool.release(everything)
    decode, prefill = world.ask(list(range(1, 22)), 5, ignore_eos=True)
    world.settle()
    world.check_all()
    assert isinstance(prefill.last, PrefillReply)
    assert prefill.last.cached_tokens == 20
    assert isinstance(decode.last, Usage)
    assert decode.last.cached_tokens == 20


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("max_tokens", [1, 2, 5])
@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 33])
def test_edges_of_blocks_choices_and_answers(length: int, max_tokens: int, n: int) -> None:
    world = World(num_blocks=32)
    world.ask(list(range(1, length + 1)), max_tokens, n=n)
    world.settle()
    world.check_all()


def test_local_requests_need_no_peer() -> None:
    world = World()
    leg = world.open(request_of(range(1, 30), 6, n=2), "local")
    world.settle()
    world.check_all()
    assert isinstance(leg.last, Usage)
    assert len(leg.ids) == 2


def test_many_at_once_through_small_pools() -> None:
    world = World(num_blocks=10)
    for index in range(12):
        world.ask(list(range(index, index + 3 * index % 17 + 3)), 10, ignore_eos=True)
    world.settle()
    world.check_all()
    assert all(isinstance(leg.last, (Usage, PrefillReply)) for leg in world.legs)


def test_prefill_holds_no_block_while_it_waits_for_a_grant() -> None:
    world = World()
    blocker = world.decode.pool.allocate(24)
    assert blocker is not None
    world.decode.pool.pin(blocker)  # as if other handoffs had them
    world.decode.pool.release(blocker)
    decode, prefill = world.ask(list(range(1, 20)))
    world.settle(seconds=3)
    assert not decode.events
    assert world.prefill.pool.counts().active == world.prefill.pool.counts().leased == 0
    assert world.prefill.loop.snapshot.waiting["grant"] == 1
    assert world.decode.loop.snapshot.waiting["blocks"] == 1
    world.decode.pool.unpin(blocker)
    world.settle(seconds=1)
    world.check_all()
    assert isinstance(prefill.last, PrefillReply)
    assert prefill.last.status == "handed_off"


@pytest.mark.parametrize("side", ["decode", "prefill", "both"])
@pytest.mark.parametrize("after", range(12))
def test_leg_that_closes_frees_both_sides(side: str, after: int) -> None:
    world = World()
    decode, prefill = world.ask(list(range(1, 60)), 6)
    for _ in range(after):
        world.decode.step()
        world.prefill.step()
        if world.net.pending:
            world.net.run(0)
    if side != "prefill":
        decode.cancel()
    if side != "decode":
        prefill.cancel()
    world.settle(seconds=90)
    world.check_all()
    if side != "prefill":
        assert decode.reasons == ["abort"] or isinstance(decode.last, ErrorEvent)


@pytest.mark.parametrize("victim", ["prefill", "decode"])
@pytest.mark.parametrize("after", range(10))
def test_death_of_the_peer_ends_the_leg_and_frees_its_blocks(victim: str, after: int) -> None:
    world = World()
    decode, prefill = world.ask(list(range(1, 60)), 6)
    for _ in range(after):
        world.decode.step()
        world.prefill.step()
        if world.net.pending:
            world.net.run(0)
    getattr(world, victim).engine.die()
    world.settle(seconds=90)
    world.check_all()
    survivor = decode if victim == "prefill" else prefill
    if isinstance(survivor.last, ErrorEvent):
        assert survivor.last.retryable or survivor.last.code == "deadline"


def test_stopped_prefill_is_given_up_and_its_late_write_is_refused() -> None:
    world = World()
    decode, _ = world.ask(list(range(1, 60)), 6)
    while not any(action.kind == "read" for action in world.net.pending):
        world.decode.step()
        world.prefill.step()
        if world.net.pending and world.net.pending[0].kind == "message":
            world.net.run(0)
    # Prefill stops here: only decode goes on.
    for _ in range(60):
        world.decode.step()
        world.net.advance(1.0)
    assert isinstance(decode.last, ErrorEvent)
    assert decode.last.retryable
    assert world.decode.whole()
    world.settle(seconds=90)
    assert world.decode.engine.late_writes_refused >= 1


def test_deadline_ends_a_request_that_waits() -> None:
    world = World()
    decode = world.open(request_of([1, 2, 3], 4, deadline_s=5.0), "decode")
    world.settle(seconds=10)
    assert isinstance(decode.last, ErrorEvent)
    assert decode.last.code in ("deadline", "expired")
    assert not decode.last.retryable
    world.check_all()


def test_deadline_ends_a_request_that_runs() -> None:
    world = World(num_blocks=64)
    leg = world.open(request_of([1, 2, 3], 200, ignore_eos=True, deadline_s=5.0), "local")
    for _ in range(3):
        world.decode.step()
        world.prefill.step()
    assert leg.request.role == "local"
    world.net.advance(6.0)
    world.settle()
    assert isinstance(leg.last, ErrorEvent)
    assert leg.last.code == "deadline"
    world.check_all()


def test_fail_all_ends_everything_with_a_retryable_error() -> None:
    world = World()
    decode, prefill = world.ask(list(range(1, 60)), 6)
    world.decode.step()
    world.prefill.step()
    for worker in world.workers:
        worker.loop.fail_all("draining", "the worker shuts down")
    world.settle(seconds=90)
    world.check_all()
    assert isinstance(decode.last, ErrorEvent)
    assert (decode.last.code, decode.last.retryable) == ("draining", True)
    assert isinstance(prefill.last, PrefillReply)
    assert (prefill.last.status, prefill.last.retryable) == ("failed", True)


REQUESTS = st.tuples(
    st.lists(st.integers(1, 3), min_size=1, max_size=24),
    st.integers(1, 6),  # max_tokens
    st.integers(1, 2),  # n
    st.sampled_from(["handoff", "handoff", "handoff", "local"]),
)
MOVES = st.lists(
    st.one_of(
        st.tuples(st.just("ask"), REQUESTS),
        st.tuples(st.just("prefill"), st.just(0)),
        st.tuples(st.just("decode"), st.just(0)),
        st.tuples(st.just("net"), st.integers(0, 30)),
        st.tuples(st.just("lose"), st.integers(0, 30)),
        st.tuples(st.just("time"), st.sampled_from([1, 1, 3, 11, 35])),
        st.tuples(st.just("cancel"), st.integers(0, 30)),
        st.tuples(st.just("die"), st.sampled_from(["prefill", "decode", "", ""])),
    ),
    max_size=60,
)


@settings(max_examples=120)
@given(moves=MOVES, num_blocks=st.integers(9, 24))
def test_any_interleaving_ends_every_leg_and_frees_every_block(
    moves: list[tuple[str, Any]], num_blocks: int
) -> None:
    world = World(num_blocks=num_blocks)
    engines: list[FakeEngine] = [world.prefill.engine, world.decode.engine]
    for kind, value in moves:
        if kind == "ask" and all(engine.alive for engine in engines):
            prompt, max_tokens, n, way = value
            if way == "local":
                world.open(request_of(prompt, max_tokens, n=n), "local")
            else:
                world.ask(prompt, max_tokens, n=n)
        elif kind in ("prefill", "decode"):
            getattr(world, kind).step()
        elif kind == "net" and world.net.pending:
            world.net.run(value)
        elif kind == "lose" and world.net.pending:
            action = world.net.pending[value % len(world.net.pending)]
            if action.kind in ("message", "ack"):
                world.net.pending.remove(action)
        elif kind == "time":
            world.net.advance(value)
        elif kind == "cancel" and world.legs:
            world.legs[value % len(world.legs)].cancel()
        elif kind == "die" and value:
            getattr(world, value).engine.die()
    world.settle(seconds=120)
    world.check_all()
