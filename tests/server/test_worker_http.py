# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""A worker's routes over a real socket and a real engine thread; only model and transfer engine are fakes."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest
from fake_engine import FakeEngine, InlineExecutor, Net
from fake_model import SHAPE, VOCAB, FakeRunner, answer, fake_sampler, request_of
from front_fakes import serving

from kvxfer.connector import Endpoint
from kvxfer.layout import KVLayout
from kvxfer.server import backend as backend_module
from kvxfer.server.admission import Identity
from kvxfer.server.backend import EngineBackend, Outlet
from kvxfer.server.engine.blocks import BlockPool
from kvxfer.server.engine.loop import EngineLoop
from kvxfer.server.engine.runner import Batch
from kvxfer.server.engine.scheduler import Scheduler
from kvxfer.server.engine.sequence import Limits
from kvxfer.server.http import create_app
from kvxfer.server.internal import add_internal_routes
from kvxfer.server.metrics import Metrics
from kvxfer.server.text import Text
from kvxfer.server.wire import (
    Beat,
    ErrorEvent,
    Finish,
    KVTransferParams,
    PeerRef,
    PrefillReply,
    Queued,
    Reserved,
    TokenEvent,
    TokenRequest,
    Tokens,
    Usage,
    WorkerState,
    decode_event,
)

SECRET = "the cluster's secret"
BLOCKS, SIZE = 16, 4


class GatedRunner(FakeRunner):
    """Each step waits until the gate is open, so that a test decides when things happen."""

    def __init__(self, cache: Any, block_size: int) -> None:
        super().__init__(cache, block_size)
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.broken = False

    def run(self, batch: Batch, on_layer: Callable[[int], None] | None = None) -> Any:
        self.entered.set()
        assert self.gate.wait(20), "the test forgot the gate"
        if self.broken:
            raise RuntimeError("the model is broken")
        return super().run(batch, on_layer)


class Served:
    def __init__(self, role: Any, max_waiting: int = 8) -> None:
        layout = KVLayout.hnd(num_blocks=BLOCKS, block_size=SIZE, **SHAPE)
        self.engine = FakeEngine(Net(), role, layout.nbytes)
        self.engine.region.array.view(np.float32)[:] = np.nan
        endpoint = Endpoint(
            self.engine,
            self.engine.region,
            layout,
            model_id="model",
            executor=InlineExecutor(),
        )
        self.runner = GatedRunner(layout.views(self.engine.region.array), SIZE)
        self.pool = BlockPool(BLOCKS, SIZE)
        limits = Limits(max_num_seqs=4, max_num_batched_tokens=32, max_model_len=100)
        scheduler = Scheduler(self.pool, limits, copy_block=self.runner.copy_block)
        self.died = threading.Event()
        self.outlet, metrics = Outlet(), Metrics()
        self.loop = EngineLoop(
            scheduler,
            self.runner,
            endpoint,
            self.engine.fileno(),
            metrics,
            deliver=self.outlet.deliver,
            on_idle=self.outlet.on_idle,
            on_death=self.died.set,
            sampler=fake_sampler,
        )
        metrics.read_from(lambda: self.loop.snapshot, dict)
        self.identity = Identity(
            role=role,
            incarnation=self.engine.incarnation,
            engine=self.engine.address,
            signature="signature",
            model="model",
            served_model_name="fake",
            max_model_len=100,
            max_num_seqs=4,
            max_waiting=max_waiting,
            max_waiting_tokens=10_000,
            vocab_size=VOCAB,
            num_blocks=BLOCKS,
            block_size=SIZE,
        )
        self.backend = EngineBackend(self.loop, self.outlet, self.identity, metrics)

        @contextlib.asynccontextmanager
        async def lifespan(app: Any) -> Any:
            self.outlet.attach()
            self.loop.start()
            yield
            await asyncio.to_thread(self.loop.close)

        app = create_app(
            self.backend, Text(None, None, vocab_size=VOCAB), ["fake"], lifespan=lifespan
        )
        add_internal_routes(app, self.backend, SECRET)
        self.app = app
        self.client: httpx.Client

    def post(self, route: str, body: object, **headers: str) -> httpx.Response:
        return self.client.post(
            f"/internal/{route}", content=msgspec.json.encode(body), headers=headers
        )

    def events(self, spec: TokenRequest) -> list[TokenEvent]:
        response = self.post("generate", spec)
        assert response.status_code == 200, response.text
        return [decode_event(line) for line in response.content.splitlines()]

    @contextlib.contextmanager
    def stream(self, spec: TokenRequest, route: str = "generate") -> Iterator[Iterator[str]]:
        body = msgspec.json.encode(spec)
        with self.client.stream("POST", f"/internal/{route}", content=body) as response:
            assert response.status_code == 200, response.read()
            yield response.iter_lines()

    def state(self) -> WorkerState:
        answer = self.client.get("/internal/state").raise_for_status()
        return msgspec.json.decode(answer.content, type=WorkerState)

    def wait_for(self, condition: Callable[[WorkerState], bool], what: str) -> WorkerState:
        end = time.monotonic() + 10
        while not condition(state := self.state()):
            assert time.monotonic() < end, f"still waiting for {what}: {state}"
        return state

    def params(self, role: Any, **changes: str) -> KVTransferParams:
        peer = {
            "engine": "fake:nobody",
            "incarnation": "0" * 32,
            "signature": "signature",
            "model": "model",
            **changes,
        }
        return KVTransferParams(role=role, peer=PeerRef(**peer))


