"""Two managers of one cluster, each with a data folder of its own, as real processes: who writes, who follows, who takes over."""

import asyncio
import base64
import contextlib
import os
import shutil
import signal
import socket
import sqlite3
import sys
import time
from pathlib import Path

import dask.config
import pytest
from blake3 import blake3
from starvation import Watch

from tether.client.cluster import ManagerClient, OrchestratorClient
from tether.config import HOUSEKEEPING, DataFolder
from tether.errors import MissingBlobsError, UnknownModelError
from tether.manager.peering.agreements import Agreements
from tether.manager.peering.feed_memory import begun, load_memory, save_memory
from tether.manager.peering.subscriptions import Subscription, Subscriptions
from tether.orchestrator.lease import LEASE
from tether.routing.table import Table
from tether.security.identity import Identity
from tether.security.tls import ensure_tls
from tether.store import ArrayEntry, Manifest, Repository, Segment, digest_of, encode, signed_message
from tether.swarm.feeds.state import FeedState, FeedStates
from tether.testing.requirements import needs
from tether.types import ModelInfo, TensorSpec

PROMPT = 120.0
"""Seconds until a wait is given up, which a busy machine may need for the start of a process; no promise."""
TAKE_OVER = 10.0
SPEC = TensorSpec("x", "FP32", (-1, 4))
INFO = ModelInfo("onnx", "onnx", (SPEC,), (SPEC,), batched=True, pure=True, code=False)
ALICE = Identity(bytes(range(32)))


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


class Service:
    """A process that can be killed, stopped and started again."""

    def __init__(self, *arguments):
        self.arguments, self.process = [str(each) for each in arguments], None

    async def start(self, *more):
        self.process = await asyncio.create_subprocess_exec(sys.executable, "-m", "tether", *self.arguments, *more)

    def send(self, number):
        self.process.send_signal(number)

    async def kill(self):
        if self.process is not None and self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()
            await self.process.wait()

    async def end(self):
        self.send(signal.SIGTERM)
        await asyncio.wait_for(self.process.wait(), PROMPT)


class Cluster:
    """An orchestrator, managers `a` and `b`, and a client of the gateway's kind."""

    def __init__(self, root):
        self.root, self.port = root, free_port()
        self.address = f"tls://127.0.0.1:{self.port}"
        first = DataFolder(root / "orchestrator").create()
        self.tls = ensure_tls(first.tls, "gateway")
        for role in ("orchestrator", "manager"):
            ensure_tls(first.tls, role)
        self.orchestrator = Service("orchestrator", "--data", first.root, "--port", self.port)
        self.managers, self.addresses = {}, {}
        for name in "ab":
            shutil.copytree(first.tls, root / name / "tls")
            port = free_port()
            self.addresses[name] = f"tls://127.0.0.1:{port}"
            self.managers[name] = Service("manager", self.address, "--data", root / name, "--port", port, "--no-swarm")
        self.table, self.pushed = Table(), asyncio.Event()

    async def __aenter__(self):
        await self.orchestrator.start()
        self.link = OrchestratorClient(self.address, self.tls, self.replace, list)
        self.client = ManagerClient(lambda: self.table.manager, self.reflects, self.tls)
        self.following = asyncio.create_task(self.link.start(PROMPT))
        return self

    async def __aexit__(self, *_):
        self.following.cancel()
        await asyncio.gather(self.following, return_exceptions=True)
        await self.client.close()
        await self.link.close()
        for service in (*self.managers.values(), self.orchestrator):
            await service.kill()

    def replace(self, table, _change):
        self.table = table
        self.pushed.set()

    async def reflects(self, _change):
        pass

    async def until(self, condition, seconds=PROMPT):
        deadline = time.monotonic() + seconds
        while not (found := condition()):
            assert time.monotonic() < deadline, f"not true after {seconds} s"
            await asyncio.sleep(0.02)
        return found

    async def writes(self, name):
        await self.until(lambda: self.table.manager == self.addresses[name])

    async def start(self, name):
        await self.managers[name].start()

    def pids(self):
        """Of all that has a part in a take-over, this process too."""
        return [os.getpid(), *(each.process.pid for each in (self.orchestrator, *self.managers.values()) if each.process is not None)]

    def lease(self):
        path = self.root / "orchestrator" / "lease.json"
        return path.read_text() if path.exists() else ""

    async def in_step(self, name):
        """The store of `name` is one that may take over."""
        await self.until(lambda: (member := self.member(name)) and f'"in_step":["{member}"]' in self.lease())

    def member(self, name):
        return rows(self.root / name, "SELECT json_extract(value, '$.member') FROM meta WHERE key = 'footing'")

    async def both(self):
        """Both started at once: who writes, and who is in step with it."""
        await asyncio.gather(self.start("a"), self.start("b"))
        address = await self.until(lambda: self.table.manager)
        writer, follower = ("a", "b") if address == self.addresses["a"] else ("b", "a")
        await self.in_step(follower)
        return writer, follower

    async def agree(self):
        """Both catalogs say the same."""
        await self.until(lambda: history(self.root / "a") == history(self.root / "b"))

    async def publish(self, number, name="net"):
        """A version whose one file says its number."""
        data = f"weights {number} ".encode() * 500
        digest = blake3(data).hexdigest()
        array = ArrayEntry("files/m", "uint8", (len(data),), (Segment(digest, 0, len(data)),))
        manifest = encode(Manifest(framework="onnx", entry="m", info=INFO, arrays=(array,)))
        body = {
            "manifest": base64.b64encode(manifest).decode(),
            "publisher": ALICE.public,
            "signature": ALICE.sign(signed_message(manifest)).hex(),
        }
        while True:
            await self.client.put_blob(digest, data)
            with contextlib.suppress(MissingBlobsError):  # staged at one that writes no more
                answer = await self.client.publish(name, body)
                return answer["version"], digest_of(manifest), digest, data

    async def assert_all_there(self, published):
        described = await self.client.model(f"{ALICE.public[:12]}~net")
        numbers = {each["version"]: each["digest"] for each in described["versions"]}
        assert len(numbers) == len(described["versions"])
        for version, manifest, digest, data in published:
            assert numbers[version] == manifest
            assert await self.client.get_blob(digest) == data


