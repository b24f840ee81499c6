# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Scheduling never changes what is answered, loses no block and starves nobody."""

from __future__ import annotations

from collections.abc import Sequence as Ids

import pytest
from fake_model import FakeRunner, answer, fake_sampler, new_cache, request_of
from hypothesis import given, settings
from hypothesis import strategies as st

from kvxfer.errors import InvalidArgumentError
from kvxfer.server.engine.blocks import BlockCounts, BlockPool
from kvxfer.server.engine.runner import Batch, BatchItem
from kvxfer.server.engine.sampling import SampleRequest
from kvxfer.server.engine.scheduler import Scheduler
from kvxfer.server.engine.sequence import Chunk, Limits, Request, Role, Sequence, State
from kvxfer.server.wire import TokenRequest

SIZE = 4


class Bench:
    """A scheduler with the fake model under it."""

    def __init__(
        self, num_blocks: int = 16, *, seqs: int = 8, tokens: int = 32, max_model_len: int = 1000
    ) -> None:
        self.runner = FakeRunner(new_cache(num_blocks, SIZE), SIZE)
        self.pool = BlockPool(num_blocks, SIZE)
        self.scheduler = Scheduler(
            self.pool,
            Limits(max_num_seqs=seqs, max_num_batched_tokens=tokens, max_model_len=max_model_len),
            eos_ids=(0,),
            copy_block=self.runner.copy_block,
        )
        self.max_model_len = max_model_len
        self.got: dict[Request, dict[int, list[int]]] = {}
        self.reasons: dict[Request, list[str]] = {}
        self.prefilled: list[tuple[Sequence, list[int]]] = []

    def add(
        self, spec: TokenRequest, role: Role = "local", state: State = State.WAITING
    ) -> Request:
        request = Request(spec, role, lambda _: None, 0.0)
        sequence = Sequence(request, 0, list(spec.prompt), state)
        request.sequences.append(sequence)
        self.got[request], self.reasons[request] = {}, []
        self.scheduler.add(sequence)
        return request

    def step(self) -> list[Chunk]:
        chunks = self.scheduler.schedule()
        self.scheduler.check()
        self.scheduler.admitted.clear()
        if not chunks:
            return chunks
        items = [
            BatchItem(
                c.sequence.ids[c.begin : c.end], c.begin, c.sequence.block_ids, c.num_samples > 0
            )
            for c in chunks
        ]
        logits = self.runner.run(Batch(items))
        samples = []
        for row, chunk in enumerate(c for c in chunks if c.num_samples):
            first = chunk.sequence.choice
            draws = [
                SampleRequest(chunk.sequence.request.spec.sampling, 0, first + offset)
                for offset in range(chunk.num_samples)
            ]
            samples.append(fake_sampler(logits, draws, [row] * len(draws)))
        outputs, prefilled = self.scheduler.postprocess(chunks, samples)
        self.prefilled += prefilled
        for sequence, token, finish in outputs:
            self.got[sequence.request].setdefault(sequence.choice, []).append(token)
            if finish:
                self.reasons[sequence.request].append(finish)
        self.scheduler.check()
        return chunks

    def run(self) -> None:
        for _ in range(5000):
            if not self.step():
                break
        assert not self.scheduler.running, "the scheduler stopped with work left"
        assert not self.scheduler.waiting, "the scheduler stopped with work left"

    def expect_all(self) -> None:
        for request, choices in self.got.items():
            expected = answer(request.spec, (0,), self.max_model_len)
            assert [choices[i] for i in sorted(choices)] == expected
        counts = self.pool.counts()
        assert counts.active == counts.leased == 0


def test_one_request() -> None:
    bench = Bench()
    bench.add(request_of(range(1, 11), 6, ignore_eos=True))
    bench.run()
    bench.expect_all()


def test_decode_tokens_come_first_then_chunks_that_end_on_blocks() -> None:
    bench = Bench(64, tokens=16, seqs=8)
    first = bench.add(request_of(range(1, 6), 50, ignore_eos=True, name="a"))
    bench.step()
    second = bench.add(request_of(range(1, 42), 4, ignore_eos=True, name="b"))
    third = bench.add(request_of(range(50, 60), 4, ignore_eos=True, name="c"))
    seen = []
    while not (second.sequences[0].num_outputs and third.sequences[0].num_outputs):
        chunks = bench.step()
        assert sum(c.end - c.begin for c in chunks) <= 16
        assert chunks[0].sequence.request is first, "a running sequence waits for nobody's prompt"
        seen += [(c.sequence.request.spec.request_id, c.begin, c.end) for c in chunks[1:]]
    # One token of a leaves 15: chunks end on multiples of 4 but the last, and c follows b.
    prefills = [item for item in seen if item[2] - item[1] > 1]
    assert prefills == [("b", 4, 16), ("b", 16, 28), ("b", 28, 41), ("c", 0, 10)]


