# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Each rule of docs/handoff.md by itself, over the fake engine and a fake clock."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from fake_engine import InlineExecutor
from handoff_world import CONFIG, DECODE_LAYOUT, SHAPE, Decode, Prefill, World

from kvxfer.connector import (
    Accepted,
    Declined,
    DuplicateHandoffError,
    Endpoint,
    Failed,
    Granted,
    HandoffConfig,
    Offered,
    Quiet,
)
from kvxfer.connector.protocol import Abort, Accept, Commit, Grant, Offer, decode, encode
from kvxfer.errors import InvalidArgumentError
from kvxfer.layout import KVLayout


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.close()


def settle(world: World) -> None:
    """Everything under way arrives; owners do nothing."""
    for _ in range(6):
        world.net.run_all()
        for worker in world.workers:
            worker.poll()


def kinds(log: list) -> list[type]:
    return [type(event) for event in log]


def open_both(world: World, handoff: str = "h", num_tokens: int = 10) -> tuple[Prefill, Decode]:
    prefill, decode_worker = world.prefill[0], world.decode
    decode_worker.expect(handoff, num_tokens, 60.0)
    prefill.offer(handoff, num_tokens, decode_worker, 60.0)
    settle(world)
    return prefill, decode_worker


def reserve(world: World, handoff: str = "h", num_tokens: int = 10, *, cached: int = 0) -> None:
    prefill, decode_worker = open_both(world, handoff, num_tokens)
    assert decode_worker.grant(decode_worker.legs[handoff], cached)
    settle(world)
    assert prefill.start(prefill.legs[handoff], 0)


def drop(world: World, kind: type) -> int:
    """Loses all messages of a kind that are under way."""
    pending = world.net.pending
    lost = [a for a in pending if a.deliver and isinstance(decode(a.deliver[2]), kind)]
    for action in lost:
        pending.remove(action)
    return len(lost)


def test_a_handoff_by_layers_and_chunks_ends_well_on_both_sides(world: World) -> None:
    reserve(world)
    prefill, decode_worker = world.prefill[0], world.decode
    for _ in range(3):
        prefill.compute_chunk(prefill.legs["h"], 4)
    settle(world)
    assert kinds(decode_worker.legs["h"].log) == [Offered, Accepted]
    assert kinds(prefill.legs["h"].log) == [Granted, Quiet]
    accepted = decode_worker.legs["h"].log[-1]
    assert accepted == Accepted("h", 10, (7, 8), 0, 10 * 16 * 2 * 2, "fake")
    sent, received = prefill.endpoint.stats(), decode_worker.endpoint.stats()
    assert sent["bytes_sent"] == received["bytes_received"] == {"fake": 640}
    assert sent["handoffs"]["sender"] == received["handoffs"]["receiver"] == {"accepted": 1}
    assert sent["open"] == received["open"] == {"sender": 0, "receiver": 0}


def test_only_granted_tokens_move_and_chunks_within_the_cached_prefix_are_not_expected(
    world: World,
) -> None:
    reserve(world, num_tokens=16, cached=9)
    prefill = world.prefill[0]
    for _ in range(4):
        prefill.compute_chunk(prefill.legs["h"], 4)
    writes = [action for action in world.net.pending if action.kind == "read"]
    assert len(writes) == 2 * 2  # the last two chunks, two layers
    settle(world)
    assert world.decode.legs["h"].log[-1].nbytes == (16 - 9) * 16 * 2 * 2


def test_what_the_prefill_side_had_cached_goes_with_the_first_chunk(world: World) -> None:
    open_both(world)
    prefill, decode_worker = world.prefill[0], world.decode
    decode_worker.grant(decode_worker.legs["h"], 2)
    settle(world)
    prefill.start(prefill.legs["h"], 8)
    prefill.compute_chunk(prefill.legs["h"], 4)  # tokens 8 and 9
    settle(world)
    assert kinds(decode_worker.legs["h"].log) == [Offered, Accepted]
    assert decode_worker.legs["h"].log[-1].cached_tokens == 8


