"""What decisions cost in one process: where a request goes, and what an event changes."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping

from cluster import Cluster, catalog, joined, version

from tether.events import Event, Evicting, GatewayLoad, ModelWanted, Tick, VersionLoad, WorkerLeft
from tether.orchestrator.instructions import Load
from tether.routing.steering import Steering
from tether.routing.table import ModelEntry, Route, Table, VersionEntry
from tether.types import WorkerId, WorkerMemory

__all__ = ["events", "routing"]


def routing(table: Table, most_routes: int, calls: int = 20_000) -> dict[str, float]:
    """Microseconds from a name to a route, of a table: any of the loaded models; one that all workers have."""
    loaded = [name for name, entry in table.models.items() if entry.versions[1].routes]
    entry = table.models[loaded[0]].versions[1]
    routes = tuple(Route(WorkerId(f"worker-{number}"), f"/run/{number}") for number in range(most_routes))
    wide = VersionEntry(entry.model, entry.info, "ready", routes)
    widest = Table(table.seq, table.models | {"wide": ModelEntry("wide", 1, {1: wide}, {})}, table.workers)
    return {"usual": _chosen(table, loaded, calls), f"{most_routes} routes": _chosen(widest, ["wide"], calls)}


def _chosen(table: Table, names: list[str], calls: int) -> float:
    chance = random.Random("routing")
    steering = {name: Steering(_Lines(), lambda _, __: None, chance) for name in names}
    asked = chance.choices(names, k=calls)
    for name in names:
        steering[name].follow(table.resolve(name), table)
    begun = time.process_time()
    for name in asked:
        entry, way = table.resolve(name), steering[name]
        way.follow(entry, table)
        way.choose(b"", (), 0.0)
    return (time.process_time() - begun) / calls * 1e6


class _Lines:
    """On which nothing is under way."""

    def outstanding(self, _: str) -> Callable[[], int]:
        return lambda: 0

    owed = outstanding


def events(cluster: Cluster, models: int, loaded: int, each: int = 20) -> dict[str, dict[str, float]]:
    """Milliseconds of CPU for one event of each kind: the median, and the longest."""
    made: Mapping[str, Callable[[], Iterable[Event]]] = {
        "a model is asked for": lambda: (ModelWanted(version(number)) for number in range(loaded, loaded + each)),
        "a worker puts a model out": lambda: (_evicted(cluster, number) for number in range(each)),
        "a worker dies": lambda: (WorkerLeft(joined(number).address) for number in range(each)),
        "a worker joins": lambda: (joined(number, 1) for number in range(each)),
        "a model is published": lambda: (catalog(models + number, 2 + number) for number in range(1, 6)),
        "a gateway tells its load": lambda: (GatewayLoad("g", 1.0, {version(n): VersionLoad(9) for n in range(500)}) for _ in range(each)),
        "time passes": lambda: (Tick() for _ in range(each)),
    }
    found = {"a model is loaded": _loaded(cluster, loaded + each, each)}
    return found | {kind: _timed(cluster, make()) for kind, make in made.items()}


def _timed(cluster: Cluster, happened: Iterable[Event]) -> dict[str, float]:
    took = []
    for event in happened:
        begun = time.process_time()
        loads = cluster.do(event)
        took.append(time.process_time() - begun)
        _answer(cluster, loads)
    return _figures(took)


def _loaded(cluster: Cluster, first: int, count: int) -> dict[str, float]:
    took = []
    for number in range(first, first + count):
        for load in cluster.do(ModelWanted(version(number))):
            answer = cluster.answer(load)
            begun = time.process_time()
            loads = cluster.do(answer)
            took.append(time.process_time() - begun)
            _answer(cluster, loads)
    return _figures(took)


def _answer(cluster: Cluster, loads: Iterable[Load]) -> None:
    for load in loads:
        cluster.settle(cluster.answer(load))


def _evicted(cluster: Cluster, number: int) -> Evicting:
    """The second copy, for want of room."""
    entry = cluster.state.table.resolve(version(number).name)
    worker = cluster.state.table.workers[entry.routes[-1].worker]
    memory = worker.memory or WorkerMemory()
    return Evicting(worker.address, worker.pid, entry.model, entry.routes[-1].endpoint, memory)


def _figures(took: list[float]) -> dict[str, float]:
    return {"median": statistics.median(took) * 1e3, "longest": max(took) * 1e3}
