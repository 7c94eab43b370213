"""Labs that hold copies, over real stores and streams in memory: each does its part, and the publisher is not needed for it."""

import asyncio
import contextlib

import msgspec
import pytest
from peering_labs import model_bytes

from tether.errors import ForbiddenError, MalformedRequestError, PeerUnreachableError, ServiceUnavailableError
from tether.manager.peering import group, replication
from tether.manager.peering.agreements import Agreements, Holding
from tether.manager.peering.copying import Copying, CopyingSide, agreed, labs_of, readers_of
from tether.manager.peering.feed_content import content_of
from tether.manager.peering.feeds import Following, News
from tether.manager.peering.group_view import Asked, Said, config_of
from tether.manager.peering.keeping import Kept, Surroundings
from tether.manager.peering.members import Members
from tether.manager.peering.replication import Policy
from tether.manager.peering.shelf import RepositoryShelf
from tether.manager.peering.subscriptions import Subscription
from tether.store.collecting import collection, promises
from tether.swarm.feeds.entries import Content
from tether.swarm.feeds.state import FeedState, FeedStates, Verdict
from tether.types import ModelInfo

CODE = ModelInfo("torch", "pt2", (), (), batched=False, pure=True, code=True)


class Holder:
    """A lab with what looks after copies; only feeds and the network are stood in for."""

    def __init__(self, lab, holders):
        self.lab, self.holders, self.kept, self.heard = lab, holders, {}, {}
        lab.shelf.close()
        self.members = Members(lab.access)
        lab.shelf = RepositoryShelf(lab.repository, self.members)
        self.agreements = Agreements(lab.folder / "copies.json")
        side = CopyingSide(lab.key, lab.repository, lab.access, self.agreements, self.members, self.ask, self.holding, self.say, grace=0.2)
        self.copying = Copying(side)
        self.is_gone = False
        holders[lab.key] = self

    async def ask(self, peer, value):
        other = self.holders[peer]
        if other.is_gone:
            raise PeerUnreachableError(f"{peer} is not reached", "ECONNREFUSED")
        return await other.copying.have(self.lab.key, value)

    def holding(self, publisher):
        if publisher not in self.kept:

            async def away(*_):
                raise ServiceUnavailableError("there is no swarm here")

            async def nobody(*_):
                return []

            def following(_, on_content):
                self.heard[publisher] = on_content
                folder = self.lab.folder
                return Following(away, away, on_content, Content, FeedStates(folder / "states"), folder / "feed")

            surroundings = Surroundings(away, self.lab.pulling, following, nobody, lambda: None)
            self.kept[publisher] = Kept(Subscription(publisher, ()), surroundings)
            self.kept[publisher].hold()
        return self.kept[publisher]

    def says(self):
        """What its feed does."""
        content = content_of(self.lab.repository.snapshot().models, self.lab.key)
        return agreed(content, self.agreements, readers_of(self.lab.access))

    def say(self):
        """To all that follow it."""
        content = self.says()
        for other in self.holders.values():
            if self.lab.key in other.heard:
                other.heard[self.lab.key](self.lab.key, News(content, (), Verdict.NEWER, 1, FeedState(self.lab.key)))

    def hold(self, publisher):
        self.agreements.hold(Holding(publisher.lab.key))
        self.holding(publisher.lab.key)

    def has(self):
        return {model.name.rpartition("~")[2] for model in self.lab.repository.models()}

    def go(self):
        self.is_gone = True
        for other in self.holders.values():
            other.lab.unreachable.add(self.lab.key)

    async def look(self):
        if not self.is_gone:
            await self.copying.look()


@pytest.fixture
async def holders(labs, monkeypatch):
    monkeypatch.setattr(replication, "PATIENCE", 1.0)
    monkeypatch.setattr(group, "PATIENCE", 1.0)
    monkeypatch.setattr(group, "INTERVAL", 0.02)
    found = {}
    three = [Holder(labs(number), found) for number in (1, 2, 3)]
    yield three
    for each in three:
        await each.copying._freeing.aclose()
        for asking in each.copying._groups.values():
            await asking.aclose()
        for kept in each.kept.values():
            await kept.aclose()
        each.lab.close()


async def agree(holders, policy, names=("a", "b", "c", "d")):
    """Hers are published, and the others hold copies of them."""
    hers, *others = holders
    hers.lab.allow(*(each.lab for each in others))
    for seed, name in enumerate(names):
        await hers.lab.publish(name, {"model.onnx": model_bytes(seed)})
    for each in others:
        each.hold(hers)
    hers.agreements.agree("*", policy)
    hers.say()