def test_commit_alone_is_not_accepted(world: World) -> None:
    reserve(world)
    prefill = world.prefill[0]
    prefill.compute_chunk(prefill.legs["h"], 16)
    pending = world.net.pending
    writes = [action for action in pending if action.kind == "read"]
    for action in writes:
        pending.remove(action)
    settle(world)
    assert world.decode.endpoint.stats()["messages_received"]["commit"] == 1
    assert kinds(world.decode.legs["h"].log) == [Offered]
    pending.extend(writes)
    settle(world)
    assert kinds(world.decode.legs["h"].log) == [Offered, Accepted]


def test_a_lost_offer_grant_and_commit_are_repeated_each_beat(world: World) -> None:
    prefill, decode_worker = world.prefill[0], world.decode
    decode_worker.expect("h", 10, 60.0)
    prefill.offer("h", 10, decode_worker, 60.0)
    prefill.poll()
    assert drop(world, Offer) == 1
    world.net.advance(1.0)
    settle(world)
    decode_worker.grant(decode_worker.legs["h"], 0)
    assert drop(world, Grant) == 1
    world.net.advance(1.0)
    settle(world)
    prefill.start(prefill.legs["h"], 0)
    prefill.compute_chunk(prefill.legs["h"], 16)
    assert drop(world, Commit) == 1
    settle(world)
    assert kinds(prefill.legs["h"].log) == [Granted, Quiet]  # blocks do not wait for accept
    world.net.advance(1.0)
    prefill.poll()
    world.net.run_all()
    decode_worker.poll()
    assert drop(world, Accept)
    world.net.advance(1.0)
    settle(world)
    assert kinds(decode_worker.legs["h"].log) == [Offered, Accepted]
    assert prefill.endpoint.stats()["handoffs"]["sender"] == {"accepted": 1}


def test_a_lost_abort_is_told_again_when_the_peer_renews(world: World) -> None:
    reserve(world)
    world.decode.abort(world.decode.legs["h"])
    assert drop(world, Abort) == 1
    settle(world)
    assert kinds(world.prefill[0].legs["h"].log) == [Granted]
    world.net.advance(1.0)
    settle(world)
    assert kinds(world.prefill[0].legs["h"].log) == [Granted, Failed, Quiet]
    assert world.prefill[0].legs["h"].log[1].end == "client_gone"
    assert (
        world.prefill[0].legs["h"].log[1].retryable
    )  # the client's going is the other leg's affair


def test_a_silent_sender_loses_its_lease_or_its_handoff(world: World) -> None:
    reserve(world)
    world.net.run_all()
    world.decode.poll()
    for _ in range(12):  # the sender is stopped: it never polls
        world.net.advance(1.0)
        world.decode.poll()
    failed = world.decode.legs["h"].log[1]
    assert (failed.end, failed.retryable) == ("peer_lost", True)
    assert "was not heard for" in failed.cause
    assert kinds(world.decode.legs["h"].log) == [Offered, Failed, Quiet]