@contextlib.contextmanager
def running(role: str, **options: Any) -> Iterator[Served]:
    served = Served(role, **options)
    with serving(served.app) as url:
        headers = {"Authorization": f"Bearer {SECRET}"}
        with httpx.Client(base_url=url, headers=headers, timeout=20, trust_env=False) as client:
            served.client = client
            try:
                yield served
            finally:
                served.runner.gate.set()
    served.engine.close()


@pytest.fixture(scope="module")
def both() -> Iterator[Served]:
    with running("both") as served:
        yield served


@pytest.fixture(autouse=True)
def _fast_beats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend_module, "BEAT_S", 0.05)


def idle(state: WorkerState) -> bool:
    return state.active == state.leased == state.running == state.waiting == 0


def test_local_request_streams_its_tokens(both: Served) -> None:
    spec = request_of(range(1, 11), 6, n=2, name="local")
    events = both.events(spec)
    assert isinstance(events[0], Queued)
    assert isinstance(events[1], Reserved)
    ids: dict[int, list[int]] = {0: [], 1: []}
    for event in events:
        if isinstance(event, Tokens):
            ids[event.i] += event.ids
    assert [ids[0], ids[1]] == answer(spec)
    assert sorted(event.i for event in events if isinstance(event, Finish)) == [0, 1]
    assert isinstance(events[-1], Usage)
    assert (events[-1].prompt_tokens, events[-1].completion_tokens) == (10, 12)
    assert both.wait_for(idle, "idle").total == BLOCKS


def test_earlier_ids_of_a_retry_are_no_prompt_tokens(both: Served) -> None:
    usage = both.events(request_of(range(1, 11), 3, position0=4, name="retry"))[-1]
    assert isinstance(usage, Usage)
    assert (usage.prompt_tokens, usage.completion_tokens) == (6, 3)


def test_worker_alone_is_an_openai_server(both: Served) -> None:
    spec = request_of(range(1, 11), 6, name="x")
    body = {
        "model": "fake",
        "prompt": list(spec.prompt),
        "max_tokens": 6,
        "temperature": 0,
        "return_token_ids": True,
    }
    response = both.client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    assert response.json()["choices"][0]["token_ids"] == answer(spec)[0]


def test_state_and_metrics_tell_who_this_is(both: Served) -> None:
    state = both.state()
    assert (state.role, state.incarnation, state.model) == (
        "both",
        both.engine.incarnation,
        "model",
    )
    assert state.free + state.cached + state.active + state.leased == state.total
    text = both.client.get("/metrics", headers={"Authorization": ""}).text
    for name in (
        "time_to_first_token_seconds_count",
        "inter_token_latency_seconds_bucket",
        "request_queue_time_seconds_sum",
        'num_requests_waiting_by_reason{reason="grant"}',
        "kv_cache_usage_perc",
        "prefix_cache_hits_total",
        "num_preemptions_total",
        'blocks{state="leased"} 0.0',
    ):
        assert f"kvxfer:{name}" in text


