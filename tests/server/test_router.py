# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Two legs make one answer, and faults of every kind leave the client with one answer or one clear error."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from fake_workers import SECRET, FakeWorker, in_loop, running, until
from front_fakes import BYTE_LEVEL, LETTERS, answer_ids, serving
from prometheus_client.parser import text_string_to_metric_families

from kvxfer.server.aggregate import sum_of
from kvxfer.server.pool import Pool, round_robin
from kvxfer.server.router import PoolBackend, build_app, make_client
from kvxfer.server.text import Text
from kvxfer.server.wire import (
    ErrorEvent,
    Finish,
    PrefillReply,
    RequestRefusedError,
    SamplingParams,
    TokenEvent,
    TokenRequest,
    Tokens,
    Usage,
)

PROMPT = (5, 6, 7)


def ask(
    *, n: int = 1, max_tokens: int = 6, deadline_s: float = 20.0, **sampling: Any
) -> TokenRequest:
    params = SamplingParams(max_tokens=max_tokens, n=n, seed=9, **sampling)
    return TokenRequest(
        request_id="cmpl-1", handoff="0" * 32, deadline_s=deadline_s, prompt=PROMPT, sampling=params
    )


@asynccontextmanager
async def backend_of(*workers: FakeWorker, **options: Any) -> AsyncIterator[PoolBackend]:
    async with running(*workers):
        client = make_client(SECRET)
        lost_after_s = options.pop("lost_after_s", 10.0)
        timing = {"poll_interval_s": 0.05, "poll_timeout_s": 0.2, "lost_after_s": lost_after_s}
        pool = Pool(client, round_robin, **timing)
        for worker in workers:
            await pool.add(worker.url)
        # Short where a test waits for it; elsewhere a busy machine must not look like a lost worker.
        options = {"retry_wait_s": 0.3, "beat_timeout_s": 5.0, **options}
        backend = PoolBackend(pool, client, max_model_len=64, **options)
        try:
            yield backend
        finally:
            await backend.close()


async def collect(backend: PoolBackend, request: TokenRequest) -> list[TokenEvent]:
    return [event async for event in backend.generate(request)]


def ids_of(events: list[TokenEvent], choice: int = 0) -> list[int]:
    tokens = [e for e in events if isinstance(e, Tokens) and e.i == choice]
    ids: list[int] = []
    for event in tokens:
        assert event.pos == len(ids), "positions must go on where they stopped"
        ids += event.ids
    return ids


def is_whole(events: list[TokenEvent], request: TokenRequest) -> None:
    """One complete answer, as an undisturbed worker gives it."""
    for i in range(request.sampling.n):
        assert ids_of(events, i) == answer_ids(request, i)
    assert sorted(e.i for e in events if isinstance(e, Finish)) == list(range(request.sampling.n))
    usage = events[-1]
    assert isinstance(usage, Usage)
    assert usage.prompt_tokens == len(PROMPT)
    assert usage.completion_tokens == request.sampling.n * request.sampling.max_tokens


def retries(backend: PoolBackend) -> float:
    for family in text_string_to_metric_families(backend.metrics().decode()):
        for sample in family.samples:
            if sample.name == "kvxfer:retries_total":
                return float(sample.value)
    raise AssertionError("retries_total is missing")


def test_both_legs_name_one_another_and_decode_answers() -> None:
    async def main() -> None:
        p, d = FakeWorker("prefill"), FakeWorker("decode")
        async with backend_of(p, d) as backend:
            request = ask()
            is_whole(await collect(backend, request), request)
            # The fake decode worker needs nobody: its answer may be there before prefill's leg is.
            await until(lambda: bool(p.requests), "prefill's leg")
            (to_d,), (to_p,) = d.requests, p.requests
            assert to_d.handoff == to_p.handoff
            assert to_d.kv_transfer_params is not None
            assert to_p.kv_transfer_params is not None
            assert (to_d.kv_transfer_params.role, to_p.kv_transfer_params.role) == (
                "decode",
                "prefill",
            )
            assert to_d.kv_transfer_params.peer.engine == p.state().engine
            assert to_d.kv_transfer_params.peer.incarnation == p.incarnation
            assert to_p.kv_transfer_params.peer.engine == d.state().engine
            assert not d.aborted
            assert not p.aborted
            assert retries(backend) == 0

    in_loop(main)


