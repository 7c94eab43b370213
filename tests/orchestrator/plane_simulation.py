"""A lab in one thread and without a clock: the real state of the orchestrator and the real dispatch of its gateways, among workers, a
manager and a network that are simulated, and fail as one seed has it. What must hold is asked for after each step and in the end.
"""

import asyncio
import contextlib
import hashlib
import random
import time
from collections import Counter
from unittest import mock

import msgspec

from tether.errors import MemoryFullError, PoisonInputError, ServiceUnavailableError
from tether.events import (
    CatalogChanged,
    CatalogModel,
    Evicting,
    Holding,
    InputCondemned,
    LoadCut,
    Loaded,
    LoadFailed,
    ManagerLeft,
    ModelWanted,
    Tick,
    Unloaded,
    VersionIsolated,
    WorkerBack,
    WorkerJoined,
    WorkerLeft,
    WorkerSilent,
)
from tether.gateway import lines
from tether.gateway.dispatch import Dispatch
from tether.orchestrator.health import PERIOD, Health
from tether.orchestrator.news import News
from tether.orchestrator.state import Configure, ControlState, Isolate, Load, Push, Unload
from tether.ports import Hop, HopReply, Undelivered
from tether.routing.table import Table, TableChange
from tether.serving_settings import DEFAULTS
from tether.types import Digest, ModelInfo, ModelVersion, TensorSpec, WorkerId, WorkerMemory
from tether.wire.oip import encode_error

COPIES = 2
STORM = 15.0
"""Seconds in which things fail."""
CALM = 90.0
"""Seconds after it until all must be as it should: a worker that failed to load is asked again after a minute at most."""
MOST_DEATHS = 3
"""Of one input: after two it runs alone; one more, where it was sent to a second worker since the first was silent."""
SPECS = (TensorSpec("x", "FP32", (-1, 4)),)
MIB = 1 << 20


class VirtualLoop(asyncio.BaseEventLoop):
    """Time passes when nothing else is to be done. There are no files, sockets or threads."""

    def __init__(self):
        super().__init__()
        self.now = 1000.0
        self._selector = self

    def time(self):
        return self.now

    def select(self, timeout):
        assert timeout is not None, "nothing will ever happen any more"
        self.now += timeout
        return []

    def _process_events(self, event_list):
        pass

    def _write_to_self(self):
        pass


class Ordered(dict):
    """As a set of what has no order of its own, in the order in which it came: a run must not depend on addresses in memory."""

    def add(self, item):
        self[item] = None

    def discard(self, item):
        self.pop(item, None)