def rows(folder, query):
    """The first value of a query to a store's catalog, which its manager goes on writing; None: there is none."""
    path = Path(folder) / "store" / "catalog.sqlite"
    if not path.exists():
        return None
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=10)) as db:
        try:
            row = db.execute(query).fetchone()
        except sqlite3.OperationalError:
            return None
    return row[0] if row else None


def all_rows(path, query):
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=10)) as db:
        return db.execute(query).fetchall()


def history(folder):
    """Names, numbers, digests, aliases and their history, next numbers."""
    path = Path(folder) / "store" / "catalog.sqlite"
    queries = (
        "SELECT publisher, name, version, digest, created FROM versions JOIN models ON id = model ORDER BY 1, 2, 3",
        "SELECT publisher, name, next FROM models ORDER BY 1, 2",
        "SELECT name, alias, version FROM aliases JOIN models ON id = model ORDER BY 1, 2",
        "SELECT name, alias, version FROM alias_history JOIN models ON models.id = model ORDER BY alias_history.id",
        "SELECT publisher, scope FROM trust ORDER BY 1, 2",
    )
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=10)) as db:
        return [db.execute(query).fetchall() for query in queries]


@pytest.fixture
async def cluster(tmp_path):
    with dask.config.set(HOUSEKEEPING):
        async with Cluster(tmp_path) as cluster:
            yield cluster