@pytest.mark.parametrize("role", ["both", "decode"])
def test_one_worker_answers_alone(role: str) -> None:
    async def main() -> None:
        worker = FakeWorker(role)
        async with backend_of(worker) as backend:
            request = ask(n=2)
            is_whole(await collect(backend, request), request)
            assert worker.requests[0].kv_transfer_params is None

    in_loop(main)


@pytest.mark.parametrize("fault", ["die", "error"])
@pytest.mark.parametrize("after", [0, 2, 5])
@pytest.mark.parametrize("n", [1, 3])
def test_decode_that_fails_is_replaced_and_the_answer_goes_on(
    fault: str, after: int, n: int
) -> None:
    async def main() -> None:
        p, bad, good = (
            FakeWorker("prefill"),
            FakeWorker("decode", fault, after=after),
            FakeWorker("decode"),
        )
        async with backend_of(p, bad, good) as backend:
            request = ask(n=n)
            is_whole(await collect(backend, request), request)
            (first,), (second,) = bad.requests, good.requests
            assert second.handoff != first.handoff
            assert second.attempt == 2
            assert second.sampling.seed == first.sampling.seed
            assert second.deadline_s < first.deadline_s
            if n == 1:
                assert second.position0 == after
                assert second.prompt == PROMPT + tuple(answer_ids(request, 0)[:after])
                assert second.sampling.max_tokens == 6 - after
            else:  # choices share one prompt on the wire: the answer is replayed
                assert (second.position0, second.prompt) == (0, PROMPT)
            assert retries(backend) == 1
            await until(lambda: bool(bad.aborted), "the failed worker to be told")
            assert bad.aborted[0]["handoff"] == first.handoff

    in_loop(main)


def test_killed_decode_worker_is_replaced() -> None:
    async def main() -> None:
        bad, good = FakeWorker("decode"), FakeWorker("decode")
        bad.gate = asyncio.Event()
        async with backend_of(bad, good) as backend:
            request = ask()
            events = []
            async for event in backend.generate(request):
                events.append(event)
                if len(ids_of(events)) == 2 and bad.gate is not None:
                    bad.gate = None
                    await bad.kill()
            is_whole(events, request)

    in_loop(main)


def test_the_only_decode_worker_may_come_back_in_time() -> None:
    async def main() -> None:
        worker = FakeWorker("decode", "die")
        async with backend_of(worker) as backend:
            request = ask()
            is_whole(await collect(backend, request), request)
            assert len(worker.requests) == 2

    in_loop(main)


def test_no_worker_left_is_an_error_event_in_bounded_time() -> None:
    async def main() -> None:
        worker = FakeWorker("decode")
        worker.gate = asyncio.Event()
        async with backend_of(worker) as backend:
            events = []
            async for event in backend.generate(ask()):
                events.append(event)
                if len(ids_of(events)) == 2:
                    await worker.kill()
            assert isinstance(events[-1], ErrorEvent)
            assert worker.id in events[-1].message
            assert not events[-1].retryable

    in_loop(main)


@pytest.mark.parametrize("fault", ["silent", "hang"])
def test_stopped_decode_worker_is_replaced(fault: str) -> None:
    """Its sockets stay open. Before the first token three beats are missed, later the poll tells."""

    async def main() -> None:
        bad, good = FakeWorker("decode", fault), FakeWorker("decode")
        async with backend_of(bad, good, beat_timeout_s=0.4, lost_after_s=0.4) as backend:
            if fault == "hang":
                bad.state_gate.clear()
            request = ask()
            is_whole(await collect(backend, request), request)
            await asyncio.wait_for(bad.closed.wait(), 5)

    in_loop(main)


