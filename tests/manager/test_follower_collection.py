"""A follower frees what the writer forgot, by itself, and never what it is about to be told of."""

import asyncio
import random
import threading
import time

import pytest

from tether.errors import StoreError, TetherError
from tether.manager.collecting import FollowerCollection
from tether.manager.feed import Changes
from tether.manager.following import Follower, WriterBlobs, _Source
from tether.manager.operations import Operations
from tether.security.identity import Identity
from tether.store import Manifest, Repository, encode, signed_message
from tether.store.collecting.collected import GcReport
from tether.store.replicas.replicated import Replicated
from tether.types import ModelInfo

LAB = Identity(bytes(range(32)))
INFO = ModelInfo("onnx", "onnx", (), (), batched=False, pure=True, code=False)
HOUR, DAY, PROMPT = 3600.0, 86400.0, 20.0


class Clock:
    """Set by hand, and always before the real time, which files have: what is staged is never a day old."""

    def __init__(self):
        self.now = time.time() - 30 * DAY

    def __call__(self):
        return self.now


class Link:
    """A manager's operations, without a network between."""

    def __init__(self, operations):
        self.operations = operations

    async def ask(self, operation, **arguments):
        return await getattr(self.operations, operation)(**arguments)

    async def close(self):
        pass


class Pair:
    """A writer, and a follower that is told by hand."""

    def __init__(self, root):
        self.clock = Clock()
        self.writer = Repository.open(root / "writer" / "store", own=LAB.public, clock=self.clock)
        self.follower = Repository.open(root / "follower" / "store", own=LAB.public, clock=self.clock)
        self.writer.begin_term(1)
        link = Link(Operations(self.writer, LAB, root / "publishing"))
        self.following = Follower(self.follower, root / "keys", None, None, lambda _: link)
        blobs = WriterBlobs(link)
        self.source = _Source("writer", blobs, Replicated(self.follower, [blobs]))
        self.changes = Changes()

    def publish(self, seed, name="net"):
        data = random.Random(str(seed)).randbytes(50_000)
        manifest = encode(Manifest(framework="onnx", entry="m", info=INFO, arrays=(self.writer.add_bytes("m", data),)))
        return self.writer.publish(name, manifest, LAB.public, LAB.sign(signed_message(manifest)))

    async def tell(self):
        state = self.changes.since(self.writer.snapshot())
        await self.following._apply(1, state, [], self.source)

    async def close(self):
        await asyncio.to_thread(self.source.replicated.close)
        self.follower.close()
        self.writer.close()


@pytest.fixture
async def pair(tmp_path):
    pair = Pair(tmp_path)
    yield pair
    await pair.close()


def packs(repository):
    return sorted(path.name for path in (repository.root / "packs").glob("*.pack"))


def collected(repository, *, rests, until):
    """A collection's thread that has come that far."""
    collection = FollowerCollection(repository, rests, every=0.01, first=0.0)
    collection.start()
    try:
        deadline = time.monotonic() + PROMPT
        while not until(collection):
            assert time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        collection.stop()
    return collection


async def test_what_the_writer_deleted_goes_at_the_follower_too_a_day_later(pair):
    pair.publish("old")
    await pair.tell()
    pair.clock.now += 2 * DAY
    pair.publish("new")
    pair.writer.delete_version("net", 1)
    await pair.tell()
    assert len(packs(pair.follower)) == 2

    await asyncio.to_thread(collected, pair.follower, rests=lambda: True, until=lambda each: each.rounds >= 2)
    assert len(packs(pair.follower)) == 2  # a deletion can still be taken back
    position = pair.follower.footing().position
    pair.clock.now += DAY
    await asyncio.to_thread(collected, pair.follower, rests=lambda: True, until=lambda each: each.rounds >= 1)

    assert (len(packs(pair.follower)), len(packs(pair.writer))) == (1, 2)
    assert pair.follower.verify().problems == ()
    assert pair.follower.models() == pair.writer.models()
    assert pair.follower.footing().position == position  # it has neither more nor less of the writer's catalog than before


def test_a_manager_that_writes_or_fetches_collects_nothing_by_itself(tmp_path):
    looked = []
    with Repository.open(tmp_path / "store", own=LAB.public) as repository:
        collection = collected(repository, rests=lambda: looked.append(True), until=lambda _: len(looked) > 3)
    assert collection.rounds == 0


async def test_while_it_fetches_a_follower_does_not_rest(pair, monkeypatch):
    seen = []
    hold = pair.source.replicated.ahold

    async def watched(digests):
        seen.append(pair.following.is_applying)
        await hold(digests)

    monkeypatch.setattr(pair.source.replicated, "ahold", watched)
    pair.publish("one")
    await pair.tell()
    assert (seen, pair.following.is_applying) == ([True], False)


def test_a_refusal_is_said_and_tried_again(tmp_path, monkeypatch):
    outcomes = [StoreError("the disk refused"), GcReport(dry_run=False, deleted=(), rewritten=(), manifests=0, kept=())]

    def gc():
        outcome = outcomes.pop(0) if len(outcomes) > 1 else outcomes[0]
        if isinstance(outcome, TetherError):
            raise outcome
        return outcome

    with Repository.open(tmp_path / "store", own=LAB.public) as repository:
        monkeypatch.setattr(repository, "gc", gc)
        assert collected(repository, rests=lambda: True, until=lambda each: each.rounds).rounds


async def test_collecting_while_versions_come_go_and_come_again_loses_nothing_that_is_named(pair):
    chance, stop = random.Random("follower"), threading.Event()

    def collect():
        while not stop.is_set():
            pair.follower.gc()

    thread = threading.Thread(target=collect)
    thread.start()
    try:
        for _ in range(60):
            pair.clock.now += 5 * HOUR
            pair.publish(chance.randrange(8))
            numbers = [version.version for version in pair.writer.models()[0].versions]
            if len(numbers) > 3:
                pair.writer.delete_version("net", chance.choice(numbers))
            if chance.random() < 0.7:
                await pair.tell()
                assert pair.follower.models() == pair.writer.models()
                assert pair.follower.verify().problems == ()
    finally:
        stop.set()
        await asyncio.to_thread(thread.join)
    assert len(packs(pair.follower)) < 40  # of 60 that came
