"""What a follower takes of a publisher's feed: what goes on from what it knows, and no number that means something else than before."""

import random
import time

import msgspec
import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from tether.errors import FeedRefusedError, MalformedFeedError, StoreError
from tether.security.identity import Identity
from tether.swarm.feeds import entries as feed_entries
from tether.swarm.feeds.entries import (
    MAX_VALUE_NBYTES,
    Change,
    Content,
    FeedModel,
    FeedVersion,
    applied,
    changes,
    contradictions,
    entries,
    redefined,
    renewed,
    sayable_aliases,
)
from tether.swarm.feeds.heads import Head, parse_head, sign_head
from tether.swarm.feeds.state import FATAL, TAKEN, FeedState, FeedStates, Verdict, judge
from tether.swarm.records.records import SKEW

LAB, THIEF, PEER = (Identity(bytes([number]) * 32) for number in range(1, 4))
CORE = "c0" * 32
T0 = 1_800_000_000
DAY = 86_400


class Core:
    """A Hypercore as far as heads go: blocks, and a root for each length that depends on all blocks before it."""

    def __init__(self, blocks=(), *, era=1, fork=0, key=CORE, began=T0, signed=None):
        self.blocks, self.era, self.fork, self.key = list(blocks), era, fork, key
        self.began, self.signed = began, began if signed is None else signed

    def root(self, length):
        return blake3(msgspec.msgpack.encode(self.blocks[:length])).hexdigest()

    def head(self, length=None):
        at = len(self.blocks) if length is None else length
        return Head(LAB.public, self.key, self.era, at, self.fork, self.root(at), self.began, self.signed)

    def copy(self):
        return Core(self.blocks, era=self.era, fork=self.fork, key=self.key, began=self.began, signed=self.signed)


class Follower:
    """What the glue does: judge, import, remember."""

    def __init__(self):
        self.state, self.core = FeedState(LAB.public), Core()

    def offered(self, core, head=None, *, proof=True, now=None):
        head = head or core.head()
        known = self.state.known
        shared = None
        if known is not None:
            shorter = min(known.length, head.length)
            holder = core if head.length >= known.length else self.core
            shared = holder.root(shorter) if proof or holder is self.core else None
        verdict = judge(self.state, head, shared, head.signed if now is None else now)
        signed = sign_head(LAB, head)
        if verdict in TAKEN:
            self.core, self.state = core.copy(), self.state.imported(signed)
        else:
            self.state = self.state.refused(verdict, signed, 5.0, PEER.public)
        return verdict


def test_a_feed_that_grows_is_followed():
    follower, core = Follower(), Core(["a"])
    assert follower.offered(core) is Verdict.FIRST
    assert follower.offered(core) is Verdict.SAME
    core.blocks += ["b", "c"]
    assert follower.offered(core) is Verdict.NEWER
    assert follower.state.known.length == 3


def test_what_is_older_is_refused_and_the_feed_goes_on():
    follower, core = Follower(), Core(["a", "b", "c"])
    follower.offered(core)
    assert follower.offered(core, core.head(2)) is Verdict.ROLLED_BACK
    assert follower.state.rollbacks == 1
    assert follower.state.known.length == 3
    core.blocks.append("d")
    assert follower.offered(core) is Verdict.NEWER
    follower.state.check()


@pytest.mark.parametrize(
    ("branch", "verdict"),
    [
        (Core(["a", "b", "X"]), Verdict.FORKED),
        (Core(["a", "b", "X", "Y"]), Verdict.FORKED),
        (Core(["a", "X"]), Verdict.FORKED),
        (Core(["a", "b", "c"], key="d0" * 32), Verdict.FORKED),
        (Core(["a", "b"], fork=1), Verdict.TRUNCATED),
        (Core(["a", "b", "X", "Y"], fork=1), Verdict.TRUNCATED),
        (Core(["a", "b", "c"], fork=1), Verdict.TRUNCATED),
    ],
)
def test_another_history_under_the_same_key_stops_the_feed_until_a_person_decides(branch, verdict):
    follower, core = Follower(), Core(["a", "b", "c"])
    follower.offered(core)

    assert follower.offered(branch) is verdict

    with pytest.raises(FeedRefusedError, match="Ask the lab") as caught:
        follower.state.check()
    assert caught.value.args[1] == verdict.value
    assert follower.state.known == core.head()
    core.blocks.append("d")
    assert follower.offered(core) is Verdict.STOPPED
    assert follower.offered(branch) is Verdict.STOPPED
    refusal = follower.state.refusal
    assert parse_head(refusal.known, LAB.public) == Core(["a", "b", "c"]).head()
    assert parse_head(refusal.offered, LAB.public) == branch.head()
    assert refusal.seen_from == PEER.public

    follower.state = follower.state.forgiven()
    assert follower.offered(core) is Verdict.NEWER


