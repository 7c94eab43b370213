"""A lab that lends and one that borrows, in one process: real stores and calls, a network that can be cut; the clusters are stand-ins."""

import asyncio
import contextlib
import gc
import itertools
import json
import shutil

import numpy as np
import pytest
import structlog
from aiohttp import web

from tether.config import DataFolder
from tether.errors import (
    ConfigError,
    ForbiddenError,
    LoadFailedError,
    NotFoundError,
    NoWorkerError,
    PeerUnreachableError,
    UnavailableError,
    UnknownModelError,
    UnsupportedError,
)
from tether.gateway.transport import UnixTransport
from tether.manager.operations import Operations
from tether.manager.peering import own_workers, readying
from tether.manager.peering.agreements import Agreements
from tether.manager.peering.gateway import Gateway
from tether.manager.peering.lines import Lines
from tether.manager.peering.members import Members
from tether.manager.peering.methods import Methods
from tether.manager.peering.presence import LabSide
from tether.manager.peering.pulling import Pulling, PullOptions
from tether.manager.peering.shelf import RepositoryShelf
from tether.manager.peering.subscriptions import Subscriptions
from tether.ports import Hop, HopReply, Undelivered
from tether.routing.table import Table, WorkerEntry
from tether.security.identity import Identity
from tether.security.scopes import Scope
from tether.store import Manifest, Repository, encode, signed_message
from tether.swarm.node.node import Standing
from tether.testing.memory_swarm import MemorySwarm
from tether.types import InferResponse, ModelInfo, ModelVersion, WorkerId
from tether.wire.oip import decode_response, encode_request

PATIENCE = 20.0
HERS, HIS = (Identity(bytes([number]) * 32) for number in (1, 2))
INFO = ModelInfo("custom", "custom", (), (), batched=False, pure=True, code=True)
BODY = b'{"model_name":"as it is called here","model_version":"1","outputs":[]}'


class Cluster:
    """What an orchestrator answers; a version that is wanted is loaded at the second look, unless there is a reason."""

    def __init__(self, workers):
        self.workers, self.loaded, self.seen, self.reason = workers, set(), set(), ""

    async def table(self):
        models = tuple(sorted(map(str, self.loaded)))
        names = [WorkerId(f"worker-{number}") for number in range(self.workers)]
        return Table(workers={name: WorkerEntry(name, "tls://", 1, "running", 0.0, 1, models) for name in names})

    async def want(self, model):
        if self.reason:
            return "failed", self.reason
        if model in self.seen:
            self.loaded.add(model)
        self.seen.add(model)
        return ("ready" if model in self.loaded else "loading"), ""


class Workers:
    """What runs the models, behind a gateway's address: it waits while it is told to."""

    def __init__(self):
        self.asked, self.cancelled, self.go = [], 0, asyncio.Event()
        self.go.set()

    async def serve(self):
        """Its address."""
        app = web.Application(client_max_size=64 << 20)
        app.router.add_post("/v2/models/{model}/versions/{version}/infer", self.run)
        self.runner = web.AppRunner(app, handler_cancellation=True)
        await self.runner.setup()
        site = web.TCPSite(self.runner, "127.0.0.1", 0)
        await site.start()
        return f"http://127.0.0.1:{self.runner.addresses[0][1]}"

    async def run(self, request):
        body, header_nbytes = await request.read(), int(request.headers["Inference-Header-Content-Length"])
        seconds = float(request.headers["X-Request-Timeout"])
        self.asked.append((*request.match_info.values(), json.loads(body[:header_nbytes])["model_name"], seconds))
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return web.Response(body=BODY)