def test_cached_prefix_is_not_computed_again_but_its_last_token_is() -> None:
    bench = Bench(32)
    bench.add(request_of(range(1, 13), 2, ignore_eos=True, name="a"))
    bench.run()
    computed = bench.runner.num_tokens
    again = bench.add(request_of(range(1, 13), 2, ignore_eos=True, name="b"))
    bench.run()
    bench.expect_all()
    # 12 tokens are three full blocks, but the last token's logits are needed: block 3 is computed.
    assert again.cached_tokens == 8
    assert bench.runner.num_tokens - computed == 4 + 1
    assert (bench.scheduler.prefix_queries, bench.scheduler.prefix_hits) == (24, 8)


def test_prompt_cancelled_between_chunks_leaves_only_computed_blocks_in_the_cache() -> None:
    bench = Bench(32, tokens=12)
    cancelled = bench.add(request_of(range(1, 31), 2, name="a"))
    bench.step()
    bench.scheduler.remove(cancelled.sequences[0])
    del bench.got[cancelled]
    again = bench.add(request_of(range(1, 31), 6, ignore_eos=True, name="b"))
    bench.run()
    bench.expect_all()
    assert again.cached_tokens == 12


def test_cache_salt_separates_tenants() -> None:
    bench = Bench(32)
    bench.add(request_of(range(1, 13), 2, name="a", cache_salt="x"))
    bench.run()
    other = bench.add(request_of(range(1, 13), 2, name="b", cache_salt="y"))
    bench.run()
    assert other.cached_tokens == 0


def test_preempted_sequences_answer_the_same() -> None:
    bench = Bench(10, seqs=4, tokens=64)
    for index in range(4):
        bench.add(request_of(range(index, index + 7), 20, ignore_eos=True, name=str(index)))
    bench.run()
    assert bench.scheduler.num_preemptions > 0
    bench.expect_all()


def test_newest_running_sequence_is_preempted() -> None:
    bench = Bench(8, seqs=4, tokens=64)
    old = bench.add(request_of(range(8), 20, ignore_eos=True, name="old"))
    new = bench.add(request_of(range(20, 28), 20, ignore_eos=True, name="new"))
    while not bench.scheduler.num_preemptions:
        assert bench.step()
    assert old.sequences[0].state is State.RUNNING
    assert new.sequences[0].state is State.WAITING
    bench.run()
    bench.expect_all()


def test_prompt_that_is_being_sent_is_never_preempted() -> None:
    bench = Bench(8, seqs=4, tokens=12)
    runner = bench.add(request_of(range(8), 17, ignore_eos=True, name="runs"))
    bench.step()
    sent = bench.add(request_of(range(30, 46), 1, name="sent"), "prefill", State.GRANTED)
    while not bench.prefilled:
        assert bench.step()
        assert sent.sequences[0].state in (State.PREFILLING, State.FINISHED, State.GRANTED)
        assert runner.sequences[0].state is State.RUNNING
    assert bench.prefilled[0][1] == [answer(sent.spec)[0][0]]


def test_last_runner_waits_for_reserved_blocks() -> None:
    bench = Bench(6, seqs=4, tokens=32)
    reserved = bench.add(request_of(range(40, 52), 4, name="d"), "decode", State.OFFERED)
    runner = bench.add(request_of(range(8), 14, ignore_eos=True, name="runs"))
    while bench.step():
        pass
    assert reserved.sequences[0].state is State.RESERVED
    assert runner.sequences[0].state is State.RUNNING, "it keeps its blocks and waits"
    bench.scheduler.remove(reserved.sequences[0])  # its peer died
    bench.run()
    assert bench.got[runner][0] == answer(runner.spec)[0]


def test_new_grant_leaves_a_spare_block_per_running_sequence() -> None:
    bench = Bench(8, seqs=8, tokens=32)
    for index in range(2):
        bench.add(
            request_of(range(index * 10, index * 10 + 7), 3, ignore_eos=True, name=str(index))
        )
    bench.step()  # 2 x 2 blocks
    reserve = bench.add(request_of(range(50, 62), 2, name="d"), "decode", State.OFFERED)
    bench.step()
    assert reserve.sequences[0].state is State.OFFERED, "3 blocks would leave 1 for two runners"
    while reserve.sequences[0].state is State.OFFERED:
        assert bench.step() or reserve.sequences[0].state is State.RESERVED
    assert len(reserve.sequences[0].block_ids) == 3


def test_activated_sequence_goes_on_from_what_arrived() -> None:
    source, bench = Bench(16), Bench(16)
    spec = request_of(range(1, 11), 6, ignore_eos=True, n=2)
    sent = source.add(spec, "prefill", State.GRANTED)
    source.step()
    source_blocks = [0, 1, 2]  # what its first allocation gives
    decode = bench.add(spec, "decode", State.OFFERED)
    bench.step()
    (sequence,) = decode.sequences
    for layer, parts in enumerate(bench.runner.cache):
        for part, other in zip(parts, source.runner.cache[layer], strict=True):
            part[sequence.block_ids] = other[source_blocks]
    outputs = bench.scheduler.activate(sequence, source.prefilled[0][1])
    for output in outputs:
        bench.got[decode].setdefault(output.sequence.choice, []).append(output.token)
    bench.scheduler.check()
    bench.run()
    bench.expect_all()
    assert sent.sequences[0].state is State.FINISHED