def told(holder, publisher, name):
    """What its people are, of a model."""
    view = holder.copying.view(publisher.lab.key)
    return labs_of(view, name, view.content.models[name], holder.lab.key, holder.copying.petnames)


def states(*asked):
    return [lab["state"] for lab in told(*asked)["labs"]]


async def until(holders, condition):
    async def looked():
        for each in holders:
            await each.look()
        return condition()

    for _ in range(400):
        if await looked():
            return
        await asyncio.sleep(0.02)
    raise AssertionError("it did not come to be")


async def test_each_model_has_two_copies_and_again_two_when_the_publisher_is_gone(holders):
    hers, his, theirs = holders
    await agree(holders, Policy(2))
    await until(holders, lambda: his.has() | theirs.has() == hers.has())
    assert his.has() & theirs.has() == set()
    await until(holders, lambda: all(states(hers, hers, name) == ["whole", "whole"] for name in "abcd"))

    hers.go()
    await until(holders, lambda: his.has() == theirs.has() == {"a", "b", "c", "d"})
    assert his.lab.liars == theirs.lab.liars == []
    await until(holders, lambda: states(his, hers, "a") == ["whole"] * 3)
    assert told(his, hers, "a")["short"] is None
    assert [lab["here"] for lab in told(his, hers, "a")["labs"]] == [True, False, True]


async def test_what_a_lab_may_not_take_goes_to_the_other(holders):
    hers, his, theirs = holders
    hers.lab.give("code", {"model.pt2": b"code" * 100}, CODE)
    his.lab.repository.trust(hers.lab.key, ["code"])
    await agree(holders, Policy(3), names=("data",))
    await until(holders, lambda: theirs.has() == {"data"})
    await until(holders, lambda: "code" in theirs.copying._said(hers.lab.key).refused)
    assert "code" not in theirs.has()


async def test_only_members_are_told_and_given_anything(holders):
    hers, his, theirs = holders
    theirs_key = theirs.lab.key
    hers.lab.allow(his.lab)
    await hers.lab.publish("a", {"model.onnx": model_bytes(1)})
    his.hold(hers)
    hers.agreements.agree("a", Policy(2))
    hers.say()
    await until([hers, his], lambda: his.has() == {"a"})
    await his.look()
    question = msgspec.json.encode(Asked(hers.lab.key))
    with pytest.raises(ForbiddenError):
        await his.copying.have(theirs_key, question)
    assert not his.members.may(theirs_key, "blobs")
    with pytest.raises(MalformedRequestError):
        await his.copying.have(hers.lab.key, b"[]")
    said = msgspec.json.decode(await his.copying.have(hers.lab.key, question), type=Said)
    again = msgspec.json.decode(await his.copying.have(hers.lab.key, msgspec.json.encode(Asked(hers.lab.key, said.state))), type=Said)
    assert (list(said.has), again) == (["a"], Said(said.state))

    hers.lab.allow(theirs.lab)  # who is named by the publisher is let in by the holder, without a word of its people
    hers.say()
    await until([hers, his], lambda: his.members.may(theirs_key, "blobs", f"{hers.lab.key[:12]}~a"))
    hers.lab.access.revoke(theirs_key)
    hers.say()
    await until([hers, his], lambda: not his.members.knows(theirs_key))


async def test_who_holds_no_more_is_not_counted_and_keeps_what_it_has(holders):
    hers, his, theirs = holders
    await agree(holders, Policy(2), names=("a", "b"))
    await until(holders, lambda: his.has() | theirs.has() == {"a", "b"})
    kept = his.has()
    his.agreements.release(hers.lab.key)
    with contextlib.suppress(KeyError):
        await his.kept.pop(hers.lab.key).aclose()
    await until(holders, lambda: theirs.has() == {"a", "b"})
    assert his.has() == kept
    assert his.copying.view(hers.lab.key) is None


# --- copies that are one too many


async def spread(holders, names=("a", "b", "c", "d")):
    """All of it is everywhere, as copies."""
    hers, his, theirs = holders
    await agree(holders, Policy(3), names)
    await until(holders, lambda: his.has() & theirs.has() >= set(names))
    await until(holders, lambda: all(states(hers, hers, name) == ["whole"] * 3 for name in names))


