"""What Prometheus is told: requests, batches, what waits. Nothing of the texts."""

import logging
import time
from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger(__name__)

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
TEXTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Monitor:
    """The figures of one service, in a registry of its own."""

    def __init__(self, waiting: Callable[[], float]) -> None:
        self._registry = CollectorRegistry()
        kept: dict[str, Any] = {"registry": self._registry}
        self._requests = Counter("finllm_requests", "Requests answered.", ["route", "status"], **kept)
        self._seconds = Histogram(
            "finllm_request_seconds",
            "From the last byte of a request to its answer.",
            ["route"],
            buckets=SECONDS,
            **kept,
        )
        self._texts = Counter("finllm_texts", "Texts that the model has answered.", ["verb"], **kept)
        self._batches = Histogram("finllm_batch_texts", "Texts read together.", ["verb"], buckets=TEXTS, **kept)
        self._batch_seconds = Histogram(
            "finllm_batch_seconds", "For one batch in the model.", ["verb"], buckets=SECONDS, **kept
        )
        Gauge("finllm_waiting_texts", "Texts that wait for the model.", **kept).set_function(waiting)

    def request(self, route: str, status: int, seconds: float) -> None:
        """Count a request."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def batch(self, verb: str, texts: int, seconds: float) -> None:
        """Count a batch."""
        self._texts.labels(verb).inc(texts)
        self._batches.labels(verb).observe(texts)
        self._batch_seconds.labels(verb).observe(seconds)

    def exposition(self) -> bytes:
        """All figures, in Prometheus' text format."""
        return generate_latest(self._registry)


class Watch:
    """Counts and logs every request by its route: what else a path or a query holds may be somebody's text."""

    def __init__(self, app: ASGIApp, monitor: Monitor) -> None:
        self._app, self._monitor = app, monitor

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.perf_counter(), 500

        async def watched(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            seconds = time.perf_counter() - began
            route = getattr(scope.get("route"), "path", "(unknown)")
            self._monitor.request(route, status, seconds)
            log.info("%s %s %d %.0f ms", scope["method"], route, status, seconds * 1000)
