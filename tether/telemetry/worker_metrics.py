"""What workers told with their heartbeats, as Prometheus' metrics: made anew for each scrape, nothing is kept.

Counters are those of a process: they begin at 0 when a worker starts or loads a version again, which `rate()` expects.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

__all__ = ["worker_metrics"]

_Family = CounterMetricFamily | GaugeMetricFamily
_OF_WORKERS: Final[tuple[tuple[str, type[_Family], str, str], ...]] = (
    ("cpu", CounterMetricFamily, "tether_worker_cpu_seconds", "Processor time of a worker and its runners."),
    ("memory", GaugeMetricFamily, "tether_worker_memory_bytes", "Memory (PSS) of a worker and its runners."),
    ("used", GaugeMetricFamily, "tether_worker_models_memory_bytes", "Of that, what loaded models take."),
    ("budget", GaugeMetricFamily, "tether_worker_models_memory_budget_bytes", "What models may take; 0: it is not bounded."),
    ("received", CounterMetricFamily, "tether_worker_host_network_receive_bytes", "Bytes that the worker's host received."),
    ("sent", CounterMetricFamily, "tether_worker_host_network_transmit_bytes", "Bytes that the worker's host sent."),
)
_OF_CARDS: Final = (
    ("busy", "tether_worker_gpu_utilization_ratio", "Share of the last second in which the GPU worked."),
    ("used", "tether_worker_gpu_memory_used_bytes", "Memory of the GPU in use, by whatever process."),
    ("total", "tether_worker_gpu_memory_bytes", "Memory of the GPU."),
)
_OF_MODELS: Final[tuple[tuple[str, type[_Family], str, str], ...]] = (
    ("requests", CounterMetricFamily, "tether_model_requests", "Requests that a worker answered with a result."),
    ("failures", CounterMetricFamily, "tether_model_failures", "Requests that a worker answered with an error."),
    ("batches", CounterMetricFamily, "tether_model_batches", "Batches run."),
    ("rows", CounterMetricFamily, "tether_model_rows", "Rows run; divided by batches: the mean size of a batch."),
    ("busy", CounterMetricFamily, "tether_model_inference_seconds", "Time inside the runtime; divided by batches: the mean time of one."),
    ("waiting", GaugeMetricFamily, "tether_model_queue_length", "Requests that wait for their batch."),
    ("load_seconds", GaugeMetricFamily, "tether_model_load_seconds", "What the last load took, fetching included."),
    ("nbytes", GaugeMetricFamily, "tether_model_memory_bytes", "Memory that the loaded version takes."),
)


def worker_metrics(workers: Mapping[str, Mapping[str, Any]]) -> Iterator[Metric]:
    """`workers`: by id, what `tether.worker.vitals` and `types.WorkerMemory` say, and `"models"`: by `name:version`, its totals.

    What a worker of another version of Tether does not tell is left out.
    """
    for key, kind, name, text in _OF_WORKERS:
        family = kind(name, text, labels=("worker",))
        for worker, told in workers.items():
            _add(family, (worker,), told.get(key))
        yield family
    for key, name, text in _OF_CARDS:
        gauge = GaugeMetricFamily(name, text, labels=("worker", "gpu", "name"))
        for worker, told in workers.items():
            for index, card in enumerate(told.get("cards", ())):
                _add(gauge, (worker, str(index), str(card.get("name", ""))), card.get(key))
        yield gauge
    for key, kind, name, text in _OF_MODELS:
        family = kind(name, text, labels=("worker", "model", "version"))
        for worker, told in workers.items():
            for version, totals in told.get("models", {}).items():
                model, _, number = version.rpartition(":")
                _add(family, (worker, model, number), totals.get(key))
        yield family


def _add(family: _Family, labels: tuple[str, ...], value: object) -> None:
    if isinstance(value, int | float):
        family.add_metric(labels, value)
