"""Models of another lab are kept: what the publisher says of them is asked for, followed and pulled, over real stores."""

import asyncio
import contextlib
import json

import pytest
from peering_labs import model_bytes

from tether.errors import (
    BadModelError,
    ForbiddenError,
    MalformedFeedError,
    RemoteError,
    ServiceUnavailableError,
    UnknownModelError,
    UntrustedCodeError,
)
from tether.manager.operations import Operations
from tether.manager.peering import keeping, pulling
from tether.manager.peering.feed_content import content_of
from tether.manager.peering.feeds import Following, News
from tether.manager.peering.gateway import Gateway
from tether.manager.peering.keeping import Kept, Surroundings
from tether.manager.peering.listing import content_of_rows
from tether.manager.peering.methods import Methods
from tether.manager.peering.subscriptions import EVERYTHING, Subscription, Subscriptions
from tether.swarm.feeds.entries import Content
from tether.swarm.feeds.state import FeedState, FeedStates, Verdict
from tether.swarm.node.node import PREFIX
from tether.swarm.rpc.rpc import RpcConnection
from tether.testing.streams import stream_pair
from tether.types import ModelInfo

PATIENCE = 20.0
CODE = ModelInfo("torch", "pt2", (), (), batched=False, pure=True, code=True)


async def until(condition):
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110 (several things have to come together)
            await asyncio.sleep(0.005)


class Pair:
    """A publisher that is asked over RPC, and a lab that keeps what it has."""

    def __init__(self, labs, tmp_path):
        self.hers, self.his = labs(1), labs(2)
        operations = Operations(self.hers.repository, self.hers.identity, tmp_path / "operations")

        async def ask(operation, **arguments):
            return await operations.handlers()[operation](**arguments)

        self.methods = Methods(self.hers.key, ask, self.hers.repository, self.hers.access, Gateway(None))
        self.asked, self.changes, self.is_away = [], 0, False
        self.connections = []
        self.close_operations = operations.close

    def connect(self):
        near, far = stream_pair(self.his.key, self.hers.key)
        self.connections += [RpcConnection(far, self.hers.key, self.methods.service()), RpcConnection(near, self.his.key)]
        return self.connections[-1]

    async def ask(self, peer, method, value):
        assert peer == self.hers.key
        if self.is_away:
            raise ServiceUnavailableError("the lab is away")
        if not self.connections or self.connections[-1].is_closed:
            self.connect()
        self.asked.append(method)
        return json.loads(await self.connections[-1].request(PREFIX + method, json.dumps(value).encode(), PATIENCE))

    def keep(self, *models):
        subscription = Subscription(self.hers.key, models or ("digits",))

        async def nobody(*_):
            return []

        async def no_engine():
            raise ServiceUnavailableError("there is no swarm here")

        def following(publisher, on_content):
            self.heard = on_content
            states = FeedStates(self.his.folder / "states")
            return Following(no_engine, lambda: self.ask(publisher, "feed", {}), on_content, lambda: None, states, self.his.folder / "feed")

        def changed():
            self.changes += 1

        return Kept(subscription, Surroundings(self.ask, self.his.pulling, following, nobody, changed))

    async def publish(self, name="digits", seed=1, **fields):
        answer = await self.hers.publish(name, {"model.onnx": model_bytes(seed)}, **fields)
        self.methods.changed()
        return answer[0]

    def alias(self, alias, version):
        self.hers.repository.set_alias("digits", alias, version)
        self.methods.changed()

    async def no_offer(self):
        return {}

    def here(self, name="digits"):
        """What his catalog says: version → digest, and what the bare name means."""
        state = self.his.repository.state_of(self.hers.key, name)
        return None if state is None else ({each.version: each.digest for each in state.versions}, dict(state.aliases))

    def close(self):
        for connection in self.connections:
            connection.destroy()
        self.close_operations()


@pytest.fixture
async def pair(labs, tmp_path):
    pair = Pair(labs, tmp_path)
    yield pair
    pair.close()


@contextlib.asynccontextmanager
async def kept(pair, *models):
    keeping = pair.keep(*models)
    try:
        yield keeping
    finally:
        await keeping.aclose()


