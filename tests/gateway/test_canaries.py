"""Requests of a rollout: each version gets its share, and what the new one fails the old one answers."""

import asyncio
import time

import numpy as np
import pytest
from dispatch_rig import VERSION, Doubling, Rig, eventually, said
from msgspec import structs

from tether.errors import BadInputError, ModelFailedError
from tether.events import VersionLoad
from tether.gateway.calls import Call
from tether.ports import Hop
from tether.routing.table import Canary, ModelEntry, Route, Table, VersionEntry
from tether.serving_settings import Rollout, ServingSettings
from tether.types import ModelVersion, WorkerId
from tether.worker.serving import ModelServer

NEW = ModelVersion("m", 2, "1" * 64)


class Tripling(Doubling):
    """y = 3x. `fails`: it raises; `nan`: it answers that; `refuses`: the input is at fault, as it says."""

    fails = nan = refuses = False

    def run(self, inputs):
        answer = super().run(inputs)
        if self.fails:
            raise ModelFailedError("it is the new one")
        if self.refuses:
            raise BadInputError("it wants another one")
        return {"y": np.full_like(answer["y"], np.nan) if self.nan else 3 * inputs["x"]}


class Rollouts(Rig):
    """Version 1 doubles, version 2 triples."""

    def __init__(self, folder, *, pure=True):
        super().__init__(folder)
        self.old, self.new = Doubling(pure=pure), Tripling(pure=pure)
        self.old_at = self.serve(self.old)
        self.new_at = ModelServer(NEW, self.new, folder / "new.sock")
        self.new_at.start()
        self.servers.append(self.new_at)
        self.seq = 0

    def split(self, canary, *, default=1, loaded=True):
        self.seq += 1
        routes = [(Route(WorkerId("w"), str(server.endpoint)),) for server in (self.old_at, self.new_at)]
        old = VersionEntry(VERSION, self.old.info, "ready", routes[0], canary=canary)
        new = VersionEntry(NEW, self.new.info, "ready", routes[1] if loaded else ())
        self.dispatch.replace_table(Table(self.seq, {"m": ModelEntry("m", default, {1: old, 2: new}, {"prod": default, "old": 1})}))

    async def answers(self, count, **more):
        return [said(await self.ask(1, **more)) for _ in range(count)]

    def loads(self):
        """What was told of both versions, and what is to be told."""
        versions = self.dispatch._traffic._versions
        there = {model: load for model in (VERSION, NEW) if model in versions and (load := versions[model].load.take()) is not None}
        return [
            together([load.versions[model] for load in self.control.loads if model in load.versions], there.get(model))
            for model in (VERSION, NEW)
        ]


def together(told, untold):
    """None: nothing."""
    seen = told if untold is None else [*told, untold]
    counts = ("answered", "failed", "worse")
    return VersionLoad(**{each: sum(getattr(load, each) for load in seen) for each in counts}, open=seen[-1].open) if seen else None


@pytest.fixture
async def rig(tmp_path):
    made = Rollouts(tmp_path)
    yield made
    await made.aclose()


async def test_the_new_version_answers_its_share_exactly(rig):
    rig.split(Canary(2, 0.25))
    answers = await rig.answers(40)
    assert (answers.count([2.0]), answers.count([3.0])) == (30, 10)
    old, new = rig.loads()
    assert (old.answered, new.answered, old.open, new.open) == (30, 10, 0, 0)


async def test_one_session_has_one_version(rig):
    rig.split(Canary(2, 0.5))
    sessions = [await rig.answers(3, session=b"%d" % number) for number in range(20)]
    assert all(len({str(answer) for answer in answers}) == 1 for answers in sessions)
    assert 2 < sum(answers[0] == [3.0] for answers in sessions) < 18


async def test_who_names_a_version_or_another_alias_gets_it(rig):
    rig.split(Canary(2, 1.0))
    assert await rig.answers(1) == [[3.0]]
    hop = rig.dispatch._canaries
    assert hop.chosen(_call("m", "1"), _entry(rig), rig.dispatch.table).model == VERSION
    assert hop.chosen(_call("m@old"), _entry(rig), rig.dispatch.table).model == VERSION
    assert hop.chosen(_call("m@prod"), _entry(rig), rig.dispatch.table).model == NEW


def _call(name, version=None):
    return Call(name, version, Hop(b"{}", 0, 1.0), print)


def _entry(rig):
    return rig.dispatch.table.models["m"].versions[1]


async def test_what_the_new_version_fails_the_old_one_answers_and_that_is_counted(rig):
    rig.split(Canary(2, 1.0))
    rig.new.fails = True
    assert await rig.answers(5) == [[2.0]] * 5
    old, new = rig.loads()
    assert (old.answered, old.failed, new.answered, new.worse, new.open) == (5, 0, 0, 5, 0)


async def test_what_both_fail_is_nobodys_fault(rig):
    rig.split(Canary(2, 1.0))
    assert said(await rig.ask(-1)) == (422, "model_failed")
    old, new = rig.loads()
    assert (old.failed, new) == (1, None)


async def test_nan_is_refused_on_trial_and_the_old_version_answers(rig):
    rig.new_at.configure(ServingSettings(rollout=Rollout(2, 1, begun=0.0)))
    rig.split(Canary(2, 1.0))
    rig.new.nan = True
    assert await rig.answers(3) == [[2.0]] * 3
    assert rig.loads()[1].worse == 3