@pytest.mark.parametrize("token", ["", "Bearer wrong", f"Bearer {SECRET}x", SECRET])
@pytest.mark.parametrize("route", ["generate", "prefill", "abort", "state"])
def test_internal_routes_need_the_secret(both: Served, route: str, token: str) -> None:
    method = "GET" if route == "state" else "POST"
    headers = {"Authorization": token}
    response = both.client.request(method, f"/internal/{route}", headers=headers)
    assert response.status_code == 401
    assert both.client.get("/health", headers=headers).status_code == 200


@pytest.mark.parametrize(
    ("change", "status", "word"),
    [
        ({"prompt": ()}, 400, "empty"),
        ({"prompt": (1, VOCAB)}, 400, str(VOCAB)),
        ({"prompt": (1, -1)}, 400, "-1"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_tokens": 99}, 400, "context of 100"),
        ({"n": 5}, 400, "from 1 to 4"),
        ({"n": 0}, 400, "from 1 to 4"),
        ({"deadline_s": 0.0}, 400, "deadline_s"),
        ({"position0": 10}, 400, "position0"),
        ({"max_tokens": 60}, 422, "16 blocks"),
    ],
)
def test_unfit_requests_are_refused(
    both: Served, change: dict[str, Any], status: int, word: str
) -> None:
    fields = {"prompt": range(1, 11), "max_tokens": 4, "name": "unfit", **change}
    response = both.post("generate", request_of(fields.pop("prompt"), **fields))
    assert response.status_code == status
    assert word in response.json()["error"]["message"]


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b'{"v":1}', b'{"prompt":"x"}', b"\xff\xfe"])
def test_bad_bodies_are_refused(both: Served, body: bytes) -> None:
    for route in ("generate", "prefill"):
        response = both.client.post(f"/internal/{route}", content=body)
        assert response.status_code == 400, response.text
        assert response.json()["error"]["code"] == "bad_body"


def test_other_incarnation_is_gone(both: Served) -> None:
    spec = request_of([1], 1, name="i")
    response = both.post("generate", spec, **{"X-Kvxfer-Incarnation": "f" * 32})
    assert response.status_code == 410
    assert both.post(
        "generate", spec, **{"X-Kvxfer-Incarnation": both.engine.incarnation}
    ).is_success


@pytest.mark.parametrize(("name", "field"), [("model", "model"), ("layout", "signature")])
def test_peer_with_another_cache_is_refused(both: Served, name: str, field: str) -> None:
    for route, role in (("generate", "decode"), ("prefill", "prefill")):
        params = both.params(role, **{field: "other"})
        response = both.post(route, request_of([1], 1, kv_transfer_params=params))
        assert response.status_code == 422
        assert name in response.json()["error"]["message"]


def test_legs_of_another_role_are_refused() -> None:
    with running("prefill") as prefill:
        assert prefill.post("generate", request_of([1], 1)).status_code == 422
        assert prefill.client.post(
            "/v1/completions", json={"prompt": [1], "max_tokens": 1}
        ).status_code in (400, 422)
    with running("decode") as decode:
        spec = request_of([1], 1, kv_transfer_params=decode.params("prefill"))
        assert decode.post("prefill", spec).status_code == 422
        assert isinstance(decode.events(request_of([1], 1))[-1], Usage), "decode answers alone"


def test_leg_in_the_wrong_route_is_refused(both: Served) -> None:
    assert both.post("prefill", request_of([1], 1)).status_code == 400
    spec = request_of([1], 1, kv_transfer_params=both.params("prefill"))
    assert both.post("generate", spec).status_code == 400