def lower(hers, policy):
    hers.agreements.agree("*", policy)
    hers.say()


def count(holders, name):
    return sum(name in each.has() for each in holders)


def stored_nbytes(holder):
    return sum(path.stat().st_size for path in (holder.lab.folder / "store" / "packs").glob("*.pack"))


async def test_the_bytes_of_a_copy_that_goes_are_given_back_and_no_others(holders, monkeypatch):
    for each in (collection, promises):
        monkeypatch.setattr(each, "PROMISE", 0.0)  # what came in was promised to be here, for an hour
    hers, his, theirs = holders
    await spread(holders, names=("a", "b"))
    his.holding(hers.lab.key).subscribe(Subscription(hers.lab.key, ("b",)))
    await until(holders, lambda: "b" not in his.agreements.taken(hers.lab.key))
    before = stored_nbytes(his)
    lower(hers, Policy(1))
    await until(holders, lambda: (his.has(), theirs.has()) == ({"b"}, set()))
    await until(holders, lambda: stored_nbytes(theirs) == 0)
    await until(holders, lambda: before / 3 < stored_nbytes(his) < before * 2 / 3)
    assert his.lab.repository.verify().problems == ()


async def test_when_fewer_copies_are_asked_for_those_that_are_too_many_go_and_the_publisher_keeps_its_own(holders):
    hers, his, theirs = holders
    await spread(holders)
    lower(hers, Policy(2))
    fewest = []

    def done():
        fewest.append(min(count(holders, name) for name in "abcd"))
        return all(count(holders, name) == 2 for name in "abcd")

    await until(holders, done)
    assert min(fewest) == 2
    assert hers.has() == {"a", "b", "c", "d"}
    assert (his.has() | theirs.has(), his.has() & theirs.has()) == ({"a", "b", "c", "d"}, set())
    await until(holders, lambda: states(his, hers, "a") == ["whole", "whole"])
    lower(hers, Policy(3))  # and come back when they are asked for
    await until(holders, lambda: all(count(holders, name) == 3 for name in "abcd"))


async def test_when_no_copies_are_asked_for_any_more_the_publisher_s_own_is_left(holders):
    hers, his, theirs = holders
    await spread(holders, names=("a", "b"))
    lower(hers, None)
    await until(holders, lambda: his.has() == theirs.has() == set())
    assert hers.has() == {"a", "b"}


async def test_what_people_asked_for_or_was_here_before_or_is_pinned_stays(holders):
    hers, his, theirs = holders
    await hers.lab.publish("d", {"model.onnx": model_bytes(9)})
    hers.lab.allow(his.lab)
    await his.lab.pull(hers.lab, "d")  # long before any copies were agreed on
    await spread(holders, names=("a", "b", "c"))
    his.holding(hers.lab.key).subscribe(Subscription(hers.lab.key, ("a",)))
    hers.agreements.agree("b", Policy(1, pin=(his.lab.key, theirs.lab.key)))
    lower(hers, Policy(1))
    await until(holders, lambda: (his.has(), theirs.has()) == ({"a", "b", "d"}, {"b"}))
    his.holding(hers.lab.key).subscribe(Subscription(hers.lab.key, ()))
    for _ in range(30):
        await until(holders, lambda: True)
        await asyncio.sleep(0.02)
    assert his.has() == {"a", "b", "d"}, "what people asked for once is theirs"


async def test_nothing_goes_while_those_who_keep_it_are_away(holders):
    hers, his, theirs = holders
    await spread(holders, names=("a",))
    hers.go()
    lower_here = Policy(2)
    content = Content({"a": msgspec.structs.replace(hers.says().models["a"], config=config_of(lower_here))}, hers.says().peers)
    for each in (his, theirs):
        each.heard[hers.lab.key](hers.lab.key, News(content, (), Verdict.NEWER, 2, FeedState(hers.lab.key)))
    for _ in range(40):
        await until([his, theirs], lambda: True)
        await asyncio.sleep(0.02)
    assert count([his, theirs], "a") == 2


async def test_a_copy_that_is_left_is_told_as_surplus_and_given_on_until_it_goes(holders):
    hers, *_ = holders
    await spread(holders, names=("a",))
    seen = set()
    lower(hers, Policy(2))

    def done():
        seen.update(states(hers, hers, "a"))
        return count(holders, "a") == 2

    await until(holders, done)
    assert "surplus" in seen
