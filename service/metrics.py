"""Counters and timings in Prometheus form. No label of any of them comes from a client."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)


class Elsewhere(Collector):
    """What is counted by parts of the process that know of no metrics: asked for whenever somebody looks."""

    def __init__(self) -> None:
        self.connections_ended: Callable[[], Mapping[str, int]] = dict
        self.log_lines_dropped: Callable[[], int] = int

    def collect(self) -> Iterable[CounterMetricFamily]:
        ended = CounterMetricFamily(
            "fewshot_connections_ended", "Connections that were ended or refused.", labels=["why"]
        )
        for why, count in self.connections_ended().items():
            ended.add_metric([why], count)
        yield ended
        yield CounterMetricFamily(
            "fewshot_log_lines_dropped", "Log lines that found no room.", value=self.log_lines_dropped()
        )


class Metrics:
    """One registry per app, so that two apps in one process do not meet."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "fewshot_requests", "Requests by route and status.", ["route", "status"], registry=self.registry
        )
        self.duration = Histogram(
            "fewshot_request_duration_seconds", "Time to answer.", ["route"], buckets=SECONDS, registry=self.registry
        )
        self.stage = Histogram(
            "fewshot_stage_duration_seconds",
            "Time in one stage.",
            ["op", "stage"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.images = Counter("fewshot_images", "Images by use and outcome.", ["op", "outcome"], registry=self.registry)
        self.none_of_these = Counter(
            "fewshot_none_of_these", "Images that resembled none of the classes.", registry=self.registry
        )
        self.build_info = Gauge("fewshot_build_info", "Always 1.", ["version", "artifact"], registry=self.registry)
        self.batch_size = Histogram(
            "fewshot_batch_size",
            "Images in one call of the extractor.",
            buckets=(1, 2, 4, 8, 16, 32, 64, 128),
            registry=self.registry,
        )
        self.waiting = Gauge("fewshot_queue_depth", "Images waiting for the extractor.", registry=self.registry)
        self.abandoned = Counter("fewshot_abandoned_images", "Images whose caller had left.", registry=self.registry)
        heads = Counter(
            "fewshot_head_lookups", "Heads found, or made again from their record.", ["result"], registry=self.registry
        )
        self.head_found, self.head_made_again = heads.labels("found"), heads.labels("made_again")
        self.store_up = Gauge("fewshot_store_up", "Whether the store answered last.", registry=self.registry)
        self.keys_file_readable = Gauge(
            "fewshot_keys_file_readable", "Whether the keys file can be read; 1 without one.", registry=self.registry
        )
        self.connections = Gauge("fewshot_connections", "Open connections.", registry=self.registry)
        self.elsewhere = Elsewhere()
        self.registry.register(self.elsewhere)
        ProcessCollector(registry=self.registry)

        # Looking a child up by its labels costs more than counting; these few are looked up once.
        self._stages: dict[tuple[str, str], Histogram] = {}
        self._answers: dict[tuple[str, int], tuple[Counter, Histogram]] = {}
        self._uses: dict[tuple[str, str], Counter] = {}

    def observe(self, op: str, timings_ms: Mapping[str, float], *, good: int, bad: int) -> None:
        """One use of some images: how long each stage of it took."""
        for stage, value in timings_ms.items():
            timed = self._stages.get((op, stage))
            if timed is None:
                timed = self._stages[op, stage] = self.stage.labels(op, stage)
            timed.observe(value / 1e3)
        for outcome, count in (("used", good), ("rejected", bad)):
            if count:
                used = self._uses.get((op, outcome))
                if used is None:
                    used = self._uses[op, outcome] = self.images.labels(op, outcome)
                used.inc(count)

    def observe_answer(self, route: str, status: int, seconds: float) -> None:
        """`route` is a path of the router's own, or "none": never what a client sent."""
        children = self._answers.get((route, status))
        if children is None:
            children = self.requests.labels(route, str(status)), self.duration.labels(route)
            self._answers[route, status] = children
        children[0].inc()
        children[1].observe(seconds)

    def exposition(self) -> bytes:
        return generate_latest(self.registry)
