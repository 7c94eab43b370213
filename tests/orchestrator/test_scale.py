"""What one event costs does not grow with the lab: counted here, timed by benchmarks/scale, whose code runs small."""

import sys
from pathlib import Path

import pytest

from tether.events import ModelWanted, Tick, WorkerLeft
from tether.orchestrator.entries import TableMaker
from tether.orchestrator.registry import KnownWorker

HERE = Path(__file__).parents[2] / "benchmarks" / "scale"


@pytest.fixture
def scale(monkeypatch):
    """The benchmark's modules."""
    monkeypatch.syspath_prepend(HERE)
    names = ("cluster", "deciding", "pushing", "heartbeats")
    yield [__import__(name) for name in names]
    for name in names:
        sys.modules.pop(name, None)


def test_an_event_makes_entries_of_what_it_changes_and_of_nothing_else(scale, monkeypatch):
    cluster_module, *_ = scale
    cluster = cluster_module.Cluster(50, 400, 100)
    made, seen = [], []
    entry, look = TableMaker._entry, KnownWorker.entry
    monkeypatch.setattr(TableMaker, "_entry", lambda maker, name, *more: made.append(name) or entry(maker, name, *more))
    monkeypatch.setattr(KnownWorker, "entry", lambda worker: seen.append(worker.id) or look(worker))
    cluster.do(Tick())
    assert (made, seen) == ([], [])
    (load,) = cluster.do(ModelWanted(cluster_module.version(300)))
    assert len(made) == len(seen) == 1
    cluster.do(cluster.answer(load))
    assert len(made) == 2
    gone = cluster_module.joined(0)
    held = cluster.state.table.workers[gone.worker].models
    made.clear()
    cluster.do(WorkerLeft(gone.address))
    assert 0 < len(held) == len(made) < 20


def test_gateways_share_all_of_a_table_that_did_not_change(scale):
    cluster_module, *_ = scale
    cluster = cluster_module.Cluster(5, 50, 5)
    before, changes = cluster.state.table, []
    cluster.push = changes.append
    cluster.do(ModelWanted(cluster_module.version(20)))
    (change,) = changes
    after = before.amended(change)
    assert after == cluster.state.table
    assert [name for name in after.models if after.models[name] is not before.models.get(name)] == ["model-00020"]


def test_the_benchmark_runs(scale):
    cluster_module, deciding, pushing, heartbeats = scale
    cluster = cluster_module.Cluster(10, 60, 10)
    assert set(deciding.routing(cluster.state.table, 10, calls=10)) == {"usual", "10 routes"}
    assert len(deciding.events(cluster, 60, 10, each=5)) == 8
    assert heartbeats.heartbeats(3)["milliseconds"] > 0
    found = pushing.pushed(4, 20, 5, gateways=1, rate=50.0, changes=5)
    assert found["changes"] >= 5
    assert found["requests a second"] > 0
