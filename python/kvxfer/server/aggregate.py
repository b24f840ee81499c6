# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""The router's metrics: latencies as its clients see them, and the sum of what its workers count.

One URL then shows the whole server. Latencies that workers measure too (per leg) give way to the router's
own under the same name; fractions (``_perc``) are averaged, everything else is added up.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Sequence

import httpx
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from kvxfer.server.pool import Pool

__all__ = ["RouterMetrics", "sum_of"]

log = logging.getLogger(__name__)
_SCRAPE_TIMEOUT_S = 2.0
_PREFIX = "kvxfer:"
# vLLM's buckets, so that dashboards made for it read ours.
_FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)  # fmt: skip
_BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5)  # fmt: skip
_WHOLE = (0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480)


class RouterMetrics:
    def __init__(self, pool: Pool, client: httpx.AsyncClient) -> None:
        self._pool = pool
        self._client = client
        self._registry = CollectorRegistry()

        def histogram(name: str, text: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(_PREFIX + name, text, buckets=buckets, registry=self._registry)

        self.first_token = histogram(
            "time_to_first_token_seconds", "As the router's clients see it.", _FIRST_TOKEN
        )
        self.between_tokens = histogram(
            "inter_token_latency_seconds", "As the router's clients see it.", _BETWEEN
        )
        self.whole = histogram(
            "e2e_request_latency_seconds", "Complete answers, from request to last token.", _WHOLE
        )
        self.retries = Counter(
            _PREFIX + "retries", "Attempts after the first.", registry=self._registry
        )
        self._registry.register(_Workers(pool))

    def render(self) -> bytes:
        return generate_latest(self._registry)

    async def render_all(self) -> bytes:
        """Ours and the sum of the workers'. A worker that does not answer is left out, and said so."""
        own = list(self._registry.collect())
        texts = await asyncio.gather(
            *(self._scrape(view.url) for view in self._pool.views if view.up)
        )
        summed = sum_of([text for text in texts if text], without={family.name for family in own})
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_Families([*own, *summed]))
        return generate_latest(registry)

    async def _scrape(self, url: str) -> str:
        try:
            answer = await self._client.get(f"{url}/metrics", timeout=_SCRAPE_TIMEOUT_S)
            answer.raise_for_status()
        except httpx.HTTPError as error:
            log.warning("metrics of %s are missing from the sum: %r", url, error)
            return ""
        return answer.text


class _Workers(Collector):
    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    def collect(self) -> Iterable[Metric]:
        up = GaugeMetricFamily(
            _PREFIX + "worker_up", "1 = it answers the router's polls.", labels=("role", "worker")
        )
        for view in self._pool.views:
            up.add_metric((view.role, view.id), float(view.up))
        yield up


class _Families(Collector):
    def __init__(self, families: Sequence[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def sum_of(texts: Sequence[str], *, without: Iterable[str] = ()) -> list[Metric]:
    """Our families of several expositions, added sample by sample; others (python_, process_) are not ours."""
    families: dict[str, Metric] = {}
    values: dict[str, dict[tuple[str, tuple[tuple[str, str], ...]], float]] = {}
    left_out = set(without)
    for text in texts:
        for family in text_string_to_metric_families(text):
            if not family.name.startswith(_PREFIX) or family.name in left_out:
                continue
            families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            sums = values.setdefault(family.name, {})
            share = len(texts) if family.name.endswith("_perc") else 1
            for sample in family.samples:
                if not sample.name.endswith("_created"):  # points in time do not add up
                    key = (sample.name, tuple(sample.labels.items()))
                    sums[key] = sums.get(key, 0.0) + sample.value / share
    for name, family in families.items():
        family.samples = [
            Sample(sample, dict(labels), value) for (sample, labels), value in values[name].items()
        ]
    return list(families.values())
