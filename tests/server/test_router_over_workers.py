# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""The real router over real workers' routes and engine threads; only model and transfer engine are fakes."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from fake_model import answer, request_of
from fake_workers import in_loop, until
from test_worker_http import SECRET, Served, running

from kvxfer.server.engine.runner import Batch
from kvxfer.server.pool import Pool, round_robin
from kvxfer.server.router import PoolBackend, make_client
from kvxfer.server.wire import Finish, RequestRefusedError, TokenEvent, Tokens, Usage


@pytest.fixture
def workers() -> Iterator[tuple[Served, Served]]:
    with running("both") as first, running("both") as second:
        yield first, second


@contextlib.asynccontextmanager
async def router_over(*workers: Served) -> AsyncIterator[PoolBackend]:
    client = make_client(SECRET)
    pool = Pool(client, round_robin, poll_interval_s=0.05)
    for worker in workers:
        await pool.add(str(worker.client.base_url))
    backend = PoolBackend(pool, client, max_model_len=100, retry_wait_s=0.3)
    try:
        yield backend
    finally:
        await backend.close()


def ids_of(events: list[TokenEvent], n: int) -> list[list[int]]:
    ids: list[list[int]] = [[] for _ in range(n)]
    for event in events:
        if isinstance(event, Tokens):
            ids[event.i] += event.ids
    return ids


@pytest.mark.parametrize("n", [1, 2])
def test_a_broken_engine_in_mid_answer_is_not_seen(workers: tuple[Served, Served], n: int) -> None:
    """The fake model's tokens hang on every KV entry before them: the second worker must have all of it."""
    first, second = workers
    spec = request_of(range(1, 30), 12, n=n)
    step, steps = first.runner.run, itertools.count()

    def breaks_after_some(batch: Batch, on_layer: Any = None) -> Any:
        first.runner.broken = next(steps) >= 5
        return step(batch, on_layer)

    first.runner.run = breaks_after_some  # type: ignore[method-assign]

    async def main() -> None:
        async with router_over(first, second) as backend:
            events = [event async for event in backend.generate(spec)]
            assert ids_of(events, n) == answer(spec)
            assert sorted(e.i for e in events if isinstance(e, Finish)) == list(range(n))
            assert isinstance(events[-1], Usage)
            assert first.died.is_set()
            assert [view.up for view in backend.pool.views] == [True, True]
            assert "retries_total 1.0" in backend.metrics().decode()

    in_loop(main)


def test_a_client_that_leaves_frees_the_workers_blocks(workers: tuple[Served, Served]) -> None:
    first, _ = workers

    async def main() -> None:
        async with router_over(first) as backend:
            async with contextlib.aclosing(
                backend.generate(request_of(range(1, 20), 40))
            ) as events:
                async for event in events:
                    if isinstance(event, Tokens):
                        first.runner.gate.clear()  # so that the answer cannot end by itself
                        break
            first.runner.gate.set()
            (view,) = backend.pool.views

            def idle() -> bool:
                state = view.state
                return state is not None and state.active == state.leased == state.running == 0

            await until(idle, "the worker to be idle")

    in_loop(main)


def test_a_workers_refusal_reaches_the_client(workers: tuple[Served, Served]) -> None:
    async def main() -> None:
        async with router_over(*workers) as backend:
            with pytest.raises(RequestRefusedError) as caught:
                async for _ in backend.generate(request_of(range(1, 90), 50)):
                    pass
            assert caught.value.status == 400

    in_loop(main)