async def test_a_model_comes_and_what_follows_comes_at_once(pair):
    first = await pair.publish()
    pair.hers.allow(pair.his, scopes=("replicate:digits",))
    async with kept(pair) as keeping:
        await until(lambda: keeping.model("digits").is_done)
        assert pair.here() == ({1: first.digest}, {"latest": 1})
        assert keeping.model("digits").versions == (f"{pair.hers.key[:12]}~digits:1",)
        second = await pair.publish(seed=2, aliases=["prod"])
        await until(lambda: pair.here() == ({1: first.digest, 2: second.digest}, {"latest": 2, "prod": 2}))
        before, asked = pair.changes, len(pair.asked)
        pair.alias("prod", 1)
        await until(lambda: pair.here()[1]["prod"] == 1)
        await until(lambda: keeping.model("digits").is_done)
        assert pair.changes > before
        assert len(pair.asked) - asked <= 4, "news are waited for, not looked for"


async def test_all_models_that_the_lab_lets_one_see_come_with_a_star(pair):
    await pair.publish("digits")
    await pair.publish("digits-2", 2)
    await pair.publish("faces", 3)
    pair.hers.allow(pair.his, scopes=("replicate:digits*",))
    async with kept(pair, EVERYTHING) as keeping:
        await until(lambda: keeping.model("digits-2").is_done and keeping.model("digits").is_done)
        assert pair.here("faces") is None
        await until(lambda: keeping.model(EVERYTHING).is_done)
        assert len(keeping.model(EVERYTHING).versions) == 2
        await pair.publish("digits-3", 4)
        await until(lambda: keeping.model("digits-3").is_done)


async def test_what_one_may_not_have_is_said_and_comes_when_one_may(pair):
    await pair.publish("faces")
    pair.hers.allow(pair.his, scopes=("replicate:digits",))
    async with kept(pair, "faces") as keeping:
        await until(lambda: isinstance(keeping.model("faces").error, UnknownModelError))
        pair.hers.allow(pair.his, scopes=("replicate:faces",))
        pair.methods.changed()
        await until(lambda: keeping.model("faces").is_done)


async def test_who_may_do_nothing_is_told_so(pair):
    await pair.publish()
    async with kept(pair) as keeping:
        await until(lambda: isinstance(keeping.model("digits").error, ForbiddenError))


async def test_a_publisher_that_is_away_is_asked_again(pair):
    await pair.publish()
    pair.hers.allow(pair.his, scopes=("replicate:digits",))
    pair.is_away = True
    async with kept(pair) as keeping:
        await until(lambda: isinstance(keeping.model("digits").error, ServiceUnavailableError))
        pair.is_away = False
        keeping.nudge()
        await until(lambda: keeping.model("digits").is_done)
        assert keeping.model("digits").error is None


async def test_a_connection_that_is_lost_while_news_are_waited_for_is_made_anew(pair):
    await pair.publish()
    pair.hers.allow(pair.his, scopes=("replicate:digits",))
    async with kept(pair) as keeping:
        await until(lambda: keeping.model("digits").is_done and "models" in pair.asked)
        pair.connections[-1].destroy()
        second = await pair.publish(seed=2)
        await until(lambda: pair.here()[0].get(2) == second.digest)


async def test_one_model_that_is_refused_keeps_no_other_from_coming(pair):
    pair.hers.give("code", {"model.pt2": b"code"}, CODE)
    await pair.publish("digits")
    pair.hers.allow(pair.his, scopes=("replicate:code", "replicate:digits"))
    async with kept(pair, "code", "digits") as keeping:
        await until(lambda: keeping.model("digits").is_done)
        await until(lambda: isinstance(keeping.model("code").error, UntrustedCodeError))


async def test_who_may_follow_the_feed_no_longer_asks_for_single_models_at_once_and_follows_it_again_when_it_may(pair, monkeypatch):
    monkeypatch.setattr(keeping, "_WAIT", 0.1)
    first = await pair.publish()
    pair.methods.feed = pair.no_offer
    pair.hers.allow(pair.his, scopes=("replicate", "replicate:digits"))
    async with kept(pair) as lab:
        await until(lambda: isinstance(lab.model("digits").error, RemoteError))  # the feed is followed; what it offers is no feed
        assert "models" not in pair.asked
        pair.hers.disallow(pair.his, scopes=("replicate",))
        await until(lambda: lab.model("digits").is_done)
        assert (pair.here(), lab.model("digits").error) == (({1: first.digest}, {"latest": 1}), None)
        second = await pair.publish(seed=2)
        await until(lambda: pair.here()[0].get(2) == second.digest)
        pair.hers.allow(pair.his)
        await until(lambda: pair.asked[-2:] == ["feed", "feed"])


