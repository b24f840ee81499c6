# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""What allocated memory is made of: huge pages where the pool has some, and it says so."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from transfer_peers import SECRET, TIMEOUT_S, PeerProcess, wait_for

from kvxfer.testing.faults import Way
from kvxfer.transfer import Region, TransferEngine

POOL = Path("/proc/sys/vm/nr_hugepages")


def _meminfo(key: str) -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1])
    return 0


class HugePages:
    """The machine's pool of huge pages, filled for as long as a test runs."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes  # of one page
        self._before = int(POOL.read_text())
        self._refill()

    def allocate(self, engine: TransferEngine, nbytes: int, name: str) -> Region:
        """Memory of huge pages; fails where the engine refuses some that are free.

        Other processes take them: the C++ tests of a run beside this one did, between filling and allocating.
        """
        for _ in range(20):
            region = engine.allocate(nbytes, name)
            if region.page_nbytes == self.nbytes:
                return region
            engine.deregister(region)
            self._refill()
        assert self._num_free() * self.nbytes < nbytes, region.backing
        pytest.skip(f"other processes take the huge pages away: {region.backing}")

    def _num_free(self) -> int:
        return _meminfo("HugePages_Free") - _meminfo("HugePages_Rsvd")

    def _refill(self) -> None:
        missing = 16 - self._num_free()
        if missing <= 0:
            return
        wanted = int(POOL.read_text()) + missing
        try:
            POOL.write_text(str(wanted))
        except OSError as error:
            pytest.skip(f"vm.nr_hugepages cannot be raised: {error}")
        if int(POOL.read_text()) < wanted:
            self.give_back()
            pytest.skip("the kernel found no contiguous memory for 16 huge pages")

    def give_back(self) -> None:
        if int(POOL.read_text()) != self._before:
            POOL.write_text(str(self._before))


@pytest.fixture
def huge_pages() -> Iterator[HugePages]:
    """Suites that run beside each other take turns: each leaves the pool as it was."""
    size = _meminfo("Hugepagesize") * 1024
    if size == 0:
        pytest.skip("this kernel has no huge pages")
    with POOL.open() as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        pages = HugePages(size)
        yield pages
        pages.give_back()


@pytest.fixture
def local_engine() -> Iterator[TransferEngine]:
    with TransferEngine("memory", transports=("tcp",), secret=SECRET) as engine:
        yield engine


def test_memory_says_how_fast_it_was_filled(local_engine: TransferEngine) -> None:
    region = local_engine.allocate(64 << 20)
    assert region.fill_gb_per_s > 0
    assert f"{region.page_nbytes // 1024} KiB pages, filled at" in region.backing
    assert local_engine.register(np.zeros(10, np.uint8)).page_nbytes == 0


def test_small_memory_says_why_it_has_no_huge_pages(local_engine: TransferEngine) -> None:
    region = local_engine.allocate(10_000)
    assert region.page_nbytes == mmap.PAGESIZE
    assert "no huge pages: " in region.backing


def test_an_empty_pool_is_a_reason(local_engine: TransferEngine) -> None:
    size = _meminfo("Hugepagesize") * 1024
    if size == 0:
        pytest.skip("this kernel has no huge pages")
    free = _meminfo("HugePages_Free")
    region = local_engine.allocate((free + 1) * size)
    assert region.page_nbytes == mmap.PAGESIZE
    assert "free in the pool" in region.backing


def test_huge_pages_are_used_shared_and_given_back(
    huge_pages: HugePages, way: Way, engine: TransferEngine, own_peer: PeerProcess
) -> None:
    """The names are this test's own: a region of an earlier test stays mapped for as long as anybody
    holds a view of it, and a raised exception holds what its frames held until the cycle is collected."""
    nbytes = 2 * huge_pages.nbytes + 12_345  # rounded up to three pages
    region = huge_pages.allocate(engine, nbytes, "huge-ours")
    assert region.page_nbytes == huge_pages.nbytes, region.backing
    assert "no huge pages" not in region.backing
    assert region.nbytes == nbytes

    own_peer.call("add_region", "huge-theirs", nbytes, "allocated")
    peer = engine.connect(own_peer.address)
    assert f"our region 'huge-ours': {huge_pages.nbytes // 1024} KiB pages" in engine.explain(peer)
    region.array[:] = np.random.default_rng(1).integers(0, 256, nbytes, np.uint8)
    engine.write(region, peer.regions["huge-theirs"], 0, 0, nbytes).wait(TIMEOUT_S)
    assert own_peer.call("bytes_of", "huge-theirs") == region.array.tobytes()
    copy = region.array.copy()
    region.array[:] = 0
    engine.read(region, peer.regions["huge-theirs"], 0, 0, nbytes).wait(TIMEOUT_S)
    np.testing.assert_array_equal(region.array, copy)

    mapped = Path("/proc/self/maps").read_text()
    assert "kvxfer:huge-ours" in mapped
    assert ("kvxfer:huge-theirs" in mapped) == (way.below == "shm")
    own_peer.call("drop_region", "huge-theirs")
    engine.deregister(region)
    del region
    own_peer.kill()  # what we had mapped of it goes when it is lost
    wait_for(engine, lambda: any(event.kind == "lost" for event in engine.peer_events()))
    maps = Path("/proc/self/maps").read_text()  # huge pages can only be unmapped whole
    assert "kvxfer:huge-ours" not in maps
    assert "kvxfer:huge-theirs" not in maps


def test_nobody_else_can_write_or_cut_huge_pages(
    huge_pages: HugePages, local_engine: TransferEngine
) -> None:
    region = huge_pages.allocate(local_engine, huge_pages.nbytes, "sealed")
    assert region.page_nbytes == huge_pages.nbytes, region.backing
    region.array[:] = 3
    fds = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the one that listed them
            if "kvxfer:sealed" in os.readlink(f"/proc/self/fd/{name}"):
                fds.append(int(name))
    assert len(fds) == 1
    with pytest.raises(PermissionError):
        mmap.mmap(fds[0], huge_pages.nbytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    with pytest.raises(PermissionError):
        os.ftruncate(fds[0], 0)
    with mmap.mmap(fds[0], huge_pages.nbytes, mmap.MAP_SHARED, mmap.PROT_READ) as view:
        assert view[:1] == b"\x03"