class Lab:
    """One of two."""

    def __init__(self, folder, identity, swarm, workers):
        self.data, self.identity, self.swarm = DataFolder(folder), identity, swarm
        folder.mkdir()
        self.data.runtime.mkdir(parents=True, exist_ok=True)
        self.repository = Repository.open(folder / "store", own=identity.public)
        self.operations = Operations(self.repository, identity, folder / "publishing")
        self.cluster, self.workers, self.told = Cluster(workers), Workers(), []

    @property
    def key(self):
        return self.identity.public

    async def begin(self):
        """Its manager starts."""
        self.gateway = Gateway(await self.workers.serve())
        self.lines = Lines(self.operations, self.data)
        self.lines.join(self.cluster, self.told.append)
        members = Members(self.operations.access, self.lines.loans)
        self.methods = Methods(self.key, self.ask, self.repository, self.operations.access, self.gateway)
        self.methods.opens, self.methods.may = members.opens, members.may
        self.shelf = RepositoryShelf(self.repository, members)

        def knows(peer):
            return Standing.KNOWN if self.operations.access.scopes(peer) or members.knows(peer) else Standing.UNKNOWN

        self.node = await self.swarm.start(self.identity.seed, self.methods.service(), self.shelf, knows)
        self.pulling = Pulling(self.repository, self.node.blobs, self.data.root / "pulling", PullOptions(self.key))
        self.lines.begin(self.node, self.methods, self.pulling, lambda: None)

    async def end(self):
        """It ends, in order."""
        await self.lines.aclose()
        await self.node.aclose()
        await self.gateway.aclose()
        await self.workers.runner.cleanup()
        self.pulling.close()
        self.shelf.close()

    def close(self):
        self.operations.close()
        self.repository.close()

    async def ask(self, operation, **arguments):
        return await self.operations.handlers()[operation](**arguments)

    async def call(self, operation, *arguments):
        return await self.lines.handlers()[operation](*arguments)

    def allow(self, other, *scopes):
        self.operations.access.allow(other.key, map(Scope.parse, scopes))

    def publish(self, name):
        arrays = (self.repository.add_bytes("model.py", np.random.default_rng(len(name)).bytes(200_000)),)
        data = encode(Manifest(framework="custom", entry="model.py", info=INFO, arrays=arrays))
        record = self.repository.publish(name, data, self.key, self.identity.sign(signed_message(data)))
        self.methods.changed()
        return ModelVersion(name, record.version, record.digest)


@pytest.fixture(autouse=True)
def quiet():
    with structlog.testing.capture_logs():
        yield


@pytest.fixture
async def labs(tmp_path):
    """Hers has the models and may be lent to by his, which has two workers and trusts her code."""
    async with MemorySwarm() as swarm:
        hers, his = Lab(tmp_path / "hers", HERS, swarm, 0), Lab(tmp_path / "his", HIS, swarm, 2)
        hers.allow(his, "register")
        his.repository.trust(hers.key, ["code"])
        await asyncio.gather(hers.begin(), his.begin())
        yield hers, his
        await asyncio.gather(hers.end(), his.end())
    hers.close()
    his.close()


async def until(condition):
    async with asyncio.timeout(PATIENCE):
        while not (found := condition()):  # noqa: ASYNC110 (nothing says when another lab has got so far)
            await asyncio.sleep(0.01)
    return found


@contextlib.asynccontextmanager
async def gateway_to(endpoint):
    transport = UnixTransport(str(endpoint), None)
    try:
        yield transport
    finally:
        transport.close()


def send(transport, timeout=PATIENCE):
    """A request, and what takes it back."""
    answer = asyncio.get_running_loop().create_future()
    body, header_nbytes = encode_request({"x": np.ones((1, 2), np.float32)})
    return answer, transport.send(Hop(body, header_nbytes, timeout), lambda reply: answer.done() or answer.set_result(reply))


async def load(lab, model):
    (worker,) = lab.told[-1]
    return await lab.lines.borrower.load(worker.id, worker.number, model)


async def test_what_is_lent_stands_there_and_runs_a_version_that_is_fetched_for_it(labs):
    hers, his = labs
    model = hers.publish("digits")
    loan = await his.call("lend", hers.key, "dig*", 5)
    assert (loan["state"], loan["slots"], loan["models"]) == ("registered", 5, "dig*")
    ((worker,),) = hers.told
    assert (worker.id, worker.peer, worker.gpus, worker.slots, worker.models) == (loan["worker"], his.key, 2, 5, "dig*")
    async with gateway_to(await load(hers, model)) as transport:
        assert await load(hers, model) == await load(hers, model)
        reply = await send(transport)[0]
        assert isinstance(reply, HopReply)
        assert decode_response(reply.body, reply.header_nbytes) == InferResponse("digits", 1, {})
    ((name, version, asked, seconds),) = his.workers.asked
    assert (name, version, asked) == (f"{hers.key[:12]}~digits", "1", f"{hers.key}~digits:sha-{model.digest}")
    assert 0 < seconds <= PATIENCE
    (row,) = await hers.call("borrowings")
    assert (row["worker"], row["slots"], row["gpus"]) == (worker.id, 5, 2)
    assert hers.lines.loans.given == {his.key: {"digits"}}
    await hers.lines.borrower.unload(worker.id, worker.number, model)
    assert hers.lines.loans.given == {}
    await his.call("end_lending", hers.key)
    assert hers.told[-1] == ()
    with pytest.raises(NotFoundError):
        await hers.lines.borrower.load(worker.id, worker.number, model)


