"""How often requests were sent again or to a second worker, and workers left out for a while: for Prometheus."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Final, Literal

from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from tether.telemetry.metrics import REGISTRY

__all__ = ["STEERING", "SteeringMetrics"]

_What = Literal["retries", "hedges", "ejections"]
_TEXTS: Final[dict[_What, tuple[str, str]]] = {  # what it counts, and the name of its label besides the model
    "retries": ("Requests sent again, by why.", "cause"),
    "hedges": ("Requests sent to a second worker as well, and those that it answered first.", "outcome"),
    "ejections": ("Workers left out for a while, by why.", "cause"),
}


class SteeringMetrics(Collector):
    """Of one process. Names of models come from the routing table, never from callers."""

    def __init__(self) -> None:
        self._counts: dict[_What, Counter[tuple[str, str]]] = {what: Counter() for what in _TEXTS}

    def count(self, what: _What, model: str, label: str) -> None:
        """One more."""
        self._counts[what][model, label] += 1

    def collect(self) -> Iterator[Metric]:
        """As Prometheus names them."""
        for what, (text, label) in _TEXTS.items():
            family = CounterMetricFamily(f"tether_{what}", text, labels=("model", label))
            for labels, count in sorted(self._counts[what].items()):
                family.add_metric(labels, count)
            yield family


STEERING: Final = SteeringMetrics()
REGISTRY.register(STEERING)
