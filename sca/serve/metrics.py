"""Prometheus metrics."""

from __future__ import annotations

import time
from typing import Any

from fastapi import Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from sca.serve.scheduler import RequestScheduler


class ServerMetrics:
    """Metrics of the server: requests by route and status, their durations, and counters of the scheduler.

    Args:
        scheduler: Scheduler of the server.
    """

    def __init__(self, scheduler: RequestScheduler):
        self.registry = CollectorRegistry()
        self.registry.register(_SchedulerCollector(scheduler))
        labels = ("route", "status")
        self.request_counter = Counter("sca_requests", "Requests that were answered", labels, registry=self.registry)
        self.durations = Histogram("sca_request_seconds", "Until the last byte", ("route",), registry=self.registry)

    def render_page(self) -> Response:
        """Return the metrics in the Prometheus text format."""
        return Response(generate_latest(self.registry), media_type=CONTENT_TYPE_LATEST)

    def wrap_app(self, app: Any) -> Any:
        """Wrap an ASGI application to record its requests."""

        async def count_request(scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] != "http":
                return await app(scope, receive, send)
            start_time, status = time.perf_counter(), 500

            async def send_and_record_status(message: Any) -> None:
                nonlocal status
                if message["type"] == "http.response.start":
                    status = message["status"]
                await send(message)

            try:
                await app(scope, receive, send_and_record_status)
            finally:
                route = getattr(scope.get("route"), "path", "other")
                self.request_counter.labels(route, status).inc()
                self.durations.labels(route).observe(time.perf_counter() - start_time)

        return count_request


class _SchedulerCollector(Collector):
    def __init__(self, scheduler: RequestScheduler):
        self.scheduler = scheduler

    def collect(self) -> Any:
        scheduler, feature_store = self.scheduler, self.scheduler.feature_store
        yield GaugeMetricFamily("sca_waiting_regions", "Regions without an answer", scheduler.num_queued)
        yield CounterMetricFamily("sca_regions", "Regions that were answered", scheduler.num_captioned)
        yield CounterMetricFamily("sca_turns", "Times that the model was asked", scheduler.num_turns)
        yield GaugeMetricFamily("sca_kept_images", "Images whose features are kept", len(feature_store))
        yield GaugeMetricFamily("sca_kept_bytes", "Bytes of them", feature_store.stored_bytes)
        lookups = CounterMetricFamily("sca_feature_lookups", "Images whose features were asked for", labels=["found"])
        lookups.add_metric(["yes"], feature_store.hits)
        lookups.add_metric(["no"], feature_store.misses)
        yield lookups