async def test_who_was_a_stranger_before_is_taken_for_what_it_is_since(labs):
    hers, his = labs
    await his.node.request(hers.key, "ping", b"", PATIENCE)  # on a connection of his to somebody who has nothing to ask
    model = hers.publish("digits")
    await his.call("lend", hers.key)
    large = np.ones((1 << 20, 4), np.float32)
    body, header_nbytes = encode_request({"x": large})
    async with gateway_to(await load(hers, model)) as transport:
        answer = asyncio.get_running_loop().create_future()
        transport.send(Hop(body, header_nbytes, PATIENCE), answer.set_result)
        reply = await answer
        assert isinstance(reply, HopReply)
        assert (reply.status, reply.body[:1]) == (200, b"{")
        many = await asyncio.gather(*(send(transport)[0] for _ in range(40)))
        assert {each.status for each in many} == {200}


@pytest.mark.parametrize("binary", [True, False])
async def test_a_request_in_plain_json_may_be_as_large_as_one_in_binary(labs, binary):
    hers, his = labs
    model = hers.publish("digits")
    await his.call("lend", hers.key)
    body, header_nbytes = encode_request({"x": np.zeros((5 << 20, 1), np.float32)}, binary=binary)
    assert len(body) > 17 << 20
    async with gateway_to(await load(hers, model)) as transport:
        answer = asyncio.get_running_loop().create_future()
        transport.send(Hop(body, header_nbytes, PATIENCE), answer.set_result)
        assert (await answer).status == 200


async def test_who_may_run_a_model_is_told_how_it_stands(labs):
    hers, his = labs
    mine = his.publish("faces")
    his.publish("others")
    his.allow(hers, "infer:faces")

    async def capacity(name):
        return json.loads(await hers.node.request(his.key, "capacity", json.dumps({"model": name}).encode(), PATIENCE))

    stands = {"slots": 64, "queue": 0.0, "cached": True, "loaded": False, "error": None}
    assert await capacity("faces") == stands
    his.cluster.loaded.add(mine)
    await asyncio.sleep(1.1)  # what the orchestrator said is good for a second
    assert await capacity("faces") == stands | {"loaded": True}
    with pytest.raises(UnknownModelError):
        await capacity("others")


async def test_what_cannot_be_loaded_says_why(labs):
    hers, his = labs
    model, other = hers.publish("digits"), hers.publish("faces")
    await his.call("lend", hers.key, "dig*")
    with pytest.raises(UnsupportedError, match=r"dig\*"):
        await load(hers, other)
    with pytest.raises(UnsupportedError):
        await load(hers, ModelVersion("alice~digits", 1, model.digest))
    his.cluster.reason = "load_failed: the memory is full"
    with pytest.raises(LoadFailedError, match="memory is full"):
        await load(hers, model)
    assert hers.lines.loans.given == {}
    his.cluster.reason = ""
    assert await load(hers, model)


async def test_a_line_that_is_cut_loses_what_is_under_way_and_comes_back_by_itself(labs):
    hers, his = labs
    model = hers.publish("digits")
    await his.call("lend", hers.key)
    async with gateway_to(await load(hers, model)) as transport:
        his.workers.go.clear()
        answer, _ = send(transport)
        await until(lambda: his.workers.asked)
        (before,) = hers.told[-1]
        hers.swarm.separate(hers.key, his.key)
        assert await answer is Undelivered.LOST
        assert hers.told[-1] == ()
    hers.swarm.reunite(hers.key, his.key)
    his.workers.go.set()
    ((after,),) = await until(lambda: [told for told in hers.told[-1:] if told])
    assert (after.id, after.number > before.number) == (before.id, True)
    async with gateway_to(await load(hers, model)) as transport:
        assert isinstance(await send(transport)[0], HopReply)