def test_second_failure_is_an_error_event() -> None:
    async def main() -> None:
        workers = [FakeWorker("decode", "error") for _ in range(3)]
        async with backend_of(*workers) as backend:
            events = await collect(backend, ask())
            assert isinstance(events[-1], ErrorEvent)
            assert "broken" in events[-1].message
            assert sum(len(w.requests) for w in workers) == 2
            assert len(ids_of(events)) == 4

    in_loop(main)


def test_error_that_is_not_retryable_is_final() -> None:
    async def main() -> None:
        bad, good = FakeWorker("decode", "error"), FakeWorker("decode")
        bad.error = ErrorEvent(code="deadline", message="late", retryable=False)
        async with backend_of(bad, good) as backend:
            events = await collect(backend, ask())
            assert isinstance(events[-1], ErrorEvent)
            assert events[-1].code == "deadline"
            assert not good.requests

    in_loop(main)


@pytest.mark.parametrize("fault", ["die", "fail", "refuse"])
def test_prefill_that_fails_before_the_first_token_is_replaced(fault: str) -> None:
    async def main() -> None:
        bad, good = FakeWorker("prefill", fault), FakeWorker("prefill")
        waits, decode = FakeWorker("decode", "hang", after=0), FakeWorker("decode")
        async with backend_of(bad, waits, good, decode) as backend:
            request = ask()
            is_whole(await collect(backend, request), request)
            assert len(bad.requests) == 1
            await until(lambda: len(good.requests) == 1, "the other prefill worker's leg")
            await asyncio.wait_for(waits.abort_came.wait(), 5)
            assert all(view.in_flight == 0 for view in backend.pool.views)

    in_loop(main)


def test_without_another_prefill_worker_decode_goes_on_alone() -> None:
    async def main() -> None:
        p, d = FakeWorker("prefill", "die"), FakeWorker("decode", "hang", after=0)
        async with backend_of(p, d) as backend:
            request = ask()
            is_whole(await collect(backend, request), request)
            assert d.requests[1].kv_transfer_params is None

    in_loop(main)


def test_prefill_that_fails_after_the_first_token_does_not_matter() -> None:
    async def main() -> None:
        p, d = FakeWorker("prefill", "hang"), FakeWorker("decode", after=1)
        d.gate = asyncio.Event()
        async with backend_of(p, d) as backend:
            request = ask()
            events = []
            async for event in backend.generate(request):
                events.append(event)
                if len(ids_of(events)) == 1 and not d.gate.is_set():
                    await p.kill()
                    d.gate.set()
            is_whole(events, request)
            assert retries(backend) == 0

    in_loop(main)


def test_declined_handoff_is_no_failure() -> None:
    async def main() -> None:
        p, d = FakeWorker("prefill"), FakeWorker("decode")
        p.reply = PrefillReply(status="declined")
        async with backend_of(p, d) as backend:
            request = ask()
            is_whole(await collect(backend, request), request)
            assert retries(backend) == 0

    in_loop(main)


def test_full_worker_is_passed_over_and_full_pool_says_when_to_come_back() -> None:
    async def main() -> None:
        full, free = FakeWorker("both", "refuse"), FakeWorker("both")
        async with backend_of(full, free) as backend:
            request = ask()
            is_whole(await collect(backend, request), request)
        async with backend_of(FakeWorker("both", "refuse", "refuse")) as backend:
            with pytest.raises(RequestRefusedError) as caught:
                await collect(backend, ask())
            assert (caught.value.status, caught.value.retry_after_s) == (503, 7.0)
            assert retries(backend) == 0, "a full worker is not asked twice"

    in_loop(main)


