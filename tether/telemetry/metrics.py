"""Counts and times of requests, for Prometheus: kept in plain lists by one event-loop thread, turned into metrics when scraped.

prometheus-client's own histogram child takes 0.8 µs an observation and a look-up by labels as much again; a list takes
0.2 in all.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from typing import Final

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

__all__ = ["BUCKETS", "REGISTRY", "REQUESTS", "UNKNOWN", "RequestMetrics", "Series", "render"]

BUCKETS: Final = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
"""Upper bounds in seconds: from a tiny model on this host to the default deadline."""
UNKNOWN: Final = "-"
"""Label of every name that is no model of the lab: callers must not be able to make series."""
_SERIES_LIMIT: Final = 2000
"""Series a process keeps; versions published after that share the series `-` until it restarts, so that a scrape stays small."""


class Series:
    """One version of one model. Belongs to the event loop's thread; a scrape from that thread sees a consistent state."""

    __slots__ = ("buckets", "codes", "in_flight", "model", "right", "seconds", "version", "wrong")

    def __init__(self, model: str, version: str) -> None:
        self.model, self.version = model, version
        self.codes: dict[int, int] = {}
        self.buckets = [0] * (len(BUCKETS) + 1)
        self.seconds = 0.0
        self.in_flight = 0
        self.right = self.wrong = 0
        """Answers that were so, by labels that came later."""

    def observe(self, code: int, seconds: float) -> None:
        """One request is answered with HTTP status `code` after `seconds`."""
        self.codes[code] = self.codes.get(code, 0) + 1
        self.buckets[bisect_left(BUCKETS, seconds)] += 1
        self.seconds += seconds


class RequestMetrics(Collector):
    """All series of a process."""

    def __init__(self) -> None:
        self._series: dict[tuple[str, str], Series] = {}

    def series(self, model: str, version: str) -> Series:
        """The series of a version; pass `UNKNOWN` for both where the name is not the lab's. Keep it: the look-up is not free."""
        found = self._series.get((model, version))
        if found is None:
            if len(self._series) >= _SERIES_LIMIT and model != UNKNOWN:
                return self.series(UNKNOWN, UNKNOWN)
            found = self._series[model, version] = Series(model, version)
        return found

    def collect(self) -> Iterator[Metric]:
        """The metrics as Prometheus names them; histogram and gauge are summed over a model's versions."""
        requests = CounterMetricFamily("tether_requests", "Inference requests answered.", labels=("model", "version", "code"))
        duration = HistogramMetricFamily(
            "tether_request_duration_seconds", "From the last byte of a request's headers to its answer.", labels=("model",)
        )
        in_flight = GaugeMetricFamily("tether_requests_in_flight", "Inference requests being worked on.", labels=("model",))
        feedback = CounterMetricFamily(
            "tether_model_feedback", "Answers whose labels came later, by whether they were right.", labels=("model", "version", "outcome")
        )
        by_model: dict[str, list[Series]] = {}
        for series in list(self._series.values()):
            by_model.setdefault(series.model, []).append(series)
            for code, count in sorted(series.codes.items()):
                requests.add_metric((series.model, series.version, str(code)), count)
            if series.right or series.wrong:
                feedback.add_metric((series.model, series.version, "right"), series.right)
                feedback.add_metric((series.model, series.version, "wrong"), series.wrong)
        for model, group in by_model.items():
            duration.add_metric((model,), _cumulative(group), sum(series.seconds for series in group))
            in_flight.add_metric((model,), sum(series.in_flight for series in group))
        yield from (requests, duration, in_flight, feedback)


def _cumulative(group: list[Series]) -> list[tuple[str, float]]:
    total, rows = 0, []
    for index, bound in enumerate((*BUCKETS, None)):
        total += sum(series.buckets[index] for series in group)
        rows.append(("+Inf" if bound is None else repr(bound), float(total)))
    return rows


REGISTRY: Final = CollectorRegistry()
"""The registry of this process; prometheus-client's global one is other libraries' (dask registers there)."""
REQUESTS: Final = RequestMetrics()
REGISTRY.register(REQUESTS)
ProcessCollector(registry=REGISTRY)


class _All(Collector):
    """The metrics of this process, and others beside them."""

    def __init__(self, others: Iterable[Metric]) -> None:
        self._others = others

    def collect(self) -> Iterator[Metric]:
        """All of them."""
        yield from REGISTRY.collect()
        yield from self._others


def render(others: Iterable[Metric] = ()) -> bytes:
    """The text exposition of all metrics of this process, and of others."""
    return generate_latest(_All(others))
