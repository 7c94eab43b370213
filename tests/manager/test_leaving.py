"""Copies that are one too many go, and as many as agreed are left: whoever drops, whatever is late or lost, however the labs plan."""

import random
from dataclasses import dataclass, field

from tether.manager.peering.leaving import Leaving

NAME, MARK = "net", "mark"


@dataclass
class Lab:
    """One that believes what it is told: not that it is one too many, which is drawn, but what others said."""

    leaving: Leaving
    holds: bool = True
    said: dict[int, tuple[bool, float]] = field(default_factory=dict)
    """Of others, as it came last: whether they keep it, and when they were asked."""

    def keeps(self):
        return self.holds and NAME not in self.leaving.names

    def keepers(self):
        return {other: asked for other, (keeps, asked) in self.said.items() if keeps}


class World:
    """Labs that ask each other; what they ask and answer is under way for as long as it is drawn, or lost."""

    def __init__(self, wanted, graces):
        self.labs = [Lab(Leaving(grace)) for grace in graces]
        self.wanted, self.now = wanted, 0.0
        self.questions, self.answers = [], []

    def act(self, lot):
        self.now += 1.0
        number = lot.randrange(len(self.labs))
        lab = self.labs[number]
        match lot.choice(["look", "look", "ask", "ask", "answer", "answer", "hear", "hear", "lose", "drop", "drop"]):
            case "look":
                lab.leaving.look({NAME: MARK} if lab.holds and lot.random() < 0.8 else {}, self.now)
            case "ask":
                self.questions.append((number, lot.randrange(len(self.labs)), self.now))
            case "answer" if self.questions:
                asker, asked, at = self.questions.pop(lot.randrange(len(self.questions)))
                self.answers.append((asker, asked, self.labs[asked].keeps(), at))
            case "hear" if self.answers:
                asker, asked, keeps, at = self.answers.pop(lot.randrange(len(self.answers)))
                if asker != asked and at > self.labs[asker].said.get(asked, (False, -1.0))[1]:  # of one peer answers come in order
                    self.labs[asker].said[asked] = keeps, at
            case "lose" if self.questions:
                self.questions.pop()
            case "drop" if lab.holds and lab.leaving.may_drop(NAME, self.wanted, lab.keepers()):
                lab.holds = False

    @property
    def copies(self):
        return sum(lab.holds for lab in self.labs)


def test_as_many_as_agreed_are_left_whatever_each_of_them_believes_to_be_one_too_many():
    dropped = 0
    for seed in range(1500):
        lot = random.Random(f"leaving-{seed}")
        count = lot.randint(2, 5)
        world = World(lot.randint(1, count), [lot.choice([0.0, 3.0]) for _ in range(count)])
        for _ in range(120):
            world.act(lot)
            assert world.copies >= world.wanted, seed
        dropped += count - world.copies
    assert dropped > 300, "else nothing was tried"


def test_when_all_hear_each_other_one_of_three_goes_and_no_second_one():
    world = World(2, [0.0] * 3)
    for _ in range(3):
        for number, lab in enumerate(world.labs):
            world.now += 1
            lab.leaving.look({NAME: MARK} if lab.holds and number == 1 else {}, world.now)
            world.now += 1
            lab.said = {other: (each.keeps(), world.now) for other, each in enumerate(world.labs) if other != number}
            if lab.holds and lab.leaving.may_drop(NAME, 2, lab.keepers()):
                lab.holds = False
    assert [lab.holds for lab in world.labs] == [True, False, True]


def test_who_hears_nobody_keeps_its_copy():
    leaving = Leaving(0.0)
    leaving.look({NAME: MARK}, 1.0)
    assert leaving.names == {NAME}
    assert not leaving.may_drop(NAME, 1, {})
    assert not leaving.may_drop(NAME, 1, {"a": 1.0}), "it was asked before this lab began to leave"
    assert leaving.may_drop(NAME, 1, {"a": 1.5})
    assert not leaving.may_drop("other", 1, {"a": 1.5})


def test_a_copy_is_one_too_many_for_a_while_before_it_is_left():
    leaving = Leaving(10.0)
    leaving.look({NAME: MARK}, 0.0)
    leaving.look({NAME: MARK}, 9.0)
    assert leaving.names == set()
    leaving.look({}, 9.5)  # it was needed for a moment
    leaving.look({NAME: MARK}, 10.0)
    assert leaving.names == set()
    leaving.look({NAME: "another version came"}, 20.0)
    assert leaving.names == set()
    leaving.look({NAME: "another version came"}, 30.0)
    assert leaving.names == {NAME}