async def test_a_lab_that_is_about_to_end_loses_nothing_and_takes_nothing_any_more(labs):
    hers, his = labs
    model = hers.publish("digits")
    await his.call("lend", hers.key, "*", 1)
    async with gateway_to(await load(hers, model)) as transport:
        his.workers.go.clear()
        runs = send(transport)[0]
        await until(lambda: his.workers.asked)
        waits = send(transport)[0]
        await until(lambda: his.lines._lender._labs[hers.key].turnstile._waiting)
        his.methods.leave()
        await his.lines.retire(PATIENCE)
        retiring = asyncio.create_task(his.node.retire(PATIENCE))
        assert await waits is Undelivered.NOT_SENT
        assert await send(transport)[0] is Undelivered.NOT_SENT
        assert hers.told[-1] == ()
        his.workers.go.set()
        assert isinstance(await runs, HopReply)
        await retiring


@pytest.mark.parametrize("who", ["lends", "borrows"])
async def test_what_is_made_ready_ends_with_the_lending(labs, who):
    hers, his = labs
    model = hers.publish("digits")
    await his.call("lend", hers.key)
    begun, ended, pulled = asyncio.Event(), asyncio.Event(), his.pulling.pull

    async def pull(*_):
        begun.set()
        try:
            return await asyncio.Event().wait()
        finally:
            ended.set()

    his.pulling.pull = pull
    loading = asyncio.create_task(load(hers, model))
    await begun.wait()
    if who == "lends":
        await his.call("end_lending", hers.key)
    else:
        hers.operations.access.revoke(his.key)
        hers.lines.less(his.key)
    async with asyncio.timeout(PATIENCE):
        await ended.wait()
    with pytest.raises(NotFoundError):
        await loading
    his.pulling.pull = pulled


async def test_who_says_at_once_that_it_is_not_ready_is_not_asked_at_once_again(labs, monkeypatch):
    hers, his = labs
    model, clock = hers.publish("digits"), asyncio.get_running_loop().time
    await his.call("lend", hers.key)
    asked, ask = [], hers.lines.borrower._asked

    async def noted(*arguments):
        asked.append(clock())  # here, not there: the way takes now this long, now that
        return await ask(*arguments)

    async def capacity(_peer, _wanted):
        return readying.Readiness(1, 0.0, cached=True, loaded=len(asked) == 3)

    monkeypatch.setattr(hers.lines.borrower, "_asked", noted)
    monkeypatch.setattr(his.methods.running.lender, "capacity", capacity)
    await load(hers, model)
    assert [later - earlier >= 0.4 for earlier, later in itertools.pairwise(asked)] == [True, True]


async def test_what_nobody_asks_for_any_more_is_not_made_ready(labs, monkeypatch):
    hers, his = labs
    monkeypatch.setattr(readying, "_UNASKED", 0.2)
    model = hers.publish("digits")
    await his.call("lend", hers.key)
    wanted = asyncio.Event()

    async def never(_):
        wanted.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(his.cluster, "want", never)
    loading = asyncio.create_task(load(hers, model))
    await wanted.wait()
    (job,) = his.lines._readying._jobs.values()
    (worker,) = hers.told[-1]
    await hers.lines.borrower.unload(worker.id, worker.number, model)
    with pytest.raises(NotFoundError):
        await loading
    await until(job.task.cancelled)


async def test_a_version_that_the_other_lab_deletes_is_told_and_loaded_again(labs):
    hers, his = labs
    model = hers.publish("digits")
    await his.call("lend", hers.key)
    async with gateway_to(first := await load(hers, model)) as transport:
        his.repository.delete_version(f"{hers.key[:12]}~digits", 1)
        assert [await send(transport)[0] for _ in range(2)] == [Undelivered.NOT_SENT] * 2
        assert hers.told[-1][0].closed == (str(first),)
    async with gateway_to(again := await load(hers, model)) as transport:
        assert hers.told[-1][0].closed == ()
        assert isinstance(await send(transport)[0], HopReply)
    assert again != first


async def test_a_lab_without_a_request_that_is_about_to_end_is_out_at_once(labs):
    hers, his = labs
    await his.call("lend", hers.key)
    his.methods.leave()
    await his.lines.retire(PATIENCE)
    await until(lambda: not hers.told[-1])


async def test_a_lab_that_borrows_and_is_about_to_end_waits_for_what_runs_elsewhere(labs):
    hers, his = labs
    model = hers.publish("digits")
    await his.call("lend", hers.key)
    async with gateway_to(await load(hers, model)) as transport:
        his.workers.go.clear()
        runs = send(transport)[0]
        await until(lambda: his.workers.asked)
        retiring = asyncio.create_task(hers.lines.retire(PATIENCE))
        await until(lambda: not hers.told[-1])
        assert await send(transport)[0] is Undelivered.NOT_SENT
        his.workers.go.set()
        assert isinstance(await runs, HopReply)
        await retiring