def test_refusal_of_the_request_itself_is_passed_on_and_not_retried() -> None:
    async def main() -> None:
        worker, other = FakeWorker("both", "refuse"), FakeWorker("both")
        worker.refusal = (400, {"error": {"message": "too long", "code": "x", "param": "prompt"}})
        async with backend_of(worker, other) as backend:
            with pytest.raises(RequestRefusedError) as caught:
                await collect(backend, ask())
            assert (caught.value.status, caught.value.message) == (400, "too long")
            assert not other.requests

    in_loop(main)


def test_no_worker_is_a_503_that_names_what_is_missing() -> None:
    async def main() -> None:
        async with backend_of(FakeWorker("prefill")) as backend:
            assert not backend.ready()[0]
            with pytest.raises(RequestRefusedError, match="no usable decode worker") as caught:
                await collect(backend, ask())
            assert caught.value.status == 503
            assert caught.value.retry_after_s

    in_loop(main)


def test_deadline_ends_an_answer() -> None:
    async def main() -> None:
        worker = FakeWorker("both", "hang")
        async with backend_of(worker) as backend:
            events = await collect(backend, ask(deadline_s=0.3))
            assert isinstance(events[-1], ErrorEvent)
            assert events[-1].code == "deadline"
            await asyncio.wait_for(worker.closed.wait(), 5)

    in_loop(main)


@pytest.mark.parametrize("begun", [False, True])
def test_client_that_leaves_closes_and_aborts_both_legs(begun: bool) -> None:
    async def main() -> None:
        p, d = FakeWorker("prefill", "hang"), FakeWorker("decode", "hang", after=2 if begun else 0)
        async with backend_of(p, d) as backend:
            async with contextlib.aclosing(backend.generate(ask())) as events:
                async for event in events:
                    if isinstance(event, Tokens) or not begun:
                        break
                for worker in (p, d):
                    await worker.hanging.wait()
            for worker in (p, d):
                await asyncio.wait_for(worker.closed.wait(), 5)
                await asyncio.wait_for(worker.abort_came.wait(), 5)
                assert worker.aborted[0]["handoff"] == worker.requests[0].handoff
            assert [view.in_flight for view in backend.pool.views] == [0, 0]

    in_loop(main)


@pytest.mark.parametrize(
    ("sampling", "after", "reason"),
    [({}, 6, "length"), ({"stop_token_ids": (answer_ids(ask(), 0)[1],)}, 2, "stop")],
)
def test_lost_finish_is_made_up_when_the_last_id_was_sent(
    sampling: dict[str, Any], after: int, reason: str
) -> None:
    """Nothing may follow a stop token or the last of max_tokens, whatever a retry would compute."""

    async def main() -> None:
        request = ask(max_tokens=6, **sampling)
        bad, good = FakeWorker("both", "die", after=after), FakeWorker("both")
        original = bad._tokens

        async def one_more(leg: TokenRequest, what: str) -> AsyncIterator[bytes]:
            async for line in original(leg, ""):
                if b'"finish"' in line:  # all tokens went out, then the worker dies
                    raise ConnectionResetError
                yield line

        if after == 6:
            bad.faults = []
            bad._tokens = one_more  # type: ignore[method-assign]
        async with backend_of(bad, good) as backend:
            events = await collect(backend, request)
            assert ids_of(events) == answer_ids(request, 0)[:after]
            (finish,) = [e for e in events if isinstance(e, Finish)]
            assert finish.reason == reason
            assert isinstance(events[-1], Usage)
            assert not good.requests

    in_loop(main)


def test_replay_that_differs_is_an_error_not_a_seam() -> None:
    async def main() -> None:
        bad, good = FakeWorker("both", "die"), FakeWorker("both")
        original = good._tokens

        async def shifted(leg: TokenRequest, what: str) -> AsyncIterator[bytes]:
            async for line in original(leg, what):
                yield line.replace(
                    b'"ids":[%d]' % answer_ids(leg, 0)[1], b'"ids":[%d]' % LETTERS[0]
                )

        good._tokens = shifted  # type: ignore[method-assign]
        async with backend_of(bad, good) as backend:
            events = await collect(backend, ask(n=2))
            assert isinstance(events[-1], ErrorEvent)
            assert events[-1].code == "replay_differs"

    in_loop(main)