class Worker:
    """A process at a fixed address; each start is another one."""

    def __init__(self, plane, number):
        self.plane, self.id, self.address = plane, WorkerId(f"w{number}"), f"tls://h{number}:1"
        self.pid, self.is_alive, self.thaw_at, self.registered = 0, False, 0.0, None
        self.budget = plane.random.choice([0, 0, 3]) * MIB
        self.start()

    def start(self):
        self.pid, self.is_alive, self.has, self.loading, self.asked = self.plane.serial(), True, {}, {}, {}
        self.register()

    def register(self):
        """Once at each orchestrator, with what it has."""
        if self.registered == (self.pid, self.plane.orchestrator):
            return
        self.registered = self.pid, self.plane.orchestrator
        holdings = tuple(Holding(model, endpoint, DEFAULTS) for model, endpoint in self.has.items())
        self.tell(WorkerJoined(self.id, self.address, self.pid, 0, self.memory(), holdings=holdings))

    def memory(self):
        return WorkerMemory((len(self.has) + len(self.loading)) * MIB, self.budget, {str(model): MIB for model in self.has})

    def tell(self, event, delay=None):
        """The orchestrator hears of it, if it is still the same one."""
        orchestrator = self.plane.orchestrator
        self.plane.later(self.plane.delay() if delay is None else delay, lambda: orchestrator.hear(event))

    def die(self):
        """All its connections end at once; who has one hears of it soon."""
        if not self.is_alive:
            return
        self.is_alive, self.thaw_at = False, 0.0
        for answer in self.asked.values():
            self.plane.later(self.plane.delay(), lambda answer=answer: answer(Undelivered.LOST))
        for model in self.loading:
            self.tell(LoadCut(self.address, self.pid, model))
        self.tell(WorkerLeft(self.address), 0.02)
        self.plane.later(self.plane.random.uniform(0.5, 3.0), self.start)

    def freeze(self):
        if self.is_alive:
            self.thaw_at = self.plane.now + self.plane.random.uniform(0.1, 6.0)

    def when_awake(self, pid, deed):
        """Once it has time, if it is the same process still."""
        if self.is_alive and self.pid == pid:
            if self.thaw_at > self.plane.now:
                self.plane.later(self.thaw_at - self.plane.now + 1e-6, lambda: self.when_awake(pid, deed))  # past it for sure
            else:
                deed()

    def load(self, load):
        if self.is_alive and self.pid == load.pid:
            orchestrator, before = self.plane.orchestrator, self.loading.get(load.model)
            assert before is not orchestrator, f"{self.id} was told twice to load {load.model}"
            if load.model in self.has:  # by an orchestrator that is gone
                self.tell(Loaded(load.address, load.pid, load.model, self.has[load.model], self.memory()))
                return
            self.loading[load.model] = orchestrator
            if before is not None:
                return
            seconds = self.plane.random.uniform(0.05, 1.0)
            self.plane.later(seconds, lambda: self.when_awake(load.pid, lambda: self.end_load(load)))
        else:
            self.tell(LoadCut(load.address, load.pid, load.model))

    def end_load(self, load):
        """Who asked for it last hears of it."""
        if not self.loading.pop(load.model).is_alive:
            return
        which = load.address, load.pid, load.model
        if load.model.name == self.plane.broken:
            self.tell(LoadFailed(*which, "bad_model", "no"))
        elif self.plane.fails(0.05):
            self.tell(LoadCut(*which))
        elif not self.make_room():
            self.tell(LoadFailed(*which, MemoryFullError.code, "no room"))
        else:
            self.tell(Loaded(*which, self.open(load.model), self.memory()))

    def open(self, model):
        endpoint = self.has[model] = f"{self.id}/{self.pid}/{model}/{self.plane.serial()}"
        assert not self.budget or len(self.has) * MIB <= self.budget, f"{self.id} takes more memory than it may"
        self.plane.endpoints[endpoint] = self
        return endpoint

    def make_room(self):
        if self.budget and (len(self.has) + 1) * MIB > self.budget:
            if self.asked:
                return False
            model, endpoint = next(iter(self.has.items()))
            del self.has[model]
            self.tell(Evicting(self.address, self.pid, model, endpoint, self.memory()))
        return True

    def unload(self, unload):
        def free():
            self.has.pop(unload.model, None)
            self.tell(Unloaded(self.address, self.pid, unload.model, self.memory()))

        self.when_awake(unload.pid, free)

    def run(self, hop, answer):
        """A request that came in."""
        number, pid = self.plane.serial(), self.pid
        self.asked[number] = answer

        def end():
            if self.asked.pop(number, None) is not None:
                answer(self.plane.result(self, hop))

        def begin():
            self.plane.note("run", self.id, hop.body)
            self.plane.runs[hop.body] += 1
            if hop.body.startswith(b"poison") and not hop.alone:
                self.plane.deaths[hop.body] += 1
                self.die()
            else:
                self.plane.later(self.plane.random.uniform(0.001, 0.03), lambda: self.when_awake(pid, end))

        self.when_awake(pid, begin)


class Line:
    """In the place of the gateway's connection to one version of one worker."""

    plane = None

    def __init__(self, endpoint, _ring):
        self.endpoint, self.closed, self.in_flight = endpoint, False, 0

    def send(self, hop, done):
        self.in_flight += 1
        is_over = []

        def answered(reply):
            if is_over:
                return
            is_over.append(True)
            self.in_flight -= 1
            self.closed |= isinstance(reply, Undelivered)
            done(reply)

        self.plane.later(
            self.plane.delay(), lambda: self.arrive(hop, lambda reply: self.plane.later(self.plane.delay(), lambda: answered(reply)))
        )
        return lambda: None

    def arrive(self, hop, answer):
        worker = self.plane.endpoints.get(self.endpoint)
        if worker is None or not worker.is_alive or not self.endpoint.startswith(f"{worker.id}/{worker.pid}/"):
            answer(Undelivered.NOT_SENT)
        else:
            worker.run(hop, answer)

    @property
    def load(self):
        return self.in_flight

    def close(self):
        self.closed = True