async def test_who_gives_up_a_request_ends_it_in_the_other_lab(labs):
    hers, his = labs
    model = hers.publish("digits")
    await his.call("lend", hers.key)
    async with gateway_to(await load(hers, model)) as transport:
        his.workers.go.clear()
        _, abandon = send(transport)
        await until(lambda: his.workers.asked)
        abandon()
        await until(lambda: his.workers.cancelled == 1)


async def test_no_more_requests_run_than_slots_are_lent(labs):
    hers, his = labs
    model = hers.publish("digits")
    await his.call("lend", hers.key, "*", 2)
    async with gateway_to(await load(hers, model)) as transport:
        his.workers.go.clear()
        answers = [send(transport)[0] for _ in range(12)]
        refused = await until(lambda: [answer for answer in answers if answer.done()])
        assert [answer.result() for answer in refused] == 2 * [Undelivered.NOT_SENT]
        await until(lambda: len(his.workers.asked) == 2)  # eight wait in turn
        his.workers.go.set()
        replies = await asyncio.gather(*answers)
        assert sum(isinstance(reply, HopReply) for reply in replies) == 10


async def test_it_is_told_when_the_workers_are_others_than_before(labs):
    hers, his = labs
    await his.call("lend", hers.key)
    assert hers.told[-1][0].slots == 64
    his.cluster.workers = 3
    await until(lambda: hers.told[-1] and hers.told[-1][0].slots == 96)
    his.cluster.workers = 0
    await until(lambda: not hers.told[-1])
    assert (await his.call("lendings"))[0]["error"][0] == "no_worker"
    his.cluster.workers = 1
    await until(lambda: hers.told[-1])


async def test_a_lab_that_forgot_is_registered_with_again(labs):
    hers, his = labs
    await his.call("lend", hers.key)
    await hers.end()
    assert hers.told[-1] == ()
    await hers.begin()
    await until(lambda: hers.told[-1])


async def test_what_is_lent_is_remembered_and_goes_on_after_a_restart(labs):
    hers, his = labs
    await his.call("lend", hers.key, "dig*", 7)
    await his.end()
    await until(lambda: not hers.told[-1])
    await his.begin()
    assert his.lines.lends
    ((worker,),) = await until(lambda: [told for told in hers.told[-1:] if told])
    assert (worker.slots, worker.models) == (7, "dig*")


async def test_a_scope_that_is_taken_while_it_registers_is_not_overlooked(labs):
    hers, his = labs
    pinged, go = asyncio.Event(), asyncio.Event()
    ping = hers.lines.borrower._request

    async def slowly(*arguments, **options):
        pinged.set()
        await go.wait()
        return await ping(*arguments, **options)

    hers.lines.borrower._request = slowly
    lending = asyncio.create_task(his.call("lend", hers.key))
    await pinged.wait()
    hers.operations.access.revoke(his.key)
    hers.lines.less(his.key)
    go.set()
    with pytest.raises(ForbiddenError, match="--scope register"):
        await lending
    assert hers.told == []
    assert await his.call("lendings") == []


async def test_one_that_is_not_there_or_has_no_worker_is_not_remembered(labs):
    hers, his = labs
    hers.swarm.separate(hers.key, his.key)
    his.node.cut(hers.key)
    with pytest.raises(PeerUnreachableError):
        await his.call("lend", hers.key)
    his.cluster.workers = 0
    await asyncio.sleep(1.1)  # what the orchestrator said is good for a second
    with pytest.raises(NoWorkerError):
        await his.call("lend", hers.key)
    assert not his.lines.lends


def held_back(hers):
    """Her questions wait: whether there was one, and what lets them go on."""
    asked, go, request = asyncio.Event(), asyncio.Event(), hers.lines.borrower._request

    async def slowly(*arguments, **options):
        asked.set()
        await go.wait()
        return await request(*arguments, **options)

    hers.lines.borrower._request = slowly
    return asked, go


