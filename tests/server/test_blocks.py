# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""The block pool: each block is in one state, pins outlive references, chains are evicted from their ends."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvxfer.errors import InternalError, InvalidArgumentError
from kvxfer.server.engine.blocks import BlockCounts, BlockPool, extend_hashes, root_hash

SIZE = 4


def hashes_of(ids: list[int], salt: str = "") -> list[bytes]:
    return extend_hashes([], ids, SIZE, salt)


def fill(pool: BlockPool, ids: list[int]) -> list[int]:
    """Allocates and publishes the full blocks of ``ids``, as a computed sequence would."""
    hashes = hashes_of(ids)
    blocks = pool.allocate(len(hashes))
    assert blocks is not None
    for index, block in enumerate(blocks):
        pool.publish(block, hashes[index], hashes[index - 1] if index else root_hash(""))
    return blocks


def test_hash_chain_depends_on_prefix_and_salt() -> None:
    a, b = hashes_of([1, 2, 3, 4, 9, 9, 9, 9]), hashes_of([1, 2, 3, 5, 9, 9, 9, 9])
    assert a[0] != b[0]
    assert a[1] != b[1], "equal blocks after different prefixes hold different KV"
    assert hashes_of([1, 2, 3, 4], "tenant")[0] != a[0]
    assert len(hashes_of([1] * (3 * SIZE - 1))) == 2, "a partial block has no hash"


def test_hashes_extend_to_the_same_chain() -> None:
    ids = list(range(40))
    grown: list[bytes] = []
    for end in range(41):
        extend_hashes(grown, ids[:end], SIZE, "s")
    assert grown == hashes_of(ids, "s")


def test_cached_prefix_is_found_and_survives_reuse() -> None:
    pool = BlockPool(8, SIZE)
    blocks = fill(pool, list(range(12)))
    pool.release(blocks)
    assert pool.counts() == BlockCounts(free=5, cached=3, active=0, leased=0)
    found = pool.match(hashes_of([*range(8), 99, 99, 99, 99]))
    assert found == blocks[:2]
    pool.acquire(found)
    assert pool.counts() == BlockCounts(free=5, cached=1, active=2, leased=0)
    pool.check()


def test_leaf_is_evicted_before_parent() -> None:
    pool = BlockPool(4, SIZE)
    blocks = fill(pool, list(range(16)))
    pool.release(blocks)
    hashes = hashes_of(list(range(16)))
    for left in (3, 2, 1, 0):
        assert pool.allocate(1) is not None
        assert pool.match(hashes) == blocks[:left]


def test_oldest_chain_is_evicted_first() -> None:
    pool = BlockPool(4, SIZE)
    old, new = [1] * 8, [2] * 8
    first, second = fill(pool, old), fill(pool, new)
    pool.release(first)
    pool.release(second)
    pool.acquire(first)  # used again: now the newer one
    pool.release(first)
    pool.allocate(2)
    assert pool.match(hashes_of(old)) == first
    assert pool.match(hashes_of(new)) == []


def test_pinned_block_is_neither_freed_nor_evicted() -> None:
    pool = BlockPool(2, SIZE)
    blocks = pool.allocate(2)
    assert blocks is not None
    pool.pin(blocks)
    pool.release(blocks)
    assert pool.counts() == BlockCounts(free=0, cached=0, active=0, leased=2)
    assert pool.allocate(1) is None
    pool.unpin(blocks[:1])
    assert pool.allocate(2) is None
    assert pool.allocate(1) == blocks[:1]
    pool.check()


def test_refused_allocation_changes_nothing() -> None:
    pool = BlockPool(3, SIZE)
    blocks = fill(pool, list(range(8)))
    pool.release(blocks)
    before = pool.counts()
    assert pool.allocate(4) is None
    assert pool.counts() == before
    assert pool.match(hashes_of(list(range(8)))) == blocks


