# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Which tokens of which sequences the next step computes, and what becomes of the sampled ids.

Continuous batching: one token of each running sequence, then prefill chunks in order of arrival, within a
budget of tokens. Pure bookkeeping over the block pool: no tensors, no clock, no transfer. Only the
engine thread calls it.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable
from typing import Literal

from kvxfer.errors import InternalError, InvalidArgumentError
from kvxfer.server.engine.blocks import BlockPool, extend_hashes, root_hash
from kvxfer.server.engine.sequence import Chunk, Limits, Output, Sequence, State

__all__ = ["Scheduler"]


class Scheduler:
    def __init__(
        self,
        pool: BlockPool,
        limits: Limits,
        *,
        eos_ids: Iterable[int] = (),
        copy_block: Callable[[int, int], None],
    ) -> None:
        """``copy_block(source, target)`` copies a block's bytes in all layers, for choices that part ways."""
        if limits.max_num_batched_tokens < limits.max_num_seqs + pool.block_size:
            raise InvalidArgumentError(
                f"max_num_batched_tokens={limits.max_num_batched_tokens} leaves no room for a block "
                f"of {pool.block_size} prompt tokens beside max_num_seqs={limits.max_num_seqs} "
                "running sequences; raise the first or lower the second"
            )
        self.pool = pool
        self.limits = limits
        self.waiting: deque[Sequence] = deque()  # first come, first served; nobody is overtaken
        self.running: list[Sequence] = []  # in order of admission
        self.reserved: list[Sequence] = []  # decode side: their blocks are granted to a peer
        self.admitted: list[Sequence] = []  # since the owner last looked: its handoffs go on
        self.num_preemptions = 0
        self.prefix_queries = 0  # tokens looked up, and found
        self.prefix_hits = 0
        self._eos_ids = frozenset(eos_ids)
        self._copy_block = copy_block

    def add(self, sequence: Sequence) -> None:
        """WAITING: compute it here. GRANTED: the same, for a peer. OFFERED: only reserve its blocks."""
        self.waiting.append(sequence)

    def schedule(self) -> list[Chunk]:
        budget = self.limits.max_num_batched_tokens
        chunks: list[Chunk] = []
        for sequence in list(self.running):
            # A victim of preemption is always newer than who needs its block, so not yet in chunks.
            if sequence.state is State.RUNNING and self._grow(sequence):
                end = len(sequence.ids)
                chunks.append(Chunk(sequence, end - 1, end, 1))
                budget -= 1
        prefilling = deque(s for s in self.running if s.state is State.PREFILLING)
        while True:
            candidate = prefilling.popleft() if prefilling else self._admit_next(budget)
            if candidate is None:
                return chunks
            chunk = self._prefill_chunk(candidate, budget)
            if chunk is None:
                budget = 0  # less than a block is left: no later sequence may use it either
                continue
            chunks.append(chunk)
            budget -= chunk.end - chunk.begin

    def postprocess(
        self, chunks: list[Chunk], samples: Iterable[list[int]]
    ) -> tuple[list[Output], list[tuple[Sequence, list[int]]]]:
        """Books a computed step. ``samples``: the drawn ids of each chunk that samples, in order.

        Returns what sequences of this worker got, and the first tokens of prompts computed for a peer
        (those sequences are finished; their blocks stay leased until the handoff is quiet).
        """
        drawn = iter(samples)
        outputs: list[Output] = []
        prefilled: list[tuple[Sequence, list[int]]] = []
        for sequence, _, end, num_samples in chunks:
            sequence.num_computed = end
            self._publish(sequence)
            if sequence.state is State.PREFILLING:
                sequence.num_chunks += 1
            if not num_samples:
                continue
            tokens = next(drawn)
            if sequence.request.role == "prefill":
                prefilled.append((sequence, tokens))
                self.remove(sequence)
            else:
                outputs += self._extend(sequence, tokens)
        return outputs, prefilled

    def activate(self, sequence: Sequence, first_tokens: list[int]) -> list[Output]:
        """A reserved sequence's prompt has arrived, and its lease is closed: it runs from here on."""
        self.reserved.remove(sequence)
        self.running.append(sequence)
        sequence.num_computed = sequence.num_prompt
        self._publish(sequence)
        return self._extend(sequence, first_tokens)

    def remove(self, sequence: Sequence) -> None:
        """Ends it wherever it is and gives its references back; leased blocks stay until unpinned."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.reserved:
            self.reserved.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        if sequence in self.admitted:
            self.admitted.remove(sequence)
        self._drop_blocks(sequence)
        sequence.state = State.FINISHED

    def num_choices(self, sequence: Sequence) -> int:
        """How many sequences this one stands for: n until its first token, then itself."""
        request = sequence.request
        alone = len(request.sequences) == 1 and sequence.num_outputs == 0
        return request.spec.sampling.n if alone else 1

    def check(self) -> None:
        """The pool's own check, and that its references are exactly those of the sequences here."""
        self.pool.check()
        holders = [*self.running, *self.reserved]
        references = Counter(block for sequence in holders for block in sequence.block_ids)
        if references != Counter(self.pool.references()):
            raise InternalError(f"references {self.pool.references()} are not those of {holders}")
        for sequence in holders:
            if len(sequence.block_ids) * self.pool.block_size < sequence.num_computed:
                raise InternalError(f"{sequence} has computed more than its blocks hold")
        for sequence in self.waiting:
            if sequence.block_ids or sequence.num_computed:
                raise InternalError(f"{sequence} waits and holds blocks")

    def _admit_next(self, budget: int) -> Sequence | None:
        """Admits in order of arrival; returns the next to prefill. Reservations cost no budget."""
        while self.waiting:
            sequence = self.waiting[0]
            if budget < self.pool.block_size and sequence.state is not State.OFFERED:
                return None
            if not self._admit(sequence):
                return None
            self.waiting.popleft()
            self.admitted.append(sequence)
            if sequence.state is State.PREFILLING:
                return sequence
        return None

    def _prefill_chunk(self, sequence: Sequence, budget: int) -> Chunk | None:
        begin, total = sequence.num_computed, len(sequence.ids)
        end = min(total, begin + budget)
        if end < total:
            end -= end % self.pool.block_size  # so that only whole blocks are published and sent
        if end <= begin:
            return None
        return Chunk(sequence, begin, end, self.num_choices(sequence) if end == total else 0)

    def _num_seats(self, sequence: Sequence) -> int:
        """How many running sequences it is or becomes; a peer's prompt never becomes more."""
        return 1 if sequence.request.role == "prefill" else self.num_choices(sequence)

    def _admit(self, sequence: Sequence) -> bool:
        """Takes all blocks of the sequence's ids at once, or none."""
        seats = sum(map(self._num_seats, [*self.running, *self.reserved, sequence]))
        if seats > self.limits.max_num_seqs:
            return False
        size, ids = self.pool.block_size, sequence.ids
        extend_hashes(sequence.hashes, ids, size, sequence.request.spec.cache_salt)
        # Somebody needs the last token's logits, so it is computed even if all of it is cached.
        found = self.pool.match(sequence.hashes[: (len(ids) - 1) // size])
        num_new = -(-len(ids) // size) - len(found)
        # One spare block per running sequence, or the newcomer would at once cost somebody a preemption.
        spare = sum(s.state is State.RUNNING for s in self.running)
        if self.pool.num_available - self.pool.num_evictable(found) < num_new + spare:
            return False
        self.pool.acquire(found)
        fresh = self.pool.allocate(num_new)
        if fresh is None:
            raise InternalError(
                f"{num_new} blocks were available and are not: {self.pool.counts()}"
            )
        sequence.block_ids = found + fresh
        sequence.num_published = len(found)
        sequence.num_computed = len(found) * size
        self.prefix_queries += len(ids)
        self.prefix_hits += sequence.num_computed
        if sequence.request.cached_tokens is None:
            sequence.request.cached_tokens = sequence.num_computed
        if sequence.state is State.OFFERED:
            sequence.state = State.RESERVED
            self.reserved.append(sequence)
        else:
            sequence.state = State.PREFILLING
            self.running.append(sequence)
        return True

    def _grow(self, sequence: Sequence) -> bool:
        """Room for the last id; False if the sequence was preempted or has to wait a step."""
        if len(sequence.block_ids) * self.pool.block_size >= len(sequence.ids):
            return True
        while (fresh := self.pool.allocate(1)) is None:
            # A prompt that is being sent is never preempted: its peer counts on these very blocks.
            victims = [s for s in self.running if s.request.role != "prefill"]
            if victims == [sequence]:
                return False  # the rest is reserved or being sent, and comes back
            self._preempt(victims[-1])
            if victims[-1] is sequence:
                return False
        sequence.block_ids += fresh
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Back to the head of the queue; recomputed from its ids, mostly out of the prefix cache."""
        self.running.remove(sequence)
        if sequence in self.admitted:
            self.admitted.remove(sequence)
        self._drop_blocks(sequence)
        sequence.state = State.WAITING
        self.waiting.appendleft(sequence)
        self.num_preemptions += 1

    def _drop_blocks(self, sequence: Sequence) -> None:
        self.pool.release(sequence.block_ids)
        sequence.block_ids = []
        sequence.num_computed = sequence.num_published = 0

    def _publish(self, sequence: Sequence) -> None:
        size, salt = self.pool.block_size, sequence.request.spec.cache_salt
        full = sequence.num_computed // size
        if full <= sequence.num_published:
            return
        hashes = extend_hashes(sequence.hashes, sequence.ids, size, salt)
        for index in range(sequence.num_published, full):
            parent = hashes[index - 1] if index else root_hash(salt)
            self.pool.publish(sequence.block_ids[index], hashes[index], parent)
        sequence.num_published = full

    def _extend(self, sequence: Sequence, tokens: list[int]) -> list[Output]:
        """Appends a sampled id; several are the first ids of as many choices, which part here."""
        sequence.state = State.RUNNING
        twins = [self._fork(sequence, choice) for choice in range(1, len(tokens))]
        pairs = zip([sequence, *twins], tokens, strict=True)
        return [self._append(one, token) for one, token in pairs]

    def _fork(self, sequence: Sequence, choice: int) -> Sequence:
        """A twin that shares the full blocks and copies the partial last one; without room it waits."""
        twin = Sequence(sequence.request, choice, list(sequence.ids), hashes=list(sequence.hashes))
        sequence.request.sequences.append(twin)
        num_full = sequence.num_computed // self.pool.block_size
        shared, tail = sequence.block_ids[:num_full], sequence.block_ids[num_full:]
        copies = self.pool.allocate(len(tail))
        if copies is None:
            self.waiting.appendleft(twin)
            return twin
        self.pool.acquire(shared)
        for source, target in zip(tail, copies, strict=True):
            self._copy_block(source, target)
        twin.block_ids = shared + copies
        twin.num_computed, twin.num_published = sequence.num_computed, num_full
        twin.state = State.RUNNING
        self.running.append(twin)
        return twin

    def _append(self, sequence: Sequence, token: int) -> Output:
        sampling = sequence.request.spec.sampling
        sequence.ids.append(token)
        stops = token in sampling.stop_token_ids or (
            not sampling.ignore_eos and token in self._eos_ids
        )
        finish: Literal["stop", "length"] | None = None
        if stops and len(sequence.history) > sampling.min_tokens:
            finish = "stop"
        elif sequence.num_outputs >= sampling.max_tokens or (
            len(sequence.ids) >= self.limits.max_model_len
        ):
            finish = "length"
        if finish is not None:
            self.remove(sequence)
        return Output(sequence, token, finish)
