"""What labs that hold copies tell each other, who may ask, and what each makes of it: without a network."""

import asyncio
import time

import msgspec
import pytest

from tether.errors import BadInputError, ForbiddenError, PeerUnreachableError, RemoteError, StoreError
from tether.manager.peering.agreements import Agreements, Holding
from tether.manager.peering.copying import agreed, labs_of
from tether.manager.peering.group import Group
from tether.manager.peering.group_view import MAX_MEMBERS, Asked, Said, View, chosen, config_of, mark, parse_said, policy_of, stated
from tether.manager.peering.members import Members
from tether.manager.peering.replication import Policy
from tether.security.access import Access
from tether.security.access_file import AccessFile
from tether.security.identity import Identity
from tether.security.scopes import Scope
from tether.swarm.feeds.entries import Change, Content, FeedModel, FeedVersion, applied, entries
from tether.types import Digest

HERS, HIS, THEIRS, STRANGER = (Identity(bytes([number]) * 32).public for number in (1, 2, 3, 4))
ONE, TWO = Digest("1" * 64), Digest("2" * 64)
TWO_COPIES = config_of(Policy(2))
PATIENCE = 10.0


def model(*digests, config=TWO_COPIES):
    return FeedModel(len(digests) + 1, {number: FeedVersion(each, 100, 1.0) for number, each in enumerate(digests, 1)}, {}, config)


def view(content, said, here=None):
    return View(Content(content, frozenset({HIS, THEIRS})), said, frozenset(said if here is None else here))


@pytest.fixture
def access(tmp_path):
    file = AccessFile.open(tmp_path / "access.sqlite")
    yield Access(file)
    file.close()


# --- what is made of it


def test_what_nobody_but_the_publisher_has_goes_to_one_other_lab_and_both_of_them_agree_which():
    said = {HERS: Said(holds=True, has={"net": mark([ONE])}), HIS: Said(holds=True), THEIRS: Said(holds=True)}
    (copy,) = view({"net": model(ONE)}, said).plan().fetch
    assert copy.to in {HIS, THEIRS}
    assert copy.sources == (HERS,)


def test_when_the_publisher_is_gone_the_other_holder_gives_it():
    said = {HERS: Said(holds=True, has={"net": mark([ONE])}), HIS: Said(holds=True, has={"net": mark([ONE])}), THEIRS: Said(holds=True)}
    assert view({"net": model(ONE)}, said).plan().fetch == ()
    (copy,) = view({"net": model(ONE)}, said, here=[HIS, THEIRS]).plan().fetch
    assert (copy.to, copy.sources) == (THEIRS, (HIS,))


def test_a_new_version_goes_where_the_earlier_one_is():
    for holder, other in ((HIS, THEIRS), (THEIRS, HIS)):
        said = {
            HERS: Said(holds=True, has={"net": mark([ONE, TWO])}),
            holder: Said(holds=True, has={"net": mark([ONE])}),
            other: Said(holds=True),
        }
        (copy,) = view({"net": model(ONE, TWO)}, said).plan().fetch
        assert copy.to == holder


def test_who_refuses_a_model_does_not_get_it_and_who_takes_no_part_counts_as_nothing():
    had = {"net": mark([ONE])}
    said = {HERS: Said(holds=True, has=had), HIS: Said(holds=True, refused=("net",)), THEIRS: Said(has=had)}
    plan = view({"net": model(ONE)}, said).plan()
    assert plan.fetch == ()
    assert plan.short == {"net": "1 of 2 copies: 1 labs are here and can take it"}


def test_models_without_a_policy_are_nobodys_to_copy():
    said = {HERS: Said(holds=True), HIS: Said(holds=True)}
    for config in (None, {}, {"policy": 3}, {"policy": {"copies": 0}}, {"policy": {"copies": 2, "regions": ["x" * 65]}}):
        assert view({"net": model(ONE, config=config)}, said).plan().holders == {}
        assert policy_of(config) is None


def test_people_are_told_who_has_it_and_who_of_these_is_away():
    had = {"net": mark([ONE])}
    seen = view({"net": model(ONE)}, {HERS: Said(holds=True, has=had), HIS: Said(holds=True, has=had)}, here=[HIS])
    told = labs_of(seen, "net", model(ONE), HIS, {HERS: "alice"})
    assert [(lab["own"], lab["petname"], lab["state"], lab["here"]) for lab in told["labs"]] == [
        (True, None, "whole", True),
        (False, "alice", "whole", False),
    ]
    assert told["short"].startswith("1 of 2 copies")
    assert labs_of(seen, "other", model(ONE, config=None), HIS, {})["labs"] == []


# --- what is told


def test_an_answer_that_was_seen_is_not_told_twice():
    said = stated(Said(holds=True, has={"net": mark([ONE])}))
    assert stated(said) == said
    assert parse_said(msgspec.json.encode(Said(said.state)), said) is said
    assert stated(msgspec.structs.replace(said, coming=("other",))).state != said.state


@pytest.mark.parametrize("answer", [b"", b"[]", b'{"has": 3}', b'{"room": -1}', b'{"has": {"a": 1}}', b'{"region": "%s"}' % (b"x" * 65)])
def test_answers_that_make_no_sense_are_refused(answer):
    with pytest.raises(RemoteError):
        parse_said(answer, None)