def test_what_nobody_proved_to_contain_the_known_is_not_taken_and_not_held_against_the_lab():
    follower, core = Follower(), Core(["a"])
    follower.offered(core)
    core.blocks.append("b")
    assert follower.offered(core, proof=False) is Verdict.UNPROVEN
    assert follower.state.known.length == 1
    assert follower.offered(core) is Verdict.NEWER


# --- eras


def test_a_lab_may_begin_a_new_core_and_never_go_back_to_an_old_one():
    follower, old = Follower(), Core(["a", "b"])
    follower.offered(old)
    new = Core(["all again"], era=2, key="d0" * 32, began=T0 + 10)
    assert follower.offered(new) is Verdict.NEW_ERA
    assert follower.offered(old) is Verdict.ROLLED_BACK
    old.blocks.append("c")
    assert follower.offered(old) is Verdict.ROLLED_BACK
    assert follower.offered(Core(["all again"], era=2, key="e0" * 32, began=T0 + 10)) is Verdict.FORKED


def test_a_lab_that_goes_on_after_a_thief_began_a_new_era_is_no_rollback():
    follower, lab = Follower(), Core(["a", "b"])
    follower.offered(lab)
    thief = Core(["mine"], era=2, key="d0" * 32, began=T0 + 100)
    assert follower.offered(thief) is Verdict.NEW_ERA
    lab.blocks.append("c")
    lab.signed = T0 + 100 + int(SKEW) + 1

    assert follower.offered(lab) is Verdict.FORKED

    assert follower.state.refusal is not None
    assert follower.offered(thief) is Verdict.STOPPED


def test_a_new_era_that_began_before_the_old_one_was_last_signed_is_a_fork():
    follower = Follower()
    follower.offered(Core(["a"], signed=T0 + DAY))
    backdated = Core(["mine"], era=2, key="d0" * 32, began=T0 + 5, signed=T0 + DAY)
    assert follower.offered(backdated) is Verdict.FORKED


def test_eras_that_are_over_are_remembered_through_later_ones_and_a_restart(tmp_path):
    follower, first = Follower(), Core(["a"])
    follower.offered(first)
    follower.offered(Core(["b"], era=2, key="d0" * 32, began=T0 + 100))
    follower.offered(Core(["c"], era=3, key="e0" * 32, began=T0 + DAY))
    FeedStates(tmp_path).save(follower.state)
    follower.state = FeedStates(tmp_path).load(LAB.public)
    first.signed = T0 + DAY - 1  # before the third era began, long after the second
    assert judge(follower.state, first.head(), None, T0 + DAY) is Verdict.FORKED
    other_second = Core(["x"], era=2, key="f0" * 32, began=T0 + 100)
    assert judge(follower.state, other_second.head(), None, T0 + DAY) is Verdict.FORKED
    first.signed = T0 + 50
    assert judge(follower.state, first.head(), None, T0 + DAY) is Verdict.ROLLED_BACK


def test_an_era_has_one_beginning():
    follower = Follower()
    follower.offered(Core(["a"]))
    assert follower.offered(Core(["a", "b"], began=T0 - 1, signed=T0)) is Verdict.FORKED


