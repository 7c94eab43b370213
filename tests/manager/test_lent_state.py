"""Labs that lend workers: who is up, who is asked when, who is given up. Pure: times are values."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tether.errors import BadInputError, QueueFullError
from tether.manager.peering.lent_state import INTERVAL, MOST_LABS, SILENCE, LentState, Offer, Vitals, worker_of

A, B = "a" * 64, "b" * 64
OFFER = Offer(2, 1, 64)
STEP = 0.1


def key(number):
    return f"{number:064x}"


class Story:
    """Turns as the rim takes them; labs answer after `delay` seconds, None: never."""

    def __init__(self):
        self.now, self.state = 100.0, LentState(100.0)
        self.delay, self.pending, self.asked, self.lost = {}, [], [], []

    def register(self, peer, offer=OFFER, delay=0.05):
        self.delay[peer] = delay
        self.state.register(peer, offer, Vitals(offer.slots), self.now)

    def run(self, seconds, step=STEP):
        end = self.now + seconds
        while self.now < end:
            self.now += step
            for at, peer in [each for each in self.pending if each[0] <= self.now]:
                self.pending.remove((at, peer))
                if self.delay.get(peer) is None:
                    self.state.failed(peer, self.now)
                else:
                    self.state.answered(peer, Vitals(3, 0.5, 1, 2), self.now)
            turn = self.state.turn(self.now)
            self.lost += [(self.now, peer) for peer in turn.lost]
            for peer in turn.ask:
                self.asked.append((self.now, peer))
                wait = self.delay.get(peer)
                self.pending.append((self.now + (SILENCE if wait is None else wait), peer))

    def up(self):
        return {each.peer for each in self.state.workers}


def test_one_that_is_about_to_end_is_down_and_asked_until_the_next_process_answers():
    story = Story()
    story.register(A)
    (before,) = story.state.workers
    story.delay[A] = None
    assert story.state.leaves(A, story.now)
    assert not story.state.leaves(A, story.now)
    assert not story.state.leaves(B, story.now)
    assert story.up() == set()
    story.delay[A] = 0.05
    story.run(2)
    (after,) = story.state.workers
    assert after.number > before.number, "what was loaded there is not there any more"


def test_one_that_answers_is_asked_each_second_and_stays():
    story = Story()
    story.register(A)
    (worker,) = story.state.workers
    assert (worker.id, worker.peer, worker.gpus, worker.slots) == (worker_of(A), A, 1, 64)
    story.run(10)
    assert story.state.workers == (worker,)
    assert 8 <= len(story.asked) <= 11
    assert story.state.vitals_of(A) == Vitals(3, 0.5, 1, 2)
    assert story.state.peer_of(worker.id, worker.number) == A


def test_one_that_falls_silent_is_out_after_two_seconds_and_back_with_another_number():
    story = Story()
    story.register(A)
    story.run(5)
    (before,) = story.state.workers
    story.delay[A] = None
    silent = story.now
    story.run(3)
    ((at, peer),) = story.lost
    assert peer == A
    assert at - silent <= SILENCE + INTERVAL
    assert story.up() == set()
    assert story.state.vitals_of(A) is None
    story.delay[A] = 0.05
    story.run(10)
    (after,) = story.state.workers
    assert after.number > before.number
    assert story.state.peer_of(before.id, before.number) is None


def test_who_does_not_come_back_is_asked_ever_less_often_and_then_forgotten():
    story = Story()
    story.register(A)
    story.delay[A] = None
    story.run(700)
    assert len(story.asked) < 60
    assert story.state.offer_of(A) is None
    asked = len(story.asked)
    story.run(60)
    assert len(story.asked) == asked


def test_a_process_that_stood_still_holds_it_against_nobody():
    story = Story()
    story.register(A)
    story.run(3)
    story.run(20, step=20)
    assert story.lost == []
    story.run(3)
    assert story.up() == {A}


def test_registering_again_changes_nothing_unless_other_models_are_meant():
    story = Story()
    story.register(A)
    (first,) = story.state.workers
    story.register(A)
    assert story.state.workers == (first,)
    story.register(A, Offer(3, 1, 96))
    (more,) = story.state.workers
    assert (more.number, more.slots) == (first.number, 96)
    story.register(A, Offer(3, 1, 96, "digits*"))
    (other,) = story.state.workers
    assert other.number > first.number
    assert story.state.end(A)
    assert not story.state.end(A)
    assert story.state.workers == ()


def test_there_is_room_for_so_many_and_no_more():
    story = Story()
    for number in range(MOST_LABS):
        story.register(key(number))
    story.register(key(0), Offer(5, 0, 5))
    with pytest.raises(QueueFullError):
        story.register(A)
    story.state.end(key(0))
    story.register(A)
    assert len(story.state.workers) == MOST_LABS


@pytest.mark.parametrize(
    "offer",
    [Offer(-1), Offer(1, 0, 0), Offer(1, -1, 1), Offer(1 << 21, 0, 1), *(Offer(1, 0, 1, glob) for glob in ("", "A", "a~b", "***", "a b"))],
)
def test_offers_that_make_no_sense_are_refused(offer):
    with pytest.raises(BadInputError):
        offer.checked()


def test_an_offer_is_for_models_without_a_publisher():
    offer = Offer(1, 0, 1, "digits*").checked()
    assert offer.covers("digits-2")
    assert not offer.covers("faces")
    assert not offer.covers("alice~digits")
    assert not Offer(1, 0, 1).covers("alice~digits")
    assert Offer(0).checked() == Offer(0)


@settings(max_examples=200, deadline=None)
@given(st.text("0123456789abcdef", min_size=4, max_size=12))
def test_whatever_happens_nobody_silent_stays_up_and_numbers_are_given_once(seed):
    rng, story, numbers = random.Random(seed), Story(), set()
    peers, since = [key(number) for number in range(4)], {}
    for _ in range(40):
        peer = rng.choice(peers)
        match rng.randrange(5):
            case 0:
                story.register(peer, Offer(rng.randint(1, 3), 0, 8, rng.choice(("*", "a*"))), rng.choice((0.01, 0.5)))
                since.pop(peer, None)
            case 1:
                story.delay[peer] = None
                since.setdefault(peer, story.now)
            case 2:
                story.delay[peer] = rng.choice((0.01, 0.9))
                since.pop(peer, None)
            case 3:
                story.state.end(peer)
            case 4:
                story.state.failed(peer, story.now)
        story.run(rng.choice((0.1, 1.0, 4.0)))
        for worker in story.state.workers:
            assert story.now - since.get(worker.peer, story.now) <= SILENCE + INTERVAL + 2 * STEP
            numbers.add((worker.number, worker.peer))
    assert len(numbers) == len({number for number, _ in numbers})
