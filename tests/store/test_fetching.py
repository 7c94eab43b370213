"""Which blob is asked of whom next: decided without a network, so every order of events can be told as a story."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from tether.store.replicas.fetching import (
    AHEAD,
    NEEDED,
    WHOLE,
    Abandon,
    Absent,
    Arrived,
    Ask,
    Failed,
    Fetching,
    FetchRules,
    GiveUp,
    Lied,
    Wanted,
)

RULES = FetchRules(max_nbytes=10, patience=2.0, rests=(0.5, 1.0), wary=10.0, give_up=30.0)


def blob(number, nbytes=1):
    return Wanted(f"{number:064x}", nbytes, f"files/{number}")


A, B, C, D = (blob(number) for number in range(4))


def wanting(fetching, *blobs, urgency=NEEDED, now=0.0):
    return [each for wanted in blobs for each in fetching.want(wanted, urgency, now)]


def test_blobs_are_asked_for_in_their_order_as_many_as_the_source_takes():
    fetching = Fetching([2], RULES)
    assert wanting(fetching, A, B, C) == [Ask(0, A), Ask(0, B)]
    assert fetching.handle(Arrived(0, B.digest), 1.0) == [Ask(0, C)]


def test_no_more_bytes_are_on_their_way_than_allowed_but_one_blob_always_is():
    fetching = Fetching([9], RULES)
    large = blob(9, 20)
    assert wanting(fetching, large, A) == [Ask(0, large)]
    assert fetching.handle(Arrived(0, large.digest), 1.0) == [Ask(0, A)]
    assert wanting(fetching, blob(5, 9), blob(6, 1)) == [Ask(0, blob(5, 9))]


def test_what_somebody_waits_for_comes_before_whole_versions_and_those_before_what_may_be_read_soon():
    fetching = Fetching([1], RULES)
    assert wanting(fetching, A) == [Ask(0, A)]
    assert wanting(fetching, B, urgency=AHEAD) + wanting(fetching, C, urgency=WHOLE) + wanting(fetching, D) == []
    order = [fetching.handle(Arrived(0, each.digest), 1.0) for each in (A, D, C)]
    assert order == [[Ask(0, D)], [Ask(0, C)], [Ask(0, B)]]


def test_a_blob_that_becomes_urgent_moves_up_and_is_asked_for_once():
    fetching = Fetching([1], RULES)
    wanting(fetching, A)
    wanting(fetching, B, C, urgency=AHEAD)
    assert fetching.want(C, NEEDED, 0.0) == []
    assert fetching.want(C, AHEAD, 0.0) == []
    assert fetching.handle(Arrived(0, A.digest), 1.0) == [Ask(0, C)]
    assert fetching.handle(Arrived(0, C.digest), 1.0) == [Ask(0, B)]
    assert fetching.handle(Arrived(0, B.digest), 1.0) == []
    assert fetching.next_tick(1.0) is None


def test_the_next_source_is_asked_when_the_first_lacks_it_and_nobody_when_all_do():
    fetching = Fetching([1, 1], RULES)
    wanting(fetching, A)
    assert fetching.handle(Absent(0, A.digest), 1.0) == [Ask(1, A)]
    assert fetching.handle(Absent(1, A.digest), 1.0) == [GiveUp(A, ())]
    assert Fetching([], RULES).want(A, NEEDED, 0.0) == [GiveUp(A, ())]


def test_a_source_that_fails_rests_longer_each_time_and_is_asked_again():
    fetching = Fetching([1], RULES)
    wanting(fetching, A)
    assert fetching.handle(Failed(0, A.digest), 1.0) == []
    assert fetching.next_tick(1.0) == 1.5
    assert fetching.tick(1.4) == []
    assert fetching.tick(1.5) == [Ask(0, A)]
    fetching.handle(Failed(0, A.digest), 2.0)
    assert (fetching.next_tick(2.0), fetching.tick(3.0)) == (3.0, [Ask(0, A)])
    fetching.handle(Failed(0, A.digest), 4.0)
    assert fetching.next_tick(4.0) == 5.0
    fetching.tick(5.0)
    fetching.handle(Arrived(0, A.digest), 5.0)
    assert fetching.want(B, NEEDED, 5.0) == [Ask(0, B)]


def test_while_a_source_rests_the_next_one_is_asked():
    fetching = Fetching([1, 1], RULES)
    wanting(fetching, A)
    assert fetching.handle(Failed(0, A.digest), 1.0) == [Ask(1, A)]


def test_a_source_that_lied_is_asked_nothing_more_and_what_it_was_asked_for_is_asked_of_others():
    fetching = Fetching([2, 3], RULES)
    wanting(fetching, A, B, C)
    instructions = fetching.handle(Lied(0, A.digest), 1.0)
    assert instructions == [Abandon(0, B.digest), Ask(1, A), Ask(1, B), Ask(1, C)]
    assert fetching.banned == (0,)
    assert fetching.handle(Lied(1, A.digest), 1.0) == [
        Abandon(1, B.digest),
        Abandon(1, C.digest),
        GiveUp(A, ()),
        GiveUp(B, ()),
        GiveUp(C, ()),
    ]


def test_a_source_that_gives_nothing_for_its_patience_is_not_waited_for_alone():
    fetching = Fetching([1, 1], RULES)
    wanting(fetching, A)
    assert fetching.next_tick(0.0) == 2.0
    assert fetching.tick(2.0) == [Ask(1, A)]
    assert fetching.handle(Arrived(1, A.digest), 3.0) == [Abandon(0, A.digest)]
    assert fetching.want(B, NEEDED, 4.0) == [Ask(1, B)], "it was slow a moment ago"
    fetching.handle(Arrived(1, B.digest), 5.0)
    assert fetching.want(C, NEEDED, 13.0) == [Ask(0, C)]


def test_a_source_that_is_slow_and_gives_something_is_waited_for():
    fetching = Fetching([3, 3], RULES)
    wanting(fetching, A, B, C)
    fetching.handle(Arrived(0, A.digest), 1.9)
    assert fetching.tick(2.0) == []
    fetching.handle(Arrived(0, B.digest), 3.8)
    assert fetching.tick(5.7) == []
    assert fetching.tick(5.8) == [Ask(1, C)]


def test_no_more_than_two_sources_are_asked_for_one_blob():
    fetching = Fetching([1, 1, 1], RULES)
    wanting(fetching, A)
    assert fetching.tick(2.0) == [Ask(1, A)]
    assert fetching.tick(9.0) == []
    assert fetching.handle(Failed(1, A.digest), 9.5) == [Ask(2, A)]


def test_silence_everywhere_ends_with_the_names_of_the_silent():
    fetching = Fetching([1, 1], RULES)
    wanting(fetching, A, B)
    fetching.handle(Absent(0, A.digest), 0.0)
    assert fetching.next_tick(29.0) == 30.0
    fetching.tick(29.9)
    given_up = [each for each in fetching.tick(30.0) if isinstance(each, GiveUp)]
    assert given_up == [GiveUp(A, (1,)), GiveUp(B, (0, 1))]
    assert fetching.next_tick(30.0) is None


def test_as_long_as_something_comes_nothing_is_given_up():
    fetching = Fetching([1], RULES)
    wanting(fetching, A, B)
    fetching.handle(Arrived(0, A.digest), 29.0)
    assert not [each for each in fetching.tick(58.0) if isinstance(each, GiveUp)]
    assert [each for each in fetching.tick(59.0) if isinstance(each, GiveUp)] == [GiveUp(B, (0,))]


def test_what_nobody_wants_any_more_is_taken_back():
    fetching = Fetching([1], RULES)
    wanting(fetching, A, B)
    assert fetching.unwant(A.digest, 1.0) == [Abandon(0, A.digest), Ask(0, B)]
    assert fetching.unwant(A.digest, 1.0) == []
    assert fetching.handle(Arrived(0, A.digest), 1.0) == []


class World:
    """Sources that answer as they please, and what must hold whatever they do."""

    def __init__(self, seed, sources, blobs):
        self.chance = random.Random(f"fetching {seed}")
        self.rooms = [self.chance.randrange(1, 4) for _ in range(sources)]
        self.fetching, self.now = Fetching(self.rooms, RULES), 0.0
        self.blobs = [blob(number, self.chance.randrange(1, 6)) for number in range(blobs)]
        self.asked, self.banned = set(), set()
        self.lacks = {(source, each.digest) for source in range(sources) for each in self.blobs if self.chance.random() < 0.3}
        self.done, self.given_up = set(), {}

    def carry_out(self, instructions):
        for each in instructions:
            match each:
                case Ask(source, wanted):
                    assert source not in self.banned
                    assert (source, wanted.digest) not in self.asked
                    assert wanted.digest not in self.done | self.given_up.keys()
                    self.asked.add((source, wanted.digest))
                case Abandon(source, digest):
                    self.asked.remove((source, digest))
                case GiveUp(wanted, silent):
                    self.asked = {(source, digest) for source, digest in self.asked if digest != wanted.digest}
                    self.given_up[wanted.digest] = silent
        for source, room in enumerate(self.rooms):
            assert sum(asked == source for asked, _ in self.asked) <= room
        for wanted in self.blobs:
            assert sum(digest == wanted.digest for _, digest in self.asked) <= 2

    def step(self):
        self.now += self.chance.random()
        if not self.asked or self.chance.random() < 0.2:
            self.carry_out(self.fetching.tick(self.now))
            return
        source, digest = self.chance.choice(sorted(self.asked))
        kind = self.chance.choices([Arrived, Failed, Lied], [8, 2, 0.2])[0]
        if kind is Arrived and (source, digest) in self.lacks:
            kind = Absent
        self.asked.remove((source, digest))
        if kind is Arrived:
            self.done.add(digest)
        if kind is Lied:
            self.banned.add(source)
        self.carry_out(self.fetching.handle(kind(source, digest), self.now))


@given(seed=st.integers(0, 10**9), sources=st.integers(1, 4), blobs=st.integers(1, 12))
@settings(max_examples=150)
def test_whatever_sources_do_every_blob_comes_or_is_given_up_for_a_reason(seed, sources, blobs):
    world = World(seed, sources, blobs)
    for wanted in world.blobs:
        world.carry_out(world.fetching.want(wanted, world.chance.choice([NEEDED, WHOLE, AHEAD]), world.now))
    for _ in range(2000):
        if world.fetching.next_tick(world.now) is None:
            break
        world.step()
    assert world.done | world.given_up.keys() == {each.digest for each in world.blobs}
    assert not world.done & world.given_up.keys()
    assert not world.asked
    for digest, silent in world.given_up.items():
        for source in set(range(sources)) - set(silent):
            assert source in world.banned or (source, digest) in world.lacks