@pytest.mark.parametrize("when", [{"signed": T0 + DAY}, {"era": T0 + DAY, "key": "d0" * 32}])
def test_what_was_signed_tomorrow_waits_until_then(when):
    follower = Follower()
    follower.offered(Core(["a"]))
    tomorrow = Core(["a", "b"], **when)
    assert follower.offered(tomorrow, now=T0) is Verdict.AHEAD
    assert follower.state.refusal is None
    assert follower.offered(tomorrow, now=T0 + DAY) in TAKEN


def test_a_contradiction_stops_the_feed_until_a_person_looked_at_it():
    follower = Follower()
    follower.offered(Core(["a"]))
    new = Core(["b"], era=2, key="d0" * 32, began=T0 + 10)
    refused = follower.state.refused(Verdict.CONTRADICTS, sign_head(LAB, new.head()), 5.0, PEER.public)
    with pytest.raises(FeedRefusedError) as caught:
        refused.check()
    assert caught.value.args[1] == "contradicts"
    assert refused.forgiven().pardoned == "d0" * 32
    assert refused.forgiven().known == Core(["a"]).head()
    assert refused.forgiven(from_the_start=True) == FeedState(LAB.public, pardoned="d0" * 32)


class Lab:
    """Two managers of a lab whose clocks differ, taking turns; one that takes over may lack the other's core, and begins an era."""

    def __init__(self, apart):
        self.now, self.apart, self.turn = T0, apart, 0
        self.core = Core(["0"], era=T0, key=f"{0:064x}")
        self.heads = [self.core.copy()]

    def _clock(self):
        return self.now + self.turn * self.apart

    def publish(self):
        self.core.blocks.append(f"{len(self.heads)}")
        self.core.signed = max(self.core.signed, self._clock())
        self.heads.append(self.core.copy())

    def take_over(self):
        self.turn = 1 - self.turn
        began = self._clock()
        self.core = Core(["all"], era=max(began, self.core.era + 1), key=f"{len(self.heads):064x}", began=began)
        self.heads.append(self.core.copy())


moves = st.lists(st.tuples(st.sampled_from(["publish", "take over", "replay", "wait"]), st.integers(0, 100)), max_size=25)


@settings(max_examples=150)
@given(moves, st.integers(0, int(SKEW) - 1))
def test_whatever_an_honest_lab_does_and_in_whichever_order_it_is_heard_no_fork_is_seen(steps, apart):
    lab, follower = Lab(apart), Follower()
    for kind, size in steps:
        lab.now += size
        if kind == "publish":
            lab.publish()
        elif kind == "take over":
            lab.take_over()
        elif kind == "wait":
            lab.now += size * 1000
        else:
            follower.offered(lab.heads[size % len(lab.heads)], now=lab.now)
            follower.offered(lab.core, now=lab.now)
        assert follower.state.refusal is None
    follower.offered(lab.core, now=lab.now)
    assert follower.state.known == lab.core.head()


@settings(max_examples=150)
@given(
    st.integers(0, int(SKEW)),
    st.integers(1, 1 << 40),
    st.integers(0, 3),
    st.permutations(["thief", "lab", "old"]),
    st.integers(1, DAY),
)
def test_a_thiefs_new_era_is_found_out_by_the_labs_next_head_whatever_it_says(ahead, era, past, order, later):
    """It may say that its era began at any time that is believed, and any number of the era; the lab signs again when that time is over."""
    follower, lab = Follower(), Core(["a"], era=T0 - DAY, began=T0 - DAY)
    for number in range(past):
        follower.offered(Core(["x"], era=T0 - DAY - 100 + number, key=f"{number:064x}", began=T0 - DAY - 100 + number))
    follower.offered(lab)
    began = T0 + ahead
    thief = Core(["mine"], era=min(T0 - DAY + era, began), key="d0" * 32, began=began)
    old = lab.copy()
    lab.blocks.append("b")
    lab.signed = began + int(SKEW) + later
    now = {"thief": T0, "lab": lab.signed, "old": lab.signed}
    for who in order:
        follower.offered({"thief": thief, "lab": lab, "old": old}[who], now=now[who])
    follower.offered(lab, now=lab.signed)
    follower.offered(thief, now=lab.signed)
    assert follower.state.refusal is not None
    assert follower.state.refusal.verdict in FATAL


