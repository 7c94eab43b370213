"""What is told when a routing table changes: enough to know how things stand, and nothing else."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from tether.routing.changes import Facts, changes
from tether.routing.lab_events import Kind, LabEvent
from tether.routing.table import ModelEntry, Route, Table, TableChange, VersionEntry, WorkerEntry
from tether.serving_settings import Rollout, ServingSettings
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


def test_a_load_says_what_it_took_where_that_is_known():
    loading, (known, unknown) = version("digits", 1, "loading"), (Route(WorkerId("worker-1"), "/s", None, took) for took in (0.5, 0.0))
    for route, seconds in ((known, 0.5), (unknown, None)):
        loaded = VersionEntry(loading.model, loading.info, "ready", (route,))
        before, after = (Facts.of(Table(1, {"digits": ModelEntry("digits", 1, {1: each}, {})})) for each in (loading, loaded))
        assert [(event.kind, event.seconds) for event in changes(before, after, 0, 0.0)] == [(Kind.LOADED, seconds)]


def change_between(before, after):
    """What makes the one the other."""

    def different(was, now):
        return {name: now.get(name) for name in was.keys() | now.keys() if was.get(name) != now.get(name)}

    models, workers = different(before.models, after.models), different(before.workers, after.workers)
    return TableChange(after.seq, after.catalog, after.manager, models, workers)


@given(tables(), tables())
def test_who_gets_only_what_changed_has_the_same_table_and_hears_the_same(before, after):
    change = change_between(before, after)
    assert before.amended(change) == after
    was, now = before.part(change), after.part(change)
    assert changes(Facts.of(was), Facts.of(now), 10, 5.0) == changes(Facts.of(before), Facts.of(after), 10, 5.0)
    assert before.endpoints - after.endpoints <= was.endpoints - now.endpoints


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
        "version-loaded digits:2": LabEvent(seq=1, at=0.0, kind=Kind.LOADED, model="digits", version=2, seconds=0.125),
        "answers-labelled digits:2 (9 right, 1 wrong)": LabEvent(
            seq=1, at=0.0, kind=Kind.LABELLED, model="digits", version=2, right=9, wrong=1
        ),
        "worker-lost worker-1": LabEvent(seq=1, at=0.0, kind=Kind.WORKER_LOST, worker="worker-1"),
        "missed": LabEvent(seq=1, at=0.0, kind=Kind.MISSED),
    }
    assert {str(event): event for event in told.values()} == told


def test_a_rollout_is_told_when_it_begins_and_when_it_ends():
    def rolled(state, reason=""):
        rollout = Rollout(2, 1, begun=5.0, state=state, reason=reason)
        versions = {number: version("digits", number) for number in (1, 2)}
        return Facts.of(Table(1, {"digits": ModelEntry("digits", 1, versions, {}, ServingSettings(rollout=rollout))}))

    before = Facts.of(Table(1, {"digits": ModelEntry("digits", 1, {number: version("digits", number) for number in (1, 2)}, {})}))
    steps = [before, rolled("running"), rolled("running"), rolled("reverted", "it is slow")]
    told = [str(event) for was, now in itertools.pairwise(steps) for event in changes(was, now, 1, 0.0)]
    assert told == ["rollout-begun digits:2", "rollout-reverted digits:2 (it is slow)"]
