"""Counters and histograms behind `/metrics`, in Prometheus text. Seconds and counts as base units.

Stages inside an encoder replica travel with each answer (`answers.Timing`), so one endpoint tells of all replicas.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from dermray.predict import ServedModel
from dermray.service.engine.answers import Timing

_LATENCY_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """One registry for one application; what a model computed is labelled with its name and version."""

    def __init__(self) -> None:
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
        self._items = Counter("dermray_items", "Embedded images and texts.", ("model", "modality"), registry=registry)
        self._stages = Histogram(
            "dermray_stage_duration_seconds",
            "Time inside an encoder replica by stage.",
            ("model", "stage"),
            buckets=_LATENCY_BUCKETS_S,
            registry=registry,
        )
        self._batch_size = Histogram(
            "dermray_batch_size",
            "Size of the batch that an item rode in.",
            ("model",),
            buckets=_BATCH_BUCKETS,
            registry=registry,
        )
        self._models = Gauge(
            "dermray_model_info",
            "1 for each version that answers now.",
            ("name", "version", "alias", "digest", "preprocessing_digest"),
            registry=registry,
        )

    def observe_request(self, route: str, status: int, seconds: float) -> None:
        """Count one answered request."""
        self._requests.labels(route, str(status)).inc()
        self._duration.labels(route).observe(seconds)

    def observe_failure(self, route: str, code: str) -> None:
        """Count one refusal by its code."""
        self._failures.labels(route, code).inc()

    def observe_items(self, model: ServedModel, num_images: int, num_texts: int, timing: Timing) -> None:
        """Count what one request embedded, and where its time went."""
        label = f"{model.name}/{model.version}" if model.version else model.name
        self._items.labels(label, "image").inc(num_images)
        self._items.labels(label, "text").inc(num_texts)
        for stage in ("decode", "queue", "forward", "classifier"):
            self._stages.labels(label, stage).observe(getattr(timing, f"{stage}_s"))
        for size in timing.batch_sizes:
            self._batch_size.labels(label).observe(size)

    def render(self, models: Iterable[ServedModel]) -> bytes:
        """The text that Prometheus scrapes."""
        self._models.clear()
        for model in models:
            identity = (model.name, model.version or "", model.alias or "", model.digest, model.preprocessing_digest)
            self._models.labels(*identity).set(1)
        return generate_latest(self._registry)


def merged(texts: Mapping[str, bytes]) -> bytes:
    """The counters of several gateways in one text, each with the label `gateway`; `texts` are theirs by name."""
    registry = CollectorRegistry()
    registry.register(_Merged(texts))
    return generate_latest(registry)


@dataclass(eq=False)
class _Merged(Collector):
    texts: Mapping[str, bytes]

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for gateway, text in self.texts.items():
            for family in text_string_to_metric_families(text.decode()):
                whole = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                for sample in family.samples:
                    whole.add_sample(sample.name, sample.labels | {"gateway": gateway}, sample.value)
        yield from families.values()
