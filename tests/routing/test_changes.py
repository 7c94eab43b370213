"""What is told when a routing table changes: enough to know how things stand, and nothing else."""

from hypothesis import given
from hypothesis import strategies as st

from tether.routing.changes import Facts, changes
from tether.routing.lab_events import Kind, LabEvent
from tether.routing.table import ModelEntry, Route, Table, VersionEntry, WorkerEntry
from tether.types import ModelInfo, ModelVersion, TensorSpec, WorkerId

INFO = ModelInfo("onnx", "onnx", (TensorSpec("x", "FP32", (-1, 2)),), (), batched=True, pure=True, code=False)
names = st.sampled_from(["digits", "faces", "alice~digits"])
states = st.sampled_from(["unloaded", "loading", "ready", "failed"])


def version(name, number, state="unloaded", reason=""):
    return VersionEntry(ModelVersion(name, number, "0" * 64), INFO, state, (), reason)


@st.composite
def tables(draw):
    models = {}
    for name in draw(st.sets(names)):
        numbers = draw(st.sets(st.integers(1, 3), min_size=1))
        versions = {number: version(name, number, draw(states), draw(st.sampled_from(["", "it broke"]))) for number in numbers}
        aliases = draw(st.dictionaries(st.sampled_from(["prod", "latest"]), st.sampled_from(sorted(numbers))))
        models[name] = ModelEntry(name, max(numbers), versions, aliases)
    workers = {
        WorkerId(name): WorkerEntry(
            WorkerId(name), "tls://host:1", draw(st.integers(1, 9)), draw(st.sampled_from(["running", "lost"])), 0.0
        )
        for name in draw(st.sets(st.sampled_from(["worker-1", "worker-2"])))
    }
    return Table(draw(st.integers(1, 99)), models, workers)


STATES = {Kind.LOADING: "loading", Kind.LOADED: "ready", Kind.FAILED: "failed", Kind.UNLOADED: "unloaded"}


def applied(facts, event):
    """What somebody knows who was told."""
    versions, aliases, workers = dict(facts.versions), dict(facts.aliases), set(facts.workers)
    version, alias = (event.model, event.version), (event.model, event.alias)
    match event.kind:
        case Kind.PUBLISHED:
            assert version not in versions
            versions[version] = ("unloaded", "")
        case Kind.DELETED:
            del versions[version]
        case Kind.ALIAS if event.version is None:
            del aliases[alias]
        case Kind.ALIAS:
            assert version in versions
            aliases[alias] = event.version
        case Kind.WORKER_JOINED:
            assert event.worker not in workers
            workers.add(event.worker)
        case Kind.WORKER_LOST:
            workers.remove(event.worker)
        case _:
            versions[version] = (STATES[event.kind], event.reason or "")
    return Facts(versions, aliases, frozenset(workers))


@given(tables(), tables())
def test_who_hears_all_of_it_knows_how_things_stand(before, after):
    known = Facts.of(before)
    events = changes(known, Facts.of(after), 10, 5.0)
    for event in events:
        known = applied(known, event)
    assert known == Facts.of(after)
    assert [event.seq for event in events] == list(range(11, 11 + len(events)))
    assert {event.at for event in events} <= {5.0}


@given(tables())
def test_what_nobody_sees_is_no_event(table):
    """Numbers of pushes, pids, addresses, where a version is loaded besides."""
    moved = replace_routes(table)
    assert changes(Facts.of(table), Facts.of(moved), 0, 0.0) == []


def replace_routes(table):
    route = Route(WorkerId("worker-1"), "somewhere")
    models = {
        name: ModelEntry(name, entry.default, {number: with_route(each, route) for number, each in entry.versions.items()}, entry.aliases)
        for name, entry in table.models.items()
    }
    return Table(table.seq + 1, models, table.workers, table.catalog + 1, "tls://manager")


def with_route(entry, route):
    return VersionEntry(entry.model, entry.info, entry.state, (route,), entry.reason)


def test_events_read_well():
    told = {
        "version-published digits:2": LabEvent(seq=1, at=0.0, kind=Kind.PUBLISHED, model="digits", version=2),
        "alias-moved digits@prod is 2": LabEvent(seq=1, at=0.0, kind=Kind.ALIAS, model="digits", alias="prod", version=2),
        "alias-moved digits@prod": LabEvent(seq=1, at=0.0, kind=Kind.ALIAS, model="digits", alias="prod"),
        "version-failed digits:2 (no room)": LabEvent(seq=1, at=0.0, kind=Kind.FAILED, model="digits", version=2, reason="no room"),
        "worker-lost worker-1": LabEvent(seq=1, at=0.0, kind=Kind.WORKER_LOST, worker="worker-1"),
        "missed": LabEvent(seq=1, at=0.0, kind=Kind.MISSED),
    }
    assert {str(event): event for event in told.values()} == told
