"""What a lab remembers of its own feed, and what it makes of what another one answers about its."""

import base64

import msgspec
import pytest

from tether.errors import MalformedFeedError, StoreError
from tether.manager.peering.feed_memory import FeedMemory, begun, load_memory, save_memory
from tether.manager.peering.feed_reading import check_bound, parse_offer, read
from tether.security.identity import Identity
from tether.swarm.feeds.entries import Change, Content, FeedModel, FeedVersion, changes, entries
from tether.swarm.feeds.heads import Head, sign_head
from tether.swarm.feeds.state import Verdict

LAB, OTHER = Identity(bytes(range(32))), Identity(bytes([7]) * 32)
HEAD = Head(LAB.public, "c0" * 32, 1_800_000_000, 5, 0, "ab" * 32, 1_800_000_000, 1_800_000_100)
SIGNED = sign_head(LAB, HEAD)
ANSWER = {"core": "c0" * 32, "server": "d0" * 32, "head": base64.b64encode(SIGNED).decode()}


def version(digit):
    return FeedVersion(digit * 64, 1, 1.8e9)


BEFORE = Content({"net": FeedModel(3, {1: version("a"), 2: version("b")}, {"prod": 1})})


def as_update(content):
    return [Change(key, value) for key, value in entries(content).items()]


def test_an_answer_is_read():
    offer = parse_offer(ANSWER, LAB.public)
    assert (offer.head, offer.signed, offer.server.hex()) == (HEAD, SIGNED, "d0" * 32)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"core": "d0" * 32}, "another one"),
        ({"core": None}, "another one"),
        ({"server": "D0" * 32}, "no keys"),
        ({"server": None}, "no keys"),
        ({"head": None}, "no keys"),
        ({"head": "A" * 4000}, "no keys"),
        ({"head": "%%%"}, "base64"),
        ({"head": "é"}, "base64"),
        ({"head": ""}, "bytes"),
        ({"head": base64.b64encode(sign_head(OTHER, HEAD)).decode()}, "not signed by"),
    ],
)
def test_an_answer_that_is_none_is_told(wrong, says):
    with pytest.raises(MalformedFeedError, match=says):
        parse_offer(ANSWER | wrong, LAB.public)


def test_an_answer_that_is_no_object_is_told():
    with pytest.raises(MalformedFeedError, match="no keys"):
        parse_offer([1], LAB.public)


def test_what_goes_on_is_the_difference_and_what_begins_is_compared():
    after = Content({"net": FeedModel(4, {1: version("a"), 3: version("c")}, {"prod": 3})})
    assert read(Verdict.NEWER, BEFORE, changes(entries(BEFORE), entries(after))) == (after, ("net",), ())
    assert read(Verdict.NEWER, None, as_update(after)) == (after, ("net",), ())
    assert read(Verdict.FIRST, None, as_update(after)) == (after, ("net",), ())
    assert read(Verdict.NEW_ERA, BEFORE, as_update(after)) == (after, ("net",), ())
    assert read(Verdict.NEW_ERA, BEFORE, as_update(BEFORE)) == (BEFORE, (), ())
    less = Content({"net": FeedModel(2, {1: version("a")})})
    assert read(Verdict.NEW_ERA, BEFORE, as_update(less))[2] == ("net: 2 versions were published, it knows of 1",)


def test_numbers_that_the_catalog_here_has_mean_what_they_meant():
    check_bound(BEFORE, Content({"net": FeedModel(9, {1: version("a")}), "other": FeedModel(2, {1: version("c")})}))
    with pytest.raises(MalformedFeedError, match=r"net:2 was c+…, is b+….*delete"):
        check_bound(BEFORE, Content({"net": FeedModel(9, {2: version("c")})}))


def test_eras_grow_whatever_the_clock_says_and_nothing_is_signed_twice_with_one_key():
    first = begun(None, 1000)
    later, early = begun(first, 2000), begun(first, 10)
    assert (first.era, later.era, early.era) == (1000, 2000, 1001)
    assert len({first.core, later.core, early.core}) == 3
    assert first.server == later.server
    after = begun(msgspec.structs.replace(first, signed=1500, head=SIGNED), 1600)
    assert (after.signed, after.head) == (1500, None)
    assert first.core not in repr(first)


def test_what_was_remembered_is_there_after_a_restart_for_nobody_else(tmp_path):
    path = tmp_path / "feed" / "own.json"
    assert load_memory(path, LAB.public) is None
    memory = msgspec.structs.replace(begun(None, 1_800_000_000), signed=HEAD.signed, head=SIGNED)
    save_memory(path, memory)
    assert load_memory(path, LAB.public) == memory
    assert memory.known(LAB.public) == HEAD
    assert path.stat().st_mode & 0o777 == 0o600
    assert [each.name for each in path.parent.iterdir()] == ["own.json"]


@pytest.mark.parametrize(
    "wrong",
    [b"", b"\xff", b"{}", {"core": "zz"}, {"core": "ab"}, {"format": 2}, {"head": base64.b64encode(sign_head(OTHER, HEAD)).decode()}],
)
def test_a_damaged_memory_is_none_so_that_a_new_core_is_begun(tmp_path, wrong):
    path = tmp_path / "own.json"
    save_memory(path, msgspec.structs.replace(begun(None, 5), head=SIGNED))
    if isinstance(wrong, bytes):
        path.write_bytes(wrong)
    else:
        path.write_bytes(msgspec.json.encode(msgspec.json.decode(path.read_bytes()) | wrong))
    assert load_memory(path, LAB.public) is None


def test_a_memory_that_can_not_be_read_or_written_is_not_taken_for_none(tmp_path):
    (tmp_path / "own.json").mkdir()
    with pytest.raises(StoreError, match="can't be read"):
        load_memory(tmp_path / "own.json", LAB.public)
    with pytest.raises(StoreError, match="can't be written"):
        save_memory(tmp_path / "own.json", FeedMemory(1, "ab" * 32, "cd" * 32))
