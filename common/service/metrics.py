"""What /metrics shows, in Prometheus's form."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from common.rag import Statistics
from common.service.batching import Batch

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Metrics:
    """The counters of one service; `gauges` names what is read when somebody asks."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "resonance_requests", "Requests by route and status.", ("route", "status"), registry=self.registry
        )
        self._stages = Histogram(
            "resonance_stage_seconds",
            "Seconds by stage: queue, expand, retrieve, rerank, total, generate.",
            ("stage",),
            buckets=_SECONDS,
            registry=self.registry,
        )
        sizes = (1, 2, 4, 8, 16, 32, 64, 128)
        self._pairs = Histogram(
            "resonance_batch_pairs", "Pairs of a reranker's batch.", buckets=sizes, registry=self.registry
        )
        self._sharing = Histogram(
            "resonance_batch_requests", "Requests in a batch.", buckets=sizes, registry=self.registry
        )
        self._batch_seconds = Histogram(
            "resonance_batch_seconds",
            "Seconds of a reranker's batch.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.unrecorded = Counter(
            "resonance_unrecorded_searches",
            "Searches that could not be stored for feedback.",
            registry=self.registry,
        )
        self.reloads = Counter(
            "resonance_reloads", "New versions of the reranker.", ("outcome",), registry=self.registry
        )
        self.generated = Counter(
            "resonance_generated_tokens", "Tokens of generated text.", registry=self.registry
        )

    def stage(self, name: str, seconds: float) -> None:
        self._stages.labels(name).observe(seconds)

    def batch(self, batch: Batch) -> None:
        self._pairs.observe(batch.pairs)
        self._sharing.observe(batch.requests)
        self._batch_seconds.observe(batch.seconds)

    def watch(self, statistics: Callable[[], Statistics], gauges: Callable[[], dict[str, float]]) -> None:
        """Show a pipeline's statistics and some gauges, as they are when somebody asks."""
        self.registry.register(_Read(statistics, gauges))

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _Read(Collector):
    def __init__(self, statistics: Callable[[], Statistics], gauges: Callable[[], dict[str, float]]) -> None:
        self._statistics, self._gauges = statistics, gauges

    def collect(self) -> Iterator[Any]:
        now = self._statistics()
        queries = CounterMetricFamily("resonance_queries", "Queries by how they were ranked.", labels=["by"])
        queries.add_metric(["reranker"], now.reranked)
        queries.add_metric(["first_stage"], now.queries - now.reranked)
        cache = CounterMetricFamily("resonance_cache_pairs", "Pairs looked up.", labels=["result"])
        cache.add_metric(["hit"], now.cache_hits)
        cache.add_metric(["miss"], now.cache_misses)
        fallbacks = CounterMetricFamily(
            "resonance_fallbacks", "Queries without reranker or expansion.", labels=["reason"]
        )
        for reason, count in now.fallbacks.items():
            fallbacks.add_metric([reason], count)
        yield from (queries, cache, fallbacks)
        for name, value in self._gauges().items():
            yield GaugeMetricFamily(f"resonance_{name}", name.replace("_", " "), value=value)