# --- one core


@settings(max_examples=100)
@given(st.lists(st.tuples(st.sampled_from(["grow", "old", "fork", "cut"]), st.integers(0, 5)), max_size=12))
def test_what_was_taken_is_contained_in_all_that_is_taken_later(steps):
    follower, core = Follower(), Core(["0"])
    follower.offered(core)
    for number, (kind, size) in enumerate(steps):
        before, length = follower.core.copy(), len(core.blocks)
        if kind == "grow":
            core.blocks += [f"{number}"] * size
            verdict = follower.offered(core)
        elif kind == "old":
            verdict = follower.offered(core, core.head(max(0, length - size)))
        else:
            kept = core.blocks[: max(0, length - 1 - size % length)]
            verdict = follower.offered(Core([*kept, *[f"other {number}"] * (size + 1)], fork=int(kind == "cut")))
            assert verdict not in TAKEN
        assert follower.core.blocks[: len(before.blocks)] == before.blocks
        if verdict in {Verdict.FORKED, Verdict.TRUNCATED}:
            assert follower.state.refusal is not None


@pytest.mark.chaos
def test_row_17_a_forked_history_is_found_by_followers_that_meet_and_is_never_served(chaos):
    started = time.monotonic()
    found = 0
    for number in range(chaos.count(100, 20)):
        draw = random.Random(f"{chaos.seed} {number}")
        trunk = Core([str(n) for n in range(draw.randint(1, 30))])
        left, right = trunk.copy(), trunk.copy()
        left.blocks += ["left"] * draw.randint(1, 5)
        right.blocks += ["right"] * draw.randint(1, 5)  # by the stolen key
        sides = {0: left, 1: right}
        followers = {n: Follower() for n in range(6)}
        for n, follower in followers.items():
            follower.offered(trunk)
            assert follower.offered(sides[n % 2]) is Verdict.NEWER
        for _ in range(60):  # the partition is healed: they meet by chance
            one, other = draw.sample(sorted(followers), 2)
            taken = [str(block) for block in followers[one].core.blocks]
            followers[one].offered(followers[other].core)
            assert [str(block) for block in followers[one].core.blocks] == taken
        found += all(follower.state.refusal is not None for follower in followers.values())
        assert all(follower.core.blocks[-1] == sides[n % 2].blocks[-1] for n, follower in followers.items())
        assert any(follower.state.refusal is not None for follower in followers.values())
    assert found >= chaos.count(100, 20) * 0.95  # in sixty meetings, all but the loneliest have met the other side
    chaos.record(17, f"{chaos.count(100, 20)} forks, detected in all, by all followers in {found}", time.monotonic() - started)


# --- heads on the wire


@given(st.integers(0, 1000), st.integers(1, 255))
def test_no_bit_of_a_head_can_be_changed(place, flip):
    data = bytearray(sign_head(LAB, Core(["a"]).head()))
    data[place % len(data)] ^= flip
    with pytest.raises(MalformedFeedError):
        parse_head(bytes(data), LAB.public)


@given(st.binary(max_size=600))
def test_garbage_is_no_head(data):
    with pytest.raises(MalformedFeedError):
        parse_head(data, LAB.public)


def test_nobody_signs_for_another_lab():
    head = Core(["a"]).head()
    with pytest.raises(MalformedFeedError, match="not signed by"):
        parse_head(sign_head(THIEF, head), LAB.public)
    with pytest.raises(MalformedFeedError, match="not one of"):
        parse_head(sign_head(THIEF, head), THIEF.public)


@pytest.mark.parametrize(
    "wrong", [{"length": -1}, {"era": 0}, {"root": "x"}, {"core": "AB" * 32}, {"fork": 1 << 53}, {"began": T0 + 1}, {"format": 2}]
)
def test_a_head_that_makes_no_sense_is_not_signed(wrong):
    with pytest.raises(MalformedFeedError):
        sign_head(LAB, msgspec.structs.replace(Core(["a"]).head(), **wrong))