def test_a_lease_that_nobody_renews_expires(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The peer lives and talks, but not of this handoff."""
    reserve(world)
    monkeypatch.setattr(world.prefill[0].endpoint.sender, "held", lambda peer: [])
    for _ in range(32):
        world.net.advance(1.0)
        settle(world)
    failed = world.decode.legs["h"].log[1]
    assert (failed.end, failed.retryable) == ("expired", True)
    assert kinds(world.prefill[0].legs["h"].log) == [Granted, Failed, Quiet]


def test_renewal_keeps_a_slow_prefill_alive_past_the_lease_time(world: World) -> None:
    reserve(world)
    prefill = world.prefill[0]
    for _ in range(45):
        world.net.advance(1.0)
        settle(world)
    prefill.compute_chunk(prefill.legs["h"], 16)
    settle(world)
    assert kinds(world.decode.legs["h"].log) == [Offered, Accepted]


def test_beats_leave_from_within_a_long_forward_pass(world: World) -> None:
    reserve(world)
    prefill, leg = world.prefill[0], world.prefill[0].legs["h"]
    for token in (4, 8):
        for layer in range(2):
            world.net.advance(6.0)  # the sender does not poll in all this time
            prefill.endpoint.sender.layer_done(
                "h", chunk_index=token // 4 - 1, layer=layer, token_begin=token - 4, token_end=token
            )
            world.net.run_all()
            world.decode.poll()
    assert not world.decode.legs["h"].has(Failed)
    prefill.abort(leg)


def test_own_absence_is_not_held_against_the_peers(world: World) -> None:
    reserve(world)
    settle(world)
    world.net.advance(20.0)  # the whole decode process was stopped
    world.decode.poll()
    assert not world.decode.legs["h"].has(Failed)


def test_the_requests_deadline_ends_both_sides(world: World) -> None:
    open_both(world)
    for _ in range(61):
        world.net.advance(1.0)
        settle(world)
    for worker in (world.prefill[0], world.decode):
        failed = worker.legs["h"].log[-1]
        assert (failed.end, failed.retryable) == ("expired", False)


@pytest.mark.parametrize("when", ["offered", "granted", "sending", "committed"])
@pytest.mark.parametrize("who", ["prefill", "decode"])
def test_an_abort_of_either_side_at_any_time_gives_all_blocks_back(
    world: World, when: str, who: str
) -> None:
    prefill, decode_worker = open_both(world)
    if when != "offered":
        decode_worker.grant(decode_worker.legs["h"], 0)
        settle(world)
    if when in ("sending", "committed"):
        prefill.start(prefill.legs["h"], 0)
        prefill.compute_chunk(prefill.legs["h"], 4 if when == "sending" else 16)
    worker = prefill if who == "prefill" else decode_worker
    worker.abort(worker.legs["h"])
    worker.abort(worker.legs["h"])  # idempotent
    settle(world)
    for worker in (prefill, decode_worker):
        log = worker.legs["h"].log
        # Of a handoff that was whole already, the sender's abort comes too late.
        assert kinds(log).count(Failed) + kinds(log).count(Accepted) == 1
        assert len(worker.free) == worker.layout.num_blocks
        assert worker.legs["h"].ended


@pytest.mark.parametrize("who", ["prefill", "decode"])
def test_the_death_of_either_side_fails_the_other_at_once(world: World, who: str) -> None:
    reserve(world)
    prefill, decode_worker = world.prefill[0], world.decode
    prefill.compute_chunk(prefill.legs["h"], 4)
    victim, survivor = (prefill, decode_worker) if who == "prefill" else (decode_worker, prefill)
    world.kill(victim)
    world.net.run_all()
    survivor.poll()
    survivor.poll()
    failed = survivor.legs["h"].log[1]
    assert (failed.end, failed.retryable) == ("peer_lost", True)
    assert kinds(survivor.legs["h"].log)[1:] == [Failed, Quiet]
    assert len(survivor.free) == survivor.layout.num_blocks


def test_a_prefill_that_dies_after_all_has_landed_is_still_accepted(world: World) -> None:
    """The set decides, not the life of the sender."""
    reserve(world)
    world.prefill[0].compute_chunk(world.prefill[0].legs["h"], 16)
    world.net.run_all()
    world.kill(world.prefill[0])
    world.decode.poll()
    assert kinds(world.decode.legs["h"].log) == [Offered, Accepted]


def test_a_failed_write_ends_the_attempt(world: World) -> None:
    reserve(world)
    prefill = world.prefill[0]
    prefill.compute_chunk(prefill.legs["h"], 4)
    for action in [action for action in world.net.pending if action.kind == "read"]:
        action.run()
        world.net.pending.remove(action)
    world.net.pending.clear()  # bytes and acknowledgements are lost
    world.net.advance(CONFIG.write_deadline_s)
    prefill.poll()
    failed = prefill.legs["h"].log[1]
    assert (failed.end, failed.retryable) == ("write_failed", True)
    settle(world)
    assert kinds(world.decode.legs["h"].log) == [Offered, Failed, Quiet]


def step(world: World, kind: str) -> None:
    """Lets the engines do one kind of thing, as often as it is under way."""
    for action in [action for action in world.net.pending if action.kind == kind]:
        world.net.pending.remove(action)
        action.run()


def test_blocks_come_back_only_when_no_copier_is_inside(world: World) -> None:
    reserve(world)
    world.prefill[0].compute_chunk(world.prefill[0].legs["h"], 4)
    step(world, "read")
    step(world, "begin")  # the owner's engine copies, and is slow
    world.decode.abort(world.decode.legs["h"])
    world.decode.poll()
    assert kinds(world.decode.legs["h"].log) == [Offered, Failed]
    assert world.decode.endpoint.stats()["closing"]["receiver"] == 1
    step(world, "finish")
    world.decode.poll()
    assert kinds(world.decode.legs["h"].log) == [Offered, Failed, Quiet]


def test_sources_come_back_only_when_cancelled_writes_are_quiesced(world: World) -> None:
    reserve(world)
    prefill = world.prefill[0]
    prefill.compute_chunk(prefill.legs["h"], 4)
    prefill.abort(prefill.legs["h"])
    prefill.poll()
    assert kinds(prefill.legs["h"].log) == [Granted, Failed]
    assert prefill.endpoint.stats()["closing"]["sender"] == 1
    step(world, "read")
    prefill.poll()
    assert kinds(prefill.legs["h"].log) == [Granted, Failed, Quiet]


def test_layers_of_a_handoff_that_has_ended_are_ignored(world: World) -> None:
    """The forward pass goes on to its end after its request is gone."""
    reserve(world)
    prefill = world.prefill[0]
    prefill.endpoint.sender.abort("h", "client gone")
    for layer in range(2):
        prefill.endpoint.sender.layer_done(
            "h", chunk_index=0, layer=layer, token_begin=0, token_end=10
        )
    prefill.endpoint.sender.commit("h", num_chunks=1, first_tokens=[1], cached_tokens=0)
    settle(world)
    assert prefill.endpoint.stats()["layers_after_end"] == 2
    assert not any(action.kind == "read" for action in world.net.pending)
    assert kinds(world.decode.legs["h"].log) == [Offered, Failed, Quiet]


def test_decline_ends_the_handoff_on_both_sides(world: World) -> None:
    prefill, decode_worker = open_both(world)
    decode_worker.decline(decode_worker.legs["h"])
    settle(world)
    assert prefill.legs["h"].log == [Declined("h", "cached here")]
    assert kinds(decode_worker.legs["h"].log) == [Offered]
    for worker, role in ((prefill, "sender"), (decode_worker, "receiver")):
        assert worker.endpoint.stats()["handoffs"][role] == {"declined": 1}


def other_prefill(world: World, layout: KVLayout, model: str = "model") -> Prefill:
    prefill = Prefill(world.net, "other", layout)
    prefill.endpoint.close()
    prefill.endpoint = Endpoint(
        prefill.engine,
        prefill.engine.region,
        layout,
        model_id=model,
        clock=world.net.clock,
        executor=InlineExecutor(),
    )
    world.prefill[0].endpoint.close()
    world.prefill[0].engine.close()
    world.prefill[0] = prefill
    return prefill


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"head_dim": 4}, "head_dim: source has 4, destination has 2"),
        ({"num_kv_heads": 4}, "num_kv_heads"),
        ({"num_layers": 3}, "layers"),
        ({"dtype": "float16"}, "dtype"),
        ({"tp_size": 2}, "tp_size"),
    ],
)
def test_layouts_that_do_not_map_are_refused_naming_the_field(
    world: World, change: dict, text: str
) -> None:
    layout = KVLayout.nhd(num_blocks=6, block_size=4, **(SHAPE | change))
    other_prefill(world, layout)
    prefill, decode_worker = open_both(world)
    for worker in (prefill, decode_worker):
        (failed,) = worker.legs["h"].log
        assert (failed.end, failed.retryable) == ("refused", False)
        assert text.split(":")[0] in failed.cause
        assert text in failed.cause.replace(", destination ", ", destination has ")


def test_another_model_is_refused(world: World) -> None:
    other_prefill(world, DECODE_LAYOUT, model="another")
    prefill, _ = open_both(world)
    assert "prefill serves 'another', decode 'model'" in prefill.legs["h"].log[0].cause


@pytest.mark.parametrize(
    "change",
    [
        {"scales": [[]]},
        {"layers": ["0", None]},
        {"num_blocks": -1},
        {"num_blocks": 1 << 61},
        {"head_dim": 1.5},
        {"dtype": "float128"},
        {"parts": []},
        {"parts": [{}, {}]},
        {"version": 9},
        {"more": 1},
    ],
)
def test_a_malformed_layout_costs_its_sender_the_handoff_only(world: World, change: dict) -> None:
    prefill, decode_worker = world.prefill[0], world.decode
    prefill.endpoint.sender._wire = prefill.endpoint.sender._wire | change
    open_both(world)
    for worker in (prefill, decode_worker):
        assert [event.end for event in worker.legs["h"].log] == ["refused"]


def test_ids_are_not_used_twice(world: World) -> None:
    prefill, decode_worker = open_both(world)
    with pytest.raises(DuplicateHandoffError):
        decode_worker.endpoint.receiver.expect("h", deadline_s=1.0)
    decode_worker.abort(decode_worker.legs["h"])
    settle(world)
    with pytest.raises(DuplicateHandoffError):
        decode_worker.endpoint.receiver.expect("h", deadline_s=1.0)
    with pytest.raises(DuplicateHandoffError):
        prefill.offer("h", 4, decode_worker, 1.0)
    world.net.advance(CONFIG.tombstone_s + 1.0)
    settle(world)
    decode_worker.endpoint.receiver.expect("h", deadline_s=1.0)


def test_an_offer_before_its_leg_is_kept_for_a_while(world: World) -> None:
    prefill, decode_worker = world.prefill[0], world.decode
    prefill.offer("h", 10, decode_worker, 60.0)
    settle(world)
    world.net.advance(2.0)
    settle(world)
    decode_worker.expect("h", 10, 60.0)
    decode_worker.poll()
    assert kinds(decode_worker.legs["h"].log) == [Offered]


def test_a_peer_that_gave_up_before_our_leg_opened_fails_it_at_once(world: World) -> None:
    prefill, decode_worker = world.prefill[0], world.decode
    prefill.offer("h", 10, decode_worker, 60.0)
    prefill.poll()
    prefill.abort(prefill.legs["h"])
    settle(world)
    decode_worker.expect("h", 10, 60.0)
    decode_worker.poll()
    (failed,) = decode_worker.legs["h"].log
    assert (failed.end, failed.retryable) == ("client_gone", True)


def test_a_peer_that_restarted_is_not_offered_to(world: World) -> None:
    old = world.decode
    world.kill(old)
    world.decode.engine.address = old.engine.address
    world.prefill[0].offer("h", 10, old, 60.0)
    settle(world)
    (failed,) = world.prefill[0].legs["h"].log
    assert (failed.end, failed.retryable) == ("peer_lost", True)
    assert "it restarted" in failed.cause


def test_messages_of_other_incarnations_and_garbage_are_dropped_and_counted(world: World) -> None:
    prefill, decode_worker = open_both(world)
    ours, theirs = decode_worker.engine.incarnation, prefill.engine.incarnation
    for source, target in ((theirs, "0" * 32), ("0" * 32, ours)):
        abort = Abort(
            handoff="h",
            source=source,
            target=target,
            to="receiver",
            end="expired",
            cause="",
            retryable=True,
        )
        prefill.engine.send(decode_worker.engine, encode(abort))
    prefill.engine.send(decode_worker.engine, b"garbage")
    settle(world)
    dropped = decode_worker.endpoint.stats()["messages_dropped"]
    assert (dropped["stale"], dropped["malformed"]) == (2, 1)
    assert kinds(decode_worker.legs["h"].log) == [Offered]


def test_a_third_worker_cannot_speak_for_a_handoff(world: World) -> None:
    reserve(world)
    stranger, decode_worker = world.prefill[1], world.decode
    stranger.engine.join(decode_worker.engine)
    ours, theirs = decode_worker.engine.incarnation, stranger.engine.incarnation
    common = {"handoff": "h", "source": theirs, "target": ours}
    abort = Abort(**common, to="receiver", end="expired", cause="", retryable=True)
    stranger.engine.send(decode_worker.engine, encode(abort))
    ends, first = np.array([10], np.int32), np.array([1], np.int32)
    commit = Commit(
        **common, num_tokens=10, cached_tokens=0, transport="", chunk_ends=ends, first_tokens=first
    )
    stranger.engine.send(decode_worker.engine, encode(commit))
    settle(world)
    assert decode_worker.endpoint.stats()["messages_dropped"]["foreign"] == 2
    assert kinds(decode_worker.legs["h"].log) == [Offered]


def test_mistakes_of_the_owner_are_refused_at_the_call(world: World) -> None:
    prefill, decode_worker = open_both(world)
    sender, receiver = prefill.endpoint.sender, decode_worker.endpoint.receiver
    with pytest.raises(InvalidArgumentError, match="was not offered here"):
        sender.commit("x", num_chunks=1, first_tokens=[1], cached_tokens=0)
    with pytest.raises(InvalidArgumentError, match="not known here"):
        receiver.grant("x", [0], token_begin=0, token_end=1)
    with pytest.raises(InvalidArgumentError, match="at least one token must be wanted"):
        receiver.grant("h", range(5), token_begin=10, token_end=10)
    with pytest.raises(InvalidArgumentError, match="do not reach token 10"):
        receiver.grant("h", range(4), token_begin=0, token_end=10)
    with pytest.raises(InvalidArgumentError, match="distinct and within the 9 blocks"):
        receiver.grant("h", [0, 1, 2, 3, 3], token_begin=0, token_end=10)
    with pytest.raises(InvalidArgumentError, match="once, after Granted"):
        sender.start("h", range(3))
    assert decode_worker.grant(decode_worker.legs["h"], 0)
    settle(world)
    with pytest.raises(InvalidArgumentError, match="src_blocks"):
        sender.start("h", [0, 1])
    prefill.start(prefill.legs["h"], 0)
    chunk = {"token_begin": 0, "token_end": 4}
    with pytest.raises(InvalidArgumentError, match="layer 2 is not held here"):
        sender.layer_done("h", chunk_index=0, layer=2, **chunk)
    sender.layer_done("h", chunk_index=0, layer=0, **chunk)
    with pytest.raises(InvalidArgumentError, match="each of its layers comes once"):
        sender.layer_done("h", chunk_index=0, layer=0, **chunk)
    with pytest.raises(InvalidArgumentError, match="does not follow whole chunks"):
        sender.layer_done("h", chunk_index=1, layer=0, token_begin=4, token_end=8)
    with pytest.raises(InvalidArgumentError, match="1 of 2 layers of the last"):
        sender.commit("h", num_chunks=1, first_tokens=[1], cached_tokens=0)
    prefill.abort(prefill.legs["h"])
    with pytest.raises(InvalidArgumentError, match="1 to 64 characters"):
        receiver.expect("a b", deadline_s=1.0)
    with pytest.raises(InvalidArgumentError, match="must exceed renew_s"):
        HandoffConfig(lease_ttl_s=5.0)


def test_nothing_to_do_means_no_timer_and_no_message(world: World) -> None:
    reserve(world)
    prefill = world.prefill[0]
    assert prefill.endpoint.next_deadline() is not None
    prefill.compute_chunk(prefill.legs["h"], 16)
    for _ in range(30):
        settle(world)
        world.net.advance(1.0)
    for worker in (prefill, world.decode):
        worker.poll()
        assert worker.endpoint.next_deadline() is None
    assert not world.net.pending