class Orchestrator:
    """The plugin's part: events in, instructions out; pings; gateways that follow."""

    def __init__(self, plane):
        self.plane, self.state, self.news, self.health = plane, plane.make_state(plane.serial()), News(), Health()
        self.is_alive, self.ticking = True, False
        self.moved = asyncio.Event()
        plane.later(PERIOD, self.ping)

    def hear(self, event):
        if not self.is_alive:
            return
        plane, now = self.plane, self.plane.now
        plane.note(event)
        if isinstance(event, WorkerJoined):
            self.health.add(event.address, now)
        elif isinstance(event, WorkerLeft):
            self.health.remove(event.address)
        for instruction in self.state.handle(event, now):
            self.carry_out(instruction)
        plane.look_at(self.state, event)
        if not self.ticking and (self.state.unsettled or self.state.is_changing):
            self.ticking = True
            plane.later(2.0, self.tick)

    def tick(self):
        self.ticking = False
        self.hear(Tick())

    def carry_out(self, instruction):
        plane = self.plane
        match instruction:
            case Load() | Unload():
                worker = plane.by_address[instruction.address]
                plane.note(instruction)
                deed = worker.load if isinstance(instruction, Load) else worker.unload
                plane.later(plane.delay(), lambda: deed(instruction))
            case Push(_, change):
                self.news.add(change)
                self.moved.set()
                self.moved = asyncio.Event()
            case Configure() | Isolate():
                plane.note(instruction)

    def ping(self):
        if not self.is_alive:
            return
        now = self.plane.now
        for worker in self.plane.workers:
            if worker.is_alive and worker.thaw_at <= now and self.health.answered(worker.address, now):
                self.hear(WorkerBack(worker.address))
        for address in self.health.look(now):
            self.hear(WorkerSilent(address))
        self.health.next_look(now)
        self.plane.later(PERIOD, self.ping)

    async def follow(self, gateway):
        """Until it dies."""
        has, table = None, Table()
        while self.is_alive:
            if self.state.informed and self.state.table.seq != has:
                message = self.news.since(has, self.state.table)
                await asyncio.sleep(self.plane.delay() + (self.plane.random.uniform(0, 2.0) if self.plane.fails(0.1) else 0.0))
                if not self.is_alive:
                    break
                table, is_first = gateway.take(message, table), has is None
                has = table.seq
                if is_first:
                    for model in sorted(gateway.dispatch.used(), key=str):
                        self.hear(ModelWanted(model))
            else:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(1.0):
                        await self.moved.wait()


class Gateway:
    """The real dispatch, with what it needs of the orchestrator."""

    def __init__(self, plane, number):
        self.plane, self.number = plane, number
        self.dispatch = Dispatch(self, None)
        self.dispatch._open = Ordered()
        self.dispatch._traffic.chance, self.dispatch._traffic._name = plane.random, f"gateway-{number}"
        self.dispatch._suspicion._clock = plane.loop.time

    async def follow(self):
        while True:
            await self.plane.orchestrator.follow(self)
            await asyncio.sleep(0.2)

    def take(self, message, table):
        if "table" in message:
            table = msgspec.msgpack.decode(message["table"], type=Table)
            self.dispatch.replace_table(table)
            return table
        for each in message["changes"]:
            change = msgspec.msgpack.decode(each, type=TableChange)
            table = table.amended(change)
            self.dispatch.replace_table(table, change)
        return table

    async def want(self, model):
        orchestrator = await self.reach()
        orchestrator.hear(ModelWanted(model))
        found = orchestrator.state.table.models.get(model.name)
        version = found.versions.get(model.version) if found else None
        return (version.state, version.reason) if version else ("unloaded", "")

    async def quarantine(self, model, mark):
        (await self.reach()).hear(VersionIsolated(model) if mark is None else InputCondemned(model, mark))

    async def load(self, load):
        (await self.reach()).hear(load)

    async def reach(self):
        await asyncio.sleep(self.plane.delay())
        if not self.plane.orchestrator.is_alive:
            raise ServiceUnavailableError("away")
        return self.plane.orchestrator

    def ask(self, model, timeout, kind):
        body = f"{'impure' if model == self.plane.impure else kind} {self.plane.serial()}".encode()
        self.plane.open[body] = self.plane.now + timeout
        self.plane.note("ask", self.number, model, body)
        self.dispatch.infer(model, None, Hop(body, 0, timeout), lambda reply: self.plane.answered(body, reply))
        return body