def test_choices_share_full_blocks_and_copy_the_partial_one() -> None:
    bench = Bench(16)
    request = bench.add(request_of(range(1, 11), 6, ignore_eos=True, n=3))
    bench.step()
    blocks = [sequence.block_ids for sequence in request.sequences]
    assert len(blocks) == 3
    assert len({tuple(ids[:2]) for ids in blocks}) == 1
    assert len({ids[2] for ids in blocks}) == 3
    bench.run()
    bench.expect_all()


def test_choices_without_room_wait_and_answer_the_same() -> None:
    bench = Bench(4, seqs=4)
    bench.add(request_of(range(1, 11), 4, ignore_eos=True, n=3))
    bench.run()
    bench.expect_all()


def test_big_request_is_not_overtaken_for_blocks() -> None:
    bench = Bench(8, seqs=8, tokens=64)
    bench.add(request_of(range(12), 8, ignore_eos=True, name="a"))
    bench.step()
    big = bench.add(request_of(range(20, 44), 2, ignore_eos=True, name="big"))
    small = bench.add(request_of([90], 2, ignore_eos=True, name="small"))
    while big.sequences[0].state is State.WAITING:
        assert small.sequences[0].state is State.WAITING
        bench.step()
    bench.run()
    bench.expect_all()


@pytest.mark.parametrize(("n", "min_tokens"), [(1, 0), (2, 0), (1, 30)])
def test_end_token_stops_unless_too_early(n: int, min_tokens: int) -> None:
    bench = Bench(64, seqs=4, max_model_len=200)
    spec = next(
        spec
        for seed in range(1000)
        if len(answer(spec := request_of([seed % 97, seed // 97, 3], 30, n=n), (0,))[0]) < 30
    )
    spec = request_of(spec.prompt, 30, n=n, min_tokens=min_tokens)
    request = bench.add(spec)
    bench.run()
    if min_tokens:
        assert len(bench.got[request][0]) == 30
        assert bench.reasons[request] == ["length"]
    else:
        bench.expect_all()
        assert bench.got[request][0][-1] == 0
        assert "stop" in bench.reasons[request]


def test_context_end_finishes_with_length() -> None:
    bench = Bench(16, max_model_len=14)
    request = bench.add(request_of(range(10), 100, ignore_eos=True))
    bench.run()
    assert len(bench.got[request][0]) == 4
    assert bench.reasons[request] == ["length"]


def test_budget_too_small_for_its_sequences_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="max_num_batched_tokens=10"):
        Bench(tokens=10, seqs=8)


ARRIVALS = st.lists(
    st.tuples(
        st.integers(0, 12),  # at which step
        st.lists(st.integers(1, 3), min_size=1, max_size=20),  # few ids: many common prefixes
        st.integers(1, 14),  # max_tokens
        st.integers(1, 3),  # n
        st.one_of(st.none(), st.integers(0, 20)),  # cancelled this many steps after arrival
    ),
    min_size=1,
    max_size=10,
)


@settings(max_examples=60)
@given(arrivals=ARRIVALS, num_blocks=st.integers(9, 20), tokens=st.sampled_from([12, 16, 40]))
def test_any_traffic_answers_as_if_alone(
    arrivals: list[tuple[int, Ids[int], int, int, int | None]], num_blocks: int, tokens: int
) -> None:
    bench = Bench(num_blocks, seqs=6, tokens=tokens)
    pending = sorted(enumerate(arrivals), key=lambda item: item[1][0])
    leaving: dict[int, list[Request]] = {}
    cancelled = set()
    for step in range(3000):
        while pending and pending[0][1][0] <= step:
            index, (_, prompt, max_tokens, n, leaves) = pending.pop(0)
            request = bench.add(request_of(prompt, max_tokens, n=n, name=str(index)))
            if leaves is not None:
                leaving.setdefault(step + leaves, []).append(request)
        for request in leaving.pop(step, []):
            for sequence in request.sequences:
                if sequence.state is not State.FINISHED:
                    bench.scheduler.remove(sequence)
                    cancelled.add(request)
            bench.scheduler.check()
        if not bench.step() and not pending and not leaving:
            break
    else:
        pytest.fail("traffic did not end")
    assert not bench.scheduler.running
    assert not bench.scheduler.waiting
    for request, choices in bench.got.items():
        expected = answer(request.spec, (0,))
        if request in cancelled:
            for index, ids in choices.items():
                assert ids == expected[index][: len(ids)]
        else:
            assert [choices[i] for i in sorted(choices)] == expected
    counts = bench.pool.counts()
    assert counts == BlockCounts(counts.free, num_blocks - counts.free, 0, 0)
