"""What Prometheus is told."""

from __future__ import annotations

import time
from typing import Any

from fastapi import Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from sca.serve.scheduler import RequestScheduler


class Metrics:
    """Requests by route and status, how long they took, and the scheduler's own counts."""

    def __init__(self, scheduler: RequestScheduler):
        self.registry = CollectorRegistry()
        self.registry.register(_Counts(scheduler))
        labels = ("route", "status")
        self.requests = Counter("sca_requests", "Requests that were answered", labels, registry=self.registry)
        self.seconds = Histogram("sca_request_seconds", "Until the last byte", ("route",), registry=self.registry)

    def page(self) -> Response:
        return Response(generate_latest(self.registry), media_type=CONTENT_TYPE_LATEST)

    def middleware(self, app: Any) -> Any:
        """ASGI middleware that counts."""

        async def counted(scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] != "http":
                return await app(scope, receive, send)
            start, status = time.perf_counter(), 500

            async def sent(message: Any) -> None:
                nonlocal status
                if message["type"] == "http.response.start":
                    status = message["status"]
                await send(message)

            try:
                await app(scope, receive, sent)
            finally:
                route = getattr(scope.get("route"), "path", "other")
                self.requests.labels(route, status).inc()
                self.seconds.labels(route).observe(time.perf_counter() - start)

        return counted


class _Counts(Collector):
    def __init__(self, scheduler: RequestScheduler):
        self.scheduler = scheduler

    def collect(self) -> Any:
        scheduler, kept = self.scheduler, self.scheduler.features
        yield GaugeMetricFamily("sca_waiting_regions", "Regions without an answer", scheduler.queued)
        yield CounterMetricFamily("sca_regions", "Regions that were answered", scheduler.answered)
        yield CounterMetricFamily("sca_turns", "Times that the model was asked", scheduler.turns)
        yield GaugeMetricFamily("sca_kept_images", "Images whose features are kept", len(kept))
        yield GaugeMetricFamily("sca_kept_bytes", "Bytes of them", kept.held)
        looked_up = CounterMetricFamily("sca_feature_lookups", "Images whose features were asked for", labels=["found"])
        looked_up.add_metric(["yes"], kept.hits)
        looked_up.add_metric(["no"], kept.misses)
        yield looked_up
