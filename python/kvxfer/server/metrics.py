# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""A worker's Prometheus metrics, with vLLM's names behind our prefix.

Events count as they happen, on the engine thread; states are read from a snapshot when somebody asks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kvxfer.server.engine.blocks import BlockCounts
from kvxfer.server.engine.sequence import Request

__all__ = ["CONTENT_TYPE", "Metrics", "Snapshot"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# vLLM's buckets, so that dashboards made for it read ours.
_FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)  # fmt: skip
_BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5)  # fmt: skip
_WHOLE = (0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480)
_TRANSFER = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10)  # fmt: skip


class Snapshot(NamedTuple):
    """What the engine thread last said about itself; replaced whole, so any thread may read it."""

    blocks: BlockCounts
    num_closing_blocks: int = 0
    num_running: int = 0
    waiting: Mapping[str, int] = {}  # by reason: queue, blocks, grant, kv
    num_waiting_tokens: int = 0
    num_preemptions: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    endpoint: Mapping[str, Any] = {}  # the connector's own counters

    @property
    def num_waiting(self) -> int:
        return sum(self.waiting.values())


class Metrics:
    def __init__(self) -> None:
        self._registry = CollectorRegistry(auto_describe=False)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"kvxfer:{name}", text, buckets=buckets, registry=self._registry)

        def counter(name: str, text: str, labels: Iterable[str] = ()) -> Counter:
            return Counter(f"kvxfer:{name}", text, labels, registry=self._registry)

        self.first_token = histogram(
            "time_to_first_token_seconds", "From the leg's arrival here.", _FIRST_TOKEN
        )
        self.between_tokens = histogram(
            "inter_token_latency_seconds", "Between a choice's tokens.", _BETWEEN
        )
        self.whole = histogram("e2e_request_latency_seconds", "The whole request.", _WHOLE)
        self.queued = histogram(
            "request_queue_time_seconds", "Until its first chunk, or its grant.", _WHOLE
        )
        self.prefill = histogram(
            "request_prefill_time_seconds", "From there to the first token.", _WHOLE
        )
        self.decode = histogram(
            "request_decode_time_seconds", "From the first token to the end.", _WHOLE
        )
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens of requests that got a token.")
        self.generation_tokens = counter("generation_tokens", "Tokens sampled or taken over.")
        self._handoffs = counter("handoffs", "Handoffs by how they ended.", ("role", "end"))
        self._transfer = histogram(
            "kv_transfer_seconds", "From grant until all writes are quiet.", _TRANSFER
        )
        self._exposed = histogram(
            "kv_transfer_exposed_seconds",
            "The part after the last layer was computed, which nothing hides.",
            _TRANSFER,
        )

    def token(self, request: Request, now: float) -> None:
        """One token of one choice goes out."""
        self.generation_tokens.inc()
        if request.last_token is None:
            request.mark("first_token", now)
            self.prompt_tokens.inc(len(request.spec.prompt) - request.spec.position0)
            self.first_token.observe(now - request.received)
        else:
            self.between_tokens.observe(now - request.last_token)
        request.last_token = now

    def request_ended(self, request: Request, now: float) -> None:
        stages, end = request.timeline, now - request.received
        begin = stages.get("first_chunk", stages.get("granted"))
        if begin is not None:
            self.queued.observe(begin)
        first = stages.get("first_token", stages.get("commit"))
        if begin is not None and first is not None:
            self.prefill.observe(max(0.0, first - begin))
        if "first_token" in stages:
            self.decode.observe(end - stages["first_token"])
        self.whole.observe(end)

    def handoff_ended(self, role: str, end: str) -> None:
        self._handoffs.labels(role, end).inc()

    def kv_sent(self, seconds: float, exposed_seconds: float) -> None:
        self._transfer.observe(seconds)
        self._exposed.observe(exposed_seconds)

    def read_from(
        self, snapshot: Callable[[], Snapshot], engine_stats: Callable[[], Mapping[str, Any]]
    ) -> None:
        """Where the states come from; both are called on the thread that renders."""
        self._registry.register(_States(snapshot, engine_stats))

    def render(self) -> bytes:
        """The text format of Prometheus."""
        return generate_latest(self._registry)


class _States(Collector):
    def __init__(
        self, snapshot: Callable[[], Snapshot], engine_stats: Callable[[], Mapping[str, Any]]
    ) -> None:
        self._snapshot = snapshot
        self._engine_stats = engine_stats

    def collect(self) -> Iterable[Metric]:
        now, stats = self._snapshot(), self._engine_stats()
        blocks, total = now.blocks, sum(now.blocks)
        yield _gauge("blocks", "Blocks by state.", blocks._asdict(), "state")
        yield _gauge(
            "blocks_closing", "Leased, their handoff over, not quiet.", now.num_closing_blocks
        )
        yield _gauge("kv_cache_usage_perc", "1 = full.", (blocks.active + blocks.leased) / total)
        yield _gauge("num_requests_running", "Sequences in the batch.", now.num_running)
        yield _gauge("num_requests_waiting", "All that wait.", now.num_waiting)
        yield _gauge(
            "num_requests_waiting_by_reason", "What sequences wait for.", now.waiting, "reason"
        )
        yield _counter("prefix_cache_queries", "Tokens looked up.", now.prefix_queries)
        yield _counter("prefix_cache_hits", "Tokens found.", now.prefix_hits)
        yield _counter("num_preemptions", "Sequences to be recomputed.", now.num_preemptions)
        dropped = now.endpoint.get("messages_dropped", {})
        yield _counter("late_messages", "Late, unknown or stale: dropped.", sum(dropped.values()))
        refused = int(stats.get("late_writes_refused", 0))
        yield _counter("late_writes_refused", "Writes under a closed lease.", refused)
        moved = CounterMetricFamily(
            "kvxfer:kv_transfer_bytes",
            "KV bytes that left or reached this worker.",
            labels=("transport", "direction"),
        )
        for direction in ("sent", "received"):
            for transport, nbytes in now.endpoint.get(f"bytes_{direction}", {}).items():
                moved.add_metric((transport, direction), nbytes)
        yield moved


def _gauge(
    name: str, text: str, value: float | Mapping[str, float], label: str = ""
) -> GaugeMetricFamily:
    if not isinstance(value, Mapping):
        return GaugeMetricFamily(f"kvxfer:{name}", text, value=value)
    family = GaugeMetricFamily(f"kvxfer:{name}", text, labels=(label,))
    for key, number in value.items():
        family.add_metric((key,), number)
    return family


def _counter(name: str, text: str, value: float) -> CounterMetricFamily:
    return CounterMetricFamily(f"kvxfer:{name}", text, value=value)