@pytest.mark.parametrize(("num_blocks", "block_size"), [(0, 16), (4, 0)])
def test_empty_pool_is_refused(num_blocks: int, block_size: int) -> None:
    with pytest.raises(InvalidArgumentError, match=f"num_blocks={num_blocks}"):
        BlockPool(num_blocks, block_size)


def test_misuse_is_an_internal_error() -> None:
    pool = BlockPool(2, SIZE)
    with pytest.raises(InternalError, match="released"):
        pool.release([0])
    with pytest.raises(InternalError, match="unpinned"):
        pool.unpin([0])
    with pytest.raises(InternalError, match="without a reference"):
        pool.pin([0])
    with pytest.raises(InternalError, match="free"):
        pool.acquire([0])


def test_check_notices_a_lost_block() -> None:
    pool = BlockPool(2, SIZE)
    pool.allocate(1)
    pool._refs[0] = 0  # what a forgotten _settle would leave
    with pytest.raises(InternalError, match="free list"):
        pool.check()


class PoolMachine(RuleBasedStateMachine):
    """Random holders of random prompts from a small alphabet, against a plain model of who holds what."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(10, SIZE)
        self.held: list[tuple[list[int], list[int]]] = []  # (ids, blocks)
        self.leases: list[list[int]] = []
        self.content: dict[int, bytes] = {}  # block -> the hash of what was written into it last

    def _write(self, ids: list[int], blocks: list[int], begin: int) -> None:
        hashes = hashes_of(ids)
        for index in range(begin, len(hashes)):
            self.content[blocks[index]] = hashes[index]

    @rule(
        letters=st.lists(st.integers(0, 1), min_size=1, max_size=4), extra=st.integers(0, SIZE - 1)
    )
    def begin(self, letters: list[int], extra: int) -> None:
        ids = [letter for letter in letters for _ in range(SIZE)] + [7] * extra
        hashes = hashes_of(ids)
        found = self.pool.match(hashes)
        for block, digest in zip(found, hashes, strict=False):
            assert self.content[block] == digest, "the cache serves a block that was overwritten"
        num_new = -(-len(ids) // SIZE) - len(found)
        fits = self.pool.num_available - self.pool.num_evictable(found) >= num_new
        if not fits:
            return
        self.pool.acquire(found)
        cached = {block: self.pool._hash[block] for block in self.pool._evictable}
        fresh = self.pool.allocate(num_new)
        assert fresh is not None
        parents_left = {self.pool._parent[block] for block in self.pool._evictable}
        evicted = {digest for block, digest in cached.items() if block not in self.pool._evictable}
        assert not evicted & parents_left, "a parent was evicted before its cached child"
        busy = {b for _, blocks in self.held for b in blocks} | {
            b for lease in self.leases for b in lease
        }
        assert not busy & set(fresh), "a block that somebody holds was given away"
        for block in fresh:
            self.content[block] = b"half-written"
        blocks = found + fresh
        self._write(ids, blocks, len(found))
        self.held.append((ids, blocks))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        ids, blocks = data.draw(st.sampled_from(self.held))
        hashes = hashes_of(ids)
        for index, digest in enumerate(hashes):
            self.pool.publish(blocks[index], digest, hashes[index - 1] if index else root_hash(""))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def lease(self, data: st.DataObject) -> None:
        _, blocks = data.draw(st.sampled_from(self.held))
        self.pool.pin(blocks)
        self.leases.append(list(blocks))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.held) - 1))
        self.pool.release(self.held.pop(index)[1])

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def quiet(self, data: st.DataObject) -> None:
        self.pool.unpin(self.leases.pop(data.draw(st.integers(0, len(self.leases) - 1))))

    @invariant()
    def accounts_agree(self) -> None:
        self.pool.check()
        counts = self.pool.counts()
        leased = {block for blocks in self.leases for block in blocks}
        active = {block for _, blocks in self.held for block in blocks} - leased
        assert sum(counts) == 10
        assert (counts.leased, counts.active) == (len(leased), len(active))


PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestPoolMachine = PoolMachine.TestCase