# --- what is remembered


def test_a_restart_forgets_neither_where_a_feed_was_nor_that_it_was_refused(tmp_path):
    follower, core = Follower(), Core(["a", "b"])
    follower.offered(core)
    states = FeedStates(tmp_path / "feeds")
    assert states.load(LAB.public) == FeedState(LAB.public)
    states.save(follower.state)

    follower.state = FeedStates(tmp_path / "feeds").load(LAB.public)
    assert follower.offered(core, core.head(1)) is Verdict.ROLLED_BACK
    assert follower.offered(Core(["a", "X"])) is Verdict.FORKED
    states.save(follower.state)

    again = FeedStates(tmp_path / "feeds").load(LAB.public)
    assert again == follower.state
    assert judge(again, core.head(), None, T0) is Verdict.STOPPED
    assert states.publishers() == [LAB.public]
    assert (tmp_path / "feeds" / f"{LAB.public}.json").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("data", [b"", b"{}", b"\xff", b'{"publisher": "x"}', None])
def test_a_damaged_memory_is_not_taken_for_a_fresh_one(tmp_path, data):
    states = FeedStates(tmp_path)
    states.save(FeedState(LAB.public, head=sign_head(LAB, Core(["a"]).head())))
    path = tmp_path / f"{LAB.public}.json"
    path.write_bytes(path.read_bytes().replace(b"publisher", b"Publisher") if data is None else data)
    with pytest.raises(StoreError, match="damaged"):
        states.load(LAB.public)


def test_a_memory_that_somebody_wrote_is_believed_in_nothing_that_is_not_signed(tmp_path):
    states = FeedStates(tmp_path)
    states.save(FeedState(LAB.public, head=sign_head(THIEF, Core(["a"]).head())))
    with pytest.raises(StoreError, match="not signed"):
        states.load(LAB.public)
    with pytest.raises(MalformedFeedError):
        states.load("../../etc/passwd")


def test_a_folder_that_can_not_be_written_is_told(tmp_path):
    (tmp_path / "feeds").write_bytes(b"a file in its place")
    with pytest.raises(StoreError):
        FeedStates(tmp_path / "feeds").save(FeedState(LAB.public))


# --- entries


def version(number, text=""):
    return FeedVersion(
        blake3(b"%d %s" % (number, text.encode())).hexdigest(), 1000 + number, 1.8e9, {"n": str(number)} if number % 2 else {}
    )


def model(*numbers, aliases=None, config=None):
    return FeedModel(max(numbers, default=0) + 1, {number: version(number) for number in numbers}, aliases or {}, config)


def put(key, value):
    return Change(key, value if value is None else msgspec.json.encode(value))


SOME = Content({"digits": model(1, 2, aliases={"prod": 1, "latest": 2}), "faces": model(1, config={"copies": 2})}, frozenset({PEER.public}))


def test_what_is_written_is_what_is_read():
    update = [Change(key, value) for key, value in entries(SOME).items()]
    content, changed = applied(Content(), update)
    assert content == SOME
    assert changed == ("digits", "faces")
    assert applied(content, update) == (SOME, ())


def test_the_keys_are_those_that_a_node_program_reads():
    found = entries(SOME)
    assert sorted(found) == [
        "aliases/digits/latest", "aliases/digits/prod", "models/digits/versions/1", "models/digits/versions/2", "models/faces/config",
        "models/faces/versions/1", f"peers/{PEER.public}",
    ]  # fmt: skip
    gone = entries(Content({"digits": FeedModel(4, {1: version(1)})}))
    assert msgspec.json.decode(gone["models/digits/numbers"]) == {"next": 4}
    assert msgspec.json.decode(found["aliases/digits/prod"]) == {"version": 1}
    assert msgspec.json.decode(found["models/digits/versions/2"]) == {"digest": version(2).digest, "nbytes": 1002, "created": 1.8e9}


def test_a_moved_alias_is_one_entry_and_one_changed_model():
    moved = Content({**SOME.models, "digits": model(1, 2, aliases={"prod": 2, "latest": 2})}, SOME.peers)
    update = changes(entries(SOME), entries(moved))
    assert [change.key for change in update] == ["aliases/digits/prod"]
    assert applied(SOME, update) == (moved, ("digits",))