def test_a_group_has_a_bound_and_all_choose_the_same():
    many = [f"{number:064x}" for number in range(100)]
    assert chosen(many) == chosen(reversed(many))
    assert len(chosen(many)) == MAX_MEMBERS


def test_the_feed_says_policies_and_names_labs_only_where_there_is_one(tmp_path):
    content, agreements = Content({"a": model(ONE, config=None), "b": model(TWO, config=None)}), Agreements(tmp_path / "copies.json")
    assert agreed(content, agreements, frozenset({HIS})) == content
    agreements.agree("a", Policy(3))
    said = agreed(content, agreements, frozenset({HIS}))
    assert said.peers == {HIS}
    read, _ = applied(Content(), [Change(key, value) for key, value in entries(said).items()])
    assert [policy_of(read.models[name].config) for name in "ab"] == [Policy(3), None]
    agreements.agree("*", Policy(2, budget=5))
    assert policy_of(agreed(content, agreements, frozenset()).models["b"].config) == Policy(2, budget=5)


def test_what_was_agreed_is_there_after_a_restart(tmp_path):
    path = tmp_path / "copies.json"
    first = Agreements(path)
    first.agree("net", Policy(2, ("eu",), (HIS,), 10))
    first.hold(Holding(HERS, "eu", 5))
    first.hold(Holding(THEIRS))
    first.hold(Holding(HERS, "us"))
    first.release(THEIRS)
    again = Agreements(path)
    assert again.policies == {"net": Policy(2, ("eu",), (HIS,), 10)}
    assert again.holdings == (Holding(HERS, "us"),)
    again.agree("net", None)
    assert Agreements(path).policies == {}
    path.write_text("{")
    with pytest.raises(StoreError, match="restore it"):
        Agreements(path)


def test_policies_that_make_no_sense_are_refused():
    for policy in (Policy(0), Policy(1001), Policy(2, budget=-1), Policy(2, ("x" * 65,)), Policy(2, tuple(map(str, range(65))))):
        with pytest.raises(BadInputError):
            policy.checked()


# --- who may have what


def test_members_get_the_publishers_models_and_no_other(access):
    members = Members(access)
    members.meet({HERS: frozenset({HERS, HIS})}, {HERS: "alice"})
    assert members.may(HIS, "blobs")
    assert members.may(HIS, "blobs", "alice~net")
    assert not members.may(HIS, "blobs", "net")
    assert not members.may(HIS, "blobs", "bob~net")
    assert not members.may(HIS, "infer", "alice~net")
    assert not members.may(STRANGER, "blobs", "alice~net")
    assert (members.opens(HIS, "have"), members.opens(HIS, "feed"), members.opens(STRANGER, "have")) == (True, False, False)
    assert (members.may_ask(HIS, HERS), members.may_ask(HIS, THEIRS), members.may_ask(STRANGER, HERS)) == (True, False, False)


def test_scopes_count_as_before_and_a_ban_ends_membership(access):
    members = Members(access)
    access.allow(THEIRS, [Scope.parse("replicate:net")])
    members.meet({HERS: frozenset({HERS, HIS})}, {})
    assert members.may(THEIRS, "blobs", "net")
    assert not members.may(THEIRS, "blobs", f"{HERS[:12]}~net")
    assert members.may(HIS, "blobs", f"{HERS[:12]}~net")
    access.ban(HIS, "it lied")
    assert not members.may(HIS, "blobs", f"{HERS[:12]}~net")
    assert not members.knows(HIS)
    members.meet({}, {})
    assert not members.knows(HERS)


# --- asking


async def until(condition):
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it did not come to be"
        await asyncio.sleep(0.01)


async def test_a_lab_decides_when_it_heard_all_and_knows_who_is_there():
    held, asked = stated(Said(holds=True, has={"net": mark([ONE])})), []
    open_door = asyncio.Event()

    async def ask(peer, value):
        asked.append((peer, msgspec.json.decode(value, type=Asked)))
        if peer == THEIRS:
            await open_door.wait()
        return msgspec.json.encode(held)

    group = Group(HERS, ask)
    group.meet([HERS, THEIRS])
    await until(lambda: HERS in group.view(HIS, Said()).here)
    assert not group.is_clear()
    open_door.set()
    await until(group.is_clear)
    assert group.view(HIS, Said()).here == {HERS, HIS, THEIRS}
    assert (HERS, Asked(HERS)) in asked
    group.meet([HERS])
    assert THEIRS not in group.view(HIS, Said()).said
    await group.aclose()


async def test_who_takes_no_part_and_who_is_away_is_not_there_and_asked_again():
    answers = {HERS: ForbiddenError("no part"), THEIRS: PeerUnreachableError("away", "ECONNREFUSED")}

    async def ask(peer, _):
        raise answers[peer]

    group = Group(HERS, ask)
    group.meet([HERS, THEIRS])
    await asyncio.sleep(0)
    assert group.view(HIS, Said(holds=True)).here == {HIS}
    assert not group.is_clear()
    await group.aclose()
