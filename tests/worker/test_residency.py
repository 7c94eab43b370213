"""Who is in memory: decided without a loop or a clock."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tether.types import Digest, ModelVersion
from tether.worker.residency import GPU, PASSES, PATIENCE, RAM, SETTLE, Phase, Residency


def model(name):
    return ModelVersion(name, 1, Digest(name.encode().hex().ljust(64, "0")))


A, B, C, D, E = map(model, "abcde")


class Worker:
    """A residency, and how time goes on."""

    def __init__(self, budget, **places):
        self.residency, self.now = Residency({RAM: budget} | places), 0.0

    def ask(self, model, nbytes, **more):
        self.residency.want(model, {RAM: nbytes}, self.now, **more)
        return self.decide()

    def decide(self):
        return self.residency.decide(self.now)

    def load(self, model, nbytes, *, seconds=1.0, uses=1, measured=None, **more):
        """Ask, and load where that is allowed."""
        decision = self.ask(model, nbytes, **more)
        assert (decision.admitted, decision.refused) == ([model], {})
        self.residency.loaded(model, {RAM: nbytes if measured is None else measured}, seconds, self.now)
        if uses:
            self.use(model, uses)

    def use(self, model, uses=1, **more):
        self.now += 0.001
        self.residency.used(model, uses, self.now, **{"is_busy": False} | more)

    def gone(self, *models):
        for each in models:
            self.residency.gone(each)
        return self.decide()


def test_what_fits_is_let_in_at_once_side_by_side():
    worker = Worker(10)
    assert worker.ask(A, 5).admitted == [A]
    assert worker.ask(B, 5).admitted == [B]
    assert worker.ask(C, 1).admitted == []


def test_who_takes_the_place_of_another_comes_in_when_that_has_gone():
    worker = Worker(10)
    worker.load(A, 8)
    decision = worker.ask(B, 8)
    assert (decision.evicted, decision.admitted) == ([A], [])
    assert worker.decide().evicted == []
    assert worker.gone(A).admitted == [B]


def test_of_equals_the_one_that_was_used_longest_ago_goes():
    worker = Worker(9)
    for each in (A, B, C):
        worker.load(each, 3)
    worker.use(A, 0, is_busy=True)
    worker.use(A, 0)
    assert worker.ask(D, 3).evicted == [B]


@pytest.mark.parametrize(("slow", "gone"), [(A, B), (B, A)])
def test_what_takes_long_to_load_stays(slow, gone):
    worker = Worker(10)
    for each in (A, B):
        worker.load(each, 5, seconds=10.0 if each == slow else 0.1)
    assert worker.ask(C, 5).evicted == [gone]


def test_what_is_used_often_stays_though_others_came_later():
    worker = Worker(10)
    worker.load(A, 5, uses=20)
    worker.load(B, 5)
    assert worker.ask(C, 5).evicted == [B]


def test_what_is_not_used_any_more_goes_in_the_end_however_often_it_was():
    worker = Worker(10)
    worker.load(A, 5, uses=100_000)
    last = None
    for turn in range(200):
        each = model(f"m{turn}")
        decision = worker.ask(each, 5)
        if decision.evicted == [A]:
            return
        assert decision.evicted in ([], [last])
        if decision.evicted:
            decision = worker.gone(last)
        worker.residency.loaded(each, {RAM: 5}, 1.0, worker.now)
        worker.use(each)
        last = each
    pytest.fail("it stayed for ever")


def test_one_large_one_goes_rather_than_it_and_those_it_makes_superfluous():
    worker = Worker(10)
    worker.load(A, 1)
    worker.load(B, 8, seconds=100)
    assert worker.ask(C, 8).evicted == [B]


def test_what_runs_stays_until_somebody_waited_for_it_and_then_answers_what_it_has_first():
    worker = Worker(10)
    worker.load(A, 8)
    worker.use(A, is_busy=True)
    assert worker.ask(B, 8).evicted == []
    worker.now += PATIENCE
    assert worker.decide().evicted == [A]
    assert worker.residency.phase(A) is Phase.LEAVING
    assert worker.decide().admitted == []
    assert worker.gone(A).admitted == [B]


def test_what_nobody_has_used_yet_stays_for_a_moment_so_that_those_who_asked_for_it_find_it():
    worker = Worker(10)
    worker.load(A, 8, uses=0)
    assert worker.ask(B, 8).evicted == []
    worker.now += SETTLE
    assert worker.decide().evicted == [A]


def test_what_is_pinned_stays_and_who_can_never_come_in_is_told_why():
    worker = Worker(10)
    worker.load(A, 4, pinned=True)
    (reason,) = worker.ask(B, 7).refused.values()
    assert "7 bytes" in reason
    assert "pinned models take 4" in reason
    (reason,) = worker.ask(C, 11).refused.values()
    assert "11 bytes" in reason
    assert "10" in reason
    worker.load(B, 6)
    worker.residency.keep(A, pinned=False, keep_alive=None)
    assert set(worker.ask(C, 10).evicted) == {A, B}


def test_what_is_pinned_and_goes_all_the_same_is_in_nobodys_way():
    worker = Worker(10)
    worker.load(A, 4, pinned=True)
    worker.residency.leaves(A)
    assert worker.ask(B, 10).refused == {}
    assert worker.gone(A).admitted == [B]


def test_what_is_to_be_kept_goes_after_others_and_by_itself_when_its_time_is_over():
    worker = Worker(10)
    worker.load(A, 5, keep_alive=60.0)
    worker.load(B, 5, seconds=100.0)
    assert worker.ask(C, 5).evicted == [B]
    worker.gone(B)
    worker.residency.loaded(C, {RAM: 5}, 1.0, worker.now)
    worker.now += 61
    assert worker.decide().evicted == [A]
    assert worker.gone(A).evicted == []


@pytest.mark.parametrize("keep_alive", [0.0, 0.01])
def test_what_is_to_be_kept_for_no_time_is_there_all_the_same_for_those_who_asked_for_it(keep_alive):
    worker = Worker(10)
    worker.load(A, 5, keep_alive=keep_alive, uses=0)
    worker.now += 0.5
    assert worker.decide().evicted == []
    worker.use(A)
    worker.now += keep_alive
    assert worker.decide().evicted == [A]


def test_what_is_to_be_kept_for_no_time_goes_though_nobody_came_for_it():
    worker = Worker(10)
    worker.load(A, 5, keep_alive=0.0, uses=0)
    worker.now += 2.0
    assert worker.decide().evicted == [A]


def test_what_turns_out_larger_puts_others_out_and_one_alone_stays():
    worker = Worker(10)
    worker.load(A, 5)
    worker.load(B, 5, seconds=100.0, measured=8)
    assert worker.decide().evicted == [A]
    worker.gone(A)
    worker.residency.measured(B, {RAM: 30})
    assert worker.decide().evicted == []
    assert worker.ask(C, 1).evicted == [B]
    assert worker.gone(B).admitted == [C]
    worker.gone(C)
    assert worker.ask(B, 5).admitted == [B], "it was held before, alone"


def test_both_memories_have_to_have_room_and_only_what_takes_some_there_goes():
    residency = Residency({RAM: 10, GPU: 4})
    for each, size in ((A, {RAM: 5}), (B, {RAM: 1, GPU: 4})):
        residency.want(each, size, 0.0)
        assert residency.decide(0.0).admitted == [each]
        residency.loaded(each, size, 1.0, 0.0)
        residency.used(each, 9 if each == B else 1, 0.0, is_busy=False)
    residency.want(C, {RAM: 1, GPU: 2}, 1.0)
    assert residency.decide(1.0).evicted == [B]


def test_small_ones_pass_one_that_waits_for_much_but_not_for_ever():
    worker = Worker(10)
    worker.load(A, 6)
    worker.use(A, is_busy=True)
    assert worker.ask(B, 9).admitted == []
    passed = 0
    for turn in range(PASSES + 2):
        each = model(f"small-{turn}")
        if worker.ask(each, 1).admitted:
            passed += 1
            worker.gone(each)
    assert passed == PASSES


SIZES = {each: 1 + number % 7 for number, each in enumerate(map(model, "abcdefghijkl"))}
BUDGET = 12


class Machine(RuleBasedStateMachine):
    """Anything that can happen, in any order; in the end all who wait get in."""

    def __init__(self):
        super().__init__()
        self.worker, self.loading, self.leaving, self.waiting = Worker(BUDGET), set(), set(), {}
        self.pinned = set()

    def settle(self):
        residency = self.worker.residency
        before = {each: residency.phase(each) for each in SIZES}
        decision = self.worker.decide()
        for each in decision.evicted:
            assert before[each] in {Phase.IDLE, Phase.BUSY}
            assert each not in self.pinned
            if before[each] is Phase.BUSY:
                assert any(self.worker.now - since >= PATIENCE for since in self.waiting.values())
        assert set(decision.admitted) | set(decision.refused) <= set(self.waiting)
        self.leaving |= set(decision.evicted)
        self.loading |= set(decision.admitted)
        for each in (*decision.admitted, *decision.refused):
            del self.waiting[each]
        assert not decision.refused or self.pinned

    @rule(each=st.sampled_from(sorted(SIZES, key=str)), pinned=st.sampled_from([False, False, False, True]))
    def ask(self, each, pinned):
        if self.worker.residency.phase(each) is None and each not in self.waiting:
            pinned &= len(self.pinned) < 1 and SIZES[each] <= 3
            self.waiting[each] = self.worker.now
            if pinned:
                self.pinned.add(each)
            self.worker.residency.want(each, {RAM: SIZES[each]}, self.worker.now, pinned=pinned)
            self.settle()

    @precondition(lambda self: self.loading)
    @rule(data=st.data(), fails=st.sampled_from([False, False, True]))
    def end_load(self, data, fails):
        each = data.draw(st.sampled_from(sorted(self.loading, key=str)))
        self.loading.discard(each)
        if fails:
            self.pinned.discard(each)
            self.worker.residency.gone(each)
        else:
            self.worker.residency.loaded(each, {RAM: SIZES[each]}, 1.0, self.worker.now)
        self.settle()

    @precondition(lambda self: self.leaving)
    @rule(data=st.data())
    def leave(self, data):
        each = data.draw(st.sampled_from(sorted(self.leaving, key=str)))
        self.leaving.discard(each)
        self.worker.residency.gone(each)
        self.settle()

    @rule(each=st.sampled_from(sorted(SIZES, key=str)), is_busy=st.booleans())
    def use(self, each, is_busy):
        self.worker.use(each, is_busy=is_busy)
        self.settle()

    @rule(seconds=st.sampled_from([0.1, 0.6, 3.0]))
    def wait(self, seconds):
        self.worker.now += seconds
        self.settle()

    @invariant()
    def the_budget_holds(self):
        assert self.worker.residency.taken[RAM] <= BUDGET

    def teardown(self):
        for _ in range(40 * len(SIZES)):
            if not self.waiting:
                return
            self.worker.now += 1.0
            for each in sorted(self.loading, key=str):
                self.loading.discard(each)
                self.worker.residency.loaded(each, {RAM: SIZES[each]}, 1.0, self.worker.now)
            for each in sorted(self.leaving, key=str):
                self.leaving.discard(each)
                self.worker.residency.gone(each)
            self.settle()
        assert not self.waiting, "somebody waits for ever"


Machine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestMachine = Machine.TestCase


def test_who_gives_an_answer_in_parts_is_not_put_out():
    worker = Worker(10)
    worker.load(A, 5)
    worker.load(B, 5, seconds=100.0)
    worker.use(A, is_streaming=True)
    assert worker.ask(C, 5).evicted == [B]
    worker.use(B, is_streaming=True)
    assert worker.ask(D, 5).evicted == []
    worker.now += 10 * PATIENCE
    assert worker.decide().evicted == []
    worker.use(A)
    assert worker.decide().evicted == [A]