numbers = st.frozensets(st.integers(1, 6), max_size=4)


@settings(max_examples=60)
@given(st.lists(st.dictionaries(st.sampled_from(["a", "b"]), st.tuples(numbers, st.integers(1, 6))), max_size=6), st.booleans())
def test_a_follower_says_what_the_publisher_says_whichever_heads_it_saw(steps, anew):
    truth, seen, follower, given_ = Content(), {}, Content(), {}
    for step in steps:
        models = {name: FeedModel(old.next) for name, old in truth.models.items()}
        for name, (wanted, alias) in step.items():
            next_ = given_.get(name, 1)
            old = truth.models.get(name, FeedModel())
            kept = {n: old.versions[n] for n in wanted if n in old.versions} | {next_: version(next_)}
            given_[name] = next_ + 1
            models[name] = FeedModel(next_ + 1, kept, {"prod": next_ if alias not in kept else alias}, None)
        truth, before = Content(models), follower
        now = entries(truth)
        update = [Change(key, value) for key, value in now.items()] if anew else changes(seen, now)
        follower, changed = applied(Content() if anew else follower, update)
        seen = now
        assert follower == truth
        assert entries(follower) == now
        assert contradictions(before, follower) == ()
        assert anew or set(changed) == set(renewed(before, follower))


@pytest.mark.parametrize(
    ("update", "says"),
    [
        ([put("models/digits/versions/1", {"digest": "f" * 64, "nbytes": 1, "created": 1.0})], "never given again"),
        ([put("models/digits/versions/0", {"digest": "f" * 64, "nbytes": 1, "created": 1.0})], "number from 1"),
        ([put("models/digits/versions/01", {"digest": "f" * 64, "nbytes": 1, "created": 1.0})], "number from 1"),
        ([put("models/digits/versions/3", {"digest": "f" * 63, "nbytes": 1, "created": 1.0})], "a digest"),
        ([put("models/digits/versions/3", {"digest": "f" * 64, "nbytes": -1, "created": 1.0})], "a size"),
        ([put("models/digits/versions/3", {"digest": "f" * 64, "nbytes": "1", "created": 1.0})], "Expected"),
        ([Change("models/digits/versions/3", b"not json")], "breaks a rule"),
        ([Change("models/digits/versions/3", b"[" * 10_000)], "breaks a rule"),
        ([put("aliases/digits/prod", {"version": 9})], "does not have"),
        ([put("aliases/nobody/prod", {"version": 1})], "does not have"),
        ([put("models/digits/versions/1", None)], "does not have"),
        ([put("models/Digits/config", {})], "model name"),
        ([put("models/../config", {})], "model name"),
        ([put("aliases/digits/\x1b[2J", {"version": 1})], "alias"),
        ([put("aliases/digits/a@b", {"version": 1})], "alias"),
        ([put("aliases/digits/a:3", {"version": 1})], "alias"),
        ([put("models/digits/config", [1])], "Expected"),
        ([put("models/digits/numbers", {"next": 0})], "next number"),
        ([put("models/digits/numbers", {"next": 1 << 40})], "next number"),
        ([put("peers/somebody", {})], "64 hex digits"),
        ([Change("x" * 257, b"{}")], "at most 256"),
        ([Change("models/digits/config", b" " * (MAX_VALUE_NBYTES + 1))], "16384 bytes"),
        ([put(f"aliases/digits/a{n}", {"version": 1}) for n in range(300)], "at most 256 aliases"),
        ([put(f"peers/{n:064x}", {}) for n in range(1001)], "1000 peers"),
    ],
)
def test_an_update_that_breaks_a_rule_counts_in_no_part(update, says):
    good = put("models/digits/versions/3", {"digest": "a" * 64, "nbytes": 1, "created": 1.0})
    with pytest.raises(MalformedFeedError, match=says):
        applied(SOME, [good, *update])


