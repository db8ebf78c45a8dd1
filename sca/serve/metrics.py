"""Prometheus metrics."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from fastapi import Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from sca.serve.scheduler import RequestScheduler

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send


class ServerMetrics:
    """Metrics of the server: requests by route and status, their durations, and counters of the scheduler.

    Args:
        scheduler: Scheduler of the server.
    """

    def __init__(self, scheduler: RequestScheduler):
        self.registry: CollectorRegistry = CollectorRegistry()
        self.registry.register(_SchedulerCollector(scheduler))
        labels = ("route", "status")
        self.request_counter: Counter = Counter(
            "sca_http_requests", "HTTP requests by route and status.", labels, registry=self.registry
        )
        self.request_durations: Histogram = Histogram(
            "sca_http_request_duration_seconds",
            "Time from the request to the last byte of its response.",
            ("route",),
            registry=self.registry,
        )

    def render_page(self) -> Response:
        """Return the metrics in the Prometheus text format."""
        return Response(generate_latest(self.registry), media_type=CONTENT_TYPE_LATEST)

    def wrap_app(self, app: ASGIApp) -> ASGIApp:
        """Wrap an ASGI application to record its requests."""

        async def count_request(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":
                return await app(scope, receive, send)
            start_time, status = time.perf_counter(), 500

            async def send_and_record_status(message: Message) -> None:
                nonlocal status
                if message["type"] == "http.response.start":
                    status = message["status"]
                await send(message)

            try:
                await app(scope, receive, send_and_record_status)
            finally:
                route = getattr(scope.get("route"), "path", "other")
                self.request_counter.labels(route, status).inc()
                self.request_durations.labels(route).observe(time.perf_counter() - start_time)

        return count_request


class _SchedulerCollector(Collector):
    def __init__(self, scheduler: RequestScheduler):
        self.scheduler = scheduler

    def collect(self) -> Iterator[Metric]:
        scheduler, feature_cache = self.scheduler, self.scheduler.feature_cache
        num_queued = scheduler.num_queued_regions
        yield GaugeMetricFamily("sca_queued_regions", "Regions queued or in progress.", num_queued)
        yield CounterMetricFamily("sca_captioned_regions", "Captioned regions.", scheduler.num_captioned_regions)
        yield CounterMetricFamily(
            "sca_scheduler_turns", "Batches of regions captioned and search steps run.", scheduler.num_turns
        )
        yield GaugeMetricFamily("sca_feature_cache_images", "Images in the feature cache.", len(feature_cache))
        yield GaugeMetricFamily("sca_feature_cache_bytes", "Size of the feature cache.", feature_cache.cached_bytes)
        lookups = CounterMetricFamily(
            "sca_feature_cache_lookups", "Lookups in the feature cache by result.", labels=["result"]
        )
        lookups.add_metric(["hit"], feature_cache.hits)
        lookups.add_metric(["miss"], feature_cache.misses)
        yield lookups