async def test_a_model_that_is_not_pure_runs_once(tmp_path):
    rig = Rollouts(tmp_path, pure=False)
    rig.split(Canary(2, 1.0))
    rig.new.fails = True
    assert await rig.answers(1) == [(422, "model_failed")]
    assert rig.old.batches == []
    assert rig.loads()[1].failed == 1
    await rig.aclose()


async def test_what_a_dying_new_version_has_goes_on_at_the_old_one(rig):
    rig.split(Canary(2, 1.0))
    rig.new.gate.clear()
    asked = rig.ask(1)
    await eventually(lambda: rig.new.batches)
    rig.dispatch._lines.transports[str(rig.new_at.endpoint)]._transport.abort()
    assert said(await asked) == [2.0]
    assert rig.loads()[1].worse == 1


async def test_a_new_version_that_no_worker_has_gets_nothing(rig):
    rig.split(Canary(2, 1.0), loaded=False)
    assert await rig.answers(3) == [[2.0]] * 3


async def test_when_it_is_taken_back_what_it_still_has_goes_to_the_old_one_at_once(rig):
    rig.split(Canary(2, 1.0))
    rig.new.gate.clear()
    asked = [rig.ask(1), rig.ask(1)]
    await eventually(lambda: rig.new.batches)
    begun = time.monotonic()
    rig.split(None)
    assert [said(await each) for each in asked] == [[2.0], [2.0]]
    assert time.monotonic() - begun < 30
    rig.new.gate.set()


async def test_when_it_is_promoted_what_it_has_stays_there(rig):
    rig.split(Canary(2, 1.0))
    rig.new.gate.clear()
    asked = rig.ask(1)
    await eventually(lambda: rig.new.batches)
    rig.split(None, default=2)
    rig.new.gate.set()
    assert said(await asked) == [3.0]


@pytest.mark.parametrize(("fails", "worse"), [(False, 0), (True, 0)], ids=["fine", "failed, which is counted as that"])
async def test_a_share_of_the_requests_is_copied_and_nobody_sees_what_comes_of_it(rig, fails, worse):
    rig.split(Canary(2, shadow=0.5))
    rig.new.fails = fails
    assert await rig.answers(10) == [[2.0]] * 10
    await eventually(lambda: sum(rig.new.batches) >= 5)  # more where several were in a batch that failed: they run once more, one by one
    await eventually(lambda: not rig.dispatch._open)
    load = rig.loads()[1]
    assert (load.answered, load.failed, load.worse) == ((0, 5, worse) if fails else (5, 0, worse))


async def test_a_copy_that_is_refused_where_the_request_is_not_tells_against_the_new_version(rig):
    rig.new.refuses = True
    rig.split(Canary(2, shadow=1.0))
    assert await rig.answers(2) == [[2.0]] * 2
    await eventually(lambda: not rig.dispatch._open)
    await asyncio.sleep(0)
    assert rig.loads()[1].worse == 2


class Wide(Rollouts):
    """The old version at two workers."""

    def __init__(self, folder):
        super().__init__(folder)
        self.more_at = self.serve(Doubling())

    def split(self, canary):
        super().split(canary)
        models = self.dispatch.table.models["m"].versions
        old = structs.replace(models[1], routes=tuple(_route(number, server) for number, server in enumerate((self.old_at, self.more_at))))
        new = structs.replace(models[2], routes=(_route("new", self.new_at),))
        self.seq += 1
        self.dispatch.replace_table(Table(self.seq, {"m": ModelEntry("m", 1, {1: old, 2: new}, {"prod": 1, "old": 1})}))


def _route(name, server):
    return Route(WorkerId(f"w-{name}"), str(server.endpoint))


async def test_a_new_version_that_always_raises_is_never_taken_for_a_worker_of_the_old_one(tmp_path):
    rig = Wide(tmp_path)
    rig.split(Canary(2, 0.5))
    rig.new.fails = True
    assert await rig.answers(40) == [[2.0]] * 40
    health = rig.dispatch._traffic._versions[VERSION].steering.health
    assert (health.out, [event.kind for event in rig.dispatch.events.after(0)]) == ([], [])
    await rig.aclose()


async def test_what_waited_for_the_new_version_when_that_was_taken_back_is_sent_to_one_worker_of_the_old_one(tmp_path):
    rig = Wide(tmp_path)
    rig.split(Canary(2, 1.0))
    rig.new.gate.clear()
    asked = rig.ask(1)
    await eventually(lambda: rig.new.batches)
    budget = rig.dispatch._traffic._versions[NEW].steering.budget
    while budget.take(time.monotonic()):  # it has the next one in two seconds
        pass
    rig.dispatch._lines.transports[str(rig.new_at.endpoint)]._transport.abort()
    await eventually(lambda: len(rig.dispatch._waiting))
    models = rig.dispatch.table.models["m"]
    old = structs.replace(models.versions[1], canary=None)
    rig.dispatch.replace_table(Table(rig.seq + 1, {"m": structs.replace(models, versions={1: old, 2: models.versions[2]})}))
    (call,) = rig.dispatch._open
    assert len(call.live) == 1
    assert said(await asked) == [2.0]
    rig.new.gate.set()
    await rig.aclose()