def test_known_handoff_is_refused(both: Served) -> None:
    spec = request_of([1, 2], 2, name="known", kv_transfer_params=both.params("decode"))
    with both.stream(spec) as lines:
        next(lines)
        assert both.post("generate", spec).status_code == 409
    both.wait_for(idle, "the first leg's end")
    response = both.post("generate", spec)
    assert response.status_code == 409, "an ended id stays known for a while"
    assert spec.handoff in response.json()["error"]["message"]


def test_silent_leg_beats_and_its_close_aborts(both: Served) -> None:
    spec = request_of([1, 2], 2, name="silent", kv_transfer_params=both.params("decode"))
    with both.stream(spec) as lines:
        events = [decode_event(next(lines).encode()) for _ in range(4)]
        assert isinstance(events[0], Queued)
        assert all(isinstance(event, Beat) for event in events[1:])
        assert both.state().waiting == 1
    both.wait_for(idle, "the abort")
    assert not both.backend._legs


def test_close_while_the_model_runs_frees_the_blocks(both: Served) -> None:
    both.runner.gate.clear()
    both.runner.entered.clear()
    with both.stream(request_of(range(1, 20), 20, name="closing")):
        assert both.runner.entered.wait(10)
    both.runner.gate.set()
    state = both.wait_for(idle, "the abort")
    assert state.free + state.cached == BLOCKS


def test_abort_route_ends_the_stream(both: Served) -> None:
    spec = request_of([1, 2], 2, name="aborted", kv_transfer_params=both.params("decode"))
    with both.stream(spec) as lines:
        next(lines)
        reply = both.post("abort", {"handoff": spec.handoff, "request_id": spec.request_id})
        assert reply.json() == {"aborted": True}
        events = [decode_event(line.encode()) for line in lines]
    assert [event.reason for event in events if isinstance(event, Finish)] == ["abort"]
    assert isinstance(events[-1], Usage)
    assert both.post("abort", {"handoff": spec.handoff}).json() == {"aborted": False}
    assert both.post("abort", {}).status_code == 400


def test_prefill_for_a_peer_that_is_not_there_fails_retryably(both: Served) -> None:
    spec = request_of([1, 2], 2, name="nobody", kv_transfer_params=both.params("prefill"))
    response = both.post("prefill", spec)
    reply = msgspec.json.decode(response.content, type=PrefillReply)
    assert (reply.status, reply.code, reply.retryable) == ("failed", "peer_lost", True)
    assert "fake:nobody" in reply.message


def test_full_queue_is_refused_with_retry_after() -> None:
    with running("both", max_waiting=2) as served:
        served.runner.gate.clear()
        with contextlib.ExitStack() as stack:
            stack.enter_context(served.stream(request_of([1], 3, name="computed")))
            assert served.runner.entered.wait(10)
            for index in range(2):
                stack.enter_context(served.stream(request_of([1, index + 1], 3, name=str(index))))
            response = served.post("generate", request_of([9], 1, name="late"))
            assert response.status_code == 503
            assert int(response.headers["retry-after"]) >= 1
        served.runner.gate.set()
        served.wait_for(idle, "idle")


def test_drain_refuses_new_work_and_lets_running_work_finish() -> None:
    with running("both") as served:
        served.runner.gate.clear()
        spec = request_of(range(1, 8), 6, name="runs")
        with served.stream(spec) as lines:
            served.backend.draining = True
            assert served.state().draining
            assert served.client.get("/readiness").status_code == 503
            refused = served.post("generate", request_of([1], 1, name="new"))
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "draining"
            served.runner.gate.set()
            events = [decode_event(line.encode()) for line in lines]
        ids = [event.ids[0] for event in events if isinstance(event, Tokens)]
        assert ids == answer(spec)[0]


def test_broken_model_ends_every_leg_and_the_worker() -> None:
    with running("both") as served:
        served.runner.broken = True
        last = served.events(request_of([1, 2, 3], 4, name="broken"))[-1]
        assert isinstance(last, ErrorEvent)
        assert (last.code, last.retryable) == ("internal", True)
        assert served.died.wait(10)
        served.loop._thread.join(10)
        assert served.client.get("/readiness").status_code == 503
        assert served.post("generate", request_of([1], 1, name="after")).status_code == 503