def test_draining_router_refuses_new_work() -> None:
    async def main() -> None:
        async with backend_of(FakeWorker("both")) as backend:
            backend.pool.draining = True
            assert not backend.ready()[0]
            with pytest.raises(RequestRefusedError, match="draining"):
                await collect(backend, ask())

    in_loop(main)


def test_metrics_are_summed_and_the_routers_own_come_first() -> None:
    async def main() -> None:
        a, b = FakeWorker("both"), FakeWorker("both")
        b.metrics = a.metrics + (
            "# TYPE kvxfer:time_to_first_token_seconds histogram\n"
            "kvxfer:time_to_first_token_seconds_count 99\npython_info 1\n"
        )
        async with backend_of(a, b) as backend:
            await collect(backend, ask())
            text = (await backend.metrics_of.render_all()).decode()
            samples = {
                (sample.name, *sorted(sample.labels.values())): sample.value
                for family in text_string_to_metric_families(text)
                for sample in family.samples
            }
            assert samples["kvxfer:kv_transfer_bytes_total", "sent", "shm"] == 10
            assert samples["kvxfer:time_to_first_token_seconds_count",] == 1
            assert samples["kvxfer:inter_token_latency_seconds_count",] == 5
            assert samples["kvxfer:e2e_request_latency_seconds_count",] == 1
            assert samples["kvxfer:worker_up", a.id, "both"] == 1
            assert "python_info" not in text

    in_loop(main)


def test_fractions_are_averaged() -> None:
    gauge = "# TYPE kvxfer:kv_cache_usage_perc gauge\nkvxfer:kv_cache_usage_perc {}\n"
    (family,) = sum_of([gauge.format(0.5), gauge.format(1.0)])
    assert family.samples[0].value == 0.75


def test_members_change_over_http_behind_the_secret() -> None:
    async def main() -> None:
        worker = FakeWorker("both")
        async with running(worker):
            client = make_client(SECRET)
            backend = PoolBackend(Pool(client, round_robin), client, max_model_len=64)
            app = build_app(
                backend, Text(BYTE_LEVEL, None, vocab_size=330), ["tiny"], secret=SECRET
            )
            with serving(app) as url:
                await asyncio.to_thread(change_members, url, worker)

    in_loop(main)


def change_members(url: str, worker: FakeWorker) -> None:
    with httpx.Client(base_url=url, timeout=10) as client:
        body = {"prompt": list(PROMPT), "max_tokens": 3}
        assert client.get("/readiness").status_code == 503
        assert client.post("/v1/completions", json=body).status_code == 503
        assert client.post("/workers", json={"url": worker.url}).status_code == 401
        assert client.get("/workers", headers={"Authorization": "Bearer x"}).status_code == 401
        client.headers["Authorization"] = f"Bearer {SECRET}"
        assert client.post("/workers", json={"url": "nonsense"}).json()["error"]["param"] == "url"
        assert client.post("/workers", content=b"{").status_code == 400
        added = client.post("/workers", json={"url": worker.url}).json()
        assert (added["id"], added["role"], added["up"]) == (worker.id, "both", True)
        assert client.get("/readiness").status_code == 200
        answer = client.post("/v1/completions", json=body).json()
        assert len(answer["choices"][0]["text"]) == 3
        assert "kvxfer:worker_up" in client.get("/metrics").text
        assert [w["id"] for w in client.get("/workers").json()] == [worker.id]
        assert client.delete(f"/workers/{worker.id}").json()["condition"] == "leaving"
        assert client.delete(f"/workers/{worker.id}").status_code == 404
        assert client.post("/v1/completions", json=body).status_code == 503