def test_a_number_that_was_deleted_does_not_come_back_as_something_else():
    gone, _ = applied(SOME, [put("models/digits/versions/2", None), put("aliases/digits/latest", {"version": 1})])
    assert gone.models["digits"].next == 3
    again = Change("models/digits/versions/2", msgspec.json.encode(version(2)))
    with pytest.raises(MalformedFeedError, match="was deleted"):
        applied(gone, [again])


def test_a_feed_begun_anew_accounts_for_all_that_was_given():
    kept = Content({"digits": FeedModel(3, {1: version(1)}), "faces": FeedModel(2)})
    content, changed = applied(Content(), [Change(key, value) for key, value in entries(kept).items()])
    assert contradictions(SOME, content) == ()
    assert (changed, renewed(SOME, content)) == (("digits", "faces"), ("digits", "faces"))


@pytest.mark.parametrize(
    ("models", "says"),
    [
        ({"digits": model(1, 2)}, "faces: 1 versions were published, it knows of 0"),
        ({"digits": model(1), "faces": model(1)}, "digits: 2 versions were published, it knows of 1"),
        ({"digits": FeedModel(3, {1: version(1), 2: version(2, "x")}), "faces": model(1)}, "digits:2 was"),
    ],
)
def test_a_feed_begun_anew_that_forgot_or_changed_something_contradicts(models, says):
    (found,) = contradictions(SOME, Content(models))
    assert says in found


def test_a_version_that_was_deleted_does_not_come_back_with_a_new_era():
    gone = Content({"digits": FeedModel(3, {1: version(1)})})
    assert contradictions(gone, Content({"digits": model(1, 2)})) == ("digits:2 was deleted, and is back",)
    assert redefined(gone, Content({"digits": model(1, 2)})) == ()


def test_entries_of_a_newer_tether_are_passed_over():
    assert applied(SOME, [put("spaceships/x", {}), put("models/digits/mood", 1), Change("", b"")]) == (SOME, ())


def test_a_follower_can_not_be_made_to_keep_without_end(monkeypatch):
    monkeypatch.setattr(feed_entries, "MAX_MODELS", 3)
    with pytest.raises(MalformedFeedError, match="at most 3 models"):
        applied(Content(), [put(f"models/m{n}/config", {}) for n in range(4)])
    monkeypatch.setattr(feed_entries, "MAX_ENTRIES", 2)
    with pytest.raises(MalformedFeedError, match="more than 4 entries"):
        applied(Content(), [put("a", {})] * 5)
    with pytest.raises(MalformedFeedError, match="2 entries"):
        applied(Content(), [Change(key, value) for key, value in entries(Content({"a": model(1, 2)})).items()])


@pytest.mark.parametrize("kind", ["tags", "config"])
def test_what_each_entry_may_hold_it_may_not_hold_everywhere(monkeypatch, kind):
    monkeypatch.setattr(feed_entries, "MAX_SAID_NBYTES", 20_000)
    long = {"notes": "x" * 9_000}
    update = [
        put(f"models/m{n}/config", long)
        if kind == "config"
        else put(f"models/m/versions/{n}", {"digest": "a" * 64, "nbytes": 1, "created": 1.0, "tags": long})
        for n in range(1, 4)
    ]
    applied(Content(), update[:2])
    with pytest.raises(MalformedFeedError, match="at most 20000 bytes"):
        applied(Content(), update)


def test_of_too_many_aliases_the_well_known_ones_are_said():
    aliases = sayable_aliases({**{f"a{n:04}": 1 for n in range(300)}, "prod": 1, "latest": 1})
    assert len(aliases) == 256
    assert {"prod", "latest", "a0000"} <= aliases.keys()
    applied(Content(), [Change(key, value) for key, value in entries(Content({"m": FeedModel(2, {1: version(1)}, aliases)})).items()])


def test_every_model_has_a_latest_for_the_catalog():
    assert model(1, 4).names == {"latest": 4}
    assert model(1, 4, aliases={"latest": 1, "prod": 4}).names == {"latest": 1, "prod": 4}
    assert FeedModel(5).names == {}
