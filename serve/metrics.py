"""Counters and histograms behind `/metrics`, in Prometheus text. Seconds and counts as base units.

Stages inside an encoder replica travel with each answer (`backend.Timing`), so one endpoint tells of all replicas.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, generate_latest

from dermray.serving import ServedModel
from serve.backend import Timing

_LATENCY_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """One registry for one application, labelled with the model's version."""

    def __init__(self, model: ServedModel) -> None:
        self._registry = CollectorRegistry()
        registry = self._registry
        self.in_progress = Gauge("dermray_requests_in_progress", "Requests being answered now.", registry=registry)
        self._requests = Counter("dermray_requests", "Answered requests.", ("route", "status"), registry=registry)
        self._duration = Histogram(
            "dermray_request_duration_seconds",
            "From the request's first byte to its answer.",
            ("route",),
            buckets=_LATENCY_BUCKETS_S,
            registry=registry,
        )
        self._failures = Counter(
            "dermray_request_failures", "Refused requests by error code.", ("route", "code"), registry=registry
        )
        self._items = Counter("dermray_items", "Embedded images and texts.", ("modality",), registry=registry)
        self._stages = Histogram(
            "dermray_stage_duration_seconds",
            "Time inside an encoder replica by stage.",
            ("stage",),
            buckets=_LATENCY_BUCKETS_S,
            registry=registry,
        )
        self._batch_size = Histogram(
            "dermray_batch_size",
            "Size of the batch that an item rode in.",
            buckets=_BATCH_BUCKETS,
            registry=registry,
        )
        Info("dermray_model", "The served model.", registry=registry).info(
            {
                "name": model.name,
                "version": model.version or "",
                "alias": model.alias or "",
                "digest": model.digest,
                "preprocessing_digest": model.preprocessing_digest,
            }
        )

    def observe_request(self, route: str, status: int, seconds: float) -> None:
        """Count one answered request."""
        self._requests.labels(route, str(status)).inc()
        self._duration.labels(route).observe(seconds)

    def observe_failure(self, route: str, code: str) -> None:
        """Count one refusal by its code."""
        self._failures.labels(route, code).inc()

    def observe_items(self, num_images: int, num_texts: int, timing: Timing) -> None:
        """Count what one request embedded, and where its time went."""
        self._items.labels("image").inc(num_images)
        self._items.labels("text").inc(num_texts)
        for stage in ("decode", "queue", "forward"):
            self._stages.labels(stage).observe(getattr(timing, f"{stage}_s"))
        for size in timing.batch_sizes:
            self._batch_size.observe(size)

    def render(self) -> bytes:
        """The text that Prometheus scrapes."""
        return generate_latest(self._registry)