class Load:
    """One who publishes again and again, and one who reads: neither sees a failure."""

    def __init__(self, cluster):
        self.cluster, self.published, self.slowest, self.reads = cluster, [], 0.0, 0

    async def __aenter__(self):
        self.tasks = [asyncio.create_task(self.write()), asyncio.create_task(self.read())]
        return self

    async def __aexit__(self, *_):
        for task in self.tasks:
            task.cancel()
        for outcome in await asyncio.gather(*self.tasks, return_exceptions=True):
            if not isinstance(outcome, asyncio.CancelledError):
                raise outcome

    async def write(self):
        number = 0
        while True:
            number += 1
            watch = Watch(self.cluster.pids)
            self.published.append(await self.cluster.publish(number))
            self.slowest = max(self.slowest, watch.seconds())
            await asyncio.sleep(0.02)  # the machine has other tests to run

    async def read(self):
        while True:
            if self.published:
                _, _, digest, data = self.published[len(self.published) // 2]
                assert await self.cluster.client.get_blob(digest) == data
                self.reads += 1
            await asyncio.sleep(0.05)

    async def more(self, count=3):
        """So many were published from now on."""
        before = len(self.published)
        await self.cluster.until(lambda: any(task.done() for task in self.tasks) or len(self.published) >= before + count)
        for task in self.tasks:
            if task.done():
                task.result()


@pytest.mark.chaos
async def test_row_13_a_writer_that_is_killed_with_its_disk_loses_nothing_that_was_acknowledged(cluster, chaos, measured):
    started, times = time.monotonic(), []
    writer, follower = await cluster.both()
    async with Load(cluster) as load:
        for _ in range(chaos.count(5, 2)):
            await load.more()
            await cluster.in_step(follower)
            await cluster.managers[writer].kill()
            killed = Watch(cluster.pids)
            shutil.rmtree(cluster.root / writer / "store")
            await cluster.writes(follower)
            await load.more(1)
            times.append(killed.seconds())
            await cluster.start(writer)
            writer, follower = follower, writer
            await cluster.in_step(follower)
    await cluster.assert_all_there(load.published)
    assert max(times) <= TAKE_OVER
    assert load.slowest <= TAKE_OVER + 5
    assert load.reads
    await cluster.agree()
    counts = (
        f"{len(times)} take-overs in {', '.join(f'{each:.1f}' for each in times)} s, {len(load.published)} publishes, {load.reads} reads"
    )
    measured(counts + f", slowest publish {load.slowest:.1f} s")
    chaos.record(13, counts + ", 0 lost", time.monotonic() - started)


async def test_a_writer_that_was_stopped_for_a_while_follows_when_it_goes_on(cluster, measured):
    writer, follower = await cluster.both()
    async with Load(cluster) as load:
        await load.more()
        cluster.managers[writer].send(signal.SIGSTOP)
        stopped = time.monotonic()
        await cluster.writes(follower)
        await load.more()
        measured(f"writer stopped: taken over and published in {time.monotonic() - stopped:.1f} s")
        cluster.managers[writer].send(signal.SIGCONT)
        await load.more()
        await cluster.in_step(writer)
    await cluster.assert_all_there(load.published)
    await cluster.agree()


async def test_the_writer_goes_on_over_restarts_of_the_orchestrator_of_its_follower_and_of_itself(cluster):
    writer, follower = await cluster.both()
    async with Load(cluster) as load:
        await load.more()
        lease = cluster.lease()
        await cluster.orchestrator.kill()
        await cluster.orchestrator.start()
        await load.more()
        await cluster.in_step(follower)
        assert cluster.lease() == lease
        await cluster.managers[follower].kill()
        await load.more()
        await cluster.start(follower)
        await cluster.in_step(follower)
        assert cluster.table.manager == cluster.addresses[writer]
        await cluster.managers[writer].kill()
        await cluster.start(writer)
        await load.more()
    await cluster.assert_all_there(load.published)
    await cluster.agree()


@needs("pythonmonkey")
async def test_a_late_follower_becomes_of_the_same_lab_fetches_everything_and_may_sign_after_a_clean_hand_over(cluster):
    for manager in cluster.managers.values():
        manager.arguments.remove("--no-swarm")  # which invites nobody
    await cluster.start("a")
    await cluster.writes("a")
    published = [await cluster.publish(number) for number in range(5)]
    await cluster.client.set_alias(f"{ALICE.public[:12]}~net", "prod", 2)
    await cluster.client.set_alias(f"{ALICE.public[:12]}~net", "prod", 3)
    await cluster.client.delete_version(f"{ALICE.public[:12]}~net", 5)
    await cluster.client.trust(ALICE.public, ["code"])
    invited = await cluster.client.invite(["infer:net"], "30d", 2, "")
    await cluster.start("b")
    await cluster.in_step("b")
    assert history(cluster.root / "a") == history(cluster.root / "b")
    await cluster.client.allow(ALICE.public, ["replicate"])  # it is answered when the follower has it
    assert all_rows(cluster.root / "b" / "access.sqlite", "SELECT key, scopes FROM peers") == [(ALICE.public, "replicate")]
    await cluster.managers["a"].end()
    handed_over = Watch(cluster.pids)
    await cluster.writes("b")
    assert handed_over.seconds() < TAKE_OVER / 2
    await cluster.assert_all_there(published[:4])
    answer = await cluster.client.rollback(f"{ALICE.public[:12]}~net", "prod")
    assert (answer["from"], answer["to"]) == (3, 2)
    assert [(each["id"], each["uses"]) for each in await cluster.client.invitations()] == [(invited["id"], 2)]
    assert list((await cluster.client.disallow(ALICE.public, None))["taken"]) == ["replicate"]
    version, *_ = await cluster.publish("after")
    assert version == 6
    identities = [Identity.load_or_create(DataFolder(cluster.root / name).identity).public for name in "ab"]
    assert identities[0] == identities[1]
    assert DataFolder(cluster.root / "b").identity.stat().st_mode & 0o77 == 0
    await cluster.managers["b"].end()
    with Repository.open(cluster.root / "b" / "store") as store:
        assert not store.verify().problems


async def test_a_manager_of_another_lab_ends_instead_of_following(cluster):
    other = DataFolder(cluster.root / "b").create()
    identity = Identity.load_or_create(other.identity)
    with Repository.open(other.store, own=identity.public) as store:
        data = encode(Manifest(framework="onnx", entry="m", info=INFO, arrays=(store.add_bytes("m", b"weights"),)))
        store.publish("theirs", data, identity.public, identity.sign(signed_message(data)))
    await cluster.start("a")
    await cluster.writes("a")
    await cluster.start("b")
    await asyncio.wait_for(cluster.managers["b"].process.wait(), PROMPT)
    assert cluster.managers["b"].process.returncode
    with Repository.open(other.store, read_only=True) as store:
        assert [model.name for model in store.models()] == ["theirs"]
    with pytest.raises(UnknownModelError):
        await cluster.client.model("theirs")


@pytest.mark.slow
async def test_where_the_only_whole_store_is_gone_the_one_that_is_told_to_takes_over_and_nobody_else(cluster, measured):
    await cluster.start("a")
    await cluster.writes("a")
    await cluster.start("b")
    await cluster.in_step("b")
    both_have = [await cluster.publish(number) for number in range(2)]
    await cluster.managers["b"].kill()
    lonely = await cluster.publish("lonely")  # answered once it is confirmed that b is waited for no more
    await cluster.managers["a"].kill()
    killed = time.monotonic()
    await cluster.start("b")
    while time.monotonic() < killed + 2 * LEASE + 1:  # as long as a take-over takes at most
        assert cluster.table.manager != cluster.addresses["b"], "it lacks what was acknowledged, and writes"
        await asyncio.sleep(0.1)
    await cluster.managers["b"].kill()

    started = time.monotonic()
    await cluster.managers["b"].start("--take-over")
    await cluster.writes("b")
    measured(f"--take-over: written to {time.monotonic() - started:.1f} s after the start")
    await cluster.assert_all_there(both_have)
    version, *_ = published = await cluster.publish("after")
    assert version == lonely[0]  # b never knew of the lonely one

    await cluster.start("a")
    await cluster.in_step("a")
    await cluster.assert_all_there([*both_have, published])
    await cluster.agree()
    (kept,) = (cluster.root / "a" / "store").glob("catalog-before-term-*.sqlite")
    assert lonely[1] in {row for (row,) in all_rows(kept, "SELECT digest FROM versions")}


async def test_a_manager_whose_lock_file_was_deleted_ends_and_the_next_process_writes_on(cluster):
    await cluster.start("a")
    await cluster.writes("a")
    published = [await cluster.publish(1)]
    (cluster.root / "a" / "store" / "writer.lock").unlink()
    await asyncio.wait_for(cluster.managers["a"].process.wait(), PROMPT)
    assert cluster.managers["a"].process.returncode
    await cluster.start("a")
    published.append(await cluster.publish(2))
    await cluster.assert_all_there(published)


async def test_who_takes_over_keeps_what_the_writer_kept_and_agreed_and_its_feed_goes_on_in_a_later_era(cluster):
    """What only an engine would write is put there by hand: files that another manager of the lab has to have."""
    writer, follower = await cluster.both()
    folders = {name: cluster.root / name for name in (writer, follower)}
    Subscriptions(folders[writer] / "subscriptions.json").add(ALICE.public, "digits")
    ahead = int(time.time()) + 3600  # a clock that was wrong when the era began
    own = begun(None, ahead)
    save_memory(folders[writer] / "feeds" / "own" / "own.json", own)
    believed = FeedState(ALICE.public, rollbacks=3)
    FeedStates(folders[writer] / "feeds" / "states").save(believed)
    await cluster.until((folders[follower] / "feeds" / "own" / "own.json").exists)
    await cluster.client.set_policy("*", {"copies": 3})  # it is answered when the follower has it
    assert Agreements(folders[follower] / "copies.json").policies["*"].copies == 3
    await cluster.managers[writer].kill()
    shutil.rmtree(folders[writer])
    await cluster.writes(follower)
    assert (await cluster.client.policies())["*"]["copies"] == 3
    await cluster.client.set_policy("net", {"copies": 2})
    assert Agreements(folders[follower] / "copies.json").policies.keys() == {"*", "net"}
    assert Subscriptions(folders[follower] / "subscriptions.json").all() == (Subscription(ALICE.public, ("digits",)),)
    assert FeedStates(folders[follower] / "feeds" / "states").load(ALICE.public) == believed
    there = folders[follower] / "feeds" / "own" / "own.json"
    assert there.stat().st_mode & 0o77 == 0
    assert begun(load_memory(there, ALICE.public), int(time.time()), since=2).era == own.era + 1
