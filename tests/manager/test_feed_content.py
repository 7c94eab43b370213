"""Another lab's catalog here: through its feed, into a store, and nothing named that is not there."""

import pytest

from tether.manager.peering.feed_content import content_of, states_of, wanted
from tether.ports import SignedManifest
from tether.security.identity import Identity
from tether.store import Manifest, Repository, encode, signed_message
from tether.store.index.mirror_tables import CatalogState
from tether.swarm.feeds.entries import Change, Content, applied, changes, entries
from tether.types import ModelInfo, ModelRef

LAB, ME = Identity(bytes(range(32))), Identity(bytes([7]) * 32)
INFO = ModelInfo("onnx", "onnx", (), (), batched=False, pure=True, code=False)


@pytest.fixture
def publisher(tmp_path):
    with Repository.open(tmp_path / "publisher" / "store", own=LAB.public) as repository:
        yield repository


@pytest.fixture
def follower(tmp_path):
    with Repository.open(tmp_path / "follower" / "store", own=ME.public) as repository:
        yield repository


def publish(repository, number, name="net", **options):
    data = encode(Manifest(framework="onnx", entry="m", info=INFO, arrays=(repository.add_bytes("m", b"%d " % number * 100),)))
    return repository.publish(name, data, LAB.public, LAB.sign(signed_message(data)), **options)


class Following:
    """What the glue does with each update: entries, blobs, catalog."""

    def __init__(self, publisher, follower):
        self.publisher, self.follower = publisher, follower
        self.seen, self.content, self.held = {}, Content(), {}

    def update(self, fetch=lambda _: True):
        now = entries(content_of(self.publisher.snapshot().models, LAB.public))
        sent = [Change(change.key, change.value) for change in changes(self.seen, now)]
        self.seen = now
        self.content, changed = applied(self.content, sent)
        for digest in wanted(self.content, self.content.models, self.held):
            if fetch(digest):
                self.hold(digest)
        states = states_of(self.content, self.content.models, LAB.public, self.held, self.follower.snapshot().models)
        state = CatalogState(change=len(self.seen), whole=False, models=states, rest=None)
        self.follower.mirror(1, state)
        return changed

    def hold(self, digest):
        for blob in self.publisher.manifest(digest).blobs():
            self.follower.put_blob(blob, self.publisher.read_blob(blob))
        signature = self.publisher.signature(digest, LAB.public)
        self.follower.hold([SignedManifest(self.publisher.manifest_bytes(digest), LAB.public, signature)])
        self.held[digest] = signature

    def means(self, text):
        record = self.follower.resolve(ModelRef.parse(text), LAB.public)
        assert self.follower.read_blob(self.follower.manifest(record.digest).blobs()[0])
        return record.version


@pytest.fixture
def following(publisher, follower):
    return Following(publisher, follower)


def test_a_followers_catalog_says_what_the_publishers_says_under_its_key(following, publisher, follower):
    for number in range(3):
        publish(publisher, number, alias=["prod"], tags={"n": str(number)})
    following.update()
    publisher.set_alias("net", "prod", 1)
    publisher.delete_version("net", 2)
    assert following.update() == ("net",)

    (mine,) = follower.models()
    (theirs,) = publisher.models()
    assert mine.publisher == LAB.public
    assert mine.aliases == theirs.aliases
    assert [(each.version, each.digest, each.tags, each.nbytes) for each in mine.versions] == [
        (each.version, each.digest, each.tags, each.nbytes) for each in theirs.versions
    ]
    assert (following.means("net@prod"), following.means("net"), following.means("net:3")) == (1, 1, 3)
    assert following.update() == ()


def test_numbers_that_were_given_there_are_not_given_again_here(following, publisher, follower):
    publish(publisher, 1)
    publish(publisher, 2)
    following.update()
    publisher.delete_version("net", 2)
    following.update()
    assert [each.version for each in follower.models()[0].versions] == [1]
    assert follower.snapshot().models[0].next == 3


def test_an_alias_moves_when_what_it_points_at_is_here(following, publisher):
    publish(publisher, 1, alias=["prod"])
    following.update()
    publish(publisher, 2, alias=["prod"])
    following.update(fetch=lambda _: False)
    assert (following.means("net@prod"), following.means("net@latest")) == (1, 1)
    following.update()
    assert (following.means("net@prod"), following.means("net@latest")) == (2, 2)


def test_a_model_of_which_nothing_is_here_is_not_named(following, publisher, follower):
    publish(publisher, 1)
    following.update(fetch=lambda _: False)
    assert follower.models() == []
    following.update()
    assert [model.name for model in follower.models()] != []


def test_what_aliases_point_at_is_fetched_first(publisher):
    for number in range(4):
        publish(publisher, number)
    publisher.set_alias("net", "prod", 2)
    content = content_of(publisher.snapshot().models, LAB.public)
    digests = {number: version.digest for number, version in content.models["net"].versions.items()}
    order = wanted(content, ["net", "nothing"], [digests[3]])
    assert {*order[:2]} == {digests[2], digests[4]}
    assert order[2:] == [digests[1]]


def test_nothing_that_a_catalog_takes_keeps_followers_from_following(following, publisher, follower):
    publish(publisher, 1, alias=["stats"])
    publish(publisher, 2, tags={str(number): "x" for number in range(100)})
    publish(publisher, 3, tags={"notes": "x" * 20_000})
    publish(publisher, 4, tags={"notes": "short"})
    following.update()
    (model,) = follower.models()
    assert model.aliases == {"stats": 1, "latest": 4}
    assert [version.tags for version in model.versions] == [{}, {}, {}, {"notes": "short"}]


def test_only_the_publishers_own_models_are_in_its_feed(following, publisher, follower):
    publish(publisher, 1)
    following.update()
    assert content_of(follower.snapshot().models, ME.public) == Content()
    assert entries(content_of(follower.snapshot().models, LAB.public)) == following.seen
