# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Random interleavings of everything that can happen to a handoff, over an engine that does its worst.

Checked at every step, by the owners in handoff_world: Accepted only with every byte right; blocks come back
exactly once; nothing after the end; no byte ever lands in a block that was given back. At the end: all
handoffs of living workers end within bounded time and every block is free.
"""

from __future__ import annotations

import numpy as np
import pytest
from fake_engine import FakeLease
from handoff_world import Decode, Prefill, World
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from kvxfer.connector import reservation, sender
from kvxfer.connector.push import Push

INDEX = st.integers(0, 999)
DEADLINE_S = 60.0


class Handoffs(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        self.count = 0

    @rule(
        at=INDEX,
        num_tokens=st.integers(1, 16),
        legs=st.sampled_from(["both"] * 6 + ["offer first", "offer first", "prefill", "decode"]),
    )
    def begin(self, at: int, num_tokens: int, legs: str) -> None:
        self.count += 1
        handoff = f"h{self.count}"
        prefill = self.world.prefill[at % 2]
        if legs in ("both", "decode"):
            self.world.decode.expect(handoff, num_tokens, DEADLINE_S)
        if legs != "decode":
            prefill.offer(handoff, num_tokens, self.world.decode, DEADLINE_S)
        if legs == "offer first":
            self.world.net.run_all()
            self.world.decode.poll()
            self.world.decode.expect(handoff, num_tokens, DEADLINE_S)

    @precondition(lambda self: self.world.net.pending)
    @rule(steps=st.lists(INDEX, min_size=1, max_size=12))
    def engine_steps(self, steps: list[int]) -> None:
        for index in steps:
            if self.world.net.pending:
                self.world.net.run(index)

    @rule(at=INDEX)
    def poll(self, at: int) -> None:
        self.world.workers[at % 3].poll()

    @rule()
    def poll_all(self) -> None:
        for worker in self.world.workers:
            worker.poll()

    @precondition(lambda self: self.world.decode.waiting())
    @rule(at=INDEX, cached=st.sampled_from([0, 0, 2, 4, 5, 15]))
    def grant(self, at: int, cached: int) -> None:
        waiting = self.world.decode.waiting()
        self.world.decode.grant(waiting[at % len(waiting)], cached)

    @rule(at=INDEX, cached=st.sampled_from([0, 0, 4, 8]))
    def start(self, at: int, cached: int) -> None:
        waiting = [(worker, leg) for worker in self.world.prefill for leg in worker.waiting()]
        if waiting:
            worker, leg = waiting[at % len(waiting)]
            worker.start(leg, cached)

    @rule(at=INDEX, size=st.sampled_from([4, 5, 8, 16]))
    def compute(self, at: int, size: int) -> None:
        running = [(worker, leg) for worker in self.world.prefill for leg in worker.running()]
        if running:
            worker, leg = running[at % len(running)]
            worker.compute_chunk(leg, size)

    @rule(
        happens=st.sampled_from(
            [
                ("message",),
                ("message", "read", "begin"),
                ("message", "read", "begin", "finish", "ack"),
            ]
        ),
        rounds=st.integers(1, 4),
        chunk=st.sampled_from([4, 8, 16]),
    )
    def all_go_on(self, happens: tuple[str, ...], rounds: int, chunk: int) -> None:
        """Luck, so that many handoffs get far, with writes that stay under way."""
        for _ in range(rounds):
            pending = self.world.net.pending
            for action in list(pending):
                if action.kind in happens:
                    self.world.net.run(pending.index(action))
            for worker in self.world.workers:
                worker.poll()
            self.world.go_on(chunk=chunk)

    @rule(
        at=INDEX,
        what=st.sampled_from(
            ["lose", "lose", "double", "double", "decline", "cut", "die"]
            + ["abort prefill", "abort decode"] * 3
            + ["0.2 s", "1 s", "1 s", "1 s", "9 s", "31 s"]
        ),
    )
    def disturb(self, at: int, what: str) -> None:
        """One rule for all, so that most steps are progress and most disturbances come in its midst."""
        name, _, detail = what.partition(" ")
        if name == "abort":
            self.abort(at, self.world.decode if detail == "decode" else self.world.prefill[at % 2])
        elif detail == "s":
            self.world.net.advance(float(name))
        else:
            {
                "lose": self.lose,
                "double": self.double,
                "decline": self.decline,
                "cut": self.cut,
                "die": self.die,
            }[name](at)

    def lose(self, at: int) -> None:
        """A message, or the acknowledgement of a write."""
        pending = self.world.net.pending
        losable = [action for action in pending if action.kind in ("message", "ack")]
        if losable:
            pending.remove(losable[at % len(losable)])

    def double(self, at: int) -> None:
        messages = [action for action in self.world.net.pending if action.deliver]
        if messages:
            source, target, payload = messages[at % len(messages)].deliver
            source.send(target, payload)

    def decline(self, at: int) -> None:
        waiting = [leg for leg in self.world.decode.waiting() if not leg.aborted]
        if waiting:
            self.world.decode.decline(waiting[at % len(waiting)])

    def abort(self, at: int, worker: Prefill | Decode) -> None:
        legs = [leg for leg in worker.legs.values() if not leg.ended and not leg.declined]
        if legs:
            worker.abort(legs[at // 2 % len(legs)])

    def cut(self, at: int) -> None:
        """A connection ends, on both sides at once."""
        a, b = self.world.prefill[at % 2].engine, self.world.decode.engine
        a.cut(b)
        b.cut(a)

    def die(self, at: int) -> None:
        if len(self.world.dead) < 2:
            self.world.kill(self.world.workers[at % 3])

    def teardown(self) -> None:
        try:
            # Request deadline, then leases and writes that began just before it.
            self.world.finish(within_s=DEADLINE_S + 60.0)
        finally:
            self.world.close()


SHORT = settings(
    deadline=None,
    max_examples=120,
    stateful_step_count=50,
    suppress_health_check=list(HealthCheck),
    report_multiple_bugs=False,
    derandomize=True,
)


def test_no_interleaving_corrupts_leaks_or_hangs() -> None:
    run_state_machine_as_test(Handoffs, settings=SHORT)


def accept_on_commit_alone(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(reservation, "expected_arrivals", lambda *_: np.empty(0, np.int64))


def give_sources_back_before_quiesced(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Push, "quiesced", property(lambda self: True))


def give_blocks_back_before_quiet(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(FakeLease, "quiet", property(lambda self: True))


def never_revoke(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(FakeLease, "begin_revoke", lambda self: None)
    patch.setattr(FakeLease, "quiet", property(lambda self: True))


def forget_deadlines(patch: pytest.MonkeyPatch) -> None:
    real = sender.Sender.advance
    patch.setattr(sender.Sender, "advance", lambda self, now: real(self, -1.0))


def tell_the_end_twice(patch: pytest.MonkeyPatch) -> None:
    real = sender.Sender._fail

    def fail(self, item, *args, **kwargs):  # type: ignore[no-untyped-def]
        real(self, item, *args, **kwargs)
        self._context.events.extend(self._context.events[-1:])

    patch.setattr(sender.Sender, "_fail", fail)


@pytest.mark.parametrize(
    ("fault", "symptom"),
    [
        (accept_on_commit_alone, "wrong bytes"),
        (give_sources_back_before_quiesced, "wrong bytes"),
        (give_blocks_back_before_quiet, "free block .* was written"),
        (never_revoke, "free block .* was written|wrong bytes"),
        (forget_deadlines, "no end"),
        (tell_the_end_twice, "after the end"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_seeded_fault_is_found(fault, symptom: str, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    """The test above can fail: each of these variants breaks a rule of docs/handoff.md."""
    fault(monkeypatch)
    quick = settings(SHORT, max_examples=600, phases=[Phase.generate], print_blob=False)
    with pytest.raises(AssertionError, match=symptom):
        run_state_machine_as_test(Handoffs, settings=quick)


@pytest.mark.slow
def test_no_interleaving_corrupts_leaks_or_hangs_long() -> None:
    run_state_machine_as_test(
        Handoffs,
        settings=settings(SHORT, max_examples=1000, stateful_step_count=100, derandomize=False),
    )