async def test_what_was_published_a_moment_ago_is_not_called_unknown_because_the_feed_does_not_name_it_yet(pair):
    await pair.publish()
    pair.methods.feed = pair.no_offer
    pair.hers.allow(pair.his)
    async with kept(pair, "digits", "none") as lab:
        await until(lambda: "feed" in pair.asked)
        pair.heard(pair.hers.key, News(Content(), (), Verdict.SAME, 1, FeedState(pair.hers.key)))
        await until(lambda: isinstance(lab.model("none").error, UnknownModelError))
        assert not isinstance(lab.model("digits").error, UnknownModelError)
        content = content_of(pair.hers.repository.snapshot().models, pair.hers.key)
        pair.heard(pair.hers.key, News(content, ("digits",), Verdict.NEWER, 2, FeedState(pair.hers.key)))
        await until(lambda: lab.model("digits").is_done)


async def test_who_holds_copies_and_may_follow_the_feed_no_longer_has_what_single_scopes_open(pair):
    first = await pair.publish()
    pair.methods.feed = pair.no_offer
    pair.hers.allow(pair.his, scopes=("replicate:digits",))
    async with kept(pair) as lab:
        lab.hold()
        await until(lambda: lab.model("digits").is_done)
        assert pair.here() == ({1: first.digest}, {"latest": 1})


async def test_code_comes_as_soon_as_its_publisher_is_trusted_for_code(pair):
    pair.hers.give("code", {"model.pt2": b"code"}, CODE)
    pair.hers.allow(pair.his, scopes=("replicate:code",))
    async with kept(pair, "code") as keeping:
        await until(lambda: isinstance(keeping.model("code").error, UntrustedCodeError))
        keeping.trust_changed()
        await until(lambda: isinstance(keeping.model("code").error, UntrustedCodeError))
        pair.his.repository.trust(pair.hers.key, ["code"])
        keeping.trust_changed()
        await until(lambda: keeping.model("code").is_done)


async def test_a_person_who_asks_again_has_what_was_refused_tried_again(pair, monkeypatch):
    refuses = [True]

    async def look(*_):
        if refuses[0]:
            raise BadModelError("it is no model, today")

    monkeypatch.setattr(pulling, "look", look)
    await pair.publish()
    pair.hers.allow(pair.his, scopes=("replicate:digits",))
    async with kept(pair) as keeping:
        await until(lambda: isinstance(keeping.model("digits").error, BadModelError))
        refuses[0] = False
        keeping.nudge()
        await until(lambda: isinstance(keeping.model("digits").error, BadModelError))
        keeping.try_again("digits")
        await until(lambda: keeping.model("digits").is_done)


async def test_other_models_are_asked_for_at_once(pair):
    await pair.publish("digits")
    await pair.publish("faces", 2)
    pair.hers.allow(pair.his, scopes=("replicate:digits", "replicate:faces"))
    async with kept(pair) as keeping:
        await until(lambda: keeping.model("digits").is_done)
        keeping.subscribe(Subscription(pair.hers.key, ("digits", "faces")))
        await until(lambda: keeping.model("faces").is_done)


@pytest.mark.parametrize(
    "row",
    [
        {},
        {"name": "Digits", "versions": []},
        {"name": "digits", "versions": [{"version": "one", "digest": "a", "created": 0, "nbytes": 0}]},
        {"name": "digits", "versions": [{"version": 1}]},
    ],
)
def test_rows_that_make_no_sense_are_refused(row):
    with pytest.raises(MalformedFeedError):
        content_of_rows([row])


def test_an_alias_of_a_version_that_is_not_listed_is_left_out():
    version = {"version": 3, "digest": "a" * 64, "created": 1.0, "nbytes": 5, "tags": {"k": "v"}}
    content = content_of_rows([{"name": "digits", "versions": [version], "aliases": {"prod": 2, "latest": 3}}])
    assert (content.models["digits"].aliases, content.models["digits"].next) == ({"latest": 3}, 4)


def test_subscriptions_are_there_after_a_restart(tmp_path):
    path = tmp_path / "subscriptions.json"
    subscriptions = Subscriptions(path)
    subscriptions.add("aa" * 32, "digits")
    subscriptions.add("aa" * 32, "faces", via="bb" * 32)
    subscriptions.add("cc" * 32, EVERYTHING)
    subscriptions.remove("cc" * 32, EVERYTHING)
    subscriptions.remove("dd" * 32, "never")
    assert Subscriptions(path).all() == (Subscription("aa" * 32, ("digits", "faces"), ("bb" * 32,)),)
    assert path.stat().st_mode & 0o77 == 0
    assert Subscription("aa", (EVERYTHING,)).names(("x", "y")) == ("x", "y")
    assert Subscription("aa", ("y", "z")).names(("x", "y")) == ("y",)
