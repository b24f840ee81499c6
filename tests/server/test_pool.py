# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Whom the router picks, and when it holds a worker for lost."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from fake_workers import SECRET, FakeWorker, in_loop, running, until

from kvxfer.errors import InvalidArgumentError
from kvxfer.server.pool import Pool, WorkerView, least_loaded, round_robin
from kvxfer.server.router import make_client
from kvxfer.server.wire import WorkerState


def view(
    name: str, *, load: int = 0, active: int = 0, in_flight: int = 0, **fields: Any
) -> WorkerView:
    values: dict[str, Any] = {
        "role": "decode",
        "incarnation": name,
        "engine": "",
        "signature": "",
        "model": "m",
        "served_model_name": "m",
        "max_model_len": 64,
        "free": 10 - active,
        "cached": 0,
        "active": active,
        "leased": 0,
        "total": 10,
        "running": load,
        "waiting": 0,
    }
    state = WorkerState(**{**values, **fields})
    return WorkerView(f"http://{name}:1", state=state, up=True, in_flight=in_flight)


def test_round_robin_takes_turns() -> None:
    views = [view("a"), view("b"), view("c")]
    assert [round_robin(views, turn) for turn in range(5)] == [*views, *views[:2]]


def test_least_loaded_looks_at_requests_then_blocks_then_turns() -> None:
    busy, full, free = view("a", load=2), view("b", load=1, active=9), view("c", load=1, active=1)
    assert least_loaded([busy, full, free], 0) is free
    equals = [view("a"), view("b"), view("c")]
    assert [least_loaded(equals, turn) for turn in range(4)] == [*equals, equals[0]]


def test_least_loaded_counts_legs_that_no_poll_has_seen_yet() -> None:
    assert least_loaded([view("a", in_flight=3), view("b", load=1)], 0).id == "b:1"


@asynccontextmanager
async def pool_of(*workers: FakeWorker, **options: Any) -> AsyncIterator[Pool]:
    timing = {"poll_interval_s": 0.02, "poll_timeout_s": 0.2, "lost_after_s": 0.4, **options}
    async with running(*workers), make_client(SECRET) as client:
        pool = Pool(client, round_robin, **timing)
        for worker in workers:
            await pool.add(worker.url)
        try:
            yield pool
        finally:
            await pool.close()


def test_pairs_single_legs_and_nobody() -> None:
    async def main() -> None:
        p, d, both = FakeWorker("prefill"), FakeWorker("decode"), FakeWorker("both")
        async with pool_of(p, d) as pool:
            pair = pool.pick()
            assert pair is not None
            assert pair.prefill is not None
            assert (pair.decode.role, pair.prefill.role) == ("decode", "prefill")
            assert pool.max_model_len == 64
            avoiding = pool.pick({p.id})
            assert avoiding is not None
            assert avoiding.prefill is None, "a prefill worker that just failed is no help"
            same = pool.pick({d.id})
            assert same is not None
            assert same.decode.id == d.id, "the only decode worker is taken again"
        async with pool_of(both) as pool:
            pair = pool.pick()
            assert pair is not None
            assert (pair.decode.role, pair.prefill) == ("both", None)
        async with pool_of(FakeWorker("prefill")) as pool:
            assert pool.pick() is None
            assert "prefill" in pool.why_none()

    in_loop(main)


def test_prefill_of_another_model_is_not_paired() -> None:
    async def main() -> None:
        async with pool_of(FakeWorker("decode"), FakeWorker("prefill")) as pool:
            (stranger,) = [v for v in pool.views if v.role == "prefill"]
            await pool.close()
            stranger.state = view("x", role="prefill", model="other").state
            pair = pool.pick()
            assert pair is not None
            assert pair.prefill is None

    in_loop(main)


def test_killed_worker_is_lost_at_once_and_comes_back() -> None:
    async def main() -> None:
        worker = FakeWorker("both")
        async with pool_of(worker, lost_after_s=60.0) as pool:
            (seen,) = pool.views
            told = asyncio.Queue[str]()
            pool.opened(seen, told.put_nowait)
            await worker.kill()
            assert await asyncio.wait_for(told.get(), 5)
            assert pool.pick() is None
            waiting = asyncio.create_task(pool.pick_within((), 10))
            await worker.start(int(seen.id.rpartition(":")[2]))
            pair = await waiting
            assert pair is not None
            assert pair.decode is seen

    in_loop(main)


def test_stopped_worker_is_lost_after_its_silence_only() -> None:
    """A stopped process keeps its sockets open: only time tells."""

    async def main() -> None:
        worker = FakeWorker("both")
        async with pool_of(worker) as pool:
            (seen,) = pool.views
            told = asyncio.Queue[str]()
            pool.opened(seen, told.put_nowait)
            heard = seen.last_heard
            worker.state_gate.clear()
            why = await asyncio.wait_for(told.get(), 5)
            assert "0.4 s" in why
            assert time.monotonic() - heard >= 0.4
            assert not seen.up
            worker.state_gate.set()
            await until(lambda: seen.usable, "the worker to be seen again")

    in_loop(main)


def test_new_incarnation_ends_the_old_ones_legs() -> None:
    async def main() -> None:
        worker = FakeWorker("both")
        async with pool_of(worker) as pool:
            (seen,) = pool.views
            told = asyncio.Queue[str]()
            pool.opened(seen, told.put_nowait)
            worker.incarnation = "0" * 32
            assert "restarted" in await asyncio.wait_for(told.get(), 5)
            await until(lambda: seen.usable, "the new incarnation")

    in_loop(main)


def test_draining_worker_gets_no_new_legs() -> None:
    async def main() -> None:
        worker = FakeWorker("both")
        async with pool_of(worker) as pool:
            worker.draining = True
            await until(lambda: pool.pick() is None, "the drain to be seen")
            assert "draining" in pool.why_none()

    in_loop(main)


def test_removed_worker_leaves_with_its_last_leg() -> None:
    async def main() -> None:
        worker = FakeWorker("both")
        async with pool_of(worker) as pool:
            (seen,) = pool.views

            def ignore(why: str) -> None: ...

            pool.opened(seen, ignore)
            assert pool.remove(seen.id) is seen
            assert pool.pick() is None
            assert pool.views == [seen]
            pool.closed(seen, ignore)
            assert pool.views == []
            assert pool.remove(seen.id) is None
            again = await pool.add(worker.url)
            assert again.usable

    in_loop(main)


def test_absent_worker_is_added_and_found_later() -> None:
    async def main() -> None:
        worker = FakeWorker("both")
        async with pool_of(worker) as pool:
            await worker.kill()
            pool.remove(worker.id)
            seen = await pool.add(worker.url)
            assert not seen.up
            await worker.start(int(worker.id.rpartition(":")[2]))
            assert await pool.pick_within((), 5) is not None

    in_loop(main)


@pytest.mark.parametrize("url", ["", "127.0.0.1:80", "ftp://x", "http://"])
def test_bad_worker_url_is_refused(url: str) -> None:
    async def main() -> None:
        async with pool_of() as pool:
            with pytest.raises(InvalidArgumentError, match="http://host:port"):
                await pool.add(url)

    in_loop(main)
