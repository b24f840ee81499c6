# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""The block pool: who refers to each block of the cache, which prompt prefixes are in it, what to evict.

It holds no bytes, only ids. A block is in exactly one state, leased before active before cached before
free, so that ``free + cached + active + leased == total`` always holds; `check` proves it.
"""

from __future__ import annotations

import array
import hashlib
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from kvxfer.errors import InternalError, InvalidArgumentError

__all__ = ["BlockCounts", "BlockPool", "extend_hashes", "root_hash"]


class BlockCounts(NamedTuple):
    free: int  # no reference, content meaningless
    cached: int  # no reference, hash known, evictable
    active: int  # referenced by sequences
    leased: int  # pinned by a lease: somebody else may still write into it or read from it


def root_hash(cache_salt: str) -> bytes:
    """Parent of every first block. Tenants with different salts never share a block."""
    return hashlib.blake2b(cache_salt.encode(), digest_size=16, person=b"kvxfer.root").digest()


def extend_hashes(
    hashes: list[bytes], ids: Sequence[int], block_size: int, cache_salt: str
) -> list[bytes]:
    """Appends the chain hashes of the full blocks of ``ids`` that ``hashes`` lacks; returns it.

    blake2b, since Python's own hash differs between processes and collides where a client wants it to.
    """
    parent = hashes[-1] if hashes else root_hash(cache_salt)
    for index in range(len(hashes), len(ids) // block_size):
        block = array.array("q", ids[index * block_size : (index + 1) * block_size])
        parent = hashlib.blake2b(parent + block.tobytes(), digest_size=16).digest()
        hashes.append(parent)
    return hashes


class BlockPool:
    """References and pins of ``num_blocks`` blocks. One thread."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 1 or block_size < 1:
            raise InvalidArgumentError(
                f"a pool needs at least one block of one token, given num_blocks={num_blocks}, "
                f"block_size={block_size}"
            )
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._refs = [0] * num_blocks
        self._pins = [0] * num_blocks
        self._hash: list[bytes | None] = [None] * num_blocks
        self._parent: list[bytes | None] = [None] * num_blocks
        self._by_hash: dict[bytes, int] = {}
        self._free = deque(range(num_blocks))
        self._evictable: OrderedDict[int, None] = OrderedDict()  # oldest first
        self._evictable_children: Counter[bytes] = (
            Counter()
        )  # parent hash -> how many in _evictable
        self._num_leased = 0

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` could give: free ones and evictable ones."""
        return len(self._free) + len(self._evictable)

    def counts(self) -> BlockCounts:
        free, cached = len(self._free), len(self._evictable)
        return BlockCounts(
            free, cached, self.num_blocks - free - cached - self._num_leased, self._num_leased
        )

    def references(self) -> dict[int, int]:
        """How many references each referenced block has."""
        return {block: num for block, num in enumerate(self._refs) if num}

    def match(self, hashes: Iterable[bytes]) -> list[int]:
        """The blocks of the longest known prefix. Takes no reference: follow with `acquire`."""
        found = []
        for digest in hashes:
            block = self._by_hash.get(digest)
            if block is None:
                break
            found.append(block)
        return found

    def num_evictable(self, blocks: Iterable[int]) -> int:
        """How many of ``blocks`` would no longer be available once acquired."""
        return sum(block in self._evictable for block in blocks)

    def acquire(self, blocks: Iterable[int]) -> None:
        """One more reference to each; only to blocks that have a reference, a pin or a hash."""
        for block in blocks:
            if not (self._refs[block] or self._pins[block] or self._hash[block] is not None):
                raise InternalError(f"block {block} is free and cannot be acquired, only allocated")
            self._leave_evictable(block)
            self._refs[block] += 1

    def allocate(self, num: int) -> list[int] | None:
        """``num`` blocks with one reference each, or None and nothing changed."""
        if num > self.num_available:
            return None
        blocks = []
        for _ in range(num):
            if not self._free:
                self._evict_one()
            block = self._free.popleft()
            self._refs[block] = 1
            blocks.append(block)
        return blocks

    def release(self, blocks: Sequence[int]) -> None:
        """Gives back one reference of each. Last block first: leaves then are older than their parents."""
        for block in reversed(blocks):
            if self._refs[block] < 1:
                raise InternalError(f"block {block} was released more often than it was acquired")
            self._refs[block] -= 1
            self._settle(block)

    def publish(self, block: int, digest: bytes, parent: bytes) -> None:
        """The block holds every layer of these ids from now on. The first of equal blocks is the one found."""
        if self._hash[block] is None and digest not in self._by_hash:
            self._hash[block], self._parent[block] = digest, parent
            self._by_hash[digest] = block

    def pin(self, blocks: Iterable[int]) -> None:
        """A lease covers these blocks; the caller holds a reference to each."""
        for block in blocks:
            if self._refs[block] < 1:
                raise InternalError(f"block {block} is leased without a reference")
            self._num_leased += self._pins[block] == 0
            self._pins[block] += 1

    def unpin(self, blocks: Sequence[int]) -> None:
        """The lease is quiet: nothing lands in, and nothing reads from these blocks any more."""
        for block in reversed(blocks):
            if self._pins[block] < 1:
                raise InternalError(f"block {block} was unpinned more often than pinned")
            self._pins[block] -= 1
            self._num_leased -= self._pins[block] == 0
            self._settle(block)

    def check(self) -> None:
        """Every count, list and hash agrees with every other, or InternalError. O(blocks)."""
        free = set(self._free)
        children: Counter[bytes] = Counter()
        for block in range(self.num_blocks):
            held = bool(self._refs[block] or self._pins[block])
            cached = not held and self._hash[block] is not None
            self._require((block in free) == (not held and not cached), "free list", block)
            self._require((block in self._evictable) == cached, "evictable list", block)
            digest, parent = self._hash[block], self._parent[block]
            self._require((digest is None) == (parent is None), "parent", block)
            self._require(digest is None or self._by_hash.get(digest) == block, "hash index", block)
            if cached and parent is not None:
                children[parent] += 1
        self._require(len(free) == len(self._free), "free list's length", len(self._free))
        self._require(
            len(self._by_hash) == sum(h is not None for h in self._hash), "hash index's length", -1
        )
        self._require(children == +self._evictable_children, "children counts", -1)
        self._require(self._num_leased == sum(p > 0 for p in self._pins), "leased count", -1)
        self._require(sum(self.counts()) == self.num_blocks, "sum of states", -1)

    def _require(self, condition: bool, what: str, block: int) -> None:
        if not condition:
            raise InternalError(f"block pool: {what} is wrong at block {block}; {self.counts()}")

    def _settle(self, block: int) -> None:
        """Puts a block that nobody holds any more where it belongs."""
        if self._refs[block] or self._pins[block]:
            return
        if self._hash[block] is None:
            self._free.append(block)
            return
        self._evictable[block] = None
        parent = self._parent[block]
        assert parent is not None
        self._evictable_children[parent] += 1

    def _leave_evictable(self, block: int) -> None:
        if block in self._evictable:
            del self._evictable[block]
            parent = self._parent[block]
            assert parent is not None
            self._evictable_children[parent] -= 1
            if not self._evictable_children[parent]:
                del self._evictable_children[parent]

    def _evict_one(self) -> None:
        """The oldest evictable block that no evictable block continues: a chain is eaten from its end.

        Blocks are released leaf first, so the very first candidate nearly always is one.
        """
        for block in self._evictable:
            digest = self._hash[block]
            assert digest is not None
            if not self._evictable_children[digest]:
                break
        else:
            raise InternalError("the evictable blocks form a cycle")
        self._leave_evictable(block)
        del self._by_hash[digest]
        self._hash[block] = self._parent[block] = None
        self._free.append(block)