async def test_who_lends_again_is_told_how_it_is_now_and_not_what_was_wrong_before(labs):
    hers, his = labs
    await his.call("lend", hers.key)
    hers.operations.access.revoke(his.key)
    hers.lines.less(his.key)
    async with asyncio.timeout(PATIENCE):
        while not (await his.call("lendings"))[0]["error"]:  # noqa: ASYNC110 (as in `until`)
            await asyncio.sleep(0.01)
    hers.allow(his, "register")
    assert (await his.call("lend", hers.key))["state"] == "registered"


async def test_other_terms_are_not_confirmed_by_the_answer_to_those_before(labs):
    hers, his = labs
    asked, go = held_back(hers)
    first = asyncio.create_task(his.call("lend", hers.key, "dig*", 5))
    await asked.wait()
    second = asyncio.create_task(his.call("lend", hers.key, "*", 7))
    await until(lambda: his.lines.loans.terms[hers.key] == "*")
    go.set()
    assert [(loan["models"], loan["slots"]) for loan in await asyncio.gather(first, second)] == [("*", 7)] * 2
    assert hers.told[-1][0].slots == 7


async def test_what_fails_when_nobody_waits_for_it_any_more_is_no_bug_in_the_log(labs):
    hers, his = labs
    model, unheard = hers.publish("digits"), []
    await his.call("lend", hers.key)
    asyncio.get_running_loop().set_exception_handler(lambda _, context: unheard.append(context))
    wanted = json.dumps({"model": "digits", "version": 1, "digest": model.digest, "load": True, "wait": 0}).encode()
    assert json.loads(await hers.node.request(his.key, "capacity", wanted, PATIENCE))["error"] is None
    await until(lambda: not his.lines._readying._jobs)  # she gives it only what she has asked to be loaded
    his.cluster.reason = "load_failed: the memory is full"
    loading = asyncio.create_task(load(hers, model))
    await until(lambda: hers.lines.borrower._loading)
    loading.cancel()
    await until(lambda: not hers.lines.borrower._loading)
    del loading
    gc.collect()
    assert unheard == []


async def test_a_worker_that_dies_while_it_loads_is_waited_for_as_long_as_one_that_has_not_begun(monkeypatch):
    monkeypatch.setattr(own_workers, "_PLACED", 1.0)
    monkeypatch.setattr(own_workers, "_AT_LAST", 0.05)
    clock, began = asyncio.get_running_loop().time, asyncio.get_running_loop().time()
    seen = set()

    class Dies(Cluster):
        async def want(self, model):  # noqa: ARG002 (as of the others)
            state = "loading" if not seen or clock() < began + 1.2 else "unloaded" if "unloaded" not in seen else "ready"
            seen.add(state)
            return state, ""

    await own_workers.OwnWorkers(Dies(1)).load(ModelVersion("digits", 1, "0" * 64))
    assert seen == {"loading", "unloaded", "ready"}


async def test_who_registers_while_the_other_lab_leaves_the_swarm_is_not_taken(labs):
    hers, his = labs
    asked, go = held_back(hers)
    lending = asyncio.create_task(his.call("lend", hers.key))
    await asked.wait()
    await hers.lines.aclose()
    go.set()
    with pytest.raises(UnavailableError, match="leaves the swarm"):  # of the first try, or, where the disk is slow, of the next one
        await lending
    assert hers.told == []


async def test_a_version_whose_socket_cannot_be_made_is_not_open_to_who_would_have_run_it(labs):
    hers, his = labs
    model = hers.publish("digits")
    await his.call("lend", hers.key)
    shutil.rmtree(hers.data.runtime)
    with pytest.raises(ConfigError):
        await load(hers, model)
    assert hers.lines.loans.given == {}


async def test_a_lab_that_only_lends_goes_through_the_relays_of_those_whom_it_lends_to(labs, tmp_path):
    hers, his = labs
    subscriptions, agreements = Subscriptions(tmp_path / "subscriptions.json"), Agreements(tmp_path / "copies.json")
    others = dict.fromkeys(("ask", "gateway", "members", "offering", "staged", "changed"))
    lab = LabSide(his.data, his.operations, subscriptions=subscriptions, agreements=agreements, lines=his.lines, **others)
    assert lab.acquaintances() == set()
    await his.call("lend", hers.key)
    assert lab.acquaintances() == {hers.key}


async def test_what_is_lent_is_no_reason_to_be_on_the_swarm_where_there_are_no_workers(labs):
    hers, his = labs
    await his.call("lend", hers.key)
    assert his.lines.lends
    alone = Lines(his.operations, his.data)
    alone.join(None, his.told.append)
    assert not alone.lends