class Plane:
    """One run. `make_state`: of the orchestrator with that epoch, for who wants to see what is found when it is wrong."""

    def __init__(self, seed, make_state=lambda epoch: ControlState(COPIES, epoch)):
        self.seed, self.random, self.loop, self.make_state = seed, random.Random(seed), VirtualLoop(), make_state
        self.trace, self._serial, self.is_calm = hashlib.blake2b(digest_size=8), 0, False
        self.open, self.answers, self.runs, self.deaths, self.endpoints = {}, {}, Counter(), Counter(), {}
        self.broken = self.random.choice([None, "m0"])
        self.impure = "m1"

    @property
    def now(self):
        return self.loop.now

    def serial(self):
        self._serial += 1
        return self._serial

    def later(self, seconds, deed):
        self.loop.call_later(seconds, self.do, deed)

    def do(self, deed):
        """What breaks ends the run: a callback's exception would only be logged."""
        try:
            deed()
        except Exception as error:  # whatever it is
            if not self.ended.done():
                self.ended.set_exception(error)

    def delay(self):
        return self.random.uniform(0.0005, 0.02)

    def fails(self, chance):
        return not self.is_calm and self.random.random() < chance

    def note(self, *what):
        self.trace.update(repr((round(self.now, 6), *what)).encode())

    def version(self, name):
        return ModelVersion(name, 1, Digest(f"{int(name[1:]):064x}"))

    def catalog(self, stream):
        infos = {name: ModelInfo("onnx", "onnx", SPECS, SPECS, batched=True, pure=name != self.impure, code=False) for name in self.names}
        models = {name: CatalogModel(name, 1, {}, {1: (self.version(name), info)}) for name, info in infos.items()}
        return CatalogChanged("tls://m", 1, models, stream)

    def result(self, worker, hop):
        if hop.body.startswith(b"poison"):
            error = PoisonInputError("it ends what runs it")
            return HopReply(error.http_status, encode_error(error))
        return HopReply(500, b"{}") if self.fails(0.02) else HopReply(200, worker.id.encode() + b" " + hop.body)

    def answered(self, body, reply):
        self.note("answer", body, reply.status)
        assert body not in self.answers, f"{body!r} was answered twice"
        assert body in self.open, f"{body!r} was answered, and never asked"
        assert self.now <= self.open.pop(body) + 0.2, f"{body!r} was answered after its deadline"
        assert reply.status != 200 or reply.body.endswith(body), f"{body!r} got the answer of another request"
        self.answers[body] = reply.status

    def look_at(self, state, event):
        """After each event: no route leads to who is gone, to who is silent only where all are that have the version; no version is
        loaded by more than are to have it.
        """
        table = state.table
        fit = {worker.id for worker in table.workers.values() if worker.state == "running"}
        known = {worker.id: worker for worker in state._workforce}
        for entry in table.models.values():
            for version in entry.versions.values():
                routes = {route.worker for route in version.routes}
                assert routes <= fit or not routes & fit, f"after {event}: beside others a route of {version.model} leads to {routes - fit}"
                assert routes <= known.keys(), f"after {event}: a route of {version.model} leads to who left"
                loading = [worker for worker in known.values() if version.model in worker.loading and worker.state == "running"]
                assert len(loading) <= COPIES, f"after {event}: {len(loading)} workers load {version.model} at once"
        if isinstance(event, WorkerLeft):
            assert all(worker.address != event.address for worker in known.values())

    def run(self):
        """Raises: AssertionError: something did not hold."""
        asyncio.set_event_loop(self.loop)
        self.ended = self.loop.create_future()
        silent = mock.Mock()
        Line.plane = self
        try:
            with (
                mock.patch.object(lines, "UnixTransport", Line),
                mock.patch.object(lines, "_make_ring", return_value=None),
                mock.patch.object(time, "monotonic", self.loop.time),
                mock.patch("tether.gateway.dispatch.log", silent),
                mock.patch("tether.gateway.traffic.log", silent),
            ):
                self.loop.run_until_complete(self.live())
        finally:
            asyncio.set_event_loop(None)
            self.loop.close()

    async def live(self):
        self.names = [f"m{number}" for number in range(self.random.randint(2, 4))]
        self.stream, self.orchestrator = 1, Orchestrator(self)
        self.workers = [Worker(self, number) for number in range(self.random.randint(2, 5))]
        self.by_address = {worker.address: worker for worker in self.workers}
        self.gateways = [Gateway(self, number) for number in range(2)]
        self.orchestrator.hear(self.catalog(self.stream))
        following = [asyncio.ensure_future(gateway.follow()) for gateway in self.gateways]
        story = asyncio.ensure_future(self.story())
        try:
            await asyncio.wait([story, self.ended], return_when=asyncio.FIRST_COMPLETED)
            for each in (self.ended, story):
                if each.done():
                    each.result()
        finally:
            story.cancel()
            for each in following:
                each.cancel()
            await asyncio.gather(story, *following, return_exceptions=True)
            for gateway in self.gateways:
                gateway.dispatch.close()
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

    async def story(self):
        end = self.now + STORM
        rate, faults = self.random.uniform(1.0, 6.0), self.random.uniform(0.1, 1.5)
        while self.now < end:
            await asyncio.sleep(self.random.expovariate(rate + faults))
            if self.random.random() < faults / (rate + faults):
                self.break_something()
            else:
                kind = "poison" if self.random.random() < 0.03 else "request"
                self.random.choice(self.gateways).ask(self.random.choice(self.names), self.random.uniform(0.3, 5.0), kind)
        await self.calm_down()

    def break_something(self):
        deed = self.random.choice(["die", "die", "freeze", "freeze", "orchestrator", "manager"])
        self.note(deed)
        worker = self.random.choice(self.workers)
        if deed == "die":
            worker.die()
        elif deed == "freeze":
            worker.freeze()
        elif deed == "manager":
            self.orchestrator.hear(ManagerLeft(self.stream))
            self.later(self.random.uniform(0.5, 4.0), self.manager_is_back)
        elif self.orchestrator.is_alive:
            self.orchestrator.is_alive = False
            self.later(self.random.uniform(0.2, 3.0), self.orchestrator_is_back)

    def manager_is_back(self):
        self.stream += 1
        self.orchestrator.hear(self.catalog(self.stream))

    def orchestrator_is_back(self):
        """It knows nothing: the workers register anew, with what they have, and the manager tells what there is."""
        self.orchestrator = Orchestrator(self)
        for worker in self.workers:
            if worker.is_alive:
                worker.when_awake(worker.pid, worker.register)
        self.later(self.random.uniform(0.1, 1.0), self.manager_is_back)

    async def calm_down(self):
        """Nothing fails any more: in the end each request was answered, and everything is as it should."""
        self.is_calm = True
        await asyncio.sleep(10.0)
        assert not self.open, f"never answered: {sorted(self.open)}"
        for body, count in self.runs.items():
            assert count == 1 or not body.startswith(b"impure"), f"{body!r} ran {count} times"
        assert max(self.deaths.values(), default=0) <= MOST_DEATHS, f"inputs went on ending workers: {self.deaths}"
        await asyncio.sleep(CALM - 10.0)
        await self.probe()

    async def probe(self):
        names = [name for name in self.names if name != self.broken]
        asked = [gateway.ask(name, 10.0, "probe") for gateway in self.gateways for name in names]
        await asyncio.sleep(12.0)
        answers = {body: self.answers.get(body) for body in asked}
        assert set(answers.values()) == {200}, f"in the end: {answers}"
        table = self.orchestrator.state.table
        for gateway in self.gateways:
            assert gateway.dispatch.table == table, f"gateway {gateway.number} has another table in the end"
        if not any(worker.budget for worker in self.workers):
            few = [name for name in names if len(table.resolve(name).routes) < COPIES]
            assert not few, f"in the end {few} have too few copies"
